"""One layer of the Compressive Transformer.

Shape letters: B lanes, T rows of a chunk, W windows, N = B W, D width, H heads, E head width, P position width,
M memory rows, K compressed rows, S keys of a window.

The task loss trains everything but f_c (with `bptt` it trains f_c too); the other losses of f_c train f_c and what
belongs to it, and nothing else.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

from ct_audio.models.compressive.attention import (
    ATTENTION_BACKENDS,
    attention_weights,
    rotate,
)
from ct_audio.models.compressive.compression import COMPRESSION_FUNCTIONS, Decoder, autoencoding_loss, choose_most_used
from ct_audio.models.compressive.config import StackConfig
from ct_audio.models.compressive.memory import codes_until_full, push
from ct_audio.models.compressive.reconstruction import attention_reconstruction_loss
from ct_audio.models.compressive.windows import (
    Geometry,
    LayerMemory,
    View,
    distances_of,
    geometry_of,
    old_rows_valid,
    remember,
    rows_to_compress,
    windows_of_memory,
)
from ct_audio.models.layers import FeedForward, frozen_layer_norm, keys_and_values, linear, shared_linear


class LayerOutput(NamedTuple):
    """What a layer makes of a chunk.

    Attributes:
        rows: [B, T, D].
        memory: the next memory (unchanged without a push).
        losses: of f_c, by name.
        usage: as in `stepping.LayerCache`, of this chunk, which is one window then.
    """

    rows: Float[Tensor, "B T D"]
    memory: LayerMemory
    losses: dict[str, Float[Tensor, ""]]
    usage: Float[Tensor, "B MT"] | None


class CompressiveLayer(nn.Module):
    """Attention over compressed memory, memory and window, then a feed-forward block; and the layer's f_c."""

    def __init__(self, config: StackConfig, index: int) -> None:
        super().__init__()
        self.config = config
        compresses = bool(config.compressed_memory_length) and config.keeps_memory(index)
        self.compression_rate = config.compression_rates[index] if compresses else 1
        self.chooses_most_used = compresses and config.compression_function == "most_used"
        width, heads, head_width = config.width, config.num_heads, config.width // config.num_heads
        gain = (2 * config.num_layers) ** -0.5 if config.norm_position == "pre" else 1.0
        self.query = linear(width, width)
        self.key_value = linear(width, 2 * config.key_width)
        self.is_rotary = config.positions == "rotary"
        if not self.is_rotary:
            position = torch.randn(heads, head_width, config.position_width)
            self.position = nn.Parameter(position * config.position_width**-0.5)
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
        outputs = self.finish(rows, attended)
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
            return self.compression(rows_to_compress(old_memory, view)), view
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

    def geometry(self, memory: LayerMemory, window_length: int) -> Geometry:
        """Lengths that decide what a window of this layer sees."""
        return geometry_of(
            memory,
            window_length=window_length,
            compression_rate=self.compression_rate,
            temporal=self.config.compressed_positions == "temporal",
            keeps_straddling=self.config.straddling_groups == "zero" and not self.chooses_most_used,
        )

    def codes_until_full(self, memory_length: int, compressed_memory_length: int, **valid: int) -> int:
        """Of a memory of these lengths; see `memory.codes_until_full`."""
        return codes_until_full(
            window_length=self.config.window_length,
            compression_rate=self.compression_rate,
            memory_length=memory_length,
            compressed_memory_length=compressed_memory_length,
            most_used=self.chooses_most_used,
            **valid,
        )

    def recount(self, memory: Tensor, compressed_memory: Tensor, valid: Tensor, compressed_valid: Tensor) -> int:
        """`codes_until_full` from the counts on the device, of the lane that has fewest."""
        lengths, fewest = (memory.shape[1], compressed_memory.shape[1]), int(valid.min())
        return self.codes_until_full(*lengths, memory_valid=fewest, compressed_memory_valid=int(compressed_valid.min()))

    def spans(self) -> Float[Tensor, " H"]:
        """How far each head looks back before it fades, in rows of memory and compressed memory."""
        assert self.span is not None
        return self.span.clamp(0, 1) * (self.config.memory_length + self.config.compressed_memory_length)

    def share(self, geometry: Geometry) -> Float[Tensor, "H 1 S"] | None:
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
        """Queries [B, T, D]; keys and values [B, ..., E2] for the own window, for later windows, of the memory."""
        read = self.read(rows)
        own, later = shared_linear(read, self.read(rows.detach()), self.key_value.weight)
        return self.query(read), own, later, self.key_value(self.read(memory.memory.detach()))

    def _two_queries(self, query: Float[Tensor, "N T D"], positions: Float[Tensor, " T"]) -> tuple[Tensor, Tensor]:
        """q + u [N, H, T, E] and W_R^T (q + v) [N, H, T, P]; with rotary positions Rot_i q, and P = 0."""
        query = rearrange(query, "n t (h e) -> n h t e", h=self.config.num_heads)
        if self.is_rotary:
            return rotate(query, positions), query[..., :0]
        for_position = query + self.position_bias[:, None]
        return query + self.content_bias[:, None], einsum(for_position, self.position, "n h t e, h e p -> n h t p")

    def _attend(self, query: Tensor, keys_values: Float[Tensor, "N S E2"], view: View) -> Float[Tensor, "B T D"]:
        content_query, position_query, keys, values = self._heads(query, keys_values, view)
        attend = ATTENTION_BACKENDS[self.config.attention_backend]
        seen = self._seen(view, with_distances=self.config.attention_backend == "reference")
        attended = attend(content_query, position_query, keys, values, **seen)
        return rearrange(attended, "(b w) h t e -> b (w t) (h e)", b=query.shape[0])

    def _heads(self, query: Tensor, keys_values: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both queries, keys and values of each window, by heads and in one dtype."""
        windows = rearrange(query, "b (w t) d -> (b w) t d", t=view.geometry.window_length)
        content_query, position_query = self._two_queries(windows, view.query_positions)
        heads, head_width = content_query.shape[1], content_query.shape[-1]
        keys, values = keys_and_values(keys_values, heads, head_width)
        if self.is_rotary:
            keys = rotate(keys, view.key_positions)
        return content_query.to(keys.dtype), position_query.to(keys.dtype), keys, values

    @torch.no_grad()
    def _usage(self, query: Tensor, keys_values: Tensor, view: View) -> Float[Tensor, "B MT"]:
        """Attention that each row of memory and window gets from the window's queries: their sum, mean over heads."""
        usage = reduce(self._weights(query, keys_values, view), "n h t s -> n s", "sum") / self.config.num_heads
        return usage[:, view.geometry.compressed_memory_length :]

    def _weights(self, query: Tensor, keys_values: Tensor, view: View) -> Float[Tensor, "N H T S"]:
        content_query, position_query, keys, _ = self._heads(query, keys_values, view)
        return attention_weights(content_query, position_query, keys, **self._seen(view, with_distances=True))

    def _seen(self, view: View, *, with_distances: bool) -> dict[str, Any]:
        """Where the keys stand and how much of each is seen, as arguments of an attention."""
        positions: dict[str, Any] = {"query_positions": view.query_positions, "key_positions": view.key_positions}
        if with_distances:
            positions["distances"] = distances_of(view.geometry, view.key_positions)
        return {**positions, "mask": view.mask, "share": self.share(view.geometry)}

    def finish(self, rows: Tensor, attended: Tensor) -> Tensor:
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
            pre_norm, share = self.config.norm_position == "pre", self.config.reconstruction_query_share
            read = frozen_layer_norm(self.attention_norm, new_compressed) if pre_norm else new_compressed
            new_keys_values = F.linear(read, self.key_value.weight.detach())
            loss = attention_reconstruction_loss(
                query, old_keys_values, new_keys_values, view, num_heads=self.config.num_heads, query_share=share
            )
            return {name: loss}
        if self.compression_decoder is None:
            return {}
        valid = old_rows_valid(view, old_memory.shape[1])
        new_valid = None if valid is None else rearrange(valid[1], "(b w) k -> b (w k)", b=len(old_memory))
        seen = rows_to_compress(old_memory, view)
        return {name: autoencoding_loss(seen, self.compression_decoder(new_compressed), new_valid)}
