"""Score a split with a trained model: mean NLL in nats and bits a code, every code once, memory carried."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.cli import build_parser, run_tool
from ct_audio.errors import UserError


def main() -> int:
    """Parse, evaluate, keep the result in the run, print, and return the exit status."""
    arguments = _parse()
    import torch  # after --help: it takes seconds

    from ct_audio.checkpoint import load_run_model
    from ct_audio.distributed import choose_device
    from ct_audio.run_evaluation import EvaluationSettings, evaluate_run, run_corpus, store_evaluation

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    run = load_run_model(arguments.run, which=arguments.checkpoint, device=choose_device(arguments.device))
    corpus = run_corpus(run, arguments.corpus, allow_other=arguments.allow_other_corpus)
    settings = EvaluationSettings(
        split=arguments.split,
        memory_length=arguments.memory_length,
        compressed_memory_length=arguments.compressed_memory_length,
        num_lanes=arguments.lanes,
        warmup_seconds=arguments.warmup_seconds,
        max_seconds=arguments.max_seconds,
    )
    report, blocks = evaluate_run(run, corpus, settings)
    try:
        stored = f"stored in {store_evaluation(Path(arguments.run), run, settings, report, blocks)}"
    except OSError as error:
        print(f"warning: the result is not kept in {arguments.run}: {error}", file=sys.stderr)
        stored = "not stored"
    _print(report, stored, as_json=arguments.json)
    return 0


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Score a split with a trained model: mean negative log-likelihood of a code, every code once, memory carried. "
        "Use the validation split while choosing models; keep the test split for the final number. The result is kept "
        "in RUN/evaluations, with the NLL of every 0.1 s, for tools/compare.py."
    )
    parser.add_argument("run", help="directory of the run, as runs/NAME")
    parser.add_argument(
        "--checkpoint", choices=["best", "last"], default="best", help="best by validation NLL, or last"
    )
    parser.add_argument("--split", default="valid", help="split of the corpus; keep test for the final number")
    parser.add_argument("--memory-length", type=int, metavar="N", help="in place of the configuration's")
    parser.add_argument("--compressed-memory-length", type=int, metavar="M", help="in place of the configuration's")
    parser.add_argument("--lanes", type=int, default=1, metavar="K", help="parts of the split that run side by side")
    parser.add_argument(
        "--warmup-seconds",
        type=float,
        metavar="S",
        help="audio that a later lane is run over before its part, unscored; default: all that its memory can hold",
    )
    parser.add_argument("--max-seconds", type=float, metavar="S", help="score only the beginning of the split")
    parser.add_argument("--corpus", metavar="DIR", help="prepared corpus; default: the one that the run was trained on")
    parser.add_argument("--allow-other-corpus", action="store_true", help="go on if the corpus holds other codes")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: torch's default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def _print(report: dict[str, Any], stored: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, allow_nan=False))
        return
    audio = "" if report["seconds"] is None else f" ({report['seconds']:.1f} s of audio)"
    protocol = ", ".join(f"{key} {value}" for key, value in report["protocol"].items())
    lines = [
        f"{report['name']}: {report['model']}, {report['num_parameters']:,} parameters, step {report['step']}",
        f"nll of {report['split']}: {report['nll_nats']:.4f} nats, {report['nll_bits']:.4f} bits a code",
        f"{report['num_units']:,} codes{audio} in {report['wall_seconds']:.1f} s: {report['units_per_second']:.0f}/s",
        f"protocol: {protocol}",
        stored,
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(run_tool(main))
