"""Data recipes through the preparation tool: which recordings they find and into which split these go."""

import sys

import numpy as np
import pytest
from recordings import ROOT, load_script, voice, write

from ct_audio.commands import prepare
from ct_audio.commands.command_line import run_tool
from ct_audio.data.corpus import open_corpus

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
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out") == 2
    assert "make 1 groups" in capsys.readouterr().err
    options = ("--", "--group-regex", "^(.*)_take", "--valid-percent", "30", "--test-percent", "30")
    assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "out", *options) == 0
    splits = splits_of(tmp_path / "out")
    for prompt in range(15):
        assert splits[f"prompt{prompt}_take0.flac"] == splits[f"prompt{prompt}_take1.flac"]
    for regex, message in (("(", "not a regular expression"), ("chapter", "finds nothing")):
        assert run(monkeypatch, "folder", tmp_path / "in", tmp_path / "o", "--", "--group-regex", regex) == 2
        assert message in capsys.readouterr().err


def test_explicit_lists(tmp_path, monkeypatch, capsys):
    for name in ("a/1.wav", "a/2.wav", "b/1.wav", "c/1.wav"):
        write(tmp_path / "in" / name, voice(len(name), 0.2))
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
        ("none", "test", "cannot read the list"),
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
            name, waveform = f"{prompt}_{take}", np.rint(voice(take, 0.3) * 32768).astype(np.int16)
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
