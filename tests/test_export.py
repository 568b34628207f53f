"""Models that are handed on: an exported folder says what its run said, every command takes it, damage is named."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from handmade_runs import ROOT, Output, make_run, noise_corpus, refusal, speech_like, text_run, tool, write_corpus
from safetensors.torch import load_file, save_file

import ct_audio
from ct_audio.common import recipes
from ct_audio.common.errors import UserError
from ct_audio.common.recipes import recipe_names
from ct_audio.data.audio_files import read_blocks, write_wav
from ct_audio.data.codecs import MuLaw, read_codes
from ct_audio.data.corpus import open_corpus
from ct_audio.data.vocabulary_codecs import Word
from ct_audio.evaluation.stored import EvaluationSettings, evaluate_run
from ct_audio.export import model_card, model_folder
from ct_audio.export.model_card import CardText
from ct_audio.export.model_folder import CLIP_TOLERANCE_NATS, check_clip, export_model
from ct_audio.runs.checkpoint_files import digest
from ct_audio.runs.config import load_config, read_yaml
from ct_audio.runs.open_run import load_run_model, run_corpus
from ct_audio.training.branch import branch_run

GOLDEN = Path(__file__).with_name("golden_export")
PRETRAINED = sorted(path.parent for path in ROOT.glob("recipes/*/pretrained/*/config.json"))
SHIPPED_MIB = 8
MODELS = ["compressive_transformer_prediction", "wavenet", "linear_prediction_autocorrelation"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of 0.05 s."""
    path = tmp_path_factory.mktemp("clip") / "some.wav"
    write_wav(path, speech_like(1200, 9), 24_000)
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return make_run(noise_corpus(folder / "corpus"), folder / "runs", "compressive_transformer")


