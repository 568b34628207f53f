"""What a GPU is asked first, tried out on the CPU with small sizes: every stage, and going on with what is missing."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade_runs import Output, Patch, Tool, refusal, tool
from tiny_runs import tiny_run

from ct_audio.commands import gpu_check as command_module
from ct_audio.common.recipes import config_names
from ct_audio.experiments import gpu_check
from ct_audio.runs.config import config_to_yaml


@pytest.fixture
def check(tmp_path: Path, monkeypatch: Patch) -> Tool:
    """The command with small sizes and without the compiled stages; each runs on a few codes of the shipped models."""
    stages, read = gpu_check._stages, gpu_check.read_codes
    monkeypatch.setattr(
        gpu_check, "_stages", lambda plan: [item for item in stages(plan) if not item[0].endswith(", compiled")]
    )
    monkeypatch.setattr(gpu_check, "read_codes", lambda path, codec: read(path, codec)[:640])
    recipes = []
    for name in ("compressive_transformer", "wavenet"):
        recipes.append(tmp_path / f"{name}.yaml")
        config = tiny_run(tmp_path, name, train__precision="bfloat16" if name == "wavenet" else "float32")
        recipes[-1].write_text(config_to_yaml(config), encoding="utf-8")
    sizes = ["--case-seconds", 0.05, "--training-seconds", 0.3, "--peak-size", 64, "--device", "cpu"]
    run = tool("gpu_check", monkeypatch)
    return lambda *words: run(*recipes, "--out", tmp_path / "check", *sizes, *words)


@pytest.mark.parametrize(
    "models",
    [("compressive_transformer", "wavenet"), pytest.param(tuple(gpu_check.SMALL_MODELS), marks=pytest.mark.slow)],
)
def test_every_stage_runs_and_is_kept(
    tmp_path: Path, check: Tool, models: tuple[str, ...], monkeypatch: Patch, capsys: Output
) -> None:
    small = {name: gpu_check.SMALL_MODELS[name] for name in models}
    monkeypatch.setattr(gpu_check, "SMALL_MODELS", small)
    assert check("--minutes", 100) == 0
    report = json.loads((tmp_path / "check" / "gpu_check.json").read_text())
    stages = report["stages"]
    speeds = ["speed of compressive_transformer", "speed of wavenet"]
    assert list(stages) == ["machine", "equalities", "attention", *speeds, "sampling", "bfloat16", "training"]
    assert report["left_out"] == []
    held = [row["holds"] for row in stages["equalities"]["rows"]]
    assert held.count(True) == len(held) - 1 == 5 * len(small) + 4
    assert {row["equality"].split(".")[0] for row in stages["equalities"]["rows"]} >= set("12345678") | {"2b"}
    assert all("flash" in row["kernels"] for row in stages["attention"]["rows"])
    for name in speeds:
        (row,) = stages[name]["rows"]
        assert min(row["codes_per_second"], row["teraflops"]) > 0
        assert row["lanes"] == 2
    assert [row["lanes"] for row in stages["sampling"]["rows"]] == [1, 64, 1, 64]
    assert len(stages["bfloat16"]["rows"]) == 3
    assert all(abs(row["difference_nats"]) < 0.02 for row in stages["bfloat16"]["rows"])
    *lines, _ = stages["training"]["rows"]
    assert all(math.isfinite(line["nll/train_nats"]) for line in lines if "nll/train_nats" in line)
    text = (tmp_path / "check" / "gpu_check.md").read_text()
    assert gpu_check.NOT_YET in text
    assert "## equalities" in text

    monkeypatch.setattr(gpu_check, "_equalities", lambda *_: pytest.fail("it has been done"))
    del report["stages"]["sampling"]
    (tmp_path / "check" / "gpu_check.json").write_text(json.dumps(report))
    monkeypatch.setattr(gpu_check, "_sampling", lambda *_: [{"codes_per_second": 1.0}])
    assert check("--minutes", 100) == 0
    again = json.loads((tmp_path / "check" / "gpu_check.json").read_text())
    assert again["stages"] == report["stages"] | {"sampling": {"rows": [{"codes_per_second": 1.0}], "seconds": 0.0}}
    capsys.readouterr()


def test_what_is_wrong_is_said_and_the_next_stage_runs(tmp_path: Path, check: Tool, monkeypatch: Patch, capsys: Output):
    def wrong(*_: Any) -> Any:
        return [
            {"equality": "1. chunk = windows", "model": "x", "largest_difference": 1.0, "bound": 0.1, "holds": False}
        ]

    def broken(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    stages = [("equalities", (wrong, 1)), ("attention", (broken, 1)), ("long", (wrong, 3600))]
    monkeypatch.setattr(gpu_check, "_stages", lambda _: stages)
    assert check() == 1
    said = capsys.readouterr().out
    assert "wrong: attention: OutOfMemoryError: no room" in said
    assert "wrong: equalities: 1. chunk = windows, x" in said
    assert "left out for lack of time: long" in said


def test_sizes_are_checked(check: Tool, capsys: Output) -> None:
    assert "--minutes: expected a number above 0" in refusal(capsys, check, "--minutes", 0)
    assert set(command_module.RECIPES) <= set(config_names("kathleen"))
