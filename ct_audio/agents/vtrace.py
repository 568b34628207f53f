"""V-trace: off-policy targets and advantages of an actor-critic.

Shape letters: B environments, T steps of an unroll.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class VTrace(NamedTuple):
    """What `vtrace` returns.

    Attributes:
        targets: v_s, towards which the value of each step is learnt.
        advantages: rho_s (r_s + discount_s v_{s+1} - V_s), by which the gradient of log pi is weighted.
    """

    targets: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]


@torch.no_grad()
def vtrace(
    *,
    behaviour_log_probabilities: Float[Tensor, "B T"],
    log_probabilities: Float[Tensor, "B T"],
    rewards: Float[Tensor, "B T"],
    discounts: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    bootstrap: Float[Tensor, " B"],
    importance_clip: float = 1.0,
    trace_clip: float = 1.0,
) -> VTrace:
    """Targets of the values and advantages of the actions of an unroll.

    Args:
        behaviour_log_probabilities: log mu(a | x) of the actions, of the policy that took them.
        log_probabilities: log pi(a | x) of the policy that learns.
        discounts: gamma, 0 where the episode ended with the step.
        values: V(x) of the policy that learns.
        bootstrap: V of what came after the last step.
        importance_clip, trace_clip: rho_bar and c_bar.
    Source: Espeholt et al. 2018 (IMPALA, arXiv 1802.01561), equation 1 and section 4.2.
    """
    ratios = (log_probabilities - behaviour_log_probabilities).exp()
    clipped, traces = ratios.clamp(max=importance_clip), ratios.clamp(max=trace_clip)
    next_values = torch.cat([values[:, 1:], bootstrap[:, None]], dim=1)
    differences = clipped * (rewards + discounts * next_values - values)
    correction, corrections = torch.zeros_like(bootstrap), []
    for t in reversed(range(rewards.shape[1])):
        correction = differences[:, t] + discounts[:, t] * traces[:, t] * correction
        corrections.append(correction)
    targets = values + torch.stack(corrections[::-1], dim=1)
    next_targets = torch.cat([targets[:, 1:], bootstrap[:, None]], dim=1)
    return VTrace(targets, clipped * (rewards + discounts * next_targets - values))
