"""The paper's ablation of compression functions and losses (its Table 5), at any scale, on speech or text.

Each row is trained at each compression rate with each seed by `ct-audio train`, in parallel and resumable; a row's
result is that of its best rate, as in the paper. Published numbers: Rae et al. 2019, Table 5 (enwik8, bits per
character).
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ct_audio.common.errors import UserError
from ct_audio.common.figures import write_figure
from ct_audio.common.files import write_csv, write_file, write_json
from ct_audio.common.text import markdown_table
from ct_audio.experiments.trials import load_base, mean_and_error, result_of, scored_codes, train_trials
from ct_audio.runs.config import RunConfig


class Row(NamedTuple):
    """One line of the table; published bits per character, None beyond the paper."""

    function: str
    loss: str
    paper_bits: float | None


ROWS = {
    "conv_bptt": Row("conv", "bptt", 0.996),
    "max": Row("max", "none", 0.986),
    "conv_autoencoding": Row("conv", "autoencoding", 0.984),
    "mean": Row("mean", "none", 0.982),
    "most_used": Row("most_used", "none", 0.980),
    "dilated_conv_attention": Row("dilated_conv", "attention_reconstruction", 0.977),
    "conv_attention": Row("conv", "attention_reconstruction", 0.973),
    "gru_attention": Row("gru", "attention_reconstruction", None),
}
BASE_ROW = "conv_attention"
OWN_KEYS = (
    "name",
    "runs_dir",
    "model.compression_function",
    "model.compression_loss",
    "model.compression_rate",
    "train.seed",
)
"""What every trial sets itself."""


class Trial(NamedTuple):
    """One run of the ablation."""

    row: str
    rate: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row}_rate{self.rate}_seed{self.seed}"


def run_ablation(
    base_file: Path,
    out: Path,
    *,
    rows: Sequence[str],
    rates: Sequence[int],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    num_processes: int = 1,
) -> tuple[str, list[str]]:
    """Train what is missing and write the report: the same call again resumes it.

    Args:
        base_file: YAML of a Compressive Transformer; rows (keys of ROWS) replace what they are about.
        overrides: of all runs, as "a.b=c"; not of OWN_KEYS.
    Returns:
        the table as Markdown, "" where no run has ended, and the names of the runs that failed; out/logs holds what
        each of them said.
    Raises:
        UserError: a setting does not fit; nothing has been trained then.
    """
    base = load_base(base_file, overrides)
    trials = [Trial(row, rate, seed) for seed in seeds for rate in rates for row in rows]
    settings = {trial.name: [*overrides, *settings_of(trial, base)] for trial in trials}
    failed = train_trials(base_file, settings, out, num_processes)
    ended = {trial: result_of(out / "runs" / trial.name, base, "bits") for trial in trials}
    results = {trial: bits for trial, bits in ended.items() if bits is not None}
    return write_report(results, out, base) if results else "", failed


def settings_of(trial: Trial, base: RunConfig) -> list[str]:
    """The overrides of a trial.

    bptt has a double unroll and half the lanes, as in the paper; where that is too short for the task loss to reach
    f_c, it is doubled again.
    """
    row = ROWS[trial.row]
    settings = [f"model.compression_function={row.function}", f"model.compression_loss={row.loss}"]
    settings += [f"model.compression_rate={trial.rate}", f"train.seed={trial.seed}"]
    if row.loss == "bptt":
        model = dataclasses.replace(base.model, compression_loss=row.loss, compression_rate=trial.rate)
        factor = 2
        while factor * base.data.chunk_length < model.min_chunk_windows * model.window_length:
            factor *= 2
        if base.data.num_lanes % factor:
            raise UserError(
                f"{trial.row}: {factor} times the unroll with as many codes a step needs data.num_lanes divisible by "
                f"{factor}, got {base.data.num_lanes}; write --set data.num_lanes={factor}"
            )
        settings += [f"data.chunk_length={factor * base.data.chunk_length}"]
        settings += [f"data.num_lanes={base.data.num_lanes // factor}"]
    return settings


def summarise(results: dict[Trial, float]) -> list[dict[str, Any]]:
    """A line a row, at its best rate; differences to the base row are paired by seed, each at its own best rate."""
    by_rate: dict[str, dict[int, dict[int, float]]] = {}
    for trial, bits in results.items():
        by_rate.setdefault(trial.row, {}).setdefault(trial.rate, {})[trial.seed] = bits
    best = {row: min(rates.items(), key=lambda item: fmean(item[1].values())) for row, rates in by_rate.items()}
    lines = []
    for row, (rate, seeds) in best.items():
        mean, error = mean_and_error(list(seeds.values()))
        base = best.get(BASE_ROW, (0, {}))[1]
        paired = [bits - base[seed] for seed, bits in seeds.items() if seed in base]
        difference, difference_error = mean_and_error(paired) if paired else (math.nan, math.nan)
        line = {"row": row, "function": ROWS[row].function, "loss": ROWS[row].loss, "best rate": rate}
        line |= {"seeds": len(seeds), "bits": mean, "standard error": error}
        line |= {f"minus {BASE_ROW}": difference, "its standard error": difference_error}
        lines.append(line | {"paper (bits)": ROWS[row].paper_bits})
    return sorted(lines, key=lambda line: -line["bits"])


def write_report(results: dict[Trial, float], out: Path, base: RunConfig) -> str:
    """Write table.md, table.csv, results.json (every run) and ablation.png; returns the table as Markdown."""
    lines = summarise(results)
    write_csv(out / "table.csv", lines)
    write_json(out / "results.json", [{**trial._asdict(), "bits": bits} for trial, bits in results.items()])

    def show(value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    rates = sorted({trial.rate for trial in results})
    rows = [[*lines[0], *(f"rate {rate}" for rate in rates)]]
    for line in lines:
        by_rate = [
            [bits for trial, bits in results.items() if (trial.row, trial.rate) == (line["row"], rate)]
            for rate in rates
        ]
        rows.append([show(value) for value in (*line.values(), *(fmean(bits) if bits else None for bits in by_rate))])
    data, model, train = base.data, base.model, base.train
    text = (
        f"{data.corpus}, {scored_codes(base)}, bits per unit; {train.num_steps} steps of {data.num_lanes} x "
        f"{data.chunk_length} codes; window {model.window_length}, memory {model.memory_length}, compressed memory "
        f"{model.compressed_memory_length}.\n\n{markdown_table(rows)}\n"
    )
    write_file(out / "table.md", text.encode())
    write_figure(ablation_figure(lines), out / "ablation.png")
    return text


def ablation_figure(lines: list[dict[str, Any]]) -> Figure:
    """Bits with standard errors, beside the paper's."""
    figure = Figure(figsize=(11, 0.5 * len(lines) + 1.6), layout="tight")
    panels = figure.subplots(1, 2, sharey=True)
    names = [line["row"] for line in lines]
    errors = [0 if math.isnan(line["standard error"]) else line["standard error"] for line in lines]
    panels[0].errorbar([line["bits"] for line in lines], names, xerr=errors, fmt="o", capsize=4)
    panels[0].set_xlabel("bits per unit, this run (mean, standard error)")
    published = [(line["paper (bits)"], line["row"]) for line in lines if line["paper (bits)"] is not None]
    if published:
        panels[1].plot(*zip(*published, strict=True), "s", color="C1")
    panels[1].set_xlabel("bits per character, Rae et al. 2019, Table 5")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.ticklabel_format(axis="x", useOffset=False)
    return figure
