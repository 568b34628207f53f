"""Put runs side by side: NLL curves over steps, audio seen and time (PNG), and a result table (Markdown, CSV)."""

import sys
from pathlib import Path

from ct_audio.commands.command_line import add_device_options, build_parser, open_device, refuse_twice
from ct_audio.common.recipes import model_folder


def main() -> int:
    """Parse, score what is not scored yet, write, print, and return the exit status."""
    parser = build_parser(
        "Compare runs: NLL curves of metrics.jsonl, and a result table with the difference of each run from the first "
        "one and its 95% interval. Results of `ct-audio evaluate` are taken from RUN/evaluations; what is missing, "
        "or of an older checkpoint, is measured and kept there."
    )
    parser.add_argument(
        "runs",
        type=model_folder,
        nargs="+",
        metavar="RUN",
        help="directories of runs, checkpoints or exported models; all are set against the first",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write; made if it is missing")
    parser.add_argument("--splits", nargs="+", default=["valid"], metavar="SPLIT", help="splits in the table")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="score only the beginning of each split")
    parser.add_argument("--corpus", metavar="DIR", help="prepared corpus; default: that of each run's training")
    add_device_options(parser)
    arguments = parser.parse_args()
    refuse_twice(arguments, "splits")
    from ct_audio.evaluation.comparison_table import open_runs, score_runs, write_comparison

    runs = open_runs(arguments.runs)
    device = open_device(arguments)
    score_runs(
        runs,
        arguments.splits,
        max_seconds=arguments.max_seconds,
        device=device,
        corpus=arguments.corpus,
        out=arguments.out,
    )
    print(write_comparison(runs, arguments.out), end="")
    curves = "curves.png, " if any(run.curves for run in runs.values()) else ""
    print(f"wrote {curves}table.md and table.csv to {arguments.out}", file=sys.stderr)
    return 0
