"""Measures of waveforms against oracles, and the report of a sweep: noise, silence and collapse show up as numbers."""

from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import scipy.linalg
from handmade_runs import Output, Patch, Tool, make_run, noise_corpus, refusal, write_corpus

from ct_audio.common.files import read_json
from ct_audio.data.acoustics import (
    MEL_BANDS,
    MEL_FLOOR,
    find_pitch,
    frechet_distance,
    gaussian_frechet_distance,
    level_dbfs,
    log_mel_frames,
    mel_frame_length,
)
from ct_audio.data.codecs import MuLaw
from ct_audio.sampling.session import Outcome
from ct_audio.sampling.temperature_report import make_reference, markdown_report, measure_row, white_noise

RATE = 8000
CODEC = MuLaw(sample_rate_hz=RATE)


def buzz(seconds: float, pitch_hz: float = 120.0, level: float = -20.0) -> np.ndarray:
    """Harmonics of a pitch that falls with their number, as a voice's do."""
    time = np.arange(round(seconds * RATE)) / RATE
    wave = sum(np.cos(2 * np.pi * pitch_hz * k * time + k) / k for k in range(1, int(3500 / pitch_hz)))
    wave = np.asarray(wave)
    return (wave * 10 ** (level / 20) / np.sqrt(np.mean(wave**2))).astype(np.float32)


