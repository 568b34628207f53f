"""The Compressive Transformer (Rae et al. 2019); with no compressed memory it is Transformer-XL (Dai et al. 2019).

Shape letters: B lanes, T codes of a chunk, R codes of an unfinished window, W windows, N = B W, D width, H heads,
E head width, P position width, M memory rows, K compressed rows, S keys of a window, V codes.

Layer l of window w needs only layer-l inputs of earlier windows, so a chunk runs layer by layer, all its windows at once.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ct_audio.errors import UserError
from ct_audio.models.attention import (
    ATTENTION_BACKENDS,
    additive_mask,
    attend_one,
    content_attention,
    rotate,
    sinusoids,
)
from ct_audio.models.compression import COMPRESSION_FUNCTIONS
from ct_audio.models.interface import ModelOutput
from ct_audio.models.layers import FeedForward, frozen_layer_norm, linear, shared_linear
from ct_audio.models.memory import Memory, map_memory, push
from ct_audio.models.windows import (
    Documents,
    Geometry,
    causal_mask,
    document_numbers,
    keep_valid,
    window_mask,
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
            _check_whole_groups(self.compressed_memory_length, rate, window=self.window_length)
            _check_whole_groups(self.compressed_memory_length, rate, memory=self.memory_length)

    @property
    def compression_rates(self) -> tuple[int, ...]:
        """The compression rate of each layer."""
        rate = self.compression_rate
        rates = tuple(rate) if isinstance(rate, list | tuple) else (rate,) * self.num_layers
        whole = all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in rates)
        if len(rates) != self.num_layers or not whole:
            raise UserError(
                f"model.compression_rate: expected a whole number of at least 1, or a list of {self.num_layers}, got {rate}"
            )
        return rates


class StepState(NamedTuple):
    """State between two calls of `step`.

    Attributes:
        memory: as of the last whole window.
        inputs: raw inputs of each layer in the unfinished window, L tensors [B, window length, D].
        keys, values: content part of every visible row and of the unfinished window, L tensors [B, H, S, E].
        position_keys: table s(-j) of each layer's rows, L tensors [S, P].
        masks: additive, L tensors [B, 1, 1, S], or None where all rows are valid.
        position: codes of the unfinished window that have been consumed.
    """

    memory: Memory
    inputs: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    position_keys: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]
    position: int


class _LayerMemory(NamedTuple):
    memory: Tensor
    compressed_memory: Tensor
    memory_valid: Tensor
    compressed_memory_valid: Tensor


class _View(NamedTuple):
    """What all layers of one geometry share in one forward pass; `documents` is None where all rows are valid."""

    geometry: Geometry
    mask: Tensor
    documents: Documents | None
    query_positions: Tensor
    key_positions: Tensor


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
        self, rows: Float[Tensor, "B T D"], memory: _LayerMemory, view: _View, *, with_push: bool
    ) -> tuple[Float[Tensor, "B T D"], _LayerMemory, Float[Tensor, ""] | None]:
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
            memory = _remember(memory, next_memory, new_compressed, view)
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
        self, memory: _LayerMemory, inputs: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B H S E"], Float[Tensor, "B H S E"]]:
        """Keys and values (content part) of compressed memory, memory and the rows of a window."""
        rows = torch.cat([memory.compressed_memory, memory.memory, inputs], dim=1)
        both = self.key_value(self._read(rows))
        keys, values = rearrange(both, "b s (two h e) -> two b h s e", two=2, h=self.config.num_heads)
        return keys.contiguous(), values.contiguous()

    def _read(self, rows: Tensor) -> Tensor:
        """Rows as attention reads them: memory keeps raw inputs, pre-norm is applied here."""
        return self.attention_norm(rows) if self.config.norm_position == "pre" else rows

    def _project(self, rows: Tensor, memory: _LayerMemory) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [B, T, D]; keys and values [B, ..., 2 D] for the own window, for later windows, of the memory."""
        read = self._read(rows)
        own, later = shared_linear(read, self._read(rows.detach()), self.key_value.weight)
        return self.query(read), own, later, self.key_value(self._read(memory.memory.detach()))

    def _two_queries(self, query: Float[Tensor, "N T D"]) -> tuple[Tensor, Tensor]:
        """q + u [N, H, T, E] and W_R^T (q + v) [N, H, T, P]."""
        query = rearrange(query, "n t (h e) -> n h t e", h=self.config.num_heads)
        for_position = query + self.position_bias[:, None]
        return query + self.content_bias[:, None], einsum(for_position, self.position, "n h t e, h e p -> n h t p")

    def _attend(self, query: Tensor, keys_values: Float[Tensor, "N S E2"], view: _View) -> Float[Tensor, "B T D"]:
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
        self, query: Tensor, old_keys_values: Tensor, new_compressed: Tensor, view: _View
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


