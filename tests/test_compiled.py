"""Stepping in machine code equals the model's own steps, for every model that offers it, at every place of a window."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from handmade_runs import Patch
from model_cases import assert_same_memory, every_model
from scipy.stats import chi2
from test_sample import START_CODE, reference_draw
from tiny import tiny_model
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.models import kernels
from ct_audio.models.heads import LogisticMixture
from ct_audio.models.state import map_memory
from ct_audio.sampling.sampler import Sampler, draw_codes, verify_steps

NOT_OFFERED = {
    "compressive_transformer_rotary": "rotary positions",
    "compressive_transformer_gru": "compression gru",
    "compressive_transformer_most_used": "compression most_used",
    "compressive_transformer_adaptive_span": "adaptive spans",
    "compressive_transformer_adaptive": "front end AdaptiveInput",
}
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None}


def lively(name: str, **changes: Any) -> Any:
    """A model in float32 whose parameters are away from zeros and ones."""
    model = tiny_model(name, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def compiled(name: str, **changes: Any) -> tuple[Any, Any]:
    """The model and its block sampler; the test is done where it offers none, as it should say."""
    model = lively(name, **changes)
    if name in NOT_OFFERED:
        with pytest.raises(UserError, match=f"knows no {NOT_OFFERED[name]}.*use the eager stepper"):
            model.block_sampler()
        pytest.skip("not offered")
    return model, model.block_sampler()


@torch.inference_mode()
def begun(model: Any, codes: Tensor) -> Any:
    """The step state after codes [B, R]."""
    whole = codes.shape[1] // model.window_length * model.window_length
    memory = model.zero_memory(len(codes))
    for begin in range(0, whole, model.window_length):
        memory = model(codes[:, begin : begin + model.window_length], memory).memory
    return model.begin_steps(memory, codes[:, whole:])


def uniforms(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


@every_model
def test_log_probabilities_are_those_of_the_forward_pass(name: str) -> None:
    """From any place of a window, over three more windows and more than the memories hold."""
    assert_equal_to_forward(*compiled(name))


@pytest.mark.parametrize("function", ["conv", "dilated_conv", "mean"])
def test_layers_may_have_rates_of_their_own(function: str) -> None:
    changes = {"compression_function": function, "compression_rate": [4, 2, 8], "norm_position": "pre"}
    assert_equal_to_forward(*compiled("compressive_transformer", **changes))


def assert_equal_to_forward(model: Any, stepper: Any) -> None:
    for num_primed in (0, 3, 8, 13, 41):
        prime = torch.randint(32, (2, num_primed))
        inputs = torch.cat([torch.full((2, 1), START_CODE), prime], dim=1)
        state, last, parts = stepper.begin(begun(model, inputs[:, :-1])), inputs[:, -1], []
        for length in (1, 6, 43):
            codes, logs, state = stepper.sample_block(last, state, uniforms(2, length), **PLAIN)
            parts.append((codes, logs))
            last = codes[:, -1]
        codes, logs = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        assert verify_steps(model, codes, logs, start_code=START_CODE, prime=prime) < 2e-5


@every_model
def test_states_are_converted_at_every_place_of_a_window(name: str) -> None:
    """What the kernels remember is what the model's own steps over the same codes do, and these can go on from it."""
    model, stepper = compiled(name)
    start = torch.full((2, 1), START_CODE)
    window = max(model.window_length, 8)
    for length in (1, 3, window - 1, window, window + 2, 2 * window + 5):
        codes, _, state = stepper.sample_block(
            start[:, 0], stepper.begin(begun(model, start[:, :0])), uniforms(2, length), **PLAIN
        )
        inputs = torch.cat([start, codes[:, :-1]], dim=1)
        with torch.inference_mode():
            expected = begun(model, inputs[:, :0])
            for column in inputs.unbind(1):
                _, expected = model.step(column, expected)
            got = stepper.end(state)
            assert_same_memory(got.memory, expected.memory, 2e-5)
            following = torch.randint(32, (9, 2))
            for column in following:
                features, got = model.step(column, got)
                others, expected = model.step(column, expected)
                logs, others = model.log_probabilities(features), model.log_probabilities(others)
                assert (logs - others).abs().max() < 5e-5


