"""Compression functions f_c: old memories in, c times fewer compressed memories out.

Shape letters: B lanes, T rows (a multiple of c), K = T / c compressed rows, D width.
A compression function is a module called with raw rows [B, T, D]; it never mixes rows of different groups of c.
"""

from collections.abc import Callable

from einops import rearrange, reduce
from jaxtyping import Float
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


COMPRESSION_FUNCTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "conv": ConvCompression,
    "mean": MeanCompression,
    "max": MaxCompression,
}
