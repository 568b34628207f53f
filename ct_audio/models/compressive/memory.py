"""Memory of the Compressive Transformer and its update (Algorithm 1 of Rae et al. 2019), as pure functions.

Shape letters: L layers, B lanes, T codes of a chunk, M memory rows, K compressed rows, D width.
Also helpers that map over any model's memory: a nest of (named) tuples whose leaves are tensors, the lane first, and
plain Python values.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Memory(NamedTuple):
    """Memory and compressed memory of every layer; rows that are not valid are zeros, valid rows are the last ones.

    Attributes:
        memory: L tensors [B, M_l, D], the raw inputs of the layer, oldest first.
        compressed_memory: L tensors [B, K_l, D], oldest first.
        memory_valid: L int64 tensors [B], how many of the last rows of `memory` are valid.
        compressed_memory_valid: L int64 tensors [B], likewise.
        final: True once a shorter last window has ended the stream.
    """

    memory: tuple[Float[Tensor, "B _ D"], ...]
    compressed_memory: tuple[Float[Tensor, "B _ D"], ...]
    memory_valid: tuple[Int[Tensor, "B"], ...]
    compressed_memory_valid: tuple[Int[Tensor, "B"], ...]
    final: bool = False


def push(
    memory: Float[Tensor, "B M D"], window: Float[Tensor, "B T D"]
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B M D"]]:
    """Append a window (or a whole chunk) to a memory and let the oldest rows leave.

    Returns:
        old_memory: [B, T, D], the rows that leave, oldest first (some may not be valid yet).
        memory: [B, M, D], the newest rows.
    Source: Algorithm 1, lines 5 to 7. Differs: for T > M part of the window leaves at once, so that nothing skips
    compression.
    """
    rows = torch.cat([memory, window], dim=1)
    split = rows.shape[1] - memory.shape[1]
    return rows[:, :split], rows[:, split:]
