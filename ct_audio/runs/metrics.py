"""What a run reports: TensorBoard events and metrics.jsonl. The only importer of TensorBoard's writer.

All models log the same tags. metrics.jsonl holds every scalar, one object a line: step, wall_seconds since the run
began (over all sessions), seconds of audio seen, and the scalars by tag. On resume both are cut at the checkpoint's
step.

Shape letters: N samples.
"""

import json
import os
import resource
import sys
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ct_audio.common.files import write_file

_BY_AUDIO = "_by_audio/"


class MetricsWriter:
    """Writes a run's curves, sounds and figures; does nothing on other ranks than 0.

    Args:
        run_dir: where events.* and metrics.jsonl are.
        step: steps completed; whatever was logged after them is deleted.
        audio_seconds: seconds of audio seen in these steps.
        enabled: False: every method does nothing.
    """

    def __init__(self, run_dir: Path, *, step: int = 0, audio_seconds: float = 0.0, enabled: bool = True) -> None:
        self._writer: SummaryWriter | None = None
        if not enabled:
            return
        _cut_lines(run_dir / "metrics.jsonl", step)
        for path in run_dir.glob("events.out.tfevents.*.tmp"):  # of a process that was killed while it cut
            path.unlink()
        for path in sorted(run_dir.glob("events.out.tfevents.*")):
            _cut_events(path, step=step, audio_seconds=int(audio_seconds))
        self._lines = (run_dir / "metrics.jsonl").open("ab", buffering=0)  # what a full disk refused is not kept back
        self._writer = SummaryWriter(str(run_dir))

    def scalars(
        self, values: dict[str, float], *, step: int, wall_seconds: float, audio_seconds: float | None = None
    ) -> None:
        """Log scalars by tag over steps; those of `nll/` also as `nll_by_audio/` over whole seconds of audio seen.

        Args:
            audio_seconds: seconds of audio seen; None for a codec without a rate.
        """
        if self._writer is None:
            return
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
            if audio_seconds is not None and tag.startswith("nll/"):
                self._writer.add_scalar(tag.replace("/", _BY_AUDIO, 1), value, int(audio_seconds))
        line = {"step": step, "wall_seconds": wall_seconds, "audio_seconds": audio_seconds, **values}
        rest = memoryview(f"{json.dumps(line)}\n".encode())
        while rest:
            rest = rest[self._lines.write(rest) :]

    def audio(self, tag: str, waveform: Float[np.ndarray, "N"], *, step: int, sample_rate_hz: int) -> None:
        """Log a sound in [-1, 1]."""
        if self._writer is not None:
            clipped = np.clip(waveform, -1.0, 1.0)
            self._writer.add_audio(tag, torch.from_numpy(clipped)[None], step, sample_rate=sample_rate_hz)

    def figure(self, tag: str, figure: Figure, *, step: int) -> None:
        """Log a matplotlib figure."""
        if self._writer is not None:
            self._writer.add_figure(tag, figure, step)

    def text(self, tag: str, text: str, *, step: int = 0) -> None:
        """Log a text, shown as it is (TensorBoard reads Markdown: indented by four, it is a code block)."""
        if self._writer is not None:
            self._writer.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)

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
            try:
                self._writer.close()
            finally:
                self._lines.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl; a last line that was cut off is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a run's event files: by tag the points (step, value).

    The tags `nll_by_audio/...` have whole seconds of audio seen in place of the step.
    """
    kept = {"scalars": 0, "images": 1, "audio": 1, "tensors": 1}  # 0: all
    events = EventAccumulator(str(run_dir), size_guidance=kept).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def memory_use_mib() -> dict[str, float]:
    """Scalars: resident memory of this process and, with CUDA, the most that it has allocated there, in MiB."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident = pages * resource.getpagesize()
    except OSError:  # no procfs: the peak instead (kilobytes on Linux, bytes on macOS)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    use = {"memory_use/process_mib": resident / 2**20}
    if torch.cuda.is_available():
        use["memory_use/cuda_max_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return use


def _cut_lines(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _cut_events(path: Path, *, step: int, audio_seconds: int) -> None:
    """Drop from an event file what was logged later, and a record that was cut off.

    TensorBoard's own purge goes by one step for all tags, which those over audio seen would not survive.
    """
    kept = BytesIO()
    writer = RecordWriter(kept)
    for record in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(record)
        by_audio = any(_BY_AUDIO in value.tag for value in event.summary.value)
        if event.step <= (audio_seconds if by_audio else step):
            writer.write(record)
    write_file(path, kept.getvalue())


def _no_second_report(arguments: threading.ExceptHookArgs, before: Any = threading.excepthook) -> None:
    """An OSError of TensorBoard's thread (a full disk) is raised by its writer's next call: no traceback as well."""
    if not (isinstance(arguments.exc_value, OSError) and type(arguments.thread).__name__ == "_AsyncWriterThread"):
        before(arguments)


threading.excepthook = _no_second_report
