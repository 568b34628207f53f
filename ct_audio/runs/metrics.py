"""What a run reports: TensorBoard events and metrics.jsonl. The only importer of TensorBoard's writer.

All models log the same tags. metrics.jsonl holds every scalar, one object a line: step, wall_seconds since the run
began (over all sessions), seconds of audio seen, and the scalars by tag. On resume both are cut at the checkpoint's
step: the events that still count go to one new file, and the files of before are emptied, since TensorBoard's fast
loader does not obey the record that tells the others to leave out what was logged later. TensorBoard's x axis is the
step; curves over audio seen and over wall time are drawn from metrics.jsonl (`ct-audio compare`). Where there are lines
but no events, as in a branch, whose first lines are its source's, the events are written from the lines.

Shape letters: N samples.
"""

import contextlib
import io
import itertools
import json
import math
import os
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf.message import DecodeError
from jaxtyping import Float
from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ct_audio.common.errors import UserError
from ct_audio.common.files import write_file
from ct_audio.runs.weights_and_biases import WandbLogger

LAYOUT = {
    "NLL": {
        "nats per code, train and valid": ["Multiline", ["nll/valid_nats", "nll/train_nats"]],
        "nats per code, valid": ["Multiline", ["nll/valid_nats"]],
        "bits per code, train and valid": ["Multiline", ["nll/valid_bits", "nll/train_bits"]],
    },
    "speed": {"codes per second": ["Multiline", ["throughput/codes_per_second"]]},
}
"""Of the page Custom Scalars: charts of all runs; the first category is open."""


def tensorboard_page(port: int = 6006) -> str:
    """Address of TensorBoard's page with the validation NLL of all runs pinned on top, not smoothed."""
    cards = json.dumps([{"plugin": "scalars", "tag": "nll/valid_nats"}], separators=(",", ":"))
    return f"http://localhost:{port}/?pinnedCards={urllib.parse.quote(cards, safe='')}&smoothing=0#timeseries"


