"""Agents side by side: success over steps (the counterpart of the paper's Figure 5) and over the delay of the task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from ct_audio.agents.config import AgentConfig, load_agent_config
from ct_audio.agents.loop import train_agent
from ct_audio.common.errors import UserError
from ct_audio.common.figures import plain_text, write_figure
from ct_audio.common.files import write_csv, write_file
from ct_audio.common.text import markdown_table
from ct_audio.runs.metrics import read_metrics

OWN_KEYS = ("name", "runs_dir", "train.seed", "environment.delay")
"""What every run of a sweep sets itself."""
LAST_STEPS = 100_000
"""Environment steps at the end of a run over which its success is taken."""
NUM_SMOOTHED = 20
"""Parts of a run over which its curve is smoothed: each mean is over one."""
_MARKERS = "os^Dv*PX<>"


class Run(NamedTuple):
    """What a run has come to: its place in the sweep, and its success (share of trials won) over environment steps."""

    memory: str
    delay: int
    seed: int
    config: AgentConfig
    steps: np.ndarray
    success: np.ndarray

    @property
    def last_success(self) -> float:
        """Mean over the last `LAST_STEPS` steps."""
        return float(self.success[self.steps > self.steps[-1] - LAST_STEPS].mean())


def run_sweep(
    files: Sequence[Path],
    out: Path,
    *,
    seeds: Sequence[int],
    delays: Sequence[int] = (),
    overrides: Sequence[str] = (),
) -> tuple[int, str]:
    """Train what is missing, one run after another, and write table.md, success.csv, success.png and, for two delays
    or more, delays.png.

    Args:
        files: YAMLs, one for each memory; what they say of the task must be the same but for the delay.
        out: for runs/ and what is written.
        delays: each is run; none: that of each YAML.
        overrides: of all runs, as "a.b=c"; not of `OWN_KEYS`.
    Returns:
        exit status of the training, and the table as Markdown ("" where a training did not end with 0).
    Raises:
        UserError: a setting does not fit; nothing has been trained then.
    """
    plan: list[tuple[str, int, AgentConfig]] = []
    for file in files:
        own = load_agent_config(file, list(overrides))
        if own.environment.name != "object_matching":
            raise UserError(f"{file}: a sweep is over object matching, got environment.name = {own.environment.name}")
        for delay in delays or [own.environment.delay]:
            for seed in seeds:
                name = f"{file.stem}_delay_{delay}_seed_{seed}"
                keys = [f"name={name}", f"runs_dir={out / 'runs'}", f"environment.delay={delay}", f"train.seed={seed}"]
                plan.append((file.stem, delay, load_agent_config(file, [*overrides, *keys])))
    names = [config.name for _, _, config in plan]
    if len(set(names)) < len(names):
        raise UserError("expected YAMLs of different names, and seeds and delays that differ")
    for _, _, config in plan:
        if status := train_agent(config):
            return status, ""
    runs = [_read(memory, delay, config) for memory, delay, config in plan]
    return 0, write(runs, out)


def _read(memory: str, delay: int, config: AgentConfig) -> Run:
    lines = [line for line in read_metrics(config.run_dir) if "agent/success" in line]
    if not lines:
        raise UserError(f"{config.run_dir}: no trial ended; it needs more train.num_steps")
    steps, success = (np.array([line[tag] for line in lines]) for tag in ("step", "agent/success"))
    return Run(memory, delay, config.train.seed, config, steps, success)


def write(runs: list[Run], out: Path) -> str:
    """Write the files of a sweep; returns the table."""
    rows = [
        {"memory": run.memory, "delay": run.delay, "seed": run.seed, "step": int(step), "success": float(success)}
        for run in runs
        for step, success in zip(run.steps, run.success, strict=True)
    ]
    table = f"{summary(runs)}\n"
    write_csv(out / "success.csv", rows)
    write_file(out / "table.md", table.encode())
    delays = sorted({run.delay for run in runs})
    write_figure(success_figure(runs), out / "success.png")
    if len(delays) > 1:
        write_figure(delay_figure(runs), out / "delays.png")
    return table


def summary(runs: list[Run]) -> str:
    """A row for each memory and delay: success at the end, the mean and the extremes over seeds."""
    rows: list[tuple[Any, ...]] = [
        ("memory", "delay", "reach", "rows attended", "steps", "seeds", "success", "lowest", "highest")
    ]
    for memory, delay in dict.fromkeys((run.memory, run.delay) for run in runs):
        own = [run for run in runs if (run.memory, run.delay) == (memory, delay)]
        last, model = [run.last_success for run in own], own[0].config.model
        reach = sum(model.reach_of_layers) if hasattr(model, "reach_of_layers") else "-"
        numbers = [f"{value:.3f}" for value in (np.mean(last), min(last), max(last))]
        steps = f"{own[0].steps[-1]:,}"
        rows.append((memory, delay, reach, model.attention_cost or "-", steps, len(own), *numbers))
    return markdown_table(rows)


def success_figure(runs: list[Run]) -> Figure:
    """Success over environment steps, a panel for each delay; lines are means over seeds, bands their range."""
    delays = sorted({run.delay for run in runs})
    figure = Figure(figsize=(1 + 6 * len(delays), 4.6), layout="constrained")
    panels = figure.subplots(1, len(delays), sharey=True, squeeze=False)[0]
    for panel, delay in zip(panels, delays, strict=True):
        for index, memory in enumerate(dict.fromkeys(run.memory for run in runs)):
            own = [run for run in runs if (run.memory, run.delay) == (memory, delay)]
            if not own:
                continue
            steps = own[0].steps / 1e6
            curves = np.array([_smoothed(run.success) for run in own])
            label = plain_text(f"{memory.replace('_', ' ')}: {np.mean([run.last_success for run in own]):.2f}")
            panel.plot(steps, curves.mean(axis=0), color=f"C{index}", label=label)
            panel.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=f"C{index}", alpha=0.2, linewidth=0)
        seeds = len({run.seed for run in runs if run.delay == delay})
        panel.axhline(0.5, color="grey", linestyle=":", linewidth=1)
        panel.set(xlabel="million environment steps", ylim=(0.4, 1.02), title=f"delay {delay}, {seeds} seeds")
        panel.legend(loc="upper left", fontsize="small", title="memory: success at the end")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of trials won (dotted: chance)")
    return figure


def delay_figure(runs: list[Run]) -> Figure:
    """Success at the end over the delay: means over seeds, bars their range; dashed: how far each memory reaches."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    panel = figure.subplots()
    for index, memory in enumerate(dict.fromkeys(run.memory for run in runs)):
        own = [run for run in runs if run.memory == memory]
        delays = sorted({run.delay for run in own})
        last = [[run.last_success for run in own if run.delay == delay] for delay in delays]
        means = np.array([np.mean(values) for values in last])
        spread = np.array([means - [min(values) for values in last], [max(values) for values in last] - means])
        style = {"color": f"C{index}", "marker": _MARKERS[index % len(_MARKERS)], "capsize": 3}
        panel.errorbar(delays, means, yerr=spread, label=plain_text(memory.replace("_", " ")), **style)
        if hasattr(own[0].config.model, "reach_of_layers"):
            panel.axvline(
                sum(own[0].config.model.reach_of_layers), color=f"C{index}", linestyle="--", linewidth=1, alpha=0.6
            )
    panel.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    panel.set_xscale("log", base=2)
    ticks = sorted({run.delay for run in runs})
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set(xlabel="delay in steps (dashed: how far each memory reaches)", ylim=(0.4, 1.02))
    panel.set_ylabel("share of trials won at the end (dotted: chance)")
    panel.legend(fontsize="small", loc="center left")
    panel.grid(alpha=0.3)
    return figure


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Means over a twentieth of the run before each point."""
    length = max(1, len(values) // NUM_SMOOTHED)
    sums = np.cumsum(np.concatenate([np.zeros(length), values]))
    counts = np.minimum(np.arange(1, len(values) + 1), length)
    return (sums[length:] - sums[:-length]) / counts
