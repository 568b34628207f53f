"""Stable adaptive linear prediction: slow code, its poles, lanes in threads; and what the mixture makes of it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float64, Int
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.models.autocorrelation import (
    AutocorrelationMemory,
    AutocorrelationPredictor,
    AutocorrelationSettings,
    cell_width,
)
from ct_audio.models.heads import LogisticMixture
from ct_audio.models.linear_prediction import Config, LinearPrediction, mu_law_cells

SMALL = AutocorrelationSettings(order=4, window_length=20, hop_length=6)
CPU = torch.device("cpu")


def predictor(settings: AutocorrelationSettings = SMALL) -> AutocorrelationPredictor:
    return AutocorrelationPredictor(settings, mu_law_cells(256)[2])


def speech_like_codes(length: int, seed: int = 0) -> Int[Tensor, "1 T"]:
    """A resonance that swells and fades, with noise."""
    noise = np.random.default_rng(seed).normal(size=length + 2)
    waveform = np.zeros(length + 2)
    for t in range(2, length + 2):
        waveform[t] = 1.6 * waveform[t - 1] - 0.8 * waveform[t - 2] + 0.1 * noise[t]
    waveform = np.clip(waveform[2:] * np.sin(np.arange(length) / 60.0) ** 2, -1, 1)
    companded = np.sign(waveform) * np.log1p(255 * np.abs(waveform)) / math.log(256)
    return torch.from_numpy(np.rint((companded + 1) / 2 * 255).astype(np.int64))[None]


def slow(codes: list[int], settings: AutocorrelationSettings) -> Float64[np.ndarray, "T 2"]:
    """Oracle: the normal equations solved by numpy in place of Levinson's recursion; Python lists."""
    expand, past, weights, residual, said = mu_law_cells(256)[2], [], np.zeros(settings.order), 0.01, []
    length = settings.window_length
    position = [i / (length - 1) for i in range(length)]
    window = [
        math.sin(math.pi / 2 * p / 0.9) ** 2 if p < 0.9 else math.cos(math.pi / 2 * (p - 0.9) / 0.1) ** 2
        for p in position
    ]

    def predict() -> float:
        total = sum(w * x for w, x in zip(weights, reversed(past), strict=False))
        return max(-1.0, min(1.0, total))

    for count, code in enumerate(codes, start=1):
        sample = float(expand[code])
        residual = settings.scale_decay * residual + (1 - settings.scale_decay) * abs(sample - predict())
        past.append(sample)
        if count % settings.hop_length == 0:
            newest = ([0.0] * length + past)[-length:]
            seen = [w * x for w, x in zip(window, newest, strict=True)]
            lags = [sum(a * b for a, b in zip(seen[lag:], seen, strict=False)) for lag in range(settings.order + 1)]
            lags[0] = lags[0] * (1 + 1e-4) + 1e-9
            matrix = [[lags[abs(i - j)] for j in range(settings.order)] for i in range(settings.order)]
            weights = np.linalg.solve(matrix, lags[1:]) * 0.994 ** np.arange(1, settings.order + 1)
        prediction = predict()
        floor = settings.floor_cells * 2 * math.log(256) / 255 * (abs(prediction) + 1 / 255)
        said.append((prediction, max(residual / (2 * math.log(2)), floor)))
    return np.array(said)


def test_equals_slow_code() -> None:
    codes = speech_like_codes(150)
    features, memory = predictor().follow(codes, predictor().zero_memory(1, CPU))
    np.testing.assert_allclose(features[0].numpy(), slow(codes[0].tolist(), SMALL), rtol=0, atol=1e-9)
    assert int(memory.count) == 150


def poles(memory: AutocorrelationMemory) -> Float64[np.ndarray, "B P"]:
    """Largest modulus of each lane's poles."""
    return np.array([np.abs(np.roots([1.0, *(-weights)])).max(initial=0.0) for weights in memory.weights.numpy()])


@given(
    pieces=st.lists(
        st.tuples(st.sampled_from(["constant", "square", "noise", "ramp"]), st.integers(0, 255), st.integers(1, 60)),
        min_size=1,
        max_size=5,
    ),
    order=st.sampled_from([1, 2, 8, 32]),
)
def test_poles_lie_inside_the_unit_circle_whatever_comes(pieces: list, order: int) -> None:
    """Silence, full scale, square waves and noise after one another: a free-running predictor must not oscillate."""
    codes, random = [], np.random.default_rng(0)
    for kind, level, length in pieces:
        t = np.arange(length)
        shapes = {
            "constant": np.full(length, level),
            "square": np.where(t % 7 < 3, level, 255 - level),
            "noise": random.integers(0, 256, length),
            "ramp": (level + t) % 256,
        }
        codes += shapes[kind].tolist()
    follower = predictor(AutocorrelationSettings(order=order, window_length=48, hop_length=5))
    memory = follower.zero_memory(1, CPU)
    for code in codes:
        features, memory = follower.follow(torch.tensor([[code]]), memory)
        assert features.isfinite().all()
        assert poles(memory)[0] < 1


