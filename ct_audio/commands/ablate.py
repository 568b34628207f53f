"""Compare settings by training: compression functions and losses (the paper's Table 5), a grid, or single changes."""

import shlex
import sys
from pathlib import Path

from ct_audio.commands.command_line import build_parser, parse, refuse, refuse_overrides, refuse_twice
from ct_audio.common.errors import UserError
from ct_audio.common.machine import usable_cpus

PAPER_ROWS = ["conv_bptt", "max", "conv_autoencoding", "mean", "most_used", "dilated_conv_attention", "conv_attention"]
OTHER_ROWS = ["gru_attention"]


def main() -> int:
    """Parse, train what is missing, write and print the table; exit status 1 where a run failed."""
    parser = build_parser(
        "Train and compare compression functions, losses and rates (the paper's Table 5), or with --grid or --changes "
        "any settings of any recipe. The same command again goes on where it stopped. For Table 5 the lengths of "
        "windows and memory must be divisible by all rates."
    )
    parser.add_argument("base", type=Path, help="YAML of a run (Table 5: of a Compressive Transformer)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for runs, logs, table and picture")
    parser.add_argument(
        "--rows", nargs="+", choices=[*PAPER_ROWS, *OTHER_ROWS], default=PAPER_ROWS, help="lines of Table 5"
    )
    parser.add_argument("--rates", nargs="+", type=int, default=[2, 3, 4], metavar="C", help="its compression rates")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--grid",
        nargs="+",
        metavar="A.B=C,D",
        help="all combinations of these values; differences are to the first of them",
    )
    kind.add_argument(
        "--changes",
        nargs="+",
        metavar="'A.B=C ...'",
        help="one row each, of one or more settings in quotes, beside the unchanged base",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S", help="seeds of each")
    parser.add_argument("--set", nargs="*", default=[], metavar="A.B=C", help="overrides for all runs")
    parser.add_argument("--num-processes", type=int, default=usable_cpus(), metavar="N", help="runs at a time")
    arguments = parse(parser)
    if arguments.num_processes < 1:
        raise UserError(f"--num-processes: expected at least 1, got {arguments.num_processes}")
    refuse_twice(arguments, "rows", "rates", "seeds")
    every = {"overrides": arguments.set, "seeds": arguments.seeds, "num_processes": arguments.num_processes}
    if arguments.grid or arguments.changes:
        refuse(arguments, "--rows", "--rates", why="only for Table 5, without --grid and --changes")
        from ct_audio.experiments.grid import OWN_KEYS, combinations, run_grid

        if arguments.grid:
            rows = combinations(arguments.grid)
        else:
            rows = [[], *(shlex.split(change) for change in arguments.changes)]
        refuse_overrides([*arguments.set, *(setting for row in rows for setting in row)], OWN_KEYS)
        table, failed = run_grid(arguments.base, arguments.out, rows=rows, **every)
    else:
        from ct_audio.experiments.ablation import OWN_KEYS, run_ablation

        refuse_overrides(arguments.set, OWN_KEYS)
        rows = {"rows": arguments.rows, "rates": arguments.rates}
        table, failed = run_ablation(arguments.base, arguments.out, **rows, **every)
    print(table, end="")
    for name in failed:
        print(f"error: {name} failed, see {arguments.out / 'logs' / name}.log", file=sys.stderr)
    return 1 if failed else 0