@pytest.mark.parametrize(
    "drawing",
    [
        {},
        {"temperature": 0.7, "top_k": 9},
        {"temperature": 1.3, "top_p": 0.8},
        {"top_k": 20, "top_p": 0.9},
        {"temperature": 0.0},
        {"temperature": 1e-300},
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "compressive_transformer_prediction",
        "wavenet",
        "wavenet_pre_norm",
        "wavenet_waveform",
        "linear_prediction",
        "linear_prediction_autocorrelation",
    ],
)
def test_both_steppers_draw_the_same_codes(name: str, drawing: dict[str, Any]) -> None:
    if name.startswith("linear") and drawing.get("temperature", 1) < 0.1:
        pytest.skip("around silence two codes are equally probable: rounding decides")
    model, prime, found = lively(name), torch.randint(32, (2, 9)), []
    for stepper in ("compiled", "eager"):
        sampler = Sampler(model, num_lanes=2, seed=4, start_code=START_CODE, prime=prime, stepper=stepper, **drawing)
        assert sampler.stepper == stepper
        pairs = list(sampler.blocks(50))
        found.append([torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True)])
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1].double(), found[1][1].double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    [
        "compressive_transformer_prediction",
        "compressive_transformer_convolution",
        "wavenet",
        "wavenet_pre_norm",
        "linear_prediction",
        "linear_prediction_autocorrelation",
    ],
)
def test_bits_depend_on_nothing_but_the_lane(name: str) -> None:
    """Not on blocks, other lanes, threads or how many lanes go side by side."""
    model, stepper = compiled(name)
    numbers, start = uniforms(5, 40), torch.full((5, 1), START_CODE)

    def sampled(lanes: slice, blocks: tuple[int, ...], **how: Any) -> tuple[Tensor, Tensor]:
        state, last, parts = stepper.begin(begun(model, start[lanes, :0])), start[lanes, 0], []
        for block in torch.split(numbers[lanes], list(blocks), dim=1):
            codes, logs, state = stepper.sample_block(last, state, block, **PLAIN, **how)
            parts.append((codes, logs))
            last = codes[:, -1]
        codes, logs = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return codes, logs

    expected = sampled(slice(0, 5), (40,))
    for how in ({"num_threads": 2}, {"num_threads": 9}, {"lanes_together": 1}, {"lanes_together": 3}):
        for got, one in zip(sampled(slice(0, 5), (1, 9, 30), **how), expected, strict=True):
            assert torch.equal(got, one)
    for got, one in zip(sampled(slice(3, 4), (17, 23)), expected, strict=True):
        assert torch.equal(got[0], one[3])


def test_weights_are_those_of_when_it_was_made_and_a_state_is_its_own() -> None:
    model, stepper = compiled("compressive_transformer")
    eager = begun(model, torch.randint(32, (1, 11)))
    numbers, last = uniforms(1, 30), torch.zeros(1, dtype=torch.int64)
    first = stepper.sample_block(last, stepper.begin(eager), numbers, **PLAIN)[:2]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    second = stepper.sample_block(last, stepper.begin(eager), numbers, **PLAIN)[:2]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_float32_on_the_cpu_is_needed() -> None:
    model = tiny_model("wavenet").double()
    assert Sampler(model, num_lanes=1, seed=0, start_code=0).stepper == "eager"
    with pytest.raises(UserError, match=r"expected float32 on the CPU, got torch\.float64"):
        Sampler(model, num_lanes=1, seed=0, start_code=0, stepper="compiled")


