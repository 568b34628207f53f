"""Event files and metrics.jsonl: what is written, and what is left after a resume."""

import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import open_browser, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer import event_file_writer

from ct_audio.common.errors import UserError
from ct_audio.common.figures import spectrogram_figure
from ct_audio.runs.metrics import LAYOUT, MetricsWriter, memory_use_mib, read_metrics, tensorboard_page


@pytest.fixture(autouse=True)
def names_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files by name: second, host, process, number; two sessions of a test lie in one second."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


def events(run_dir: Path) -> EventAccumulator:
    """What TensorBoard shows of a run."""
    accumulator = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "audio": 0, "images": 0, "tensors": 0})
    return accumulator.Reload()


def points(run_dir: Path, tag: str) -> list[tuple[int, Any]]:
    """A curve."""
    return [(event.step, pytest.approx(event.value)) for event in events(run_dir).Scalars(tag)]


def write_steps(run_dir: Path, steps: range, **options: Any) -> None:
    """Every step is 10 seconds of audio."""
    writer = MetricsWriter(run_dir, **options)
    for step in steps:
        values = {"nll/train_nats": step / 2, "optim/learning_rate": 0.1}
        writer.scalars(values, step=step, wall_seconds=step * 1.5, audio_seconds=10.0 * step)
    writer.close()


def test_scalars_over_steps_and_as_lines(tmp_path: Path):
    write_steps(tmp_path, range(1, 4))
    assert points(tmp_path, "nll/train_nats") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert set(events(tmp_path).Tags()["scalars"]) == {"nll/train_nats", "optim/learning_rate"}
    assert read_metrics(tmp_path)[1] == {
        "step": 2,
        "wall_seconds": 3.0,
        "audio_seconds": 20.0,
        "nll/train_nats": 1.0,
        "optim/learning_rate": 0.1,
    }


def test_resume_cuts_both_at_the_step_of_the_checkpoint(tmp_path: Path):
    write_steps(tmp_path, range(1, 9))
    write_steps(tmp_path, range(5, 7), step=4)
    steps = [(step, step / 2) for step in range(1, 7)]
    assert points(tmp_path, "nll/train_nats") == steps
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_events_that_are_missing_are_written_from_the_lines(tmp_path: Path):
    """As in a branch, or where someone has deleted them; as far apart in time as the lines are."""
    write_steps(tmp_path, range(1, 4))
    for path in tmp_path.glob("events.*"):
        path.unlink()
    writer = MetricsWriter(tmp_path, step=2)
    assert not writer.had_events
    writer.scalars({"nll/train_nats": 9.0}, step=3, wall_seconds=4.5)
    writer.close()
    assert points(tmp_path, "nll/train_nats") == [(1, 0.5), (2, 1.0), (3, 9.0)]
    first, second, _ = events(tmp_path).Scalars("nll/train_nats")
    assert second.wall_time - first.wall_time == pytest.approx(1.5, abs=0.5)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_writer_that_nobody_closed_or_that_never_began_does_not_wait_for_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As after an error between its making and its close: that error is what one has to see."""
    hook = threading.excepthook
    writer = MetricsWriter(tmp_path)
    del writer
    gc.collect()
    assert threading.excepthook is hook
    for path in tmp_path.glob("events.*"):
        path.unlink()
    monkeypatch.setattr("ct_audio.runs.metrics._add_scalars", interrupt)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path)
    assert threading.excepthook is hook


def steps_of_all_files(run_dir: Path, tag: str) -> list[int]:
    """As a loader sees them that knows nothing of sessions: file after file, record after record."""
    found = []
    for path in sorted(run_dir.glob("events.*")):
        for event in EventFileLoader(str(path)).Load():
            found += [event.step for value in event.summary.value if value.tag == tag]
    return found


@pytest.mark.parametrize("killed", ["", "in the middle of the cut", "before the files were emptied"])
def test_what_was_logged_after_the_checkpoint_is_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str
):
    """TensorBoard's fast loader shows the last step of each tag, whatever a session's first record says."""
    write_steps(tmp_path, range(1, 9))
    write_steps(tmp_path, range(5, 54), step=4)
    if killed:
        place = "ct_audio.runs.metrics._copy_parts" if "middle" in killed else "os.truncate"
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            with pytest.raises(KeyboardInterrupt):
                MetricsWriter(tmp_path, step=40)
    write_steps(tmp_path, range(41, 43), step=40)
    assert steps_of_all_files(tmp_path, "nll/train_nats") == list(range(1, 43))
    assert points(tmp_path, "nll/train_nats") == [(step, step / 2) for step in range(1, 43)]
    write_steps(tmp_path, range(42, 44), step=41)
    assert steps_of_all_files(tmp_path, "nll/train_nats") == list(range(1, 44))
    assert len(list(tmp_path.glob("*.kept"))) == 1


def shown(url: str, tag: str) -> list[int]:
    """Steps of a curve as TensorBoard's page gets them; empty while it has not read any."""
    query = urllib.parse.urlencode({"run": ".", "tag": tag})
    try:
        with urllib.request.urlopen(f"{url}data/plugin/scalars/scalars?{query}", timeout=10) as answer:
            return [step for _, step, _ in json.load(answer)]
    except urllib.error.HTTPError:
        return []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("loader", ["true", "false"])
