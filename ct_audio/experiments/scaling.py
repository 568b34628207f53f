"""How time and memory grow: training with sizes of model and batch, sampling with length, start-up with the corpus.

One size changes at a time. Every point is measured in a process of its own, so that no point pays for another's memory;
time is CPU time, memory the most that the process held above what it held before the model was built (Linux only).
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from ct_audio.common.errors import UserError
from ct_audio.common.figures import write_figure
from ct_audio.common.files import read_json, write_csv, write_file, write_json
from ct_audio.common.machine import MEMORY, in_own_process, peak_memory
from ct_audio.common.progress import Progress
from ct_audio.common.text import markdown_table
from ct_audio.data.codecs import MuLaw
from ct_audio.data.corpus import CorpusWriter, open_corpus
from ct_audio.data.lanes import WindowStream
from ct_audio.experiments.speed import training_step
from ct_audio.models import build_model
from ct_audio.runs.config import RunConfig, load_config
from ct_audio.runs.same_run import flat_config
from ct_audio.sampling.sampler import Sampler

FACTORS = (1, 2, 4, 8)
SIZES = (
    "data.chunk_length",
    "data.num_lanes",
    "model.num_layers",
    "model.memory_length",
    "model.compressed_memory_length",
)
"""What is varied where nothing is said, in multiples of the recipe's own value; those that a recipe has."""
SAMPLE_SECONDS = (0.25, 0.5, 1.0, 2.0)
CORPUS_HOURS = (1.0, 10.0, 100.0, 1000.0)
RECORDING_SECONDS = 10
"""Length of a recording of the corpora that are made up: their number is what start-up may depend on."""
SAMPLE, CORPUS = "sample (s)", "corpus (h)"


class Point(NamedTuple):
    """One measurement.

    Attributes:
        curve: which size was varied, as "model.num_layers".
        value: of it.
        cpu_seconds: of a training step; of a sample; of opening a corpus and dealing out its first chunk.
        mebibytes: the most memory held, above what was held before the model was built or the corpus opened.
    """

    curve: str
    value: float
    cpu_seconds: float
    mebibytes: float


def measure_scaling(
    recipe: str | Path,
    out: Path,
    *,
    vary: Sequence[str] = (),
    overrides: Sequence[str] = (),
    sample_seconds: Sequence[float] = SAMPLE_SECONDS,
    corpus_hours: Sequence[float] = CORPUS_HOURS,
    num_steps: int = 5,
) -> str:
    """Measure all points, write scaling.csv, scaling.md and scaling.png; returns the table as Markdown.

    Args:
        recipe: YAML of any run; its corpus is not read.
        vary: sizes as "model.num_layers=1,2,4"; none: those of SIZES that the recipe has, times FACTORS.
        overrides: as "a.b=c", of all points.
        sample_seconds, corpus_hours: lengths of a sample and of a corpus; none: not measured.
        num_steps: training steps of a point whose median is taken, after two that warm up.
    Raises:
        UserError: a size does not exist or cannot be had, or this is not Linux.
    """
    if not MEMORY.exists():
        raise UserError("the memory of a process is read from /proc: expected Linux")
    base = load_config(recipe, list(overrides))
    curves = dict(_axis(word) for word in vary) if vary else _own_sizes(base)
    for key, values in curves.items():
        for value in values:  # a size that cannot be had is known before minutes of measuring
            load_config(recipe, [*overrides, f"{key}={value}"])
    jobs: list[tuple[str, float, Callable[..., tuple[float, float]], tuple[Any, ...]]] = [
        (key, value, _train_point, (recipe, [*overrides, f"{key}={value}"], num_steps))
        for key, values in curves.items()
        for value in values
    ]
    jobs += [(SAMPLE, value, _sample_point, (recipe, list(overrides), value)) for value in sample_seconds]
    jobs += [(CORPUS, value, _corpus_point, (value,)) for value in corpus_hours]
    points = [
        Point(curve, value, *in_own_process(function, *arguments))
        for curve, value, function, arguments in Progress(jobs, desc="scaling", unit="point")
    ]
    table = scaling_table(points)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "scaling.csv", [point._asdict() for point in points])
    write_file(out / "scaling.md", f"# {base.name}\n\n{table}\n".encode())
    write_figure(scaling_figure(points), out / "scaling.png")
    return table


def growth(points: Sequence[Point], what: str) -> float:
    """The power of the size that a cost grows with at the end of its curve: 1 is linear, 0 is flat.

    Of the last two points; NaN for fewer than two. Costs below a thousandth of the largest count as that.
    """
    if len(points) < 2:
        return math.nan
    most = max(getattr(point, what) for point in points)
    if most <= 0:
        return 0.0
    (x, a), (y, b) = ((point.value, max(getattr(point, what), most / 1000)) for point in points[-2:])
    return math.log(b / a) / math.log(y / x)


