"""A short causal convolution before a layer's attention, which the paper does not have.

Neighbouring samples of speech say more about the next one than all others: this block mixes them, so that attention
need not. It comes before what the memories keep: rows that leave are compressed with it already in them.
Shape letters: B lanes, T rows of a chunk, W windows, N = B W, Q = kernel length - 1 rows of the queue, D width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn


class CausalConvolution(nn.Module):
    """rows + taps * layer_norm(rows), a kernel of its own for every channel ("depthwise").

    Source: depthwise convolutions beside attention as in So et al. 2021, arXiv 2109.08668 (there after the projections
    to queries, keys and values, here once before them).

    Args:
        kernel_length: rows that an output sees, at least 1.
    """

    def __init__(self, width: int, kernel_length: int, *, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        # One row a tap, that of the newest row last.
        self.taps = nn.Parameter(torch.randn(kernel_length, width) * (3 * kernel_length) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(dropout)

    @property
    def queue_length(self) -> int:
        """Q."""
        return len(self.taps) - 1

    def forward(
        self,
        rows: Float[Tensor, "B T D"],
        queue: Float[Tensor, "B Q D"],
        *,
        window_length: int,
        age: Int[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B Q D"]]:
        """Outputs and the next queue; gradients end where a window begins, as those of attention do.

        Args:
            queue: the last normalised rows before the chunk; zeros where there was nothing, or another document.
            window_length: whose multiple T is.
            age: rows of its document before each row, see `layers.document_age`; None where no document starts.
        """
        read, num_windows = self.norm(rows), rows.shape[1] // window_length
        stream = torch.cat([queue, read], dim=1)
        before = stream[:, : stream.shape[1] - window_length].detach()
        before = rearrange(_windows(before, len(self.taps) - 1, window_length, num_windows), "b w q d -> (b w) q d")
        seen = torch.cat([before, rearrange(read, "b (w t) d -> (b w) t d", w=num_windows)], dim=1)
        if age is None:
            total = F.conv1d(seen.mT, self.taps.T[:, None], self.bias, groups=len(self.bias)).mT
        else:
            total, ages = self.bias, rearrange(age, "b (w t) -> (b w) t 1", w=num_windows)
            for tap, weight in enumerate(self.taps):
                shifted = seen[:, tap : tap + window_length]
                total = total + torch.where(ages >= self.queue_length - tap, shifted, shifted.new_zeros(())) * weight
        outputs = rearrange(total, "(b w) t d -> b (w t) d", w=num_windows)
        queue = stream[:, stream.shape[1] - self.queue_length :].detach()
        if age is not None:
            distance = torch.arange(self.queue_length - 1, -1, -1, device=age.device)
            queue = torch.where((distance <= age[:, -1:])[..., None], queue, queue.new_zeros(()))
        return rows + self.dropout(outputs), queue.clone()

    def step(
        self, rows: Float[Tensor, "B D"], queue: Float[Tensor, "B Q D"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B Q D"]]:
        """The output for one more row a lane, and the next queue."""
        seen = torch.cat([queue, self.norm(rows)[:, None]], dim=1)
        return rows + self.dropout((seen * self.taps).sum(dim=1) + self.bias), seen[:, 1:]


def _windows(rows: Tensor, length: int, step: int, num_windows: int) -> Float[Tensor, "B W Q D"]:
    """The `length` rows before each window, of rows that begin `length` before the first one."""
    if length == 0:
        return rows.new_empty(rows.shape[0], num_windows, 0, rows.shape[2])
    return rearrange(rows.unfold(1, length, step), "b w d q -> b w q d")
