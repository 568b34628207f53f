"""Configuration: what is wrong is named, with what is allowed; what is right goes round."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ct_audio.agents import config as agents
from ct_audio.common.errors import UserError
from ct_audio.models import MODELS
from ct_audio.runs.config import (
    BOUNDS,
    DataConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    load_config,
    read_yaml,
)

YAML = """
name: test
data: {corpus: somewhere, chunk_length: 32, num_lanes: 4}
model: {name: compressive_transformer, num_layers: 3, width: 16, num_heads: 2, feedforward_width: 24,
  position_width: 4, window_length: 8, memory_length: 8, compressed_memory_length: 4, compression_rate: 2}
optim: {update_period: {0: 1, 60000: 4}}
"""


def load(tmp_path: Path, *overrides: str, text: str = YAML) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def test_values_defaults_and_overrides(tmp_path: Path):
    config = load(tmp_path, "train.num_steps=7", "optim.peak_learning_rate=1e-3", "runs_dir=elsewhere", "name=other")
    assert (config.name, config.data.num_lanes, config.model.width) == ("other", 4, 16)
    assert (config.train.num_steps, config.train.seed, config.optim.peak_learning_rate) == (7, 0, 1e-3)
    assert config.run_dir == Path("elsewhere/other")


def test_round_trip(tmp_path: Path):
    config = load(tmp_path, "data.reset_memory_at_document=true", "train.precision=float64")
    assert config_from_dict(config_to_dict(config)) == config
    assert load(tmp_path, text=config_to_yaml(config)) == config


def test_another_model_brings_its_own_keys(tmp_path: Path):
    config = load(tmp_path, "model={name: wavenet, num_layers: 4, width: 8}")
    assert (config.model.name, config.model.num_layers) == ("wavenet", 4)
    with pytest.raises(UserError, match=r"unknown key model\.num_heads"):
        load(tmp_path, "model.name=wavenet")


def test_update_period_replaces_and_never_merges(tmp_path: Path):
    assert load(tmp_path).optim.update_period == {0: 1, 60000: 4}
    assert load(tmp_path, "optim.update_period={0: 2}").optim.update_period == {0: 2}
    assert load(tmp_path, "optim.update_period={0: 8, 10: 1}").optim.update_period == {0: 8, 10: 1}
    without = YAML.replace("optim: {update_period: {0: 1, 60000: 4}}", "")
    assert load(tmp_path, text=without).optim.update_period == {0: 1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_stesp=3", r"unknown key train\.num_stesp; did you mean num_steps\? Allowed: .*num_steps"),
        ("optm.beta1=0.5", "unknown key 'optm'; did you mean optim"),
        ("model.widht=3", r"unknown key model\.widht; did you mean width"),
        ("model.name=transformer_xxl", "there is no model 'transformer_xxl'; expected one of .*wavenet"),
        ("model=3", r"expected model\.name"),
        ("train.num_steps=many", r"train\.num_steps: .*expected int, got 'many'"),
        ("train.num_steps=1.5", r"train\.num_steps: .*expected int"),
        ("train.num_steps=true", r"train\.num_steps: .*expected int, got True"),
        ("train.num_steps=null", r"train\.num_steps"),
        ("data.reset_memory_at_document=7up", r"data\.reset_memory_at_document: .*expected bool"),
        ("optim.update_period=4", r"optim\.update_period: .*expected dict\[int, int\], got 4"),
        ("optim.update_period={a: 1}", r"optim\.update_period"),
        ("train={a: 1}", r"unknown key train\.a"),
        ("train=[1]", "train: expected a mapping of keys"),
        ("train.device=gpu", r"train\.device: .*cuda"),
        ("train.precision=float16", r"train\.precision: .*bfloat16"),
        ("train.num_steps='7'", r"train\.num_steps: .*expected int, got '7'"),
        ("train.num_steps=010", r"train\.num_steps: .*expected int, got '010'"),
        ("train.num_steps=1:30", r"train\.num_steps: .*expected int, got '1:30'"),
        ("train.num_steps=1e3", r"train\.num_steps: .*expected int, got 1000\.0"),
        ("data.reset_memory_at_document=yes", r"data\.reset_memory_at_document: .*expected bool, got 'yes'"),
        ("data.reset_memory_at_document=1", r"data\.reset_memory_at_document: .*expected bool, got 1"),
        ("data.corpus=[7]", r"data\.corpus: .*expected str, got \[7\]"),
        ("data.corpus=", r"data\.corpus: .*expected str, got None"),
        ("optim.beta1=true", r"optim\.beta1: .*expected a finite number, got True"),
        ("optim.update_period={0: 1.0}", r"optim\.update_period: .*expected dict\[int, int\]"),
        ("optim.update_period={true: 1}", r"optim\.update_period: .*expected dict\[int, int\]"),
        ("train.num_steps=???", r"`\?\?\?` stands for a value that is missing"),
        ("train.num_steps=9223372036854775808", "a number has 64 bits; expected at most 63"),
        ('data.corpus="a\\0b"', "is no text"),
        ("train={seed: 1, seed: 2}", "the key 'seed' comes twice"),
        ("name=&a b", "anchors .* are not supported"),
        ("name=!!str b", "tags .* are not supported"),
        ("name=[a]", "name: expected a string"),
        ("name=a/b", "name: expected a plain directory name"),
        ("name=..", "name: expected a plain directory name"),
        ("train.num_steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("name=${oc.env:HOME}", "interpolation .* is not supported"),
        ("train.num_steps={", "not valid YAML"),
        ("name.a=1", "name is not a group of keys"),
        ("data.num_lanes=0", r"data\.num_lanes: expected a number from 1 to 1048576, got 0"),
        ("train.seed=-1", r"train\.seed: expected a number from 0 to "),
        ("optim.beta2=1", r"optim\.beta2: expected a number in \[0, 1\)"),
        ("optim.update_period={5: 1}", r"optim\.update_period: expected .* with step 0"),
        ("optim.update_period={0: 1, 100000000000: 2}", r"optim\.update_period: expected .* periods of 1 to"),
        ("optim.update_period={0: 0}", r"optim\.update_period: expected .* periods of 1 to 10000000000"),
        ("optim.peak_learning_rate=.nan", r"optim\.peak_learning_rate: expected a finite number, got nan"),
        (
            "data.chunk_length=33",
            r"data\.chunk_length = 33 is not a whole number of windows of model\.window_length = 8",
        ),
        ("train.num_micro_batches=3", r"data\.num_lanes = 4 is not divisible by train\.num_micro_batches = 3"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, override: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected model\.name"),
        ("- a\n- b\n", "expected a mapping of keys at the top level"),
        ("1", "expected a mapping of keys at the top level, got int"),
        ("# nothing\n", r"expected model\.name"),
        ("--- 1\n--- 2\n", "not valid YAML: expected a single document"),
        ("a" * 2**20 + "b", "at most 1048576 characters"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        (YAML.replace("somewhere", "${HOME}"), "interpolation"),
        (YAML.replace("corpus: somewhere, ", ""), r"data\.corpus is missing; expected str"),
        (YAML.replace("name: test", ""), "expected name"),
        (YAML + "extra: 1\n", "unknown key 'extra'"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, message: str):
    with pytest.raises(UserError, match=message):
        load(tmp_path, text=text)


NUMBERS = sorted(
    (f"{section}.{item.name}", item.type, name)
    for name in MODELS
    for section, cls in {
        "data": DataConfig,
        "optim": OptimConfig,
        "train": TrainConfig,
        "model": MODELS[name][0],
    }.items()
    for item in dataclasses.fields(cls)
    if item.type in (int, float)
)


NUMBERS_OF_AGENTS = {
    f"{section}.{item.name}"
    for section, classes in {
        "environment": agents.ENVIRONMENTS.values(),
        "model": agents.MEMORIES.values(),
        "actors": [agents.ActorsConfig],
        "learner": [agents.LearnerConfig],
        "train": [agents.AgentTrainConfig],
    }.items()
    for cls in classes
    for item in dataclasses.fields(cls)
    if item.type in (int, float)
}
"""Of the configuration of an agent's run, which tests/test_agent_runs.py loads."""


