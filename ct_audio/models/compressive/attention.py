"""Relative attention of Transformer-XL, once as a plain formula and once folded into a fused kernel.

Shape letters: N batch of windows, H heads, T queries, S keys, E head width, P position width.

score(i, j) = [(q_i + u) . k_j  +  (q_i + v) . W_R s(i - j)] / sqrt(E), where s is a sinusoidal table of width P. A
backend gets both query terms, `content_query = q + u` and `position_query = W_R^T (q + v)`, and real positions i and j.
With rotary positions the score is Rot_i q . Rot_j k / sqrt(E): queries and keys come turned, and P is 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, repeat
from jaxtyping import Float, Int
from torch import Tensor

QUERY_BLOCK_LENGTH = 768
"""Queries a call of the kernel: windows of the paper's length are one block."""
CPU_QUERY_BLOCK_LENGTH = 256
"""The same on a CPU, whose calls cost little: fewer keys of the window are read only to be masked."""


class Distances(NamedTuple):
    """How far each query is from each key: values i - j that come, and which of them each pair has."""

    values: Float[Tensor, " R"]
    index: Int[Tensor, "T S"]


def sinusoids(positions: Float[Tensor, "*S"], width: int) -> Float[Tensor, "*S P"]:
    """Table s(p) of sines (first half) and cosines (second half) at geometrically spaced frequencies.

    Args:
        positions: real numbers, in codes; any sign.
        width: P, even.
    Source: Vaswani et al. 2017, section 3.5, as in Transformer-XL.
    """
    angles = _angles(positions, width)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(positions.dtype)


def rotate(vectors: Float[Tensor, "*N T P"], positions: Float[Tensor, " T"]) -> Float[Tensor, "*N T P"]:
    """Rot_i y for each row i; by the addition theorems rotate(y, i) . s(-j) == y . s(i - j), and
    rotate(y, i) . rotate(z, j) == rotate(y, i - j) . z."""
    cosine, sine = (table.to(vectors.dtype) for table in rotation_table(positions, vectors.shape[-1]))
    return vectors * cosine + quarter_turn(vectors) * sine


def rotation_table(positions: Float[Tensor, " T"], width: int) -> tuple[Float[Tensor, "T P"], Float[Tensor, "T P"]]:
    """Cosines and sines with which Rot_i y = y * cosine + quarter_turn(y) * sine."""
    angles = _angles(positions, width)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(positions.dtype), angles.sin().to(positions.dtype)


def quarter_turn(vectors: Float[Tensor, "*N P"]) -> Float[Tensor, "*N P"]:
    """Each sine/cosine pair turned by 90 degrees."""
    for_sine, for_cosine = vectors.chunk(2, dim=-1)
    return torch.cat([-for_cosine, for_sine], dim=-1)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a boolean mask is True and -inf elsewhere, in `dtype`."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def fused_attention(
    content_query: Float[Tensor, "N H T E"],
    position_query: Float[Tensor, "N H T P"],
    keys: Float[Tensor, "N H S E"],
    values: Float[Tensor, "N H S E"],
    *,
    query_positions: Float[Tensor, " T"],
    key_positions: Float[Tensor, " S"],
    mask: Float[Tensor, "T S"] | Float[Tensor, "N 1 T S"],
    share: None = None,
    distances: None = None,
) -> Float[Tensor, "N H T E"]:
    """Relative attention as plain attention over widened heads, in one fused kernel.

    Queries [q + u ; Rot_i W_R^T (q + v)] and keys [k ; s(-j)]: neither a bias tensor nor a skew is made. The last T
    keys are the queries' own window, which is causal: a long window is done in blocks of queries, each with the keys
    that it can see. Arguments as in `reference_attention`.
    """
    head_width, (num_windows, num_heads) = keys.shape[-1], keys.shape[:2]
    wide_query, wide_keys, wide_values = content_query, keys, values
    if position_query.shape[-1]:
        position_keys = sinusoids(-key_positions, position_query.shape[-1]).to(keys.dtype)
        position_keys = repeat(position_keys, "s p -> n h s p", n=num_windows, h=num_heads)
        wide_query = torch.cat([content_query, rotate(position_query, query_positions)], dim=-1)
        wide_keys = torch.cat([keys, position_keys], dim=-1)
        # As wide as the queries, or the CPU's flash kernel silently gives way to one that makes all T x S weights.
        wide_values = F.pad(values, (0, position_query.shape[-1]))
    mask = mask.to(keys.dtype)
    num_queries, num_earlier = wide_query.shape[2], keys.shape[2] - wide_query.shape[2]
    outputs = []
    length = CPU_QUERY_BLOCK_LENGTH if keys.device.type == "cpu" else QUERY_BLOCK_LENGTH
    for begin in range(0, num_queries, length):
        end = min(begin + length, num_queries)
        visible = num_earlier + end  # later keys of the window are seen by no query of this block
        output = F.scaled_dot_product_attention(
            wide_query[:, :, begin:end],
            wide_keys[:, :, :visible],
            wide_values[:, :, :visible],
            attn_mask=mask[..., begin:end, :visible],
            scale=head_width**-0.5,  # of the head, not of the widened head
        )
        outputs.append(output[..., :head_width])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def reference_attention(
    content_query: Float[Tensor, "N H T E"],
    position_query: Float[Tensor, "N H T P"],
    keys: Float[Tensor, "N H S E"],
    values: Float[Tensor, "N H S E"],
    *,
    query_positions: Float[Tensor, " T"],
    key_positions: Float[Tensor, " S"],
    mask: Float[Tensor, "T S"] | Float[Tensor, "N 1 T S"],
    share: Float[Tensor, "H 1 S"] | None = None,
    distances: Distances | None = None,
) -> Float[Tensor, "N H T E"]:
    """Relative attention as the formula says; it makes every weight, T x S a head.

    Args:
        content_query: q + u.
        position_query: W_R^T (q + v).
        keys, values: of every visible row.
        query_positions, key_positions: in codes, any real numbers.
        mask: additive, 0 or -inf; every query sees at least one key.
        share: in [0, 1], by which each weight is multiplied before they are normalised (adaptive spans); above 0 for
            at least one key that the query sees. The fused backend takes none.
        distances: of these positions, where they are known; else they are found, for which a GPU must be waited for.
    Source: Dai et al. 2019 (Transformer-XL), section 3.3.
    """
    weights = attention_weights(
        content_query,
        position_query,
        keys,
        query_positions=query_positions,
        key_positions=key_positions,
        mask=mask,
        share=share,
        distances=distances,
    )
    return einsum(weights, values, "n h t s, n h s e -> n h t e")


