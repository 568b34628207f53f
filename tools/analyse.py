"""What a trained Compressive Transformer or Transformer-XL does with its memory: tables (JSON, CSV) and pictures."""

import argparse
import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.command_line import build_parser, run_tool
from ct_audio.common.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLES = ("attention", "attention_by_part", "compression_loss", "context", "position")


def main() -> int:
    """Parse, analyse, write, print, and return the exit status."""
    arguments = _parse()
    # After --help: they take seconds.
    from ct_audio.evaluation.memory_analysis import analyse_run
    from ct_audio.evaluation.memory_figures import FIGURES
    from ct_audio.runs.device import set_up_device
    from ct_audio.runs.open_run import load_run_model, run_corpus

    device = set_up_device(arguments.device, num_threads=arguments.threads)
    run = load_run_model(arguments.run, which=arguments.checkpoint, device=device)
    corpus = run_corpus(run, arguments.corpus, allow_other=arguments.allow_other_corpus)
    out = Path(arguments.out or Path(arguments.run) / "analysis")
    out.mkdir(parents=True, exist_ok=True)
    report = analyse_run(
        run, corpus, split=arguments.split, num_codes=arguments.num_codes, shares=tuple(arguments.shares)
    )
    figures = {name: draw(report) for name, draw in FIGURES.items() if report.get(name, True)}
    write(report, figures, out)
    if arguments.tensorboard:
        log_to_tensorboard(report, figures, Path(arguments.run) / "analysis")
    print(json.dumps(report, allow_nan=False) if arguments.json else summary(report))
    print(f"wrote {out}", file=sys.stderr)
    return 0


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Look into the memory of a trained Compressive Transformer or Transformer-XL: attention by distance, loss of "
        "compression by layer, NLL by available context. Writes analysis.json, a CSV for each table and PNGs."
    )
    parser.add_argument("run", help="directory of the run, as runs/NAME")
    parser.add_argument(
        "--checkpoint", choices=["best", "last"], default="best", help="best by validation NLL, or last"
    )
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
    parser.add_argument("--out", metavar="DIR", help="where to write; default: RUN/analysis")
    parser.add_argument(
        "--tensorboard", action="store_true", help="show scalars and pictures in TensorBoard too, as RUN/analysis"
    )
    parser.add_argument("--corpus", metavar="DIR", help="prepared corpus; default: the one that the run was trained on")
    parser.add_argument("--allow-other-corpus", action="store_true", help="go on if the corpus holds other codes")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: torch's default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.num_codes < 0:
        raise UserError(f"--num-codes: expected at least 0, got {arguments.num_codes}")
    if not all(math.isfinite(share) and share >= 0 for share in arguments.shares):
        raise UserError(f"--shares: expected numbers of at least 0, got {arguments.shares}")
    return arguments


def write(report: dict[str, Any], figures: "dict[str, Figure]", out: Path) -> None:
    """analysis.json, a CSV for each table that has rows, a PNG for each figure."""
    from ct_audio.common.files import write_file, write_json

    write_json(out / "analysis.json", report)
    for name in TABLES:
        if report[name]:
            text = io.StringIO()
            writer = csv.DictWriter(text, fieldnames=list(report[name][0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(report[name])
            write_file(out / f"{name}.csv", text.getvalue().encode())
    for name, figure in figures.items():
        image = io.BytesIO()
        figure.savefig(image, dpi=110, format="png")
        write_file(out / f"{name}.png", image.getvalue())


def log_to_tensorboard(report: dict[str, Any], figures: "dict[str, Figure]", directory: Path) -> None:
    """Scalars and figures as a run of its own below the analysed one, in place of those of before.

    Not among the run's own events: those are cut when the run is resumed.
    """
    from ct_audio.runs.metrics import MetricsWriter

    directory.mkdir(exist_ok=True)
    for path in [*directory.glob("events.out.tfevents.*"), directory / "metrics.jsonl"]:
        path.unlink(missing_ok=True)
    values: dict[str, float] = {}
    for row in report["attention_by_part"]:
        layer = "all" if row["layer"] is None else f"layer_{row['layer']:02d}"
        values[f"attention_{row['part']}/{layer}"] = row["attention"]
    for row in report["compression_loss"]:
        values[f"compression_loss/layer_{row['layer']:02d}"] = row["loss"]
    for row in report["context"]:
        values[f"gain_nats/memory_{row['memory_length']}_{row['compressed_memory_length']}"] = row["gain_nats"]
    metrics, step = MetricsWriter(directory), report["step"]
    metrics.scalars(values, step=step, wall_seconds=0.0)
    for name, figure in figures.items():
        metrics.figure(f"analysis/{name}", figure, step=step)
    metrics.flush()
    metrics.close()


def summary(report: dict[str, Any]) -> str:
    """The tables that fit on a screen."""
    lines = [
        f"{report['name']}, step {report['step']}; {report['split']}, {report['num_codes']:,} codes, "
        f"{report['num_windows_with_full_memory']:,} windows with full memory"
    ]
    for row in (row for row in report["attention_by_part"] if row["attention"]):
        layer = "all layers" if row["layer"] is None else f"layer {row['layer']}"
        lines.append(
            f"attention of {layer} to {row['part']}: {row['attention']:.4f} (standard error "
            f"{row['standard_error']:.4f})"
        )
    for row in report["compression_loss"]:
        lines.append(
            f"loss of compression in layer {row['layer']}: {row['loss']:.3g} (standard error "
            f"{row['standard_error']:.2g}), {row['relative_loss']:.1%} of what is reconstructed"
        )
    for row in report["context"]:
        gains = [("gain", row["gain_nats"], row["gain_standard_error"])]
        if row["compressed_memory_length"]:
            gains.append(("over memory alone", row["gain_over_memory_nats"], row["gain_over_memory_standard_error"]))
        lines.append(
            f"memory {row['memory_length']}, compressed memory {row['compressed_memory_length']} (range "
            f"{row['temporal_range_codes']} codes): {row['nll_nats']:.4f} nats, "
            + ", ".join(
                f"{what} {gain:.4f}" + ("" if error is None else f" (standard error {error:.4f})")
                for what, gain, error in gains
            )
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_tool(main))
