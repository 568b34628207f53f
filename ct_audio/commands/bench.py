"""Measure the speed of training and sampling, see `experiments.speed`; BENCHMARKS.md is written by it."""

import json
import shlex
import sys
from pathlib import Path

from ct_audio.commands.command_line import build_parser, refuse_twice
from ct_audio.common.errors import UserError

WHAT = ("train", "chunk", "attention", "sample")
MAX_ROUNDS = 1000


def main() -> int:
    """Parse, measure, print a Markdown table (or JSON)."""
    parser = build_parser(
        "Measure speed on the CPU. train: forward, backward and update of each recipe. chunk: a chunk in one forward "
        "pass against window after window. attention: the fused backend against the reference. sample: the cost of a "
        "code early and late in a stream."
    )
    parser.add_argument("recipes", nargs="+", help="YAML files of recipes; the first is the base of ratios")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=["train"], help="what to measure")
    parser.add_argument("--set", nargs="*", default=[], metavar="A.B=C", help="overrides for all recipes")
    parser.add_argument("--lanes", type=int, default=1, metavar="B", help="streams side by side")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds after one to warm up")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the Markdown here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    refuse_twice(arguments, "what")
    for name in ("lanes", "threads", "rounds"):
        if not 1 <= getattr(arguments, name) <= MAX_ROUNDS:
            raise UserError(f"--{name}: expected 1 to {MAX_ROUNDS}, got {getattr(arguments, name)}")
    from ct_audio.experiments.speed import markdown_report, measure_speed

    command = shlex.join(["ct-audio", "bench", *sys.argv[1:]])
    report = measure_speed(
        arguments.recipes,
        arguments.what,
        overrides=arguments.set,
        num_lanes=arguments.lanes,
        num_threads=arguments.threads,
        num_rounds=arguments.rounds,
    )
    text = markdown_report(command, report)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    print(json.dumps({"command": command} | report) if arguments.json else text, end="\n" if arguments.json else "")
    return 0