def speech_like(seconds: float, seed: int) -> np.ndarray:
    """Buzzes of changing pitch and level with pauses of soft noise between them, in pieces of 0.1 s."""
    numbers = np.random.default_rng(seed)
    pieces = []
    for _ in range(round(seconds / 0.1)):
        piece = numbers.normal(0, 0.001, RATE // 10)
        if numbers.random() < 0.7:
            piece = piece + buzz(0.1, numbers.uniform(90, 140), numbers.uniform(-30, -15))
        pieces.append(piece)
    return np.concatenate(pieces).astype(np.float32)


def random_gaussian(seed: int, rank: int, dimensions: int = 6) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(seed)
    factor = numbers.normal(size=(dimensions, rank))
    return numbers.normal(size=dimensions), factor @ factor.T


@pytest.mark.parametrize("ranks", [(6, 6), (6, 3), (3, 4)])
def test_frechet_distance_equals_the_formula(ranks: tuple[int, int]) -> None:
    """With scipy's root; where a covariance is singular there is none, but the eigenvalues of the product are sound."""
    for seed in range(10):
        first, second = random_gaussian(2 * seed, ranks[0]), random_gaussian(2 * seed + 1, ranks[1])
        product = first[1] @ second[1]
        if ranks == (6, 6):
            root_trace = np.trace(np.asarray(scipy.linalg.sqrtm(product))).real
        else:
            root_trace = np.sqrt(np.linalg.eigvals(product).real.clip(min=0)).sum()
        expected = np.sum((first[0] - second[0]) ** 2) + np.trace(first[1] + second[1]) - 2 * root_trace
        assert gaussian_frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
        assert gaussian_frechet_distance(second, first) == pytest.approx(expected, rel=1e-6)
        assert gaussian_frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_frames() -> None:
    """Two sets whose moments are known: it is (difference of means)^2 + (difference of deviations)^2 in each band."""
    signs = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * np.sqrt(3 / 4)  # unit unbiased covariance
    first, second = signs * [1.0, 5.0] + [0.0, 2.0], signs * [4.0, 5.0] + [7.0, 2.0]
    assert frechet_distance(first, second) == pytest.approx(7**2 + 3**2)


def test_log_mel_frames_equal_a_loop_over_frames() -> None:
    waveform = speech_like(0.3, 0)
    length = mel_frame_length(RATE)
    assert (length, mel_frame_length(24_000)) == (256, 1024)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    bands = librosa.filters.mel(sr=RATE, n_fft=length, n_mels=MEL_BANDS, norm=None, dtype=np.float64)
    frames = []
    for begin in range(0, len(waveform) - length + 1, length // 4):
        spectrum = np.fft.rfft(window * waveform[begin : begin + length]) / np.sqrt(np.sum(window**2))
        frames.append(np.log(np.maximum(bands @ np.abs(spectrum) ** 2, MEL_FLOOR)))
    np.testing.assert_allclose(log_mel_frames(waveform, RATE), frames, rtol=0, atol=1e-4)
    assert log_mel_frames(waveform[: length - 1], RATE).shape == (0, MEL_BANDS)


@pytest.mark.parametrize("pitch_hz", [75.0, 120.0, 310.0])
def test_the_pitch_of_a_known_tone(pitch_hz: float) -> None:
    found = find_pitch(buzz(0.4, pitch_hz) + np.float32(0.1), RATE)
    assert np.isfinite(found[2:-2]).all()
    assert np.nanmedian(found) == pytest.approx(pitch_hz, rel=0.01)


def test_what_has_no_pitch_is_not_voiced() -> None:
    assert np.isnan(find_pitch(np.zeros(4000, np.float32), RATE)).all()
    for code in (127, 128, 200):
        assert np.isnan(find_pitch(CODEC.decode(np.full(4000, code)), RATE)).all()
    assert np.isfinite(find_pitch(white_noise([4000], -20.0)[0], RATE)).mean() < 0.1


def test_level_is_in_decibels_of_full_scale() -> None:
    assert level_dbfs(np.ones(10, np.float32)) == 0
    assert level_dbfs(np.full(10, 0.1)) == pytest.approx(-20)
    assert level_dbfs(np.zeros(10)) == -120
    assert level_dbfs(white_noise([100_000], -30.0)[0]) == pytest.approx(-30, abs=0.1)


def test_stretches_and_the_rest_are_the_split_without_overlap() -> None:
    codes = np.arange(4000) % 251
    reference = make_reference(codes, CODEC, num_stretches=3, length=600)
    assert [stretch[0] for stretch in reference.stretches] == [codes[366], codes[1700], codes[3033]]
    assert [len(stretch) for stretch in reference.stretches] == [600] * 3
    assert reference.seconds == (4000 - 3 * 600) / RATE
    short = make_reference(codes, CODEC, num_stretches=2, length=3000)
    assert [len(stretch) for stretch in short.stretches] == [1000, 1000]
    assert short.seconds == 2000 / RATE


def test_noise_silence_and_collapse_show_up_as_numbers() -> None:
    codes = CODEC.encode(speech_like(8.0, 0))
    reference = make_reference(codes, CODEC, num_stretches=1, length=RATE)

    def row(waveform: np.ndarray) -> dict[str, Any]:
        waveform = CODEC.decode(CODEC.encode(waveform))
        return measure_row([waveform], reference, nll_nats=1.0, sample_rate_hz=RATE)

    speech, other = row(CODEC.decode(reference.stretches[0])), row(speech_like(1.0, 7))
    noise, silence = row(white_noise([RATE], speech["rms_dbfs"])[0]), row(np.zeros(RATE, np.float32))
    collapse = row(buzz(1.0, 200.0))
    assert 0.4 < speech["voiced_share"] < 1
    assert 80 < speech["pitch_low_hz"] < speech["pitch_high_hz"] < 150
    assert (noise["voiced_share"], noise["pitch_low_hz"]) == (pytest.approx(0, abs=0.1), noise["pitch_high_hz"])
    assert (silence["voiced_share"], silence["pitch_low_hz"], silence["pitch_high_hz"]) == (0, None, None)
    assert silence["rms_dbfs"] < -80 < -30 < speech["rms_dbfs"]
    assert collapse["voiced_share"] > 0.9
    assert collapse["pitch_high_hz"] - collapse["pitch_low_hz"] < 5
    own = max(speech["frechet_distance"], other["frechet_distance"])
    for broken in (noise, silence, collapse):
        assert broken["frechet_distance"] > 3 * own
    about = {"name": "x", "seed": 0, "num_lanes": 1, "checkpoint": "best", "reference_seconds": reference.seconds}
    text = markdown_report(about, [{"row": "0.7"} | speech, {"row": "silence"} | silence])
    assert "| silence | 1.000 | -8" in text
    assert " | 0.00 | - | - | " in text


@pytest.mark.slow
def test_a_sweep_writes_sets_and_a_report(tmp_path: Path, sample: Tool, capsys: Output) -> None:
    documents = [(split, speech_like(0.5, seed)) for seed, split in enumerate(("train", "valid"))]
    run, out = make_run(write_corpus(tmp_path / "corpus", CODEC, documents), tmp_path), tmp_path / "out"
    arguments = (run, "--num", 1, "--out", out, "--threads", 1, "--temperatures")
    error = refusal(capsys, sample, *arguments, "0.5,1", "--seconds", 0.05)
    assert "expected at least 0.064 --seconds, got 0.05" in error
    assert sample(*arguments, "0.5,1", "--seconds", 0.07) in (0, 4)
    printed = capsys.readouterr().out
    table = (out / "temperatures.md").read_text()
    assert printed.endswith(table)
    report = read_json(out / "temperatures.json")
    assert [row["row"] for row in report["rows"]] == ["0.5", "1", "validation", "white noise"]
    assert report["split_sha256"]
    for row in report["rows"]:
        assert f"| {row['row']} | {row['nll_nats']:.3f} | {row['rms_dbfs']:.1f} | " in table
    for row in report["rows"][:2]:
        sidecar = read_json(out / f"temperature_{row['row']}" / "sample_0.json")
        assert sidecar["temperature"] == row["temperature"] == float(row["row"])
        assert sidecar["nll_nats"] == pytest.approx(row["nll_nats"])
        assert sidecar["rms_dbfs"] == pytest.approx(row["rms_dbfs"])
    assert report["rows"][0]["nll_nats"] < report["rows"][1]["nll_nats"]  # colder is more probable
    assert (out / "temperatures.png").read_bytes().startswith(b"\x89PNG")


def test_temperatures_that_are_nearly_equal_have_folders_of_their_own(
    tmp_path: Path, sample: Tool, monkeypatch: Patch
) -> None:
    opened: list[Any] = []

    def remember(sets: list[Any], **_: Any) -> Outcome:
        opened.extend(sets)
        return Outcome(0, True, False)

    monkeypatch.setattr("ct_audio.sampling.session.sample_sets", remember)
    run = make_run(noise_corpus(tmp_path / "corpus"), tmp_path)
    temperatures = "0.8,0.80000001,1,1e-7,1.0000000001e-7"
    assert sample(run, "--temperatures", temperatures, "--out", tmp_path / "out") == 0
    names = ["0.8", "0.80000001", "1", "1e-07", "1.0000000001e-07"]
    assert [one.directory.name for one in opened] == [f"temperature_{name}" for name in names]
    assert [one.request.temperature for one in opened] == [float(name) for name in names]


@pytest.mark.parametrize("temperatures", ["0.5,x", "1,1.0", "-1,1"])
def test_temperatures_that_are_none(temperatures: str, tmp_path: Path, sample: Tool, capsys: Output) -> None:
    run = make_run(write_corpus(tmp_path / "corpus", CODEC, [("train", speech_like(0.1, 0))]), tmp_path)
    error = refusal(capsys, sample, run, f"--temperatures={temperatures}", "--out", tmp_path / "out")
    assert "temperature" in error
    assert not list(tmp_path.glob("out/*"))
