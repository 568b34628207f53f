"""What a preparation found: totals, levels, dropped files and the histogram of codes, as JSON, Markdown and a figure.

Shape letters: V codes of the vocabulary.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ct_audio.common.files import write_file, write_json
from ct_audio.common.text import markdown_code, markdown_table, markdown_text


@dataclass(frozen=True)
class FileResult:
    """What became of one recording.

    Attributes:
        reason: why it was dropped, or left out as a copy; None if it was not, and then the rest is set.
        is_copy: whether it was left out because another split has the same codes.
        source_sha256: of the source file; "" if it cannot be read.
        codes_sha256: of the codes.
        num_codes: after resampling and trimming.
        crc32: of the codes.
        sample_rate_hz: of the source file.
        source_seconds: length of the source file.
        peak: largest absolute sample, after gain; 1 is full scale.
        sum_of_squares: of the samples, after gain.
        num_clipped: samples at or beyond 32767/32768, after gain.
        histogram: how often each of the V codes occurs.
    """

    reason: str | None = None
    is_copy: bool = False
    source_sha256: str = ""
    codes_sha256: str = ""
    num_codes: int = 0
    crc32: int = 0
    sample_rate_hz: int = 0
    source_seconds: float = 0.0
    peak: float = 0.0
    sum_of_squares: float = 0.0
    num_clipped: int = 0
    histogram: tuple[int, ...] = ()


def make_report(results: Iterable[tuple[str, str, FileResult]], sample_rate_hz: int) -> dict[str, Any]:
    """Totals over all files and a split at a time; levels are of what was encoded, in dB relative to full scale.

    Args:
        results: name, split and result of each recording.
        sample_rate_hz: of the codes.
    """
    results = list(results)
    kept = [(name, split, result) for name, split, result in results if result.reason is None]
    left_out = [
        ({"name": name, "split": split, "reason": r.reason}, r.is_copy)
        for name, split, r in results
        if r.reason is not None
    ]
    dropped = [entry for entry, is_copy in left_out if not is_copy]
    rates = Counter(result.sample_rate_hz for _, _, result in kept)
    splits = sorted({split for _, split, _ in results})
    return {
        "total": _totals([result for _, _, result in kept], sample_rate_hz),
        "splits": {s: _totals([r for _, split, r in kept if split == s], sample_rate_hz) for s in splits},
        "source_rates_hz": {str(rate): count for rate, count in sorted(rates.items())},
        "num_dropped": len(dropped),
        "dropped_percent": round(100 * len(dropped) / max(1, len(results)), 3),
        "dropped": dropped,
        "copies": [entry for entry, is_copy in left_out if is_copy],
        "histogram": np.sum([result.histogram for _, _, result in kept], axis=0, dtype=np.int64).tolist(),
    }


def write_report(directory: Path, report: dict[str, Any], title: str) -> None:
    """Write report.json, report.md and histogram.png into a directory."""
    from matplotlib.figure import Figure  # here: worker processes import this module and draw nothing

    from ct_audio.common.figures import plain_text, write_figure

    write_json(directory / "report.json", report)
    write_file(directory / "report.md", _markdown(report, title).encode())
    figure = Figure(figsize=(8, 3), layout="constrained")
    share = np.array(report["histogram"]) / sum(report["histogram"])
    axes = figure.subplots()
    axes.stairs(share, np.arange(len(share) + 1) - 0.5, fill=True)
    axes.set(xlabel="code", ylabel="share of all codes", title=plain_text(title), yscale="log", xlim=(-1, len(share)))
    write_figure(figure, directory / "histogram.png")


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The report in a few lines for the terminal."""
    total = report["total"]
    rates = ", ".join(f"{rate} Hz ({count} files)" for rate, count in report["source_rates_hz"].items())
    lines = [
        f"{total['num_files']} files, {total['hours']:.3f} h, {total['num_codes']} codes; source rates: {rates}",
        f"peak {total['peak_dbfs']} dBFS (median of files {total['median_peak_dbfs']}), "
        f"RMS {total['rms_dbfs']} dBFS (median of files {total['median_rms_dbfs']}), "
        f"clipped {total['clipped_percent']}% of samples",
        f"the codes' own entropy: {entropy_nats(report['histogram']):.3f} nats per sample",
    ]
    for name, split in report["splits"].items():
        lines.append(f"{name}: {split['num_files']} files, {60 * split['hours']:.2f} min")
    lines.append(f"dropped: {report['num_dropped']} files ({report['dropped_percent']}%)")
    lines += [f"  {entry['name']}: {entry['reason']}" for entry in report["dropped"]]
    if report["copies"]:
        lines.append(f"left out, so that no split holds what another one does: {len(report['copies'])} files")
        lines += [f"  {entry['name']} in {entry['split']}: {entry['reason']}" for entry in report["copies"]]
    return lines


