"""One row a lane at a time: what a layer keeps between two steps, and the step itself.

A step reads keys and values that are made once a window and once a row. `stack.py` pushes a window that is complete
exactly as its forward pass does.
Shape letters: B lanes, T rows of a window, D width, H heads, E head width, P position width, M memory rows, S keys of a
window, O outputs of all products of a row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from ct_audio.models.compressive.attention import attend_one, quarter_turn, rotate, sinusoids
from ct_audio.models.compressive.layer import CompressiveLayer
from ct_audio.models.compressive.memory import LayerMemory, Memory, push
from ct_audio.models.compressive.windows import key_positions, make_view
from ct_audio.models.layers import keys_and_values


class LayerCache(NamedTuple):
    """What a layer keeps between two steps.

    Attributes:
        weight, bias: all products of a row in one: content query, position query straight and turned, key, value. With
            rotary positions there is no content query, and the query takes the position query's place.
        inputs: [B, window length, D], raw inputs of the unfinished window.
        wide_keys: [B, H, S, E + P], keys and position table of every visible row and of the window; turned keys
            [B, H, S, E] with rotary positions.
        values: [B, H, S, E].
        mask: additive, or None where all rows are valid.
        usage: [B, M + T], attention that each row of memory and window has got so far, summed over the window's
            queries, mean over heads; None unless `most_used` needs it.
        share: what adaptive spans leave of the attention to each row; None without them.
        ahead: what the push at the window's end will add where all rows are valid, computed in the window's middle:
            [B, T / C, D] compressed rows and the products of their keys and values; None where it is not known before.
    """

    weight: Float[Tensor, "O D"]
    bias: Float[Tensor, " O"]
    inputs: Float[Tensor, "B T D"]
    wide_keys: Float[Tensor, "B H S EP"]
    values: Float[Tensor, "B H S E"]
    mask: Float[Tensor, "B 1 1 S"] | None
    usage: Float[Tensor, "B MT"] | None
    share: Float[Tensor, "H 1 S"] | None
    ahead: tuple[Float[Tensor, "B _ D"], Float[Tensor, "B _ KV"]] | None = None


class StackState(NamedTuple):
    """State between two calls of `step`; it holds the weights as they were at `begin_steps`.

    Attributes:
        memory: as of the last whole window.
        caches: of each layer.
        rotation: cosines and sines [window length, P] of the positions of a window.
        position: rows of the unfinished window that have been consumed.
        starts: [B, window length], where a stream began anew in the unfinished window; None for nowhere.
        queues: of the convolutions, as of the last row; none where there are no convolutions.
    """

    memory: Memory
    caches: tuple[LayerCache, ...]
    rotation: tuple[Tensor, Tensor]
    position: int
    starts: Bool[Tensor, "B T"] | None = None
    queues: tuple[Tensor, ...] = ()


def new_cache(
    layer: CompressiveLayer, memory: LayerMemory, inputs: Float[Tensor, "B T D"], usage: Float[Tensor, "B _"] | None
) -> LayerCache:
    """Caches for stepping through a window, with the products that one step needs folded into one matrix.

    Args:
        inputs: raw inputs of the window, those not known yet arbitrary.
        usage: of the part of the window that is known; None where there is none (or no need).
    """
    heads, scale = layer.config.num_heads, (layer.config.width // layer.config.num_heads) ** -0.5
    query = rearrange(layer.query.weight, "(h e) d -> h e d", h=heads) * scale
    if layer.is_rotary:  # nothing but what is turned
        query, straight, content_bias = query[:, :0], query, query.new_zeros(heads, 0)
        for_bias = query.new_zeros(straight.shape[:2])
    else:
        straight, content_bias = einsum(layer.position, query, "h e p, h e d -> h p d"), layer.content_bias * scale
        for_bias = einsum(layer.position, layer.position_bias * scale, "h e p, h e -> h p")
    turned, turned_bias = quarter_turn(straight.mT).mT, quarter_turn(for_bias)
    weight = torch.cat([*(part.flatten(0, 1) for part in (query, straight, turned)), layer.key_value.weight])
    bias = torch.cat([content_bias.flatten(), for_bias.flatten(), turned_bias.flatten()])
    bias = F.pad(bias, (0, len(weight) - len(bias)))
    geometry = layer.geometry(memory, inputs.shape[1])
    table_width = 0 if layer.is_rotary else layer.config.position_width
    table = sinusoids(-key_positions(geometry, inputs), table_width)
    wide_keys = F.pad(table, (layer.config.width // heads, 0)).expand(len(inputs), heads, -1, -1).contiguous()
    values = wide_keys.new_empty(*wide_keys.shape[:3], layer.config.width // heads)
    cache = LayerCache(weight, bias, inputs.clone(), wide_keys, values, None, None, layer.share(geometry))
    cache = refill_cache(layer, cache, memory)
    if cache.usage is not None and usage is not None:
        cache.usage[:, : usage.shape[1]] = usage
    return cache._replace(ahead=compress_ahead(layer, memory, inputs.shape[1]))


def compress_ahead(
    layer: CompressiveLayer, memory: LayerMemory, window_length: int
) -> tuple[Float[Tensor, "B _ D"], Float[Tensor, "B _ KV"]] | None:
    """`LayerCache.ahead`: f_c of the memory's oldest rows, where these are all that leave with the window."""
    is_kept = memory.memory.shape[1] >= window_length and memory.compressed_memory.shape[1] > 0
    if layer.compression is None or not is_kept:
        return None
    compressed = layer.compression(memory.memory[:, :window_length])
    return compressed, layer.key_value(layer.read(compressed))


