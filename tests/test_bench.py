"""Speed: every measurement runs on tiny recipes and says what it measured; no test looks at a time."""

import json
from pathlib import Path

import pytest
from handmade_runs import ROOT, Output, Patch, Tool, refusal, tool
from tiny_runs import tiny_run

from ct_audio.commands.bench import WHAT
from ct_audio.experiments import speed
from ct_audio.runs.config import config_to_yaml


@pytest.fixture
def bench(monkeypatch: Patch) -> Tool:
    monkeypatch.setattr(speed, "SAMPLED_CODES", 4)
    return tool("bench", monkeypatch)


def sampling_cases(late: int, later: int) -> list[str]:
    """What is measured of a model that both steppers know, whose memories are full after `late` codes."""
    both = [
        f"{stepper}, {when}" for stepper in ("eager", "compiled") for when in ("first codes", f"after {late} codes")
    ]
    lanes = [
        f"{num} lanes, {how}"
        for num, most in ((4, 4), (16, 8))
        for how in ("one after another", f"{most} side by side")
    ]
    return [*both, *(f"compiled, {case}" for case in (f"after {later:,} codes", *lanes, "2 lanes in 2 threads"))]


def test_all_measurements(tmp_path: Path, bench: Tool, capsys: Output) -> None:
    recipes = []
    for name in ("compressive_transformer", "wavenet"):
        recipes.append(tmp_path / f"{name}.yaml")
        recipes[-1].write_text(config_to_yaml(tiny_run(tmp_path, name)), encoding="utf-8")
    assert tuple(speed.MEASUREMENTS) == WHAT
    arguments = [*recipes, "--what", *WHAT, "--rounds", 2, "--lanes", 2, "--out", tmp_path / "bench.md"]
    assert bench(*arguments, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rounds"], report["lanes"], report["threads"]) == (2, 2, 1)
    assert [(row["measurement"], row["case"]) for row in report["rows"]] == [
        ("train", "compressive_transformer"),
        ("train", "wavenet"),
        ("chunk", "compressive_transformer, window after window"),
        ("chunk", "compressive_transformer, chunk at once"),
        ("attention", "compressive_transformer, reference"),
        ("attention", "compressive_transformer, fused"),
        *[("sample", f"compressive_transformer, {case}") for case in sampling_cases(48, 6_448)],
        *[("sample", f"wavenet, {case}") for case in sampling_cases(19, 6_419)],
    ]
    assert all(row["codes_per_second"] > 0 and row["ratio"] > 0 for row in report["rows"])
    text = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "| chunk | compressive_transformer, chunk at once |" in text
    assert "--lanes 2" in text


def test_what_does_not_fit_is_one_line(tmp_path: Path, bench: Tool, monkeypatch: Patch, capsys: Output) -> None:
    assert "none.yaml" in refusal(capsys, bench, tmp_path / "none.yaml")
    assert "expected 1 to" in refusal(capsys, bench, ROOT / "recipes/kathleen/wavenet_small.yaml", "--rounds", 0)
    recipe = tmp_path / "wavenet.yaml"
    recipe.write_text(config_to_yaml(tiny_run(tmp_path, "wavenet")), encoding="utf-8")
    monkeypatch.setattr(speed, "compare", lambda *_: pytest.fail("it is said before anything is measured"))
    assert "--what chunk: none of the recipes" in refusal(capsys, bench, recipe, "--what", "train", "chunk")
