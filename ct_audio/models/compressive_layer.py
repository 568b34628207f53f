"""One layer of the Compressive Transformer and the architecture's configuration.

Shape letters: B lanes, T codes of a chunk, W windows, N = B W, D width, H heads, E head width, P position width,
M memory rows, K compressed rows, S keys of a window.

The task loss trains everything but f_c; the attention-reconstruction loss trains f_c and nothing else.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ct_audio.errors import UserError
from ct_audio.models.attention import (
    ATTENTION_BACKENDS,
    additive_mask,
    attend_one,
    content_attention,
    quarter_turn,
    sinusoids,
)
from ct_audio.models.compression import COMPRESSION_FUNCTIONS
from ct_audio.models.layers import FeedForward, frozen_layer_norm, linear, shared_linear
from ct_audio.models.memory import push
from ct_audio.models.windows import (
    LayerMemory,
    View,
    geometry_of,
    key_positions,
    make_view,
    remember,
    windows_of_memory,
)


@dataclass(frozen=True)
class Config:
    """Architecture; lengths are in codes or rows.

    Attributes:
        vocab_size: number V of codes.
        num_layers, width, num_heads, feedforward_width: as in any transformer; head width is width / num_heads.
        position_width: P, width of the sinusoidal table (the paper's is `width`), even.
        dropout: of the embedding, of each sublayer's output and inside the feed-forward block.
        window_length: n_s. memory_length: n_m. compressed_memory_length: n_cm; 0 gives Transformer-XL.
        compression_rate: c, one number or a list with one a layer.
        compression_function: f_c. compression_loss: what trains f_c ("none": it stays as it was initialised).
        attention_backend: "fused" or "reference" (slow, the formula as it is written).
        norm_position: "post" as in the paper, or "pre".
    """

    name: Literal["compressive_transformer"] = "compressive_transformer"
    vocab_size: int = 256
    num_layers: int = 20
    width: int = 384
    num_heads: int = 6
    feedforward_width: int = 1024
    position_width: int = 64
    dropout: float = 0.0
    window_length: int = 768
    memory_length: int = 768
    compressed_memory_length: int = 768
    compression_rate: Any = 4
    compression_function: Literal["conv", "mean", "max"] = "conv"
    compression_loss: Literal["attention_reconstruction", "none"] = "attention_reconstruction"
    attention_backend: Literal["fused", "reference"] = "fused"
    norm_position: Literal["post", "pre"] = "post"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "width", "num_heads", "feedforward_width", "window_length"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("memory_length", "compressed_memory_length"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name}: expected at least 0, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise UserError(f"model.width = {self.width} is not divisible by model.num_heads = {self.num_heads}")
        if self.position_width < 2 or self.position_width % 2:
            raise UserError(f"model.position_width: expected an even number above 0, got {self.position_width}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout: expected a number in [0, 1), got {self.dropout}")
        for rate in self.compression_rates:
            check_whole_groups(self.compressed_memory_length, rate, window=self.window_length)
            check_whole_groups(self.compressed_memory_length, rate, memory=self.memory_length)

    @property
    def compression_rates(self) -> tuple[int, ...]:
        """The compression rate of each layer."""
        rate = self.compression_rate
        rates = tuple(rate) if isinstance(rate, list | tuple) else (rate,) * self.num_layers
        whole = all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in rates)
        if len(rates) != self.num_layers or not whole:
            raise UserError(
                f"model.compression_rate: expected a whole number of at least 1, or a list of {self.num_layers}, "
                f"got {rate}"
            )
        return rates


class LayerCache(NamedTuple):
    """What a layer keeps between two steps.

    Attributes:
        weight, bias: all products of a row in one: content query, position query straight and turned, key, value.
        inputs: [B, window length, D], raw inputs of the unfinished window.
        wide_keys: [B, H, S, E + P], keys and position table of every visible row and of the window.
        values: [B, H, S, E].
        mask: additive, or None where all rows are valid.
    """

    weight: Float[Tensor, "O D"]
    bias: Float[Tensor, "O"]
    inputs: Float[Tensor, "B T D"]
    wide_keys: Float[Tensor, "B H S EP"]
    values: Float[Tensor, "B H S E"]
    mask: Float[Tensor, "B 1 1 S"] | None


class CompressiveLayer(nn.Module):
    """Attention over compressed memory, memory and window, then a feed-forward block; and the layer's f_c."""

    def __init__(self, config: Config, compression_rate: int) -> None:
        super().__init__()
        self.config = config
        self.compression_rate = compression_rate if config.compressed_memory_length else 1
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
        self.compression: nn.Module | None = None
        if config.compressed_memory_length:
            self.compression = COMPRESSION_FUNCTIONS[config.compression_function](width, compression_rate)
            self.compression.requires_grad_(config.compression_loss != "none")

    def forward(
        self, rows: Float[Tensor, "B T D"], memory: LayerMemory, view: View, *, with_push: bool
    ) -> tuple[Float[Tensor, "B T D"], LayerMemory, Float[Tensor, ""] | None]:
        """Outputs of all windows, the next memory (unchanged without a push) and the loss that trains f_c."""
        query, own, later, remembered = self._project(rows, memory)
        old_memory, next_memory = push(memory.memory.detach(), rows.detach())
        stream = torch.cat([remembered, later], dim=1)
        compressed_stream = self.key_value(self._read(memory.compressed_memory.detach()))
        new_compressed, loss = None, None
        if with_push and self.compression is not None:
            new_compressed = self.compression(old_memory)
            if torch.is_grad_enabled() and self.config.compression_loss == "attention_reconstruction":
                loss = self._reconstruction_loss(query, stream[:, : rows.shape[1]], new_compressed, view)
            new_compressed = new_compressed.detach().to(rows.dtype)
            compressed_stream = torch.cat([compressed_stream, self.key_value(self._read(new_compressed))], dim=1)
        num_windows = rows.shape[1] // view.geometry.window_length
        earlier = windows_of_memory(view.geometry, compressed_stream, stream, num_windows)
        own = rearrange(own, "b (w t) d -> (b w) t d", w=num_windows)
        attended = self._attend(query, torch.cat([*earlier, own], dim=1), view)
        outputs = self._finish(rows, attended)
        if with_push:
            _, next_memory = push(memory.memory, rows)
            memory = remember(memory, next_memory, new_compressed, view)
        return outputs, memory, loss

    def step(
        self, rows: Float[Tensor, "B D"], cache: LayerCache, position: int, rotation: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "B D"]:
        """Output for one row a lane at `position` of the window; writes its key and value into the cache.

        Args:
            rotation: cosines and sines [P] of the position.
        """
        heads, width, extra = self.config.num_heads, self.config.width, self.config.num_heads * len(rotation[0])
        projected = F.linear(self._read(rows), cache.weight, cache.bias)
        content, straight, turned, key, value = (
            part.unflatten(1, (heads, -1)) for part in projected.split([width, extra, extra, width, width], dim=1)
        )
        wide_query = torch.cat([content, torch.addcmul(straight * rotation[0], turned, rotation[1])], dim=-1)
        index = cache.values.shape[2] - self.config.window_length + position
        cache.wide_keys[:, :, index, : key.shape[-1]] = key
        cache.values[:, :, index] = value
        end = index + 1
        mask = None if cache.mask is None else cache.mask[..., :end]
        attended = attend_one(wide_query, cache.wide_keys[:, :, :end], cache.values[:, :, :end], mask)
        return self._finish(rows, attended.flatten(1))

    def new_cache(self, memory: LayerMemory, inputs: Float[Tensor, "B T D"]) -> LayerCache:
        """Caches for stepping through a window, with the products that one step needs folded into one matrix."""
        heads, scale = self.config.num_heads, (self.config.width // self.config.num_heads) ** -0.5
        query = rearrange(self.query.weight, "(h e) d -> h e d", h=heads) * scale
        straight = einsum(self.position, query, "h e p, h e d -> h p d")
        for_bias = einsum(self.position, self.position_bias * scale, "h e p, h e -> h p")
        turned, turned_bias = quarter_turn(straight.mT).mT, quarter_turn(for_bias)
        weight = torch.cat([*(part.flatten(0, 1) for part in (query, straight, turned)), self.key_value.weight])
        bias = torch.cat([(self.content_bias * scale).flatten(), for_bias.flatten(), turned_bias.flatten()])
        bias = F.pad(bias, (0, len(weight) - len(bias)))
        geometry = geometry_of(memory, window_length=inputs.shape[1], compression_rate=self.compression_rate)
        table = sinusoids(-key_positions(geometry, inputs), self.config.position_width)
        wide_keys = F.pad(table, (self.config.width // heads, 0)).expand(len(inputs), heads, -1, -1).contiguous()
        values = wide_keys.new_empty(*wide_keys.shape[:3], self.config.width // heads)
        return self.refill_cache(LayerCache(weight, bias, inputs.clone(), wide_keys, values, None), memory)

    def refill_cache(self, cache: LayerCache, memory: LayerMemory) -> LayerCache:
        """The cache with keys and values of another memory; it reuses the buffers.

        Rows of the window that are not known yet get values that `step` overwrites.
        """
        rows = torch.cat([memory.compressed_memory, memory.memory, cache.inputs], dim=1)
        both = self.key_value(self._read(rows))
        keys, values = rearrange(both, "b s (two h e) -> two b h s e", two=2, h=self.config.num_heads)
        cache.wide_keys[..., : keys.shape[-1]] = keys
        cache.values.copy_(values)
        window_length = cache.inputs.shape[1]
        geometry = geometry_of(memory, window_length=window_length, compression_rate=self.compression_rate)
        view = make_view(geometry, memory, window_length, None)
        return cache._replace(mask=None if view.documents is None else view.mask[:, :, -1:])

    def _read(self, rows: Tensor) -> Tensor:
        """Rows as attention reads them: memory keeps raw inputs, pre-norm is applied here."""
        return self.attention_norm(rows) if self.config.norm_position == "pre" else rows

    def _project(self, rows: Tensor, memory: LayerMemory) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [B, T, D]; keys and values [B, ..., 2 D] for the own window, for later windows, of the memory."""
        read = self._read(rows)
        own, later = shared_linear(read, self._read(rows.detach()), self.key_value.weight)
        return self.query(read), own, later, self.key_value(self._read(memory.memory.detach()))

    def _two_queries(self, query: Float[Tensor, "N T D"]) -> tuple[Tensor, Tensor]:
        """q + u [N, H, T, E] and W_R^T (q + v) [N, H, T, P]."""
        query = rearrange(query, "n t (h e) -> n h t e", h=self.config.num_heads)
        for_position = query + self.position_bias[:, None]
        return query + self.content_bias[:, None], einsum(for_position, self.position, "n h t e, h e p -> n h t p")

    def _attend(self, query: Tensor, keys_values: Float[Tensor, "N S E2"], view: View) -> Float[Tensor, "B T D"]:
        windows = rearrange(query, "b (w t) d -> (b w) t d", t=view.geometry.window_length)
        content_query, position_query = self._two_queries(windows)
        keys, values = rearrange(keys_values, "n s (two h e) -> two n h s e", two=2, h=self.config.num_heads)
        attended = ATTENTION_BACKENDS[self.config.attention_backend](
            content_query.to(keys.dtype),
            position_query.to(keys.dtype),
            keys,
            values,
            query_positions=view.query_positions,
            key_positions=view.key_positions,
            mask=view.mask,
        )
        return rearrange(attended, "(b w) h t e -> b (w t) (h e)", b=query.shape[0])

    def _finish(self, rows: Tensor, attended: Tensor) -> Tensor:
        """Output projection, residual, feed-forward block, with the norm after or before each."""
        attended = self.dropout(self.output(attended))
        if self.config.norm_position == "pre":
            middle = rows + attended
            return middle + self.dropout(self.feedforward(self.feedforward_norm(middle)))
        middle = self.attention_norm(rows + attended)
        return self.feedforward_norm(middle + self.dropout(self.feedforward(middle)))

    def _reconstruction_loss(
        self, query: Tensor, old_keys_values: Tensor, new_compressed: Tensor, view: View
    ) -> Float[Tensor, ""]:
        """Attention-reconstruction loss of all windows; its gradient reaches f_c and nothing else.

        Source: Algorithm 2. Differs: mean squared error (the L2 norm has no gradient at 0); a window whose old memory
        holds no valid row counts as zero.
        """
        length, rate = view.geometry.window_length, self.compression_rate

        def heads(rows: Tensor, rows_each: int) -> Tensor:
            return rearrange(
                rows, "b (w r) (s h e) -> s (b w) h r e", r=rows_each, h=self.config.num_heads, e=head_width
            )

        head_width = self.config.width // self.config.num_heads
        queries = heads(query.detach(), length)[0]
        old_keys, old_values = heads(old_keys_values.detach(), length)
        pre_norm = self.config.norm_position == "pre"
        read = frozen_layer_norm(self.attention_norm, new_compressed) if pre_norm else new_compressed
        new_keys, new_values = heads(F.linear(read, self.key_value.weight.detach()), length // rate)
        old_mask = new_mask = None
        weight = queries.new_ones(())
        if view.documents is not None:
            before = rearrange(view.documents.before, "b w -> (b w) 1")
            old_valid = rearrange(view.documents.stream[:, : query.shape[1]], "b (w r) -> (b w) r", r=length)
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


def check_whole_groups(compressed_memory_length: int, rate: int, **lengths: int) -> None:
    """Raise `UserError` where a length is not a whole number of groups of `rate` rows."""
    for name, length in lengths.items():
        if compressed_memory_length and length % rate:
            raise UserError(
                f"model.{name}_length = {length} is not divisible by model.compression_rate = {rate}; a group of "
                f"{rate} must not mix valid and invalid rows"
            )


def _rows_mask(valid: Bool[Tensor, "N R"], dtype: torch.dtype) -> Float[Tensor, "N 1 1 R"]:
    return additive_mask(valid[:, None, None, :], dtype)
