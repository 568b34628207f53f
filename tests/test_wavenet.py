"""WaveNet against an independent convolution; its queues, document starts and configuration."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float, Int
from tiny import tiny_model
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.models import build_model
from ct_audio.models.state import detach_memory
from ct_audio.models.wavenet import Config, WaveNetMemory

VOCAB_SIZE = 32


def float64_wavenet(**changes: Any) -> Any:
    model = tiny_model("wavenet", **changes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_codes(length: int, *, seed: int = 0, lanes: int = 2) -> Int[Tensor, "B T"]:
    return torch.randint(VOCAB_SIZE, (lanes, length), generator=torch.Generator().manual_seed(seed))


def convolution_nll(model: Any, codes: Tensor, targets: Tensor, *, chunk_begins: int) -> Float[Tensor, "B T"]:
    """Oracle: `conv1d` over the whole stream with the inputs before the chunk detached; NLL of the chunk's targets."""
    stack = model.stack
    x, skip = model.front_end.table(codes).transpose(1, 2), 0
    for layer, dilation in enumerate(stack.dilations):
        heard = x
        if stack.config.norm_position == "pre":
            heard = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        earlier, own = heard[..., :chunk_begins].detach(), heard[..., chunk_begins:]
        padded = F.pad(torch.cat([earlier, own], dim=-1), (dilation, 0))
        kernels = [
            torch.stack([stack.past_weight[layer, half], stack.now_weight[layer, half]], dim=-1) for half in (0, 1)
        ]
        filtered = F.conv1d(padded, kernels[0], stack.gate_bias[layer, 0], dilation=dilation).tanh()
        gated = filtered * F.conv1d(padded, kernels[1], stack.gate_bias[layer, 1], dilation=dilation).sigmoid()
        skip = skip + F.conv1d(gated, stack.skip_weight[layer, :, :, None])
        if layer + 1 < len(stack.dilations):
            x = x + F.conv1d(gated, stack.residual_weight[layer, :, :, None])
    hidden = stack.hidden((skip + stack.skip_bias[:, None]).relu().transpose(1, 2)).relu()
    logits = model.head.projection(hidden[:, chunk_begins:])
    return -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


