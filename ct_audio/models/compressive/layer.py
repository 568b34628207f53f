"""One layer of the Compressive Transformer.

Shape letters: B lanes, T codes of a chunk, W windows, N = B W, D width, H heads, E head width, P position width,
M memory rows, K compressed rows, S keys of a window.

The task loss trains everything but f_c (with `bptt` it trains f_c too); the other losses of f_c train f_c and what
belongs to it, and nothing else.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ct_audio.models.compressive.attention import (
    ATTENTION_BACKENDS,
    additive_mask,
    attend_one,
    attention_weights,
    content_attention,
    quarter_turn,
    sinusoids,
)
from ct_audio.models.compressive.compression import COMPRESSION_FUNCTIONS, Decoder, autoencoding_loss, choose_most_used
from ct_audio.models.compressive.config import Config
from ct_audio.models.compressive.memory import push
from ct_audio.models.compressive.windows import (
    Geometry,
    LayerMemory,
    View,
    geometry_of,
    key_positions,
    make_view,
    remember,
    windows_of_memory,
)
from ct_audio.models.layers import FeedForward, frozen_layer_norm, linear, shared_linear


class LayerCache(NamedTuple):
    """What a layer keeps between two steps.

    Attributes:
        weight, bias: all products of a row in one: content query, position query straight and turned, key, value.
        inputs: [B, window length, D], raw inputs of the unfinished window.
        wide_keys: [B, H, S, E + P], keys and position table of every visible row and of the window.
        values: [B, H, S, E].
        mask: additive, or None where all rows are valid.
        usage: [B, M + T], attention that each row of memory and window has got so far, summed over the window's
            queries, mean over heads; None unless `most_used` needs it.
        share: what adaptive spans leave of the attention to each row; None without them.
    """

    weight: Float[Tensor, "O D"]
    bias: Float[Tensor, "O"]
    inputs: Float[Tensor, "B T D"]
    wide_keys: Float[Tensor, "B H S EP"]
    values: Float[Tensor, "B H S E"]
    mask: Float[Tensor, "B 1 1 S"] | None
    usage: Float[Tensor, "B MT"] | None
    share: Float[Tensor, "H 1 S"] | None


class LayerOutput(NamedTuple):
    """What a layer makes of a chunk.

    Attributes:
        rows: [B, T, D].
        memory: the next memory (unchanged without a push).
        losses: of f_c, by name.
        usage: as in `LayerCache`, of this chunk, which is one window then.
    """

    rows: Float[Tensor, "B T D"]
    memory: LayerMemory
    losses: dict[str, Float[Tensor, ""]]
    usage: Float[Tensor, "B MT"] | None


class CompressiveLayer(nn.Module):
    """Attention over compressed memory, memory and window, then a feed-forward block; and the layer's f_c."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.config = config
        compresses = bool(config.compressed_memory_length) and config.keeps_memory(index)
        self.compression_rate = config.compression_rates[index] if compresses else 1
        self.chooses_most_used = compresses and config.compression_function == "most_used"
        width, heads, head_width = config.width, config.num_heads, config.width // config.num_heads
        gain = (2 * config.num_layers) ** -0.5 if config.norm_position == "pre" else 1.0
        self.query = linear(width, width)
        self.key_value = linear(width, 2 * width)
        self.position = nn.Parameter(
            torch.randn(heads, head_width, config.position_width) * config.position_width**-0.5
        )
        self.content_bias = nn.Parameter(torch.zeros(heads, head_width))  # u
        self.position_bias = nn.Parameter(torch.zeros(heads, head_width))  # v
        self.output = linear(width, width, gain=gain)
        self.attention_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(
            width, config.feedforward_width, dropout=config.dropout, output_gain=gain * 2**0.5
        )
        self.feedforward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.span = nn.Parameter(torch.ones(heads)) if config.adaptive_span and config.keeps_memory(index) else None
        self.compression: nn.Module | None = None
        self.compression_decoder: Decoder | None = None
        if compresses and not self.chooses_most_used:
            self.compression = COMPRESSION_FUNCTIONS[config.compression_function](width, self.compression_rate)
            self.compression.requires_grad_(config.compression_loss != "none")
            if config.compression_loss == "autoencoding":
                self.compression_decoder = Decoder(width, self.compression_rate)

    def forward(self, rows: Float[Tensor, "B T D"], memory: LayerMemory, view: View, *, with_push: bool) -> LayerOutput:
        """All windows of a chunk at once (with `most_used`, the chunk is one window)."""
        query, own, later, remembered = self._project(rows, memory)
        old_memory, next_memory = push(memory.memory.detach(), rows.detach())
        stream = torch.cat([remembered, later], dim=1)
        compressed_stream = self.key_value(self.read(memory.compressed_memory.detach()))
        num_windows = rows.shape[1] // view.geometry.window_length
        own = rearrange(own, "b (w t) d -> (b w) t d", w=num_windows)
        new_compressed, losses, usage = None, {}, None
        if self.chooses_most_used:
            earlier = windows_of_memory(view.geometry, compressed_stream, stream, num_windows)
            usage = self._usage(query, torch.cat([*earlier, own], dim=1), view)
        if with_push:
            new_compressed, view = self.compress(old_memory, usage, view)
        if new_compressed is not None:
            if torch.is_grad_enabled():
                losses = self._losses(query, stream[:, : rows.shape[1]], old_memory, new_compressed, view)
            new_compressed = new_compressed.to(rows.dtype)
            if self.config.compression_loss != "bptt":
                new_compressed = new_compressed.detach()
            compressed_stream = torch.cat([compressed_stream, self.key_value(self.read(new_compressed))], dim=1)
        earlier = windows_of_memory(view.geometry, compressed_stream, stream, num_windows)
        attended = self._attend(query, torch.cat([*earlier, own], dim=1), view)
        outputs = self._finish(rows, attended)
        if self.span is not None and torch.is_grad_enabled():
            losses = losses | {"adaptive_span": self.config.adaptive_span_loss * self.spans().mean()}
        if with_push:
            _, next_memory = push(memory.memory, rows)
            memory = remember(memory, next_memory, new_compressed, view)
        return LayerOutput(outputs, memory, losses, usage)

    @torch.no_grad()
    def attention(self, rows: Float[Tensor, "B T D"], memory: LayerMemory, view: View) -> Float[Tensor, "B H T S"]:
        """Attention weights of one window over compressed memory, memory and itself; `forward` makes none of them."""
        seen = torch.cat([memory.compressed_memory, memory.memory, rows], dim=1)
        return self._weights(self.query(self.read(rows)), self.key_value(self.read(seen)), view)

    def compress(
        self, old_memory: Float[Tensor, "B T D"], usage: Float[Tensor, "B MT"] | None, view: View
    ) -> tuple[Float[Tensor, "B K D"] | None, View]:
        """What becomes of the rows that leave (None: nothing is kept), and the view that knows its documents."""
        if not view.geometry.compressed_memory_length:  # in evaluation: nothing would be left of it
            return None, view
        if self.compression is not None:
            return self.compression(old_memory), view
        if not self.chooses_most_used:
            return None, view
        assert usage is not None
        length = old_memory.shape[1]
        usage = usage[:, :length]
        # A row of the window itself, which leaves at once where the memory is shorter, is seen by later queries only.
        positions = torch.arange(length, device=usage.device) - view.geometry.memory_length
        num_queries = view.geometry.window_length - positions.clamp(min=0)
        documents, selectable = view.documents, torch.ones_like(usage, dtype=torch.bool)
        if documents is not None:
            selectable = documents.stream[:, :length] == documents.stream[:, -1:]
        chosen = choose_most_used(usage / num_queries, selectable, length // self.compression_rate)
        if documents is not None:
            kept = documents.stream[:, :length].gather(1, chosen)
            before = documents.compressed_stream[:, : view.geometry.compressed_memory_length]
            view = view._replace(documents=documents._replace(compressed_stream=torch.cat([before, kept], dim=1)))
        return old_memory.gather(1, repeat(chosen, "b k -> b k d", d=old_memory.shape[2])), view

    def step(
        self, rows: Float[Tensor, "B D"], cache: LayerCache, position: int, rotation: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "B D"]:
        """Output for one row a lane at `position` of the window; writes its key and value into the cache.

        Args:
            rotation: cosines and sines [P] of the position.
        """
        heads, width, extra = self.config.num_heads, self.config.width, self.config.num_heads * len(rotation[0])
        projected = F.linear(self.read(rows), cache.weight, cache.bias)
        content, straight, turned, key, value = (
            part.unflatten(1, (heads, -1)) for part in projected.split([width, extra, extra, width, width], dim=1)
        )
        wide_query = torch.cat([content, torch.addcmul(straight * rotation[0], turned, rotation[1])], dim=-1)
        index = cache.values.shape[2] - self.config.window_length + position
        cache.wide_keys[:, :, index, : key.shape[-1]] = key
        cache.values[:, :, index] = value
        end = index + 1
        mask = None if cache.mask is None else cache.mask[..., :end]
        share = None if cache.share is None else cache.share[..., :end]
        attended, weights = attend_one(wide_query, cache.wide_keys[:, :, :end], cache.values[:, :, :end], mask, share)
        if cache.usage is not None:
            num_seen = cache.usage.shape[1] - self.config.window_length + position + 1
            cache.usage[:, :num_seen] += weights.mean(dim=1)[:, -num_seen:]
        return self._finish(rows, attended.flatten(1))

    def geometry(self, memory: LayerMemory, window_length: int) -> Geometry:
        """Lengths that decide what a window of this layer sees."""
        temporal = self.config.compressed_positions == "temporal"
        return geometry_of(
            memory, window_length=window_length, compression_rate=self.compression_rate, temporal=temporal
        )

    def new_cache(
        self, memory: LayerMemory, inputs: Float[Tensor, "B T D"], usage: Float[Tensor, "B _"] | None
    ) -> LayerCache:
        """Caches for stepping through a window, with the products that one step needs folded into one matrix.

        Args:
            inputs: raw inputs of the window, those not known yet arbitrary.
            usage: of the part of the window that is known; None where there is none (or no need).
        """
        heads, scale = self.config.num_heads, (self.config.width // self.config.num_heads) ** -0.5
        query = rearrange(self.query.weight, "(h e) d -> h e d", h=heads) * scale
        straight = einsum(self.position, query, "h e p, h e d -> h p d")
        for_bias = einsum(self.position, self.position_bias * scale, "h e p, h e -> h p")
        turned, turned_bias = quarter_turn(straight.mT).mT, quarter_turn(for_bias)
        weight = torch.cat([*(part.flatten(0, 1) for part in (query, straight, turned)), self.key_value.weight])
        bias = torch.cat([(self.content_bias * scale).flatten(), for_bias.flatten(), turned_bias.flatten()])
        bias = F.pad(bias, (0, len(weight) - len(bias)))
        geometry = self.geometry(memory, inputs.shape[1])
        table = sinusoids(-key_positions(geometry, inputs), self.config.position_width)
        wide_keys = F.pad(table, (self.config.width // heads, 0)).expand(len(inputs), heads, -1, -1).contiguous()
        values = wide_keys.new_empty(*wide_keys.shape[:3], self.config.width // heads)
        cache = LayerCache(weight, bias, inputs.clone(), wide_keys, values, None, None, self._share(geometry))
        cache = self.refill_cache(cache, memory)
        if cache.usage is not None and usage is not None:
            cache.usage[:, : usage.shape[1]] = usage
        return cache

    def refill_cache(self, cache: LayerCache, memory: LayerMemory) -> LayerCache:
        """The cache with keys and values of another memory and no usage yet; it reuses the buffers.

        Rows of the window that are not known yet get values that `step` overwrites.
        """
        rows = torch.cat([memory.compressed_memory, memory.memory, cache.inputs], dim=1)
        both = self.key_value(self.read(rows))
        keys, values = rearrange(both, "b s (two h e) -> two b h s e", two=2, h=self.config.num_heads)
        cache.wide_keys[..., : keys.shape[-1]] = keys
        cache.values.copy_(values)
        window_length = cache.inputs.shape[1]
        geometry = self.geometry(memory, window_length)
        view = make_view(geometry, memory, window_length, None)
        num_rows = memory.memory.shape[1] + window_length
        usage = rows.new_zeros(len(rows), num_rows) if self.chooses_most_used else None
        return cache._replace(mask=None if view.documents is None else view.mask[:, :, -1:], usage=usage)

    def spans(self) -> Float[Tensor, "H"]:
        """How far each head looks back before it fades, in rows of memory and compressed memory."""
        assert self.span is not None
        return self.span.clamp(0, 1) * (self.config.memory_length + self.config.compressed_memory_length)

    def _share(self, geometry: Geometry) -> Float[Tensor, "H 1 S"] | None:
        """What the adaptive spans leave of the attention to each row; rows of the window itself are left whole.

        Source: Sukhbaatar et al. 2019, arXiv 1905.07799, equation 2. Differs: distances are counted in rows from the
        window's first code, so that spans cover both memories and nothing else, and the longest leaves them whole.
        """
        if self.span is None:
            return None
        num_remembered, ramp = geometry.num_keys - geometry.window_length, self.config.adaptive_span_ramp
        distances = torch.arange(num_remembered, 0, -1, dtype=self.span.dtype, device=self.span.device)
        share = ((ramp + rearrange(self.spans(), "h -> h 1 1") - distances) / ramp).clamp(0, 1)
        return F.pad(share, (0, geometry.window_length), value=1.0)

    def read(self, rows: Tensor) -> Tensor:
        """Rows as attention reads them: memory keeps raw inputs, pre-norm is applied here."""
        return self.attention_norm(rows) if self.config.norm_position == "pre" else rows

    def _project(self, rows: Tensor, memory: LayerMemory) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [B, T, D]; keys and values [B, ..., 2 D] for the own window, for later windows, of the memory."""
        read = self.read(rows)
        own, later = shared_linear(read, self.read(rows.detach()), self.key_value.weight)
        return self.query(read), own, later, self.key_value(self.read(memory.memory.detach()))

    def _two_queries(self, query: Float[Tensor, "N T D"]) -> tuple[Tensor, Tensor]:
        """q + u [N, H, T, E] and W_R^T (q + v) [N, H, T, P]."""
        query = rearrange(query, "n t (h e) -> n h t e", h=self.config.num_heads)
        for_position = query + self.position_bias[:, None]
        return query + self.content_bias[:, None], einsum(for_position, self.position, "n h t e, h e p -> n h t p")

    def _attend(self, query: Tensor, keys_values: Float[Tensor, "N S E2"], view: View) -> Float[Tensor, "B T D"]:
        content_query, position_query, keys, values = self._heads(query, keys_values, view)
        attended = ATTENTION_BACKENDS[self.config.attention_backend](
            content_query,
            position_query,
            keys,
            values,
            query_positions=view.query_positions,
            key_positions=view.key_positions,
            mask=view.mask,
            share=self._share(view.geometry),
        )
        return rearrange(attended, "(b w) h t e -> b (w t) (h e)", b=query.shape[0])

    def _heads(self, query: Tensor, keys_values: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both queries, keys and values of each window, by heads and in one dtype."""
        windows = rearrange(query, "b (w t) d -> (b w) t d", t=view.geometry.window_length)
        content_query, position_query = self._two_queries(windows)
        keys, values = rearrange(keys_values, "n s (two h e) -> two n h s e", two=2, h=self.config.num_heads)
        return content_query.to(keys.dtype), position_query.to(keys.dtype), keys, values

    @torch.no_grad()
    def _usage(self, query: Tensor, keys_values: Tensor, view: View) -> Float[Tensor, "B MT"]:
        """Attention that each row of memory and window gets from the window's queries: their sum, mean over heads."""
        usage = reduce(self._weights(query, keys_values, view), "n h t s -> n s", "sum") / self.config.num_heads
        return usage[:, view.geometry.compressed_memory_length :]

    def _weights(self, query: Tensor, keys_values: Tensor, view: View) -> Float[Tensor, "N H T S"]:
        content_query, position_query, keys, _ = self._heads(query, keys_values, view)
        return attention_weights(
            content_query,
            position_query,
            keys,
            query_positions=view.query_positions,
            key_positions=view.key_positions,
            mask=view.mask,
            share=self._share(view.geometry),
        )

    def _finish(self, rows: Tensor, attended: Tensor) -> Tensor:
        """Output projection, residual, feed-forward block, with the norm after or before each."""
        attended = self.dropout(self.output(attended))
        if self.config.norm_position == "pre":
            middle = rows + attended
            return middle + self.dropout(self.feedforward(self.feedforward_norm(middle)))
        middle = self.attention_norm(rows + attended)
        return self.feedforward_norm(middle + self.dropout(self.feedforward(middle)))

    def _losses(
        self, query: Tensor, old_keys_values: Tensor, old_memory: Tensor, new_compressed: Tensor, view: View
    ) -> dict[str, Float[Tensor, ""]]:
        """The losses of f_c by name; none reaches another parameter than those of f_c and of its decoder."""
        name = self.config.compression_loss
        if name == "attention_reconstruction":
            return {name: self._reconstruction_loss(query, old_keys_values, new_compressed, view)}
        if self.compression_decoder is None:
            return {}
        valid = None
        if view.documents is not None:
            valid = view.documents.compressed_stream[:, view.geometry.compressed_memory_length :] >= 0
        return {name: autoencoding_loss(old_memory, self.compression_decoder(new_compressed), valid)}

    def _reconstruction_loss(
        self, query: Tensor, old_keys_values: Tensor, new_compressed: Tensor, view: View
    ) -> Float[Tensor, ""]:
        """Attention-reconstruction loss of all windows; its gradient reaches f_c and nothing else.

        Source: Algorithm 2. Differs: mean squared error (the L2 norm has no gradient at 0); a window whose old memory
        holds no valid row counts as zero; a share of the queries, evenly spaced, where the configuration says so.
        """
        length, rate = view.geometry.window_length, self.compression_rate

        def heads(rows: Tensor, rows_each: int) -> Tensor:
            return rearrange(
                rows, "b (w r) (s h e) -> s (b w) h r e", r=rows_each, h=self.config.num_heads, e=head_width
            )

        head_width = self.config.width // self.config.num_heads
        queries = heads(query.detach(), length)[0]
        if self.config.reconstruction_query_share < 1:
            num_queries = max(1, round(self.config.reconstruction_query_share * length))
            queries = queries[:, :, torch.arange(num_queries, device=queries.device) * length // num_queries]
        old_keys, old_values = heads(old_keys_values.detach(), length)
        pre_norm = self.config.norm_position == "pre"
        read = frozen_layer_norm(self.attention_norm, new_compressed) if pre_norm else new_compressed
        new_keys, new_values = heads(F.linear(read, self.key_value.weight.detach()), length // rate)
        old_mask = new_mask = None
        weight = queries.new_ones(())
        if view.documents is not None:
            before = rearrange(view.documents.before, "b w -> (b w) 1")
            old_valid = rearrange(view.documents.stream[:, : old_keys_values.shape[1]], "b (w r) -> (b w) r", r=length)
            new = view.documents.compressed_stream[:, view.geometry.compressed_memory_length :]
            new_valid = rearrange(new, "b (w r) -> (b w) r", r=length // rate) >= before
            has_rows = new_valid.any(dim=1, keepdim=True)
            old_mask = _rows_mask((old_valid >= before) | ~has_rows, queries.dtype)
            new_mask = _rows_mask(new_valid | ~has_rows, queries.dtype)
            weight = rearrange(has_rows, "n 1 -> n 1 1 1").to(queries.dtype)
        with torch.no_grad():
            target = content_attention(queries, old_keys, old_values, old_mask)
        difference = content_attention(queries, new_keys, new_values, new_mask) - target
        difference = difference.float() if difference.dtype == torch.bfloat16 else difference
        return (weight * difference.square()).mean()


def _rows_mask(valid: Bool[Tensor, "N R"], dtype: torch.dtype) -> Float[Tensor, "N 1 1 R"]:
    return additive_mask(valid[:, None, None, :], dtype)
