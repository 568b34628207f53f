"""Data recipes through the preparation tool: which recordings they find and into which split these go."""

import shlex
import shutil
import sys
import unicodedata

import numpy as np
import pytest
from recordings import ROOT, load_script, voice, write

from ct_audio.commands import prepare
from ct_audio.commands.command_line import run_tool
from ct_audio.common.errors import UserError
from ct_audio.data import av_files
from ct_audio.data.corpus import open_corpus
from ct_audio.preparation import listing

kathleen = load_script("recipes/kathleen/prepare.py", "recipe_kathleen")


def run(monkeypatch, recipe, source, out, *options):
    """Run the tool in this process; returns its exit status."""
    arguments = ["prepare.py", str(ROOT / "recipes" / recipe), "--source", str(source), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--num-processes", "1", *options])
    return run_tool(prepare.main)


def splits_of(out):
    """{name: split} of a corpus."""
    corpus = open_corpus(out, verify=True)
    return {name: split.name for split in corpus.splits.values() for name in split.document_names}


def test_every_recipe_with_data_can_be_loaded():
    for file in sorted((ROOT / "recipes").glob("*/prepare.py")):
        recipe = prepare.load_recipe(file.parent)
        assert callable(recipe.add_arguments)
        texts = hasattr(recipe, "list_texts")
        assert callable(recipe.list_texts if texts else recipe.list_recordings)
        assert not texts or callable(recipe.settings)


def test_folders_stay_together(tmp_path, monkeypatch, capsys):
    for speaker in range(12):
        for take in range(3):
            write(tmp_path / "in" / f"speaker{speaker}" / f"{take}.wav", voice(speaker, 0.2))
    (tmp_path / "in" / "speaker0" / "._0.wav").write_bytes(b"a Macintosh's own")
    (tmp_path / "in" / "speaker0" / "notes.txt").write_text("no audio")
    options = ("--", "--valid-percent", "20", "--test-percent", "30")
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", *options) == 0
    printed = capsys.readouterr()
    assert "36 files" in printed.out
    splits = splits_of(tmp_path / "out")
    assert len(splits) == 36
    assert set(splits.values()) == {"train", "valid", "test"}
    for speaker in range(12):
        assert len({splits[f"speaker{speaker}/{take}.wav"] for take in range(3)}) == 1
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", *options) == 0
    assert "complete already" in capsys.readouterr().out


def test_a_regular_expression_keeps_takes_together(tmp_path, monkeypatch, capsys):
    for prompt in range(15):
        for take in range(2):
            write(tmp_path / "in" / f"prompt{prompt}_take{take}.flac", voice(prompt, 0.2))
    options = ("--", "--group-regex", "^prompt")
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", *options) == 2
    assert "makes 1 groups of 30 files, fewer than the 3 splits" in capsys.readouterr().err
    options = ("--", "--group-regex", "^(.*)_take", "--valid-percent", "30", "--test-percent", "30")
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", *options) == 0
    splits = splits_of(tmp_path / "out")
    for prompt in range(15):
        assert splits[f"prompt{prompt}_take0.flac"] == splits[f"prompt{prompt}_take1.flac"]
    for regex, message in (("(", "not a regular expression"), ("chapter", "finds nothing")):
        assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "o", "--", "--group-regex", regex) == 2
        assert message in capsys.readouterr().err


def test_explicit_lists(tmp_path, monkeypatch, capsys):
    for seed, name in enumerate(("a/1.wav", "a/2.wav", "b/1.wav", "c/1.wav")):
        write(tmp_path / "in" / name, voice(seed, 0.2))
    lists = {"valid": "b\n\n", "test": "c/1.wav\n", "torn": "a/1.wav\n", "unknown": "d\n"}
    for name, text in lists.items():
        (tmp_path / name).write_text(text)

    def prepare(valid, test):
        options = ("--", "--valid-list", str(tmp_path / valid), "--test-list", str(tmp_path / test))
        return run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", *options)

    for valid, test, message in (
        ("torn", "test", "tear group 'a' apart"),
        ("unknown", "test", "as 'd'"),
        ("valid", "valid", "lists of two splits"),
        ("none", "test", "cannot read "),
    ):
        assert prepare(valid, test) == 2
        assert message in capsys.readouterr().err
    assert prepare("valid", "test") == 0
    assert splits_of(tmp_path / "out") == {
        "a/1.wav": "train",
        "a/2.wav": "train",
        "b/1.wav": "valid",
        "c/1.wav": "test",
    }


