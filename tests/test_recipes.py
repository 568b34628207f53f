"""Every recipe's YAMLs: complete, loadable, named as their file, as recipe_table.yaml says, and of one size a set."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ct_audio.models import build_model
from ct_audio.runs.config import load_config

RECIPES = Path(__file__).parents[1] / "recipes"
AGENTS = ("object_matching", "popgym")
"""Their YAMLs are of agents; tests/test_agent_runs.py compares them."""
YAMLS = sorted(path for path in RECIPES.glob("*/*.yaml") if path.parent.name not in AGENTS)
SIZES: dict[str, tuple[float, float]] = {
    "paper": (38e6, 42e6),
    "small": (0.3e6, 1e6),
    "prediction_paper": (38e6, 42e6),
    "prediction_small": (0.3e6, 1e6),
    "realtime": (0.45e6, 1e6),
    "demo": (0.1e6, 0.3e6),
    "ablation": (0.05e6, 0.3e6),
    "bptt_small": (0.3e6, 1e6),
    "linear": (0, 0),
}
SIZES_OF_TEXT: dict[tuple[str, str], tuple[float, float]] = {
    ("enwik8", "paper"): (240e6, 270e6),
    ("wikitext103", "paper"): (250e6, 280e6),
    ("pg19", "paper"): (470e6, 500e6),
    ("pg19", "1b_paper"): (0.9e9, 1.1e9),
    ("enwik8", "bptt_paper"): (240e6, 270e6),
    **{(folder, "small"): (0.3e6, 2e6) for folder in ("enwik8", "wikitext103", "pg19")},
}
"""Of the paper's, without f_c: its two models of text differ in nothing else."""


def kind(path: Path) -> str:
    """The set within its recipe that a YAML belongs to."""
    words = path.stem.split("_")
    if words[0] in ("demo", "linear", "ablation"):
        return words[0]
    if words[-1] == "realtime":
        return "realtime"
    size = "small" if words[-1] == "small" else "paper"
    special = {"bptt", "prediction", "1b"} & set(words)  # a double unroll, more lanes, a larger model
    return f"{special.pop()}_{size}" if special else size


TABLE: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("recipe_table.yaml").read_text())
TABLE |= {
    identity.replace("kathleen", recipe): {"base": identity}
    for identity in TABLE
    for recipe in ("espeak", "folder")
    if identity.startswith("kathleen/") and identity != "kathleen/ablation" and not identity.endswith("_realtime")
}

SPEECH_SETS = ("ljspeech", "libritts", "vctk")
TABLE |= {
    f"{recipe}/{name}": {"base": f"kathleen/{name}"}
    for recipe in SPEECH_SETS
    for name in (
        "linear_prediction_autocorrelation",
        *(
            f"{model}{part}"
            for model in ("compressive_transformer", "transformer_xl", "wavenet")
            for part in ("", "_small", "_prediction", "_prediction_small")
        ),
    )
}

SETS = sorted({(path.parent, kind(path)) for path in YAMLS})


def identity(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def derived(base: dict[str, Any], identity: str, differences: dict[str, Any]) -> dict[str, Any]:
    """What a YAML must say, by what another one says and by the table."""
    recipe, _, file = identity.partition("/")
    expected = base | {"name": f"{recipe}_{file}"}
    expected["data"] = base["data"] | {"corpus": f"data/{recipe}"}
    for section, changes in differences.items():
        if changes is None:
            del expected[section]
        elif section != "base":
            kept = {} if section == "model" and "name" in changes else expected[section]
            expected[section] = {key: value for key, value in (kept | changes).items() if value != "absent"}
    return expected


def differing(contents: dict[str, dict[str, Any]]) -> list[str]:
    """YAMLs that do not differ from their base as the table says."""
    return [
        identity
        for identity, differences in TABLE.items()
        if contents[identity] != derived(contents[differences["base"]], identity, differences)
    ]


def num_parameters(path: Path, *, without_compression: bool = False) -> int:
    with torch.device("meta"):
        model = build_model(load_config(path))
    left_out = model.gradient_groups().get("compression", []) if without_compression else []
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in left_out)


