"""Score a split with a trained model: mean NLL in nats and bits a code, every code once, memory carried."""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.cli import build_parser, run_tool
from ct_audio.errors import UserError

if TYPE_CHECKING:
    from ct_audio.checkpoint import LoadedRun
    from ct_audio.corpus import Corpus


def main() -> int:
    """Parse, evaluate, print, and return the exit status."""
    arguments = _parse()
    import torch  # after --help: it takes seconds

    from ct_audio.checkpoint import load_run_model
    from ct_audio.distributed import choose_device
    from ct_audio.evaluate import evaluate_nll

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    run = load_run_model(arguments.run, which=arguments.checkpoint, device=choose_device(arguments.device))
    corpus = _open_corpus(run, arguments)
    split, codec, data = corpus.split(arguments.split), corpus.codec, run.config.data
    evaluation = evaluate_nll(
        run.model,
        split.codes,
        start_code=codec.start_code,
        chunk_length=data.chunk_length,
        num_lanes=arguments.lanes,
        warmup_length=_warmup_length(run, arguments, codec.sample_rate_hz) if arguments.lanes > 1 else 0,
        document_offsets=split.document_offsets,
        reset_memory_at_document=data.reset_memory_at_document,
        memory_length=arguments.memory_length,
        compressed_memory_length=arguments.compressed_memory_length,
        max_codes=_codes("--max-seconds", arguments.max_seconds, codec.sample_rate_hz),
    )
    if not math.isfinite(evaluation.nll_nats):
        raise UserError(f"the NLL is {evaluation.nll_nats}: the model has diverged; use another checkpoint")
    rate = codec.sample_rate_hz
    seconds = evaluation.num_units / rate if rate else None
    protocol = evaluation.protocol | {
        "split": arguments.split,
        "seconds": seconds,
        "unit": codec.unit,
        "corpus_fingerprint": corpus.fingerprint,
    }
    groups = run.model.gradient_groups()
    report = {
        "split": arguments.split,
        "nll_nats": evaluation.nll_nats,
        "nll_bits": evaluation.nll_bits,
        "num_units": evaluation.num_units,
        "seconds": seconds,
        "protocol": protocol,
        "name": run.config.name,
        "model": run.config.model.name,
        "num_parameters": sum(p.numel() for _, p in run.model.named_parameters()),
        "num_parameters_compression": sum(p.numel() for p in groups.get("compression", [])),
        "checkpoint": run.checkpoint_path.name,
        "step": run.step,
        "wall_seconds": evaluation.wall_seconds,
        "units_per_second": evaluation.units_per_second,
    }
    _print(report, as_json=arguments.json)
    return 0


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Score a split with a trained model: mean negative log-likelihood of a code, every code once, memory carried. "
        "Use the validation split while choosing models; keep the test split for the final number."
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


def _open_corpus(run: "LoadedRun", arguments: argparse.Namespace) -> "Corpus":
    """The corpus, checked against the one of the checkpoint."""
    from ct_audio.corpus import open_corpus

    path = arguments.corpus or run.config.data.corpus
    corpus = open_corpus(path)
    trained_on = run.state.get("corpus_fingerprint")
    if corpus.fingerprint != trained_on and not arguments.allow_other_corpus:
        raise UserError(
            f"{path} holds other codes than the corpus that {arguments.run} was trained on (fingerprint "
            f"{corpus.fingerprint[:12]}, expected {str(trained_on)[:12]}); pass --corpus, or --allow-other-corpus"
        )
    if corpus.codec.vocab_size != run.model.vocab_size:
        raise UserError(f"{path} has {corpus.codec.vocab_size} codes, the model {run.model.vocab_size}; pass --corpus")
    return corpus


def _warmup_length(run: "LoadedRun", arguments: argparse.Namespace, sample_rate_hz: int | None) -> int:
    """Codes of warm-up in whole chunks: as asked for, else as far as the model can look back."""
    chunk_length = run.config.data.chunk_length
    wanted = _codes("--warmup-seconds", arguments.warmup_seconds, sample_rate_hz, at_least=0)
    if wanted is None:
        wanted = _temporal_range(run, arguments) + run.model.window_length
    return math.ceil(wanted / chunk_length) * chunk_length


def _temporal_range(run: "LoadedRun", arguments: argparse.Namespace) -> int:
    import torch

    from ct_audio.models import build_model

    names = ("memory_length", "compressed_memory_length")
    changes: dict[str, Any] = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if not changes or not all(hasattr(run.model.config, name) for name in changes):
        return run.model.temporal_range
    with torch.device("meta"):  # no memory, no time: only its arithmetic is wanted
        return build_model(dataclasses.replace(run.model.config, **changes)).temporal_range


def _codes(option: str, seconds: float | None, sample_rate_hz: int | None, *, at_least: int = 1) -> int | None:
    if seconds is None:
        return None
    if sample_rate_hz is None:
        raise UserError(f"{option}: the corpus is text and has no seconds; leave it out")
    if not math.isfinite(seconds) or round(seconds * sample_rate_hz) < at_least:
        raise UserError(f"{option}: expected seconds of at least {at_least} samples, got {seconds}")
    return round(seconds * sample_rate_hz)


def _print(report: dict[str, Any], *, as_json: bool) -> None:
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
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(run_tool(main))
