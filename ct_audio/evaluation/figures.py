"""Pictures of evaluations: a sweep over memory lengths, NLL by kind of code, bits a unit over time of a file."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from ct_audio.evaluation.groups import Grouping

_BEST, _TRAINED = "#d95f02", "#1b9e77"


def sweep_figure(report: dict[str, Any]) -> Figure:
    """NLL by memory length, a line for each length of compressed memory; the best and the trained lengths are marked.

    Args:
        report: of `memory_sweep.sweep_memory`.
    """
    rows = report["rows"]
    by_compressed = len({row["compressed_memory_length"] for row in rows}) > len({row["memory_length"] for row in rows})
    along, across = "memory_length", "compressed_memory_length"
    if by_compressed:
        along, across = across, along
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    panel = figure.subplots()
    for length in sorted({row[across] for row in rows}):
        line = sorted((row[along], row["nll_nats"]) for row in rows if row[across] == length)
        panel.plot(*zip(*line, strict=True), marker="o", markersize=4, label=f"{across.replace('_', ' ')} {length}")
    for flag, color, size in (("as_trained", _TRAINED, 13), ("is_best", _BEST, 18)):
        for row in (row for row in rows if row[flag]):
            label = f"{flag.replace('_', ' ').removeprefix('is ')}: {row['nll_nats']:.4f} nats"
            style = {"markersize": size, "markerfacecolor": "none", "markeredgewidth": 1.8, "linestyle": "none"}
            panel.plot(row[along], row["nll_nats"], marker="o", color=color, label=label, **style)
    panel.set(xlabel=f"{along.replace('_', ' ')} (rows)", ylabel=f"NLL on {report['split']} (nats a code)")
    panel.set_xticks(sorted({row[along] for row in rows}))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    test = report["test"]
    ending = "" if test is None else f"; {test['split']} at the best: {test['nll_nats']:.4f} nats"
    figure.suptitle(f"{report['name']}, step {report['step']}{ending}", fontsize=11, parse_math=False)
    return figure


def groups_figure(tables: list[tuple[Grouping, list[dict[str, Any]]]], title: str) -> Figure:
    """Bits a code of each group, a panel for each grouping; dashed: all codes; under the label the group's share."""
    figure = Figure(figsize=(8, 0.8 + 2.7 * len(tables)), layout="constrained")
    for panel, (grouping, rows) in zip(figure.subplots(len(tables), 1, squeeze=False)[:, 0], tables, strict=True):
        *groups, everything = rows
        shown = [row for row in groups if row["nll_bits"] is not None]
        colors = ["C0" if row["group"] in grouping.labels else "C1" for row in shown]
        bars = panel.bar(range(len(shown)), [row["nll_bits"] for row in shown], color=colors)
        panel.bar_label(bars, [f"{row['nll_bits']:.3f}" for row in shown], fontsize=8)
        names = [f"{row['group']}\n{100 * row['share']:.3g}%" for row in shown]
        panel.set_xticks(range(len(shown)), names, fontsize=7 if len(shown) > 8 else 8)
        if everything["nll_bits"] is not None:
            panel.axhline(everything["nll_bits"], color="black", linestyle="--", linewidth=1)
        panel.margins(y=0.15)
        panel.set_ylabel("bits a code")
        panel.set_title(grouping.title, fontsize=10)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def score_figure(
    rows: list[dict[str, Any]],
    *,
    title: str,
    unit: str,
    waveform: Float[np.ndarray, "N"] | None = None,
    sample_rate_hz: int | None = None,
) -> Figure:
    """Bits a unit over time, over the waveform and its spectrogram where the file is a recording.

    Args:
        rows: of `score.bins_over_time`.
        waveform, sample_rate_hz: of a recording; None for a text.
    """
    mean = sum(row["nll_bits"] * row["num_units"] for row in rows) / sum(row["num_units"] for row in rows)
    is_audio = waveform is not None and sample_rate_hz is not None
    figure = Figure(figsize=(10, 6 if is_audio else 3.6), layout="constrained")
    panels = figure.subplots(3 if is_audio else 1, 1, sharex=True, squeeze=False)[:, 0]
    scale = sample_rate_hz or 1
    edges = [row["start"] / scale for row in rows]
    edges.append((rows[-1]["start"] + rows[-1]["num_units"]) / scale)
    panels[0].stairs([row["nll_bits"] for row in rows], edges, color="C0", linewidth=1.2)
    panels[0].axhline(mean, color="black", linestyle="--", linewidth=1, label=f"mean {mean:.3f}")
    panels[0].set(ylabel=f"bits a {unit}", xlim=(edges[0], edges[-1]))
    panels[0].legend(loc="upper right", fontsize=8)
    panels[0].grid(alpha=0.3)
    if waveform is not None and sample_rate_hz is not None:
        _draw_recording(panels[1], panels[2], waveform, sample_rate_hz)
    panels[-1].set_xlabel("seconds" if is_audio else f"{unit}s")
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _draw_recording(upper: Any, lower: Any, waveform: Float[np.ndarray, "N"], sample_rate_hz: int) -> None:
    step = max(1, len(waveform) // 4000)  # lowest and highest of each stretch: a line for each of so many columns
    starts = np.arange(0, len(waveform), step)
    low, high = np.minimum.reduceat(waveform, starts), np.maximum.reduceat(waveform, starts)
    upper.fill_between(starts / sample_rate_hz, low, high, linewidth=0.4, color="C7")
    upper.set_ylabel("amplitude")
    padded = np.pad(waveform, (0, max(0, 1024 - len(waveform))))
    hop = max(256, 2 ** math.floor(math.log2(len(padded) / 2000 + 1)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 1024)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(1024), axis=1)).T / 256
    extent = (0.0, len(waveform) / sample_rate_hz, 0.0, sample_rate_hz / 2000)
    decibels = 20 * np.log10(np.maximum(power, 1e-5))
    lower.imshow(decibels, origin="lower", aspect="auto", extent=extent, vmin=-100, vmax=0)
    lower.set_ylabel("kHz")