def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "folder", tmp_path / "none", tmp_path / "out") == 2
    assert run(monkeypatch, "nothing", tmp_path, tmp_path / "out") == 2
    assert run(monkeypatch, "folder", tmp_path, tmp_path / "out") == 2
    assert run(monkeypatch, "kathleen", tmp_path, tmp_path / "out") == 2
    assert run(monkeypatch, "folder", tmp_path, tmp_path / "out", "--num-processes", "0") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("error: ") for line in lines)


def test_both_layouts_of_kathleen_give_the_same_corpus(tmp_path, monkeypatch):
    prompts = {"arctic_a0001": "train", "arctic_b0001": "train"}
    for split in ("valid", "test"):
        prompts[next(p for p, s in kathleen.held_out_prompts().items() if s == split)] = split
    rows = ["id\tsplit\ttext"]
    for prompt, split in prompts.items():
        for take in (1592748574, 1592748585):
            name = f"{prompt}_{take}"
            waveform = np.rint(voice(take + len(rows), 0.3) * 32768).astype(np.int16)
            write(tmp_path / "set" / "wavs" / f"{name}.flac", waveform, subtype="PCM_16")
            write(tmp_path / "repository" / "data" / f"{name}.wav", np.stack([waveform] * 2, 1), subtype="PCM_16")
            (tmp_path / "repository" / "data" / f"{name}.txt").write_text('He said "no.')
            rows.append(f'{name}\t{split}\tHe said "no.')
    (tmp_path / "set" / "metadata.tsv").write_text("\n".join(rows) + "\n")
    for layout in ("set", "repository"):
        assert run(monkeypatch, "kathleen", tmp_path / layout, tmp_path / f"out_{layout}") == 0
    splits = splits_of(tmp_path / "out_set")
    assert len(splits) == 8
    assert {name.rpartition("_")[0]: split for name, split in splits.items()} == prompts
    assert splits_of(tmp_path / "out_repository") == splits
    first, second = (open_corpus(tmp_path / f"out_{layout}") for layout in ("set", "repository"))
    assert first.fingerprint == second.fingerprint


def test_held_out_prompts_are_few_and_sorted():
    held_out = kathleen.held_out_prompts()
    assert list(held_out) == sorted(held_out)
    assert set(held_out.values()) == {"valid", "test"}
    assert kathleen.prompt_of("arctic_a0001_1592748574") == "arctic_a0001"


@pytest.mark.parametrize(
    "text", ["id\tsplit\ttext\na\tdev\tx\n", "id\ttext\na\tx\n", "id\tsplit\ttext\n../a\ttrain\tx\n", "\xff"]
)
def test_wrong_metadata_is_one_error(tmp_path, monkeypatch, capsys, text):
    (tmp_path / "metadata.tsv").write_text(text, encoding="latin-1")
    assert run(monkeypatch, "kathleen", tmp_path, tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("error: ")


def parts(out):
    """{split: number of codes} of a corpus."""
    return {name: split.num_codes for name, split in open_corpus(out, verify=True).splits.items()}


@pytest.mark.parametrize("layout", ["3 files", "4 files", "60 files", "2 folders", "4 folders"])
def test_the_plain_command_leaves_no_split_empty(tmp_path, monkeypatch, capsys, layout):
    number, what = layout.split()
    for index in range(int(number)):
        for take in range(1 if what == "files" else 3):
            name = f"{index}.wav" if what == "files" else f"{index}/{take}.wav"
            write(tmp_path / "in" / name, voice(3 * index + take, 0.2))
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out") == 0
    splits = splits_of(tmp_path / "out")
    assert set(splits.values()) == {"train", "valid", "test"}
    assert len(splits) == int(number) * (1 if what == "files" else 3)
    is_torn = len({(name.partition("/")[0], split) for name, split in splits.items()}) > int(number)
    assert is_torn == (layout == "2 folders")
    said = f"warning: fewer folders ({1 if what == 'files' else number}) than splits (3): each file is a group"
    assert (said in capsys.readouterr().err) == (layout != "4 folders")


@pytest.mark.parametrize("num_files", [1, 2])
def test_one_or_two_recordings_are_cut_in_time(tmp_path, monkeypatch, capsys, num_files):
    for index in range(num_files):
        noise = 0.1 * np.random.default_rng(index).standard_normal(40 * 24_000)
        write(tmp_path / "in" / f"{index}.wav", noise)
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out") == 0
    assert "each file is cut in time, into 90% train, 5% valid, 5% test" in capsys.readouterr().err
    seconds = {"train": 36.0, "valid": 1.5, "test": 1.5}  # half a second of a part of 2 s is the gap
    assert parts(tmp_path / "out") == {split: num_files * 24_000 * length for split, length in seconds.items()}
    assert sorted(splits_of(tmp_path / "out"))[:3] == ["0.wav [0% to 90%]", "0.wav [90% to 95%]", "0.wav [95% to 100%]"]
    options = ("--", "--valid-percent", "10", "--test-percent", "0")
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "two", *options) == 0
    assert set(splits_of(tmp_path / "two").values()) == {"train", "valid"}


