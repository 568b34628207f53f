"""Evaluations that a run keeps: blocks against a loop, and when a kept result is used again."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade_runs import make_run, noise_corpus
from tiny import tiny_model

from ct_audio.common.errors import UserError
from ct_audio.data.codecs import Byte
from ct_audio.data.corpus import CorpusWriter
from ct_audio.evaluation import stored as run_evaluation
from ct_audio.evaluation.comparison import require_alike
from ct_audio.evaluation.dynamic import DynamicSettings
from ct_audio.evaluation.nll import Evaluation, Stretch, evaluate_nll
from ct_audio.evaluation.stored import (
    BlockSums,
    EvaluationSettings,
    _text_measures,
    evaluate_run,
    find_evaluation,
    store_evaluation,
)
from ct_audio.runs.open_run import load_run_model, run_corpus
from ct_audio.training.checkpoint import save_checkpoint
from ct_audio.training.parallel import World
from ct_audio.training.schedules import make_optimizer


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(noise_corpus(tmp_path / "corpus"), tmp_path / "runs", "compressive_transformer")


def evaluate_and_store(run_dir: Path, **settings: Any) -> tuple[Path, dict[str, Any], EvaluationSettings]:
    run, chosen = load_run_model(run_dir), EvaluationSettings(**settings)
    report, blocks = evaluate_run(run, run_corpus(run), chosen, progress=None)
    return store_evaluation(run_dir, run, chosen, report, blocks), report | {"blocks": blocks}, chosen


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_blocks_are_sums_of_the_nll_of_each_code(num_lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_evaluation, "BLOCK_LENGTH", 10)
    codes = np.random.default_rng(0).integers(0, 32, 197).astype(np.uint8)
    by_code, blocks = np.full(197, np.nan), BlockSums(197)

    def collect(positions: torch.Tensor, nll: torch.Tensor) -> None:
        blocks(positions, nll)
        for first, row in zip(positions.tolist(), nll.tolist(), strict=True):
            by_code[first : first + len(row)] = row

    stretch = Stretch(codes, start_code=16, chunk_length=16, num_lanes=num_lanes)
    evaluate_nll(tiny_model("compressive_transformer"), stretch, on_nll=collect)
    found = blocks.to_json()
    assert found["length"] == 10
    assert found["counts"] == [10] * 19 + [7]
    assert found["nll_sums_nats"] == pytest.approx([by_code[i : i + 10].sum() for i in range(0, 197, 10)], abs=1e-9)


def test_what_is_stored_is_found_again(run_dir: Path) -> None:
    path, result, settings = evaluate_and_store(run_dir, split="test")
    assert path == run_dir / "evaluations" / "test-step_00000007.json"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    found = find_evaluation(run_dir, load_run_model(run_dir), settings)
    assert found is not None
    assert result.items() <= found.items()
    assert sum(found["blocks"]["nll_sums_nats"]) == pytest.approx(found["nll_nats"] * found["num_units"])
    assert find_evaluation(run_dir, load_run_model(run_dir), EvaluationSettings()) is None


def test_settings_have_files_of_their_own(run_dir: Path) -> None:
    names = {
        evaluate_and_store(run_dir, **settings)[0].name
        for settings in (
            {"memory_length": 8},  # the configuration's
            {"memory_length": 16, "compressed_memory_length": 8},
            {"num_lanes": 2, "warmup_seconds": 0.0, "max_seconds": 0.005},
            {"max_seconds": 0.01},
        )
    }
    assert names == {
        "valid-step_00000007.json",
        "valid-step_00000007-memory_length_16-compressed_memory_length_8.json",
        "valid-step_00000007-num_lanes_2-warmup_seconds_0-max_seconds_0.005.json",
        "valid-step_00000007-max_seconds_0.01.json",
    }


def test_text_has_perplexities_by_exact_counts(tmp_path: Path) -> None:
    """16 words in 80 bytes: the NLL of the whole split is shared out over the words, at even odds 256^(80 / 16)."""
    writer = CorpusWriter(tmp_path / "corpus", Byte(), source={}, preparation={})
    text = Byte().encode("four\n" * 16)
    writer.add_document("train", "t", text, num_bytes=80, num_words=16)
    writer.add_document("valid", "v", text, num_bytes=80, num_words=16)
    writer.finish()
    run_dir = make_run(tmp_path / "corpus", tmp_path / "runs", "transformer_xl")
    run = load_run_model(run_dir)
    torch.nn.init.zeros_(run.model.head.projection.weight)  # type: ignore[attr-defined]
    report, _ = evaluate_run(run, run_corpus(run), EvaluationSettings(), progress=None)
    assert report["perplexity_a_word"] == pytest.approx(256.0**5, rel=1e-4)
    assert report["num_words"] == 16
    assert "nll_bits_a_byte" not in report  # it is nll_bits itself
    part, _ = evaluate_run(run, run_corpus(run), EvaluationSettings(max_codes=79), progress=None)
    assert "perplexity_a_word" not in part
    with pytest.raises(UserError, match="--max-codes: expected at least 1, got 0"):
        evaluate_run(run, run_corpus(run), EvaluationSettings(max_codes=0))
    split = dataclasses.replace(run_corpus(run).split("valid"), num_bytes=40)
    evaluation = Evaluation(math.log(2), 1.0, 80, 1.0, {})
    assert _text_measures(evaluation, split, "subword") == {
        "num_words": 16,
        "perplexity_a_word": pytest.approx(2.0**5),
        "num_bytes": 40,
        "nll_bits_a_byte": 2.0,
    }
    assert _text_measures(evaluation, split, "word") == {"perplexity": pytest.approx(2.0)}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_codes": 3840}, "max_codes_3840"),
        ({"max_codes": 999_999}, "max_codes_999999"),
        ({"max_codes": 1_000_000}, "max_codes_1000000"),
        ({"max_codes": 1_000_001}, "max_codes_1000001"),
        ({"max_seconds": 10.0}, "max_seconds_10"),
        ({"max_seconds": 0.25}, "max_seconds_0.25"),
        ({"max_seconds": 1234.5671}, "max_seconds_1234.5671"),
        ({"dynamic": DynamicSettings()}, "dynamic_sgd-0.03-norm_1-decay_0"),
        ({"dynamic": DynamicSettings("adam", 3e-5)}, "dynamic_adam-3e-05-norm_1-decay_0"),
        ({"dynamic": DynamicSettings(learning_rate=0.030000001)}, "dynamic_sgd-0.030000001-norm_1-decay_0"),
    ],
)
def test_names_are_of_one_setting_alone(run_dir: Path, settings: dict[str, Any], name: str) -> None:
    run = load_run_model(run_dir)
    path = run_evaluation._path(run_dir, run, EvaluationSettings(**settings))
    assert path.name == f"valid-step_00000007-{name}.json"


@pytest.mark.parametrize("has_corpus", [True, False])
def test_a_result_of_another_number_of_codes_is_not_used(run_dir: Path, tmp_path: Path, has_corpus: bool) -> None:
    """Only the beginning was scored, or more than is asked for: whatever the file is named."""
    run = load_run_model(run_dir)
    num_codes = run_corpus(run).split("valid").num_codes
    path, _, settings = evaluate_and_store(run_dir, max_codes=100)
    usual, short = EvaluationSettings(), EvaluationSettings(max_seconds=50 / 24_000)
    more, many = EvaluationSettings(max_codes=200), EvaluationSettings(max_codes=10**7)
    for other in (usual, more, many, short):
        shutil.copyfile(path, run_evaluation._path(run_dir, run, other))
    whole = evaluate_and_store(run_dir, num_lanes=3)[0]
    corpus = run_corpus(run) if has_corpus else None
    if not has_corpus:
        shutil.rmtree(tmp_path / "corpus")
    assert find_evaluation(run_dir, run, settings, corpus) is not None
    assert find_evaluation(run_dir, run, short, corpus) is None  # fewer are asked for
    assert (find_evaluation(run_dir, run, usual, corpus) is None) == has_corpus
    assert (find_evaluation(run_dir, run, more, corpus) is None) == has_corpus
    assert (find_evaluation(run_dir, run, many, corpus) is None) == has_corpus
    shutil.copyfile(whole, run_evaluation._path(run_dir, run, many))  # a limit beyond the end of the split
    found = find_evaluation(run_dir, run, many, corpus)
    assert found is not None
    assert found["num_units"] == num_codes


@pytest.mark.parametrize("what", ["step", "weights", "config", "corpus"])
def test_a_stale_result_is_not_used(run_dir: Path, what: str) -> None:
    _, _, settings = evaluate_and_store(run_dir)
    run = load_run_model(run_dir)
    assert find_evaluation(run_dir, run, settings) is not None
    config, step, fingerprint = run.config, 7, run.state["corpus_fingerprint"]
    if what == "step":
        step = 9
    elif what == "weights":
        next(p for _, p in run.model.named_parameters()).data.add_(1.0)
    elif what == "config":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.1))
    else:
        fingerprint = "other"
    save_checkpoint(
        run_dir,
        config=config,
        model=run.model,
        optimizer=make_optimizer(run.model, config.optim),
        memories=[run.model.zero_memory(1)],
        state={"step": step, "corpus_fingerprint": fingerprint},
        world=World(0, 1, 0),
        is_best=True,
    )
    assert find_evaluation(run_dir, load_run_model(run_dir), settings) is None


def test_a_damaged_result_counts_as_missing(run_dir: Path) -> None:
    path, _, settings = evaluate_and_store(run_dir)
    run, whole = load_run_model(run_dir), path.read_text(encoding="utf-8")
    for cut in range(0, len(whole) - 1, 97):
        path.write_text(whole[:cut], encoding="utf-8")
        assert find_evaluation(run_dir, run, settings) is None
    found = json.loads(whole)
    changes = ({"blocks": []}, {"nll_nats": "2"}, {"nll_nats": 99.0}, {"format_version": 2}, {"num_units": 3})
    for change in changes:
        path.write_text(json.dumps(found | change), encoding="utf-8")
        assert find_evaluation(run_dir, run, settings) is None
    path.write_text(json.dumps(found), encoding="utf-8")
    assert find_evaluation(run_dir, run, settings) == found


def test_what_cannot_be_written_leaves_nothing_and_says_so(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate_and_store(run_dir)
    assert list((run_dir / "evaluations").iterdir()) == []


def test_a_corpus_that_has_moved(run_dir: Path, tmp_path: Path) -> None:
    """Its results are found by its fingerprint; where codes are needed, the message says how to name it."""
    _, result, settings = evaluate_and_store(run_dir)
    (tmp_path / "corpus").rename(tmp_path / "moved")
    run = load_run_model(run_dir)
    found = find_evaluation(run_dir, run, settings)
    assert found is not None
    assert result.items() <= found.items()
    with pytest.raises(UserError, match=r"the corpus .*corpus, which is not there .* pass --corpus DIR"):
        run_corpus(run)
    moved = run_corpus(run, str(tmp_path / "moved"))
    assert find_evaluation(run_dir, run, settings, moved) == found


def test_lengths_of_0_are_lengths(run_dir: Path) -> None:
    """0 is a choice, not the absence of one."""
    path, result, _ = evaluate_and_store(run_dir, memory_length=0, compressed_memory_length=0)
    assert path.name == "valid-step_00000007-memory_length_0-compressed_memory_length_0.json"
    assert (result["protocol"]["memory_length"], result["protocol"]["compressed_memory_length"]) == (0, 0)
    _, cold, _ = evaluate_and_store(run_dir, num_lanes=3, warmup_seconds=0.0)
    assert cold["protocol"]["warmup_length"] == 0
    with pytest.raises(UserError, match="chunk_length: expected at least 1, got 0"):
        DynamicSettings(chunk_length=0)
    for limit in ({"max_seconds": 0.0}, {"max_codes": 0}):
        with pytest.raises(UserError, match=f"--{next(iter(limit)).replace('_', '-')}: expected"):
            evaluate_and_store(run_dir, **limit)


def test_the_precision_of_the_forward_pass_stands_in_the_protocol(run_dir: Path) -> None:
    """A run in bfloat16 validates under autocast, where the NLL is float32 all the same."""
    _, plain, _ = evaluate_and_store(run_dir)
    with torch.autocast("cpu", torch.bfloat16):
        _, mixed, _ = evaluate_and_store(run_dir)
    assert (plain["protocol"]["dtype"], plain["protocol"]["precision"]) == ("float32", "float32")
    assert (mixed["protocol"]["dtype"], mixed["protocol"]["precision"]) == ("float32", "bfloat16")
    with pytest.raises(UserError, match="precision is float32 against bfloat16"):
        require_alike({"plain": plain, "mixed": mixed})
    older = plain | {"protocol": {key: value for key, value in plain["protocol"].items() if key != "precision"}}
    require_alike({"plain": plain, "older": older})
    require_alike({"older": older, "plain": plain})


def test_bfloat16_is_a_protocol_of_its_own(run_dir: Path) -> None:
    exact = evaluate_and_store(run_dir)[1]
    path, report, settings = evaluate_and_store(run_dir, precision="bfloat16")
    assert path.stem.endswith("-precision_bfloat16")
    assert (exact["protocol"]["precision"], report["protocol"]["precision"]) == ("float32", "bfloat16")
    assert 0 < abs(report["nll_nats"] - exact["nll_nats"]) < 0.02
    run = load_run_model(run_dir)
    assert find_evaluation(run_dir, run, settings) != find_evaluation(run_dir, run, EvaluationSettings())
    with pytest.raises(UserError, match="precision"):
        require_alike({"exact": exact, "rounded": report})
