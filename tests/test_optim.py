"""Schedules as pure functions of the step, Adam, and clipping by group."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from torch import nn

from ct_audio.models.interface import clip_gradients
from ct_audio.runs.config import OptimConfig
from ct_audio.training.schedules import (
    completes_update,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    update_period,
    update_steps,
)

PAPER = OptimConfig(warmup_steps=4000, decay_steps=100_000, update_period={0: 1, 60_000: 4})


def test_learning_rate_of_the_paper():
    assert learning_rate(0, PAPER) == 1e-6
    assert learning_rate(2000, PAPER) == pytest.approx((1e-6 + 3e-4) / 2, rel=1e-12)
    assert learning_rate(4000, PAPER) == pytest.approx(3e-4, rel=1e-12)
    assert learning_rate(54_000, PAPER) == pytest.approx((1e-6 + 3e-4) / 2, rel=1e-12)
    assert learning_rate(104_000, PAPER) == pytest.approx(1e-6, rel=1e-9)
    assert learning_rate(10**9, PAPER) == learning_rate(104_000, PAPER)


def test_learning_rate_without_warmup_or_decay():
    assert learning_rate(0, OptimConfig(warmup_steps=0, decay_steps=0)) == 3e-4
    assert learning_rate(7, OptimConfig(warmup_steps=0, decay_steps=0)) == 3e-4
    assert learning_rate(0, OptimConfig(warmup_steps=0, decay_steps=10)) == 3e-4


def test_update_period_of_the_paper():
    assert [update_period(step, PAPER) for step in (0, 59_999, 60_000, 90_000)] == [1, 1, 4, 4]
    updates = [step for step in range(59_998, 60_009) if completes_update(step, PAPER)]
    assert updates == [59_998, 59_999, 60_003, 60_007]


def test_a_period_that_the_next_entry_cuts_off_is_averaged_over_what_it_has():
    config = OptimConfig(update_period={0: 4, 6: 1})
    assert [update_steps(step, config) for step in (0, 3, 4, 5, 6)] == [
        range(4),
        range(4),
        range(4, 6),
        range(4, 6),
        range(6, 7),
    ]
    assert [completes_update(step, config) for step in range(8)] == [0, 0, 0, 1, 0, 1, 1, 1]


@given(st.dictionaries(st.integers(1, 40), st.integers(1, 7), max_size=4), st.integers(1, 7))
def test_updates_partition_the_steps(later: dict[int, int], first: int):
    config = OptimConfig(update_period={0: first} | later)
    step = 0
    while step < 60:
        steps = update_steps(step, config)
        assert steps.start == step
        assert 1 <= len(steps) <= update_period(step, config)
        assert all(update_steps(other, config) == steps for other in steps)
        assert [completes_update(other, config) for other in steps] == [False] * (len(steps) - 1) + [True]
        step = steps.stop


def test_adam_is_the_textbook_update():
    model = tiny_model("wavenet").double()  # type: ignore[attr-defined]
    config = OptimConfig()
    optimizer = make_optimizer(model, config)
    parameters = dict(model.named_parameters())
    expected = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for update in (1, 2, 3):
        rate = 0.01 * update
        for name, parameter in parameters.items():
            parameter.grad = torch.randn_like(parameter)
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * parameter.grad
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * parameter.grad**2
            mean, variance = first[name] / (1 - config.beta1**update), second[name] / (1 - config.beta2**update)
            expected[name] = expected[name] - rate * mean / (variance.sqrt() + config.epsilon)
        set_learning_rate(optimizer, rate)
        optimizer.step()
    for name, parameter in parameters.items():
        assert (parameter - expected[name]).abs().max() < 1e-12


def test_groups_are_clipped_apart():
    large, small = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    large.grad, small.grad = torch.tensor([30.0, 40.0]), torch.tensor([0.03, 0.04])
    norms = clip_gradients({"model": [large], "compression": [small], "empty": []}, 1.0)
    assert {group: norm.item() for group, norm in norms.items()} == {
        "model": pytest.approx(50.0),
        "compression": pytest.approx(0.05),
    }
    assert large.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(small.grad, torch.tensor([0.03, 0.04]))


def test_a_norm_that_is_not_finite_is_told():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([math.nan, 1.0])
    assert math.isnan(clip_gradients({"model": [parameter]}, 1.0)["model"])
