"""Every model on a pretended CUDA device: nothing is mixed, nothing waits for the device unseen, numbers are the CPU's.

What is measured on a real GPU is in `tools/gpu_check.py`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import every_trained_model, random_codes
from pretended_cuda import CUDA, PretendedCuda, Waits, pretended, to_cuda
from tiny import TINY_MODELS, tiny_model
from tiny_runs import checkpoint_tensors, tiny_run
from torch._subclasses.fake_tensor import FakeTensorMode

from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.models.interface import clip_gradients
from ct_audio.models.state import detach_memory
from ct_audio.runs.config import OptimConfig
from ct_audio.sampling.sampler import Sampler, draw_codes
from ct_audio.training import loop as train_module
from ct_audio.training import session as session_module
from ct_audio.training.loop import train
from ct_audio.training.schedules import make_optimizer


@pytest.fixture
def pretending() -> Iterator[Waits]:
    """Within the test there is a CUDA device."""
    with pretended() as found:
        yield found


OWN_WAITS = {
    "prediction": ("follow", "linear prediction runs on the CPU"),
    "adaptive": ("nonzero", "how many codes of a chunk a band of the vocabulary has"),
}
"""What a part of a model waits for at every call, and why; the others wait for nothing."""


def expected_waits(name: str) -> set[str]:
    parts = [part for part in OWN_WAITS if name.endswith(f"_{part}")]
    return {OWN_WAITS[part][0] for part in parts}


def some_steps(model: Any, device: torch.device) -> list[torch.Tensor]:
    """Three chunks, an update after each: the NLL and the norms of gradients."""
    optimizer, memory, outputs = make_optimizer(model, OptimConfig()), model.zero_memory(2), []
    codes = random_codes(49).to(device, non_blocking=True)
    for begin in (0, 16, 32):
        inputs, targets = codes[:, begin : begin + 16], codes[:, begin + 1 : begin + 17]
        features, memory, losses = model(inputs, memory)
        nll = model.nll(features, targets)
        torch.stack([nll.mean(), *losses.values()]).sum().backward()
        memory = detach_memory(memory)
        outputs += [nll.detach(), *clip_gradients(model.gradient_groups(), 0.1).values()]
        optimizer.step()
        model.after_update()
        optimizer.zero_grad()
    return outputs


def both(name: str) -> tuple[Any, Any]:
    torch.manual_seed(3)
    on_cpu = tiny_model(name)
    torch.manual_seed(3)
    return on_cpu, to_cuda(tiny_model(name))


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert isinstance(found, PretendedCuda)
    return torch.equal(found.inner, expected)


@every_trained_model
def test_training_steps_wait_for_nothing(name: str, pretending: Waits) -> None:
    on_cpu, on_cuda = both(name)
    pretending.found.clear()
    found = some_steps(on_cuda, CUDA)
    assert pretending.found.keys() == expected_waits(name), pretending.found
    for ours, theirs in zip(found, some_steps(on_cpu, torch.device("cpu")), strict=True):
        assert same(ours, theirs)
    for ours, theirs in zip(on_cuda.parameters(), on_cpu.parameters(), strict=True):
        assert same(ours.detach(), theirs.detach())


@pytest.mark.parametrize("name", TINY_MODELS)
def test_evaluation_and_sampling_are_the_cpus(name: str, pretending: Waits) -> None:
    """With documents, a memory that fills, steps over the end of windows, a prime, top-k and top-p."""
    on_cpu, on_cuda = both(name)
    codes = random_codes(100, seed=1)
    offsets = np.array([0, 13, 60])
    stretch = Stretch(codes[0].numpy(), 16, 16, offsets, reset_memory_at_document=True, num_lanes=2)
    expected = evaluate_nll(on_cpu, stretch, progress=None)
    found = evaluate_nll(on_cuda, stretch, progress=None)
    assert found.nll_nats == expected.nll_nats
    drawn, log_probabilities = [], []
    for model in (on_cpu, on_cuda):
        settings = {"top_k": 20, "top_p": 0.9, "prime": codes[:, :11].expand(2, -1), "stepper": "eager"}
        sampler = Sampler(model, num_lanes=2, seed=0, start_code=16, **settings)
        parts = list(sampler.blocks(20, seconds=1.0))
        drawn.append(torch.cat([part[0] for part in parts], dim=1))
        log_probabilities.append(torch.cat([part[1] for part in parts], dim=1))
    assert same(drawn[1], drawn[0])
    assert same(log_probabilities[1], log_probabilities[0])


@pytest.mark.parametrize("name", [name for name in TINY_MODELS if not name.startswith("linear_prediction")])
def test_a_step_waits_for_nothing(name: str, pretending: Waits) -> None:
    _, model = both(name)
    codes, uniforms = random_codes(24).to(CUDA, non_blocking=True), torch.rand(2, dtype=torch.float64)
    uniforms = uniforms.to(CUDA, non_blocking=True)
    with model.evaluation_mode(), torch.inference_mode():
        state = model.begin_steps(model.zero_memory(2), codes[:, :3])
        pretending.found.clear()
        for column in codes.unbind(1):
            features, state = model.step(column, state)
            draw_codes(model.log_probabilities(features), uniforms, temperature=0.9, top_k=20, top_p=0.9)
    assert pretending.found.keys() == expected_waits(name), pretending.found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("compressive_transformer", "wavenet_prediction") else pytest.mark.slow)
        for name in TINY_MODELS
    ],
)
def test_a_whole_run_is_the_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretending: Waits, name: str) -> None:
    """Training, validation, samples, checkpoints, resumption; only where the loop looks does it wait for the device."""
    looking = ("_look", "_validate", "_validate_whole_split", "_sample", "_save", "set_up")

    def allowing(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            with pretending.allowed():
                return function(*args, **kwargs)

        return called

    changes = {
        "train__log_every_steps": 4,
        "train__num_micro_batches": 2,
        "train__sample_seconds": 0.001,
        "train__precision": "float32",
    }
    if TINY_MODELS[name].get("compression_loss") == "bptt":
        changes["data__chunk_length"] = 32  # shorter ones do not reach f_c
    runs = []
    for device in ("cpu", "cuda"):
        with monkeypatch.context() as patch:
            for function in looking:
                patch.setattr(train_module, function, allowing(getattr(train_module, function)))
            patch.setattr(session_module, "choose_device", lambda *_, chosen=device, **__: torch.device(chosen, 0))
            patch.setattr(torch.cuda, "set_device", lambda _: None)
            for num_steps in (4, 6):
                every = 3 if device == "cuda" else 0  # on the CPU it would be another stepper
                settings = changes | {"train__num_steps": num_steps, "train__sample_every_steps": every}
                runs.append(tiny_run(tmp_path, name, name=device, **settings))
                assert train(runs[-1]) == 0
    if not TINY_MODELS[name]["name"].startswith("linear_prediction"):  # which is fitted, in no loop
        assert pretending.found.keys() == expected_waits(name), pretending.found
    expected, found = (checkpoint_tensors(run) for run in (runs[1], runs[3]))
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


@pytest.mark.parametrize("name", [name for name in TINY_MODELS if "prediction" not in name and "_adaptive" not in name])
def test_torchs_fake_tensors_agree(name: str) -> None:
    """They have no numbers at all: whatever asks for one, or makes a shape of one, raises."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        model = tiny_model(name)
        memory = model.zero_memory(2)
        for _ in range(3):
            features, memory, _ = model(torch.zeros(2, 16, dtype=torch.int64), memory)
            nll = model.nll(features, torch.zeros(2, 16, dtype=torch.int64))
        state = model.begin_steps(memory, torch.zeros(2, 3, dtype=torch.int64))
        for _ in range(8):
            features, state = model.step(torch.zeros(2, dtype=torch.int64), state)
        assert nll.device.type == model.log_probabilities(features).device.type == "cuda"


def test_what_would_fail_on_a_gpu_fails_here(pretending: Waits) -> None:
    ours, theirs = torch.zeros(3, device="cuda"), torch.zeros(3)
    with pytest.raises(RuntimeError, match="add: a CPU tensor"):
        torch.add(ours, theirs)
    with pytest.raises(TypeError, match="can't convert"):
        ours.numpy()
    assert not pretending.found
    for ask in (ours.sum().item, ours.tolist, ours.cpu, ours.nonzero, lambda: bool(ours.any())):
        pretending.found.clear()
        ask()
        assert pretending.found
    for ask in (lambda: ours[ours > 0], lambda: theirs.to(CUDA), lambda: torch.tensor([1.0], device=CUDA)):
        pretending.found.clear()
        ask()
        assert pretending.found
    pretending.found.clear()
    with contextlib.suppress(RuntimeError):
        ours[torch.zeros(2, dtype=torch.int64)]
    assert pretending.found
