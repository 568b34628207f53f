"""The stack of the Compressive Transformer: rows in, rows out, memory and compressed memory of every layer carried.

Layer l of window w needs only layer-l inputs of earlier windows, so a chunk runs layer by layer, all windows at once.
Shape letters: B lanes, T rows of a chunk, R rows of an unfinished window, D width, P position width.
"""

import itertools
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ct_audio.common.errors import UserError
from ct_audio.models.compressive.attention import rotation_table
from ct_audio.models.compressive.config import StackConfig, check_whole_groups
from ct_audio.models.compressive.convolution import CausalConvolution
from ct_audio.models.compressive.layer import CompressiveLayer
from ct_audio.models.compressive.memory import Memory, join_layers, layer_memory, push
from ct_audio.models.compressive.stepping import (
    StackState,
    hide_earlier_rows,
    new_cache,
    refill_cache,
    renew_ahead,
    shift_cache,
    step_layer,
)
from ct_audio.models.compressive.windows import Geometry, View, make_view, remember
from ct_audio.models.interface import CompiledStack, Stack, StackOutput
from ct_audio.models.layers import document_age
from ct_audio.models.state import map_memory, tensor_options


class CompressiveStack(Stack):
    """Compressive layers one above the other; all its inputs and outputs are rows of `config.width`.

    Usable in other models: between an encoder of one's own and a head of one's own, see docs/stack.md.
    """

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.width = self.output_width = config.width
        self.layers = nn.ModuleList(CompressiveLayer(config, index) for index in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.width) if config.norm_position == "pre" else nn.Identity()
        length = config.convolution_length
        self.convolutions = nn.ModuleList(
            CausalConvolution(config.width, length, dropout=config.dropout)
            for _ in range(config.num_layers if length else 0)
        )

    @property
    def window_length(self) -> int:
        return self.config.window_length

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
        like = tensor_options(self._layer(0).query.weight)

        def zeros(length: int) -> tuple[Tensor, ...]:
            return tuple(torch.zeros(num_lanes, length * keeps, config.width, **like) for keeps in keeping)

        def counts() -> tuple[Tensor, ...]:
            return tuple(torch.zeros(num_lanes, dtype=torch.int64, device=like["device"]) for _ in self.layers)

        queue_lengths = [self._convolution(index).queue_length for index in range(len(self.convolutions))]
        queues = tuple(torch.zeros(num_lanes, length, config.width, **like) for length in queue_lengths)
        memories = (zeros(rows), zeros(compressed))
        until_full = (
            self._layer(index).codes_until_full(part.shape[1], compressed_part.shape[1])
            for index, (part, compressed_part) in enumerate(zip(*memories, strict=True))
        )
        return Memory(*memories, counts(), counts(), tuple(until_full), queues)

    def full_memory(self, num_lanes: int) -> Memory:
        memory = self.zero_memory(num_lanes)

        def full(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(torch.full((num_lanes,), part.shape[1], device=part.device) for part in parts)

        counts = {"memory_valid": full(memory.memory), "compressed_memory_valid": full(memory.compressed_memory)}
        return memory._replace(**counts, codes_until_full=(0,) * len(self.layers))

    def recount_memory(self, memory: Memory) -> Memory:
        until_full = tuple(
            self._layer(index).recount(*parts) for index, parts in enumerate(zip(*memory[:4], strict=True))
        )
        return memory._replace(codes_until_full=until_full)

    def forward(
        self, rows: Float[Tensor, "B T D"], memory: Memory, *, document_starts: Bool[Tensor, "B T"] | None = None
    ) -> StackOutput:
        """Outputs, next memory and the losses of f_c; see `interface.py`.

        Raises:
            UserError: the stream of this memory has ended (its last window was shorter), or there are no rows.
        """
        if memory.final:
            raise UserError("this memory is final: a shorter last window has ended its stream; begin with zero_memory")
        length, total = self.config.window_length, rows.shape[1]
        if total == 0:
            raise UserError("forward: expected at least one row, got none")
        outputs, losses = [], {}
        for begin, end in self._parts(total):
            starts = None if document_starts is None else document_starts[:, begin:end]
            window = length if end - begin >= length else end - begin
            output, _ = self._run(rows[:, begin:end], memory, starts, window_length=window)
            memory = output.memory
            outputs.append(output.rows)
            for name, loss in output.auxiliary_losses.items():
                losses[name] = losses.get(name, 0) + loss * ((end - begin) / total)
        if total % length:
            memory = memory._replace(final=True)
        return StackOutput(torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], memory, losses)

    def begin_steps(
        self, memory: Memory, rows: Float[Tensor, "B R D"], *, document_starts: Bool[Tensor, "B R"] | None = None
    ) -> StackState:
        """State after R rows of an unfinished window (0 <= R < window_length), computed in parallel.

        Args:
            document_starts: as in `forward`.
        Raises:
            UserError: there is a whole window of rows or more, or the memory is final.
        """
        length, (lanes, consumed, _) = self.config.window_length, rows.shape
        if memory.final:
            raise UserError("this memory is final: a shorter last window has ended its stream; begin with zero_memory")
        if consumed >= length:
            raise UserError(f"begin_steps: expected fewer rows than a window of {length}, got {consumed}; use forward")
        like = tensor_options(self._layer(0).query.weight)
        inputs = [torch.zeros(lanes, length, self.config.width, **like) for _ in self.layers]
        usages: list[Tensor | None] = [None] * len(inputs)
        queues = memory.queues
        if consumed:
            output, known = self._run(rows, memory, document_starts, window_length=consumed)
            queues = output.memory.queues
            for whole, (part, _) in zip(inputs, known, strict=True):
                whole[:, :consumed] = part
            usages = [usage for _, usage in known]
        caches = tuple(
            new_cache(self._layer(index), layer_memory(memory, index), window, usages[index])
            for index, window in enumerate(inputs)
        )
        positions = torch.arange(length, dtype=inputs[0].dtype, device=rows.device)
        rotation = rotation_table(positions, self.config.rotation_width)
        state = StackState(memory, caches, rotation, consumed, queues=map_memory(torch.clone, queues))
        if document_starts is not None:
            for position in range(consumed):
                state = _begin_anew(state, document_starts[:, position], position)
        return state

    def step(
        self, rows: Float[Tensor, "B D"], state: StackState, *, document_starts: Bool[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B D"], StackState]:
        """Output for one more row a lane. Consumes `state`: its caches are written in place.

        Args:
            document_starts: lanes whose stream begins anew with this row (an episode): nothing before has any influence
                from here on; None for none.
        """
        position = state.position
        if document_starts is not None:
            state = _begin_anew(state, document_starts, position)
            for queue in state.queues:
                queue.masked_fill_(document_starts[:, None, None], 0)
        rotation, queues = (state.rotation[0][position], state.rotation[1][position]), []
        for index, cache in enumerate(state.caches):
            if state.queues:
                rows, queue = self._convolution(index).step(rows, state.queues[index])
                queues.append(queue)
            cache.inputs[:, position] = rows
            rows = step_layer(self._layer(index), rows, cache, position, rotation)
            if state.starts is None and position == (index + 1) * self.config.window_length // (len(state.caches) + 1):
                renew_ahead(self._layer(index), cache, layer_memory(state.memory, index))
        state = state._replace(position=position + 1, queues=tuple(queues))
        return self.final_norm(rows), state if state.position < self.config.window_length else self._next_window(state)

    def compiled(self) -> CompiledStack:
        from ct_audio.models.compressive.compiled import CompiledCompressiveStack  # imports numba

        return CompiledCompressiveStack(self)

    def clone_state(self, state: StackState) -> StackState:
        """An independent copy."""
        return map_memory(torch.clone, state)

    def shard_units(self) -> list[nn.Module]:
        return list(self.layers)

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of the model and of f_c apart: a shared norm would couple their losses again."""
        return gradient_groups(self)

    @torch.no_grad()
    def after_update(self) -> None:
        """Bring adaptive spans back into 0..1: from outside no gradient would ever move them again.

        Source: the code of Sukhbaatar et al. 2019, which clamps them after each update too.
        """
        for index in range(len(self.layers)):
            span = self._layer(index).span
            if span is not None:
                span.clamp_(0, 1)

    def _parts(self, num_rows: int) -> list[tuple[int, int]]:
        """Where to cut a chunk: all whole windows at once (with most_used one by one), then a shorter last one."""
        length = self.config.window_length
        whole = num_rows - num_rows % length
        one_by_one = any(self._layer(index).chooses_most_used for index in range(len(self.layers)))
        cuts = [*range(0, whole, length if one_by_one else max(whole, 1)), whole, num_rows]
        return [(begin, end) for begin, end in itertools.pairwise(cuts) if begin < end]

    def _run(
        self, rows: Tensor, memory: Memory, document_starts: Tensor | None, *, window_length: int
    ) -> tuple[StackOutput, list[tuple[Tensor, Tensor | None]]]:
        """Run windows of `window_length` layer by layer; also each layer's inputs and usage. A short window is not
        pushed."""
        with_push = window_length == self.config.window_length
        losses, known, remembered, queues = {}, [], [], []
        age = None if document_starts is None or not self.convolutions else document_age(document_starts)
        views: dict[Geometry, View] = {}
        for index in range(len(self.layers)):
            if self.convolutions:
                convolve = self._convolution(index)
                rows, queue = convolve(rows, memory.queues[index].detach(), window_length=window_length, age=age)
                queues.append(queue)
            before, layer = layer_memory(memory, index), self._layer(index)
            geometry = layer.geometry(before, window_length)
            if geometry not in views:  # layers of one geometry have had the same pushes: they share their counts
                views[geometry] = make_view(geometry, before, rows.shape[1], document_starts)
            output = layer(rows, before, views[geometry], with_push=with_push)
            known.append((rows, output.usage))
            rows = output.rows
            remembered.append(output.memory)
            losses |= {f"{name}/layer_{index:02d}": loss for name, loss in output.losses.items()}
        return StackOutput(self.final_norm(rows), join_layers(remembered, tuple(queues)), losses), known

    def _layer(self, index: int) -> CompressiveLayer:
        return cast(CompressiveLayer, self.layers[index])

    def _convolution(self, index: int) -> CausalConvolution:
        return cast(CausalConvolution, self.convolutions[index])

    def _next_window(self, state: StackState) -> StackState:
        """Push the window whose layer inputs are complete, exactly as `forward` does, and begin the next one."""
        remembered, caches, length = [], [], self.config.window_length
        views: dict[Geometry, View | None] = {}
        for index, cache in enumerate(state.caches):
            layer, memory = self._layer(index), layer_memory(state.memory, index)
            geometry = layer.geometry(memory, length)
            if geometry not in views:  # as in `_run`; None while all rows are valid
                is_steady = state.starts is None and memory.codes_until_full == 0
                views[geometry] = None if is_steady else make_view(geometry, memory, length, state.starts)
            view = views[geometry]
            old_memory, next_memory = push(memory.memory, cache.inputs)
            if view is None and not layer.chooses_most_used:
                cache, compressed = shift_cache(layer, cache, memory)
                remembered.append(remember(memory, next_memory, compressed, None))
                caches.append(cache)
                continue
            view = view or make_view(geometry, memory, length, None)
            compressed, view = layer.compress(old_memory, cache.usage, view)
            # Cloned: the next window must not write into a memory that has been handed out.
            remembered.append(remember(memory, next_memory.clone(), compressed, view))
            caches.append(refill_cache(layer, cache, remembered[-1]))
        memory = join_layers(remembered, map_memory(torch.clone, state.queues))
        return state._replace(memory=memory, caches=tuple(caches), position=0, starts=None)


def gradient_groups(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained parameters of any module by clipping group, wherever in it compressive layers are.

    Returns:
        "compression": of f_c and its decoder; "model": all others. A group without parameters is left out. For
        `interface.clip_gradients`.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, CompressiveLayer)]
    parts = [part for layer in layers for part in (layer.compression, layer.compression_decoder) if part is not None]
    apart = {id(parameter) for part in parts for parameter in part.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"model": [], "compression": []}
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups["compression" if id(parameter) in apart else "model"].append(parameter)
    return {name: parameters for name, parameters in groups.items() if parameters}


def _begin_anew(state: StackState, document_starts: Bool[Tensor, " B"], position: int) -> StackState:
    """The state in which some lanes see nothing before `position` of the window."""
    if not bool(document_starts.any()):
        return state
    starts = state.starts
    if starts is None:
        length = state.caches[0].inputs.shape[1]
        starts = torch.zeros(len(document_starts), length, dtype=torch.bool, device=document_starts.device)
    starts[:, position] = document_starts
    caches = tuple(hide_earlier_rows(cache, document_starts, position) for cache in state.caches)
    return state._replace(caches=caches, starts=starts)