class MetricsWriter:
    """Writes a run's curves, sounds and figures; does nothing on other ranks than 0.

    Args:
        run_dir: where events.* and metrics.jsonl are.
        step: steps completed; whatever was logged after them no longer counts.
        enabled: False: every method does nothing.
        second: gets the scalars, sounds and figures too.
    Attributes:
        had_events: there were event files; if not, they hold neither texts nor hyperparameters yet.
    Raises:
        UserError: metrics.jsonl is damaged.
        OSError: the disk is full; as in every method.
    """

    def __init__(
        self, run_dir: Path, *, step: int = 0, enabled: bool = True, second: WandbLogger | None = None
    ) -> None:
        self._writer: SummaryWriter | None = None
        self._second = second
        self.had_events = any(run_dir.glob("events.out.tfevents.*"))
        if not enabled:
            return
        kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
        write_metrics(run_dir, kept)
        _cut_events(run_dir, step)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_no_second_report())
            self._lines = stack.enter_context((run_dir / "metrics.jsonl").open("ab", buffering=0))  # see `scalars`
            self._writer = stack.enter_context(SummaryWriter(str(run_dir), purge_step=step + 1))
            if not self.had_events:
                _add_scalars(self._writer, kept)
            self._stack = stack.pop_all()

    def scalars(
        self, values: dict[str, float], *, step: int, wall_seconds: float, audio_seconds: float | None = None
    ) -> None:
        """Log scalars by tag.

        Args:
            audio_seconds: seconds of audio seen; None for a codec without a rate.
        """
        if self._writer is None:
            return
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        line = {"step": step, "wall_seconds": wall_seconds, "audio_seconds": audio_seconds, **values}
        rest = memoryview(_to_json_line(line).encode())  # without a buffer: what a full disk refuses is not kept
        while rest:
            rest = rest[self._lines.write(rest) :]
        if self._second is not None:
            self._second.scalars(values, step=step)

    def audio(self, tag: str, waveform: Float[np.ndarray, " N"], *, step: int, sample_rate_hz: int) -> None:
        """Log a sound in [-1, 1]."""
        if self._writer is not None:
            clipped = np.clip(waveform, -1.0, 1.0)
            self._writer.add_audio(tag, torch.from_numpy(clipped)[None], step, sample_rate=sample_rate_hz)
            if self._second is not None:
                self._second.audio(tag, clipped, step=step, sample_rate_hz=sample_rate_hz)

    def figure(self, tag: str, figure: Figure, *, step: int) -> None:
        """Log a matplotlib figure."""
        if self._writer is not None:
            self._writer.add_figure(tag, figure, step)
            if self._second is not None:
                self._second.figure(tag, figure, step=step)

    def text(self, tag: str, text: str, *, step: int = 0) -> None:
        """Log a text, shown as it is (TensorBoard reads Markdown: indented by four, it is a code block)."""
        if self._writer is not None:
            self._writer.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def layout(self) -> None:
        """Log LAYOUT; TensorBoard joins those of all runs."""
        if self._writer is not None:
            self._writer.add_custom_scalars(LAYOUT)

    def hyperparameters(self, values: dict[str, Any], metric_tags: list[str]) -> None:
        """Log the row of TensorBoard's table of runs: plain values by key, and the tags of the scalars beside them."""
        if self._writer is None:
            return
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()
        }
        for summary in hparams(plain, dict.fromkeys(metric_tags, 0.0)):  # add_hparams would make a run of its own
            self._writer._get_file_writer().add_summary(summary)

    def flush(self) -> None:
        """Bring everything to disk."""
        if self._writer is not None:
            self._writer.flush()
            os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Flush and end."""
        if self._writer is not None:
            self._stack.close()
            if self._second is not None:
                self._second.close()


def _to_json_line(line: dict[str, Any]) -> str:
    """JSON has no NaN; such values (of files of older versions) are left out."""
    finite = {tag: value for tag, value in line.items() if not (isinstance(value, float) and not math.isfinite(value))}
    return json.dumps(finite, allow_nan=False) + "\n"


def _add_scalars(writer: SummaryWriter, lines: list[dict[str, Any]]) -> None:
    """Write the scalars of metrics.jsonl as events, as far before now as they were logged before the last of them."""
    for line in lines:
        seconds_before = lines[-1].get("wall_seconds", 0.0) - line.get("wall_seconds", 0.0)
        for tag, value in line.items():
            if tag not in ("step", "wall_seconds", "audio_seconds") and value is not None:
                writer.add_scalar(tag, value, line["step"], walltime=time.time() - seconds_before)


def _cut_events(run_dir: Path, step: int) -> None:
    """Replace a run's event files by one that holds what was logged up to a step.

    A session's START record ends what was logged before it and at its step or later, as in TensorBoard. So it does no
    harm if the process is killed before the other files are empty. They are not deleted: a TensorBoard that is open
    would wait for them.
    """
    paths = sorted(run_dir.glob("events.out.tfevents.*"))
    kept: list[tuple[int, Path, int, int]] = []  # step, file, first byte, number of bytes
    for path in paths:
        for event, first, size in _read_events(path):
            if event.session_log.status == SessionLog.START:
                kept = [entry for entry in kept if entry[0] < event.step]
            elif event.step <= step:
                kept.append((event.step, path, first, size))
    if not paths:
        return
    former = {path: int(match[1]) for path in paths if (match := re.fullmatch(r".*\.(\d{10})\.kept", path.name))}
    number = max(former.values(), default=0) + 1  # a TensorBoard that is open reads a new name from its beginning
    place = run_dir / f"events.out.tfevents.{number:010d}.kept"  # sorted before those of sessions, which hold a time
    start = io.BytesIO()
    RecordWriter(start).write(Event(session_log=SessionLog(status=SessionLog.START)).SerializeToString())
    write_file(place, itertools.chain([start.getvalue()], _copy_parts(kept)))
    for path in paths:
        path.unlink() if path in former else os.truncate(path, 0)


def _copy_parts(parts: list[tuple[int, Path, int, int]]) -> Iterator[bytes]:
    for path, entries in itertools.groupby(parts, key=lambda part: part[1]):
        with path.open("rb") as handle:
            for _, _, first, size in entries:
                handle.seek(first)
                yield handle.read(size)


def _read_events(path: Path) -> Iterator[tuple[Event, int, int]]:
    """The records of an event file, each with its place and size in bytes, up to one that is cut off or damaged."""
    first = 0
    with path.open("rb") as handle:
        while len(header := handle.read(12)) == 12:  # length, its checksum; then the record and its checksum
            length = int.from_bytes(header[:8], "little")
            record = handle.read(length + 4) if length < 2**31 else b""
            if len(record) < length + 4:
                return
            try:
                event = Event.FromString(record[:-4])
            except DecodeError:
                return
            yield event, first, length + 16
            first += length + 16


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl; a last line that was cut off is left out.

    Raises:
        UserError: a line is no JSON object of numbers with a step.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        values = [json.loads(line) for line in lines if line.endswith("\n")]
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read the metrics.jsonl of {run_dir}: {error}") from error
    for number, line in enumerate(values, 1):
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise UserError(
                f"cannot read the metrics.jsonl of {run_dir}: expected an object with a step in line {number}"
            )
        if wrong := [tag for tag, value in line.items() if not isinstance(value, int | float | None)]:
            raise UserError(f"cannot read the metrics.jsonl of {run_dir}: {wrong[0]} is no number in line {number}")
    return values


def write_metrics(run_dir: Path, lines: list[dict[str, Any]]) -> None:
    """Replace a run's metrics.jsonl by these lines, see `read_metrics`."""
    write_file(run_dir / "metrics.jsonl", "".join(_to_json_line(line) for line in lines).encode())


def memory_use_mib() -> dict[str, float]:
    """Scalars: resident memory of this process and, with CUDA, the most that it has allocated there, in MiB.

    Without procfs (macOS) it is the peak; Windows does not say.
    """
    use = {}
    with contextlib.suppress(ImportError):
        import resource  # missing on Windows

        try:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        except OSError:  # kilobytes, on macOS bytes
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        use["memory_use/process_mib"] = resident / 2**20
    if torch.cuda.is_available():
        use["memory_use/cuda_max_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return use


@contextlib.contextmanager
def _no_second_report() -> Iterator[None]:
    """For the life of a writer: no traceback for an OSError of its thread, which the writer's next call raises."""
    report, others = threading.excepthook, set(threading.enumerate())

    def is_writers(thread: threading.Thread | None) -> bool:
        return type(thread).__module__.startswith("tensorboard.") and thread not in others

    def report_others(arguments: threading.ExceptHookArgs) -> None:
        if not (is_writers(arguments.thread) and isinstance(arguments.exc_value, OSError)):
            report(arguments)

    threading.excepthook = report_others
    is_closed = True
    try:
        yield
    except GeneratorExit:  # nobody has closed the writer: its thread goes on
        is_closed = False
        raise
    finally:
        for thread in filter(is_writers, threading.enumerate() if is_closed else ()):
            thread.join()  # one that has failed may not have reported yet
        threading.excepthook = report