def without_av(monkeypatch):
    """As where the extra is not installed."""
    for module in (listing, av_files):
        monkeypatch.setattr(module, "has_av", lambda: False)


def test_other_formats_count_as_dropped(tmp_path, monkeypatch, capsys):
    without_av(monkeypatch)
    for index in range(12):
        write(tmp_path / "in" / f"{index}.wav", voice(index, 0.2))
    for index in range(9):
        (tmp_path / "in" / f"more{index}.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "9 of 21 files had to be dropped (9 not read (m4a)), over 5%" in error
    assert "; run: python -m pip install av, or pass --allow-dropped" in error
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", "--allow-dropped") == 0
    printed = capsys.readouterr().out
    assert "dropped: 9 files (42.857%)" in printed
    assert "more0.m4a: not read (m4a): PyAV would; run: python -m pip install av" in printed
    for file in (tmp_path / "in").glob("*.wav"):
        file.unlink()
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "none") == 2
    assert "there are 9 .m4a: run: python -m pip install av" in capsys.readouterr().err
    for file in (tmp_path / "in").glob("*.m4a"):
        file.rename(file.with_suffix(".voc"))
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "none") == 2
    assert "there are 9 .voc: convert them first" in capsys.readouterr().err


def test_a_folder_copied_twice_stands_in_no_two_splits(tmp_path, monkeypatch, capsys):
    for index in range(12):
        write(tmp_path / "in" / "a" / f"{index}.wav", voice(index, 0.2))
    shutil.copytree(tmp_path / "in" / "a", tmp_path / "in" / "copy of a")
    options = ("--", "--group", "file", "--valid-percent", "20", "--test-percent", "20")
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", *options) == 0
    printed = capsys.readouterr().out
    assert "dropped: 0 files" in printed
    of_content = {}
    for name, split in splits_of(tmp_path / "out").items():
        of_content.setdefault(name.rpartition("/")[2], set()).add(split)
    assert len(of_content) == 12
    assert all(len(splits) == 1 for splits in of_content.values())
    num_left_out = 24 - len(splits_of(tmp_path / "out"))
    assert num_left_out > 0
    assert f"so that no split holds what another one does: {num_left_out} files" in printed


