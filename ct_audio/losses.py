"""Negative log-likelihood: sums and counts, nats and bits.

Shape letters: B lanes, T codes.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def nll_sum_and_count(
    nll: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None = None
) -> tuple[Float[Tensor, ""], int]:
    """Sum of the NLL in float64 and the number of codes it is of.

    Args:
        nll: [B, T], in nats, at least 0 for a discrete model.
        mask: [B, T], True where a code counts; None: all of them. What is masked may be anything, NaN too.
    Returns:
        The sum in nats (a float64 scalar on the device of `nll`) and the count.
    """
    if mask is None:
        return nll.sum(dtype=torch.float64), nll.numel()
    return torch.where(mask, nll, 0.0).sum(dtype=torch.float64), int(mask.sum())


def nats_to_bits(nats: float) -> float:
    """The same amount of information in bits: nats / ln 2."""
    return nats / math.log(2.0)
