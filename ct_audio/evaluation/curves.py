"""NLL curves of runs in one picture: over steps, audio seen, wall time and core-seconds of training."""

import contextlib
import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ct_audio.common.errors import UserError
from ct_audio.common.figures import plain_text, write_figure
from ct_audio.common.files import follow_link
from ct_audio.runs.config import load_config
from ct_audio.runs.metrics import read_metrics

Points = list[tuple[float, float]]
_CORE_TIME = "core time of training"
_KEYS = {  # of metrics.jsonl, by axis; core time: seconds that went into steps, times the cores they took
    "steps": "step",
    "audio seen": "audio_seconds",
    "wall time": "wall_seconds",
    _CORE_TIME: "throughput/training_seconds",
}
_UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
_MARKERS = "os^Dv<>Ph*"


@dataclass(frozen=True)
class Curves:
    """What a run has logged.

    Attributes:
        nll: by axis and "train" or "valid" the points (step or seconds, nats per code); none over audio seen for text.
        throughput: codes a second in training, one value a log.
    """

    nll: dict[str, dict[str, Points]]
    throughput: list[float]

    def last(self, axis: str) -> float | None:
        """How far the run has come on an axis; None where nothing was logged over it."""
        return max((x for points in self.nll[axis].values() for x, _ in points), default=None)

    @property
    def median_throughput(self) -> float | None:
        """Codes a second; None where nothing was trained."""
        return statistics.median(self.throughput) if self.throughput else None


def read_curves(run_dir: Path) -> Curves:
    """Curves out of a run's metrics.jsonl; pauses between sessions do not count as wall time.

    Over core time there is nothing where the number of cores is unknown: on CUDA, or with `train.num_threads: 0`.

    Raises:
        UserError: there is no run, or none that has logged an NLL.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run; expected a directory that ct-audio train made")
    lines, cores = read_metrics(run_dir), _num_cores(run_dir)
    seconds = None
    for line in lines:  # validations do not log it: what the steps before them took
        seconds = line.get(_KEYS[_CORE_TIME], seconds)
        line[_KEYS[_CORE_TIME]] = None if cores is None or seconds is None else cores * seconds
    nll: dict[str, dict[str, Points]] = {axis: {} for axis in _KEYS}
    for (axis, key), name in itertools.product(_KEYS.items(), ("train", "valid")):
        tag = f"nll/{name}_nats"
        nll[axis][name] = [(float(line[key]), line[tag]) for line in lines if tag in line and line.get(key) is not None]
    if not any(nll["steps"].values()):
        raise UserError(f"{run_dir} has no NLL curve in its metrics.jsonl; train the run first")
    tag = "throughput/codes_per_second"
    return Curves(nll, [line[tag] for line in lines if tag in line])


def known_curves(run_dirs: dict[str, Path | None]) -> dict[str, Curves]:
    """Curves of those runs that have any, by label."""
    known = {}
    for label, run_dir in run_dirs.items():
        with contextlib.suppress(UserError):
            if run_dir is not None:
                known[label] = read_curves(run_dir)
    return known


def _num_cores(run_dir: Path) -> int | None:
    """Threads of all processes of a training on CPUs; None where they are not known."""
    try:
        train = load_config(run_dir / "config.yaml").train
    except UserError:
        return None
    num_processes = len(list(follow_link(run_dir / "checkpoints/last").glob("memory-rank*.safetensors"))) or 1
    return train.num_threads * num_processes if train.device == "cpu" and train.num_threads else None


def draw_curves(runs: dict[str, Curves], path: Path, *, levels: set[str] | frozenset[str] = frozenset()) -> None:
    """Draw a panel for each axis: validation NLL as marked lines, training NLL faint, as means over a tenth of the run.

    Args:
        runs: by label.
        path: the PNG.
        levels: labels of runs that have nothing to train; their last validation NLL is a level line.
    """
    axes = [axis for axis in _KEYS if any(curves.last(axis) is not None for curves in runs.values())]
    num_rows = math.ceil(len(axes) / 2)
    figure = Figure(figsize=(11, 4.2 * num_rows + 0.3 * len(runs) + 0.4), layout="constrained")
    panels = list(figure.subplots(num_rows, 2, sharey=True, squeeze=False).flat)
    while len(panels) > len(axes):
        panels.pop().remove()
    for panel, axis in zip(panels, axes, strict=True):
        unit, divisor = curve_unit(axis, max(curves.last(axis) or 0.0 for curves in runs.values()))
        drawn = [
            _draw_run(panel, curves, axis, divisor, index=index, label=label, is_level=label in levels)
            for index, (label, curves) in enumerate(runs.items())
        ]
        handles, labels = zip(*drawn, strict=True)  # given to the legend, which would leave out names such as _x
        panel.set(xlabel=axis + unit, xlim=(0, None), ylim=nll_range(runs))
        panel.grid(alpha=0.3)
    for panel in panels[::2]:
        panel.set_ylabel("NLL (nats per code)")
    for panel in {panels[-1], *panels[1::2]}:
        bits = panel.secondary_yaxis("right", functions=(lambda y: y / math.log(2), lambda y: y * math.log(2)))
        bits.set_ylabel("bits per code")
    title = "Validation NLL, marked, with its last value; faint: training, smoothed; dashed: nothing to train"
    figure.legend(handles, labels, title=title, loc="outside upper center", frameon=False)
    write_figure(figure, path)


def nll_range(runs: dict[str, Curves]) -> tuple[float, float]:
    """Lowest to highest validation NLL after the first fifth of each curve: the fall from the start hides the rest."""
    shown: list[float] = []
    for curves in runs.values():
        points = curves.nll["steps"]["valid"] or curves.nll["steps"]["train"]
        shown += [y for _, y in points[math.ceil(len(points) / 5) if len(points) > 2 else 0 :]]
    margin = 0.06 * (max(shown) - min(shown)) or 0.1
    return min(shown) - margin, max(shown) + margin


def running_mean(points: Points, length: int) -> Points:
    """Means of `length` points in a row, each at the last of them."""
    if not points:
        return []
    means = [statistics.fmean(y for _, y in points[i - length : i]) for i in range(length, len(points) + 1)]
    return [(x, mean) for (x, _), mean in zip(points[length - 1 :], means, strict=True)]


def _draw_run(
    panel: Any, curves: Curves, axis: str, divisor: float, *, index: int, label: str, is_level: bool
) -> tuple[Any, str]:
    """What stands for the run in the legend, and its label there; also where it has nothing over this axis."""
    color, train, valid = f"C{index % 10}", curves.nll[axis]["train"], curves.nll[axis]["valid"]
    last = curves.nll["steps"]["valid"][-1:]
    label = plain_text(f"{label}: {last[0][1]:.3f}" if last else label)
    if is_level and last:
        return panel.axhline(last[0][1], color=color, linestyle="--", linewidth=1.8), label
    smooth = running_mean(train, math.ceil(len(train) / 10))
    panel.plot([x / divisor for x, _ in smooth], [y for _, y in smooth], color=color, alpha=0.35, linewidth=1)
    x, y = [x / divisor for x, _ in valid], [y for _, y in valid]
    (line,) = panel.plot(x, y, color=color, marker=_MARKERS[index % 10], markersize=4.5, linewidth=1.6)
    return line, label


def curve_unit(axis: str, longest: float) -> tuple[str, float]:
    """What stands behind the label of an axis, its unit, and what its values are divided by."""
    if axis == "steps":
        return "", 1.0
    name, seconds = next(unit for unit in _UNITS if longest >= 2 * unit[1] or unit[1] == 1)
    return f" ({name})", seconds
