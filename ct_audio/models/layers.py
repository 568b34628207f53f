"""Parts of stacks and heads: linear maps, one of them read twice, the feed-forward block, ages of documents.

Shape letters: B lanes, T rows, D width, O outputs, N batch, S rows with keys, H heads, E head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, detached_inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(inputs, weight)
        output = F.linear(inputs, weight)
        return output, output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        own, later = gradients
        for_inputs = own @ weight if ctx.needs_input_grad[0] else None
        for_detached = later @ weight if ctx.needs_input_grad[1] else None
        for_weight = (own + later).flatten(0, -2).T @ inputs.flatten(0, -2) if ctx.needs_input_grad[2] else None
        return for_inputs, for_detached, for_weight


def shared_linear(
    inputs: Float[Tensor, "B T D"], detached_inputs: Float[Tensor, "B T D"], weight: Float[Tensor, "O D"]
) -> tuple[Float[Tensor, "B T O"], Float[Tensor, "B T O"]]:
    """One matrix product that is read twice: by the codes' own window and, detached, by later windows.

    Args:
        inputs: what the own window reads.
        detached_inputs: equal in value; the gradient that later windows send back goes here instead (it ends at the
            detached raw rows, or reaches the parameters of the norm in between).
        weight: gets the gradient of both.
    Returns:
        own, later: equal in value.
    """
    if torch.is_autocast_enabled(inputs.device.type):
        dtype = torch.get_autocast_dtype(inputs.device.type)
        inputs, detached_inputs, weight = inputs.to(dtype), detached_inputs.to(dtype), weight.to(dtype)
    return _SharedLinear.apply(inputs, detached_inputs, weight)  # type: ignore[return-value]


def linear(in_features: int, out_features: int, *, bias: bool = False, gain: float = 1.0) -> nn.Linear:
    """A linear map with N(0, gain^2 / in_features) weights and zero bias."""
    module = nn.Linear(in_features, out_features, bias=bias)
    nn.init.normal_(module.weight, std=gain * in_features**-0.5)
    if bias:
        nn.init.zeros_(module.bias)
    return module


def frozen_layer_norm(norm: nn.LayerNorm, rows: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """The norm's values, with no gradient to its parameters."""
    return F.layer_norm(rows, norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps)


def keys_and_values(
    both: Float[Tensor, "N S D2"], num_heads: int, head_width: int
) -> tuple[Float[Tensor, "N H S E"], Float[Tensor, "N H S E"]]:
    """Keys and values of every head, from them side by side; where there are fewer of them, heads in a row share one.

    Source: of shared keys and values, Ainslie et al. 2023, arXiv 2305.13245 (grouped-query attention).
    """
    keys, values = rearrange(both, "n s (two g e) -> two n g s e", two=2, e=head_width)
    if keys.shape[1] < num_heads:
        num_sharing = num_heads // keys.shape[1]
        return keys.repeat_interleave(num_sharing, dim=1), values.repeat_interleave(num_sharing, dim=1)
    return keys, values


class FeedForward(nn.Module):
    """Position-wise block: linear, ReLU, linear (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, width: int, feedforward_width: int, *, dropout: float, output_gain: float) -> None:
        super().__init__()
        self.expand = linear(width, feedforward_width, bias=True, gain=2**0.5)
        self.contract = linear(feedforward_width, width, bias=True, gain=output_gain)
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return self.contract(self.dropout(F.relu(self.expand(rows))))


def document_age(document_starts: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """How many codes of its document come before each position; a huge number where it began before the chunk."""
    positions = torch.arange(document_starts.shape[1], device=document_starts.device).expand_as(document_starts)
    latest_start = torch.where(document_starts, positions, -(2**40)).cummax(dim=1).values
    return positions - latest_start
