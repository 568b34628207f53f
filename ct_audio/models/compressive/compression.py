"""Compression functions f_c: old memories in, c times fewer compressed memories out; and what else can train them.

Shape letters: B lanes, T rows (a multiple of c), K = T / c compressed rows, S rows to choose from, D width.
A compression function is a module called with raw rows [B, T, D]; it never mixes rows of different groups of c.
`most_used` is none: it needs attention, chooses among all rows that leave, and stands in `choose_most_used`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class ConvCompression(nn.Module):
    """1-D convolution with kernel and stride c (the paper's best), as one matrix product.

    Source: Rae et al. 2019, section 3.1.
    """

    def __init__(self, width: int, compression_rate: int) -> None:
        super().__init__()
        self.compression_rate = compression_rate
        self.project = nn.Linear(compression_rate * width, width)

    def forward(self, rows: Float[Tensor, "B T D"]) -> Float[Tensor, "B K D"]:
        return self.project(rearrange(rows, "b (k c) d -> b k (c d)", c=self.compression_rate))


class DilatedConvCompression(nn.Module):
    """A stack of kernel-2 convolutions with dilations 1, 2, 4, ..., ReLU between, read at the last row of each group.

    As many as let the last row see its whole group, and only that (zeros stand before its first row). At c = 2 it is
    `conv`.
    Source: Rae et al. 2019, section 3.1. Differs: the paper says neither kernel nor dilations; a dilated kernel of
    stride c would skip rows or mix groups.
    """

    def __init__(self, width: int, compression_rate: int) -> None:
        super().__init__()
        self.compression_rate = compression_rate
        num_levels = max(1, (compression_rate - 1).bit_length())
        self.levels = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(num_levels))

    def forward(self, rows: Float[Tensor, "B T D"]) -> Float[Tensor, "B K D"]:
        rows = rearrange(rows, "b (k c) d -> b k c d", c=self.compression_rate)
        for level, project in enumerate(self.levels):
            earlier = F.pad(rows, (0, 0, 2**level, 0))[:, :, : self.compression_rate]
            rows = project(torch.cat([earlier, rows], dim=-1))
            if level + 1 < len(self.levels):
                rows = F.relu(rows)
        return rows[:, :, -1]


class GruCompression(nn.Module):
    """A gated recurrent unit over each group of c rows; its last state is the compressed row. Beyond the paper."""

    def __init__(self, width: int, compression_rate: int) -> None:
        super().__init__()
        self.compression_rate = compression_rate
        self.cell = nn.GRUCell(width, width)

    def forward(self, rows: Float[Tensor, "B T D"]) -> Float[Tensor, "B K D"]:
        groups = rearrange(rows, "b (k c) d -> c (b k) d", c=self.compression_rate)
        state = torch.zeros_like(groups[0])
        for row in groups:
            state = self._next(row, state)
        return rearrange(state, "(b k) d -> b k d", b=len(rows))

    def _next(self, row: Float[Tensor, "N D"], state: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """What `cell` would make of them, in operations that torch.compile knows on CUDA too."""
        from_row = F.linear(row, self.cell.weight_ih, self.cell.bias_ih).chunk(3, dim=1)
        from_state = F.linear(state, self.cell.weight_hh, self.cell.bias_hh).chunk(3, dim=1)
        reset = torch.sigmoid(from_state[0] + from_row[0])
        keep = torch.sigmoid(from_state[1] + from_row[1])
        new = torch.tanh(from_row[2] + from_state[2] * reset)
        return (state - new) * keep + new


class MeanCompression(nn.Module):
    """Mean of each group of c rows."""

    def __init__(self, width: int, compression_rate: int) -> None:
        super().__init__()
        self.compression_rate = compression_rate

    def forward(self, rows: Float[Tensor, "B T D"]) -> Float[Tensor, "B K D"]:
        return reduce(rows, "b (k c) d -> b k d", "mean", c=self.compression_rate)


class MaxCompression(nn.Module):
    """Largest value of each group of c rows, a channel at a time."""

    def __init__(self, width: int, compression_rate: int) -> None:
        super().__init__()
        self.compression_rate = compression_rate

    def forward(self, rows: Float[Tensor, "B T D"]) -> Float[Tensor, "B K D"]:
        return reduce(rows, "b (k c) d -> b k d", "max", c=self.compression_rate)


class Decoder(nn.Module):
    """Linear map from a compressed row back to the c rows it stands for; the auto-encoding loss alone trains it.

    Source: Rae et al. 2019, section 3.1 (auto-encoding loss, "lossless" objective).
    """

    def __init__(self, width: int, compression_rate: int) -> None:
        super().__init__()
        self.compression_rate = compression_rate
        self.project = nn.Linear(width, compression_rate * width)

    def forward(self, compressed: Float[Tensor, "B K D"]) -> Float[Tensor, "B T D"]:
        return rearrange(self.project(compressed), "b k (c d) -> b (k c) d", c=self.compression_rate)


def autoencoding_loss(
    rows: Float[Tensor, "B T D"], decoded: Float[Tensor, "B T D"], valid: Bool[Tensor, "B K"] | None
) -> Float[Tensor, ""]:
    """Mean squared error of rows that were compressed and decoded.

    Args:
        rows: what left the memory.
        decoded: what the decoder makes of their compression.
        valid: which groups count (the others as zero); None for all.
    Source: Rae et al. 2019, section 3.1. Differs: the mean of squares, where the paper has the L2 norm.
    """
    error = (decoded - rows).square()
    error = error.float() if error.dtype == torch.bfloat16 else error
    if valid is not None:
        error = error * repeat(valid, "b k -> b (k c) 1", c=rows.shape[1] // valid.shape[1]).to(error.dtype)
    return error.mean()


def choose_most_used(usage: Float[Tensor, "B S"], selectable: Bool[Tensor, "B S"], num_rows: int) -> Int[Tensor, "B K"]:
    """Indices of the rows with the largest usage, in temporal order.

    Args:
        usage: mean attention that each row got.
        selectable: False for a row that nobody will see; such rows fill up where others are too few, and as they are
            of an earlier document they come first.
        num_rows: K, rows to keep.
    Source: Rae et al. 2019, section 3.1 ("most-used").
    """
    chosen = usage.masked_fill(~selectable, -torch.inf).topk(num_rows, dim=1).indices
    return chosen.sort(dim=1).values


COMPRESSION_FUNCTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "conv": ConvCompression,
    "dilated_conv": DilatedConvCompression,
    "gru": GruCompression,
    "mean": MeanCompression,
    "max": MaxCompression,
}
