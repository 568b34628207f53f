"""Compare a lower learning rate with fewer updates: Rae et al. 2019, 5.5.1; see `experiments.update_frequency`."""

from pathlib import Path

from ct_audio.commands.command_line import build_parser, refuse_overrides, refuse_twice
from ct_audio.common.errors import UserError


def main() -> int:
    """Parse, train what is missing, draw, print, and return the exit status."""
    parser = build_parser(
        "Train one run to a late point and branch it: learning rate kept, or multiplied, or fewer updates. Draws the "
        "training NLL of the branches (the paper's Figure 3) and what each costs on the same codes and on the "
        "validation split. The same command again goes on where it stopped."
    )
    parser.add_argument("base", type=Path, help="YAML of any model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for runs, table and picture")
    parser.add_argument("--base-steps", type=int, required=True, metavar="S", help="steps before the branches")
    parser.add_argument("--branch-steps", type=int, required=True, metavar="N", help="steps of each branch")
    parser.add_argument(
        "--branches",
        nargs="+",
        default=["rate_0", "period_2", "period_4"],
        metavar="NAME",
        help="rate_X: the learning rate of the last step before the branch times X, held from there on; period_P: an "
        "update every P steps. The one that changes nothing is always there",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="A.B=C", help="overrides for all runs")
    arguments = parser.parse_args()
    for name in ("base_steps", "branch_steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}")
    refuse_twice(arguments, "branches")
    from ct_audio.experiments.update_frequency import OWN_KEYS, run_experiment

    refuse_overrides(arguments.set, OWN_KEYS)
    status, table = run_experiment(
        arguments.base,
        arguments.out,
        base_steps=arguments.base_steps,
        branch_steps=arguments.branch_steps,
        branches=arguments.branches,
        overrides=arguments.set,
    )
    if status == 0:
        print(table)
    return status
