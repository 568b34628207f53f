"""Train a model from a run's YAML; the same command again resumes it. Also under torchrun."""

from ct_audio.commands.command_line import build_parser


def main() -> int:
    """Parse, train, and return the exit status."""
    parser = build_parser(
        "Train a model, or go on with a run. Exit status: 0 complete (or complete already), 1 the machine failed, "
        "2 configuration or data do not fit, or the loss is not finite; 128 + number after SIGINT, SIGTERM or SIGUSR1, "
        "which save after the current update. Several processes: torchrun --nproc-per-node=N -m ct_audio train ..."
    )
    parser.add_argument("config", help="YAML of the run, or a recipe's, as kathleen/wavenet_small")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change, as train.num_steps=1000")
    arguments = parser.parse_args()
    from ct_audio.runs.config import load_config
    from ct_audio.training.loop import train

    return train(load_config(arguments.config, arguments.overrides))