def attention_weights(
    content_query: Float[Tensor, "N H T E"],
    position_query: Float[Tensor, "N H T P"],
    keys: Float[Tensor, "N H S E"],
    *,
    query_positions: Float[Tensor, " T"],
    key_positions: Float[Tensor, " S"],
    mask: Float[Tensor, "T S"] | Float[Tensor, "N 1 T S"],
    share: Float[Tensor, "H 1 S"] | None = None,
    distances: Distances | None = None,
) -> Float[Tensor, "N H T S"]:
    """The weights of relative attention, summing to 1 over the keys; arguments as in `reference_attention`."""
    if distances is None:
        distances = Distances(*torch.unique(query_positions[:, None] - key_positions[None, :], return_inverse=True))
    values, index = distances
    table = sinusoids(values, position_query.shape[-1]).to(keys.dtype)
    by_distance = einsum(position_query, table, "n h t p, r p -> n h t r")
    by_position = by_distance.gather(-1, index.expand(*by_distance.shape[:2], *index.shape))
    scores = einsum(content_query, keys, "n h t e, n h s e -> n h t s") + by_position
    scores = scores * keys.shape[-1] ** -0.5 + mask.to(scores.dtype)
    return torch.softmax(scores if share is None else scores + log_share(share).to(scores.dtype), dim=-1)


def log_share(share: Float[Tensor, "H 1 S"]) -> Float[Tensor, "H 1 S"]:
    """What, added to the scores, multiplies the weights by a share before they are normalised; -inf where it is 0.

    Within the softmax nothing underflows to 0 / 0, however far the scores of rows with a share lie below the others.
    Source: Sukhbaatar et al. 2019 (Adaptive Attention Span), arXiv 1905.07799, equation 5.
    """
    has_share = share > 0
    return torch.where(has_share, torch.where(has_share, share, 1.0).log(), -torch.inf)


def content_attention(
    query: Float[Tensor, "N H T E"],
    keys: Float[Tensor, "N H S E"],
    values: Float[Tensor, "N H S E"],
    mask: Float[Tensor, "N 1 1 S"] | None,
) -> Float[Tensor, "N H T E"]:
    """Attention by content alone, as the attention-reconstruction loss uses it (Algorithm 2)."""
    if mask is not None:
        mask = mask.to(keys.dtype).expand(-1, -1, query.shape[2], -1)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def attend_one(
    wide_query: Float[Tensor, "B H EP"],
    wide_keys: Float[Tensor, "B H S EP"],
    values: Float[Tensor, "B H S E"],
    mask: Float[Tensor, "B 1 1 S"] | None,
    share: Float[Tensor, "H 1 S"] | None = None,
) -> tuple[Float[Tensor, "B H E"], Float[Tensor, "B H S"]]:
    """Attention of a single query a lane over cached rows, and its weights.

    Args:
        wide_query: [q + u ; Rot_i W_R^T (q + v)], already divided by sqrt(E).
        wide_keys: [k ; s(-j)].
        mask: additive, or None where all rows are valid.
        share: as in `reference_attention`.
    """
    scores = wide_query[:, :, None] @ wide_keys.mT
    if mask is not None:
        scores = scores + mask
    if share is not None:
        scores = scores + log_share(share)
    weights = torch.softmax(scores, dim=-1)
    return (weights @ values)[:, :, 0], weights[:, :, 0]


def _angles(positions: Tensor, width: int) -> Tensor:
    # In float64: a float32 angle of several thousand radians has lost the digits that tell neighbours apart.
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    return positions.double()[..., None] * 10_000.0**-exponents


ATTENTION_BACKENDS: dict[str, Callable[..., Tensor]] = {"fused": fused_attention, "reference": reference_attention}
