"""The contract of DESIGN's models, run over every entry of `TINY_MODELS` in float64 (equalities 1, 2 and 7, and what
`interface.py` promises in prose). Document starts: `test_model_documents.py`.
"""

import math
from typing import Any

import pytest
import torch
from model_cases import (
    LANES,
    VOCAB_SIZE,
    assert_close,
    assert_same_memory,
    embedding_row,
    every_model,
    every_trained_model,
    every_transformer,
    float64_model,
    has_windows,
    random_codes,
    run_windows,
    same,
    window_of,
)
from tiny import TINY_MODELS, tiny_model
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.models import FRONT_ENDS, HEADS, MODELS, STACKS, SequenceModel
from ct_audio.models.composition import ComposedModel
from ct_audio.models.interface import UNLIMITED_RANGE
from ct_audio.models.state import detach_memory, map_memory, named_tensors


def loss_of(model: Any, codes: Tensor, targets: Tensor, memory: Any) -> tuple[Tensor, Any]:
    output = model(codes, memory)
    losses = [loss for _, loss in sorted(output.auxiliary_losses.items())]
    return model.nll(output.features, targets).mean() + sum(losses), output


def backward(loss: Tensor) -> None:
    if loss.requires_grad:  # not that of a model without parameters
        loss.backward()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient at all: {missing}"
    model.zero_grad()
    return found


def test_every_model_and_every_part_has_a_tiny_version() -> None:
    assert {plain["name"] for plain in TINY_MODELS.values()} == set(MODELS)
    composed = [model for model in map(tiny_model, TINY_MODELS) if isinstance(model, ComposedModel)]
    for part, registry in (("front_end", FRONT_ENDS), ("stack", STACKS), ("head", HEADS)):
        assert {type(getattr(model, part)) for model in composed} == set(registry.values())


