"""Every recipe's YAMLs: complete, loadable, named as their file, and of one size a set."""

import dataclasses
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny import as_module

from ct_audio.config import load_config
from ct_audio.models import build_model

RECIPES = Path(__file__).parents[1] / "recipes"
YAMLS = sorted(RECIPES.glob("*/*.yaml"))
SIZES = {
    "paper": (38e6, 42e6),
    "small": (0.3e6, 1e6),
    "demo": (0.1e6, 0.3e6),
    "ablation": (0.05e6, 0.3e6),
    "linear": (0, 0),
}


def kind(path: Path) -> str:
    """The set within its recipe that a YAML belongs to."""
    first, last = path.stem.split("_")[0], path.stem.split("_")[-1]
    return first if first in ("demo", "linear", "ablation") else "small" if last == "small" else "paper"


SETS = sorted({(path.parent, kind(path)) for path in YAMLS})


def identity(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def num_parameters(path: Path) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in as_module(build_model(load_config(path))).parameters())


def test_there_are_recipes() -> None:
    assert {"espeak", "folder", "kathleen"} <= {path.parent.name for path in YAMLS}


@pytest.mark.parametrize("path", YAMLS, ids=identity)
def test_yaml_is_complete_and_says_how_to_run_it(path: Path) -> None:
    config, text = load_config(path), path.read_text(encoding="utf-8")
    assert config.name == f"{path.parent.name}_{path.stem}"
    assert text.startswith("# ")
    assert f"python tools/train.py recipes/{path.parent.name}/{path.name}" in text
    written = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(written, dict)
    assert written["model"].keys() == {field.name for field in dataclasses.fields(config.model)}
    assert written["data"].keys() == {field.name for field in dataclasses.fields(config.data)}


@pytest.mark.parametrize(("folder", "name"), SETS, ids=lambda value: getattr(value, "name", str(value)))
def test_models_of_a_set_are_of_one_size_and_trained_alike(folder: Path, name: str) -> None:
    paths = [path for path in YAMLS if path.parent == folder and kind(path) == name]
    sizes = {path.stem: num_parameters(path) for path in paths}
    least, most = SIZES[name]
    assert least <= min(sizes.values())
    assert max(sizes.values()) <= most
    assert max(sizes.values()) <= 1.05 * min(sizes.values()), sizes
    configs = [load_config(path) for path in paths]
    for config in configs[1:]:  # the same codes, schedule and steps: curves may be compared
        assert config.data == configs[0].data
        assert config.optim == configs[0].optim
        assert config.train == configs[0].train
