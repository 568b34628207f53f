"""The paper's ablation of compression functions and losses (its Table 5), at any scale, on speech or text.

Each row is trained at each compression rate with each seed by tools/train.py, in parallel and resumable; a row's result
is that of its best rate, as in the paper. Published numbers: Rae et al. 2019, Table 5 (enwik8, bits a character).
"""

import argparse
import csv
import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.command_line import build_parser, run_tool
from ct_audio.common.errors import UserError

if TYPE_CHECKING:
    from ct_audio.runs.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        function, loss: as in the configuration.
        paper_bits: published bits a character; None beyond the paper.
    """

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
PAPER_ROWS = [name for name, row in ROWS.items() if row.paper_bits is not None]


class Trial(NamedTuple):
    """One run of the ablation."""

    row: str
    rate: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row}_rate{self.rate}_seed{self.seed}"


def main() -> int:
    """Parse, train what is missing, write and print the table."""
    arguments = _parse()
    from ct_audio.runs.config import load_config  # after --help: it takes seconds

    base = load_config(arguments.base, arguments.set)
    trials = [Trial(row, rate, seed) for seed in arguments.seeds for rate in arguments.rates for row in arguments.rows]
    commands = {trial: command_of(trial, base, arguments) for trial in trials}
    for trial, command in commands.items():  # a setting that does not fit is known before hours of training
        load_config(arguments.base, command[command.index(str(arguments.base)) + 1 :])
        if base.train.valid_every_steps == 0:
            raise UserError(f"{trial.name}: train.valid_every_steps is 0, but the table is of the validation split")
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = train_all(commands, arguments.out, arguments.num_processes)
    results = {trial: result for trial in trials if (result := result_of(trial, arguments.out, base)) is not None}
    if results:
        write_report(results, arguments.out, base)
        print((arguments.out / "table.md").read_text(encoding="utf-8"), end="")
    for trial in failed:
        print(f"error: {trial.name} failed, see {arguments.out / 'logs' / trial.name}.log", file=sys.stderr)
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Train and compare compression functions, losses and rates (the paper's Table 5). The same command again goes "
        "on where it stopped. Lengths of windows and memory must be divisible by all rates."
    )
    parser.add_argument("base", type=Path, help="YAML of a Compressive Transformer; rows replace what they are about")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for runs, logs, table and picture")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=PAPER_ROWS, help="lines of the table")
    parser.add_argument("--rates", nargs="+", type=int, default=[2, 3, 4], metavar="C", help="compression rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S", help="seeds of each")
    parser.add_argument("--set", nargs="*", default=[], metavar="A.B=C", help="overrides for all runs")
    parser.add_argument("--num-processes", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at a time")
    arguments = parser.parse_args()
    if arguments.num_processes < 1:
        raise UserError(f"--num-processes: expected at least 1, got {arguments.num_processes}")
    for name in ("rows", "rates", "seeds"):
        values = getattr(arguments, name)
        if len(set(values)) < len(values):
            raise UserError(f"--{name}: {values} has a value twice")
    return arguments


def command_of(trial: Trial, base: "RunConfig", arguments: argparse.Namespace) -> list[str]:
    """The training command of a trial. bptt has a double unroll and half the lanes, as in the paper; where that is too
    short for the task loss to reach f_c, it is doubled again."""
    row = ROWS[trial.row]
    overrides = {
        "name": trial.name,
        "runs_dir": str(arguments.out / "runs"),
        "model.compression_function": row.function,
        "model.compression_loss": row.loss,
        "model.compression_rate": trial.rate,
        "train.seed": trial.seed,
    }
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
        overrides["data.chunk_length"] = factor * base.data.chunk_length
        overrides["data.num_lanes"] = base.data.num_lanes // factor
    tool = str(ROOT / "tools" / "train.py")
    return [
        sys.executable,
        tool,
        str(arguments.base),
        *arguments.set,
        *(f"{key}={value}" for key, value in overrides.items()),
    ]


def train_all(commands: dict[Trial, list[str]], out: Path, num_processes: int) -> list[Trial]:
    """Run all commands, some at a time; returns those that failed. An interrupt stops them after a checkpoint."""
    from tqdm import tqdm

    (out / "logs").mkdir(exist_ok=True)
    running: set[subprocess.Popen[bytes]] = set()
    stopping, failed = threading.Event(), []

    def run(trial: Trial) -> None:
        if stopping.is_set():
            return
        with (out / "logs" / f"{trial.name}.log").open("ab") as log:
            # A group of its own: Ctrl-C reaches this process only, which passes it on once.
            process = subprocess.Popen(commands[trial], stdout=log, stderr=log, start_new_session=True)
            running.add(process)
            status = process.wait()
            running.discard(process)
        if status != 0 and not stopping.is_set():
            failed.append(trial)

    with ThreadPoolExecutor(num_processes) as pool:
        futures = [pool.submit(run, trial) for trial in commands]
        try:
            for future in tqdm(futures, desc="ablate", unit="run", disable=None):
                future.result()
        except KeyboardInterrupt:
            stopping.set()
            for process in list(running):
                process.send_signal(signal.SIGTERM)
            raise
    return failed


def result_of(trial: Trial, out: Path, base: "RunConfig") -> float | None:
    """Bits a unit of validation at the end of a trial (see `scored_codes`); None where it has not ended."""
    key = "nll/valid_full_bits" if base.train.validate_whole_split else "nll/valid_bits"
    path = out / "runs" / trial.name / "metrics.jsonl"
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line[key] for line in lines if key in line and line["step"] == base.train.num_steps]
    return found[-1] if found else None


def scored_codes(base: "RunConfig") -> str:
    """What the numbers of the table are measured on."""
    whole = base.train.validate_whole_split or base.train.valid_codes == 0
    return f"{'all' if whole else f'the first {base.train.valid_codes:,}'} codes of the validation split"


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def summarise(results: dict[Trial, float]) -> list[dict[str, Any]]:
    """A line a row, at its best rate; differences to the base row are paired by seed, each at its own best rate."""
    by_rate: dict[str, dict[int, dict[int, float]]] = {}
    for trial, bits in results.items():
        by_rate.setdefault(trial.row, {}).setdefault(trial.rate, {})[trial.seed] = bits
    best = {
        row: min(rates.items(), key=lambda item: statistics.fmean(item[1].values())) for row, rates in by_rate.items()
    }
    lines = []
    for row, (rate, seeds) in best.items():
        mean, error = mean_and_error(list(seeds.values()))
        base = best.get(BASE_ROW, (0, {}))[1]
        paired = [bits - base[seed] for seed, bits in seeds.items() if seed in base]
        difference, difference_error = mean_and_error(paired) if paired else (math.nan, math.nan)
        lines.append(
            {
                "row": row,
                "function": ROWS[row].function,
                "loss": ROWS[row].loss,
                "best rate": rate,
                "seeds": len(seeds),
                "bits": mean,
                "standard error": error,
                f"minus {BASE_ROW}": difference,
                "its standard error": difference_error,
                "paper (bits)": ROWS[row].paper_bits,
            }
        )
    return sorted(lines, key=lambda line: -line["bits"])


def write_report(results: dict[Trial, float], out: Path, base: "RunConfig") -> None:
    """table.md, table.csv, results.json (every run) and ablation.png."""
    lines = summarise(results)
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    runs = [{**trial._asdict(), "bits": bits} for trial, bits in results.items()]
    (out / "results.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")

    def show(value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    rates: dict[str, list[str]] = {}
    for row in dict.fromkeys(trial.row for trial in results):
        for rate in sorted({trial.rate for trial in results}):
            found = [bits for trial, bits in results.items() if (trial.row, trial.rate) == (row, rate)]
            rates.setdefault(row, []).append(f"{statistics.fmean(found):.4f}" if found else "-")
    all_rates = sorted({trial.rate for trial in results})
    text = [
        f"{base.data.corpus}, {scored_codes(base)}, bits a unit; "
        f"{base.train.num_steps} steps of {base.data.num_lanes} x "
        f"{base.data.chunk_length} codes; window {base.model.window_length}, memory {base.model.memory_length}, "
        f"compressed memory {base.model.compressed_memory_length}.",
        "",
        f"| {' | '.join(lines[0])} | {' | '.join(f'rate {rate}' for rate in all_rates)} |",
        f"|{'---|' * (len(lines[0]) + len(all_rates))}",
        *(f"| {' | '.join([*map(show, line.values()), *rates[line['row']]])} |" for line in lines),
        "",
    ]
    (out / "table.md").write_text("\n".join(text), encoding="utf-8")
    draw(lines, out / "ablation.png")


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Bits with standard errors, beside the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 0.5 * len(lines) + 1.6), sharey=True)
    names = [line["row"] for line in lines]
    errors = [0 if math.isnan(line["standard error"]) else line["standard error"] for line in lines]
    panels[0].errorbar([line["bits"] for line in lines], names, xerr=errors, fmt="o", capsize=4)
    panels[0].set_xlabel("bits a unit, this run (mean, standard error)")
    published = [(line["paper (bits)"], line["row"]) for line in lines if line["paper (bits)"] is not None]
    if published:
        panels[1].plot(*zip(*published, strict=True), "s", color="C1")
    panels[1].set_xlabel("bits a character, Rae et al. 2019, Table 5")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.ticklabel_format(axis="x", useOffset=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_tool(main))
