"""Sweeps over memory lengths: what is scored, what is chosen, what is found again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from handmade_runs import Output, Patch, Tool, make_run, refusal

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json
from ct_audio.evaluation import memory_sweep
from ct_audio.evaluation.memory_sweep import sweep_memory
from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.runs.open_run import LoadedRun, load_run_model, run_corpus


@pytest.fixture
def run_dir(corpus: Path, tmp_path: Path) -> Path:
    """Its model has memory 8, compressed memory 4, rate 2, three layers and windows of 8."""
    return make_run(corpus, tmp_path / "runs", "compressive_transformer")


def sweep(run_dir: Path, run: LoadedRun, **changes: Any) -> dict[str, Any]:
    settings = {"memory_lengths": [0, 16], "compressed_memory_lengths": [4, 0, 4], "max_codes": 200}
    return sweep_memory(run_dir, run, run_corpus(run), **(settings | changes))


def test_every_pair_is_scored_and_the_best_is_tested(run_dir: Path) -> None:
    run = load_run_model(run_dir)
    corpus, lines = run_corpus(run), []
    report = sweep(run_dir, run, say=lines.append)
    pairs = [(row["memory_length"], row["compressed_memory_length"]) for row in report["rows"]]
    assert pairs == [(0, 4), (0, 0), (16, 4), (16, 0)]
    found = []
    for (memory_length, compressed), row in zip(pairs, report["rows"], strict=True):
        lengths = {"memory_length": memory_length, "compressed_memory_length": compressed}
        codes = corpus.split("valid").codes[:200]
        nll = evaluate_nll(run.model, Stretch(codes, 128, 64, **lengths)).nll_nats
        assert row["nll_nats"] == pytest.approx(nll, abs=1e-9)
        assert row["temporal_range"] == 3 * (memory_length + 2 * compressed)
        assert row["attention_cost"] == 3 * (8 + memory_length + compressed)
        assert row["num_units"] == 200
        assert not row["as_trained"]
        found.append(nll)
    best = pairs[found.index(min(found))]
    assert [row["is_best"] for row in report["rows"]] == [pair == best for pair in pairs]
    test = report["test"]
    protocol = test["protocol"]
    assert (protocol["memory_length"], protocol["compressed_memory_length"]) == best
    assert (test["split"], test["num_units"]) == ("test", corpus.split("test").num_codes)
    assert len(lines) == 5


def test_what_was_scored_is_found_again_and_what_is_new_is_scored(run_dir: Path, monkeypatch: Patch) -> None:
    run, scored = load_run_model(run_dir), []
    first = sweep(run_dir, run)
    real = memory_sweep.evaluate_run

    def count(run: Any, corpus: Any, settings: Any) -> Any:
        scored.append((settings.split, settings.memory_length, settings.compressed_memory_length))
        return real(run, corpus, settings)

    monkeypatch.setattr(memory_sweep, "evaluate_run", count)
    assert sweep(run_dir, run) == first
    assert scored == []
    wider = sweep(run_dir, run, memory_lengths=[0, 8, 16], compressed_memory_lengths=None, test_split=None)
    assert scored == [("valid", 8, 4)]
    assert [row["as_trained"] for row in wider["rows"]] == [False, True, False]
    assert wider["test"] is None


def test_what_cannot_be_is_refused_before_anything_is_scored(run_dir: Path, corpus: Path, tmp_path: Path) -> None:
    run = load_run_model(run_dir)
    for changes, message in (
        ({"memory_lengths": [8, 3]}, "not divisible"),
        ({"memory_lengths": [-8]}, "at least 0"),
        ({"test_split": "dev"}, "no split 'dev'"),
    ):
        with pytest.raises(UserError, match=message):
            sweep(run_dir, run, **changes)
    assert not (run_dir / "evaluations").exists()
    wavenet = make_run(corpus, tmp_path / "others")
    with pytest.raises(UserError, match="wavenet has no memory"):
        sweep(wavenet, load_run_model(wavenet))


def test_the_tool_sweeps(run_dir: Path, evaluate: Tool, capsys: Output, tmp_path: Path) -> None:
    arguments = [run_dir, "--sweep-memory", "0,8", "--sweep-compressed", "0,4", "--max-codes", 100]
    assert evaluate(*arguments, "--out", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "as trained" in text
    assert "test at the best: " in text
    place = tmp_path / "out" / "sweep-valid-step_00000007-max_codes_100"
    report = read_json(place.with_name(f"{place.name}.json"))
    lines = place.with_name(f"{place.name}.csv").read_text().splitlines()
    assert lines[0].split(",")[:2] == ["memory_length", "compressed_memory_length"]
    assert len(lines) == 1 + len(report["rows"]) == 5
    assert place.with_name(f"{place.name}.png").read_bytes().startswith(b"\x89PNG")
    assert evaluate(*arguments, "--dynamic", "sgd", "--by", "count") == 2
    assert "--dynamic, --by: not in a sweep" in capsys.readouterr().err
    assert evaluate(*arguments, "--no-test", "--json", "--out", tmp_path / "out") == 0
    assert '"test": null' in capsys.readouterr().out


def test_the_tool_tells_kinds_of_code_and_learns(run_dir: Path, evaluate: Tool, capsys: Output, tmp_path: Path) -> None:
    arguments = [run_dir, "--max-codes", 200, "--by", "count,level", "--out", tmp_path / "out"]
    assert evaluate(*arguments, "--dynamic", "adam", "--dynamic-learning-rate", 0.001) == 0
    text = capsys.readouterr().out
    assert "by level:" in text
    names = {
        path.name.removeprefix("valid-step_00000007-max_codes_200-dynamic_adam-0.001-norm_1-decay_0-")
        for path in (tmp_path / "out").iterdir()
    }
    assert names == {"by.json", "by.png", "by-count.csv", "by-level.csv"}
    error = refusal(capsys, evaluate, run_dir, "--by", "loudness")
    assert "--by loudness: expected out of count, share, window, level, voicing or all" in error
    assert torch.is_grad_enabled()
