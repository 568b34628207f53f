"""A model stepped by machine code: weights packed for the kernels, state to and from `step`'s, lanes over threads.

Everything here is float32 on the CPU; `kernels.py` has the arithmetic. A stack offers itself by `Stack.compiled`; front
ends and heads are known by their classes.
Shape letters: B lanes, N codes of a block, V codes of the vocabulary, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from ct_audio.common.errors import UserError
from ct_audio.models import kernels
from ct_audio.models.autocorrelation import FIRST_RESIDUAL, AutocorrelationMemory
from ct_audio.models.compiled_prediction import arrays, drawing, spread
from ct_audio.models.front_ends import (
    SCALE_WITHOUT_PREDICTION,
    CodeEmbedding,
    LinearPredictionFeatures,
    WaveformFeatures,
)
from ct_audio.models.heads import FLOOR_CELLS, Categorical, LogisticMixture
from ct_audio.models.interface import BlockSampler, CompiledStack, FrontEnd, Head, Stack

_OUTPUTS = 16
"""Outputs of a head come in multiples of this: whole vectors."""


class CompiledState(NamedTuple):
    """State between two blocks, all of it tensors, the lane first; a block overwrites them.

    Attributes:
        front_end: `kernels.PredictorState`, empty where nothing is predicted.
        stack: of the stack's kernel.
    """

    front_end: Any
    stack: Any


class CompiledModel(BlockSampler):
    """Samples blocks of codes from a model's parts, with the weights as they are now.

    Args:
        make_state: a step state of the model from those of front end and stack.
    Raises:
        UserError: a part is unknown to the kernels, is not float32 or not on the CPU; it says which.
    """

    def __init__(self, front_end: FrontEnd, stack: Stack, head: Head, make_state: Callable[[Any, Any], Any]) -> None:
        for tensor in (*front_end.parameters(), *stack.parameters(), *head.parameters()):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise UserError(
                    f"compiled stepping: expected float32 on the CPU, got {tensor.dtype} on {tensor.device.type}; use "
                    "the eager stepper"
                )
        self._make_state = make_state
        self._stack: CompiledStack = stack.compiled()
        self._front_end, self._predictor = _front_end_weights(front_end)
        self._predicts = isinstance(front_end, LinearPredictionFeatures)
        self._head = _head_weights(head)

    @torch.inference_mode()
    def begin(self, state: Any) -> CompiledState:
        front_end, stack = state
        num_lanes = self._stack.num_lanes(stack)
        zeros = torch.zeros(num_lanes, 0, dtype=torch.float64)
        followed = (zeros, zeros, zeros.new_zeros(num_lanes), torch.zeros(num_lanes, dtype=torch.int64))
        said = torch.zeros(num_lanes, 2, dtype=torch.float64)
        if self._predicts:
            followed, said = front_end
        own: Any = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (*followed, said))
        made = self._stack.from_state(stack)
        return CompiledState(kernels.PredictorState(*own), type(made)(*map(torch.from_numpy, made)))

    @torch.inference_mode()
    def end(self, state: CompiledState) -> Any:
        *followed, said = (tensor.clone() for tensor in state.front_end)
        front_end = (AutocorrelationMemory(*followed), said) if self._predicts else ()
        return self._make_state(front_end, self._stack.to_state(arrays(state.stack)))

    @torch.inference_mode()
    def sample_block(
        self,
        codes: Int[Tensor, " B"],
        state: CompiledState,
        uniforms: Float64[Tensor, "B N"],
        *,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        num_threads: int = 1,
        lanes_together: int | None = None,
    ) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"], CompiledState]:
        num_lanes, num_codes = uniforms.shape
        how = drawing(len(self._front_end.table), temperature, top_k, top_p)
        last, numbers = codes.numpy().copy(), np.ascontiguousarray(uniforms.numpy())
        out_codes, out_logs = np.empty((num_lanes, num_codes), np.int64), np.empty((num_lanes, num_codes), np.float32)

        parts, weights = [arrays(part) for part in state], (self._front_end, self._predictor, self._head)

        def run(lanes: slice) -> None:
            front_end, stack = (type(part)(*(array[lanes] for array in part)) for part in parts)
            of_lanes = (last[lanes], numbers[lanes], out_codes[lanes], out_logs[lanes])
            self._stack.sample(*weights, front_end, self._stack.weights, stack, how, *of_lanes)

        together = min(lanes_together or self._stack.lanes_together, -(-num_lanes // num_threads))
        spread(run, num_lanes, together, num_threads)
        return torch.from_numpy(out_codes), torch.from_numpy(out_logs), state


def packed(tensor: Tensor) -> Any:
    """A tensor as a contiguous float32 array of its own."""
    return tensor.detach().to(torch.float32).contiguous().clone().numpy()


def _front_end_weights(front_end: FrontEnd) -> tuple[Any, Any]:
    """`kernels.FrontEnd` and `kernels.Predictor`."""
    if type(front_end) not in (CodeEmbedding, WaveformFeatures, LinearPredictionFeatures):
        raise UserError(f"compiled stepping knows no front end {type(front_end).__name__}; use the eager stepper")
    assert isinstance(front_end, CodeEmbedding)
    table = front_end.table.weight.detach()
    table = table if front_end.scale is None else table * front_end.scale
    features, waveform, window = table.new_zeros(0, len(table[0])), np.zeros(0), np.zeros(0)
    numbers = np.zeros(7)
    if isinstance(front_end, WaveformFeatures):
        table, features, waveform = table + front_end.features.bias, front_end.features.weight.T, front_end.samples
        numbers[:] = (1, 0, 0, FIRST_RESIDUAL, 0, 0, SCALE_WITHOUT_PREDICTION)
    if isinstance(front_end, LinearPredictionFeatures):
        predictor = front_end.predictor.compiled()
        return kernels.FrontEnd(packed(table), packed(features)), predictor
    return kernels.FrontEnd(packed(table), packed(features)), kernels.Predictor(waveform, window, numbers)


def _head_weights(head: Head) -> Any:
    """`kernels.Head`."""
    edges, numbers = np.zeros(0), np.zeros(3)
    if type(head) is LogisticMixture:
        edges = torch.cat([head.lower, head.upper[-1:]]).float().double().numpy()
        numbers[:] = (head.num_components, head.uniform_share, FLOOR_CELLS)
    elif type(head) is not Categorical:
        raise UserError(f"compiled stepping knows no head {type(head).__name__}; use the eager stepper")
    projection: nn.Linear = head.projection
    weight, bias = packed(projection.weight.T), packed(projection.bias)
    missing = -len(bias) % _OUTPUTS
    return kernels.Head(np.pad(weight, ((0, 0), (0, missing))), np.pad(bias, (0, missing)), edges, numbers)
