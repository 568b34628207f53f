"""Preparation of folders of audio: what comes out, what is dropped, and that an interruption costs nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st
from recordings import ROOT, count_calls, voice, write

from ct_audio.common.errors import UserError
from ct_audio.common.files import hold_alone
from ct_audio.data.audio_files import CheckedRecording, read_wav
from ct_audio.data.codecs import Byte, MuLaw, read_codes
from ct_audio.data.corpus import open_corpus
from ct_audio.preparation import recordings as prepare
from ct_audio.preparation import workers
from ct_audio.preparation.audio_report import summary_lines
from ct_audio.preparation.recordings import (
    AudioSettings,
    Recording,
    prepare_audio,
    prepared_blocks,
    sounding_range,
    split_by_hash,
)


def make_recordings(folder: Path, num: int = 6) -> list[Recording]:
    """Recordings of several formats and rates; every third goes to valid."""
    recordings = []
    for index in range(num):
        rate, suffix = [(24_000, "wav"), (48_000, "flac"), (16_000, "ogg")][index % 3]
        path = folder / f"{index % 2}" / f"{index:03d}.{suffix}"
        waveform = voice(index, 0.3 + 0.05 * index, rate)
        write(path, np.stack([waveform, waveform / 2], 1) if index % 2 else waveform, rate)
        recordings.append(Recording(path, "valid" if index % 3 == 2 else "train", path.relative_to(folder).as_posix()))
    return recordings


def run(recordings, out, settings=None, **options):
    """Prepare with default settings."""
    return prepare_audio(recordings, out, settings=settings or AudioSettings(), source={"recipe": "test"}, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_the_corpus_is_what_a_plain_loop_makes(tmp_path):
    recordings = make_recordings(tmp_path / "in")
    corpus, report = run(recordings, tmp_path / "out", AudioSettings(gain_db=-6.0))
    assert open_corpus(tmp_path / "out", verify=True).fingerprint == corpus.fingerprint
    for split in ("train", "valid"):
        expected, names = [], []
        for recording in sorted(recordings, key=lambda r: r.name):
            if recording.split == split:
                waveform, rate = soundfile.read(recording.path, dtype="float32", always_2d=True)
                mono = waveform.mean(1, dtype=np.float32)
                mono = mono if rate == 24_000 else soxr.resample(mono, rate, 24_000, quality="HQ")
                expected.append(MuLaw().encode(mono * np.float32(10 ** (-6 / 20))))
                names.append(recording.name)
        assert corpus.split(split).document_names == tuple(names)
        assert np.array_equal(corpus.split(split).codes, np.concatenate(expected))
        offsets = np.cumsum([0] + [len(codes) for codes in expected[:-1]])
        assert np.array_equal(corpus.split(split).document_offsets, offsets)
    assert report is not None
    assert report["source_rates_hz"] == {"16000": 2, "24000": 2, "48000": 2}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "out"]


def test_the_report_states_levels_and_counts(tmp_path):
    square = np.tile(np.repeat(np.array([0.5, -0.5], np.float32), 50), 60)
    loud = np.tile(np.repeat(np.array([1.0, -1.0], np.float32), 50), 60)
    write(tmp_path / "a.wav", square, subtype="FLOAT")
    write(tmp_path / "b.wav", loud, subtype="FLOAT")
    names = [Recording(tmp_path / f"{name}.wav", "train", name) for name in "ab"]
    _, report = run(names, tmp_path / "out")
    assert report is not None
    total = report["total"]
    assert total["num_files"] == 2
    assert total["num_codes"] == 12_000
    assert total["peak_dbfs"] == 0.0
    assert total["rms_dbfs"] == pytest.approx(10 * np.log10((1 + 0.25) / 2), abs=0.01)
    assert total["median_rms_dbfs"] == pytest.approx(20 * np.log10(0.75), abs=0.01)
    assert total["clipped_percent"] == 50.0
    assert total["num_files_clipped"] == 1
    assert sum(report["histogram"]) == 12_000
    assert report["histogram"][0] == report["histogram"][255] == 3000
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert "| train | 2 |" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "histogram.png").read_bytes()[:4] == b"\x89PNG"
    example, rate = read_wav(tmp_path / "out" / "example.wav")
    assert rate == 24_000
    assert np.array_equal(MuLaw().encode(example), open_corpus(tmp_path / "out").split("train").codes[:6000])


def test_workers_load_nothing_that_draws():
    code = (
        "import sys, ct_audio.preparation.recordings; print({'matplotlib', 'librosa.core'} & {*sys.modules} or 'none')"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "none\n"


def test_every_reason_to_drop_is_named(tmp_path):
    good = voice(0)
    write(tmp_path / "good.wav", good)
    write(tmp_path / "empty.wav", good[:0])
    write(tmp_path / "silent.wav", np.full(5000, 0.25, np.float32))
    write(tmp_path / "nan.wav", np.where(np.arange(len(good)) == 9, np.nan, good), subtype="FLOAT")
    write(tmp_path / "inf.wav", np.where(np.arange(len(good)) == 9, np.inf, good), subtype="FLOAT")
    write(tmp_path / "short.wav", good[:2000])
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "nothing.wav").write_bytes(b"")
    write(tmp_path / "cut.flac", good)
    raw = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(raw[: len(raw) // 2])
    write(tmp_path / "short_of_promise.wav", good)
    raw = (tmp_path / "short_of_promise.wav").read_bytes()
    (tmp_path / "short_of_promise.wav").write_bytes(raw[: len(raw) // 2])
    recordings = [Recording(file, "train", file.name) for file in tmp_path.iterdir()]
    recordings.append(Recording(tmp_path / "missing.wav", "train", "missing.wav"))
    with pytest.raises(UserError, match=r"10 of 11 files had to be dropped .*--allow-dropped"):
        run(recordings, tmp_path / "out")
    assert "cut.flac: " in (tmp_path / "out.partial" / "dropped.txt").read_text()
    corpus, report = run(recordings, tmp_path / "out", allow_dropped=True)
    assert corpus.split("train").document_names == ("good.wav",)
    assert report is not None
    reasons = {entry["name"]: entry["reason"].partition(":")[0] for entry in report["dropped"]}
    assert reasons == {
        "empty.wav": "empty",
        "silent.wav": "silent",
        "nan.wav": "not finite",
        "inf.wav": "not finite",
        "short.wav": "too short",
        "text.wav": "unreadable",
        "nothing.wav": "unreadable",
        "cut.flac": "unreadable",
        "short_of_promise.wav": "truncated",
        "missing.wav": "unreadable",
    }
    assert all(str(tmp_path) not in entry["reason"] for entry in report["dropped"])


@pytest.mark.parametrize(
    ("fault", "make"),
    [
        ("empty", lambda x: x[:0]),
        ("silent", lambda x: 0 * x + 0.3),
        ("out of range", lambda x: x * 700),
        ("not finite", lambda x: np.where(np.arange(len(x)) == 7000, np.nan, x)),
        ("channels cancel out", lambda x: np.stack([x, 1e-4 * np.sin(np.arange(len(x))) - x], 1)),
        ("offset", lambda x: x + 0.7),
        ("hardly any different codes", lambda x: x / 1000),
    ],
)
@pytest.mark.parametrize("rate", [24_000, 44_100])
def test_primes_scores_and_corpora_have_the_same_checks(tmp_path, fault, make, rate):
    file = tmp_path / "a.wav"
    write(file, voice(1, rate=rate), rate, "FLOAT")
    assert len(read_codes(file, MuLaw())) == 9600
    write(file, make(voice(1, rate=rate)), rate, "FLOAT")
    with pytest.raises(UserError, match=rf"cannot use .*a\.wav: {fault}"):
        read_codes(file, MuLaw())
    with pytest.raises(UserError, match="nothing is left"):
        run([Recording(file, "train", "a")], tmp_path / "out", allow_dropped=True)
    dropped = (tmp_path / "out.partial" / "dropped.txt").read_text()
    assert dropped.startswith(f"a: {fault}: ")
    assert not list((tmp_path / "out.partial" / "files").iterdir())


def test_only_the_first_codes_of_a_prime(tmp_path):
    write(tmp_path / "a.wav", voice(1))
    (tmp_path / "a.txt").write_text("four")
    whole = read_codes(tmp_path / "a.wav", MuLaw())
    assert np.array_equal(read_codes(tmp_path / "a.wav", MuLaw(), num_codes=9600), whole)
    assert np.array_equal(read_codes(tmp_path / "a.wav", MuLaw(), num_codes=1), whole[:1])
    with pytest.raises(UserError, match=r"a\.wav is too short: it holds 9600 samples \(0\.400 s\), 9601"):
        read_codes(tmp_path / "a.wav", MuLaw(), num_codes=9601)
    with pytest.raises(UserError, match=r"a\.txt is too short: it holds 4 bytes, 5 asked for"):
        read_codes(tmp_path / "a.txt", Byte(), num_codes=5)


@pytest.mark.parametrize("trim_db", [None, 30.0])
def test_a_long_recording_needs_the_memory_of_a_short_one(tmp_path, trim_db):
    """Counted in the process: a minute would need 27 MiB in one piece."""
    with soundfile.SoundFile(tmp_path / "a.wav", "w", 44_100, 2, "PCM_16") as file:
        for second in range(60):
            file.write(np.stack([voice(second, 1.0, 44_100)] * 2, 1))
    tracemalloc.start()
    result = prepare.prepare_recording(tmp_path / "a.wav", AudioSettings(trim_db=trim_db), len)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.num_codes > 59 * 24_000
    assert peak < 8 * 2**20


def test_few_dropped_files_are_no_error(tmp_path):
    recordings = [Recording(tmp_path / f"{index}.wav", "train", str(index)) for index in range(20)]
    for index, recording in enumerate(recordings):
        write(recording.path, voice(index, 0.2))
    recordings[0].path.write_bytes(b"")
    _, report = run(recordings, tmp_path / "out")
    assert report is not None
    assert report["num_dropped"] == 1
    assert report["dropped_percent"] == 5.0


def test_nothing_usable_is_an_error_whatever_is_allowed(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(UserError, match="nothing is left"):
        run([Recording(tmp_path / "a.wav", "train", "a")], tmp_path / "out", allow_dropped=True)
    with pytest.raises(UserError, match="found no recordings"):
        run([], tmp_path / "out")
    with pytest.raises(UserError, match="must be unique"):
        run([Recording(tmp_path / "a.wav", split, "a") for split in ("train", "test")], tmp_path / "out")


def test_gain_and_trimming(tmp_path):
    pause = np.full(24_000, 1e-4, np.float32) * np.array([1, -1] * 12_000, np.float32)
    speech = voice(1, 1.0)
    waveform = np.concatenate([pause, speech, pause])

    def prepared(samples: np.ndarray, settings: AudioSettings) -> np.ndarray:
        write(tmp_path / "a.wav", samples, subtype="FLOAT")
        recording = CheckedRecording(tmp_path / "a.wav", settings.sample_rate_hz, gain_db=settings.gain_db)
        return np.concatenate(list(prepared_blocks(recording, settings.trim_db)))

    assert np.array_equal(prepared(waveform, AudioSettings()), waveform)
    trimmed = prepared(waveform, AudioSettings(trim_db=40.0))
    assert np.array_equal(trimmed, librosa.effects.trim(waveform, top_db=40.0)[0])
    assert 24_000 <= len(trimmed) <= 24_000 + 4 * 2048
    assert len(prepared(waveform * np.float32(0.01), AudioSettings(trim_db=40.0))) == len(trimmed)
    assert np.allclose(prepared(waveform, AudioSettings(gain_db=20.0)), 10 * waveform)


@given(st.integers(1, 20_000), st.integers(0, 2**32), st.floats(1, 100), st.lists(st.integers(0, 20_000), max_size=4))
def test_trimming_is_librosas_whatever_the_blocks(num_samples, seed, trim_db, cuts):
    random_numbers = np.random.default_rng(seed)
    place = (np.arange(num_samples) - num_samples * random_numbers.random()) / num_samples
    noise = random_numbers.standard_normal(num_samples) * np.exp(-50 * random_numbers.random() * place**2)
    waveform = (0.3 * noise).astype(np.float32)
    expected = librosa.effects.trim(waveform, top_db=trim_db)[1].tolist()
    assert list(sounding_range(np.split(waveform, sorted(cuts)), trim_db)) == expected


@pytest.mark.parametrize(
    "wrong", [{"gain_db": np.nan}, {"gain_db": 500.0}, {"trim_db": 0.0}, {"trim_db": np.nan}, {"min_seconds": -1.0}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        AudioSettings(**wrong)


def test_the_same_again_is_complete_and_another_needs_overwrite(tmp_path):
    recordings = make_recordings(tmp_path / "in")
    first, _ = run(recordings, tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    again, report = run(recordings[::-1], tmp_path / "out")
    assert report is None
    assert again.fingerprint == first.fingerprint
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match=r"gain_db: 0.0 there, 3.0 asked for.*--overwrite"):
        run(recordings, tmp_path / "out", AudioSettings(gain_db=3.0))
    with pytest.raises(UserError, match="num_files: 6 there, 5 asked for"):
        run(recordings[1:], tmp_path / "out")
    other, _ = run(recordings, tmp_path / "out", AudioSettings(gain_db=3.0), overwrite=True)
    assert other.fingerprint != first.fingerprint
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "out"]


def test_recordings_that_have_changed_at_the_same_size_are_noticed(tmp_path, monkeypatch):
    recordings = make_recordings(tmp_path / "in")
    first, _ = run(recordings, tmp_path / "out")
    path = recordings[0].path
    status = path.stat()
    write(path, voice(0, 0.3) / 2)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    with pytest.raises(UserError, match=r"their bytes have changed \(content_sha256: .* now\); pass --overwrite"):
        run(recordings, tmp_path / "out")
    second, report = run(recordings, tmp_path / "out", overwrite=True)
    assert report is not None
    assert second.fingerprint != first.fingerprint
    assert run(recordings, tmp_path / "out")[1] is None
    worked = count_work(monkeypatch)
    run(recordings, tmp_path / "out", overwrite=True)
    assert len(worked) == len(recordings), "told to, it makes the same corpus again"


def test_a_copy_elsewhere_and_later_is_the_same(tmp_path):
    recordings = make_recordings(tmp_path / "in")
    run(recordings, tmp_path / "out")
    shutil.copytree(tmp_path / "in", tmp_path / "moved", copy_function=shutil.copyfile)
    moved = [replace(r, path=tmp_path / "moved" / r.path.relative_to(tmp_path / "in")) for r in recordings]
    assert run(moved, tmp_path / "out")[1] is None


def test_what_two_splits_have_stays_with_the_held_out_one(tmp_path):
    """Copies byte by byte, and the same samples in another format."""
    waveform, other = np.rint(voice(1) * 32768).astype(np.int16), voice(2)
    files = {
        "a.wav": ("train", waveform),
        "b.flac": ("valid", waveform),
        "c.wav": ("test", waveform),
        "d.wav": ("train", waveform),
        "e.wav": ("train", other),
        "f.wav": ("valid", voice(3)),
        "g.wav": ("train", other),
    }
    recordings = []
    for name, (split, samples) in files.items():
        write(tmp_path / "in" / name, samples, subtype="PCM_16")
        recordings.append(Recording(tmp_path / "in" / name, split, name))
    corpus, report = run(recordings, tmp_path / "out")
    assert {name: corpus.split(name).document_names for name in corpus.splits} == {
        "train": ("e.wav", "g.wav"),  # a copy within a split is the user's own affair
        "valid": ("f.wav",),
        "test": ("c.wav",),
    }
    assert report is not None
    assert report["num_dropped"] == 0
    assert [(entry["name"], entry["reason"]) for entry in report["copies"]] == [
        ("a.wav", "the same audio as c.wav in test"),
        ("d.wav", "the same audio as c.wav in test"),
        ("b.flac", "the same audio as c.wav in test"),
    ]
    assert any("b.flac in valid: the same audio as c.wav in test" in line for line in summary_lines(report))
    assert "- `a.wav`: the same audio as c.wav in test" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(UserError, match=r"nothing is left of split train: 0 recordings .* 2 are copies of recordings"):
        run([recordings[0], recordings[2], recordings[3]], tmp_path / "none")


def test_parts_of_a_recording_have_a_gap_between_them(tmp_path):
    waveform = np.concatenate([voice(seed, 1.0) for seed in range(20)])
    write(tmp_path / "long.wav", waveform, subtype="FLOAT")
    parts = {"train": (0.0, 0.9), "valid": (0.9, 0.95), "test": (0.95, 1.0)}
    recordings = [Recording(tmp_path / "long.wav", split, split, part) for split, part in parts.items()]
    corpus, report = run(recordings, tmp_path / "out")
    codes, n = MuLaw().encode(waveform), len(waveform)
    for split, (begin, end) in {"train": (0, 18.0), "valid": (18.5, 19.0), "test": (19.5, 20.0)}.items():
        assert np.array_equal(corpus.split(split).codes, codes[int(begin * 24_000) : int(end * 24_000)])
    assert report is not None
    assert report["total"]["source_hours"] == pytest.approx(n / 24_000 / 3600, abs=1e-4)
    with pytest.raises(UserError, match=r"had to be dropped \(2 too short\)"):
        run(recordings, tmp_path / "short", AudioSettings(min_seconds=1.0))


def test_names_are_drawn_and_written_as_text(tmp_path):
    names = ["$a_1$b", "a|b", "`c`", "$", "_x_*y*"]
    recordings = [Recording(tmp_path / "in" / f"{n}.wav", "train", name) for n, name in enumerate(names)]
    for index, recording in enumerate(recordings):
        write(recording.path, voice(index))
    recordings[2].path.write_bytes(b"")
    for name in ("$x_{y$", "a$", "$\\frac$|`b`"):
        out = tmp_path / name
        run(recordings, out, allow_dropped=True)
        assert (out / "histogram.png").read_bytes()[:4] == b"\x89PNG"
        assert "- `` `c` ``: unreadable" in (out / "report.md").read_text()
    assert (tmp_path / "a$" / "report.md").read_text().startswith("# Preparation of a\\$\n")


@pytest.mark.parametrize("place", ["TMPDIR", "/dev/shm"])
def test_without_a_place_for_what_joins_processes_one_does_it(tmp_path, monkeypatch, capsys, place):
    def fail(*arguments, **options):
        raise OSError("AF_UNIX path too long" if place == "TMPDIR" else "No space left on device")

    recordings = make_recordings(tmp_path / "in")
    run(recordings, tmp_path / "one" / "out")
    monkeypatch.setattr(workers.ProcessPoolExecutor, "submit" if place == "TMPDIR" else "__init__", fail)
    run(recordings, tmp_path / "out", num_processes=2)
    assert re.fullmatch(rf"warning: no worker processes .*{place}.*\n", capsys.readouterr().err)
    assert contents(tmp_path / "out") == contents(tmp_path / "one" / "out")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_long_tmpdir_is_no_obstacle(tmp_path):
    for index in range(3):
        write(tmp_path / "in" / f"{index}.wav", voice(index))
    (tmp_path / ("t" * 100)).mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / ("t" * 100)), "PYTHONPATH": str(ROOT)}
    line = [*command(tmp_path / "in", tmp_path / "out", "--num-processes", "2")]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "going on with one process; they need TMPDIR" in done.stderr


def test_a_damaged_corpus_is_not_complete(tmp_path):
    recordings = make_recordings(tmp_path / "in")
    run(recordings, tmp_path / "out")
    (tmp_path / "out" / "train.codes").write_bytes(b"")
    with pytest.raises(UserError, match="--overwrite"):
        run(recordings, tmp_path / "out")
    _, report = run(recordings, tmp_path / "out", overwrite=True)
    assert report is not None


def test_what_is_no_corpus_is_never_replaced(tmp_path):
    recordings = make_recordings(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="is no corpus"):
        run(recordings, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "letter.txt").read_text() == "keep me"
    (tmp_path / "out" / "letter.txt").unlink()
    run(recordings, tmp_path / "out")


def count_work(patch, stop_after: int | None = None) -> list[str]:
    """Note which files are worked on, and break off after some of them."""
    return count_calls(patch, prepare, "_encode_file", lambda task: task.recording.path.name, stop_after)


def interrupt(recordings, out):
    """Break off after four files."""
    with pytest.MonkeyPatch.context() as patch:
        count_work(patch, stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            run(recordings, out)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    recordings = make_recordings(tmp_path / "in")
    run(recordings, tmp_path / "whole" / "out")
    interrupt(recordings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    changed, touched = (recording.path for recording in recordings[:2])  # sorted first, so they were done
    os.utime(touched, ns=(1, 1))
    status = changed.stat()
    write(changed, voice(0, 0.3) / 2)  # of the same size and time: it must be done again
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    worked = count_work(monkeypatch)
    run(recordings, tmp_path / "out")
    assert sorted(worked) == sorted([changed.name, "002.ogg", "005.ogg"])
    run(recordings, tmp_path / "whole" / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_other_settings_reuse_nothing(tmp_path, monkeypatch):
    recordings = make_recordings(tmp_path / "in")
    interrupt(recordings, tmp_path / "out")
    worked = count_work(monkeypatch)
    run(recordings, tmp_path / "out", AudioSettings(gain_db=1.0))
    assert len(worked) == 6


def test_damaged_partial_results_are_noticed(tmp_path):
    recordings = make_recordings(tmp_path / "in")
    interrupt(recordings, tmp_path / "out")
    first, second, *_ = sorted((tmp_path / "out.partial" / "files").glob("*.codes"))
    first.write_bytes(bytes(first.stat().st_size))
    second.write_bytes(b"")
    with pytest.raises(UserError, match="run the same command again"):
        run(recordings, tmp_path / "out")
    run(recordings, tmp_path / "out")
    run(recordings, tmp_path / "whole" / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_two_at_once_do_not_mix(tmp_path):
    recordings = make_recordings(tmp_path / "in")
    (tmp_path / "out.partial").mkdir()
    with hold_alone(tmp_path / "out.partial" / "lock", "x"), pytest.raises(UserError, match="another process"):
        run(recordings, tmp_path / "out")
    run(recordings, tmp_path / "out")


def command(source: Path, out: Path, *options: str) -> list[str]:
    """The tool's command line."""
    return [
        *(sys.executable, str(ROOT / "tools" / "prepare.py"), str(ROOT / "recipes" / "folder")),
        *("--source", str(source), "--out", str(out), *options, "--", "--group", "file"),
        *("--valid-percent", "20", "--test-percent", "20"),
    ]