def test_there_are_recipes() -> None:
    assert {"espeak", "folder", "kathleen", "enwik8", "wikitext103", "pg19"} <= {path.parent.name for path in YAMLS}


@pytest.mark.parametrize("path", YAMLS, ids=identity)
def test_yaml_is_complete_and_says_how_to_run_it(path: Path) -> None:
    config, text = load_config(path), path.read_text(encoding="utf-8")
    assert config.name == f"{path.parent.name}_{path.stem}"
    assert text.startswith("# ")
    assert f"ct-audio train recipes/{path.parent.name}/{path.name}" in text
    written = read(path)
    assert written["model"].keys() == {field.name for field in dataclasses.fields(config.model)}
    assert written["data"].keys() == {field.name for field in dataclasses.fields(config.data)}


def test_yamls_differ_as_the_table_says_and_a_change_of_a_single_one_is_noticed() -> None:
    contents = {identity(path): read(path) for path in YAMLS}
    assert TABLE.keys() == contents.keys()
    assert differing(contents) == []
    for changed, content in contents.items():
        for section, values in content.items():
            for key in values if isinstance(values, dict) else [""]:
                another = values | {key: "another"} if isinstance(values, dict) else "another"
                assert differing(contents | {changed: content | {section: another}}), (changed, section, key)


@pytest.mark.parametrize(("folder", "name"), SETS, ids=lambda value: getattr(value, "name", str(value)))
def test_models_of_a_set_are_of_one_size_and_trained_alike(folder: Path, name: str) -> None:
    paths = [path for path in YAMLS if path.parent == folder and kind(path) == name]
    is_papers_text = (folder.name, name) in SIZES_OF_TEXT and name.endswith("paper")
    sizes = {path.stem: num_parameters(path, without_compression=is_papers_text) for path in paths}
    least, most = SIZES_OF_TEXT.get((folder.name, name)) or SIZES[name]
    assert least <= min(sizes.values())
    assert max(sizes.values()) <= most
    if name != "realtime":  # these are of one speed
        assert max(sizes.values()) <= 1.05 * min(sizes.values()), sizes
    configs = [load_config(path) for path in paths]
    for config in configs[1:]:  # the same codes, schedule and steps: curves may be compared
        assert config.data == configs[0].data
        assert config.optim == configs[0].optim
        assert config.train == configs[0].train


@pytest.mark.parametrize("folder", ["enwik8", "wikitext103", "pg19"])
def test_small_models_of_text_attend_to_as_many_rows(folder: str) -> None:
    paths = [path for path in YAMLS if path.parent.name == folder and kind(path) == "small"]
    assert {path.stem for path in paths} == {"compressive_transformer_small", "transformer_xl_small"}
    with torch.device("meta"):
        costs = {path.stem: build_model(load_config(path)).attention_cost for path in paths}  # type: ignore[attr-defined]
    assert len(set(costs.values())) == 1, costs


@pytest.mark.parametrize(("suffix", "factor"), [("", 4), ("_small", 2)])
def test_bptt_recipe_has_a_longer_unroll_and_as_many_codes_a_step(suffix: str, factor: int) -> None:
    twin = load_config(RECIPES / "enwik8" / f"compressive_transformer{suffix}.yaml")
    bptt = load_config(RECIPES / "enwik8" / f"compressive_transformer_bptt{suffix}.yaml")
    assert bptt.data.chunk_length == factor * twin.data.chunk_length
    assert factor * bptt.data.num_lanes == twin.data.num_lanes


def test_evaluation_lengths_of_the_paper_fit() -> None:
    """Lengths that the headers name and the paper's Supplementary Tables 8 and 9 found best."""
    lengths = {
        "enwik8/compressive_transformer": {"compressed_memory_length": 3072},
        "enwik8/transformer_xl": {"memory_length": 4096},
        "wikitext103/compressive_transformer": {"memory_length": 500, "compressed_memory_length": 1500},
    }
    for name, wanted in lengths.items():
        with torch.device("meta"):
            memory = build_model(load_config(RECIPES / f"{name}.yaml")).zero_memory(1, **wanted).stack
        for key, length in wanted.items():
            rows = memory.memory if key == "memory_length" else memory.compressed_memory
            assert {tensor.shape[1] for tensor in rows} == {length}
