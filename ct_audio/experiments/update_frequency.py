"""The optimisation experiment of Rae et al. 2019, section 5.5.1 and Figure 3, with any model and corpus.

One run is trained to a late point. There it is branched: the learning rate is kept, multiplied (as by 0), or the
optimizer updates less often. All branches see the same codes in the same order, so their training NLL is compared step
by step. The same call again resumes; branches that began at another step are refused.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ct_audio.common.errors import UserError
from ct_audio.common.figures import write_figure
from ct_audio.common.files import write_csv, write_file
from ct_audio.common.text import markdown_table
from ct_audio.evaluation.curves import running_mean
from ct_audio.evaluation.memory_analysis import mean_and_error
from ct_audio.runs.config import RunConfig, load_config
from ct_audio.runs.metrics import read_metrics
from ct_audio.training.branch import branch_run, require_branch_point
from ct_audio.training.loop import train
from ct_audio.training.schedules import completes_update, learning_rate, update_steps

KEPT = "kept"
OWN_KEYS = ("name", "runs_dir", "train.num_steps")
"""What every run of the experiment sets itself."""
NUM_SMOOTHED = 10
"""Parts of the branches' length over which curves are smoothed: each mean is over one."""

Curve = list[tuple[int, float]]


def run_experiment(
    base_file: Path,
    out: Path,
    *,
    base_steps: int,
    branch_steps: int,
    branches: Sequence[str],
    overrides: Sequence[str] = (),
) -> tuple[int, str]:
    """Train what is missing, compare the branches, write table.md, table.csv, curves.csv and optimisation.png.

    Args:
        base_steps, branch_steps: steps before the branches, and of each of them; at least 1.
        branches: names as "rate_0.1" or "period_4", see `settings_of`; the one that changes nothing is always there.
        overrides: of all runs, as "a.b=c"; not of OWN_KEYS.
    Returns:
        exit status of the training, and the table as Markdown ("" where a training did not end with 0).
    Raises:
        UserError: a setting does not fit; nothing has been trained then.
    """
    begin, end = base_steps, base_steps + branch_steps
    common = [*overrides, f"runs_dir={out / 'runs'}"]
    base = load_config(base_file, [*common, "name=base", f"train.num_steps={begin}"])
    if not base.train.checkpoint_every_steps or not base.train.valid_every_steps:
        raise UserError("train.checkpoint_every_steps, train.valid_every_steps: expected above 0; branches need both")
    common, configs = [*common, f"train.num_steps={end}"], {}
    for name in dict.fromkeys([KEPT, *branches]):
        configs[name] = load_config(base_file, [*common, f"name={name}", *settings_of(name, base, begin)])
    for name, config in configs.items():
        if not completes_update(end - 1, config.optim):
            length = len(update_steps(end - 1, config.optim))
            raise UserError(f"--branch-steps: {name} ends within an update of {length} steps; choose a multiple of it")
        require_branch_point(config.run_dir, source=base.name, step=begin)
    status = train(base)
    for config in configs.values():
        if status == 0:
            branch_run(base.run_dir, config)
            status = train(config)
    if status:
        return status, ""
    curves = {name: read(config, begin) for name, config in configs.items()}
    text, table = summary(curves, begin, end)
    write(curves, read(base, 0), text, table, out, f"{base.model.name}, {base.data.corpus}")
    return 0, text


def settings_of(name: str, base: RunConfig, step: int) -> list[str]:
    """The overrides of a branch that begins at `step`; schedules of earlier steps stay or no longer matter.

    Raises:
        UserError: there is no such branch.
    """
    if name == KEPT:
        return []
    kind, _, value = name.partition("_")
    if kind == "rate" and re.fullmatch(r"\d+(\.\d+)?", value):
        rate = float(value) * learning_rate(step - 1, base.optim)
        # A schedule that has come to its end after one step holds this rate from there on.
        return ["optim.warmup_steps=0", "optim.decay_steps=1", f"optim.final_learning_rate={rate!r}"]
    if kind == "period" and re.fullmatch(r"[1-9]\d*", value):
        before = {first: period for first, period in base.optim.update_period.items() if first < step}
        return [f"optim.update_period={before | {step: int(value)}}"]
    raise UserError(f"--branches: expected names as rate_0, rate_0.1 or period_4, got {name!r}")


