"""The Compressive Transformer (Rae et al. 2019); with no compressed memory it is Transformer-XL (Dai et al. 2019).

Shape letters: B lanes, T codes of a chunk, R codes of an unfinished window, W windows, N = B W, D width, H heads,
E head width, P position width, M memory rows, K compressed rows, S keys of a window, V codes.

Layer l of window w needs only layer-l inputs of earlier windows, so a chunk runs layer by layer, all windows at once.
"""

import itertools
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ct_audio.common.errors import UserError
from ct_audio.models.compressive.attention import rotation_table
from ct_audio.models.compressive.config import Config, check_whole_groups
from ct_audio.models.compressive.layer import CompressiveLayer, LayerCache
from ct_audio.models.compressive.memory import Memory, push
from ct_audio.models.compressive.windows import Geometry, View, join_layers, layer_memory, make_view, remember
from ct_audio.models.interface import ModelOutput, SequenceModel
from ct_audio.models.layers import AdaptiveInput, AdaptiveSoftmax, at_least_float32, linear, nll_in_blocks
from ct_audio.models.state import map_memory


class StepState(NamedTuple):
    """State between two calls of `step`; holds the weights as they were at `begin_steps`.

    Attributes:
        memory: as of the last whole window.
        caches: of each layer.
        rotation: cosines and sines [window length, P] of the positions of a window.
        position: codes of the unfinished window that have been consumed.
    """

    memory: Memory
    caches: tuple[LayerCache, ...]
    rotation: tuple[Tensor, Tensor]
    position: int


