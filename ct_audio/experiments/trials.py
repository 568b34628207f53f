"""Many trainings by ct-audio train, some at a time and resumable, and what each of them ended with."""

import math
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from ct_audio.common.errors import UserError
from ct_audio.common.progress import Progress
from ct_audio.common.recipes import PROGRAM
from ct_audio.runs.config import RunConfig, load_config
from ct_audio.runs.metrics import read_metrics


def load_base(base_file: Path, overrides: Sequence[str]) -> RunConfig:
    """The run that trials are variants of.

    Raises:
        UserError: it validates nothing.
    """
    base = load_config(base_file, list(overrides))
    if base.train.valid_every_steps == 0:
        raise UserError("train.valid_every_steps is 0, but the table is of the validation split")
    return base


def train_trials(base_file: Path, trials: dict[str, list[str]], out: Path, num_processes: int) -> list[str]:
    """Train what is missing in out/runs; the same call again resumes it.

    Args:
        trials: overrides of each run by its name; name and runs_dir are added.
    Returns:
        the names of the runs that failed; out/logs holds what each of them said.
    Raises:
        UserError: a setting does not fit; nothing has been trained then.
    """
    arguments = {name: [*own, f"name={name}", f"runs_dir={out / 'runs'}"] for name, own in trials.items()}
    for own in arguments.values():  # a setting that does not fit is known before hours of training
        load_config(base_file, own)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    tool = [sys.executable, str(PROGRAM), "train", str(base_file)]
    return _run_all({name: [*tool, *own] for name, own in arguments.items()}, out / "logs", num_processes)


def result_of(run_dir: Path, base: RunConfig, unit: Literal["nats", "bits"]) -> float | None:
    """NLL of the validation split, by unit of data, at the end of a trial; None where it has not ended."""
    key = f"nll/valid_full_{unit}" if base.train.validate_whole_split else f"nll/valid_{unit}"
    found = [line[key] for line in read_metrics(run_dir) if key in line and line["step"] == base.train.num_steps]
    return found[-1] if found else None


def scored_codes(base: RunConfig) -> str:
    """Which codes of the validation split a trial is scored on, for people."""
    whole = base.train.validate_whole_split or base.train.valid_codes == 0
    return f"{'all' if whole else f'the first {base.train.valid_codes:,}'} codes of the validation split"


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for a single value)."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return fmean(values), error


def _run_all(commands: dict[str, list[str]], logs: Path, num_processes: int) -> list[str]:
    """Run all commands, some at a time; returns those that failed. An interrupt stops them after a checkpoint."""
    running: set[subprocess.Popen[bytes]] = set()
    stopping, failed = threading.Event(), []

    def run(name: str) -> None:
        if stopping.is_set():
            return
        with (logs / f"{name}.log").open("ab") as log:
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
            for future in Progress(futures, desc="ablate", unit="run"):
                future.result()
        except KeyboardInterrupt:
            stopping.set()
            for process in list(running):
                process.send_signal(signal.SIGTERM)
            raise
    return failed