class CompressiveTransformer(nn.Module):
    """Stack of `CompressiveLayer` over an embedding; keeps the contract of `interface.py`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight)
        self.layers = nn.ModuleList(CompressiveLayer(config, rate) for rate in config.compression_rates)
        self.final_norm = nn.LayerNorm(config.width) if config.norm_position == "pre" else nn.Identity()
        self.head = linear(config.width, config.vocab_size, bias=True, gain=0.5)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def window_length(self) -> int:
        return self.config.window_length

    @property
    def temporal_range(self) -> int:
        """Sum over layers of n_m + c_l n_cm, in codes (paper, section 3)."""
        config = self.config
        return sum(config.memory_length + rate * config.compressed_memory_length for rate in config.compression_rates)

    @property
    def attention_cost(self) -> int:
        """Sum over layers of n_s + n_m + n_cm, in rows."""
        config = self.config
        return config.num_layers * (config.window_length + config.memory_length + config.compressed_memory_length)

    def zero_memory(
        self, num_lanes: int, *, memory_length: int | None = None, compressed_memory_length: int | None = None
    ) -> Memory:
        """Memory of a stream that has not begun; lengths default to the configuration's.

        Raises:
            UserError: a length is negative or not a whole number of groups, or the model has no compression function.
        """
        config = self.config
        rows = config.memory_length if memory_length is None else memory_length
        compressed = config.compressed_memory_length if compressed_memory_length is None else compressed_memory_length
        if rows < 0 or compressed < 0:
            raise UserError(f"memory lengths: expected at least 0, got {rows} and {compressed}")
        if compressed and not config.compressed_memory_length:
            raise UserError(
                f"compressed_memory_length = {compressed}: this model was built without a compression function "
                f"(model.compressed_memory_length is 0); pass 0"
            )
        for rate in config.compression_rates:
            _check_whole_groups(compressed, rate, memory=rows)
        weight = self.head.weight

        def zeros(length: int) -> tuple[Tensor, ...]:
            return tuple(weight.new_zeros(num_lanes, length, config.width) for _ in self.layers)

        def counts() -> tuple[Tensor, ...]:
            return tuple(torch.zeros(num_lanes, dtype=torch.int64, device=weight.device) for _ in self.layers)

        return Memory(zeros(rows), zeros(compressed), counts(), counts())

    def forward(
        self, codes: Int[Tensor, "B T"], memory: Memory, *, document_starts: Bool[Tensor, "B T"] | None = None
    ) -> ModelOutput:
        """Features, next memory and the losses of f_c; see `interface.py`.

        Raises:
            UserError: the stream of this memory has ended (its last window was shorter), or there are no codes.
        """
        if memory.final:
            raise UserError("this memory is final: a shorter last window has ended its stream; begin with zero_memory")
        length, total = self.config.window_length, codes.shape[1]
        if total == 0:
            raise UserError("forward: expected at least one code, got none")
        whole = total - total % length
        features, losses = [], {}
        for part, window in ((slice(0, whole), length), (slice(whole, total), total - whole)):
            if part.start == part.stop:
                continue
            starts = None if document_starts is None else document_starts[:, part]
            output, memory, _ = self._run(codes[:, part], memory, starts, window_length=window)
            features.append(output.features)
            losses |= output.auxiliary_losses
        if whole < total:
            memory = memory._replace(final=True)
            losses = {name: loss * (whole / total) for name, loss in losses.items()}
        return ModelOutput(torch.cat(features, dim=1) if len(features) > 1 else features[0], memory, losses)

    def nll(self, features: Float[Tensor, "*batch D"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Negative log-likelihood of each target, in nats."""
        logits = self._logits(features)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)

    def log_probabilities(self, features: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Log-probabilities of all codes, in nats."""
        return torch.log_softmax(self._logits(features), dim=-1)

    def begin_steps(self, memory: Memory, codes: Int[Tensor, "B R"]) -> StepState:
        """State after R codes of an unfinished window (0 <= R < window_length), computed in parallel.

        Raises:
            UserError: there is a whole window of codes or more, or the memory is final.
        """
        length, (lanes, consumed) = self.config.window_length, codes.shape
        if memory.final:
            raise UserError("this memory is final: a shorter last window has ended its stream; begin with zero_memory")
        if consumed >= length:
            raise UserError(f"begin_steps: expected fewer codes than a window of {length}, got {consumed}; use forward")
        inputs = [self.head.weight.new_zeros(lanes, length, self.config.width) for _ in self.layers]
        if consumed:
            _, _, layer_inputs = self._run(codes, memory, None, window_length=consumed)
            for whole, part in zip(inputs, layer_inputs, strict=True):
                whole[:, :consumed] = part
        return self._cache(memory, tuple(inputs), consumed)

    def step(self, codes: Int[Tensor, "B"], state: StepState) -> tuple[Float[Tensor, "B D"], StepState]:
        """Features after one more code a lane. Consumes `state`: its caches are written in place."""
        rows, position = self.dropout(self.embedding(codes)), state.position
        for index, layer in enumerate(self.layers):
            state.inputs[index][:, position] = rows
            keys = state.keys[index]
            rows = cast(CompressiveLayer, layer).step(
                rows,
                keys,
                state.values[index],
                state.position_keys[index],
                state.masks[index],
                position=position,
                key_index=keys.shape[2] - self.config.window_length + position,
            )
        features = self.final_norm(rows)
        if position + 1 < self.config.window_length:
            return features, state._replace(position=position + 1)
        return features, self._cache(self._push_inputs(state), state.inputs, 0)

    def clone_state(self, state: StepState) -> StepState:
        """An independent copy."""
        return map_memory(torch.clone, state)

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of the model and of f_c apart: a shared norm would couple their losses again."""
        groups: dict[str, list[nn.Parameter]] = {"model": [], "compression": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups["compression" if ".compression." in name else "model"].append(parameter)
        return {name: parameters for name, parameters in groups.items() if parameters}

    def _logits(self, features: Tensor) -> Tensor:
        logits = self.head(features)
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

    def _run(
        self, codes: Tensor, memory: Memory, document_starts: Tensor | None, *, window_length: int
    ) -> tuple[ModelOutput, Memory, list[Tensor]]:
        """Run whole windows of `window_length`, layer by layer; also each layer's inputs. A short window is not pushed."""
        with_push = window_length == self.config.window_length
        rows, losses, inputs, remembered = self.dropout(self.embedding(codes)), {}, [], []
        views: dict[Geometry, _View] = {}
        for index, layer in enumerate(self.layers):
            layer_memory = _layer_memory(memory, index)
            geometry = self._geometry(layer_memory, index, window_length)
            if geometry not in views:  # layers of one geometry have had the same pushes: they share their counts
                views[geometry] = _make_view(geometry, layer_memory, codes, document_starts)
            inputs.append(rows)
            rows, layer_memory, loss = layer(rows, layer_memory, views[geometry], with_push=with_push)
            remembered.append(layer_memory)
            if loss is not None:
                losses[f"attention_reconstruction/layer_{index:02d}"] = loss
        memory = Memory(*(tuple(part) for part in zip(*remembered, strict=True)))
        return ModelOutput(self.final_norm(rows), memory, losses), memory, inputs

    def _geometry(self, memory: _LayerMemory, index: int, window_length: int) -> Geometry:
        rate = cast(CompressiveLayer, self.layers[index]).compression_rate
        return Geometry(window_length, memory.memory.shape[1], memory.compressed_memory.shape[1], rate)

    def _push_inputs(self, state: StepState) -> Memory:
        """Memory after the window whose layer inputs are complete, exactly as `forward` pushes it."""
        remembered = []
        codes = torch.zeros(state.inputs[0].shape[:2], dtype=torch.int64, device=state.inputs[0].device)
        for index, rows in enumerate(state.inputs):
            layer, memory = cast(CompressiveLayer, self.layers[index]), _layer_memory(state.memory, index)
            view = _make_view(self._geometry(memory, index, rows.shape[1]), memory, codes, None)
            old_memory, next_memory = push(memory.memory, rows)
            compressed = None if layer.compression is None else layer.compression(old_memory)
            remembered.append(_remember(memory, next_memory, compressed, view))
        return Memory(*(tuple(part) for part in zip(*remembered, strict=True)))

    def _cache(self, memory: Memory, inputs: tuple[Tensor, ...], position: int) -> StepState:
        """Project every visible row once; rows of the window that are not known yet are overwritten by `step`."""
        keys, values, position_keys, masks = [], [], [], []
        for index, rows in enumerate(inputs):
            layer, layer_memory = cast(CompressiveLayer, self.layers[index]), _layer_memory(memory, index)
            geometry = self._geometry(layer_memory, index, rows.shape[1])
            key, value = layer.cached_rows(layer_memory, rows)
            keys.append(key)
            values.append(value)
            key_positions = _key_positions(geometry, rows)
            position_keys.append(sinusoids(-key_positions, self.config.position_width))
            codes = torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device)
            view = _make_view(geometry, layer_memory, codes, None)
            masks.append(None if view.documents is None else view.mask[:, :, -1:])
        # Inputs are cloned: a forward pass must not see them change, and a new window must not write into a pushed memory.
        inputs = tuple(rows.clone() for rows in inputs)
        return StepState(memory, inputs, tuple(keys), tuple(values), tuple(position_keys), tuple(masks), position)


def build(config: Config) -> CompressiveTransformer:
    """Build the model with fresh parameters from torch's global generator."""
    return CompressiveTransformer(config)


def _layer_memory(memory: Memory, index: int) -> _LayerMemory:
    return _LayerMemory(*(part[index] for part in memory[:4]))


def _make_view(
    geometry: Geometry, memory: _LayerMemory, codes: Int[Tensor, "B T"], document_starts: Tensor | None
) -> _View:
    rows = memory.memory
    steady = document_starts is None and bool(
        (memory.memory_valid == geometry.memory_length).all()
        & (memory.compressed_memory_valid == geometry.compressed_memory_length).all()
    )
    documents = None
    if steady:
        visible = causal_mask(geometry, rows.device)
    else:
        documents = document_numbers(
            geometry,
            document_starts,
            num_codes=codes.shape[1],
            memory_valid=memory.memory_valid,
            compressed_memory_valid=memory.compressed_memory_valid,
        )
        visible = window_mask(geometry, documents)[:, None]
    query_positions = torch.arange(geometry.window_length, dtype=rows.dtype, device=rows.device)
    return _View(
        geometry, additive_mask(visible, rows.dtype), documents, query_positions, _key_positions(geometry, rows)
    )


def _key_positions(geometry: Geometry, like: Tensor) -> Float[Tensor, "S"]:
    """Positions relative to the window's first code; a compressed row carries its index, as in the paper."""
    first = geometry.window_length - geometry.num_keys
    return torch.arange(first, geometry.window_length, dtype=like.dtype, device=like.device)


def _remember(memory: _LayerMemory, rows: Tensor, new_compressed: Tensor | None, view: _View) -> _LayerMemory:
    """The next memory of a layer: newest rows and compressed rows, those of other documents zeroed and not counted."""
    compressed = memory.compressed_memory
    length = compressed.shape[1]
    if new_compressed is not None:
        compressed = torch.cat([compressed, new_compressed], dim=1)
        compressed = compressed[:, compressed.shape[1] - length :]
    documents = view.documents
    if documents is None:
        return memory._replace(memory=rows, compressed_memory=compressed)
    current, stream, compressed_stream = documents.stream[:, -1], documents.stream, documents.compressed_stream
    rows, valid = keep_valid(rows, stream[:, stream.shape[1] - rows.shape[1] :], current)
    kept = compressed_stream[:, compressed_stream.shape[1] - length :]
    compressed, compressed_valid = keep_valid(compressed, kept, current)
    return _LayerMemory(rows, compressed, valid, compressed_valid)


def _rows_mask(valid: Bool[Tensor, "N R"], dtype: torch.dtype) -> Float[Tensor, "N 1 1 R"]:
    return additive_mask(valid[:, None, None, :], dtype)


def _check_whole_groups(compressed_memory_length: int, rate: int, **lengths: int) -> None:
    for name, length in lengths.items():
        if compressed_memory_length and length % rate:
            raise UserError(
                f"model.{name}_length = {length} is not divisible by model.compression_rate = {rate}; a group of {rate} "
                f"must not mix valid and invalid rows"
            )