@pytest.mark.parametrize("norm_position", ["none", "pre"])
@pytest.mark.parametrize("chunk_begins", [0, 2, 40], ids=["first chunk", "after less than a dilation", "later chunk"])
def test_equals_convolution_with_every_gradient(chunk_begins: int, norm_position: str) -> None:
    """The chunk is the window: gradients cross all of it, and end where it begins."""
    model = float64_wavenet(num_layers=8, layers_per_cycle=4, norm_position=norm_position)
    codes, targets = random_codes(chunk_begins + 25), random_codes(25, seed=1)
    memory = model.zero_memory(2)
    if chunk_begins:
        memory = detach_memory(model(codes[:, :chunk_begins], memory).memory)
    nll = model.nll(model(codes[:, chunk_begins:], memory).features, targets)
    expected = convolution_nll(model, codes, targets, chunk_begins=chunk_begins)
    torch.testing.assert_close(nll, expected, rtol=0, atol=1e-12)
    parameters = dict(model.named_parameters())
    got = torch.autograd.grad(nll.mean(), list(parameters.values()))
    wanted = torch.autograd.grad(expected.mean(), list(parameters.values()))
    for name, gradient, oracle in zip(parameters, got, wanted, strict=True):
        assert gradient.any(), name
        torch.testing.assert_close(gradient, oracle, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@given(cuts=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_chunks_of_any_lengths_equal_one(cuts: list[int]) -> None:
    """Shorter than a dilation too."""
    model = float64_wavenet(num_layers=5, layers_per_cycle=5)
    codes, memory, parts, begin = random_codes(sum(cuts)), model.zero_memory(2), [], 0
    with torch.no_grad():
        whole = model(codes, memory)
        for length in cuts:
            features, memory, _ = model(codes[:, begin : begin + length], memory)
            parts.append(features)
            begin += length
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.features, rtol=0, atol=1e-12)
    for got, expected in zip(memory.stack.queues, whole.memory.stack.queues, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm_position", ["none", "pre"])
@given(begins=st.lists(st.integers(0, 29), min_size=1, max_size=4, unique=True), cut=st.integers(1, 29))
def test_documents_are_fresh_streams_wherever_they_begin(norm_position: str, begins: list[int], cut: int) -> None:
    """Lane 0 has document starts anywhere and its stream is cut anywhere; lane 1 goes on undisturbed."""
    model = float64_wavenet(norm_position=norm_position)
    codes, begins = random_codes(30), sorted(begins)
    starts = torch.zeros_like(codes, dtype=torch.bool)
    starts[0, begins] = True
    with torch.no_grad():
        _, before, _ = model(random_codes(20, seed=1), model.zero_memory(2))
        first, memory, _ = model(codes[:, :cut], before, document_starts=starts[:, :cut])
        second, memory, _ = model(codes[:, cut:], memory, document_starts=starts[:, cut:])
        features = torch.cat([first, second], dim=1)
        for begin, end in zip(begins, [*begins[1:], 30], strict=True):
            fresh, fresh_memory, _ = model(codes[:1, begin:end], model.zero_memory(1))
            torch.testing.assert_close(features[:1, begin:end], fresh, rtol=0, atol=1e-12)
        going_on, going_on_memory, _ = model(codes, before)
    torch.testing.assert_close(features[1], going_on[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(features[0, : begins[0]], going_on[0, : begins[0]], rtol=0, atol=1e-12)
    for queue, fresh, undisturbed in zip(
        memory.stack.queues, fresh_memory.stack.queues, going_on_memory.stack.queues, strict=True
    ):
        torch.testing.assert_close(queue[:1], fresh, rtol=0, atol=1e-12)
        torch.testing.assert_close(queue[1], undisturbed[1], rtol=0, atol=1e-12)


def test_a_document_start_ends_even_nan() -> None:
    model = float64_wavenet()
    codes = random_codes(12)
    starts = torch.zeros_like(codes, dtype=torch.bool)
    starts[:, 3] = True
    queues = tuple(torch.full_like(queue, torch.nan) for queue in model.zero_memory(2).stack.queues)
    memory = model.zero_memory(2)._replace(stack=WaveNetMemory(queues))
    output = model(codes, memory, document_starts=starts)
    assert output.features[:, :3].isnan().any()
    assert output.features[:, 3:].isfinite().all()
    assert all(queue.isfinite().all() for queue in output.memory.stack.queues)


@pytest.mark.parametrize("norm_position", ["none", "pre"])
def test_steps_after_more_codes_than_any_dilation(norm_position: str) -> None:
    """`begin_steps` takes any number of codes: a model without windows cannot have too many."""
    model = float64_wavenet(norm_position=norm_position).eval()
    codes = random_codes(40)
    with torch.no_grad():
        expected = model(codes, model.zero_memory(2))
        state = model.begin_steps(model.zero_memory(2), codes[:, :21])
        for t in range(21, 40):
            features, state = model.step(codes[:, t], state)
            torch.testing.assert_close(features, expected.features[:, t], rtol=0, atol=1e-12)
    for got, queue in zip(state.memory.stack.queues, expected.memory.stack.queues, strict=True):
        torch.testing.assert_close(got, queue, rtol=0, atol=1e-12)


def test_features_of_a_step_survive_the_next() -> None:
    model = float64_wavenet().eval()
    state = model.begin_steps(model.zero_memory(2), random_codes(0))
    first, state = model.step(random_codes(1)[:, 0], state)
    kept = first.clone()
    model.step(random_codes(1, seed=1)[:, 0], state)
    assert torch.equal(first, kept)


def test_memory_holds_its_rows_and_nothing_else() -> None:
    """A queue that was a view would keep the whole chunk alive until the next."""
    model = float64_wavenet()
    for queue in model(random_codes(100), model.zero_memory(2)).memory.stack.queues:
        assert queue.untyped_storage().nbytes() == queue.numel() * queue.element_size()


def test_dropout_is_for_training_only() -> None:
    model = float64_wavenet(dropout=0.5)
    codes, memory = random_codes(20), model.zero_memory(2)
    assert not torch.equal(model(codes, memory).features, model(codes, memory).features)
    model.eval()
    without = float64_wavenet()
    without.load_state_dict(model.state_dict())
    assert torch.equal(model(codes, memory).features, without(codes, memory).features)


@pytest.mark.parametrize("norm_position", ["none", "pre"])
def test_bfloat16_autocast_keeps_memory_and_nll_in_float32(norm_position: str) -> None:
    model: Any = tiny_model("wavenet", norm_position=norm_position)
    codes, memory = random_codes(40), model.zero_memory(2)
    exact = model.nll(model(codes, memory).features, codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(codes, memory)
        nll = model.nll(output.features, codes)
    assert output.features.dtype == torch.bfloat16
    assert {queue.dtype for queue in output.memory.stack.queues} == {torch.float32}
    assert nll.dtype == torch.float32
    nll.mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(nll, exact, rtol=0, atol=0.1)
    assert nll.mean().item() == pytest.approx(exact.mean().item(), abs=0.02)


def test_paper_sized_configuration() -> None:
    """30 layers, dilations 1..512 three times, as many parameters as the Compressive Transformer's 40.1M."""
    with torch.device("meta"):
        model: Any = build_model(Config())
    assert model.stack.dilations == tuple(2**power for power in range(10)) * 3
    assert model.temporal_range == 3 * 1023
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(40.1e6, rel=0.02)


def test_a_new_model_knows_nothing() -> None:
    """The NLL of an untrained model is about that of equal probabilities, at every depth."""
    for num_layers in (2, 30):
        model: Any = build_model(Config(num_layers=num_layers, width=32, skip_width=32))
        codes, targets = torch.randint(256, (2, 2, 500)).unbind()
        nll = model.nll(model(codes, model.zero_memory(2)).features, targets).mean().item()
        assert nll == pytest.approx(torch.log(torch.tensor(256.0)).item(), abs=0.3)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 1},
        {"num_layers": 1},
        {"layers_per_cycle": 0},
        {"layers_per_cycle": 21},
        {"width": 0},
        {"skip_width": -4},
        {"dropout": 1.0},
    ],
    ids=str,
)
def test_configuration_errors_name_the_key(changes: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=f"model.{next(iter(changes))}: expected .*, got {next(iter(changes.values()))}"
    ):
        Config(**changes)


def test_memory_of_other_lanes_is_refused() -> None:
    model: Any = tiny_model("wavenet")
    with pytest.raises(UserError, match="expected queues"):
        model(random_codes(4), model.zero_memory(3))
    with pytest.raises(UserError, match="expected queues"):
        model.begin_steps(model.zero_memory(1), random_codes(0))
