"""The files of an analysis of memory: tables, pictures, TensorBoard; and what is said of it on the terminal."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ct_audio.common.figures import write_figure
from ct_audio.common.files import write_csv, write_json
from ct_audio.evaluation.figures import MEMORY_FIGURES
from ct_audio.runs.metrics import MetricsWriter

TABLES = ("attention", "attention_by_part", "compression_loss", "context", "position")


def draw_figures(report: dict[str, Any]) -> dict[str, Figure]:
    """A figure for each table that has rows, see `MEMORY_FIGURES`."""
    return {name: draw(report) for name, draw in MEMORY_FIGURES.items() if report.get(name, True)}


def write_analysis(report: dict[str, Any], figures: dict[str, Figure], out: Path) -> None:
    """Write analysis.json, a CSV for each table that has rows, a PNG for each figure."""
    write_json(out / "analysis.json", report)
    for name in TABLES:
        if report[name]:
            write_csv(out / f"{name}.csv", report[name])
    for name, figure in figures.items():
        write_figure(figure, out / f"{name}.png")


def log_to_tensorboard(report: dict[str, Any], figures: dict[str, Figure], directory: Path) -> None:
    """Scalars and figures as a run of its own below the analysed one, in place of those of before.

    Not among the run's own events: those are cut when the run is resumed.
    """
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


def analysis_text(report: dict[str, Any]) -> str:
    """The tables that fit on a screen."""
    lines = [
        f"{report['name']}, step {report['step']}; {report['split']}, {report['num_codes']:,} codes, "
        f"{report['num_windows_with_full_memory']:,} windows with full memory"
    ]
    for row in (row for row in report["attention_by_part"] if row["attention"]):
        layer = "all layers" if row["layer"] is None else f"layer {row['layer']}"
        error = f"(standard error {row['standard_error']:.4f})"
        lines.append(f"attention of {layer} to {row['part']}: {row['attention']:.4f} {error}")
    for row in report["compression_loss"]:
        loss = f"{row['loss']:.3g} (standard error {row['standard_error']:.2g})"
        share = f"{row['relative_loss']:.1%} of what is reconstructed"
        lines.append(f"loss of compression in layer {row['layer']}: {loss}, {share}")
    for row in report["context"]:
        gains = [("gain", row["gain_nats"], row["gain_standard_error"])]
        if row["compressed_memory_length"]:
            gains.append(("over memory alone", row["gain_over_memory_nats"], row["gain_over_memory_standard_error"]))
        words = [f"memory {row['memory_length']}, compressed memory {row['compressed_memory_length']} (range "]
        words += [f"{row['temporal_range_codes']} codes): {row['nll_nats']:.4f} nats"]
        for what, gain, error in gains:
            words += [f", {what} {gain:.4f}", "" if error is None else f" (standard error {error:.4f})"]
        lines.append("".join(words))
    return "\n".join(lines)
