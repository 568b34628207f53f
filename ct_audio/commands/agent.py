"""Train an agent from a run's YAML; the same command again resumes it."""

from pathlib import Path
from typing import TYPE_CHECKING

from ct_audio.commands.command_line import build_parser, parse, refuse

if TYPE_CHECKING:
    from ct_audio.agents.config import AgentConfig


def main() -> int:
    """Parse, let the agent act and learn, and return the exit status."""
    parser = build_parser(
        "Train an agent by reinforcement learning, or go on with its run. Exit status: 0 complete (or complete "
        "already), 1 the machine failed, 2 configuration or environment do not fit, or the loss is not finite; "
        "128 + number after SIGINT, SIGTERM or SIGUSR1, which save after the current update."
    )
    parser.add_argument("config", help="YAML of the run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change, as environment.delay=16")
    parser.add_argument("--watch", action="store_true", help="do not train: print an episode of the run's agent")
    parser.add_argument("--seed", type=int, default=0, help="of the episode that is watched")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="a picture of it, with what the attention looks at")
    arguments = parse(parser)
    refuse(arguments, "--seed", "--picture", why="only with --watch", unless=arguments.watch)
    from ct_audio.agents.config import load_agent_config

    config = load_agent_config(arguments.config, arguments.overrides)
    if arguments.watch:
        return _watch(config, arguments.seed, arguments.picture)
    from ct_audio.agents.loop import train_agent

    return train_agent(config)


def _watch(config: "AgentConfig", seed: int, picture: Path | None) -> int:
    from ct_audio.agents.watch import episode_figure, episode_text, watch_episode
    from ct_audio.common.errors import UserError
    from ct_audio.common.figures import write_figure

    if not 0 <= seed < 2**63:
        raise UserError(f"--seed: expected 0 to 2^63 - 1, got {seed}")
    episode = watch_episode(config.run_dir, seed=seed)
    print(episode_text(episode))
    if picture is not None:
        write_figure(episode_figure(episode, f"{config.name} after {episode.step:,} steps"), picture)
    return 0
