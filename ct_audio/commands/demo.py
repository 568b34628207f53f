"""From nothing to sound, pictures and a table in minutes: what `make demo` runs after the installation.

Each step is a command of its own, printed so that it can be copied. What is done is not done again, and an interrupted
demo goes on: preparation, training and comparison see to that themselves; evaluation and sampling are marked by a file
in OUT/done that holds their commands and the checkpoints that these were run with.
"""

import csv
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ct_audio.commands.command_line import build_parser
from ct_audio.common.errors import UserError
from ct_audio.common.files import PROJECT

MODELS = ("compressive_transformer", "wavenet")
BASELINES = ("linear_prediction", "linear_prediction_fixed")
SPLITS = ("valid", "test")
AS_THE_MODELS = (
    "data.chunk_length=1920",
    "train.num_steps=700",
    "train.valid_codes=96000",
    "train.validate_whole_split=false",
)
"""What the baselines have to be told for a line in the same chart, over the same stretch."""
STATUS_FAULTY_SAMPLE = 4
NUM_SAMPLES = 2
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
SECONDS_TO_END = 60.0
"""How long commands get to save what they have when the demo is interrupted."""


@dataclass(frozen=True)
class Places:
    """Directories, relative to the project or absolute."""

    data: Path
    runs: Path
    out: Path

    def run(self, model: str) -> Path:
        """Directory of a model's run."""
        return self.runs / f"espeak_demo_{model}"

    def samples(self, model: str) -> Path:
        """Directory of a model's samples."""
        return self.out / "samples" / model


@dataclass(frozen=True)
class Step:
    """Commands that run side by side.

    Attributes:
        commands: each a command line in words, by what its output is marked with.
        accepted: exit statuses after which the demo goes on.
        once: skipped when it was completed with these commands and these checkpoints.
    """

    title: str
    commands: dict[str, list[str]]
    accepted: tuple[int, ...] = (0,)
    once: bool = False


def main() -> int:
    """Run all steps; print their times and what to open."""
    parser = build_parser(
        "Prepare synthetic speech, train a small Compressive Transformer and a WaveNet, compare them with "
        "linear prediction and with each other, sample them. The same command goes on after an interruption, and does "
        "nothing twice."
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change in all runs")
    parser.add_argument("--data", type=Path, default=Path("data/espeak"), help="corpus to make or use")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are")
    parser.add_argument("--out", type=Path, default=Path("reports/demo"), help="for table, pictures and samples")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of each sample")
    parser.add_argument("--num-sentences", type=int, default=0, help="only so many sentences of the recipe; 0: all")
    options = parser.parse_args()
    if not (PROJECT / "recipes").is_dir():
        raise UserError(f"{PROJECT} holds no recipes; run the demo from a copy of the whole project")
    places = Places(options.data, options.runs, options.out)
    steps = plan(places, options.overrides, seconds=options.seconds, num_sentences=options.num_sentences)
    catch_signals()
    print(f"in {PROJECT}; every command can be run by itself")
    began, times = clocks(), []
    for number, step in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps)}] {step.title}", flush=True)
        start = clocks()
        statuses = run_once(step, places) if step.once else run_commands(step.commands)
        for label, status in statuses.items():
            if status not in step.accepted:
                raise UserError(
                    f"the demo stopped: exit status {status} of `{shlex.join(step.commands[label])}`; "
                    "its message stands above; the same command goes on from here"
                )
        times.append((step.title, *clocks(start)))
    times.append(("all of it", *clocks(began)))
    print("\n   wall      CPU")
    print("\n".join(f"{wall:7.1f} s {cpu:7.1f} s  {title}" for title, wall, cpu in times))
    print("\n" + "\n".join(results(PROJECT / places.out / "table.csv")))
    print("\n" + "\n".join(what_to_open(places)))
    return 0