def test_the_table_of_bounds_has_every_number_and_no_other_key():
    assert BOUNDS.keys() == {key for key, _, _ in NUMBERS} | NUMBERS_OF_AGENTS


@pytest.mark.parametrize(("key", "kind", "model"), NUMBERS)
def test_no_number_beyond_its_bounds(tmp_path: Path, key: str, kind: type, model: str):
    text = YAML if model == "compressive_transformer" else YAML[: YAML.index("model:")] + f"model: {{name: {model}}}\n"
    low, high = BOUNDS[key]
    for value in (low - 1, high + 1 if kind is int else 2 * high):
        with pytest.raises(UserError, match=rf"{re.escape(key)}: expected a number from .*, got"):
            load(tmp_path, f"{key}={value}", text=text)
    for value in (".inf", "-.inf", ".nan"):
        with pytest.raises(UserError, match=rf"{re.escape(key)}: expected (a finite number|int), got"):
            load(tmp_path, f"{key}={value}", text=text)


@pytest.mark.parametrize("value", ["42", "0042", "1.50", "true", "1e3", "-1", "0x10"])
def test_text_may_look_like_a_number_in_an_override(tmp_path: Path, value: str):
    config = load(tmp_path, f"name={value}", f"data.corpus={value}", f"runs_dir= {value} ")
    assert (config.name, config.data.corpus, config.runs_dir) == (value, value, value)
    with pytest.raises(UserError, match=r"run\.yaml: name: expected a string, got 42"):
        load(tmp_path, text=YAML.replace("name: test", "name: 42"))


