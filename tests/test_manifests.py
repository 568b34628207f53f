"""Manifests of lhotse as the folder recipe reads them: lines as lhotse 1.33 writes them, and what is refused."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import ROOT, voice, write

from ct_audio.commands import prepare
from ct_audio.commands.command_line import run_tool
from ct_audio.data.codecs import MuLaw
from ct_audio.data.corpus import open_corpus

RATE = 24_000
Output = pytest.CaptureFixture[str]


def recording(number: int, *, seconds: float = 1.0, channels: int = 1, **more: Any) -> dict[str, Any]:
    """As lhotse writes it, of the file `in/dirN/rN.wav`."""
    source = {"type": "file", "channels": list(range(channels)), "source": f"dir{number}/r{number}.wav"}
    length = {"sampling_rate": RATE, "num_samples": round(seconds * RATE), "duration": seconds}
    return {"id": f"r{number}", "sources": [source], **length, "channel_ids": source["channels"], **more}


def cut(number: int, start: float, duration: float, *, channel: Any = 0, **more: Any) -> dict[str, Any]:
    supervision = {
        "id": "s",
        "recording_id": f"r{number}",
        "start": 0.0,
        "duration": duration,
        "channel": 0,
        "text": "a",
    }
    fields = {"id": f"c{number}-{start:g}", "start": start, "duration": duration, "channel": channel}
    return fields | {"supervisions": [supervision], "recording": recording(number), "type": "MonoCut"} | more


def mixed(number: int) -> dict[str, Any]:
    tracks = [{"cut": cut(number, 0, 0.5), "type": "MonoCut", "offset": 0.0}]
    return {"id": f"mixed{number}", "tracks": tracks, "type": "MixedCut"}


def write_manifest(path: Path, lines: list[dict[str, Any]]) -> Path:
    raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """in/dirN/rN.wav of a second each, for 40 N."""
    for number in range(40):
        write(tmp_path / "in" / f"dir{number}" / f"r{number}.wav", voice(number, 1.0))
    return tmp_path / "in"


@pytest.fixture
def run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def call(*words: object, out: str = "out") -> int:
        own = ["prepare.py", str(ROOT / "recipes/folder"), "--source", str(source), "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", [*own, "--num-processes", "1", *map(str, words)])
        return run_tool(prepare.main)

    return call


def documents(out: Path) -> dict[str, tuple[str, np.ndarray]]:
    """{name: (split, codes)} of a corpus."""
    corpus = open_corpus(out, verify=True)
    return {
        name: (split.name, np.asarray(split.codes[begin:end]))
        for split in corpus.splits.values()
        for name, begin, end in zip(
            split.document_names, split.document_offsets, [*split.document_offsets[1:], None], strict=True
        )
    }


def test_cuts_are_taken_to_the_sample_and_split_as_their_files_would_be(run, source, tmp_path: Path) -> None:
    lines = [cut(number, start, 0.3) for number in range(40) for start in (0.1, 0.6)]
    manifest = write_manifest(tmp_path / "cuts.jsonl.gz", lines)
    assert run("--", "--manifest", manifest) == 0
    assert run(out="plain") == 0
    found, plain = documents(tmp_path / "out"), documents(tmp_path / "plain")
    assert found.keys() == {f"c{number}-{start:g}" for number in range(40) for start in (0.1, 0.6)}
    assert {split for split, _ in found.values()} == {"train", "valid", "test"}
    for name, (split, codes) in found.items():
        number, start = name[1:].split("-")
        split_of_file, whole = plain[f"dir{number}/r{number}.wav"]
        begin = round(float(start) * RATE)
        assert split == split_of_file
        assert np.array_equal(codes, whole[begin : begin + round(0.3 * RATE)])
    assert run("--", "--manifest", manifest) == 0  # is there already
    assert run("--", "--manifest", manifest, "--group", "file") == 2


def test_recordings_are_taken_whole_and_a_manifest_for_each_split(run, source, tmp_path: Path) -> None:
    names = {"train": range(6), "valid": range(6, 8), "test": range(8, 9)}
    files = {
        split: write_manifest(tmp_path / f"{split}.jsonl", [recording(number) for number in numbers])
        for split, numbers in names.items()
    }
    whole = write_manifest(tmp_path / "cuts.jsonl", [cut(8, 0, 1.0)])
    words = ["--manifest", files["train"], "--valid-manifest", files["valid"], "--test-manifest"]
    assert run("--", *words, files["test"]) == 0
    found = documents(tmp_path / "out")
    assert {name: split for name, (split, _) in found.items()} == {
        f"r{number}": split for split, numbers in names.items() for number in numbers
    }
    expected = MuLaw(RATE).encode(voice(0, 1.0))
    assert np.abs(found["r0"][1].astype(int) - expected.astype(int)).max() <= 1  # through PCM16
    assert run("--", *words, whole, out="other") == 0  # a cut that is a whole recording
    assert np.array_equal(documents(tmp_path / "other")["c8-0"][1], found["r8"][1])


def test_what_cannot_be_used_is_dropped_with_its_reason(run, source, tmp_path: Path, capsys: Output) -> None:
    stream = recording(50) | {"sources": [{"type": "command", "channels": [0], "source": "ffmpeg ..."}]}
    speed = recording(3, transforms=[{"name": "Speed", "kwargs": {"factor": 1.1}}])
    resampled = recording(4, transforms=[{"name": "Resample", "kwargs": {"target_sampling_rate": 8000}}])
    features = {key: value for key, value in cut(5, 0, 0.5, id="features").items() if key != "recording"}
    lines = [
        *(recording(number) for number in range(6, 40)),
        *(mixed(1), stream, speed, resampled, features),
        cut(0, 0, 0.5, channel=1, recording=recording(0, channels=2)),
        cut(2, 0.8, 0.5, id="beyond"),
    ]
    manifest = write_manifest(tmp_path / "mixed.jsonl", lines)
    assert run("--", "--manifest", manifest) == 2
    assert "6 of 41" in capsys.readouterr().err
    assert run("--allow-dropped", "--", "--manifest", manifest) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    reasons = {dropped["name"]: dropped["reason"] for dropped in report["dropped"]}
    assert reasons.keys() == {"mixed1", "r50", "r3", "features", "c0-0", "beyond"}
    assert "not read (MixedCut): save the cuts before they are mixed" in reasons["mixed1"]
    assert "not read (command, 1 sources): only single files" in reasons["r50"]
    assert "not read (Speed): save the changed audio" in reasons["r3"]
    assert "the cut has no recording, only features" in reasons["features"]
    assert "not read (channels [1] of [0, 1])" in reasons["c0-0"]
    assert "too short: it ends at 1.000 s, its cut at 1.300 s" in reasons["beyond"]
    assert "r4" in documents(tmp_path / "out")


def test_what_is_no_manifest_is_one_line(run, source, tmp_path: Path, capsys: Output) -> None:
    def refused(raw: bytes, *words: object) -> str:
        (tmp_path / "m").write_bytes(raw)
        assert run("--", "--manifest", tmp_path / "m", *words) == 2
        return capsys.readouterr().err

    supervision = json.dumps({"id": "s", "recording_id": "r", "start": 0, "duration": 1, "channel": 0}).encode()
    assert "supervisions name no audio: `lhotse cut simple" in refused(supervision)
    assert "m, line 2: expected a recording or a cut of lhotse" in refused(b"\n[1]")
    for raw in (b"{", b'"a"', b"null", b"{}", b"[" * 100_000, json.dumps(cut(0, -1, 1)).encode()):
        assert "line 1: expected a recording or a cut of lhotse" in refused(raw)
    assert "the manifest is empty" in refused(b"\n\n")
    assert "damaged" in refused(gzip.compress(json.dumps(recording(0)).encode())[:-9])
    assert "UTF-8" in refused(b"\xff\xfe\x00")
    assert "none of its 1 audio files is there" in refused(json.dumps(recording(99)).encode())
    assert "of 1 files, fewer than the splits" in refused(json.dumps(cut(1, 0.1, 0.5)).encode())
    twice = json.dumps(recording(0)).encode() + b"\n"
    assert "two recordings are named 'r0'" in refused(twice * 2, "--valid-percent", "0", "--test-percent", "0")
    assert (
        run(
            "--trim-db",
            "40",
            "--",
            "--manifest",
            write_manifest(tmp_path / "c.jsonl", [cut(i, 0.1, 0.5) for i in range(5)]),
        )
        == 2
    )
    assert "--trim-db: the cuts of a manifest have their own begin and end" in capsys.readouterr().err
    assert run("--", "--manifest", tmp_path / "none.jsonl") == 2
    assert "cannot read" in capsys.readouterr().err
    assert run("--", "--valid-manifest", tmp_path / "m") == 2
    assert "go with --manifest" in capsys.readouterr().err
    assert run("--", "--manifest", tmp_path / "m", "--valid-manifest", tmp_path / "m", "--group", "file") == 2
    assert "--group: not with" in capsys.readouterr().err
    assert run("--manifest", tmp_path / "m") == 2
    assert "after --: -- --manifest" in capsys.readouterr().err
