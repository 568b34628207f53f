"""The compressive stack for the kernels: its weights packed, its step state to and from rings.

Shape letters: L layers, B lanes, T rows of a window, M memory rows, K compressed rows, S keys of a window, D width, H
heads, G heads of keys and values, E head width, P position width.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.models import kernels
from ct_audio.models.compiled import packed
from ct_audio.models.compressive.attention import rotation_table, sinusoids
from ct_audio.models.compressive.layer import CompressiveLayer
from ct_audio.models.compressive.memory import LayerMemory, join_layers, layer_memory
from ct_audio.models.compressive.stepping import StackState, new_cache
from ct_audio.models.compressive.windows import Geometry, key_positions
from ct_audio.models.interface import CompiledStack

_KINDS = {"conv": kernels.CONV, "dilated_conv": kernels.DILATED_CONV, "mean": kernels.MEAN, "max": kernels.MAX}
_MAX_GROUPS = 8  # groups of rows that f_c takes at a time: more read its weights less often, fewer make steps more even


class CompiledCompressiveStack(CompiledStack):
    """A `CompressiveStack` as it is now, at the lengths of memory of its configuration.

    Raises:
        UserError: it has a part that the kernels do not know.
    """

    def __init__(self, stack: Any) -> None:
        config = stack.config
        compresses = any(layer.compression is not None or layer.chooses_most_used for layer in stack.layers)
        if config.positions == "rotary":
            raise UserError("compiled stepping knows no rotary positions; use the eager stepper")
        if config.adaptive_span or (compresses and config.compression_function not in _KINDS):
            what = "adaptive spans" if config.adaptive_span else f"compression {config.compression_function}"
            raise UserError(f"compiled stepping knows no {what}; use the eager stepper")
        self._module, self._window, memory = stack, config.window_length, stack.zero_memory(1)
        self._geometries: list[Geometry] = [
            layer.geometry(layer_memory(memory, index), self._window) for index, layer in enumerate(stack.layers)
        ]
        self.lanes_together = 4
        self.weights, self.sample = self._weights(), kernels.sample_compressive

    def num_lanes(self, state: Any) -> int:
        return state.caches[0].inputs.shape[0]

    def from_state(self, state: Any) -> kernels.CompressiveState:
        if state.starts is not None:
            raise UserError("compiled stepping: a stream began anew in the unfinished window; use the eager stepper")
        config, lanes, t = self._module.config, self.num_lanes(state), state.position
        rings = [self._num_columns(geometry) for geometry in self._geometries]
        most_compressed, most_rows = (max(lengths) for lengths in zip(*rings, strict=True))
        columns = max(sum(ring) for ring in rings)
        heads, width = self.weights.numbers[2], config.width
        made = kernels.CompressiveState(
            np.zeros((lanes, len(rings), heads, width // config.num_heads, columns + kernels.PADDING), np.float32),
            np.zeros((lanes, len(rings), heads, columns, width // config.num_heads), np.float32),
            np.zeros((lanes, len(rings), most_rows, width), np.float32),
            np.zeros((lanes, len(rings), most_compressed, width), np.float32),
            np.zeros((lanes, len(rings), 2), np.int64),
            np.zeros((lanes, len(rings), 2), np.int64),
            np.zeros((lanes, len(rings), config.convolution_length, width), np.float32),
            np.zeros((lanes, len(rings), max(config.convolution_length - 1, 0), width), np.float32),
            np.full(lanes, t, np.int64),
            np.full(lanes, max(config.convolution_length - 1, 0), np.int64),
        )
        for index, queue in enumerate(state.queues):
            made.queues[:, index, :-1] = queue.numpy()
            made.queues_before[:, index] = state.memory.queues[index].numpy()
        for index, (cache, geometry) in enumerate(zip(state.caches, self._geometries, strict=True)):
            compressed, rows = geometry.compressed_memory_length, geometry.memory_length + t
            sharing = slice(None, None, config.num_heads // heads)
            keys = cache.wide_keys[:, sharing, :, : width // config.num_heads].numpy().swapaxes(2, 3)
            values, first = cache.values[:, sharing].numpy(), rings[index][0]
            made.keys[:, index, :, :, :compressed] = keys[..., :compressed]
            made.keys[:, index, :, :, first : first + rows] = keys[..., compressed : compressed + rows]
            made.values[:, index, :, :compressed] = values[:, :, :compressed]
            made.values[:, index, :, first : first + rows] = values[:, :, compressed : compressed + rows]
            made.rows[:, index, : geometry.memory_length] = state.memory.memory[index].numpy()
            made.rows[:, index, geometry.memory_length : rows] = cache.inputs[:, :t].numpy()
            made.compressed[:, index, :compressed] = state.memory.compressed_memory[index].numpy()
            made.valid[:, index, 0] = state.memory.memory_valid[index].numpy()
            made.valid[:, index, 1] = state.memory.compressed_memory_valid[index].numpy()
        kernels.compress_known(self.weights, made)
        return made

    @torch.no_grad()
    def to_state(self, state: kernels.CompressiveState) -> StackState:
        lanes, t = np.arange(len(state.rows))[:, None], int(state.position[0])
        remembered, inputs = [], []
        for index, geometry in enumerate(self._geometries):
            length, (num_compressed, num_rows) = geometry.memory_length, self._num_columns(geometry)
            places = (state.starts[:, index, :1] + np.arange(length + t)) % num_rows
            rows = torch.from_numpy(state.rows[lanes, index, places])
            inputs.append(F.pad(rows[:, length:], (0, 0, 0, self._window - t)))
            places = state.starts[:, index, 1:] + np.arange(geometry.compressed_memory_length)
            compressed = torch.from_numpy(state.compressed[lanes, index, places % max(num_compressed, 1)])
            valid = torch.from_numpy(state.valid[:, index].copy()).unbind(1)
            memory = (_zero_invalid(*pair) for pair in zip((rows[:, :length], compressed), valid, strict=True))
            kept, kept_compressed = memory
            parts = (kept, kept_compressed, valid[0].clone(), valid[1].clone())
            remembered.append(LayerMemory(*parts, self._module.layers[index].recount(*parts)))
        num_taps = state.queues.shape[2]
        places = (state.count[:, None] + np.arange(num_taps)[1:]) % max(num_taps, 1)
        caches = tuple(map(new_cache, self._module.layers, remembered, inputs, [None] * len(inputs)))
        positions = torch.arange(self._window, dtype=inputs[0].dtype)
        return StackState(
            join_layers(remembered, self._queues(state.queues_before)),
            caches,
            rotation_table(positions, self._module.config.position_width),
            t,
            queues=self._queues(state.queues[lanes, :, places].swapaxes(1, 2)),
        )

    def _queues(self, queues: Any) -> tuple[Tensor, ...]:
        """A tensor [B, Q, D] for each layer with a convolution, from [B, L, Q, D]."""
        return tuple(torch.from_numpy(queues[:, index].copy()) for index in range(len(self._module.convolutions)))

    def _num_columns(self, geometry: Geometry) -> tuple[int, int]:
        """Rows of the rings of compressed memory, and of memory and window."""
        compressed = geometry.compressed_memory_length
        return (
            compressed + self._window // geometry.compression_rate if compressed else 0,
            geometry.memory_length + self._window,
        )

    @torch.no_grad()
    def _weights(self) -> kernels.CompressiveWeights:
        config, layers = self._module.config, list(self._module.layers)
        kept = dict.fromkeys(self._geometries)
        like = layers[0].query.weight
        tables = [sinusoids(-key_positions(geometry, like), config.position_width).T for geometry in kept]
        columns = max(table.shape[1] for table in tables) + kernels.PADDING
        positions = torch.stack([F.pad(table, (0, columns - table.shape[1])) for table in tables])
        cosine, sine = rotation_table(torch.arange(self._window, dtype=like.dtype), config.position_width)
        compress, compress_bias = self._compression(layers)
        convolutions = list(self._module.convolutions)
        no_taps = like.new_zeros(len(layers), 0, config.width)
        stacked = {
            "output": [layer.output.weight.T for layer in layers],
            "attention_norm": [_norm(layer.attention_norm) for layer in layers],
            "feedforward_norm": [_norm(layer.feedforward_norm) for layer in layers],
            "expand": [layer.feedforward.expand.weight.T for layer in layers],
            "expand_bias": [layer.feedforward.expand.bias for layer in layers],
            "contract": [layer.feedforward.contract.weight.T for layer in layers],
            "contract_bias": [layer.feedforward.contract.bias for layer in layers],
            "key_value": [layer.key_value.weight.T for layer in layers],
        }
        project, project_bias = zip(*(_projection(layer) for layer in layers), strict=True)
        is_pre, numbers = config.norm_position == "pre", list(kept)
        layout = [
            (g.memory_length, g.compressed_memory_length, g.compression_rate, numbers.index(g), *self._turns(index, g))
            for index, g in enumerate(self._geometries)
        ]
        num_kv_heads = layers[0].key_value.weight.shape[0] // (2 * (config.width // config.num_heads))
        kind = _KINDS.get(config.compression_function, 0)
        return kernels.CompressiveWeights(
            project=packed(torch.stack(project)),
            project_bias=packed(torch.stack(project_bias)),
            final_norm=packed(_norm(self._module.final_norm)) if is_pre else np.zeros((2, 0), np.float32),
            compress=packed(compress),
            compress_bias=packed(compress_bias),
            taps=packed(torch.stack([part.taps for part in convolutions]) if convolutions else no_taps),
            tap_bias=packed(torch.stack([part.bias for part in convolutions]) if convolutions else no_taps[:, 0:1, 0]),
            tap_norm=packed(torch.stack([_norm(part.norm) for part in convolutions]) if convolutions else no_taps),
            positions=packed(positions),
            cosine=packed(cosine[:, : config.position_width // 2]),
            sine=packed(sine[:, : config.position_width // 2]),
            layout=np.array(layout, np.int64),
            numbers=np.array([self._window, config.num_heads, num_kv_heads, kind, is_pre], np.int64),
            **{name: packed(torch.stack(parts)) for name, parts in stacked.items()},
        )

    def _compression(self, layers: list[CompressiveLayer]) -> tuple[Tensor, Tensor]:
        """Weights [L, levels, inputs, D] and biases [L, levels, D] of f_c, zeros where there are none."""
        found: list[list[Any]] = []
        for layer in layers:
            module: Any = layer.compression
            if module is None:
                found.append([])
                continue
            name = self._module.config.compression_function
            found.append([module.project] if name == "conv" else list(module.levels) if name == "dilated_conv" else [])
        width = self._module.config.width
        num_levels = max(map(len, found)) or 1
        num_inputs = max((project.in_features for levels in found for project in levels), default=1)
        weight = layers[0].query.weight.new_zeros(len(layers), num_levels, num_inputs, width)
        bias = weight.new_zeros(len(layers), num_levels, width)
        for index, levels in enumerate(found):
            for number, project in enumerate(levels):
                weight[index, number, : project.in_features] = project.weight.T
                bias[index, number] = project.bias
        return weight, bias

    def _turns(self, index: int, geometry: Geometry) -> tuple[int, int]:
        """Groups of rows that a layer's f_c takes at a time: as many as divide the window's groups, `_MAX_GROUPS` at
        most; and at which of the steps in which so many rows come: not the other layers', where the rows are there."""
        num_all = self._window // geometry.compression_rate if geometry.compressed_memory_length else 1
        num_groups = max(number for number in range(1, _MAX_GROUPS + 1) if num_all % number == 0)
        period = num_groups * geometry.compression_rate
        earlier = (2 * index + 1) * period // (2 * len(self._geometries)) if geometry.memory_length >= period else 0
        return num_groups, period - 1 - earlier


def _projection(layer: CompressiveLayer) -> tuple[Tensor, Tensor]:
    """All products of a row in one, as in `stepping.new_cache`: content query, position query, key and value."""
    heads, scale = layer.config.num_heads, (layer.config.width // layer.config.num_heads) ** -0.5
    query = rearrange(layer.query.weight, "(h e) d -> h e d", h=heads) * scale
    straight = einsum(layer.position, query, "h e p, h e d -> h p d")
    for_bias = einsum(layer.position, layer.position_bias * scale, "h e p, h e -> h p")
    weight = torch.cat([query.flatten(0, 1), straight.flatten(0, 1), layer.key_value.weight])
    bias = torch.cat([(layer.content_bias * scale).flatten(), for_bias.flatten()])
    return weight.T, F.pad(bias, (0, len(weight) - len(bias)))


def _norm(norm: Any) -> Tensor:
    return torch.stack([norm.weight, norm.bias])


def _zero_invalid(rows: Tensor, valid: Tensor) -> Tensor:
    """Rows that are not among the last valid ones of their lane as zeros."""
    is_valid = torch.arange(rows.shape[1]) >= rows.shape[1] - valid[:, None]
    return torch.where(is_valid[..., None], rows, torch.zeros(()))