@pytest.mark.parametrize(
    ("overrides", "blamed"),
    [
        (["train.num_steps=many"], "override 'train.num_steps=many': "),
        (["train={num_steps: many}"], "override 'train={num_steps: many}': "),
        (["train.num_steps=many", "train={num_steps: few}"], "override 'train={num_steps: few}': "),
        (["train={seed: 3}", "train.num_steps=x", "train.num_steps=y"], "override 'train.num_steps=y': "),
        (["train.sed=1"], "override 'train.sed=1': unknown key"),
        (["tran.seed=1"], "override 'tran.seed=1': unknown key"),
        (["name=[1]"], "override 'name=[1]': name: "),
        (["model=3"], "override 'model=3': "),
        (["train=3"], "override 'train=3': "),
        (["train.seed=99999999999999999999"], "override 'train.seed=99999999999999999999': a number has 67 bits"),
        (["train.seed=3"], "{path}: model.num_layers: expected int, got 'x'"),
        (["train.num_layers=3", "model.num_layers=4"], "override 'train.num_layers=3': unknown key"),
    ],
)
def test_what_is_wrong_is_blamed_on_its_source(tmp_path: Path, overrides: list[str], blamed: str):
    text = YAML.replace("num_layers: 3", "num_layers: x") if "path" in blamed else YAML
    with pytest.raises(UserError) as caught:
        load(tmp_path, *overrides, text=text)
    assert str(caught.value).startswith(blamed.replace("{path}", str(tmp_path / "run.yaml")))


def test_files_that_are_not_there_or_no_text(tmp_path: Path):
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config(tmp_path / "binary.yaml")


def test_configurations_are_frozen(tmp_path: Path):
    config: Any = load(tmp_path)
    for section in (config, config.data, config.model, config.optim, config.train):
        with pytest.raises(AttributeError):
            section.name = "changed"


def test_numbers_are_read_as_they_are_written():
    text = (
        "[1e-3, 2E5, 1., .5, -1.5e+3, +3, 0, -7, 010, 1:30, 0x10, 1_000, yes, on, NO, 2026-01-01, true, FALSE, ~, .inf]"
    )
    assert read_yaml(text, "x") == [
        *(1e-3, 2e5, 1.0, 0.5, -1500.0, 3, 0, -7, "010", "1:30", "0x10", "1_000", "yes", "on", "NO", "2026-01-01"),
        *(True, False, None, float("inf")),
    ]


@pytest.mark.parametrize(
    "text", ["1e-3", "1", "010", "1:30", "yes", "null", "~", "true", "0x10", "2026-01-01", ".inf", "a: b", "#", "é"]
)
def test_text_that_looks_like_something_else_goes_round(tmp_path: Path, text: str):
    config = load(tmp_path, f"data.corpus='{text}'")
    assert config.data.corpus == text
    written = config_to_yaml(config)
    assert load(tmp_path, text=written) == config
    assert yaml.safe_load(written)["data"]["corpus"] == text  # other programs, by YAML 1.1


@pytest.mark.timeout(5)
@pytest.mark.parametrize("opening", ["[", '{"a":', "- ", "? "])
def test_a_deep_nest_is_refused_at_once(tmp_path: Path, opening: str):
    with pytest.raises(UserError, match="nested deeper than 50"):
        load(tmp_path, text=opening * 150_000)
    assert read_yaml("[" * 50 + "]" * 50, "x") is not None
