"""The attention-reconstruction loss (Algorithm 2 of Rae et al. 2019): what f_c loses of what attention would read.

Shape letters: B lanes, W windows, N = B W, H heads, T queries, R rows of a window's old memory, K = R / c compressed
rows, D width, E head width.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from ct_audio.models.compressive.attention import additive_mask, content_attention
from ct_audio.models.compressive.windows import View, old_rows_valid
from ct_audio.models.layers import keys_and_values


def reconstruct(
    query: Float[Tensor, "N T D"],
    old: Float[Tensor, "N R D2"],
    new: Float[Tensor, "N K D2"],
    *,
    num_heads: int,
    old_mask: Float[Tensor, "N 1 1 R"] | None = None,
    new_mask: Float[Tensor, "N 1 1 K"] | None = None,
) -> tuple[Float[Tensor, "N H T E"], Float[Tensor, "N H T E"]]:
    """Content attention of the same queries over compressed rows and over the rows that they stand for.

    Args:
        query: projected queries.
        old, new: keys and values, side by side, of the old memory and of its compression.
        old_mask, new_mask: additive; None where all rows are valid.
    Returns:
        attention over `new`, whose gradient reaches `new` and nothing else, and over `old`, without a gradient.
    Source: Algorithm 2: attn(h, new_cm) and attn(h, old_mem), without positions.
    """

    queries, head_width = rearrange(query.detach(), "n t (h e) -> n h t e", h=num_heads), query.shape[2] // num_heads
    new_keys, new_values = keys_and_values(new, num_heads, head_width)
    old_keys, old_values = keys_and_values(old.detach(), num_heads, head_width)
    with torch.no_grad():
        wanted = content_attention(queries, old_keys, old_values, old_mask)
    return content_attention(queries, new_keys, new_values, new_mask), wanted


def attention_reconstruction_loss(
    query: Float[Tensor, "B WT D"],
    old: Float[Tensor, "B WT D2"],
    new: Float[Tensor, "B WK D2"],
    view: View,
    *,
    num_heads: int,
    query_share: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean over all windows of a chunk of the squared difference of the two attentions of `reconstruct`.

    Args:
        query, old, new: as in `reconstruct`, of all windows one after another; the rows that leave with the push of a
            window are as many as the window is long.
        view: which rows are valid.
        query_share: the share of each window's queries, evenly spaced, that is used.
    Source: Algorithm 2. Differs: mean squared error (the L2 norm has no gradient at 0); a window whose old memory holds
    no valid row counts as zero.
    """
    length, rate = view.geometry.window_length, view.geometry.compression_rate
    queries = rearrange(query, "b (w t) d -> (b w) t d", t=length)
    if query_share < 1:
        num_queries = max(1, round(query_share * length))
        queries = queries[:, torch.arange(num_queries, device=queries.device) * length // num_queries]
    old_mask = new_mask = None
    weight = queries.new_ones(())
    if (valid := old_rows_valid(view, old.shape[1])) is not None:
        old_valid, new_valid = valid
        has_rows = new_valid.any(dim=1, keepdim=True)
        old_mask = _rows_mask(old_valid | ~has_rows, queries.dtype)
        new_mask = _rows_mask(new_valid | ~has_rows, queries.dtype)
        weight = rearrange(has_rows, "n 1 -> n 1 1 1").to(queries.dtype)
    found, wanted = reconstruct(
        queries,
        rearrange(old, "b (w r) d -> (b w) r d", r=length),
        rearrange(new, "b (w r) d -> (b w) r d", r=length // rate),
        num_heads=num_heads,
        old_mask=old_mask,
        new_mask=new_mask,
    )
    difference = found - wanted
    difference = difference.float() if difference.dtype == torch.bfloat16 else difference
    return (weight * difference.square()).mean()


def _rows_mask(valid: Bool[Tensor, "N R"], dtype: torch.dtype) -> Float[Tensor, "N 1 1 R"]:
    return additive_mask(valid[:, None, None, :], dtype)
