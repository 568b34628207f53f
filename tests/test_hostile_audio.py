"""Bad audio through recipes/folder: each kind comes to what it must, by name, and the good files do not notice."""

import contextlib
import ctypes
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hostile_audio import ACCEPTED, GOOD, KINDS, RATE, VOICE, Kind, encoded, make_hostile_corpus, unlock
from hostile_report import Row, write_section
from recordings import ROOT, voice, write

from ct_audio.commands import prepare as prepare_command
from ct_audio.commands.command_line import run_tool
from ct_audio.common.errors import UserError
from ct_audio.common.text import printable
from ct_audio.data.corpus import open_corpus
from ct_audio.preparation.recordings import REASONS, AudioSettings, Recording, prepare_audio, prepare_recording

BY_FILE = ("--group", "file")
ALL_TRAIN = ("--valid-percent", "0", "--test-percent", "0")


def prepare(
    monkeypatch: pytest.MonkeyPatch,
    source: Path,
    out: Path,
    *options: str,
    recipe_options: tuple[str, ...] = (*BY_FILE, *ALL_TRAIN),
) -> int:
    """Run the tool in this process."""
    common = ["prepare.py", str(ROOT / "recipes" / "folder"), "--source", str(source), "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*common, "--num-processes", "1", *options, "--", *recipe_options])
    return run_tool(prepare_command.main)


@contextlib.contextmanager
def permissions_hold() -> Iterator[bool]:
    """Inside it file permissions hold for this thread even if it is root's; gives False where that cannot be."""
    if os.geteuid() != 0:
        yield True
        return
    libc, header = ctypes.CDLL(None, use_errno=True), struct.pack("Ii", 0x20080522, 0)  # capabilities, version 3
    before = ctypes.create_string_buffer(24)
    dropped = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capget(header, before):
        yield False
        return
    fields = list(struct.unpack("6I", before.raw))
    fields[0] &= ~dropped  # effective ones of this thread alone; the permitted ones stay, to go back
    changed = libc.capset(header, struct.pack("6I", *fields)) == 0
    try:
        yield changed
    finally:
        if changed:
            assert libc.capset(header, before) == 0


def outcomes(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Prepare; by name "accepted", or the reason that the report gives."""
    assert prepare(monkeypatch, source, out, "--allow-dropped") == 0
    corpus, report = open_corpus(out, verify=True), json.loads((out / "report.json").read_text())
    accepted = {name: ACCEPTED for split in corpus.splits.values() for name in split.document_names}
    dropped = {entry["name"]: entry["reason"] for entry in report["dropped"]}
    assert not accepted.keys() & dropped.keys()
    assert len(dropped) == report["num_dropped"]
    return accepted | dropped


def fits(kind: Kind, outcome: str | None) -> bool:
    """Whether a kind came to what it must."""
    if outcome is None:
        return False
    return outcome == ACCEPTED if kind.expected == ACCEPTED else outcome.startswith(kind.expected)


def lengths(corpus_path: Path) -> dict[str, float]:
    """Seconds of each document of the train split."""
    split = open_corpus(corpus_path).split("train")
    ends = [*split.document_offsets[1:].tolist(), split.num_codes]
    return {
        name: (end - begin) / RATE
        for name, begin, end in zip(split.document_names, split.document_offsets.tolist(), ends, strict=True)
    }


def test_every_kind_comes_to_what_it_must(tmp_path, monkeypatch, capsys):
    make_hostile_corpus(tmp_path / "in")
    with permissions_hold() as held:
        found = outcomes(tmp_path / "in", tmp_path / "out", monkeypatch)
    unlock(tmp_path / "in")
    printed = capsys.readouterr().out
    kinds = [kind for kind in KINDS if held or "Permission" not in kind.expected]
    rows = [
        Row(k.what, k.expected, found.get(k.name, "not named").partition(":")[0], found.get(k.name, "")) for k in kinds
    ]
    rows += [
        Row(k.what, k.expected, "not possible here: permissions do not hold for root") for k in KINDS if k not in kinds
    ]
    write_section("audio files", rows)
    assert [(kind.what, found.get(kind.name)) for kind in kinds if not fits(kind, found.get(kind.name))] == []
    assert {kind.name for kind in KINDS} | set(GOOD) == found.keys(), "nothing else is named"
    assert all(found[name] == ACCEPTED for name in GOOD)
    seconds = lengths(tmp_path / "out")
    for kind in kinds:
        assert kind.seconds is None or seconds[kind.name] == pytest.approx(kind.seconds, abs=1e-3), kind.what
    assert all(kind.name in printed for kind in kinds if kind.expected != ACCEPTED), "the terminal names them too"
    assert printed.replace("\n", "").isprintable()
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert all(any(f"`{kind.name}`: " in line for line in lines) for kind in kinds if kind.expected != ACCEPTED)
    for place in (tmp_path, "/proc", "Traceback"):
        assert str(place) not in printed.replace(str(tmp_path / "out"), "")


def test_the_good_files_do_not_notice(tmp_path, monkeypatch):
    make_hostile_corpus(tmp_path / "bad")
    unlock(tmp_path / "bad")
    for name in GOOD:
        (tmp_path / "good" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "bad" / name, tmp_path / "good" / name)
    assert prepare(monkeypatch, tmp_path / "bad", tmp_path / "among", "--allow-dropped") == 0
    assert prepare(monkeypatch, tmp_path / "good", tmp_path / "alone") == 0
    among, alone = (open_corpus(tmp_path / name).split("train") for name in ("among", "alone"))
    for index, name in enumerate(alone.document_names):
        begin, end = [*alone.document_offsets.tolist(), alone.num_codes][index : index + 2]
        first = among.document_offsets[among.document_names.index(name)]
        assert np.array_equal(among.codes[first : first + end - begin], alone.codes[begin:end]), name


def test_there_are_enough_kinds_and_both_outcomes():
    counts = Counter(kind.expected.partition(":")[0] for kind in KINDS)
    assert len(KINDS) >= 80
    assert len({kind.path for kind in KINDS}) == len({kind.name for kind in KINDS}) == len(KINDS)
    assert min(counts[reason] for reason in (ACCEPTED, "unreadable", "truncated", "not finite", "out of range")) >= 3
    assert counts.keys() == {ACCEPTED, "unreadable", *REASONS}


def test_over_5_percent_of_bad_files_stop_the_run_and_name_them(tmp_path, monkeypatch, capsys):
    make_hostile_corpus(tmp_path / "in")
    unlock(tmp_path / "in")
    assert prepare(monkeypatch, tmp_path / "in", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "files had to be dropped" in message
    assert "--allow-dropped" in message
    listing = (tmp_path / "out.partial" / "dropped.txt").read_text().splitlines()
    permitted = [kind for kind in KINDS if kind.expected != ACCEPTED and "Permission" not in kind.expected]
    assert all(any(line.startswith(f"{kind.name}: ") for line in listing) for kind in permitted)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--valid-list", "--group-regex"])
def test_folders_that_nobody_can_read_do_not_stop_the_other_options(tmp_path, monkeypatch, option):
    for seed, name in enumerate("ab"):
        write(tmp_path / "in" / f"{name}_take1.wav", voice(seed))
    (tmp_path / "in" / "ring").symlink_to(".")
    (tmp_path / "list").write_text("a_take1.wav\n")
    recipe_options = {
        "--valid-list": (option, str(tmp_path / "list"), *BY_FILE),
        "--group-regex": (option, "^(.*)_take[0-9]", *ALL_TRAIN),
    }[option]
    options = ("--allow-dropped",)
    assert prepare(monkeypatch, tmp_path / "in", tmp_path / "out", *options, recipe_options=recipe_options) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["name"] for entry in report["dropped"]] == ["ring"]


def test_names_are_shown_on_one_line_and_stay_different():
    names = [os.fsdecode(b"\xff"), "\\udcff", "a\nb", "a\\nb", "\x1b[2J", "\u202egnp.wav", "a\\", "plain é 音.wav"]
    shown = [printable(name) for name in names]
    assert all(text.isprintable() for text in shown)
    assert len(set(shown)) == len(names)
    assert shown[-1] == names[-1]


def test_a_recipe_must_make_names_printable(tmp_path):
    with pytest.raises(UserError, match="must make names printable"):
        prepare_audio([Recording(tmp_path, "train", "a\nb")], tmp_path / "out", settings=AudioSettings(), source={})


def test_the_range_is_checked_after_the_gain(tmp_path):
    write(tmp_path / "loud.wav", VOICE * 32768, subtype="FLOAT")
    with pytest.raises(UserError, match=r"loud\.wav: out of range: .* at 0\.\d+ s, full scale is 1"):
        prepare_recording(tmp_path / "loud.wav", AudioSettings(), len)
    settings = AudioSettings(gain_db=-90.0)
    assert prepare_recording(tmp_path / "loud.wav", settings, len).num_codes == len(VOICE)
    write(tmp_path / "quiet.wav", VOICE)
    with pytest.raises(UserError, match="out of range"):
        prepare_recording(tmp_path / "quiet.wav", AudioSettings(gain_db=60.0), len)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fuzzed_files_are_read_or_refused(tmp_path):
    """Cuts, flipped bytes and overwritten stretches at random places of every format."""
    formats = [("WAV", None), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("FLAC", None), ("OGG", None), ("OGG", "OPUS")]
    formats += [("MP3", None), ("AIFF", None), ("CAF", None), ("AU", None), ("W64", None), ("RF64", None)]
    random_numbers, rows = np.random.default_rng(0), []
    for kind, subtype in formats:
        whole, counts = encoded(np.stack([VOICE, -VOICE / 2], 1), kind, subtype), Counter()
        for _ in range(300):
            content = bytearray(whole)
            for _ in range(random_numbers.integers(1, 4)):
                place = int(random_numbers.choice([64, len(content)]) * random_numbers.random())
                stretch = random_numbers.bytes(int(random_numbers.integers(1, 9)))
                content[place : place + len(stretch)] = stretch
            if random_numbers.random() < 0.3:
                del content[int(len(content) * random_numbers.random()) :]
            file = tmp_path / "fuzzed.wav"
            file.write_bytes(content)
            try:
                prepare_recording(file, AudioSettings(), len)
                counts["read"] += 1
            except UserError:
                counts["refused"] += 1
        assert sum(counts.values()) == 300
        rows += [Row(f"{kind} {subtype or ''}, {n} files", "read or refused", outcome) for outcome, n in counts.items()]
    write_section("fuzzed audio", rows)
