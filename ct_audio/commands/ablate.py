"""The paper's ablation of compression functions and losses (its Table 5), see `experiments.ablation`."""

import sys
from pathlib import Path

from ct_audio.commands.command_line import build_parser, refuse_overrides, refuse_twice
from ct_audio.common.errors import UserError
from ct_audio.common.machine import usable_cpus

PAPER_ROWS = ["conv_bptt", "max", "conv_autoencoding", "mean", "most_used", "dilated_conv_attention", "conv_attention"]
OTHER_ROWS = ["gru_attention"]


def main() -> int:
    """Parse, train what is missing, write and print the table; exit status 1 where a run failed."""
    parser = build_parser(
        "Train and compare compression functions, losses and rates (the paper's Table 5). The same command again goes "
        "on where it stopped. Lengths of windows and memory must be divisible by all rates."
    )
    parser.add_argument("base", type=Path, help="YAML of a Compressive Transformer; rows replace what they are about")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for runs, logs, table and picture")
    parser.add_argument(
        "--rows", nargs="+", choices=[*PAPER_ROWS, *OTHER_ROWS], default=PAPER_ROWS, help="lines of the table"
    )
    parser.add_argument("--rates", nargs="+", type=int, default=[2, 3, 4], metavar="C", help="compression rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S", help="seeds of each")
    parser.add_argument("--set", nargs="*", default=[], metavar="A.B=C", help="overrides for all runs")
    parser.add_argument("--num-processes", type=int, default=usable_cpus(), metavar="N", help="runs at a time")
    arguments = parser.parse_args()
    if arguments.num_processes < 1:
        raise UserError(f"--num-processes: expected at least 1, got {arguments.num_processes}")
    refuse_twice(arguments, "rows", "rates", "seeds")
    from ct_audio.experiments.ablation import OWN_KEYS, run_ablation

    refuse_overrides(arguments.set, OWN_KEYS)
    table, failed = run_ablation(
        arguments.base,
        arguments.out,
        rows=arguments.rows,
        rates=arguments.rates,
        seeds=arguments.seeds,
        overrides=arguments.set,
        num_processes=arguments.num_processes,
    )
    print(table, end="")
    for name in failed:
        print(f"error: {name} failed, see {arguments.out / 'logs' / name}.log", file=sys.stderr)
    return 1 if failed else 0
