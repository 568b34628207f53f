"""Equality 4: a run that was stopped at any update and resumed is bit for bit the run that never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same_checkpoint, checkpoint_state, logged_values, tiny_run

from ct_audio.runs.config import RunConfig
from ct_audio.runs.metrics import read_metrics
from ct_audio.training import loop as train_module
from ct_audio.training.loop import train


class Killed(BaseException):
    """Stands for `kill -9`."""


def train_until(config: RunConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and end abruptly in the step after `step` steps, wherever the last checkpoint is."""
    original = train_module._forward_and_backward

    def forward_and_backward(session: Any, current: int) -> None:
        if current == step:
            raise Killed
        original(session, current)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_forward_and_backward", forward_and_backward)
        with pytest.raises(Killed):
            train(config)
    torch.manual_seed(12345)  # a new process knows nothing of this one's generators


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("compressive_transformer", {}),
        ("compressive_transformer", {"model__dropout": 0.1}),
        ("compressive_transformer", {"model__compression_loss": "none"}),
        pytest.param("transformer_xl", {"model__dropout": 0.1}, marks=pytest.mark.slow),
        ("wavenet", {"model__dropout": 0.1}),
    ],
)
def test_resume_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, settings: dict[str, Any]):
    changes: dict[str, Any] = settings | {
        "train__num_steps": 12,
        "train__precision": "float32",
        "train__log_every_steps": 5,
        "train__valid_every_steps": 6,
        "optim__update_period": {0: 1, 6: 2},
    }
    straight = tiny_run(tmp_path, model, name="straight", **changes)
    stopped = tiny_run(tmp_path, model, name="stopped", **changes)
    assert train(straight) == 0
    for step in (0, 5, 9):
        train_until(stopped, step, monkeypatch)
    assert train(stopped) == 0
    assert_same_checkpoint(straight, stopped)
    assert logged_values(straight) == logged_values(stopped)
    best = [checkpoint_state(config, "best")["step"] for config in (straight, stopped)]
    assert best[0] == best[1]


def test_resume_over_the_end_of_the_codes_and_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """1000 codes, 4 lanes of 250: a chunk of 48 crosses segments, documents and the end within 7 steps."""
    changes: dict[str, Any] = {
        "data__num_lanes": 4,
        "data__chunk_length": 48,
        "data__reset_memory_at_document": True,
        "train__num_steps": 10,
        "train__num_micro_batches": 2,
    }
    straight, stopped = tiny_run(tmp_path, name="straight", **changes), tiny_run(tmp_path, name="stopped", **changes)
    assert train(straight) == 0
    for step in (3, 7):
        train_until(stopped, step, monkeypatch)
    assert train(stopped) == 0
    assert_same_checkpoint(straight, stopped)
    assert checkpoint_state(stopped)["stream"]["codes_per_lane"] == 480


def test_wall_seconds_go_on_over_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_run(tmp_path)
    train_until(config, 4, monkeypatch)
    before = read_metrics(config.run_dir)[-1]["wall_seconds"]
    assert train(config) == 0
    seconds = [line["wall_seconds"] for line in read_metrics(config.run_dir)]
    assert seconds == sorted(seconds)
    assert seconds[-1] > before