class CompressiveTransformer(SequenceModel):
    """Stack of `CompressiveLayer` over an embedding; keeps the contract of `interface.py`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding, self.embedding_scale = _make_embedding(config)
        self.layers = nn.ModuleList(CompressiveLayer(config, index) for index in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.width) if config.norm_position == "pre" else nn.Identity()
        self.head = _make_head(config, self.embedding)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def window_length(self) -> int:
        return self.config.window_length

    @property
    def temporal_range(self) -> int:
        """Sum over layers of n_m + c_l n_cm, in codes (paper, section 3).

        Exact where each layer's part is a whole number of windows; otherwise the farthest code is a little farther, as
        a row in the middle of its window looks back from that window's start. With most_used, what is kept comes from
        this range, but older codes too have had a say in the choice.
        """
        config = self.config
        return sum(
            config.memory_length + rate * config.compressed_memory_length
            for layer, rate in enumerate(config.compression_rates)
            if config.keeps_memory(layer)
        )

    @property
    def attention_cost(self) -> int:
        """Sum over layers of n_s + n_m + n_cm, in rows."""
        config = self.config
        num_remembering = sum(config.keeps_memory(layer) for layer in range(config.num_layers))
        remembered = num_remembering * (config.memory_length + config.compressed_memory_length)
        return config.num_layers * config.window_length + remembered

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
        keeping = [config.keeps_memory(layer) for layer in range(config.num_layers)]
        for keeps, rate in zip(keeping, config.compression_rates, strict=True):
            check_whole_groups(compressed * keeps, rate, memory=rows)
        weight = self._layer(0).query.weight

        def zeros(length: int) -> tuple[Tensor, ...]:
            return tuple(weight.new_zeros(num_lanes, length * keeps, config.width) for keeps in keeping)

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
        features, losses = [], {}
        for begin, end in self._parts(total):
            starts = None if document_starts is None else document_starts[:, begin:end]
            window = length if end - begin >= length else end - begin
            output, memory, _ = self._run(codes[:, begin:end], memory, starts, window_length=window)
            features.append(output.features)
            for name, loss in output.auxiliary_losses.items():
                losses[name] = losses.get(name, 0) + loss * ((end - begin) / total)
        if total % length:
            memory = memory._replace(final=True)
        return ModelOutput(torch.cat(features, dim=1) if len(features) > 1 else features[0], memory, losses)

    def nll(self, features: Float[Tensor, "*batch D"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Negative log-likelihood of each target, in nats."""
        rows, flat = features.flatten(0, -2), targets.flatten()
        if isinstance(self.head, AdaptiveSoftmax):
            return self.head.nll(rows, flat).view(targets.shape)

        def nll(rows: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(at_least_float32(self.head(rows)), targets, reduction="none")

        return nll_in_blocks(nll, rows, flat, self.config.vocab_size).view(targets.shape)

    def log_probabilities(self, features: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Log-probabilities of all codes, in nats."""
        if isinstance(self.head, AdaptiveSoftmax):
            return self.head.log_probabilities(features.flatten(0, -2)).unflatten(0, features.shape[:-1])
        return torch.log_softmax(at_least_float32(self.head(features)), dim=-1)

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
        weight = self._layer(0).query.weight
        inputs = [weight.new_zeros(lanes, length, self.config.width) for _ in self.layers]
        usages: list[Tensor | None] = [None] * len(inputs)
        if consumed:
            _, _, known = self._run(codes, memory, None, window_length=consumed)
            for whole, (part, _) in zip(inputs, known, strict=True):
                whole[:, :consumed] = part
            usages = [usage for _, usage in known]
        caches = tuple(
            self._layer(index).new_cache(layer_memory(memory, index), rows, usages[index])
            for index, rows in enumerate(inputs)
        )
        positions = torch.arange(length, dtype=inputs[0].dtype, device=codes.device)
        return StepState(memory, caches, rotation_table(positions, self.config.position_width), consumed)

    def step(self, codes: Int[Tensor, "B"], state: StepState) -> tuple[Float[Tensor, "B D"], StepState]:
        """Features after one more code a lane. Consumes `state`: its caches are written in place."""
        rows, position = self._embed(codes), state.position
        rotation = state.rotation[0][position], state.rotation[1][position]
        for index, cache in enumerate(state.caches):
            cache.inputs[:, position] = rows
            rows = self._layer(index).step(rows, cache, position, rotation)
        state = state._replace(position=position + 1)
        features = self.final_norm(rows)
        return features, state if state.position < self.config.window_length else self._next_window(state)

    def clone_state(self, state: StepState) -> StepState:
        """An independent copy."""
        return map_memory(torch.clone, state)

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of the model and of f_c apart: a shared norm would couple their losses again."""
        groups: dict[str, list[nn.Parameter]] = {"model": [], "compression": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups["compression" if ".compression" in name else "model"].append(parameter)
        return {name: parameters for name, parameters in groups.items() if parameters}

    @torch.no_grad()
    def after_update(self) -> None:
        """Bring adaptive spans back into 0..1: from outside no gradient would ever move them again.

        Source: the code of Sukhbaatar et al. 2019, which clamps them after each update too.
        """
        for index in range(len(self.layers)):
            span = self._layer(index).span
            if span is not None:
                span.clamp_(0, 1)

    def _embed(self, codes: Tensor) -> Tensor:
        rows = self.embedding(codes)
        if self.embedding_scale is not None:
            rows = rows * self.embedding_scale
        return self.dropout(rows)

    def _parts(self, num_codes: int) -> list[tuple[int, int]]:
        """Where to cut a chunk: all whole windows at once (with most_used one by one), then a shorter last one."""
        length = self.config.window_length
        whole = num_codes - num_codes % length
        one_by_one = any(self._layer(index).chooses_most_used for index in range(len(self.layers)))
        cuts = [*range(0, whole, length if one_by_one else max(whole, 1)), whole, num_codes]
        return [(begin, end) for begin, end in itertools.pairwise(cuts) if begin < end]

    def _run(
        self, codes: Tensor, memory: Memory, document_starts: Tensor | None, *, window_length: int
    ) -> tuple[ModelOutput, Memory, list[tuple[Tensor, Tensor | None]]]:
        """Run windows of `window_length` layer by layer; also each layer's inputs and usage. A short window is not
        pushed."""
        with_push = window_length == self.config.window_length
        rows, losses, known, remembered = self._embed(codes), {}, [], []
        views: dict[Geometry, View] = {}
        for index in range(len(self.layers)):
            before, layer = layer_memory(memory, index), self._layer(index)
            geometry = layer.geometry(before, window_length)
            if geometry not in views:  # layers of one geometry have had the same pushes: they share their counts
                views[geometry] = make_view(geometry, before, codes.shape[1], document_starts)
            output = layer(rows, before, views[geometry], with_push=with_push)
            known.append((rows, output.usage))
            rows = output.rows
            remembered.append(output.memory)
            losses |= {f"{name}/layer_{index:02d}": loss for name, loss in output.losses.items()}
        memory = join_layers(remembered)
        return ModelOutput(self.final_norm(rows), memory, losses), memory, known

    def _layer(self, index: int) -> CompressiveLayer:
        return cast(CompressiveLayer, self.layers[index])

    def _next_window(self, state: StepState) -> StepState:
        """Push the window whose layer inputs are complete, exactly as `forward` does, and begin the next one."""
        remembered, caches = [], []
        for index, cache in enumerate(state.caches):
            layer, memory, length = self._layer(index), layer_memory(state.memory, index), self.config.window_length
            view = make_view(layer.geometry(memory, length), memory, length, None)
            old_memory, next_memory = push(memory.memory, cache.inputs)
            compressed, view = layer.compress(old_memory, cache.usage, view)
            # Cloned: the next window must not write into a memory that has been handed out.
            remembered.append(remember(memory, next_memory.clone(), compressed, view))
            caches.append(layer.refill_cache(cache, remembered[-1]))
        return state._replace(memory=join_layers(remembered), caches=tuple(caches), position=0)


def _make_embedding(config: Config) -> tuple[nn.Module, float | None]:
    """The first layer, and what its rows are multiplied by; a tied table has the scale of the softmax."""
    if config.adaptive_cutoffs is not None:
        return AdaptiveInput(config.vocab_size, config.width, config.adaptive_cutoffs, config.adaptive_div), None
    embedding = nn.Embedding(config.vocab_size, config.width)
    nn.init.normal_(embedding.weight, std=config.width**-0.5 if config.tie_embeddings else 1.0)
    return embedding, config.width**0.5 if config.tie_embeddings else None


def _make_head(config: Config, embedding: nn.Module) -> nn.Module:
    if isinstance(embedding, AdaptiveInput):
        tied = embedding if config.tie_embeddings else None
        return AdaptiveSoftmax(config.vocab_size, config.width, config.adaptive_cutoffs, config.adaptive_div, tied=tied)
    head = linear(config.width, config.vocab_size, bias=True, gain=0.5)
    if config.tie_embeddings:
        head.weight = embedding.weight  # type: ignore[assignment]
    return head