@every_trained_model
def test_heads_are_float32_under_autocast(name: str) -> None:
    """The logits of all models alike, so that their NLL can be compared; features may be narrow."""
    model: Any = tiny_model(name)
    codes, targets = random_codes(2 * window_of(model)), random_codes(2 * window_of(model), seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        features = model(codes, model.zero_memory(LANES)).features
        nll, log_probabilities = model.nll(features, targets), model.log_probabilities(features)
    outside = features.float()
    assert nll.dtype == log_probabilities.dtype == torch.float32
    assert torch.equal(nll, model.nll(outside, targets))
    assert torch.equal(log_probabilities, model.log_probabilities(outside))


@every_model
def test_keeps_the_interface(name: str) -> None:
    model: Any = tiny_model(name)
    assert isinstance(model, SequenceModel)
    assert model.vocab_size == model.config.vocab_size == VOCAB_SIZE
    assert model.temporal_range > 0
    assert model.attention_cost >= 0
    groups = model.gradient_groups()
    assert set(groups) <= {"model", "compression"}
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@every_model
@pytest.mark.parametrize("warm", [False, True], ids=["from zeros", "warm"])
def test_chunk_of_windows_equals_windows_one_by_one(name: str, warm: bool) -> None:
    """Equality 1: outputs, memory, auxiliary losses and, with memories detached between windows, every gradient."""
    model = float64_model(name)
    k, window = 5, window_of(model)
    codes, targets = random_codes(k * window), random_codes(k * window, seed=1)
    memory = model.zero_memory(LANES)
    if warm:
        _, memory = run_windows(model, random_codes(4 * window, seed=2))
    loss, whole = loss_of(model, codes, targets, memory)
    backward(loss)
    whole_gradients = gradients(model)

    parts, losses = [], []
    for begin in range(0, k * window, window):
        piece = slice(begin, begin + window)
        loss, output = loss_of(model, codes[:, piece], targets[:, piece], memory)
        backward(loss / k)
        memory = detach_memory(output.memory)
        parts.append(output.features.detach())
        losses.append({key: value.detach() for key, value in output.auxiliary_losses.items()})
    assert_close(torch.cat(parts, dim=1), whole.features.detach())
    assert_same_memory(memory, detach_memory(whole.memory))
    assert whole.auxiliary_losses.keys() == losses[0].keys()
    for key, value in whole.auxiliary_losses.items():
        assert_close(value.detach(), torch.stack([part[key] for part in losses]).mean())
    if has_windows(model):  # otherwise the chunk is the window: gradients cross it, and test_wavenet.py checks them
        crossing = getattr(model.config, "compression_loss", "") == "bptt"  # reaches f_c from later windows of a chunk
        for key, gradient in gradients(model).items():
            if not (crossing and ".compression." in key):  # see test_compression.py
                assert_close(gradient, whole_gradients[key])


@every_transformer
@pytest.mark.parametrize("windows_of_memory", [0, 3])
def test_chunk_equals_windows_for_other_memory_lengths(name: str, windows_of_memory: int) -> None:
    model = float64_model(name)
    window = window_of(model)
    compressed = window if model.config.compressed_memory_length else 0
    memory = model.zero_memory(LANES, memory_length=windows_of_memory * window, compressed_memory_length=compressed)
    codes = random_codes(6 * window)
    features, last = run_windows(model, codes, memory)
    output = model(codes, memory)
    assert_close(output.features.detach(), features)
    assert_same_memory(detach_memory(output.memory), last)
    rows = [tensor for path, tensor in named_tensors(last) if tensor.ndim == 3 and "queues" not in path]
    shapes = {tuple(tensor.shape) for tensor in rows}
    assert {shape[1] for shape in shapes} - {0} == {windows_of_memory * window, compressed} - {0}
    assert not torch.allclose(run_windows(model, codes)[0][:, -1], features[:, -1])


@every_model
@pytest.mark.parametrize("remainder", [3, -1], ids=["mid-window", "last of a window"])
def test_steps_equal_forward(name: str, remainder: int) -> None:
    """Equality 2: a prime of whole windows, `begin_steps` with the rest, then steps over three window boundaries."""
    model = float64_model(name).eval()
    window = window_of(model)
    whole, remainder = 2 * window, remainder % window
    codes = random_codes(5 * window)
    with torch.no_grad():
        expected = model(codes, model.zero_memory(LANES))
        memory = model(codes[:, :whole], model.zero_memory(LANES)).memory
        state = model.begin_steps(memory, codes[:, whole : whole + remainder])
        stepped = []
        for t in range(whole + remainder, codes.shape[1]):
            features, state = model.step(codes[:, t], state)
            stepped.append(model.log_probabilities(features))
        expected_log_probabilities = model.log_probabilities(expected.features[:, whole + remainder :])
    assert_close(torch.stack(stepped, dim=1), expected_log_probabilities)
    assert_same_memory(state.memory, expected.memory)


@every_model
def test_steps_from_the_beginning_of_a_stream(name: str) -> None:
    model = float64_model(name).eval()
    codes = random_codes(window_of(model) + 2)
    with torch.no_grad():
        expected, _ = run_windows(model, codes)
        state, stepped = model.begin_steps(model.zero_memory(LANES), codes[:, :0]), []
        for t in range(codes.shape[1]):
            features, state = model.step(codes[:, t], state)
            stepped.append(features)
    assert_close(torch.stack(stepped, dim=1), expected)


@every_model
def test_clone_of_a_state_is_independent(name: str) -> None:
    model = float64_model(name).eval()
    window = window_of(model)
    codes, others = random_codes(2 * window + 2), random_codes(window, seed=1)
    with torch.no_grad():
        expected, _ = run_windows(model, codes)
        _, memory = run_windows(model, codes[:, :window])
        state = model.begin_steps(memory, codes[:, window : window + 2])
        branch = model.clone_state(state)
        for t in range(others.shape[1]):  # consumes the state; the branch must not see it
            _, state = model.step(others[:, t], state)
        for t in range(window + 2, 2 * window + 2):
            features, branch = model.step(codes[:, t], branch)
            assert_close(features, expected[:, t])


@every_model
def test_no_code_changes_what_is_said_before_it(name: str) -> None:
    """Equality 7, causality."""
    model = float64_model(name)
    window = window_of(model)
    _, memory = run_windows(model, random_codes(4 * window, seed=1))
    codes = random_codes(3 * window)
    with torch.no_grad():
        before = model(codes, memory).features
        for t in (0, window // 2, window - 1, window, 2 * window + 1, 3 * window - 1):
            changed = codes.clone()
            changed[:, t] = (changed[:, t] + 7) % VOCAB_SIZE
            after = model(changed, memory).features
            assert t == 0 or same(model, after[:, :t], before[:, :t])
            assert not same(model, after[:, t], before[:, t])


@every_model
def test_temporal_range_is_reached_and_not_exceeded(name: str) -> None:
    """Equality 7, range: of the first code of a late window, window by window and in one chunk alike."""
    model = float64_model(name)
    window, distance = window_of(model), model.temporal_range
    endless = distance == UNLIMITED_RANGE
    distance = 100 if endless else distance
    at = -(-(distance + 2) // window) * window  # the first window that starts late enough
    codes = random_codes(at + window)

    def said(codes: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            in_chunk = model(codes, model.zero_memory(LANES)).features
        return in_chunk[:, at], run_windows(model, codes)[0][:, at]

    expected = said(codes)

    def changes(far: int) -> list[bool]:
        changed = codes.clone()
        changed[:, at - far] = (changed[:, at - far] + 7) % VOCAB_SIZE
        return [not same(model, got, before) for got, before in zip(said(changed), expected, strict=True)]

    if getattr(model.config, "compression_function", "") == "most_used":
        # It keeps some of the oldest rows; which, was chosen by attention that saw older ones: that has no end.
        assert [True, True] in [changes(distance - later) for later in range(window)]
    elif name.endswith(("er_prediction", "t_prediction", "_autocorrelation")):  # float64 has forgotten before
        assert changes(distance + 1) == [False, False]
        assert changes(window + 4) == [True, True]
    else:
        assert changes(distance + 1) == [endless, endless]
        assert changes(distance) == [True, True]


@every_model
def test_nan_in_the_memory_of_a_lane_stays_in_the_lane(name: str) -> None:
    model = float64_model(name)
    window = window_of(model)
    _, memory = run_windows(model, random_codes(4 * window, seed=1))

    def poison(tensor: Tensor) -> Tensor:
        poisoned = tensor.clone()
        if tensor.is_floating_point():
            poisoned[0] = math.nan
        return poisoned

    codes = random_codes(3 * window)
    clean, bad = model(codes, memory), model(codes, map_memory(poison, memory))
    assert bad.features[0].isnan().any()
    assert torch.equal(bad.features[1], clean.features[1])
    for (key, got), (_, expected) in zip(named_tensors(bad.memory), named_tensors(clean.memory), strict=True):
        assert torch.equal(got[1], expected[1]), key
    with torch.no_grad():
        state = model.begin_steps(map_memory(poison, memory), codes[:, :1])
        stepped, _ = model.step(codes[:, 1], state)
    assert stepped[0].isnan().any()
    assert_close(stepped[1], clean.features[1, 1].detach())


@every_trained_model
def test_nan_from_a_code_stays_in_the_lane(name: str) -> None:
    model = float64_model(name)
    window = window_of(model)
    codes = random_codes(6 * window).clamp(max=VOCAB_SIZE - 2)
    clean, _ = run_windows(model, codes)
    codes[0, window + 1] = VOCAB_SIZE - 1
    with torch.no_grad():
        embedding_row(model, VOCAB_SIZE - 1).fill_(math.nan)
        chunk = model(codes, model.zero_memory(LANES)).features
    by_window, _ = run_windows(model, codes)
    for features in (by_window, chunk):
        assert features[0, window + 1 :].isnan().any()
        assert_close(features[1], clean[1])


@every_trained_model
def test_every_parameter_learns(name: str) -> None:
    """A gradient for each parameter from the first window on (DDP), and not all zeros after ceil(n_m / n_s) + 2."""
    model = float64_model(name)
    window = window_of(model)
    windows = -(-getattr(model.config, "memory_length", 0) // window) + 2
    memory = model.zero_memory(LANES)
    zero: list[str] = []
    length = window * getattr(model.config, "min_chunk_windows", 1)
    for index in range(windows):
        codes, targets = random_codes(length, seed=2 * index), random_codes(length, seed=2 * index + 1)
        loss, output = loss_of(model, codes, targets, memory)
        loss.backward()
        memory = detach_memory(output.memory)
        found = gradients(model)
        assert all(gradient.isfinite().all() for gradient in found.values())
        zero = [key for key, gradient in found.items() if not gradient.any()]
    assert not zero


@every_model
def test_gradients_do_not_cross_chunks(name: str) -> None:
    """The memory that comes in gets no gradient, even if the caller forgets to detach it."""
    model = float64_model(name)
    codes = random_codes(3 * window_of(model))
    memory = map_memory(
        lambda tensor: tensor.requires_grad_() if tensor.is_floating_point() else tensor, model.zero_memory(LANES)
    )
    backward(model.nll(model(codes, memory).features, codes).mean())
    assert all(tensor.grad is None or not tensor.grad.any() for _, tensor in named_tensors(memory))


@every_model
def test_zero_memory_is_zeros_with_the_lane_first(name: str) -> None:
    model: Any = tiny_model(name).double()
    tensors = dict(named_tensors(model.zero_memory(3)))
    assert tensors
    for key, tensor in tensors.items():
        assert tensor.shape[0] == 3, key
        assert not tensor.any(), key
        assert tensor.dtype in (torch.float64, torch.int64), key


@every_model
def test_shapes_never_change(name: str) -> None:
    model: Any = tiny_model(name)
    memory = model.zero_memory(LANES)
    expected = {key: (tensor.shape, tensor.dtype) for key, tensor in named_tensors(memory)}
    for index in range(5):
        codes = random_codes(window_of(model) * (1 + index % 2), seed=index)
        memory = detach_memory(model(codes, memory).memory)
        assert {key: (tensor.shape, tensor.dtype) for key, tensor in named_tensors(memory)} == expected


@every_model
def test_forward_keeps_no_state_and_leaves_its_arguments(name: str) -> None:
    model = float64_model(name)
    codes = random_codes(2 * window_of(model))
    _, memory = run_windows(model, codes)
    kept = map_memory(torch.clone, memory)
    with torch.no_grad():
        first = model(codes, memory).features
        model.begin_steps(memory, codes[:, : window_of(model) - 1])
        model(random_codes(window_of(model), seed=5), memory)
        assert torch.equal(model(codes, memory).features, first)
    assert_same_memory(memory, kept, tolerance=0)


@every_transformer
def test_shorter_last_window_is_scored_and_ends_the_stream(name: str) -> None:
    model = float64_model(name)
    window = window_of(model)
    codes = random_codes(4 * window)
    short = 3 * window + window // 2 + 1
    with torch.no_grad():
        expected = model(codes, model.zero_memory(LANES)).features[:, :short]
        output = model(codes[:, :short], model.zero_memory(LANES))
    assert_close(output.features, expected)
    with pytest.raises(UserError, match="final"):
        model(codes[:, :window], output.memory)
    with pytest.raises(UserError, match="final"):
        model.begin_steps(output.memory, codes[:, :1])


@every_model
def test_memory_lengths_are_arguments_or_refused(name: str) -> None:
    model = float64_model(name)
    if has_windows(model):
        with pytest.raises(UserError):
            model.zero_memory(1, memory_length=-1)
    else:
        with pytest.raises(UserError, match="memory length"):
            model.zero_memory(1, memory_length=8)
        with pytest.raises(UserError, match="compressed memory length"):
            model.zero_memory(1, compressed_memory_length=8)


@every_model
def test_nll_is_minus_the_log_probability_of_the_target(name: str) -> None:
    model = float64_model(name)
    codes, targets = random_codes(2 * window_of(model)), random_codes(2 * window_of(model), seed=1)
    features = model(codes, model.zero_memory(LANES)).features
    log_probabilities = model.log_probabilities(features)
    assert log_probabilities.shape == (*codes.shape, VOCAB_SIZE)
    assert_close(log_probabilities.exp().sum(-1), torch.ones(codes.shape, dtype=torch.float64))
    nll = model.nll(features, targets)
    assert_close(nll, -log_probabilities.gather(-1, targets[..., None])[..., 0])
    assert_close(model.nll(features[:, 3], targets[:, 3]), nll[:, 3])
