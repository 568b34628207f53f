"""The paper's ablation of compression functions and losses (its Table 5), at any scale, on speech or text.

Each row is trained at each compression rate with each seed by `ct-audio train`, in parallel and resumable; a row's
result is that of its best rate, as in the paper. Published numbers: Rae et al. 2019, Table 5 (enwik8, bits per
character).
"""

import dataclasses
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from tqdm import tqdm

from ct_audio.common.errors import UserError
from ct_audio.common.figures import write_figure
from ct_audio.common.files import write_csv, write_file, write_json
from ct_audio.common.recipes import PROGRAM
from ct_audio.common.text import markdown_table
from ct_audio.runs.config import RunConfig, load_config
from ct_audio.runs.metrics import read_metrics


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
    base = load_config(base_file, list(overrides))
    if base.train.valid_every_steps == 0:
        raise UserError("train.valid_every_steps is 0, but the table is of the validation split")
    trials = [Trial(row, rate, seed) for seed in seeds for rate in rates for row in rows]
    arguments = {trial: [*overrides, *settings_of(trial, base, out)] for trial in trials}
    for trial in trials:  # a setting that does not fit is known before hours of training
        load_config(base_file, arguments[trial])
    out.mkdir(parents=True, exist_ok=True)
    tool = [sys.executable, str(PROGRAM), "train", str(base_file)]
    failed = train_all({trial.name: [*tool, *arguments[trial]] for trial in trials}, out, num_processes)
    results = {trial: result for trial in trials if (result := result_of(trial, out, base)) is not None}
    return write_report(results, out, base) if results else "", failed


def settings_of(trial: Trial, base: RunConfig, out: Path) -> list[str]:
    """The overrides of a trial.

    bptt has a double unroll and half the lanes, as in the paper; where that is too short for the task loss to reach
    f_c, it is doubled again.
    """
    row = ROWS[trial.row]
    values = (trial.name, out / "runs", row.function, row.loss, trial.rate, trial.seed)
    settings = [f"{key}={value}" for key, value in zip(OWN_KEYS, values, strict=True)]
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


def train_all(commands: dict[str, list[str]], out: Path, num_processes: int) -> list[str]:
    """Run all commands, some at a time; returns those that failed. An interrupt stops them after a checkpoint."""
    (out / "logs").mkdir(exist_ok=True)
    running: set[subprocess.Popen[bytes]] = set()
    stopping, failed = threading.Event(), []

    def run(name: str) -> None:
        if stopping.is_set():
            return
        with (out / "logs" / f"{name}.log").open("ab") as log:
            # A group of its own: Ctrl-C reaches this process only, which passes it on once.
            process = subprocess.Popen(commands[name], stdout=log, stderr=log, start_new_session=True)
            running.add(process)
            status = process.wait()
            running.discard(process)
        if status != 0 and not stopping.is_set():
            failed.append(name)

    with ThreadPoolExecutor(num_processes) as pool:
        futures = [pool.submit(run, name) for name in commands]
        try:
            for future in tqdm(futures, desc="ablate", unit="run", disable=None):
                future.result()
        except KeyboardInterrupt:
            stopping.set()
            for process in list(running):
                process.send_signal(signal.SIGTERM)
            raise
    return failed


def result_of(trial: Trial, out: Path, base: RunConfig) -> float | None:
    """Bits per unit of validation at the end of a trial; None where it has not ended."""
    key = "nll/valid_full_bits" if base.train.validate_whole_split else "nll/valid_bits"
    lines = read_metrics(out / "runs" / trial.name)
    found = [line[key] for line in lines if key in line and line["step"] == base.train.num_steps]
    return found[-1] if found else None


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for a single value)."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return fmean(values), error


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
    whole = train.validate_whole_split or train.valid_codes == 0
    text = (
        f"{data.corpus}, {'all' if whole else f'the first {train.valid_codes:,}'} codes of the validation split, bits "
        f"per unit; {train.num_steps} steps of {data.num_lanes} x {data.chunk_length} codes; window "
        f"{model.window_length}, memory {model.memory_length}, compressed memory {model.compressed_memory_length}."
        f"\n\n{markdown_table(rows)}\n"
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
