"""Recordings of phones and browsers through PyAV: what is read, what is refused, and the error where it is missing."""

import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from handmade_runs import tool
from recordings import ROOT
from scipy.signal import correlate

from ct_audio.common.errors import UserError
from ct_audio.data import av_files
from ct_audio.data.audio_files import CheckedRecording, read_blocks, read_wav
from ct_audio.data.corpus import open_corpus

RATE = 48_000
KINDS = {
    "m4a": ("ipod", "aac"),
    "mp4": ("mp4", "aac"),
    "3gp": ("3gp", "aac"),
    "aac": ("adts", "aac"),
    "webm": ("webm", "libopus"),
    "mka": ("matroska", "libopus"),
    "mov": ("mov", "alac"),
    "wma": ("asf", "wmav2"),
    "mp2": ("mp2", "mp2"),
    "ac3": ("ac3", "ac3"),
    "eac3": ("eac3", "eac3"),
    "wv": ("wv", "wavpack"),
    "tta": ("tta", "tta"),
}
"""Formats and encoders; PyAV has none for amr, awb and ape, which are therefore not tested."""
every_kind = pytest.mark.parametrize("suffix", KINDS)


def chirp(seconds: float, num_channels: int = 1) -> np.ndarray:
    """[N, C] float32: a tone that rises, so that no other place of it is alike; the second channel is quieter."""
    time = np.arange(int(seconds * RATE)) / RATE
    tone = 0.3 * np.sin(2 * np.pi * (200 * time + 150 * time**2))
    return np.stack([tone / (channel + 1) for channel in range(num_channels)], axis=1).astype(np.float32)


def record(path: Path, waveform: np.ndarray, *, options: dict[str, str] | None = None) -> Path:
    """Write an audio file as a phone would, by PyAV's encoders."""
    container_format, codec = KINDS[path.suffix[1:]]
    layout = {1: "mono", 2: "stereo"}[waveform.shape[1]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container_format, options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=RATE, layout=layout, options={"b": "96000"})
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform.T), format="fltp", layout=layout)
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of what both have."""
    length = min(len(first), len(second))
    return float(np.corrcoef(first[:length], second[:length])[0, 1])


@every_kind
@pytest.mark.parametrize("num_channels", [1, 2])
def test_what_was_recorded_is_read(suffix: str, num_channels: int, tmp_path: Path) -> None:
    waveform = chirp(1.5, num_channels)
    found, rate = read_wav(record(tmp_path / f"a.{suffix}", waveform))
    assert rate == RATE
    assert found.dtype == np.float32
    assert abs(len(found) - len(waveform)) <= 4096  # frames of an encoder, and its delay: these files do not tell it
    original = waveform.mean(axis=1)
    delay = int(correlate(found, original[4096:20_000], "valid").argmax()) - 4096
    assert (-2048 if suffix == "wma" else 0) <= delay <= 4096  # FFmpeg's decoder gives nothing for a first frame of wma
    assert similarity(found[max(delay, 0) :], original[max(-delay, 0) :]) > 0.98


@every_kind
def test_blocks_are_short_and_the_last_one_is_empty(suffix: str, tmp_path: Path) -> None:
    path = record(tmp_path / f"a.{suffix}", chirp(4.0))
    lengths = [len(block) for block, _ in read_blocks(path)]
    assert lengths[-1] == 0
    assert len(lengths) > 4
    assert max(lengths) <= 2 * 32_768
    assert sum(lengths) == len(read_wav(path)[0])


def test_it_is_resampled_and_checked_like_any_recording(tmp_path: Path) -> None:
    recording = CheckedRecording(record(tmp_path / "a.m4a", chirp(1.0)), 24_000)
    assert sum(map(len, recording.blocks())) == pytest.approx(24_000, abs=600)
    assert recording.source_rate_hz == RATE
    with pytest.raises(UserError, match="silent"):
        list(CheckedRecording(record(tmp_path / "b.m4a", np.zeros((RATE, 1), np.float32)), 24_000).blocks())


@pytest.mark.parametrize("suffix", ["m4a", "webm"])
def test_damage_is_an_error(suffix: str, tmp_path: Path) -> None:
    options = {"movflags": "faststart"} if suffix == "m4a" else None
    whole = record(tmp_path / f"a.{suffix}", chirp(6.0), options=options).read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read .*cut.*(truncated: 6.0. s promised, |damaged)"):
        read_wav(cut)
    for content in (b"", b"\0" * 5000, b"no audio at all" * 100, whole[:40]):
        cut.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*cut"):
            read_wav(cut)


def test_a_film_without_sound_is_an_error_and_one_with_sound_is_not(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    with pytest.raises(UserError, match="there is no audio in it"):
        read_wav(path)


def test_without_pyav_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = record(tmp_path / "a.m4a", chirp(0.5))
    monkeypatch.setattr(av_files, "has_av", lambda: False)
    with pytest.raises(UserError, match=r"m4a is read by PyAV, which is not installed; run: python -m pip install av"):
        read_wav(path)


def test_a_flat_folder_of_a_phone_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for number in range(8):
        suffix = list(KINDS)[number % len(KINDS)]
        record(tmp_path / "in" / f"Recording {number}.{suffix}", chirp(0.5 + 0.1 * number))
    words = ["folder", "--source", tmp_path / "in", "--out", tmp_path / "out", "--num-processes", 1]
    assert tool("prepare", monkeypatch)(*words) == 0
    assert "dropped: 0 files" in capsys.readouterr().out
    corpus = open_corpus(tmp_path / "out", verify=True)
    assert set(corpus.splits) == {"train", "valid", "test"}
    assert sum(len(split.document_names) for split in corpus.splits.values()) == 8


def test_av_is_loaded_only_where_it_is_needed() -> None:
    import subprocess

    code = "import sys; import ct_audio.preparation.recordings; print('av' in sys.modules, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False False\n"
