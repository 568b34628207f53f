"""tools/evaluate.py on a run that is made by hand: numbers, exit statuses, errors."""

import json
import math
from pathlib import Path

import pytest
import torch
from handmade_runs import RATE, Output, Tool, make_run, refusal, speech_like, write_corpus
from tiny import TINY_MODELS

from ct_audio.data.codecs import MuLaw
from ct_audio.data.corpus import open_corpus
from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.models import build_model
from ct_audio.runs.config import config_from_dict


@pytest.mark.parametrize("name", ["wavenet", "compressive_transformer"])
def test_evaluate_prints_one_object(name: str, corpus: Path, tmp_path: Path, evaluate: Tool, capsys: Output) -> None:
    run = make_run(corpus, tmp_path, name)
    assert evaluate(run, "--json", "--split", "test") == 0
    report = json.loads(capsys.readouterr().out)
    split = open_corpus(corpus).split("test")
    assert (report["split"], report["num_units"]) == ("test", len(split.codes))
    assert report["seconds"] == pytest.approx(len(split.codes) / RATE)
    assert report["nll_bits"] == pytest.approx(report["nll_nats"] / math.log(2))
    assert (report["step"], report["model"]) == (7, TINY_MODELS[name]["name"])
    assert report["protocol"]["split"] == "test"
    assert report["protocol"]["num_units"] == report["num_units"]
    assert report["protocol"]["seconds"] == report["seconds"]
    assert report["protocol"]["num_lanes"] == 1
    torch.manual_seed(0)
    plain = {"name": "x", "model": TINY_MODELS[name] | {"vocab_size": 256}}
    model = build_model(config_from_dict(plain | {"data": {"corpus": "x", "chunk_length": 64}}))
    assert report["num_parameters"] == sum(p.numel() for p in model.parameters())
    if name == "compressive_transformer":
        expected = evaluate_nll(model, Stretch(split.codes, 128, 64)).nll_nats
        assert report["nll_nats"] == pytest.approx(expected, abs=1e-6)


def test_evaluate_defaults_and_settings(corpus: Path, tmp_path: Path, evaluate: Tool, capsys: Output) -> None:
    run = make_run(corpus, tmp_path, "compressive_transformer")
    assert evaluate(run) == 0
    text = capsys.readouterr().out
    assert "nll of valid" in text
    assert "memory_length 8" in text
    assert f"stored in {run / 'evaluations' / 'valid-step_00000007.json'}" in text
    lengths = ["--memory-length", 16, "--compressed-memory-length", 8]
    assert evaluate(run, "--json", "--lanes", 3, "--max-seconds", 0.02, *lengths) == 0
    protocol = json.loads(capsys.readouterr().out)["protocol"]
    assert (protocol["memory_length"], protocol["compressed_memory_length"]) == (16, 8)
    assert (protocol["num_lanes"], protocol["num_units"]) == (3, 480)
    reach = 3 * (16 + 2 * 8) + 8  # what three layers of memory can hold, and a window
    assert protocol["warmup_length"] == math.ceil(reach / 64) * 64
    assert evaluate(run, "--json", "--lanes", 3, "--warmup-seconds", 0) == 0
    assert json.loads(capsys.readouterr().out)["protocol"]["warmup_length"] == 0


def test_evaluate_refuses_another_corpus(corpus: Path, tmp_path: Path, evaluate: Tool, capsys: Output) -> None:
    run = make_run(corpus, tmp_path)
    other = write_corpus(tmp_path / "other", MuLaw(), [("valid", speech_like(500, 9))])
    assert "holds other codes" in refusal(capsys, evaluate, run, "--corpus", other)
    assert evaluate(run, "--corpus", other, "--allow-other-corpus", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_units"] == 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "dev"], "no split 'dev'; expected one of test, train, valid"),
        (["--memory-length", "8"], "wavenet"),
        (["--lanes", "0"], "num_lanes"),
        (["--max-seconds", "0"], "--max-seconds"),
        (["--max-seconds", "nan"], "--max-seconds"),
        (["--lanes", "2", "--warmup-seconds", "-1"], "--warmup-seconds"),
        (["--corpus", "nowhere"], "nowhere"),
    ],
)
def test_evaluate_errors_are_one_line(
    arguments: list[str], message: str, corpus: Path, tmp_path: Path, evaluate: Tool, capsys: Output
) -> None:
    assert message in refusal(capsys, evaluate, make_run(corpus, tmp_path), *arguments)