def read(config: RunConfig, begin: int) -> dict[str, Curve]:
    """NLL in nats over steps after `begin`, of training (means since the log before) and of validation."""
    lines = [line for line in read_metrics(config.run_dir) if line["step"] > begin]
    return {
        split: [(line["step"], line[f"nll/{split}_nats"]) for line in lines if f"nll/{split}_nats" in line]
        for split in ("train", "valid")
    }


def differences(curve: Curve, kept: Curve) -> Curve:
    """Less the kept branch at the same steps: the same codes."""
    by_step = dict(kept)
    return [(step, value - by_step[step]) for step, value in curve if step in by_step]


def summary(curves: dict[str, dict[str, Curve]], begin: int, end: int) -> tuple[str, list[dict[str, Any]]]:
    """A table of the branches, as Markdown and as rows: training NLL by halves, differences with standard errors."""

    def gap(curve: Curve) -> tuple[float, float]:
        paired = np.array([difference for _, difference in differences(curve, curves[KEPT]["train"])])
        if len(paired) < 2:
            return float(paired.mean()), math.nan
        mean, error = mean_and_error(paired)
        return float(mean), float(error)

    rows, middle = [], (begin + end) / 2
    for name, curve in curves.items():
        early = [point for point in curve["train"] if point[0] <= middle]
        late = [point for point in curve["train"] if point[0] > middle]
        row: dict[str, Any] = {"branch": name}
        for points, half, more in ((early, "first", ""), (late, "second", " (second)")):
            row[f"train, {half} half"] = float(np.mean([value for _, value in points]))
            row |= zip((f"minus kept{more}", f"standard error{more}"), gap(points), strict=True)
        rows.append(row | {"valid at the end": curve["valid"][-1][1] if curve["valid"] else math.nan})
    cells = [[value if isinstance(value, str) else f"{value:.4f}" for value in row.values()] for row in rows]
    about = f"Branches from step {begin} to {end}; nats per code, training NLL on the same codes.\n"
    return f"{about}\n{markdown_table([list(rows[0]), *cells])}", rows


def write(
    curves: dict[str, dict[str, Curve]],
    base: dict[str, Curve],
    text: str,
    table: list[dict[str, Any]],
    out: Path,
    title: str,
) -> None:
    """table.md, table.csv, curves.csv and optimisation.png."""
    points = [
        {"run": name, "split": split, "step": step, "nll_nats": value}
        for name, by_split in {"base": base, **curves}.items()
        for split, curve in by_split.items()
        for step, value in curve
    ]
    write_csv(out / "table.csv", table)
    write_csv(out / "curves.csv", points)
    write_file(out / "table.md", f"{text}\n".encode())
    write_figure(draw(curves, base, title), out / "optimisation.png")


def draw(curves: dict[str, dict[str, Curve]], base: dict[str, Curve], title: str) -> Figure:
    """Smoothed training NLL, what separates the branches on the same codes, and validation NLL."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    absolute, relative, validation = figure.subplots(1, 3)
    length = max(1, len(curves[KEPT]["train"]) // NUM_SMOOTHED)
    shown = [(float(step), value) for step, value in base["train"]][-3 * length * NUM_SMOOTHED :]
    before = running_mean(shown, min(length, len(shown)))
    absolute.plot(*zip(*before, strict=True), color="0.5", label="before")
    validation.plot(*zip(*base["valid"][-3:], strict=True), color="0.5", marker="o", label="before")
    for index, (name, curve) in enumerate(curves.items()):
        look = {"color": f"C{index}", "label": name}
        train = [(float(step), value) for step, value in curve["train"]]
        gap = [(float(step), value) for step, value in differences(curve["train"], curves[KEPT]["train"])]
        absolute.plot(*zip(*running_mean(train, length), strict=True), **look)
        relative.plot(*zip(*running_mean(gap, length), strict=True), **look)
        if curve["valid"]:
            validation.plot(*zip(*base["valid"][-1:], *curve["valid"], strict=True), marker="o", **look)
    absolute.set_ylabel("training NLL (nats per code)" + (f", means of {length} logs" if length > 1 else ""))
    relative.set_ylabel("training NLL less that of the kept rate (nats per code)")
    validation.set_ylabel("validation NLL (nats per code)")
    for panel in (absolute, relative, validation):
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    figure.legend(*absolute.get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"{title}: settings changed at step {base['train'][-1][0]}", fontsize=10)
    return figure