def test_an_open_tensorboard_shows_a_resumed_run_right(tmp_path: Path, loader: str):
    """With its fast loader (a program of its own) and with the other; the second tag is not logged again at once."""

    def session(step: int, stop: int) -> dict[str, list[int]]:
        writer = MetricsWriter(tmp_path, step=step)
        for now in range(step + 10, stop + 10, 10):
            writer.scalars({"train": 1.0} | ({"valid": 1.0} if now % 100 == 0 else {}), step=now, wall_seconds=1.0)
        writer.close()
        return {"train": list(range(10, stop + 10, 10)), "valid": list(range(100, stop + 10, 100))}

    expected = session(0, 530)
    command = ["-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", "0", "--reload_interval", "1"]
    process = subprocess.Popen(
        [sys.executable, *command, f"--load_fast={loader}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        url = next(match[0] for line in process.stdout if (match := re.search(r"http://\S+/", line)))
        for step, stop in ((400, 440), (400, 410), (400, 700)):
            for tag, steps in expected.items():
                until = time.monotonic() + 40
                while shown(url, tag) != steps and time.monotonic() < until:
                    time.sleep(0.5)
                assert shown(url, tag) == steps
            expected = session(step, stop)
    finally:
        process.terminate()
        process.communicate(timeout=30)


def interrupt(*_arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", [b"", b"\xff" * 40, bytes(40)])
def test_a_damaged_event_file_counts_up_to_the_damage(tmp_path: Path, damage: bytes):
    write_steps(tmp_path, range(1, 9))
    [path] = tmp_path.glob("events.*")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + damage)
    write_steps(tmp_path, range(9, 11), step=8)
    steps = steps_of_all_files(tmp_path, "nll/train_nats")
    assert 2 < len(steps) < 10
    assert steps == [*range(1, len(steps) - 1), 9, 10]


def test_sounds_and_pictures_are_still_there_after_a_resume(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    waveform = 0.5 * np.sin(0.2 * np.arange(3000)).astype(np.float32)
    for step in (5, 10):
        writer.audio("sample/0", waveform, step=step, sample_rate_hz=24_000)
        writer.figure("sample_spectrogram/0", spectrogram_figure(waveform, 24_000), step=step)
    writer.text("config", "a: 1")
    writer.hyperparameters({"model.width": 4}, ["nll/valid_nats"])
    writer.close()
    before = events(tmp_path).Audio("sample/0")[0]
    write_steps(tmp_path, range(6, 8), step=5)
    found = events(tmp_path)
    assert found.Audio("sample/0") == [before]
    assert [image.step for image in found.Images("sample_spectrogram/0")] == [5]
    assert "_hparams_/experiment" in found.summary_metadata
    assert found.Tensors("config/text_summary")


def test_no_nan_is_written_nor_kept(tmp_path: Path):
    """metrics.jsonl of an older version may hold one; it is no JSON."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "nll/train_nats": NaN, "x": 2.0}\n')
    write_steps(tmp_path, range(2, 3), step=1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "x": 2.0}
    assert "NaN" not in "".join(lines)


def test_what_a_kill_has_cut_off_is_dropped(tmp_path: Path):
    write_steps(tmp_path, range(1, 5))
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 2, "wall')
    [path] = tmp_path.glob("events.*")
    path.write_bytes(path.read_bytes()[:-5])
    assert len(read_metrics(tmp_path)) == 4
    write_steps(tmp_path, range(4, 6), step=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert points(tmp_path, "nll/train_nats") == [(step, step / 2) for step in range(1, 6)]


def test_sound_figure_text_and_hyperparameters_stay_in_one_run(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    waveform = 0.5 * np.sin(0.2 * np.arange(3000)).astype(np.float32)
    writer.audio("sample/0", waveform, step=5, sample_rate_hz=24_000)
    writer.figure("sample_spectrogram/0", spectrogram_figure(waveform, 24_000), step=5)
    writer.text("config", "a: 1\nb: 2")
    writer.hyperparameters({"model.width": 4, "optim.update_period": {0: 1}}, ["nll/valid_nats"])
    writer.flush()
    writer.close()
    found = events(tmp_path)
    [sound] = found.Audio("sample/0")
    assert (sound.step, sound.sample_rate, sound.encoded_audio_string[:4]) == (5, 24_000, b"RIFF")
    assert found.Images("sample_spectrogram/0")[0].width > 100
    assert b"    a: 1\n    b: 2" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= found.summary_metadata.keys()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_other_ranks_write_nothing(tmp_path: Path):
    write_steps(tmp_path / "run", range(1, 4), enabled=False)
    assert not (tmp_path / "run").exists()


def test_text_has_no_seconds_of_audio(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    writer.scalars({"nll/train_nats": 1.0}, step=1, wall_seconds=1.0)
    writer.close()
    assert events(tmp_path).Tags()["scalars"] == ["nll/train_nats"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["audio_seconds"] is None


def test_spectrogram_peaks_at_the_tone_even_of_a_short_sound():
    tone = np.sin(2 * np.pi * 3000 * np.arange(12_000) / 24_000).astype(np.float32)
    [image] = spectrogram_figure(tone, 24_000).axes[1].images
    column = np.asarray(image.get_array())[:, 20]
    assert column.argmax() == 3000 * 256 // 24_000
    assert column.max() == pytest.approx(0.0, abs=0.1)
    assert spectrogram_figure(tone[:10], 24_000).axes[1].images


def test_memory_use_is_plausible():
    assert 50 < memory_use_mib()["memory_use/process_mib"] < 100_000


@pytest.mark.parametrize("line", ["no JSON", "3", "{}", '{"step": "1"}', '{"step": 2, "x": []}', "[" * 100_000])
def test_damaged_lines_are_named(tmp_path: Path, line: str):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"cannot read the metrics\.jsonl of "):
        MetricsWriter(tmp_path)


def broken_write(_: Any, data: bytes) -> None:
    raise OSError(28, os.strerror(28))


def other_thread_fails() -> None:
    thread = threading.Thread(target=broken_write, args=(None, b""))
    thread.start()
    thread.join()


@pytest.mark.parametrize("begins_full", [True, False])
def test_a_full_disk_is_reported_once_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begins_full: bool
):
    """The traceback of TensorBoard's thread is left out, and no other's; the hook lives as long as the writer."""
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    hook = threading.excepthook
    write = "tensorboard.summary.writer.record_writer.RecordWriter.write"
    with pytest.raises(OSError, match="No space left on device"):  # noqa: PT012
        if begins_full:
            monkeypatch.setattr(write, broken_write)
        writer = MetricsWriter(tmp_path)
        other_thread_fails()
        assert len(reported) == 1
        try:
            monkeypatch.setattr(write, broken_write)
            writer.scalars({"nll/train_nats": 1.0}, step=1, wall_seconds=1.0)
            writer.flush()
        finally:
            writer.close()
    assert threading.excepthook is hook
    assert len(reported) == (0 if begins_full else 1)


def test_the_layout_is_one_chart_of_all_runs(tmp_path: Path):
    write_steps(tmp_path, range(1, 3))
    writer = MetricsWriter(tmp_path, step=2)
    writer.layout()
    writer.close()
    found = events(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = Layout.FromString(found)
    assert [category.title for category in layout.category] == list(LAYOUT)
    first = layout.category[0].chart[0]
    assert list(first.multiline.tag) == ["nll/valid_nats", "nll/train_nats"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_in_a_browser_the_printed_address_pins_the_validation_nll_without_smoothing(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        writer = MetricsWriter(tmp_path / name)
        writer.layout()
        for step in range(1, 9):
            values = {"nll/train_nats": 3.0 / step, "nll/valid_nats": 3.1 / step, "nll/train_bits": 4.0}
            writer.scalars(values, step=step, wall_seconds=1.0)
        writer.close()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", "0"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server,
        open_browser() as browser,
    ):
        try:
            assert server.stdout is not None
            url = next(match[0] for line in server.stdout if (match := re.search(r"http://\S+/", line)))
            wait_for(lambda: shown_runs(url) == ["a", "b"], "runs", seconds=120)
            browser.open(tensorboard_page(int(url.rstrip("/").rpartition(":")[2])))
            cards = "[...document.querySelectorAll('metrics-pinned-view card-view')].map((each) => each.innerText)"
            (card,) = browser.wait(f"{cards}.length && {cards}.some((each) => each.includes('valid_nats')) && {cards}")
            assert card.replace("\n", "").startswith("nll/valid_nats")
            assert browser.script("return document.querySelector('.slider-input').value") == "0"
            with urllib.request.urlopen(f"{url}data/plugin/custom_scalars/layout", timeout=30) as answer:
                categories = json.load(answer)["category"]
            assert [len(each["chart"]) for each in categories] == [len(charts) for charts in LAYOUT.values()]
        finally:
            server.terminate()


def shown_runs(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}data/runs", timeout=30) as answer:
        return sorted(json.load(answer))
