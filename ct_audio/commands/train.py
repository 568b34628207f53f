"""Train a model from a run's YAML; the same command again resumes it. Also under torchrun."""

import os
from pathlib import Path

from ct_audio.commands.command_line import build_parser
from ct_audio.common.errors import UserError


def main() -> int:
    """Parse, train, and return the exit status."""
    parser = build_parser(
        "Train a model, or go on with a run. Exit status: 0 complete (or complete already), 1 the machine failed, "
        "2 configuration or data do not fit, or the loss is not finite; 128 + number after SIGINT, SIGTERM or SIGUSR1, "
        "which save after the current update. Several processes: torchrun --nproc-per-node=N -m ct_audio train ..."
    )
    parser.add_argument("config", help="YAML of the run, or a recipe's, as kathleen/wavenet_small")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change, as train.num_steps=1000")
    parser.add_argument(
        "--branch",
        type=Path,
        metavar="RUN",
        help="begin at the last checkpoint of this run, with another name and schedule; RUN stays as it is",
    )
    arguments = parser.parse_intermixed_args()  # keys may stand after --branch RUN
    if arguments.branch and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--branch: not under torchrun; run this once without it, with train.num_steps=STEPS that RUN has, then "
            "under torchrun without --branch"
        )
    from ct_audio.runs.config import load_config
    from ct_audio.training.branch import branch_run
    from ct_audio.training.loop import train

    config = load_config(arguments.config, arguments.overrides)
    if arguments.branch:
        branch_run(arguments.branch, config)
    return train(config)
