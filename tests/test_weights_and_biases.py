"""train.logger = wandb, against a stand-in that notes what it is given; and nothing of it where it is not chosen."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from handmade_runs import Patch
from recordings import ROOT
from tiny_runs import tiny_run

from ct_audio.common.errors import UserError
from ct_audio.runs.config import RunConfig
from ct_audio.runs.weights_and_biases import ID_FILE
from ct_audio.training.loop import train


class Run:
    """What wandb.init returns."""

    def __init__(self, known: str | None) -> None:
        self.id, self.logged, self.is_finished = known or "abc123", [], False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def wandb(monkeypatch: Patch) -> Any:
    """A stand-in; `runs` has each run and the options that it was begun with."""
    module: Any = ModuleType("wandb")
    module.runs, module.Error = [], type("Error", (Exception,), {})
    module.Audio = lambda waveform, sample_rate: ("audio", len(waveform), sample_rate)
    module.Image = lambda figure: ("image", type(figure).__name__)

    def init(**options: Any) -> Run:
        module.runs.append((Run(options["id"]), options))
        return module.runs[-1][0]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def config_of(tmp_path: Path, num_steps: int = 4) -> RunConfig:
    sampling = {"train__sample_every_steps": 4, "train__sample_seconds": 0.01}
    return tiny_run(tmp_path, train__num_steps=num_steps, train__logger="wandb", **sampling)


def test_scalars_sounds_and_figures_go_there_and_a_resumed_run_goes_on(tmp_path: Path, wandb: Any) -> None:
    config = config_of(tmp_path)
    assert train(config) == 0
    (run, options) = wandb.runs[0]
    assert options["project"] == "ct_audio"
    assert options["name"] == config.name
    assert options["config"]["train.num_steps"] == 4
    assert options["id"] is None
    assert run.is_finished
    tags = {tag for values in run.logged for tag in values}
    assert {"nll/train_nats", "nll/valid_nats", "sample/0", "sample_spectrogram/0", "step"} <= tags
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    written = [line["nll/valid_nats"] for line in lines if "nll/valid_nats" in line]
    assert [values["nll/valid_nats"] for values in run.logged if "nll/valid_nats" in values] == written
    assert json.loads((config.run_dir / ID_FILE).read_text()) == {"id": "abc123"}
    assert train(config_of(tmp_path, num_steps=6)) == 0
    assert wandb.runs[1][1]["id"] == "abc123"


def test_who_is_not_logged_in_is_told_what_to_do(tmp_path: Path, wandb: Any) -> None:
    def fails(**_: Any) -> None:
        raise wandb.Error("api_key not configured (no-tty)")

    wandb.init = fails
    with pytest.raises(UserError, match=r"no-tty.*run: wandb login, or set WANDB_MODE=offline"):
        train(config_of(tmp_path))


def test_without_wandb_the_error_names_it(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train.logger = wandb: .*run: python -m pip install wandb"):
        train(config_of(tmp_path))


def test_nothing_of_it_is_loaded_where_it_is_not_chosen() -> None:
    code = "import sys; import ct_audio.training.loop; print('wandb' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
