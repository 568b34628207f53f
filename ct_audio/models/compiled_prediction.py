"""Linear prediction sampled by machine code, and what samplers of blocks share.

Shape letters: B lanes, N codes of a block, V codes of the vocabulary.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ct_audio.models import kernels
from ct_audio.models.interface import BlockSampler


class CompiledPrediction(BlockSampler):
    """Samples blocks of codes from linear prediction, all of it in float64.

    Args:
        predictor: `kernels.AdaptivePredictor`, or `kernels.Predictor` of the autocorrelation method.
        edges: of the codes' cells.
        make_state: a step state of the model from the tensors of its memory.
    """

    def __init__(
        self, predictor: Any, edges: Float64[np.ndarray, " _"], uniform_share: float, make_state: Callable[..., Any]
    ) -> None:
        self._predictor, self._cells = predictor, kernels.LogisticCells(edges, np.array([uniform_share]))
        self._make_state, self._is_adaptive = make_state, isinstance(predictor, kernels.AdaptivePredictor)

    def begin(self, state: Any) -> Any:
        own = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in state.memory)
        if self._is_adaptive:
            return kernels.AdaptiveState(*own)  # type: ignore[arg-type] (tensors, as those of `CompiledState`)
        return kernels.PredictorState(*own, said=torch.zeros(len(own[0]), 2, dtype=torch.float64))  # type: ignore[arg-type]

    def end(self, state: Any) -> Any:
        return self._make_state([tensor.clone() for tensor in (state if self._is_adaptive else state[:4])])

    @torch.inference_mode()
    def sample_block(
        self,
        codes: Int[Tensor, " B"],
        state: Any,
        uniforms: Float64[Tensor, "B N"],
        *,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        num_threads: int = 1,
        lanes_together: int | None = None,
    ) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"], Any]:
        how = drawing(len(self._predictor.waveform), temperature, top_k, top_p)
        last, numbers, parts = codes.numpy().copy(), np.ascontiguousarray(uniforms.numpy()), arrays(state)
        out_codes, out_logs = np.empty(numbers.shape, np.int64), np.empty(numbers.shape)
        kernel = kernels.sample_adaptive if self._is_adaptive else kernels.sample_autocorrelation

        def run(lanes: slice) -> None:
            own = type(parts)(*(array[lanes] for array in parts))
            of_lanes = (last[lanes], numbers[lanes], out_codes[lanes], out_logs[lanes])
            kernel(self._predictor, self._cells, own, how, *of_lanes)

        spread(run, len(last), lanes_together or 1, num_threads)
        return torch.from_numpy(out_codes), torch.from_numpy(out_logs), state


def drawing(vocab_size: int, temperature: float, top_k: int | None, top_p: float | None) -> Any:
    """`kernels.Drawing`."""
    return kernels.Drawing(
        float(temperature), vocab_size if top_k is None else top_k, 1.0 if top_p is None else float(top_p)
    )


def spread(run: Callable[[slice], None], num_lanes: int, together: int, num_threads: int) -> None:
    """Groups of lanes one after another, or over threads."""
    groups = [slice(begin, begin + together) for begin in range(0, num_lanes, together)]
    if num_threads == 1 or len(groups) == 1:
        for lanes in groups:
            run(lanes)
    else:
        with ThreadPoolExecutor(min(num_threads, len(groups))) as pool:
            list(pool.map(run, groups))


def arrays(part: Any) -> Any:
    """The numpy arrays of a NamedTuple of tensors, in the same memory."""
    return type(part)(*(tensor.numpy() for tensor in part))
