"""Pictures of evaluations and of analyses of memory; none of them needs a model.

Shape letters: N samples.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ct_audio.common.figures import WINDOW_LENGTH, draw_spectrogram
from ct_audio.evaluation.groups import Grouping
from ct_audio.evaluation.memory_analysis import NUM_BUCKETS, PARTS

_BEST, _TRAINED = "#d95f02", "#1b9e77"
_COLORS: dict[str, str] = dict(zip(PARTS, ("#d95f02", "#7570b3", "#1b9e77"), strict=True))
_LABELS: dict[str, str] = dict(zip(PARTS, ("compressed memory", "memory", "window"), strict=True))


def sweep_figure(report: dict[str, Any]) -> Figure:
    """NLL by memory length, a line for each length of compressed memory, or the other way round where those are more;
    the best and the trained lengths are marked. The report is that of `memory_sweep.sweep_memory`."""
    rows = report["rows"]
    across, along = sorted(
        ("compressed_memory_length", "memory_length"), key=lambda name: len({row[name] for row in rows})
    )
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
    panel.set(xlabel=f"{along.replace('_', ' ')} (rows)", ylabel=f"NLL on {report['split']} (nats per code)")
    panel.set_xticks(sorted({row[along] for row in rows}))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    test = report["test"]
    ending = "" if test is None else f"; {test['split']} at the best: {test['nll_nats']:.4f} nats"
    figure.suptitle(f"{report['name']}, step {report['step']}{ending}", fontsize=11, parse_math=False)
    return figure


def groups_figure(tables: list[tuple[Grouping, list[dict[str, Any]]]], title: str) -> Figure:
    """Bits per code of each group, a panel for each grouping; dashed: all codes; under the label the group's share."""
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
        panel.set_ylabel("bits per code")
        panel.set_title(grouping.title, fontsize=10)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def score_figure(
    rows: list[dict[str, Any]],
    *,
    title: str,
    unit: str,
    waveform: Float[np.ndarray, " N"] | None = None,
    sample_rate_hz: int | None = None,
) -> Figure:
    """Bits per unit over time, over the waveform and its spectrogram where the file is a recording.

    Args:
        rows: of `over_time.bins_over_time`.
        waveform, sample_rate_hz: of a recording; None for a text.
    """
    mean = sum(row["nll_bits"] * row["num_units"] for row in rows) / sum(row["num_units"] for row in rows)
    is_audio = waveform is not None and sample_rate_hz is not None
    figure = Figure(figsize=(10, 6 if is_audio else 3.6), layout="constrained")
    panels = figure.subplots(3 if is_audio else 1, 1, sharex=True, squeeze=False)[:, 0]
    ends = [*(row["start"] for row in rows), rows[-1]["start"] + rows[-1]["num_units"]]
    edges = [end / (sample_rate_hz or 1) for end in ends]
    panels[0].stairs([row["nll_bits"] for row in rows], edges, color="C0", linewidth=1.2)
    panels[0].axhline(mean, color="black", linestyle="--", linewidth=1, label=f"mean {mean:.3f}")
    panels[0].set(ylabel=f"bits per {unit}", xlim=(edges[0], edges[-1]))
    panels[0].legend(loc="upper right", fontsize=8)
    panels[0].grid(alpha=0.3)
    if waveform is not None and sample_rate_hz is not None:
        _draw_recording(panels[1], panels[2], waveform, sample_rate_hz)
    panels[-1].set_xlabel("seconds" if is_audio else f"{unit}s")
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _draw_recording(upper: Any, lower: Any, waveform: Float[np.ndarray, " N"], sample_rate_hz: int) -> None:
    step = max(1, len(waveform) // 4000)  # lowest and highest of each stretch: a line for each of so many columns
    starts = np.arange(0, len(waveform), step)
    low, high = np.minimum.reduceat(waveform, starts), np.maximum.reduceat(waveform, starts)
    upper.fill_between(starts / sample_rate_hz, low, high, linewidth=0.4, color="C7")
    upper.set_ylabel("amplitude")
    window_length = 2 ** math.floor(math.log2(len(waveform) / 500 + 1))  # a quarter of one apart: 2,000 to 4,000
    draw_spectrogram(lower, waveform, sample_rate_hz, window_length=max(WINDOW_LENGTH, window_length))


def attention_figure(report: dict[str, Any]) -> Figure:
    """Attention in each bucket, mean over all layers, with standard errors (the paper's Figure 2)."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    panel = figure.subplots()
    _draw_buckets(panel, [row for row in report["attention"] if row["layer"] is None])
    shares = {row["part"]: row["attention"] for row in report["attention_by_part"] if row["layer"] is None}
    labels = {part: f"{_LABELS[part]}: {share:.1%}" for part, share in shares.items() if share}
    panel.legend(handles=[Patch(color=_COLORS[part], label=label) for part, label in labels.items()])
    panel.set(ylabel="share of attention", xlabel="bucket: a sixth of each part, oldest rows first")
    num_windows = report["num_windows_with_full_memory"]
    _memory_title(figure, report, f"attention by distance, {num_windows:,} windows with full memory")
    return figure


def attention_by_layer_figure(report: dict[str, Any]) -> Figure:
    """The same for each layer, in one scale that shows small shares (logarithmic)."""
    layers = sorted({row["layer"] for row in report["attention"] if row["layer"] is not None})
    columns = min(5, len(layers))
    lines = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(max(8, 3.1 * columns), 1.2 + 2.3 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, sharex=True, squeeze=False).ravel()
    for panel in panels[len(layers) :]:
        panel.set_visible(False)
    for panel, layer in zip(panels, layers, strict=False):
        _draw_buckets(panel, [row for row in report["attention"] if row["layer"] == layer], as_points=True)
        parts = [row["attention"] for row in report["attention_by_part"] if row["layer"] == layer]
        shares = [f"{share:.1%}" for share in parts if share > 0]
        panel.set_title(f"layer {layer} ({', '.join(shares)})", fontsize=9)
        panel.set_yscale("log")
    for panel in panels[::columns]:
        panel.set_ylabel("share (log)")
    _memory_title(figure, report, "attention by distance, by layer (compressed memory, memory, window)")
    return figure


def compression_figure(report: dict[str, Any]) -> Figure:
    """Attention-reconstruction loss of each layer, and as a share of what is reconstructed (the paper's Figure 6)."""
    rows = report["compression_loss"]
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers = [row["layer"] for row in rows]
    left.bar(layers, [row["loss"] for row in rows], yerr=[row["standard_error"] for row in rows], capsize=3)
    left.set(ylabel="attention-reconstruction loss")
    right.bar(layers, [row["relative_loss"] for row in rows], color="C1")
    right.set(ylabel="loss / mean square of the attention")
    for panel in (left, right):
        panel.set(xlabel="layer")
        panel.set_xticks(layers)
        panel.grid(alpha=0.3, axis="y")
    _memory_title(figure, report, "loss of compression by layer")
    return figure


def context_figure(report: dict[str, Any]) -> Figure:
    """Gain as memory grows, the further gain as compressed memory grows, and NLL by position in the window."""
    rows = report["context"]
    memory_only = [row for row in rows if not row["compressed_memory_length"]]
    with_compressed = [row for row in rows if row["compressed_memory_length"]]
    figure = Figure(figsize=(15 if with_compressed else 10.5, 4.4), layout="constrained")
    panels = figure.subplots(1, 3 if with_compressed else 2)
    rate = report["sample_rate_hz"]
    _draw_gain(panels[0], memory_only, "gain", "memory", rate)
    panels[0].set_ylabel("gain over the window alone (nats per code)")
    chosen = {"window": rows[0], "memory": memory_only[-1]}
    if with_compressed:
        start = next(row for row in memory_only if row["memory_length"] == with_compressed[0]["memory_length"])
        start = start | {"gain_over_memory_nats": 0.0, "gain_over_memory_standard_error": 0.0}
        _draw_gain(panels[1], [start, *with_compressed], "gain_over_memory", "compressed_memory", rate)
        panels[1].set_ylabel("further gain of compressed memory (nats per code)")
        chosen |= {"memory": start, "compressed_memory": with_compressed[-1]}
    labels = {"window": "window alone", "memory": "with memory", "compressed_memory": "with both memories"}
    for part, row in chosen.items():
        lengths = (row["memory_length"], row["compressed_memory_length"])
        points = [p for p in report["position"] if (p["memory_length"], p["compressed_memory_length"]) == lengths]
        middles = [(point["first_code"] + point["last_code"]) / 2 for point in points]
        style = {"marker": ".", "color": _COLORS[part]}
        style["linestyle"] = "--" if part == "compressed_memory" else "-"  # it often lies on the curve of memory
        label = f"{labels[part]} ({lengths[0]} + {lengths[1]}): {row['nll_nats']:.3f}"
        panels[-1].plot(middles, [point["nll_nats"] for point in points], label=label, **style)
    panels[-1].set(xlabel="position in the window (codes)", ylabel="NLL (nats per code)")
    panels[-1].legend()
    panels[-1].grid(alpha=0.3)
    _memory_title(figure, report, "NLL by available context: one model, its memories made shorter")
    return figure


def _draw_gain(panel: Any, rows: list[dict[str, Any]], gain: str, part: str, rate: int | None) -> None:
    ranges, gains = ([row[key] for row in rows] for key in ("temporal_range_codes", f"{gain}_nats"))
    errors = [row[f"{gain}_standard_error"] or 0.0 for row in rows]
    panel.errorbar(ranges, gains, yerr=errors, marker="o", capsize=3, color=_COLORS[part])
    panel.set_xlabel(f"temporal range over all layers (codes), growing {_LABELS[part]}")
    panel.grid(alpha=0.3)
    if rate:
        to_ms = 1000 / rate
        upper = panel.secondary_xaxis("top", functions=(lambda x: x * to_ms, lambda x: x / to_ms))
        upper.set_xlabel("milliseconds")


MEMORY_FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "attention": attention_figure,
    "attention_by_layer": attention_by_layer_figure,
    "compression_loss": compression_figure,
    "context": context_figure,
}


def _draw_buckets(panel: Any, rows: list[dict[str, Any]], *, as_points: bool = False) -> None:
    """Bars, or points for a logarithmic scale, which has no zero; a part that has no rows is left out."""
    for part in PARTS:
        here = [row for row in rows if row["part"] == part and row["attention"] > 0]
        x, y = [row["bucket"] for row in here], [row["attention"] for row in here]
        errors = [row["standard_error"] for row in here]
        if as_points:
            panel.errorbar(x, y, yerr=errors, color=_COLORS[part], marker="o", markersize=4, capsize=2)
        else:
            panel.bar(x, y, yerr=errors, color=_COLORS[part], ecolor="black", capsize=2)
    panel.set_xlim(-0.6, len(PARTS) * NUM_BUCKETS - 0.4)
    panel.set_xticks([NUM_BUCKETS * part - 0.5 for part in range(1, len(PARTS))], labels=[])
    panel.grid(alpha=0.3, axis="y")
    panel.set_axisbelow(True)


def _memory_title(figure: Figure, report: dict[str, Any], what: str) -> None:
    where = f"{report['name']}, step {report['step']}, {report['split']}, {report['num_codes']:,} codes"
    figure.suptitle(f"{what}\n{where}", fontsize=10)