def test_lists_of_any_system_and_advice_that_can_be_pasted(tmp_path, monkeypatch, capsys):
    for index in range(4):
        write(tmp_path / "in" / "é" / f"{index}.wav", voice(index, 0.2))
        write(tmp_path / "in" / f"speaker {index}" / "x.wav", voice(9 + index, 0.2))
    (tmp_path / "valid list").write_bytes(b"\xef\xbb\xbfe\xcc\x81/1.wav\r\nspeaker 1\r\n")
    (tmp_path / "test").write_bytes(b"\xef\xbb\xbfspeaker 2")
    options = ("--valid-list", str(tmp_path / "valid list"), "--test-list", str(tmp_path / "test"))
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", "--", *options) == 2
    error = capsys.readouterr().err
    assert "tear group 'é' apart ('é/1.wav')" in error
    advice = shlex.split(error.partition("for itself: ")[2])
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", *advice) == 0
    held_out = {name: split for name, split in splits_of(tmp_path / "out").items() if split != "train"}
    assert held_out == {"é/1.wav": "valid", "speaker 1/x.wav": "valid", "speaker 2/x.wav": "test"}
    (tmp_path / "test").write_bytes("speaker 2/x.wav\n".encode("utf-16"))
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "o", *advice) == 2
    assert f"{tmp_path / 'test'}, line 1, byte 0: expected UTF-8" in capsys.readouterr().err


def test_options_of_the_recipe_in_the_wrong_place_are_told_where_they_stand(tmp_path, monkeypatch, capsys):
    for index in range(4):
        write(tmp_path / "in" / f"{index}.wav", voice(index, 0.2))
    options = ("--group", "file", "--", "--valid-percent", "30")
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", *options) == 2
    advice = shlex.split(capsys.readouterr().err.partition("after --: ")[2])
    assert advice == ["--", "--group", "file", "--valid-percent", "30"]
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", *advice) == 0


def test_a_flat_folder_and_lists_of_files(tmp_path, monkeypatch):
    for index in range(4):
        write(tmp_path / "in" / f"{index}.wav", voice(index, 0.2))
    (tmp_path / "valid").write_text("1.wav\n")
    assert (
        run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", "--", "--valid-list", str(tmp_path / "valid"))
        == 0
    )
    assert splits_of(tmp_path / "out") == {"0.wav": "train", "1.wav": "valid", "2.wav": "train", "3.wav": "train"}


def test_kathleen_takes_what_metadata_names_and_names_the_rest(tmp_path, monkeypatch, capsys):
    without_av(monkeypatch)
    names = [f"{prompt}_{take}" for prompt in ("é1", "é2", "é3") for take in range(7)]
    splits = {"é1": "train", "é2": "valid", "é3": "test"}
    for seed, name in enumerate(names):
        write(tmp_path / "in" / "wavs" / f"{unicodedata.normalize('NFD', name)}.flac", voice(seed, 0.2))
    write(tmp_path / "in" / "wavs" / "other.flac", voice(99, 0.2))
    (tmp_path / "in" / "wavs" / "._x.flac").write_bytes(b"a Macintosh's own")
    rows = ["id\tsplit\ttext", *(f"{name}\t{splits[name[:2]]}\tx" for name in names)]
    (tmp_path / "in" / "metadata.tsv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert run(monkeypatch, "kathleen", tmp_path / "in", tmp_path / "out") == 0
    assert splits_of(tmp_path / "out") == {name: splits[name[:2]] for name in names}
    printed = capsys.readouterr().out
    assert "dropped: 1 files (4.545%)\n  other.flac: not listed: metadata.tsv does not name it\n" in printed
    for name in names[:2]:
        (tmp_path / "in" / "wavs" / f"{unicodedata.normalize('NFD', name)}.flac").rename(
            tmp_path / "in" / "wavs" / f"{name}.m4a"
        )
    assert run(monkeypatch, "kathleen", tmp_path / "in", tmp_path / "out", "--overwrite") == 2
    assert "(2 unreadable, 2 not read (m4a), 1 not listed)" in capsys.readouterr().err


def test_a_split_that_is_not_there_is_told_with_what_makes_it(tmp_path, monkeypatch):
    for index in range(4):
        write(tmp_path / "in" / f"{index}.wav", voice(index, 0.2))
    none = ("--", "--valid-percent", "0", "--test-percent", "0")
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", *none) == 0
    with pytest.raises(UserError, match=r"no split 'valid'; expected one of train; .*--overwrite -- --valid-percent 5"):
        open_corpus(tmp_path / "out").split("valid")
    assert (
        run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", "--overwrite", "--", "--valid-percent", "5") == 0
    )
    assert open_corpus(tmp_path / "out").split("valid").num_codes
