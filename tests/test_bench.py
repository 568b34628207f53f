"""Speed: every measurement runs on tiny recipes and says what it measured; no test looks at a time."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from handmade_runs import ROOT, Output, Patch, Tool, refusal, tool
from tiny import tiny_model
from tiny_runs import tiny_run

from ct_audio.commands.bench import WHAT
from ct_audio.experiments import speed
from ct_audio.runs.config import config_to_yaml


@pytest.fixture
def bench(monkeypatch: Patch) -> Tool:
    monkeypatch.setattr(speed, "SAMPLED_CODES", 4)
    monkeypatch.setattr(speed, "STEP_PERIODS", 2)
    monkeypatch.setattr(speed, "_LATE_WINDOWS", 3)
    monkeypatch.setattr(speed, "_first_calls", lambda *_: (2.0, 1.0))  # it compiles: see the slow test
    monkeypatch.setitem(sys.modules, speed._PYPI_PACKAGE, None)
    return tool("bench", monkeypatch)


def sampling_cases() -> list[str]:
    """What is measured of a model that both steppers know."""
    both = [f"{stepper}, {when}" for stepper in ("eager", "compiled") for when in ("first codes", "memories full")]
    lanes = [
        f"{num} lanes, {how}"
        for num, most in ((4, 4), (16, 8))
        for how in ("one after another", f"{most} side by side")
    ]
    lanes += ["4 lanes, 2 side by side, 2 threads", "16 lanes, 8 side by side, 2 threads"]
    cases = [*both, "eager, 4 lanes", "eager, 16 lanes", *(f"compiled, {case}" for case in lanes)]
    return [*cases, "compiled, window 1 of full memories", "compiled, window 3"]


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
        *[
            ("sample", f"{name}, {case}")
            for name in ("compressive_transformer", "wavenet")
            for case in sampling_cases()
        ],
    ]
    assert all(row["codes_per_second"] > 0 and row["ratio"] > 0 for row in report["rows"])
    assert all(math.isfinite(fact["value"]) for fact in report["facts"])  # differences of times, some of them tiny
    memory = {fact["case"]: fact["value"] for fact in report["facts"] if fact["unit"] == "MiB"}
    assert memory.keys() == {"compressive_transformer", "wavenet"}
    assert min(memory.values()) > 0.1
    found = [fact["quantity"] for fact in report["facts"] if fact["case"] == "compressive_transformer"]
    for stepper in ("eager", "compiled"):
        assert f"{stepper}, longest step : median step" in found
        assert f"{stepper}, last step of a window : first step" in found
    assert {"compiled, share of the machine's bandwidth", "compiled, share of the machine's arithmetic"} < set(found)
    text = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "| wavenet | compiled, first call of a process, with the cache | 1 s |" in text
    assert "| chunk | compressive_transformer, chunk at once |" in text
    assert "--lanes 2" in text


def test_what_does_not_fit_is_one_line(tmp_path: Path, bench: Tool, monkeypatch: Patch, capsys: Output) -> None:
    assert "none.yaml" in refusal(capsys, bench, tmp_path / "none.yaml")
    assert "expected 1 to" in refusal(capsys, bench, ROOT / "recipes/kathleen/wavenet_small.yaml", "--rounds", 0)
    recipe = tmp_path / "wavenet.yaml"
    recipe.write_text(config_to_yaml(tiny_run(tmp_path, "wavenet")), encoding="utf-8")
    monkeypatch.setattr(speed, "compare", lambda *_: pytest.fail("it is said before anything is measured"))
    assert "--what chunk: none of the recipes" in refusal(capsys, bench, recipe, "--what", "train", "chunk")


def test_work_of_a_code_is_that_of_every_weight_it_needs_and_every_row_it_sees() -> None:
    model = tiny_model("wavenet")
    weights = sum(p.numel() for p in model.parameters()) - model.vocab_size * model.config.width  # of the table a row
    assert speed.work_of_a_code(model) == (4 * weights, weights)
    model = tiny_model("compressive_transformer")
    config, groups = model.config, model.gradient_groups()
    f_c = sum(p.numel() for p in groups["compression"])
    weights = sum(p.numel() for p in groups["model"]) - model.vocab_size * config.width + f_c / config.compression_rate
    rows = config.num_layers * (config.window_length + config.memory_length + config.compressed_memory_length)
    num_bytes, products = speed.work_of_a_code(model)
    assert model.attention_cost == rows
    assert num_bytes == 4 * (weights + rows * (2 * config.width + config.position_width))
    assert products == weights + rows * (2 * config.width + config.num_heads * config.position_width)


def test_training_of_the_package_of_others(tmp_path: Path, monkeypatch: Patch) -> None:
    """Window after window, with the memories that came back; its loss beside the NLL reaches the weights."""

    class Network(torch.nn.Module):
        def __init__(self, **sizes: Any) -> None:
            super().__init__()
            self.sizes, self.seen = sizes, []
            self.table = torch.nn.Embedding(sizes["num_tokens"], sizes["num_tokens"])

        def forward(self, codes: torch.Tensor, memories: Any) -> Any:
            self.seen.append((codes.shape, memories))
            return self.table(codes), len(self.seen), torch.zeros(1, requires_grad=True)

    made: list[Network] = []

    def network(**sizes: Any) -> Network:
        made.append(Network(**sizes))
        return made[-1]

    monkeypatch.setitem(sys.modules, speed._PYPI_PACKAGE, SimpleNamespace(CompressiveTransformer=network))
    config = tiny_run(tmp_path, "compressive_transformer")
    step = speed._training_of_others(config, 3, gated=True)
    assert step is not None
    before, window = made[0].table.weight.detach().clone(), config.model.window_length
    assert step() == 3 * config.data.chunk_length
    num_windows = config.data.chunk_length // window
    assert made[0].seen == [((3, window), memories) for memories in [None, *range(1, num_windows)]]
    assert not torch.equal(made[0].table.weight, before)
    assert made[0].sizes["gru_gated_residual"]


def test_generate_of_the_package_of_others(tmp_path: Path, monkeypatch: Patch, capsys: Output) -> None:
    """It gets a model's sizes, memory that fills, and a window to make; where it is missing, that is said."""
    made: list[Any] = []

    class Wrapper:
        def __init__(self, net: Any) -> None:
            self.net = net

        def eval(self) -> "Wrapper":
            return self

        def generate(self, start: torch.Tensor, length: int) -> torch.Tensor:
            made.append((self.net, start.shape, length))
            return start

    def network(**sizes: Any) -> dict[str, Any]:
        return sizes

    package = SimpleNamespace(CompressiveTransformer=network, AutoregressiveWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, speed._PYPI_PACKAGE, package)
    config = tiny_run(tmp_path, "compressive_transformer")
    run = speed._generate_of_others(config)
    assert run is not None
    assert run() == config.model.window_length
    sizes, shape, length = made[0]
    assert (sizes["dim"], sizes["depth"], sizes["seq_len"]) == (
        config.model.width,
        config.model.num_layers,
        config.model.window_length,
    )
    assert shape[1] >= config.model.memory_length + 4 * sizes["cmem_len"]
    assert length == config.model.window_length
    assert speed._generate_of_others(tiny_run(tmp_path, "wavenet")) is None
    monkeypatch.setitem(sys.modules, speed._PYPI_PACKAGE, None)
    assert speed._generate_of_others(config) is None
    assert "is not installed: it is left out" in capsys.readouterr().err


@pytest.mark.slow
def test_first_call_without_a_cache_and_with_it(tmp_path: Path) -> None:
    recipe = tmp_path / "wavenet.yaml"
    recipe.write_text(config_to_yaml(tiny_run(tmp_path, "wavenet")), encoding="utf-8")
    without, cached = speed._first_calls(str(recipe), [])
    assert 0 < cached < without
