"""Agents with different memories side by side, over seeds and delays; see `agents.sweep`."""

from pathlib import Path

from ct_audio.commands.command_line import build_parser, refuse_overrides, refuse_twice


def main() -> int:
    """Parse, train what is missing, write and print the table."""
    parser = build_parser(
        "Train agents with different memories, with several seeds, and draw their success over steps (the counterpart "
        "of the paper's Figure 5); with --delays also over the delay of the task. Runs one after another; the same "
        "command again goes on where it stopped."
    )
    parser.add_argument("configs", nargs="+", type=Path, metavar="YAML", help="one for each memory")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for runs, table and pictures")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S", help="seeds of each")
    parser.add_argument("--delays", nargs="+", type=int, default=[], metavar="D", help="default: that of each YAML")
    parser.add_argument("--set", nargs="*", default=[], metavar="A.B=C", help="overrides for all runs")
    arguments = parser.parse_args()
    refuse_twice(arguments, "seeds", "delays")
    from ct_audio.agents.sweep import OWN_KEYS, run_sweep

    refuse_overrides(arguments.set, OWN_KEYS)
    status, table = run_sweep(
        arguments.configs, arguments.out, seeds=arguments.seeds, delays=arguments.delays, overrides=arguments.set
    )
    print(table, end="")
    return status
