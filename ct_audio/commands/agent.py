"""Train an agent from a run's YAML; the same command again resumes it."""

from ct_audio.commands.command_line import build_parser


def main() -> int:
    """Parse, let the agent act and learn, and return the exit status."""
    parser = build_parser(
        "Train an agent by reinforcement learning, or go on with its run. Exit status: 0 complete (or complete "
        "already), 1 the machine failed, 2 configuration or environment do not fit, or the loss is not finite; "
        "128 + number after SIGINT, SIGTERM or SIGUSR1, which save after the current update."
    )
    parser.add_argument("config", help="YAML of the run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change, as environment.delay=16")
    arguments = parser.parse_args()
    from ct_audio.agents.config import load_agent_config
    from ct_audio.agents.loop import train_agent

    return train_agent(load_agent_config(arguments.config, arguments.overrides))