def entropy_nats(histogram: list[int]) -> float:
    """Entropy of the codes' frequencies: the NLL of a model that knows nothing else."""
    share = np.array(histogram, dtype=np.float64) / sum(histogram)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def count_reasons(dropped: list[dict[str, Any]]) -> str:
    """As "3 truncated, 1 silent": what stands before the colon of each reason."""
    counts = Counter(entry["reason"].partition(":")[0] for entry in dropped)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def _totals(results: list[FileResult], sample_rate_hz: int) -> dict[str, Any]:
    num_codes = sum(r.num_codes for r in results)
    energy = math.fsum(r.sum_of_squares for r in results)
    num_clipped = sum(r.num_clipped for r in results)
    return {
        "num_files": len(results),
        "num_codes": num_codes,
        "hours": round(num_codes / sample_rate_hz / 3600, 4),
        "source_hours": round(math.fsum(r.source_seconds for r in results) / 3600, 4),
        "peak_dbfs": _decibels(max((r.peak for r in results), default=0.0)),
        "median_peak_dbfs": _decibels(_median([r.peak for r in results])),
        "rms_dbfs": _decibels(math.sqrt(energy / max(1, num_codes))),
        "median_rms_dbfs": _decibels(_median([math.sqrt(r.sum_of_squares / r.num_codes) for r in results])),
        "clipped_percent": round(100 * num_clipped / max(1, num_codes), 5),
        "num_files_clipped": sum(r.num_clipped > 0 for r in results),
    }


def _median(values: list[float]) -> float:
    return float(np.median(values)) if values else 0.0


def _decibels(amplitude: float) -> float | None:
    return round(20 * math.log10(amplitude), 2) if amplitude > 0 else None


def _markdown(report: dict[str, Any], title: str) -> str:
    columns = {
        "num_files": "files",
        "hours": "hours",
        "num_codes": "codes",
        "peak_dbfs": "peak dBFS",
        "median_peak_dbfs": "median peak",
        "rms_dbfs": "RMS dBFS",
        "median_rms_dbfs": "median RMS",
        "clipped_percent": "clipped %",
    }
    totals = {**report["splits"], "total": report["total"]}
    rows = [["split", *columns.values()], *([name, *map(total.get, columns)] for name, total in totals.items())]
    rates = ", ".join(f"{rate} Hz in {count} files" for rate, count in report["source_rates_hz"].items())
    dropped, copies = (
        [f"- {markdown_code(entry['name'])}: {entry['reason']}" for entry in report[key]]
        for key in ("dropped", "copies")
    )
    if copies:
        copies = ["", f"## Left out: {len(copies)} copies of recordings in other splits", "", *copies]
    lines = [
        f"# {markdown_text(title)}",
        "",
        markdown_table(rows),
        "",
        f"Levels are of what was encoded; 0 dBFS is full scale. Source rates: {rates}.",
        f"Entropy of the codes' own frequencies: {entropy_nats(report['histogram']):.4f} nats per code.",
        "",
        "![histogram of codes](histogram.png)",
        "",
        "`example.wav` is one recording decoded back from its codes.",
        "",
        f"## Dropped: {report['num_dropped']} files ({report['dropped_percent']}%)",
        "",
        *(dropped or ["None."]),
        *copies,
    ]
    return "\n".join(lines) + "\n"