def scaling_table(points: Sequence[Point]) -> str:
    """A row a point, with the growth of time and of memory in the last row of each curve."""
    rows: list[tuple[str, ...]] = [("size", "value", "CPU ms", "MiB", "growth of time", "growth of memory")]
    for curve, own in _by_curve(points).items():
        for point in own:
            last = point is own[-1] and len(own) > 1
            grown = [f"{growth(own, what):.2f}" if last else "" for what in ("cpu_seconds", "mebibytes")]
            name = curve if curve in (SAMPLE, CORPUS) else f"`{curve}`"
            rows.append(
                (name, f"{point.value:,g}", f"{1000 * point.cpu_seconds:,.1f}", f"{point.mebibytes:,.1f}", *grown)
            )
    return markdown_table(rows)


def scaling_figure(points: Sequence[Point]) -> Figure:
    """Time above, memory below, a column a curve; both axes logarithmic, with a line of linear growth."""
    curves = _by_curve(points)
    figure = Figure(figsize=(2.6 * len(curves), 5.2), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for column, (curve, own) in enumerate(curves.items()):
        values = [point.value for point in own]
        for axis, what, factor in zip(axes[:, column], ("cpu_seconds", "mebibytes"), (1000, 1), strict=True):
            costs = [max(factor * getattr(point, what), 1e-3) for point in own]
            axis.loglog(values, costs, "o-", base=10, label="measured")
            axis.loglog(values, [costs[-1] * value / values[-1] for value in values], ":", color="gray", label="linear")
            axis.set_xticks(values, [f"{value:g}" for value in values])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0, column].set_title(curve, fontsize=9)
        axes[1, column].set_xlabel(curve, fontsize=8)
    axes[0, 0].set_ylabel("CPU time (ms)")
    axes[1, 0].set_ylabel("memory (MiB)")
    axes[0, 0].legend(fontsize=8)
    return figure


def _by_curve(points: Sequence[Point]) -> dict[str, list[Point]]:
    return {
        curve: [point for point in points if point.curve == curve] for curve in dict.fromkeys(p.curve for p in points)
    }


def _axis(word: str) -> tuple[str, list[int | float]]:
    key, _, values = word.partition("=")
    try:
        found = sorted(float(value) for value in values.split(","))
    except ValueError:
        found = []
    if len(found) < 2 or found[0] <= 0 or len(set(found)) < len(found):
        raise UserError(f"--vary: expected KEY=A,B,... with two numbers above 0 or more, got {word}")
    return key, [int(value) if value.is_integer() else value for value in found]


def _own_sizes(config: RunConfig) -> dict[str, list[int | float]]:
    plain = flat_config(config)
    return {key: [factor * plain[key] for factor in FACTORS] for key in SIZES if plain.get(key)}


def _train_point(recipe: str | Path, overrides: list[str], num_steps: int) -> tuple[float, float]:
    torch.set_num_threads(1)
    config = load_config(recipe, overrides)
    with peak_memory() as mebibytes:
        step = training_step(config, config.data.num_lanes)
        times = []
        for _ in range(2 + num_steps):
            began = time.process_time()
            step()
            times.append(time.process_time() - began)
    return statistics.median(times[2:]), mebibytes()


def _sample_point(recipe: str | Path, overrides: list[str], seconds: float) -> tuple[float, float]:
    torch.set_num_threads(1)
    config = load_config(recipe, overrides)
    model = build_model(config)

    def sample(num_codes: int) -> None:
        for _ in Sampler(model, num_lanes=1, seed=0, start_code=128).blocks(num_codes):
            pass  # nothing is kept: what grows is the sampler's own

    sample(64)  # compiles
    with peak_memory() as mebibytes:
        began = time.process_time()
        sample(round(seconds * 24_000))
        spent = time.process_time() - began
    return spent, mebibytes()


def _corpus_point(hours: float) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus"
        write_sparse_corpus(path, hours)
        with peak_memory() as mebibytes:
            began = time.process_time()
            split = open_corpus(path).split("train")
            stream = WindowStream(split.codes, split.document_offsets, start_code=128, chunk_length=3840, num_lanes=32)
            stream.next_chunk()
            spent = time.process_time() - began
        return spent, mebibytes()


def write_sparse_corpus(path: Path, hours: float) -> None:
    """A corpus of recordings of RECORDING_SECONDS whose codes take no room on disk: a sparse file."""
    writer = CorpusWriter(path, MuLaw(), source={}, preparation={"order": "made up"})
    writer.add_document("train", "0", np.zeros(1, np.uint8))
    writer.finish()
    length = round(RECORDING_SECONDS * 24_000)
    count = max(1, round(hours * 3600 / RECORDING_SECONDS))
    description = read_json(path / "corpus.json")
    description["splits"]["train"] |= {
        "num_codes": count * length,
        "seconds": count * RECORDING_SECONDS,
        "num_documents": count,
        "document_offsets": [length * index for index in range(count)],
        "document_names": [f"{index:08d}" for index in range(count)],
    }
    write_json(path / "corpus.json", description)
    os.truncate(path / "train.codes", count * length)