def test_lanes_in_threads_are_lanes_one_by_one() -> None:
    codes = torch.cat([speech_like_codes(400, seed=seed) for seed in range(3)])
    alone = [predictor().follow(codes[i : i + 1], predictor().zero_memory(1, CPU))[0] for i in range(3)]
    torch.set_num_threads(3)
    try:
        together, _ = predictor().follow(codes, predictor().zero_memory(3, CPU))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(together, torch.cat(alone))


def test_silence_keeps_a_scale_of_its_cell() -> None:
    features, _ = predictor().follow(torch.full((1, 3000), 128), predictor().zero_memory(1, CPU))
    mean, scale = features[0, -1]
    assert scale.item() == pytest.approx(0.3 * cell_width(mean, 256).item())


def test_bad_settings_and_memories_are_named() -> None:
    for settings in ({"order": 0}, {"order": 500}, {"hop_length": 0}, {"scale_decay": 1.0}, {"floor_cells": 0.0}):
        with pytest.raises(UserError, match="linear prediction: expected"):
            AutocorrelationSettings(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected a memory of 2 lanes of 20 samples"):
        predictor().follow(torch.zeros(2, 3, dtype=torch.int64), predictor().zero_memory(1, CPU))


def mixture(num_components: int = 3) -> LogisticMixture:
    head = LogisticMixture(6, 32, num_components=num_components).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return head


def test_the_mixture_is_the_mass_of_its_cells() -> None:
    """Oracle: Python numbers and the logistic function as it is written; far tails too."""
    head, (lower, upper, _) = mixture(), mu_law_cells(32)
    rows = torch.randn(4, 8, dtype=torch.float64)
    rows[:, 6:] = torch.tensor([[0.1, 0.05], [-0.9, 0.3], [0.0, 1e-4], [0.7, 2e-3]], dtype=torch.float64)

    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    for row, found in zip(rows, head.log_probabilities(rows), strict=True):
        weights, shifts, ratios = (head.projection(row[:6])).view(3, 3).tolist()
        prediction, scale = row[6:].tolist()
        shares = [math.exp(w) / sum(map(math.exp, weights)) for w in weights]
        floor = 0.1 * 2 * math.log(32) / 31 * (abs(prediction) + 1 / 31)
        for code in range(32):
            mass = 0.0
            for share, shift, ratio in zip(shares, shifts, ratios, strict=True):
                width = max(scale * math.exp(ratio), floor)
                edges = [(edge[code] - prediction - shift * scale) / width for edge in (lower, upper)]
                mass += share * (logistic(edges[1]) - logistic(edges[0]))
            expected = math.log((1 - head.uniform_share) * mass + head.uniform_share / 32)
            assert found[code].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_components", [1, 4])
def test_a_fresh_mixture_says_nearly_what_the_predictor_says(num_components: int) -> None:
    settings = AutocorrelationSettings()
    codes = speech_like_codes(4000)
    baseline = LinearPrediction(Config(adaptation="autocorrelation", order=settings.order))
    features, _ = predictor(settings).follow(codes[:, :-1], predictor(settings).zero_memory(1, CPU))
    expected = baseline.nll(features, codes[:, 1:]).mean()
    head = LogisticMixture(5, 256, num_components=num_components).double()
    rows = torch.cat([torch.randn(1, 3999, 5, dtype=torch.float64), features], dim=-1)
    assert head.nll(rows, codes[:, 1:]).mean().item() == pytest.approx(expected.item(), abs=0.1)


def test_gradients_of_the_mixture() -> None:
    head, targets = mixture(), torch.tensor([0, 3, 15, 16, 30, 31])
    rows = torch.randn(6, 8, dtype=torch.float64)
    rows[:, 7] = rows[:, 7].abs() * 0.1 + 0.01
    rows = rows.requires_grad_()
    parameters = list(head.parameters())
    assert torch.autograd.gradcheck(lambda rows, *_: head.nll(rows, targets), (rows, *parameters), fast_mode=True)