@pytest.mark.parametrize("name", ["compressive_transformer", "wavenet_waveform"])
def test_nan_is_reported(name: str) -> None:
    model: Any = tiny_model(name)
    with torch.no_grad():
        model.stack.get_parameter(next(name for name, _ in model.stack.named_parameters())).fill_(math.nan)
    sampler = Sampler(model, num_lanes=2, seed=0, start_code=0, top_k=5, stepper="compiled")
    with pytest.raises(UserError, match="not finite at code 0 of lane 0"):
        list(sampler.blocks(100))


DRAWINGS = [
    PLAIN,
    {"temperature": 0.8, "top_k": None, "top_p": None},
    {"temperature": 1.3, "top_k": 12, "top_p": None},
    {"temperature": 1.0, "top_k": None, "top_p": 0.7},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
]


@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda drawing: "_".join(map(str, drawing.values())))
@pytest.mark.parametrize(
    "name", ["compressive_transformer", "compressive_transformer_prediction", "wavenet_waveform", "linear_prediction"]
)
def test_draws_have_the_probabilities_of_the_model(name: str, drawing: dict[str, Any]) -> None:
    """Chi-square of one code of many lanes in one state against the probabilities of the eager model: softmax, mixture
    and linear prediction; and those at a temperature twice as high are found to be wrong."""
    model, stepper = compiled(name)
    lanes, repeats, prime = 2000, 10, torch.randint(32, (1, 21))
    with torch.inference_mode():
        features, _ = model.step(prime[:, -1], begun(model, prime[:, :-1]))
        logs = model.log_probabilities(features)[0].double().numpy()
    state, counts = stepper.begin(begun(model, prime[:, :-1].expand(lanes, -1))), np.zeros(32)
    generator = torch.Generator().manual_seed(7)
    for _ in range(repeats):
        numbers = torch.rand(lanes, 1, dtype=torch.float64, generator=generator)
        own = map_memory(torch.clone, state)
        codes, _, _ = stepper.sample_block(prime[:, -1].expand(lanes), own, numbers, **drawing)
        counts += np.bincount(codes[:, 0].numpy(), minlength=32)
    expected = drawn_probabilities(logs, **drawing)
    assert counts[expected == 0].sum() == 0
    assert chi_square_probability(counts, expected) > 1e-3
    wrong = drawn_probabilities(logs, **drawing | {"temperature": 2 * drawing["temperature"]})
    assert chi_square_probability(counts, wrong) < 1e-6


def drawn_probabilities(logs: np.ndarray, *, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Oracle: of each code, after temperature, top-k and top-p, from the log-probabilities [V]."""
    chances = np.exp((logs - logs.max()) / temperature)
    order = np.argsort(-chances, kind="stable")
    chances[order[len(logs) if top_k is None else top_k :]] = 0
    chances /= chances.sum()
    reached = np.cumsum(chances[order])
    if top_p is not None:
        chances[order[np.searchsorted(reached, top_p) + 1 :]] = 0
    return chances / chances.sum()


def chi_square_probability(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of counts as far off as these; codes that are expected fewer than 5 times are one."""
    often = expected * counts.sum() >= 5
    seen, hoped = counts[often], expected[often] * counts.sum()
    if expected[~often].sum() * counts.sum() >= 1:
        seen, hoped = np.r_[seen, counts[~often].sum()], np.r_[hoped, expected[~often].sum() * counts.sum()]
    return float(chi2.sf(((seen - hoped) ** 2 / hoped).sum(), len(seen) - 1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, 12])
@pytest.mark.parametrize("top_p", [0.01, 0.6, 1.0])
def test_the_kernel_draws_as_the_reference(temperature: float, top_k: int | None, top_p: float) -> None:
    logs = (2 * torch.randn(200, 12, dtype=torch.float64)).log_softmax(-1)
    drawing = kernels.Drawing(temperature, 12 if top_k is None else top_k, top_p)
    for row, u in zip(logs.numpy(), uniforms(200).tolist(), strict=True):
        found = kernels.draw(np.exp(row / temperature), u, drawing)
        assert found == reference_draw(row.tolist(), u, temperature, top_k, top_p)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_impossible_codes_never_come(u: float) -> None:
    chances = np.zeros(256)
    chances[100:103] = 1 / 3
    for top_k, top_p in ((256, 1.0), (200, 0.99999)):
        assert 100 <= kernels.draw(chances.copy(), u, kernels.Drawing(1.0, top_k, top_p)) <= 102


def test_exponentials_and_logarithms() -> None:
    x = np.linspace(-87, 88, 20_001, dtype=np.float32)
    found = np.array([kernels.exp32(value) for value in x], np.float64)
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=3e-7)
    y = np.exp(np.linspace(-80, 80, 20_001)).astype(np.float32)
    found = np.array([kernels.log32(value) for value in y], np.float64)
    np.testing.assert_allclose(found, np.log(y.astype(np.float64)), rtol=3e-7, atol=1e-7)
    z = np.linspace(-700, 700, 20_001)
    np.testing.assert_allclose([kernels.exp64(value) for value in z], np.exp(z), rtol=1e-14)