def wait_until(condition, seconds: float = 120.0) -> None:
    """Poll until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def group_is_gone(group: int) -> bool:
    """Whether no process of a process group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.distributed
def test_two_processes_make_the_bytes_of_one(tmp_path):
    recordings = make_recordings(tmp_path / "in")
    recordings[0].path.write_bytes(b"")
    for num_processes in (1, 2):
        run(recordings, tmp_path / f"{num_processes}" / "out", num_processes=num_processes, allow_dropped=True)
    assert contents(tmp_path / "1" / "out") == contents(tmp_path / "2" / "out")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_kill_9_and_two_processes_end_in_the_bytes_of_one(tmp_path):
    for index in range(30):
        write(tmp_path / "in" / f"{index}.flac", np.tile(voice(index, 1.0, 48_000), 10), 48_000)
    out, files = tmp_path / "out", tmp_path / "out.partial" / "files"
    killed = subprocess.Popen(
        command(tmp_path / "in", out, "--num-processes", "2"),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: killed.poll() is not None or len(list(files.glob("*.json"))) >= 5)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_until(lambda: group_is_gone(killed.pid))
    assert not out.exists()
    num_done = len(list(files.glob("*.json")))
    assert 5 <= num_done < 30
    done = subprocess.run(command(tmp_path / "in", out, "--num-processes", "2"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "30 files" in done.stdout
    assert done.stderr == ""
    plain, recipe = vars(open_corpus(out, verify=True)), {"recipe": "folder"}
    source = plain["description"]["source"] | recipe
    recordings = [
        Recording(tmp_path / "in" / name, split.name, name)
        for split in plain["splits"].values()
        for name in split.document_names
    ]
    prepare_audio(recordings, tmp_path / "one" / "out", settings=AudioSettings(), source=source)
    assert contents(tmp_path / "one" / "out") == contents(out)


@given(st.integers())
def test_split_by_hash_follows_its_statement(number):
    group = f"prompt é {number}"
    assert split_by_hash(group, valid_percent=0.0, test_percent=0.0) == "train"
    was = split_by_hash(group, valid_percent=10.0, test_percent=20.0)
    assert split_by_hash(group, valid_percent=10.0, test_percent=20.0) == was
    more = split_by_hash(group, valid_percent=30.0, test_percent=0.0)
    assert (more == "valid") == (was in ("valid", "test"))


def test_split_by_hash_is_stable_and_has_its_shares():
    splits = [split_by_hash(f"prompt {index}", valid_percent=10.0, test_percent=20.0) for index in range(4000)]
    assert splits.count("valid") == pytest.approx(400, abs=80)
    assert splits.count("test") == pytest.approx(800, abs=110)
    # sha256("a") begins ca97...: 79.14%
    assert split_by_hash("a", valid_percent=79.0, test_percent=0.2) == "test"
    assert split_by_hash("a", valid_percent=79.2, test_percent=0.2) == "valid"
    for valid, test in ((-1.0, 5.0), (60.0, 40.0), (float("nan"), 1.0)):
        with pytest.raises(UserError, match="percentages"):
            split_by_hash("a", valid_percent=valid, test_percent=test)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_recording_of_hours_needs_no_more_memory(tmp_path, num_processes):
    """Three hours; the peak of the command and of its largest process."""
    minute = np.tile(voice(0, 2.0), 30)
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 24_000, 1) as file:
        for _ in range(180):
            file.write(minute)
    code = (
        "import resource, sys; from ct_audio.commands.program import main; status = main(sys.argv[1:]); "
        "print(*(resource.getrusage(w).ru_maxrss // 1024 for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))); "
        "sys.exit(status)"
    )
    words = ["prepare", "folder", "--source", str(tmp_path), "--out", str(tmp_path / "out")]
    words += ["--num-processes", str(num_processes)]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own, children = map(int, done.stdout.splitlines()[-1].split())
    assert max(own, children) < 300
    assert sum(split.num_codes for split in open_corpus(tmp_path / "out").splits.values()) > 3 * 3600 * 23_000