def catch_signals() -> None:
    """Interruptions become exceptions, in the commands too, even where a shell's `&` had them ignored; nohup holds."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def plan(places: Places, overrides: list[str], *, seconds: float, num_sentences: int) -> list[Step]:
    """The steps; what is at its default is left out of the commands."""
    prepare = ["python", "tools/prepare.py", "recipes/espeak", "--out", str(places.data)]
    prepare += ["--", "--num-sentences", str(num_sentences)] if num_sentences else []
    changes = [f"runs_dir={places.runs}"] if places.runs != Path("runs") else []
    changes += [f"data.corpus={places.data}"] if places.data != Path("data/espeak") else []
    tool = ["python", "tools/train.py"]
    train = {model: [*tool, f"recipes/espeak/demo_{model}.yaml", *changes, *overrides] for model in MODELS}
    changes = [*AS_THE_MODELS, *changes, *(key for key in overrides if not key.startswith(("model.", "optim.")))]
    fit = {
        name: [*tool, f"recipes/espeak/{name}.yaml", f"name={places.run(name).name}", *changes] for name in BASELINES
    }
    sample = {}
    for model in MODELS:
        sample[model] = ["python", "tools/sample.py", str(places.run(model)), "--seconds", f"{seconds:g}"]
        sample[model] += ["--num", str(NUM_SAMPLES), "--seed", "0", "--threads", "1", "--plots"]
        sample[model] += ["--out", str(places.samples(model))]
    runs = [str(places.run(name)) for name in (*BASELINES, *MODELS)]  # differences are from the first
    compare = ["python", "tools/compare.py", *runs, "--splits", *SPLITS, "--threads", "1", "--out", str(places.out)]
    return [
        Step("speech: synthesized, resampled, mu-law codes", {"": prepare}),
        Step("linear prediction, nothing to train: the line to beat", fit),
        Step("training: both models side by side, one core each", train),
        *(
            Step(
                f"evaluation of the {what}: all of the {split} split",
                {
                    name: ["python", "tools/evaluate.py", str(places.run(name)), "--split", split, "--threads", "1"]
                    for name in names
                },
                once=True,
            )
            for what, names in (("line", BASELINES), ("models", MODELS))
            for split in SPLITS
        ),
        Step("comparison: curves and table", {"": compare}),
        Step(f"samples: {NUM_SAMPLES} of {seconds:g} s a model", sample, (0, STATUS_FAULTY_SAMPLE), once=True),
    ]


def clocks(start: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """Seconds of wall time, and of CPU time of all commands that have ended, since `start`."""
    times = os.times()
    return time.monotonic() - start[0], times.children_user + times.children_system - start[1]


def run_once(step: Step, places: Places) -> dict[str, int]:
    """Those commands that were not completed before with the same checkpoint; returns exit statuses."""
    todo, marks = {}, {}
    for model, command in step.commands.items():
        shown = shlex.join(command)  # as it can be typed in the project's directory
        mark = places.out / "done" / f"{model}-{hashlib.sha256(shown.encode()).hexdigest()[:16]}"
        best = PROJECT / places.run(model) / "checkpoints" / "best" / "state.json"
        marks[model] = (PROJECT / mark, f"{shown}\n{hashlib.sha256(best.read_bytes()).hexdigest()}\n")
        try:
            status, _, rest = marks[model][0].read_text(encoding="utf-8").partition("\n")
        except OSError:
            status, rest = "", ""
        if rest == marks[model][1]:
            print(f"$ {shown}\n  was done before" + (": with warnings" if status != "0" else ""))
        else:
            todo[model] = command
    statuses = run_commands(todo)
    for model, status in statuses.items():
        if status in step.accepted:
            mark, text = marks[model]
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(f"{status}\n{text}", encoding="utf-8")
    return statuses


def run_commands(commands: dict[str, list[str]]) -> dict[str, int]:
    """Run commands side by side, their lines marked with their labels; returns exit statuses.

    Raises:
        KeyboardInterrupt: this process was interrupted or terminated; the commands were, too, and have ended.
    """
    running: dict[str, subprocess.Popen[str]] = {}
    readers = []
    try:
        for label, command in commands.items():
            print(f"$ {shlex.join(command)}", flush=True)
            alone = len(commands) == 1 and not label
            running[label] = subprocess.Popen(
                [sys.executable, *command[1:]],
                cwd=PROJECT,
                env=os.environ | ENVIRONMENT,
                text=True,
                errors="replace",
                stdout=None if alone else subprocess.PIPE,
                stderr=None if alone else subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes to this process alone, which hands it on once
            )
        for label, process in running.items():
            if process.stdout:
                readers.append(threading.Thread(target=print_lines, args=(process, label), daemon=True))
                readers[-1].start()
        return {label: process.wait() for label, process in running.items()}
    except KeyboardInterrupt:
        print("interrupted: the commands save what they have", file=sys.stderr, flush=True)
        raise
    finally:
        end(running)
        for reader in readers:
            reader.join()


def print_lines(process: subprocess.Popen[str], label: str) -> None:
    """Print each line that a command prints with its label in front."""
    assert process.stdout
    with process.stdout:
        for line in process.stdout:
            print(f"  {label} | {line.rstrip()}", flush=True)


def end(running: dict[str, subprocess.Popen[str]]) -> None:
    """Interrupt what still runs and wait for it; what does not end in time is killed."""
    alive = [process for process in running.values() if process.poll() is None]
    for process in alive:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + SECONDS_TO_END
    for process in alive:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def results(table: Path) -> list[str]:
    """Lines with the NLL of every run, best first; the whole table has a column for everything else."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row[f"{SPLITS[-1]} (nats)"]))
    lines = [f"{'NLL in nats per sample, less is better':40}" + "".join(f"{split:>8}" for split in SPLITS)]
    for row in rows:
        lines.append(f"  {row['run']:38}" + "".join(f"{float(row[f'{split} (nats)']):8.4f}" for split in SPLITS))
    return lines


def what_to_open(places: Places) -> list[str]:
    """Lines that name what there is to see and to hear; every file named exists."""
    samples = [file for model in MODELS for file in sorted((PROJECT / places.samples(model)).glob("*.wav"))]
    files = {
        "curves": [PROJECT / places.out / "curves.png"],
        "table": [PROJECT / places.out / "table.md"],
        "spectrograms": [file.with_suffix(".png") for file in samples],
        "samples": samples,
        "the speech itself": [PROJECT / places.data / "example.wav"],
    }
    lines = ["What to open:"]
    for what, paths in files.items():
        names = [os.path.relpath(path, PROJECT) for path in paths if path.is_file()]
        lines += [f"  {what if name == names[0] else '':18} {name}" for name in names]
    lines.append(f"  {'all curves':18} tensorboard --logdir {places.runs}")
    return lines
