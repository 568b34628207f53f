"""One layer of the Compressive Transformer and the architecture's configuration.

Shape letters: B lanes, T codes of a chunk, W windows, N = B W, D width, H heads, E head width, P position width,
M memory rows, K compressed rows, S keys of a window.

The task loss trains everything but f_c; the attention-reconstruction loss trains f_c and nothing else.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ct_audio.errors import UserError
from ct_audio.models.attention import ATTENTION_BACKENDS, additive_mask, attend_one, content_attention, rotate
from ct_audio.models.compression import COMPRESSION_FUNCTIONS
from ct_audio.models.layers import FeedForward, frozen_layer_norm, linear, shared_linear
from ct_audio.models.memory import push
from ct_audio.models.windows import LayerMemory, View, remember, windows_of_memory


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
        self,
        rows: Float[Tensor, "B D"],
        keys: Float[Tensor, "B H S E"],
        values: Float[Tensor, "B H S E"],
        position_keys: Float[Tensor, "S P"],
        mask: Float[Tensor, "B 1 1 S"] | None,
        *,
        position: int,
        key_index: int,
    ) -> Float[Tensor, "B D"]:
        """Output for one row a lane; writes its key and value into the caches at `key_index`."""
        read = self._read(rows)
        key, value = rearrange(self.key_value(read), "b (two h e) -> two b h e", two=2, h=self.config.num_heads)
        keys[:, :, key_index], values[:, :, key_index] = key, value
        content_query, position_query = self._two_queries(self.query(read)[:, None])
        here = torch.full((1,), position, dtype=rows.dtype, device=rows.device)
        end = key_index + 1
        attended = attend_one(
            content_query[:, :, 0],
            rotate(position_query, here)[:, :, 0],
            keys[:, :, :end],
            position_keys[:end],
            values[:, :, :end],
            mask if mask is None else mask[..., :end],
        )
        return self._finish(rows, rearrange(attended, "b h e -> b (h e)"))

    def cached_rows(
        self, memory: LayerMemory, inputs: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B H S E"], Float[Tensor, "B H S E"]]:
        """Keys and values (content part) of compressed memory, memory and the rows of a window."""
        rows = torch.cat([memory.compressed_memory, memory.memory, inputs], dim=1)
        both = self.key_value(self._read(rows))
        keys, values = rearrange(both, "b s (two h e) -> two b h s e", two=2, h=self.config.num_heads)
        return keys.contiguous(), values.contiguous()

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
