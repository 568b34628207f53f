"""Dynamic evaluation against a plain loop: scored first, then learnt from; nothing later is ever known."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from handmade_runs import make_run, noise_corpus
from tiny import tiny_model

from ct_audio.common.errors import UserError
from ct_audio.evaluation.dynamic import DynamicSettings, learning_copy
from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.evaluation.stored import EvaluationSettings, evaluate_run, find_evaluation, store_evaluation
from ct_audio.models.state import detach_memory
from ct_audio.runs.open_run import load_run_model, run_corpus

START_CODE, CHUNK = 16, 16
SETTINGS = {
    "sgd": DynamicSettings(learning_rate=0.3, max_gradient_norm=0.7),
    "adam": DynamicSettings(optimizer="adam", learning_rate=0.01, decay=0.2),
}


def some_codes(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 32, length).astype(np.uint8)


def nll_by_code(model: Any, codes: np.ndarray, settings: DynamicSettings) -> torch.Tensor:
    found = torch.full((len(codes),), torch.nan, dtype=torch.float64)

    def collect(positions: torch.Tensor, nll: torch.Tensor) -> None:
        found[int(positions) : int(positions) + nll.shape[1]] = nll[0]

    learner, update = learning_copy(model, settings)
    evaluate_nll(learner, Stretch(codes, START_CODE, CHUNK), on_nll=collect, update=update)
    return found


@pytest.mark.parametrize("name", ["compressive_transformer", "wavenet"])
@pytest.mark.parametrize("optimizer", SETTINGS)
def test_equals_a_plain_loop(name: str, optimizer: str) -> None:
    settings, codes = SETTINGS[optimizer], some_codes(5 * CHUNK + 3)
    model: Any = tiny_model(name).double().eval()  # type: ignore[attr-defined]
    found = nll_by_code(model, codes, settings)
    learner = copy.deepcopy(model)
    parameters = dict(learner.named_parameters())
    moments = {key: (torch.zeros_like(p), torch.zeros_like(p)) for key, p in parameters.items()}
    memory, before, expected = learner.zero_memory(1), START_CODE, []
    for step, begin in enumerate(range(0, len(codes), CHUNK), start=1):
        targets = torch.tensor(codes[begin : begin + CHUNK].astype(np.int64))[None]
        inputs = torch.cat([torch.tensor([[before]]), targets[:, :-1]], dim=1)
        features, memory, losses = learner(inputs, memory)
        memory, before = detach_memory(memory), int(targets[0, -1])
        nll = learner.nll(features, targets)
        expected.append(nll.detach()[0])
        if targets.shape[1] < CHUNK:
            break  # nothing is scored after it
        learner.zero_grad()
        (nll.mean() + sum(losses.values())).backward()
        with torch.no_grad():
            for group in ("model", "compression"):
                keys = [key for key in parameters if (".compression" in key) == (group == "compression")]
                norm = sum(float((parameters[key].grad ** 2).sum()) for key in keys) ** 0.5
                for key in keys:
                    gradient = parameters[key].grad * min(1.0, settings.max_gradient_norm / (norm + 1e-6))
                    if optimizer == "adam":
                        first, second = moments[key]
                        first.mul_(0.9).add_(0.1 * gradient)
                        second.mul_(0.999).add_(0.001 * gradient**2)
                        gradient = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                    parameters[key] -= settings.learning_rate * gradient
                    start = dict(model.named_parameters())[key]
                    parameters[key] += settings.decay * (start - parameters[key])
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("at", [0, 1, CHUNK - 1, CHUNK, 3 * CHUNK - 1])
def test_no_score_depends_on_later_codes(at: int) -> None:
    """Changing a code changes nothing that was scored before it: bit for bit. What comes after is changed."""
    model: Any = tiny_model("compressive_transformer").double()  # type: ignore[attr-defined]
    codes = some_codes(4 * CHUNK)
    changed = codes.copy()
    changed[at] = (changed[at] + 5) % 32
    before, after = (nll_by_code(model, c, SETTINGS["sgd"]) for c in (codes, changed))
    assert torch.equal(before[:at], after[:at])
    assert (before[at + CHUNK :] != after[at + CHUNK :]).all()  # by what was learnt from it


def test_it_learns_a_habit_and_leaves_the_model_alone() -> None:
    model: Any = tiny_model("transformer_xl")
    kept = {key: p.clone() for key, p in model.state_dict().items()}
    codes = np.tile(np.arange(8, dtype=np.uint8), 40)
    found = nll_by_code(model, codes, DynamicSettings(learning_rate=0.5))
    static = evaluate_nll(model, Stretch(codes, START_CODE, CHUNK)).nll_nats
    assert found[-32:].mean() < 0.5 * found[:CHUNK].mean()
    assert found.mean() < static - 0.3
    assert all(torch.equal(p, kept[key]) for key, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_first_chunk_is_scored_as_without_learning() -> None:
    model: Any = tiny_model("compressive_transformer")
    codes = some_codes(CHUNK)
    static = evaluate_nll(model, Stretch(codes, START_CODE, CHUNK))
    assert nll_by_code(model, codes, SETTINGS["adam"]).mean().item() == pytest.approx(static.nll_nats, abs=1e-6)


@pytest.mark.parametrize("loss", ["attention_reconstruction", "autoencoding", "bptt", "none"])
def test_other_memory_lengths_than_in_training(loss: str) -> None:
    """No compressed memory at all too: then f_c has nothing to learn from, and stays as it was."""
    model = tiny_model("compressive_transformer", compression_loss=loss, memory_length=8)
    learner, update = learning_copy(model, SETTINGS["sgd"])
    before = {key: parameter.detach().clone() for key, parameter in learner.named_parameters()}
    evaluate_nll(learner, Stretch(some_codes(100), START_CODE, 24, compressed_memory_length=0), update=update)
    changed = {key for key, parameter in learner.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed == {key for key in before if ".compression" not in key}


def test_arguments_are_checked() -> None:
    model, codes = tiny_model("compressive_transformer"), some_codes(64)
    with pytest.raises(UserError, match="expected num_lanes = 1, got 2"):
        evaluate_nll(model, Stretch(codes, 0, 16, num_lanes=2), update=lambda _: None)
    with pytest.raises(UserError, match="no parameters to learn with"):
        learning_copy(tiny_model("linear_prediction"), DynamicSettings())
    changes: dict[str, Any]
    for changes in ({"learning_rate": 0.0}, {"learning_rate": np.inf}, {"decay": 1.0}, {"max_gradient_norm": -1.0}):
        with pytest.raises(UserError, match=next(iter(changes))):
            DynamicSettings(**changes)


def test_a_run_keeps_it_apart_from_the_usual_evaluation(tmp_path: Any) -> None:
    run_dir = make_run(noise_corpus(tmp_path / "corpus"), tmp_path / "runs", "compressive_transformer")
    run = load_run_model(run_dir)
    settings = EvaluationSettings(dynamic=DynamicSettings(learning_rate=0.1, chunk_length=32), max_codes=200)
    report, blocks = evaluate_run(run, run_corpus(run), settings, progress=None)
    assert report["protocol"]["chunk_length"] == 32
    assert report["protocol"]["dynamic"]["learning_rate"] == 0.1
    path = store_evaluation(run_dir, run, settings, report, blocks)
    assert path.name == "valid-step_00000007-max_codes_200-dynamic_sgd-0.1-norm_1-decay_0-chunk_32.json"
    assert find_evaluation(run_dir, run, settings) is not None
    assert find_evaluation(run_dir, run, EvaluationSettings(max_codes=200)) is None
    usual, _ = evaluate_run(run, run_corpus(run), EvaluationSettings(max_codes=200), progress=None)
    assert "dynamic" not in usual["protocol"]
    assert usual["nll_nats"] != report["nll_nats"]
