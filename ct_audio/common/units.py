"""Negative log-likelihood: sums and counts, nats and bits, perplexity.

Shape letters: B lanes, T codes.
"""

import math
import sys

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


def perplexity(nll_nats: float) -> float | None:
    """exp of a mean NLL in nats: among how many equally probable units the model hesitates.

    For word-level perplexity of subwords, the mean is the sum over all subwords divided by the number of words.

    Returns:
        at least 1; None where it is beyond float64 (JSON has no infinity).
    Source: Rae et al. 2019, section 5.2 (word-level perplexity of PG-19).
    """
    return math.exp(nll_nats) if nll_nats < math.log(sys.float_info.max) else None
