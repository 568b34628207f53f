"""Settings of a recipe compared by training: all combinations of a grid, or one change at a time, some seeds each."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from scipy.stats import t as student_t

from ct_audio.common.errors import UserError
from ct_audio.common.figures import write_figure
from ct_audio.common.files import write_csv, write_file, write_json
from ct_audio.common.text import markdown_table
from ct_audio.experiments.trials import load_base, result_of, scored_codes, train_trials
from ct_audio.runs.config import RunConfig, load_config

OWN_KEYS = ("name", "runs_dir", "train.seed")
"""What every run sets itself."""
LEVEL = 0.95
UNCHANGED = "unchanged"
"""The first row where changes are tried one at a time."""


class Interval(NamedTuple):
    """Mean of differences paired by seed, and its 95% interval by Student's t (NaN for fewer than two seeds)."""

    mean: float
    half_width: float


def combinations(axes: Sequence[str]) -> list[list[str]]:
    """All combinations of the values of axes as "a.b=c,d,e", as lists of overrides; the first is what the first
    values say.

    Raises:
        UserError: an axis is not written like that, or one key has two.
    """
    parsed = []
    for axis in axes:
        key, equals, values = axis.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise UserError(
                f"--grid: expected KEY=VALUE,VALUE,... as model.head=categorical,logistic_mixture, got {axis}"
            )
        parsed.append([f"{key}={value}" for value in values.split(",")])
    keys = [axis[0].partition("=")[0] for axis in parsed]
    if len(set(keys)) < len(keys):
        raise UserError(f"--grid: expected each key once, got {' '.join(keys)}")
    return [list(row) for row in itertools.product(*parsed)]


def run_grid(
    base_file: Path,
    out: Path,
    *,
    rows: Sequence[Sequence[str]],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    num_processes: int = 1,
) -> tuple[str, list[str]]:
    """Train what is missing and write the report: the same call again resumes it.

    Args:
        base_file: YAML of any run.
        rows: overrides of each row of the table; all are compared with the first. Combinations that the configuration
            refuses are left out, and the report says which and why.
        overrides: of all runs, as "a.b=c".
    Returns:
        the table as Markdown, "" where no run has ended, and the names of the runs that failed.
    Raises:
        UserError: a key does not exist, every row is refused, or the first one is; nothing has been trained then.
    """
    base = load_base(base_file, overrides)
    if len({tuple(row) for row in rows}) < len(rows):
        twice = next(row for index, row in enumerate(rows) if row in rows[:index])
        raise UserError(f"the same settings twice: {' '.join(twice)}")
    possible, refused = {}, {}
    for row in rows:
        try:
            load_config(base_file, [*overrides, *row])
        except UserError as error:
            if row == rows[0] or len(rows[0]) < 2:  # only a combination may be refused without being a slip of the hand
                raise
            refused[name_of(row)] = str(error).splitlines()[0]
        else:
            possible[name_of(row)] = list(row)
    trials = {
        trial_name(row, seed): [*overrides, *own, f"train.seed={seed}"]
        for seed in seeds
        for row, own in possible.items()
    }
    failed = train_trials(base_file, trials, out, num_processes)
    results: dict[str, dict[int, float]] = {}
    for row, seed in itertools.product(possible, seeds):
        result = result_of(out / "runs" / trial_name(row, seed), base, "nats")
        if result is not None:
            results.setdefault(row, {})[seed] = result
    return write_report(results, refused, next(iter(possible)), out, base) if results else "", failed


def name_of(row: Sequence[str]) -> str:
    """A row's name in the table: its settings without the sections' names."""
    return ", ".join(setting.partition(".")[2] for setting in row) or UNCHANGED


def trial_name(row: str, seed: int) -> str:
    """The name of a run: that of its row, in characters that a folder may have."""
    plain = "".join(char if char.isalnum() or char in "._-" else "_" for char in row.replace(", ", "__"))
    return f"{plain}_seed{seed}"


def paired(values: dict[int, float], reference: dict[int, float]) -> Interval:
    """Of `values` less `reference`, over the seeds that both have."""
    differences = [nats - reference[seed] for seed, nats in values.items() if seed in reference]
    if len(differences) < 2:
        return Interval(differences[0] if differences else math.nan, math.nan)
    quantile = float(student_t.ppf((1 + LEVEL) / 2, len(differences) - 1))
    return Interval(fmean(differences), quantile * stdev(differences) / math.sqrt(len(differences)))


def write_report(
    results: dict[str, dict[int, float]], refused: dict[str, str], reference: str, out: Path, base: RunConfig
) -> str:
    """Write table.md, table.csv, results.json (every run) and grid.png; returns the table as Markdown.

    Args:
        results: nats per code by row and seed.
        refused: why the configuration refuses a row.
        reference: the row that the others are compared with.
    """
    lines: list[dict[str, Any]] = []
    for row, by_seed in results.items():
        difference = paired(by_seed, results.get(reference, {}))
        line = {"settings": row, "seeds": len(by_seed), "nats": fmean(by_seed.values())}
        lines.append(line | {"difference": difference.mean, "half width": difference.half_width})
    lines.sort(key=lambda line: line["nats"])
    write_csv(out / "table.csv", lines)
    write_json(out / "results.json", [{"settings": row, "nats": by_seed} for row, by_seed in results.items()])
    table: list[list[str]] = [["settings", "seeds", "valid (nats)", f"minus {reference}, paired by seed"]]
    for line in lines:
        is_reference = line["settings"] == reference
        cell = "" if is_reference else _interval(Interval(line["difference"], line["half width"]))
        table.append([line["settings"], str(line["seeds"]), f"{line['nats']:.4f}", cell])
    data, train = base.data, base.train
    text = (
        f"{base.model.name}, {data.corpus}, {scored_codes(base)}, nats per code; {train.num_steps} steps of "
        f"{data.num_lanes} x {data.chunk_length} codes where the settings do not say otherwise. Differences are means "
        f"over seeds with 95% intervals (Student's t).\n\n{markdown_table(table)}\n"
    )
    if refused:
        text += "\nLeft out, because the configuration refuses them:\n\n"
        text += "".join(f"- {row}: {reason}\n" for row, reason in refused.items())
    write_file(out / "table.md", text.encode())
    write_figure(grid_figure(results, lines), out / "grid.png")
    return text


def grid_figure(results: dict[str, dict[int, float]], lines: Sequence[dict[str, Any]]) -> Figure:
    """Every run as a dot and every row's mean as a bar, the best at the top."""
    figure = Figure(figsize=(10, 0.4 * len(lines) + 1.6), layout="tight")
    panel = figure.subplots()
    for height, line in enumerate(reversed(lines)):
        values = list(results[line["settings"]].values())
        panel.plot(values, [height] * len(values), "o", color="C0", alpha=0.6)
        panel.plot(line["nats"], height, "|", color="C1", markersize=18, markeredgewidth=2)
    panel.set_yticks(range(len(lines)), [line["settings"] for line in reversed(lines)])
    panel.set_xlabel("NLL of the validation split (nats per code): seeds, and their mean")
    panel.grid(alpha=0.3)
    panel.ticklabel_format(axis="x", useOffset=False)
    return figure


def _interval(difference: Interval) -> str:
    if math.isnan(difference.mean):
        return "-"
    return f"{difference.mean:+.4f}" + ("" if math.isnan(difference.half_width) else f" ± {difference.half_width:.4f}")
