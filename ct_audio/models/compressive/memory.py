"""Memory of the Compressive Transformer and its update (Algorithm 1 of Rae et al. 2019), as pure functions.

Shape letters: L layers, B lanes, T codes of a chunk, M memory rows, K compressed rows, Q rows of a queue,
D width.
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
        codes_until_full: L numbers on the host: after so many more codes all rows of the layer are valid in every lane
            (they may be earlier, where documents have begun); 0: they are. It spares asking the device.
        queues: what the layers' convolutions carry: tensors [B, Q, D], one a layer, or none at all.
        final: True once a shorter last window has ended the stream.
    """

    memory: tuple[Float[Tensor, "B _ D"], ...]
    compressed_memory: tuple[Float[Tensor, "B _ D"], ...]
    memory_valid: tuple[Int[Tensor, " B"], ...]
    compressed_memory_valid: tuple[Int[Tensor, " B"], ...]
    codes_until_full: tuple[int, ...]
    queues: tuple[Float[Tensor, "B Q D"], ...] = ()
    final: bool = False


class LayerMemory(NamedTuple):
    """One layer's part of a `Memory`, without its convolution's; see there."""

    memory: Float[Tensor, "B M D"]
    compressed_memory: Float[Tensor, "B K D"]
    memory_valid: Int[Tensor, " B"]
    compressed_memory_valid: Int[Tensor, " B"]
    codes_until_full: int


def layer_memory(memory: Memory, index: int) -> LayerMemory:
    """The part of a memory that belongs to one layer."""
    rows, compressed, valid, compressed_valid, until_full = memory[:5]
    return LayerMemory(rows[index], compressed[index], valid[index], compressed_valid[index], until_full[index])


def join_layers(layers: list[LayerMemory], queues: tuple[Tensor, ...]) -> Memory:
    """The memory of all layers; the inverse of `layer_memory`."""
    rows, compressed, valid, compressed_valid, until_full = zip(*layers, strict=True)
    return Memory(rows, compressed, valid, compressed_valid, until_full, queues)


def codes_until_full(
    *,
    window_length: int,
    compression_rate: int,
    memory_length: int,
    compressed_memory_length: int,
    memory_valid: int = 0,
    compressed_memory_valid: int = 0,
    most_used: bool = False,
) -> int:
    """Codes, in whole windows, after which all rows of both memories are valid, if no document begins before.

    Args:
        memory_valid, compressed_memory_valid: rows that are valid already.
        most_used: of rows that leave together, valid ones are kept before others, in place of one of each group.
    """
    missing = memory_length - memory_valid
    windows = -(-missing // window_length)
    if missing:
        leaving = windows * window_length - missing  # valid rows that leave with the window that fills the memory
        kept = min(leaving, window_length // compression_rate) if most_used else leaving // compression_rate
        compressed_memory_valid += kept
    missing = max(0, compressed_memory_length - compressed_memory_valid)
    return (windows + -(-missing // (window_length // compression_rate))) * window_length


def push(
    memory: Float[Tensor, "B M D"], window: Float[Tensor, "B T D"]
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B M D"]]:
    """Append a window (or a whole chunk) to a memory and let the oldest rows leave.

    Returns:
        old_memory: [B, T, D], the rows that leave, oldest first (some may not be valid yet).
        memory: [B, M, D], the newest rows.
    Source: Algorithm 1, the updates of old_mem and m. Differs: for T > M part of the window leaves at once, so that
    nothing skips compression.
    """
    rows = torch.cat([memory, window], dim=1)
    split = rows.shape[1] - memory.shape[1]
    return rows[:, :split], rows[:, split:]