def test_the_mixture_is_the_head_in_float64() -> None:
    """Sums of differences of one cumulative distribution equal the head's mass of each cell, narrow and wide ones."""
    head = LogisticMixture(5, 256, num_components=3)
    with torch.no_grad():
        head.projection.weight.normal_()
        head.projection.bias.normal_()
    double = LogisticMixture(5, 256, num_components=3).double()
    double.load_state_dict(head.state_dict())
    weights = kernels.Head(
        np.zeros((0, 0), np.float32),
        np.zeros(0, np.float32),
        torch.cat([head.lower, head.upper[-1:]]).double().numpy(),
        np.array([3, head.uniform_share, 0.1]),
    )
    for prediction, scale in ((0.0, 1e-3), (0.7, 0.02), (-0.99, 0.3), (0.01, 1e-6), (0.2, 5.0)):
        features = torch.randn(5)
        side = torch.tensor([prediction, scale])
        with torch.no_grad():
            outputs = head.projection(features).numpy()
            expected = double.log_probabilities(torch.cat([features, side])[None].double())[0].numpy()
        chances = np.empty(256)
        kernels.mixture(outputs, side.numpy(), weights, np.empty(257), chances)
        np.testing.assert_allclose(np.log(chances), expected, atol=3e-4)
        assert chances.sum() == pytest.approx(1, abs=1e-9)


def test_without_a_folder_for_the_cache_kernels_are_compiled_in_memory(monkeypatch: Patch) -> None:
    given = []

    def njit(**options: Any) -> Any:
        def decorate(function: Any) -> Any:
            given.append(options)
            if options.get("cache"):
                raise RuntimeError("cannot cache function: no locator available for file")
            return function

        return decorate

    monkeypatch.setattr(kernels, "njit", njit)
    assert kernels._compiled({"contract"})(len)("abc") == 3
    assert ["cache" in options for options in given] == [True, False]
    assert given[0] == given[1] | {"cache": True}


def test_rectified_and_copied() -> None:
    row = np.array([-1, 0, 2, np.nan], np.float32)
    kernels.rectify(row)
    np.testing.assert_array_equal(row, np.array([0, 0, 2, np.nan], np.float32))


def test_draw_codes_and_the_kernel_agree_on_ties() -> None:
    logs = torch.full((64, 8), math.log(1 / 8), dtype=torch.float64)
    numbers = torch.linspace(0, 0.999, 64, dtype=torch.float64)
    expected = draw_codes(logs, numbers, temperature=1.0, top_k=3, top_p=None)
    found = [kernels.draw(np.full(8, 1 / 8), u, kernels.Drawing(1.0, 3, 1.0)) for u in numbers.tolist()]
    assert found == expected.tolist()