def renew_ahead(layer: CompressiveLayer, cache: LayerCache, memory: LayerMemory) -> None:
    """`compress_ahead` into the cache's buffers, of a layer that knows what will leave."""
    new = None if cache.ahead is None else compress_ahead(layer, memory, cache.inputs.shape[1])
    for kept, part in zip(cache.ahead or (), new or (), strict=True):
        kept.copy_(part)


def refill_cache(layer: CompressiveLayer, cache: LayerCache, memory: LayerMemory) -> LayerCache:
    """The cache with keys and values of another memory and no usage yet; it reuses the buffers.

    Rows of the window that are not known yet get values that `step` overwrites.
    """
    rows = torch.cat([memory.compressed_memory, memory.memory, cache.inputs], dim=1)
    _write_products(layer, cache, layer.key_value(layer.read(rows)), 0)
    length = cache.inputs.shape[1]
    geometry = layer.geometry(memory, length)
    if layer.is_rotary:
        cache.wide_keys.copy_(rotate(cache.wide_keys, key_positions(geometry, rows)))
    view = make_view(geometry, memory, length, None)
    num_rows = memory.memory.shape[1] + length
    usage = rows.new_zeros(len(rows), num_rows) if layer.chooses_most_used else None
    return cache._replace(mask=None if view.documents is None else view.mask[:, :, -1:], usage=usage)


def shift_cache(
    layer: CompressiveLayer, cache: LayerCache, memory: LayerMemory
) -> tuple[LayerCache, Float[Tensor, "B _ D"] | None]:
    """The cache at the beginning of the next window, in the same buffers, where all rows are valid: keys and values of
    rows that were there move, and only those that f_c has made of the others get theirs.

    Args:
        memory: of before the window.
    Returns:
        the cache, and the new compressed rows.
    """
    compressed, length = memory.compressed_memory.shape[1], cache.inputs.shape[1]
    new = cache.ahead
    if new is None and layer.compression is not None and compressed:
        old_memory, _ = push(memory.memory, cache.inputs)
        rows = layer.compression(old_memory)
        new = rows, layer.key_value(layer.read(rows))
    num_new = 0 if new is None else min(new[0].shape[1], compressed)
    for places in (cache.wide_keys[..., : cache.values.shape[-1]], cache.values):
        places[:, :, : compressed - num_new] = places[:, :, num_new:compressed].clone()
        places[:, :, compressed:-length] = places[:, :, compressed + length :].clone()
    if new is not None:
        _write_products(layer, cache, new[1][:, -num_new:], compressed - num_new)
    if layer.is_rotary:  # by as much as positions have changed; new rows have not been turned yet
        positions = key_positions(layer.geometry(memory, length), cache.inputs)
        turns = positions.clone()
        turns[: compressed - num_new] -= positions[num_new:compressed]
        turns[compressed:-length] -= positions[compressed + length :]
        cache.wide_keys.copy_(rotate(cache.wide_keys, turns))
    return cache._replace(mask=None), None if new is None else new[0]


def _write_products(layer: CompressiveLayer, cache: LayerCache, both: Float[Tensor, "B _ KV"], first: int) -> None:
    """Keys and values of some rows, from place `first` on."""
    keys, values = keys_and_values(both, layer.config.num_heads, cache.values.shape[-1])
    cache.wide_keys[:, :, first : first + both.shape[1], : keys.shape[-1]] = keys
    cache.values[:, :, first : first + both.shape[1]] = values


def hide_earlier_rows(cache: LayerCache, starts: Bool[Tensor, " B"], position: int) -> LayerCache:
    """Hide from the lanes whose stream begins anew at `position` of the window every row before it."""
    num_keys = cache.values.shape[2]
    mask = cache.wide_keys.new_zeros(len(starts), 1, 1, num_keys) if cache.mask is None else cache.mask
    mask[..., : num_keys - cache.inputs.shape[1] + position].masked_fill_(starts[:, None, None, None], -torch.inf)
    return cache._replace(mask=mask)


def step_layer(
    layer: CompressiveLayer,
    rows: Float[Tensor, "B D"],
    cache: LayerCache,
    position: int,
    rotation: tuple[Tensor, Tensor],
) -> Float[Tensor, "B D"]:
    """Output for one row a lane at `position` of the window; writes its key and value into the cache.

    Args:
        rotation: cosines and sines [P] of the position.
    """
    heads, width, extra = layer.config.num_heads, layer.config.width, layer.config.num_heads * len(rotation[0])
    projected = F.linear(layer.read(rows), cache.weight, cache.bias)
    by_content = 0 if layer.is_rotary else width
    *queries, both = projected.split([by_content, extra, extra, 2 * layer.config.key_width], dim=1)
    content, straight, turned = (query.unflatten(1, (heads, query.shape[1] // heads)) for query in queries)
    key, value = (part[:, :, 0] for part in keys_and_values(both[:, None], heads, width // heads))
    wide_query = torch.cat([content, torch.addcmul(straight * rotation[0], turned, rotation[1])], dim=-1)
    if layer.is_rotary:
        key = torch.addcmul(key * rotation[0], quarter_turn(key), rotation[1])
    index = cache.values.shape[2] - layer.config.window_length + position
    cache.wide_keys[:, :, index, : key.shape[-1]] = key
    cache.values[:, :, index] = value
    end = index + 1
    mask = None if cache.mask is None else cache.mask[..., :end]
    share = None if cache.share is None else cache.share[..., :end]
    attended, weights = attend_one(wide_query, cache.wide_keys[:, :, :end], cache.values[:, :, :end], mask, share)
    if cache.usage is not None:
        num_seen = cache.usage.shape[1] - layer.config.window_length + position + 1
        cache.usage[:, :num_seen] += weights.mean(dim=1)[:, -num_seen:]
    return layer.finish(rows, attended.flatten(1))
