"""What a trained Compressive Transformer or Transformer-XL does with its memory: tables (JSON, CSV) and pictures."""

import json
import math
import sys
from pathlib import Path

from ct_audio.commands.command_line import (
    add_corpus_options,
    add_run_options,
    build_parser,
    open_corpus,
    open_run,
    output_directory,
)
from ct_audio.common.errors import UserError


def main() -> int:
    """Parse, analyse, write, print, and return the exit status."""
    parser = build_parser(
        "Look into the memory of a trained Compressive Transformer or Transformer-XL: attention by distance, loss of "
        "compression by layer, NLL by available context. Writes analysis.json, a CSV for each table and PNGs."
    )
    add_run_options(parser)
    add_corpus_options(parser)
    parser.add_argument("--split", default="valid", help="split of the corpus")
    parser.add_argument("--num-codes", type=int, default=240_000, metavar="N", help="of its beginning; 0: all of it")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[0.25, 0.5, 0.75],
        metavar="X",
        help="of the lengths of memory and compressed memory that are tried beside 0 and 1; above 1 they are longer "
        "than in training",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: RUN/analysis")
    parser.add_argument(
        "--tensorboard", action="store_true", help="show scalars and pictures in TensorBoard too, as RUN/analysis"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.num_codes < 0:
        raise UserError(f"--num-codes: expected at least 0, got {arguments.num_codes}")
    if not all(math.isfinite(share) and share >= 0 for share in arguments.shares):
        raise UserError(f"--shares: expected numbers of at least 0, got {arguments.shares}")
    from ct_audio.evaluation.memory_analysis import analyse_run
    from ct_audio.evaluation.memory_output import analysis_text, draw_figures, log_to_tensorboard, write_analysis

    run = open_run(arguments)
    corpus = open_corpus(arguments, run)
    out = output_directory(arguments, run, "analysis")
    out.mkdir(parents=True, exist_ok=True)
    report = analyse_run(
        run, corpus, split=arguments.split, num_codes=arguments.num_codes, shares=tuple(arguments.shares)
    )
    figures = draw_figures(report)
    write_analysis(report, figures, out)
    if arguments.tensorboard:
        log_to_tensorboard(report, figures, (run.run_dir / "analysis") if run.run_dir else out)
    print(json.dumps(report, allow_nan=False) if arguments.json else analysis_text(report))
    print(f"wrote {out}", file=sys.stderr)
    return 0
