"""Adam, gradient clipping by group, and the schedules of learning rate and update period.

Schedules are pure functions of the step. Step s (0-based) is one chunk a lane, forward and backward; an update takes
place at the last step of each period, with the gradients averaged over the period.
"""

import math

import torch

from ct_audio.models import SequenceModel
from ct_audio.runs.config import OptimConfig


def learning_rate(step: int, config: OptimConfig) -> float:
    """Linear from `initial_learning_rate` at step 0 to the peak at `warmup_steps`, then a half cosine to the final one.

    Args:
        step: 0-based, at least 0; after warmup + decay steps the rate stays at `final_learning_rate`.
    Source: section 4.1 of the paper (1e-6 to 3e-4, cosine to 1e-6).
    """
    if step < config.warmup_steps:
        share = step / config.warmup_steps
        return config.initial_learning_rate + share * (config.peak_learning_rate - config.initial_learning_rate)
    if config.decay_steps == 0:
        return config.peak_learning_rate
    share = min(1.0, (step - config.warmup_steps) / config.decay_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * share))
    return config.final_learning_rate + cosine * (config.peak_learning_rate - config.final_learning_rate)


def update_period(step: int, config: OptimConfig) -> int:
    """Steps an optimizer update at this step, by `config.update_period`.

    Source: section 4.1 of the paper (updates every 4 steps after 60,000 steps).
    """
    return config.update_period[max(first for first in config.update_period if first <= step)]


def update_steps(step: int, config: OptimConfig) -> range:
    """The steps whose gradients make the same update as this one's.

    A period that the schedule's next entry cuts off ends there, and is averaged over the steps that it has.
    """
    start = max(first for first in config.update_period if first <= step)
    period = config.update_period[start]
    first = step - (step - start) % period
    cut_off = min((later for later in config.update_period if later > step), default=first + period)
    return range(first, min(first + period, cut_off))


def completes_update(step: int, config: OptimConfig) -> bool:
    """Whether the optimizer updates the weights at the end of this step."""
    return step + 1 == update_steps(step, config).stop


def make_optimizer(model: SequenceModel, config: OptimConfig) -> torch.optim.Adam:
    """Adam over the trained parameters of a model, which must have some; the loop sets the rate before each update."""
    return torch.optim.Adam(
        [parameter for _, parameter in model.trained_parameters()],
        lr=config.initial_learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this learning rate at the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
