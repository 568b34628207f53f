"""From nothing to sound, pictures and a table in minutes: what `make demo` runs after the installation.

The shipped models speak first; then small models learn from synthetic speech. Each step is commands of their own, whose
output goes to OUT/logs. What is done is not done again, and an interrupted demo goes on: preparation, training and
comparison see to that themselves; sampling is marked by a file in OUT/done that holds the command and the checkpoint
that it was run with. At the end there is one page to open, OUT/index.html.
"""

import csv
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ct_audio.commands.command_line import build_parser
from ct_audio.common.errors import UserError
from ct_audio.common.files import PROJECT, write_file
from ct_audio.common.recipes import PROGRAM

MODELS = ("compressive_transformer", "wavenet")
BASELINES = ("linear_prediction_autocorrelation", "linear_prediction")
"""The best linear predictor first: all others are set against it."""
SPLITS = ("valid", "test")
SCORED_SECONDS = 10
"""Of each split."""
STATUS_FAULTY_SAMPLE = 4
AT_ONCE = 2
"""Commands that run side by side, one core each."""
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
SECONDS_TO_END = 60.0
"""How long commands get to save what they have when the demo is interrupted."""
_LOOK_EVERY_SECONDS = 0.2


@dataclass(frozen=True)
class Places:
    """Directories, relative to the project or absolute.

    Attributes:
        pretrained: holds a folder for each shipped model.
    """

    data: Path
    runs: Path
    out: Path
    pretrained: Path

    def run(self, model: str) -> Path:
        """Directory of a model's run."""
        return self.runs / f"espeak_demo_{model}"

    def samples(self, name: str) -> Path:
        """Directory of a set of samples."""
        return self.out / "samples" / name

    def shipped(self) -> list[Path]:
        """Folders of the shipped models; MODELS first: their kernels differ, so none is compiled twice side by side."""
        folders = [path.parent for path in (PROJECT / self.pretrained).glob("*/config.json")]
        return sorted(folders, key=lambda folder: (folder.name not in MODELS, folder.name))


@dataclass(frozen=True)
class Command:
    """A command line in words.

    Attributes:
        name: of its log.
        once: file that names the checkpoint: skipped when it was completed with these words and this file.
        accepted: exit statuses after which the demo goes on.
    """

    name: str
    words: list[str]
    once: Path | None = None
    accepted: tuple[int, ...] = (0,)

    @property
    def shown(self) -> str:
        """As it can be typed in the project's directory, with the environment's programs on the path."""
        return shlex.join(self.words)


@dataclass(frozen=True)
class Stage:
    """Commands of which AT_ONCE run side by side; `share` says how much of them is done, where it is known."""

    title: str
    commands: list[Command]
    share: Callable[[], float] | None = None


