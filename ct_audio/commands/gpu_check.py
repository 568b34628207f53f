"""The first thing to run on a GPU: is it right, how fast is it, does it train; see `experiments.gpu_check`."""

import math
import shlex
import sys
from pathlib import Path

from ct_audio.commands.command_line import add_device_options, build_parser, open_device
from ct_audio.common.errors import UserError
from ct_audio.common.recipes import model_folder, model_names

RECIPES = ("kathleen/compressive_transformer", "kathleen/transformer_xl", "kathleen/wavenet")


def main() -> int:
    """Parse, check, print where the report is; exit status 1 if something is wrong."""
    parser = build_parser(
        "Check a GPU: the equalities of the tests in float64, which attention kernel runs, speed and memory of models "
        "of the paper's size, with and without torch.compile, sampling, bfloat16 against float32, five minutes of "
        "training on synthetic speech. What has been found is kept: the same command goes on with what is missing."
    )
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help="recipes to measure; the first is trained")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for gpu_check.json and gpu_check.md")
    parser.add_argument("--set", nargs="*", default=[], metavar="A.B=C", help="overrides for all recipes")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N", help="no stage begins that would end later")
    parser.add_argument("--training-seconds", type=float, default=300.0, metavar="S", help="of the training")
    parser.add_argument("--case-seconds", type=float, default=5.0, metavar="S", help="of each measurement of speed")
    parser.add_argument(
        "--peak-size", type=int, default=8192, metavar="N", help="of the matrices that measure the peak"
    )
    add_device_options(parser)
    arguments = parser.parse_args()
    for name in ("minutes", "training_seconds", "case_seconds", "peak_size"):
        if not 0 < getattr(arguments, name) < math.inf:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: expected a number above 0, got {getattr(arguments, name)}")
    from ct_audio.experiments.gpu_check import Plan, check_gpu, failures
    from ct_audio.runs.config import load_config

    configs = {Path(name).stem: load_config(name, arguments.set) for name in arguments.recipes}
    if len(configs) < len(arguments.recipes):
        raise UserError("recipes: two files have the same name; check them in two calls")
    plan = Plan(
        device=open_device(arguments),
        recipes=configs,
        shipped=[model_folder(name) for name in model_names()],
        out=arguments.out,
        case_seconds=arguments.case_seconds,
        training_seconds=arguments.training_seconds,
        peak_size=arguments.peak_size,
    )
    command = shlex.join(["ct-audio", "gpu-check", *sys.argv[1:]])
    report = check_gpu(plan, command=command, seconds=60 * arguments.minutes)
    for failure in failures(report):
        print(f"wrong: {failure}")
    left = ", ".join(report["left_out"])
    more = f"; left out for lack of time: {left} (the same command goes on)" if left else ""
    print(f"report in {arguments.out}/gpu_check.md and .json{more}")
    return 1 if failures(report) else 0
