"""What below a folder is an input, for every recipe: names, links, hidden files, own outputs, other formats."""

import shutil
import unicodedata
from pathlib import Path
from typing import Literal

import pytest
from recordings import load_script, voice, write
from test_recipes_data import run

from ct_audio.commands.command_line import build_parser
from ct_audio.common.errors import UserError
from ct_audio.preparation import listing
from ct_audio.preparation.listing import count_suffixes, find_audio, find_files
from ct_audio.preparation.recordings import split_by_hash

folder_recipe = load_script("recipes/folder/prepare.py", "recipe_folder")


def touch(folder: Path, *names: str) -> None:
    """Empty files, and the folders above them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_hidden_files_and_folders_of_systems_are_no_inputs(tmp_path):
    touch(tmp_path, "a.wav", "b/c.WAV", "._a.wav", ".hidden/d.wav", "__MACOSX/._a.wav", "@eaDir/a.wav/x", "notes.txt")
    assert list(find_files(tmp_path).files) == ["a.wav", "b/c.WAV", "notes.txt"]
    assert list(find_audio(tmp_path).files) == ["a.wav", "b/c.WAV"]
    assert find_audio(tmp_path).unusable == {}


def test_what_looks_like_audio_is_named_by_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "has_av", lambda: False)
    touch(tmp_path, "a.wav", "b.m4a", "c.WMA", "d.txt", "e/f.webm")
    (tmp_path / "take.1").write_bytes(b"RIFF....WAVE")
    (tmp_path / "take").write_bytes(b"fLaC")
    (tmp_path / "README").write_bytes(b"no audio")
    audio = find_audio(tmp_path)
    assert list(audio.files) == ["a.wav"]
    assert {name: str(why).partition(":")[0] for name, (_, why) in audio.unusable.items()} == {
        "b.m4a": "not read (m4a)",
        "c.WMA": "not read (wma)",
        "e/f.webm": "not read (webm)",
        "take": "without suffix",
        "take.1": "without suffix",
    }
    assert audio.unusable["b.m4a"][1] == "not read (m4a): PyAV would; run: python -m pip install av"
    assert count_suffixes(audio.unusable) == "1 .1, 1 .m4a, 1 .webm, 1 .wma, 1 without suffix"
    monkeypatch.setattr(listing, "has_av", lambda: True)
    assert list(find_audio(tmp_path).files) == ["a.wav", "b.m4a", "c.WMA", "e/f.webm"]


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path / "elsewhere", "x.wav", "deep/y.wav")
    touch(tmp_path / "in", "z/1.wav")
    links = {
        "a": "../elsewhere",
        "b": "../elsewhere",  # once is enough
        "latest": "z",  # z itself is there
        "up": "..",
        "ring": ".",
        "z/back": "../../in/z",
    }
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "elsewhere" / "deep" / "home").symlink_to(tmp_path / "in")
    found = find_files(tmp_path / "in")
    assert list(found.files) == ["a/deep/y.wav", "a/x.wav", "z/1.wav"]
    assert list(found.unusable) == ["a/deep/home", "ring", "up", "z/back"]


def test_a_linked_source_is_a_folder(tmp_path):
    touch(tmp_path / "real", "x.wav")
    (tmp_path / "link").symlink_to("real")
    assert list(find_files(tmp_path / "link").files) == ["x.wav"]


def test_own_outputs_are_no_inputs(tmp_path, monkeypatch, capsys):
    for index in range(4):
        write(tmp_path / "in" / f"{index}.wav", voice(index, 0.2))
    out = tmp_path / "in" / "data" / "x"
    assert run(monkeypatch, "folder", tmp_path / "in", out) == 0
    assert (out / "example.wav").is_file()
    touch(tmp_path / "in" / "y.partial", "lock", "corpus/example.wav")
    shutil.copytree(out, tmp_path / "in" / "data" / "x.replaced")
    touch(tmp_path / "in", "theirs/corpus.json", "theirs/a.wav", "theirs.partial/a.wav")
    assert run(monkeypatch, "folder", tmp_path / "in" / "data", tmp_path / "none") == 2
    assert "found no audio file" in capsys.readouterr().err
    assert [name for name in find_audio(tmp_path / "in").files if "/" in name] == [
        "theirs.partial/a.wav",
        "theirs/a.wav",
    ]
    for name in ("theirs", "theirs.partial"):
        shutil.rmtree(tmp_path / "in" / name)
    assert run(monkeypatch, "folder", tmp_path / "in", out) == 0
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match="is a prepared corpus"):
        find_files(out)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_the_same_in_every_form_of_unicode(tmp_path, form: Literal["NFC", "NFD"]):
    names = [f"{speaker}é{number}/ü.wav" for speaker in ["Jörg", "Zoë", "Ångström"] for number in range(7)]
    touch(tmp_path / "in", *(unicodedata.normalize(form, name) for name in names))
    (tmp_path / "list").write_text(unicodedata.normalize("NFD" if form == "NFC" else "NFC", names[0]) + "\n")
    assert list(find_audio(tmp_path / "in").files) == sorted(names)
    by_hash = list_recordings(tmp_path / "in", "--valid-percent", "30", "--test-percent", "30")
    assert by_hash == {
        name: split_by_hash(name.rpartition("/")[0], valid_percent=30.0, test_percent=30.0) for name in names
    }
    by_list = list_recordings(tmp_path / "in", "--valid-list", str(tmp_path / "list"))
    assert [name for name, split in by_list.items() if split == "valid"] == [names[0]]


def test_two_files_that_differ_in_the_form_of_unicode_alone_are_both_there(tmp_path):
    touch(tmp_path, *(unicodedata.normalize(form, "é/ü.wav") for form in ("NFC", "NFD")))
    names = list(find_audio(tmp_path).files)
    assert len(names) == 2
    assert {unicodedata.normalize("NFC", name) for name in names} == {"é/ü.wav"}


@pytest.mark.parametrize("options", [(), ("--group", "file")])
def test_splits_that_were_full_are_as_they_were(tmp_path, options):
    """By the formula in the README: 80 groups of one or two files leave no split empty."""
    names = [f"speaker{speaker}/{take}.wav" for speaker in range(80) for take in range(2)]
    touch(tmp_path, *names)
    groups = {name: name if options else name.partition("/")[0] for name in names}
    expected = {name: split_by_hash(group, valid_percent=5.0, test_percent=5.0) for name, group in groups.items()}
    assert set(expected.values()) == {"train", "valid", "test"}
    assert list_recordings(tmp_path, *options) == expected


@pytest.mark.parametrize("num_groups", [3, 4, 9, 30])
def test_a_split_that_would_be_empty_takes_a_small_group(tmp_path, num_groups):
    names = [f"{group}/{take}.wav" for group in range(num_groups) for take in range(1 + group % 4)]
    touch(tmp_path, *names)
    splits = list_recordings(tmp_path, "--valid-percent", "0.001", "--test-percent", "0.001")
    folders = {split: {name.partition("/")[0] for name in names if splits[name] == split} for split in splits.values()}
    assert {split: len(found) for split, found in folders.items()} == {
        "train": num_groups - 2,
        "valid": 1,
        "test": 1,
    }
    largest = {str(group) for group in range(num_groups) if group % 4 == min(num_groups - 1, 3)}
    assert not largest & (folders["valid"] | folders["test"])
    most = list_recordings(tmp_path, "--valid-percent", "50", "--test-percent", "49.999")
    assert set(most.values()) == {"train", "valid", "test"}


def list_recordings(source: Path, *options: str) -> dict[str, str]:
    """{name: split} as recipes/folder lists them."""
    parser = build_parser("")
    folder_recipe.add_arguments(parser)
    return {r.name: r.split for r in folder_recipe.list_recordings(source, parser.parse_args(options))}