def main() -> int:
    """Run all stages; print their times, the results and what to open."""
    parser = build_parser(
        "Let the shipped models speak; prepare synthetic speech, train a small Compressive Transformer and a WaveNet "
        "on it, compare them with linear prediction, sample them. The same command goes on after an interruption, and "
        "does nothing twice."
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change in all runs")
    parser.add_argument("--data", type=Path, default=Path("data/espeak"), help="corpus to make or use")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are")
    parser.add_argument("--out", type=Path, default=Path("reports/demo"), help="for page, table, pictures and samples")
    parser.add_argument("--pretrained", type=Path, default=Path("recipes/kathleen/pretrained"), help="shipped models")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each sample of a shipped model")
    parser.add_argument("--num-sentences", type=int, default=0, help="only so many sentences of the recipe; 0: all")
    options = parser.parse_args()
    if not (PROJECT / "recipes").is_dir():
        raise UserError(f"{PROJECT} holds no recipes; run the demo from a copy of the whole project")
    places = Places(options.data, options.runs, options.out, options.pretrained)
    stages = plan(places, options.overrides, seconds=options.seconds, num_sentences=options.num_sentences)
    catch_signals()
    print(f"in {PROJECT}; what the commands print is in {places.out / 'logs'}")
    began = time.monotonic()
    for number in range(len(stages)):
        run_stage(stages, number, places)
    page = write_page(places)
    print(f"all of it: {time.monotonic() - began:.0f} s\n\n" + "\n".join(results(PROJECT / places.out / "table.csv")))
    print(
        f"\nOpen {os.path.relpath(page)} in a browser: it plays the samples and shows table, curves and spectrograms."
    )
    return 0


def catch_signals() -> None:
    """Interruptions become exceptions, in the commands too, even where a shell's `&` had them ignored; nohup holds."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def plan(places: Places, overrides: list[str], *, seconds: float, num_sentences: int) -> list[Stage]:
    """The stages; what is at its default is left out of the commands."""
    prepare = ["ct-audio", "prepare", "recipes/espeak", "--out", str(places.data)]
    prepare += ["--", "--num-sentences", str(num_sentences)] if num_sentences else []
    changes = [f"runs_dir={places.runs}"] if places.runs != Path("runs") else []
    changes += [f"data.corpus={places.data}"] if places.data != Path("data/espeak") else []
    tool, recipe = ["ct-audio", "train"], "recipes/espeak"
    train = [Command(f"train_{m}", [*tool, f"{recipe}/demo_{m}.yaml", *changes, *overrides]) for m in MODELS]
    changes += ["train.validate_whole_split=false", *(k for k in overrides if not k.startswith(("model.", "optim.")))]
    line = [
        Command(f"train_{name}", [*tool, f"{recipe}/{name}.yaml", f"name={places.run(name).name}", *changes])
        for name in BASELINES
    ]
    runs = [str(places.run(name)) for name in (*BASELINES, *MODELS)]
    compare = ["ct-audio", "compare", *runs, "--splits", *SPLITS, "--max-seconds", str(SCORED_SECONDS)]
    compare += ["--threads", "1", "--out", str(places.out)]
    own = [
        sample(places, model, places.run(model), places.run(model) / "checkpoints/best/state.json", min(seconds, 2.0))
        for model in MODELS
    ]
    return [
        Stage("the shipped models speak", list(samples_of_shipped(places, seconds))),
        Stage("synthetic speech is made", [Command("prepare", prepare)]),
        Stage("linear prediction, nothing to train: the line to beat", line),
        Stage("two small models learn, one core each", train, lambda: share_trained(places)),
        Stage("the models are scored, and speak", [Command("compare", compare), *own]),
    ]


def samples_of_shipped(places: Places, seconds: float) -> Iterator[Command]:
    """Of each shipped model an unconditional sample, then continuations of the clips that they came with."""
    shipped = [(folder, Path(os.path.relpath(folder, PROJECT))) for folder in places.shipped()]
    for folder, shown in shipped:
        yield sample(places, f"{folder.name}_unconditional", shown, shown / "config.json", seconds)
    for folder, shown in shipped:
        for clip in sorted(folder.glob("clip.*")):
            prime = ["--prime", str(shown / clip.name), "--include-prime"]
            yield sample(places, f"{folder.name}_continuation", shown, shown / "config.json", seconds, *prime)


def sample(places: Places, name: str, model: Path, checkpoint: Path, seconds: float, *more: str) -> Command:
    """The command that makes one sample with its picture."""
    words = ["ct-audio", "sample", str(model), "--seconds", f"{seconds:g}", "--num", "1", "--seed", "0"]
    words += ["--threads", "1", "--plots", *more, "--out", str(places.samples(name))]
    return Command(f"sample_{name}", words, checkpoint, (0, STATUS_FAULTY_SAMPLE))


def share_trained(places: Places) -> float:
    """How much of the training is done: the mean over the models."""
    shares = []
    for model in MODELS:
        try:
            last = (PROJECT / places.run(model) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
            configuration = (PROJECT / places.run(model) / "config.yaml").read_text(encoding="utf-8")
            num_steps = configuration.partition("num_steps: ")[2].split()[0]
            shares.append(json.loads(last)["step"] / int(num_steps))
        except (OSError, ValueError, LookupError):
            shares.append(0.0)
    return sum(shares) / len(shares)


def run_stage(stages: list[Stage], number: int, places: Places) -> None:
    """Run a stage under a bar over all of them, then print its time.

    Raises:
        UserError: a command failed; it names the command and shows the end of its log.
    """
    from tqdm import tqdm

    stage, began = stages[number], time.monotonic()
    shape = "{desc} |{bar}| {elapsed}"
    with tqdm(total=len(stages), initial=number, desc=stage.title, bar_format=shape, leave=False, disable=None) as bar:

        def show(share: float) -> None:
            bar.n = number + (stage.share() if stage.share is not None else share)
            bar.refresh()

        statuses = run_commands(stage.commands, places, show)
    for command in stage.commands:
        if (status := statuses.get(command.name, 0)) not in command.accepted:
            log = log_of(command, places)
            end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
            raise UserError(
                f"the demo stopped: exit status {status} of `{command.shown}`: {' '.join(end)} "
                f"(all of it in {os.path.relpath(log, PROJECT)}); the same command goes on from here"
            )
    what = "" if stage.commands else " (none are there)"
    what += " (was done before)" if stage.commands and not statuses else ""
    faulty = [command.name for command in stage.commands if statuses.get(command.name)]
    what += f" (with warnings: {', '.join(faulty)})" if faulty else ""
    print(f"[{number + 1}/{len(stages)}] {stage.title}: {time.monotonic() - began:.0f} s{what}", flush=True)


def log_of(command: Command, places: Places) -> Path:
    """Where what a command prints goes."""
    return PROJECT / places.out / "logs" / f"{command.name}.log"


def run_commands(commands: list[Command], places: Places, show: Callable[[float], None]) -> dict[str, int]:
    """Run those commands that were not completed before, AT_ONCE side by side; returns their exit statuses by name.

    After one that failed no other is begun.

    Args:
        show: called with the share of the commands that have ended.
    Raises:
        KeyboardInterrupt: this process was interrupted or terminated; the commands were, too, and have ended.
    """
    waiting = [command for command in commands if not was_done(command, places)]
    num_commands, running, statuses = len(waiting), dict[str, tuple[Command, subprocess.Popen[bytes]]](), {}
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                command = waiting.pop(0)
                running[command.name] = (command, start(command, places))
            for name, (command, process) in list(running.items()):
                if (status := process.poll()) is not None:
                    statuses[name] = status
                    del running[name]
                    if status in command.accepted:
                        mark_done(command, places)
                    else:
                        waiting.clear()
            show(len(statuses) / max(1, num_commands))
            if running:
                time.sleep(_LOOK_EVERY_SECONDS)
    except KeyboardInterrupt:
        print("interrupted: the commands save what they have", file=sys.stderr, flush=True)
        raise
    finally:
        end([process for _, process in running.values()])
    return statuses


def start(command: Command, places: Places) -> subprocess.Popen[bytes]:
    """Start a command; what it prints goes to its log, behind its command line."""
    log = log_of(command, places)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"$ {command.shown}\n".encode())
        file.flush()
        program = [str(PROGRAM)] if command.words[0] == "ct-audio" else []
        return subprocess.Popen(
            [sys.executable, *program, *command.words[1:]],
            cwd=PROJECT,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to this process alone, which hands it on once
        )


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Interrupt what still runs and wait for it; what does not end in time is killed."""
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + SECONDS_TO_END
    for process in alive:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _mark(command: Command, places: Places) -> tuple[Path, str]:
    """The file that marks a command as completed, and what it holds."""
    assert command.once is not None
    checkpoint = hashlib.sha256((PROJECT / command.once).read_bytes()).hexdigest()
    return PROJECT / places.out / "done" / command.name, f"{command.shown}\n{checkpoint}\n"


def was_done(command: Command, places: Places) -> bool:
    """Whether a command was completed before, with the same words and checkpoint."""
    if command.once is None:
        return False
    mark, text = _mark(command, places)
    try:
        return mark.read_text(encoding="utf-8") == text
    except OSError:
        return False


def mark_done(command: Command, places: Places) -> None:
    """Note that a command was completed."""
    if command.once is not None:
        mark, text = _mark(command, places)
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_file(mark, text.encode())


def _rows(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: float(row[f"{SPLITS[-1]} (nats)"]))


def results(table: Path) -> list[str]:
    """Lines with the NLL of every run, best first; the whole table has a column for everything else."""
    title = f"NLL in nats per sample, first {SCORED_SECONDS} s, less is better"
    lines = [f"{title:52}" + "".join(f"{split:>8}" for split in SPLITS)]
    for row in _rows(table):
        lines.append(f"  {row['run']:50}" + "".join(f"{float(row[f'{split} (nats)']):8.4f}" for split in SPLITS))
    return lines


def write_page(places: Places) -> Path:
    """OUT/index.html: the samples of all models on a listening page, with the table and the curves; all in one file."""
    from ct_audio.apps.listening_page import (
        CONTINUATION,
        Clip,
        Table,
        read_clips,
        recording,
        recordings_beside,
        write_page,
    )
    from ct_audio.data.codecs import MuLaw, read_codes
    from ct_audio.data.corpus import open_corpus
    from ct_audio.evaluation.curves import known_curves
    from ct_audio.runs.metrics import tensorboard_page

    out, shipped, recordings = PROJECT / places.out, [], []
    for folder in places.shipped():
        for kind in ("unconditional", "continuation"):
            samples = PROJECT / places.samples(f"{folder.name}_{kind}")
            shipped += read_clips(samples, source=f"{folder.name}, shipped") if samples.is_dir() else []
        if not recordings and (clip := folder / "clip.wav").is_file():
            codes = read_codes(clip, MuLaw())
            beside = Clip("", "", CONTINUATION, 0, codes, len(codes))
            recordings.append(recording(codes, beside, {"file": "what the shipped models continue"}))
    own = []
    for model in MODELS:
        samples = PROJECT / places.samples(model)
        own += read_clips(samples, source=f"{model}, trained here") if samples.is_dir() else []
    if (PROJECT / places.data / "corpus.json").is_file():
        speech = recordings_beside(own, open_corpus(PROJECT / places.data).split(SPLITS[0]))
        recordings += [replace(clip, source="synthetic speech") for clip in speech]
    rows = _rows(out / "table.csv")
    names = {places.run(name).name: PROJECT / places.run(name) for name in (*MODELS, *BASELINES)}
    title = f"NLL on the first {SCORED_SECONDS} s of each split, the difference from the best linear predictor"
    note = "NLL in nats per sample. How it was measured: table.md. "
    note += f"TensorBoard: tensorboard --logdir {places.runs}, then open {tensorboard_page()}"
    write_page(
        out / "index.html",
        title="ct_audio demo",
        text="Shipped models, and models trained here from scratch, on synthetic speech, for about a minute each.",
        clips=[*recordings, *shipped, *own],
        curves=known_curves(dict(names)),
        tables=[Table(title, _cells(rows), note)],
    )
    return out / "index.html"


def _cells(rows: list[dict[str, str]]) -> list[list[str]]:
    """The columns that the page shows."""
    columns = ["run", "parameters", "steps", *(f"{split} (nats)" for split in SPLITS)]
    columns.append(f"{SPLITS[-1]} difference (nats)")
    return [columns, *([_cell(row[column]) for column in columns] for row in rows)]


def _cell(text: str) -> str:
    return f"{float(text):.4f}" if "." in text else text or "-"
