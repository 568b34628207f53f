"""Adam, gradient clipping by group, and the schedules of learning rate and update period.

Schedules are pure functions of the step. Step s (0-based) is one chunk a lane, forward and backward; an update takes
place at the last step of each period, with the gradients averaged over the period.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ct_audio.config import OptimConfig
from ct_audio.models import SequenceModel


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


def trained_parameters(model: SequenceModel) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that the optimizer updates: f_c stays as it was drawn with `compression_loss: none`."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def has_parameters(model: SequenceModel) -> bool:
    """Whether there is anything to train."""
    return next(model.named_parameters(), None) is not None


def make_optimizer(model: SequenceModel, config: OptimConfig) -> torch.optim.Adam:
    """Adam over the trained parameters of a model, which must have some; the loop sets the rate before each update."""
    return torch.optim.Adam(
        [parameter for _, parameter in trained_parameters(model)],
        lr=config.initial_learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this learning rate at the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(groups: Mapping[str, Sequence[nn.Parameter]], max_norm: float) -> dict[str, float]:
    """Scale each group's gradients, in place, to a global norm of at most `max_norm`.

    f_c's group apart from the model's: one norm over both would couple the two losses again.

    Args:
        groups: parameters by group (`model.gradient_groups()`).
        max_norm: above 0.
    Returns:
        Each group's norm before clipping; not finite where a gradient is not.
    """
    return {
        name: float(nn.utils.clip_grad_norm_(parameters, max_norm)) for name, parameters in groups.items() if parameters
    }