@pytest.fixture(scope="module")
def exported(run_dir: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    return export_model(run_dir, out, clip=clip, text=CardText(licence="cc0-1.0"))


def nll(path: Path, corpus: Path | None = None, split: str = "test") -> float:
    """Of a split of the corpus, by the library."""
    run = load_run_model(path)
    opened = run_corpus(run, None if corpus is None else str(corpus))
    return evaluate_run(run, opened, EvaluationSettings(split=split), progress=None)[0]["nll_nats"]


def contents(folder: Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): digest(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_says_what_its_run_said(name: str, tmp_path: Path, clip: Path) -> None:
    corpus = noise_corpus(tmp_path / "corpus")
    run = make_run(corpus, tmp_path / "runs", name)
    expected = nll(run)
    out = export_model(run, tmp_path / "out" / "model", clip=clip, text=CardText())
    shutil.rmtree(tmp_path / "runs")
    assert nll(out, corpus) == expected
    assert sorted(path.name for path in out.parent.iterdir()) == ["model"]
    assert sorted(contents(out)) == ["README.md", "clip.wav", "config.json", "model.safetensors"]
    stated, found = check_clip(out)
    assert stated == found


def test_nothing_of_the_machine_is_in_it_and_everybody_can_read_it(run_dir: Path, clip: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        out = export_model(run_dir, tmp_path / "model", clip=clip, text=CardText())
    finally:
        os.umask(before)
    for file in (out / "config.json", out / "README.md"):
        assert str(run_dir.parents[1]) not in file.read_text(encoding="utf-8")
        assert file.stat().st_mode & 0o777 == 0o644
    assert out.stat().st_mode & 0o777 == 0o755
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_data_and_licence_of_every_recipe_are_known() -> None:
    assert model_card.RECIPES.keys() == set(recipe_names()) - {"folder"}


def test_the_card_has_metadata_training_and_nll(
    clip: Path, tmp_path: Path, evaluate: Any, sample: Any, capsys: Output
) -> None:
    run = make_run(noise_corpus(tmp_path / "corpus"), tmp_path / "runs", "wavenet")
    assert evaluate(run, "--split", "test", "--json") == 0  # stored in the run
    stored = json.loads(capsys.readouterr().out)
    assert evaluate(run, "--split", "valid", "--max-codes", 400, "--json") == 0
    other = json.loads(capsys.readouterr().out)
    (run / "evaluations" / "valid-step_00000007-max_codes_400.json").unlink()
    (tmp_path / "valid.json").write_text(json.dumps(other))
    assert sample(run, "--seconds", 0.02, "--num", 2, "--out", tmp_path / "samples") in (0, 4)
    text = CardText(licence="cc0-1.0", data="Noise.", language="en", use="For tests.")
    files = [tmp_path / "valid.json"]
    out = export_model(run, tmp_path / "model", clip=clip, nll_files=files, samples=tmp_path / "samples", text=text)
    card = (out / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    metadata = read_yaml(front, "card")
    assert (metadata["license"], metadata["language"], metadata["library_name"]) == ("cc0-1.0", ["en"], "ct_audio")
    results = metadata["model-index"][0]["results"]
    assert [result["metrics"][0]["value"] for result in results] == [
        round(stored["nll_nats"], 5),
        round(other["nll_nats"], 5),
    ]
    for part in (f"{stored['nll_nats']:.4f}", f"{other['nll_nats']:.4f}", "Noise.", "For tests.", "7 of 1 x 64 codes"):
        assert part in body
    assert "samples/sample_1.wav" in body
    assert "| split | recordings | codes | minutes |" in body
    plain = {"training": {"best_valid_nll_nats": 1.0, "splits": {"valid": {"num_codes": 40}}}, "evaluations": []}
    for scored, stretch in ((48, "all"), (40, "all"), (0, "all"), (32, "the first 32 codes")):
        assert f"on {stretch} of the validation" in model_card._nll(
            {**plain, "train": {"valid_codes": scored}}, MuLaw()
        )
    assert soundfile.info(out / "samples" / "sample_1.wav").frames == 480
    assert [each["split"] for each in json.loads((out / "config.json").read_text())["evaluations"]] == ["test", "valid"]
    again = export_model(out, tmp_path / "again", clip=clip, text=CardText(licence="mit"))
    assert "license: mit" in (again / "README.md").read_text(encoding="utf-8")
    assert nll(again, tmp_path / "corpus") == stored["nll_nats"]
    assert json.loads((again / "config.json").read_text())["evaluations"][0]["nll_nats"] == stored["nll_nats"]


def test_the_card_says_what_a_run_is_a_branch_of(clip: Path, tmp_path: Path) -> None:
    def exported(path: Path, name: str) -> tuple[list[Any], str]:
        out = export_model(path, tmp_path / name, clip=clip, text=CardText())
        return json.loads((out / "config.json").read_text())["training"]["branches"], (out / "README.md").read_text()

    run = make_run(noise_corpus(tmp_path / "corpus"), tmp_path / "runs", "wavenet")
    second, third = run.with_name("second"), run.with_name("third")
    config = load_config(run / "checkpoints" / "last" / "config.yaml")
    for branch, source in ((second, run), (third, second)):
        branch_run(source, dataclasses.replace(config, name=branch.name))
    branches, card = exported(run, "no branch")
    assert branches == []
    assert "branch of" not in card
    weights = digest(run / "checkpoints" / "last" / "model.safetensors")["sha256"]
    branches, card = exported(third, "branch")
    assert branches == [{"source": name, "step": 7, "weights_sha256": weights} for name in ("second", run.name)]
    assert f"| branch of | `second` at step 7, which is a branch of `{run.name}` at step 7; the optimizer's" in card
    assert exported(tmp_path / "branch", "again")[0] == branches
    found = json.loads((third / "branch.json").read_text())
    for content, why in (({}, "it is not of ct_audio branch, version 1"), (found | {"step": "7"}, "step: missing, or")):
        (third / "branch.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"branch\.json: expected where the run branched off, .*: {why}"):
            exported(third, "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 8}, "of another model: step 8, expected 7"),
        ({"model": "wavenet"}, "of another model: model 'wavenet'"),
        ({"nll_nats": None}, "has the NLL None; expected a number"),
        ({"protocol": ...}, "expected what ct-audio evaluate --json prints"),
    ],
)
def test_an_nll_of_another_model_is_refused(
    changes: dict[str, Any], message: str, run_dir: Path, clip: Path, tmp_path: Path
) -> None:
    run = load_run_model(run_dir)
    report = evaluate_run(run, run_corpus(run), EvaluationSettings(split="test"), progress=None)[0] | changes
    plain = {key: value for key, value in report.items() if value is not ...}
    (tmp_path / "nll.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=message):
        export_model(run_dir, tmp_path / "model", clip=clip, nll_files=[tmp_path / "nll.json"], text=CardText())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nll.json"]


def copy_without_links(run: Path, out: Path) -> Path:
    """As a careless copy is: no links, no training files."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("last", "best", "previous", "training*", "memory-*"))
    return out


def checkpoint_of(run: Path, out: Path) -> Path:
    return (run / "checkpoints" / "last").resolve()


def lone_checkpoint(run: Path, out: Path) -> Path:
    shutil.copytree((run / "checkpoints" / "last").resolve(), out)
    return out


def as_exported(run: Path, out: Path) -> Path:
    return export_model(run, out, text=CardText())


@pytest.mark.parametrize("kind", [as_exported, copy_without_links, checkpoint_of, lone_checkpoint])
def test_every_command_takes_it(
    kind: Callable[[Path, Path], Path],
    run_dir: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:
    monkeypatch.setattr(model_folder, "CLIP_SECONDS", 0.05)
    path, corpus = kind(run_dir, tmp_path / "model"), run_dir.parents[1] / "corpus"
    has_run = kind in (copy_without_links, checkpoint_of)
    before, expected = contents(path), nll(run_dir)
    where = ["--corpus", corpus]
    out = [] if has_run else ["--out", tmp_path / "out"]

    def call(name: str, *words: Any) -> str:
        capsys.readouterr()
        assert tool(name, monkeypatch)(path, *words) in ((0, 4) if name == "sample" else (0,)), capsys.readouterr().err
        return capsys.readouterr().out

    assert json.loads(call("evaluate", *where, "--split", "test", "--json"))["nll_nats"] == expected
    assert "stored in" in call("evaluate", *where, "--split", "test", *out)
    call("evaluate", *where, "--by", "share", *out)
    call("evaluate", *where, "--sweep-memory", "0,8", "--no-test", *out)
    call("sample", "--seconds", 0.02, "--num", 1, "--out", tmp_path / "samples")
    call("sample", "--seconds", 0.01, "--num", 1, "--prime", clip, "--include-prime", "--out", tmp_path / "primed")
    assert json.loads(call("score", clip, "--json", *out))["nll_nats"] > 0
    call("analyse", *where, "--num-codes", 128, "--shares", 0.5, *out)
    assert "# `compressive_transformer_run`" in call("describe")
    if kind in (as_exported, lone_checkpoint):
        assert contents(path) == before
        table = call("compare", *where, "--splits", "test", "--out", tmp_path / "table")
        assert f"{expected:.4f}" in table
        assert not (tmp_path / "table" / "curves.png").exists()
        call("compare", *where, "--splits", "test", "--out", tmp_path / "table")
        assert "scoring now" not in capsys.readouterr().err
    call("export", "--out", tmp_path / "exported_again")
    assert nll(tmp_path / "exported_again", corpus) == expected


def test_a_model_without_a_run_says_what_it_needs(
    exported: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, clip: Path
) -> None:
    corpus = ["--corpus", run_dir.parents[1] / "corpus"]
    for name, words, message in (
        ("evaluate", [], "knows no place of a corpus (it was trained on corpus); pass --corpus DIR"),
        ("evaluate", [*corpus, "--by", "share"], "--out: expected a directory"),
        ("evaluate", [*corpus, "--sweep-memory", "0"], "--out: expected a directory"),
        ("evaluate", [*corpus, "--checkpoint", "last"], "--checkpoint last:"),
        ("analyse", corpus, "--out: expected a directory"),
        ("score", [clip], "--out: expected a directory"),
        ("sample", ["--temperatures", "1", "--seconds", "0.1", "--out", exported.parent / "o"], "pass --corpus DIR"),
    ):
        assert message in refusal(capsys, tool(name, monkeypatch), exported, *words)
    assert tool("evaluate", monkeypatch)(exported, *corpus) == 0
    assert "not stored" in capsys.readouterr().out
    found = contents(exported)
    assert sorted(found) == ["README.md", "clip.wav", "config.json", "model.safetensors"]


def test_another_corpus_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    other = write_corpus(tmp_path / "other", MuLaw(), [("train", speech_like(300, 1)), ("valid", speech_like(300, 2))])
    assert "holds other codes" in refusal(capsys, tool("evaluate", monkeypatch), exported, "--corpus", other)
    assert tool("evaluate", monkeypatch)(exported, "--corpus", other, "--allow-other-corpus") == 0


def test_a_link_to_the_newest_checkpoint_is_not_needed(run_dir: Path, tmp_path: Path, capsys: Output) -> None:
    copy = copy_without_links(run_dir, tmp_path / "copy")
    assert load_run_model(copy).step == 7
    assert "has no link best or last (lost in a copy?); step_00000007 is taken" in capsys.readouterr().err


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    run_dir: Path, exported: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(exported)
    with pytest.raises(UserError, match="never overwritten"):
        export_model(run_dir, exported, clip=clip, text=CardText())
    assert contents(exported) == before
    (tmp_path / "empty").mkdir()
    assert export_model(run_dir, tmp_path / "empty", clip=clip, text=CardText()) == tmp_path / "empty"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(run_dir, tmp_path / "model", clip=clip, text=CardText())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def change(folder: Path, **changes: Any) -> None:
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, **changes}))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def other_weights(folder: Path) -> None:
    """Weights of another shape, with the right hash."""
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {name: torch.zeros(3)}, folder / "model.safetensors")
    files = json.loads((folder / "config.json").read_text())["files"]
    change(folder, files=files | {"model.safetensors": digest(folder / "model.safetensors")})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "cannot read config.json: there is no plain file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing or no plain file"),
    "no clip": (lambda f: (f / "clip.wav").unlink(), "clip.wav is missing or no plain file"),
    "cut weights": (lambda f: cut(f / "model.safetensors"), "model.safetensors is damaged: expected"),
    "flipped weights": (lambda f: flip(f / "model.safetensors"), "model.safetensors is damaged: expected"),
    "no JSON": (lambda f: cut(f / "config.json") or cut(f / "config.json"), "cannot read config.json"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "of the format 'ct_audio model'"),
    "of another library": (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), "of the format"),
    "a later version": (
        lambda f: change(f, format_version=2, ct_audio_version="9.1"),
        "of version 2 of its format, written by ct_audio 9.1; this ct_audio reads version 1",
    ),
    "no training": (lambda f: change(f, training={}), "config.json does not fit: training is {}"),
    "a step of text": (lambda f: change(f, training={"step": "7", "corpus": "x"}), "does not fit: training is"),
    "no codec": (lambda f: change(f, codec=None), "does not fit: codec is None"),
    "another codec": (lambda f: change(f, codec={"name": "x"}), "codec: expected a name out of"),
    "no data": (lambda f: change(f, data=[]), "does not fit: data is"),
    "a place outside": (lambda f: change(f, files={"../model.safetensors": {}}), "does not fit: files is"),
    "no digests": (lambda f: change(f, files={"model.safetensors": 1}), "does not fit: files is"),
    "an unknown key": (lambda f: change(f, optim={"rate": 1}), "unknown key optim.rate"),
    "an unknown model": (lambda f: change(f, model={"name": "gpt"}), "there is no model 'gpt'"),
    "other weights": (other_weights, "does not fit the model of its configuration"),
    "a clip of NaN": (lambda f: change(f, clip={"file": "clip.wav", "nll_nats": None}), "does not fit: clip is"),
}


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_damage_is_named(
    name: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    damage, message = DAMAGE[name]
    folder = shutil.copytree(exported, tmp_path / "model")
    damage(folder)
    found = refusal(capsys, tool("sample", monkeypatch), folder, "--out", tmp_path / "out", "--seconds", 0.01)
    assert message in found
    assert not (tmp_path / "out").exists()


def test_a_link_in_place_of_a_file_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(exported / "model.safetensors")
    with pytest.raises(UserError, match="no plain file"):
        load_run_model(folder)


def test_check_finds_another_nll(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, run_dir: Path
) -> None:
    export = tool("export", monkeypatch)
    assert export(exported, "--check") == 0
    assert "as stated" in capsys.readouterr().out
    folder = shutil.copytree(exported, tmp_path / "model")
    clip = json.loads((folder / "config.json").read_text())["clip"]
    change(folder, clip=clip | {"nll_nats": clip["nll_nats"] + 1e-3})
    assert export(folder, "--check") == 3
    assert "ANOTHER" in capsys.readouterr().out
    assert "is no exported model" in refusal(capsys, export, run_dir, "--check")


def test_a_vocabulary_is_handed_on(tmp_path: Path) -> None:
    words = "the memory of a model is kept a while and is compressed then"
    codec = Word(("<eos>", "<unk>", *dict.fromkeys(words.split())))
    run = text_run(tmp_path, codec, words * 3)
    (tmp_path / "clip.txt").write_text(f"{words}\nof a model\n")
    out = export_model(run, tmp_path / "model", clip=tmp_path / "clip.txt", text=CardText())
    expected = nll(run, split="valid")
    corpus = (tmp_path / "corpus").rename(tmp_path / "moved")
    shutil.rmtree(run)
    assert nll(out, corpus, split="valid") == expected
    model = ct_audio.load(out)
    assert model.sample_rate_hz is None
    assert len(ct_audio.sample(model, length=5, seed=1).split()) <= 5
    begun = ct_audio.sample(model, length=5, num=2, prime=b"the memory of", include_prime=True)
    assert [b"the memory of" in text[:20] for text in begun] == [True, True]
    with pytest.raises(UserError, match="words have no seconds"):
        ct_audio.sample(model, seconds=1)
    (out / "vocabulary.json").unlink()
    with pytest.raises(UserError, match=r"vocabulary\.json is missing"):
        ct_audio.load(out)


def test_three_lines_from_nothing_to_sound(exported: Path, tmp_path: Path, sample: Any, clip: Path) -> None:
    model = ct_audio.load(exported)
    waveform = ct_audio.sample(model, seconds=0.02, prime=clip, include_prime=True, seed=3)
    assert (waveform.dtype, waveform.shape) == (np.float32, (1200 + 480,))
    assert model.config.name == "compressive_transformer_run"
    words = ["--seconds", 0.02, "--num", 1, "--seed", 3, "--prime", clip, "--include-prime", "--out", tmp_path]
    assert sample(exported, *words) in (0, 4)
    written = np.concatenate([block[:, 0] for block, _ in read_blocks(tmp_path / "sample_0.wav")])
    assert np.abs(written - waveform).max() <= 1.01 / 32768  # rounded; 1.0 is 32767
    several = ct_audio.sample(model, length=16, num=3)
    assert several.shape == (3, 16)
    assert ct_audio.sample(model, length=16, prime=np.zeros(5, np.float32)).shape == (16,)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "expected seconds"),
        ({"seconds": 1, "length": 1}, "expected seconds"),
        ({"seconds": float("nan")}, "finite number"),
        ({"seconds": 0}, "at least one sample, got 0"),
        ({"length": 4, "prime": b"text"}, "expected prime as a path or a waveform"),
        ({"length": 4, "prime": np.zeros((2, 2), np.float32)}, "expected prime as a path or a waveform"),
        ({"length": 4, "num": 0}, "at least one lane"),
        ({"length": 4, "temperature": -1.0}, "temperature"),
    ],
)
def test_what_cannot_be_sampled_is_refused(words: dict[str, Any], message: str, exported: Path) -> None:
    with pytest.raises(UserError, match=message):
        ct_audio.sample(ct_audio.load(exported), **words)


def test_importing_the_package_is_cheap() -> None:
    program = (
        "import sys, ct_audio; assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "assert {'load', 'sample'} <= set(dir(ct_audio)); print(ct_audio.__version__); ct_audio.load"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{ct_audio.__version__}\n", "")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ct_audio.nothing  # noqa: B018


def test_what_version_0_1_exported_is_still_what_it_was() -> None:
    """The folder was made by ct_audio 0.1.0 and is never made again: later versions must load it."""
    plain = json.loads((GOLDEN / "config.json").read_text())
    assert (plain["format_version"], plain["ct_audio_version"]) == (1, "0.1.0")
    stated, found = check_clip(GOLDEN)
    assert abs(stated - found) <= 1e-5
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 64 * 1024
    assert ct_audio.sample(ct_audio.load(GOLDEN), length=8).shape == (8,)


@pytest.mark.parametrize("folder", PRETRAINED, ids=lambda path: f"{path.parents[1].name}-{path.name}")
def test_shipped_models_are_what_they_were(folder: Path) -> None:
    stated, found = check_clip(folder)
    assert abs(stated - found) <= CLIP_TOLERANCE_NATS
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{stated:.6f} nats" in card
    assert f"ct-audio sample {recipes.model_name(folder)} " in card
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o044, f"{path} can be read by nobody else"


def test_shipped_models_are_small() -> None:
    sizes = [path.stat().st_size for folder in PRETRAINED for path in folder.rglob("*") if path.is_file()]
    assert sum(sizes) <= SHIPPED_MIB * 2**20


def test_the_clip_is_the_codes_that_were_scored(exported: Path, clip: Path) -> None:
    codec = open_corpus(noise_corpus(exported.parent / "corpus")).codec
    assert (read_codes(exported / "clip.wav", codec) == read_codes(clip, codec)).all()


def test_a_shipped_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(GOLDEN, tmp_path / "recipes" / "kathleen" / "pretrained" / "tiny")
    monkeypatch.setattr(recipes, "RECIPES", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path / "recipes")  # no folder of that name is here
    assert recipes.model_names() == ["kathleen/tiny"]
    assert tool("export", monkeypatch)("recipes/kathleen/pretrained/tiny", "--check") == 0
    assert ct_audio.load("kathleen/tiny").config.name == "golden"
    assert recipes.model_folder("kathleen/other") == Path("kathleen/other")
    assert tool("export", monkeypatch)(GOLDEN, "--out", "kathleen/pretrained/other") == 0
    card = (tmp_path / "recipes" / "kathleen" / "pretrained" / "other" / "README.md").read_text(encoding="utf-8")
    assert 'ct_audio.load("kathleen/other")' in card
    assert [recipes.model_name(Path(name)) for name in ("kathleen/other", "pretrained/tiny")] == ["other", "tiny"]
