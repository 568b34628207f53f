"""Linear prediction that follows the signal and is stable whatever the signal is: the autocorrelation method.

The weights are made again every few samples from a window of past samples alone, by Levinson's recursion on their
windowed autocorrelation. Its reflection coefficients are below 1 and so all poles of the predictor lie inside the unit
circle: a generative model that follows its own output cannot start to oscillate by itself. What is left over has a
scale that follows the size of the last residuals, with a floor tied to the width of the mu-law cell that is predicted.
All of it is float64 on the CPU: a loop over time in machine code (`kernels.follow`); lanes run in threads. What lies on
another device is copied to the CPU and back, for which the device must be waited for at every call.
Shape letters: B lanes, T codes of a chunk, P order, L samples of the window, V codes of the vocabulary.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from ct_audio.common.errors import UserError

FIRST_RESIDUAL = 0.01
"""Mean size of the residuals before any has been seen."""
WHITE_NOISE_CORRECTION = 1e-4
"""As if white noise of this share of the signal's power were added: it bounds the condition of the equations."""
BANDWIDTH_EXPANSION = 0.994
"""Weight i is multiplied by this to the power of i, which moves the poles further inside."""
RISING_SHARE = 0.9
"""Of the window: it rises as a squared sine, then falls as a squared cosine to the newest sample."""


@dataclass(frozen=True)
class AutocorrelationSettings:
    """How the predictor follows the signal; the defaults are tuned on the validation split of recipes/kathleen.

    Attributes:
        order: P, samples that a prediction is made from.
        window_length: L, past samples that the weights are made of, above the order.
        hop_length: samples after which they are made again.
        scale_decay: of the exponential average of the residuals' size, in [0, 1).
        floor_cells: lowest scale, in widths of the cell that the prediction lies in, above 0.
    """

    order: int = 32
    window_length: int = 480
    hop_length: int = 24
    scale_decay: float = 0.9
    floor_cells: float = 0.3

    def __post_init__(self) -> None:
        if self.order < 1 or self.window_length <= self.order or self.hop_length < 1:
            raise UserError(
                "linear prediction: expected an order of at least 1, a longer window and a hop of at least 1, got "
                f"{self.order}, {self.window_length} and {self.hop_length}"
            )
        if not 0 <= self.scale_decay < 1 or not 0 < self.floor_cells < math.inf:
            raise UserError(
                "linear prediction: expected a scale decay in [0, 1) and a floor above 0, got "
                f"{self.scale_decay} and {self.floor_cells}"
            )

    @property
    def temporal_range(self) -> int:
        """Codes to the farthest one that can change a prediction: an error made with the oldest weights, as long as
        float64 remembers it in the average."""
        remembered = math.ceil(-60 * math.log(2) / math.log(self.scale_decay)) if self.scale_decay else 1
        return self.window_length + self.hop_length + 2 * remembered


class AutocorrelationMemory(NamedTuple):
    """What a lane remembers; all zeros before the stream begins.

    Attributes:
        history: the last L samples, oldest first.
        weights: of the prediction, that of the newest sample first.
        residual: mean size of the last residuals.
        count: codes seen; at 0 `residual` is set to what a stream begins with.
    """

    history: Float64[Tensor, "B L"]
    weights: Float64[Tensor, "B P"]
    residual: Float64[Tensor, " B"]
    count: Int[Tensor, " B"]


class AutocorrelationPredictor:
    """Follows lanes of codes; keeps no state but what it is given.

    Args:
        waveform: the sample that each code decodes to.
    """

    def __init__(self, settings: AutocorrelationSettings, waveform: Float64[np.ndarray, " V"]) -> None:
        self.settings = settings
        self._waveform = torch.from_numpy(waveform)
        position = np.arange(settings.window_length) / max(settings.window_length - 1, 1)
        rising = np.sin(0.5 * np.pi * position / RISING_SHARE) ** 2
        falling = np.cos(0.5 * np.pi * (position - RISING_SHARE) / (1 - RISING_SHARE)) ** 2
        self._window = torch.from_numpy(np.where(position < RISING_SHARE, rising, falling))
        self._numbers = [settings.hop_length, settings.scale_decay, settings.floor_cells, FIRST_RESIDUAL]
        self._numbers = [float(number) for number in (*self._numbers, WHITE_NOISE_CORRECTION, BANDWIDTH_EXPANSION, 0.0)]

    def compiled(self) -> Any:
        """What the kernels need: a `kernels.Predictor`."""
        return _kernels().Predictor(self._waveform.numpy(), self._window.numpy(), np.array(self._numbers))

    def zero_memory(self, num_lanes: int, device: torch.device) -> AutocorrelationMemory:
        """Memory of streams that have not begun."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        count = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        settings = self.settings
        return AutocorrelationMemory(
            zeros(num_lanes, settings.window_length), zeros(num_lanes, settings.order), zeros(num_lanes), count
        )

    def follow(
        self,
        codes: Int[Tensor, "B T"],
        memory: AutocorrelationMemory,
        document_starts: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float64[Tensor, "B T 2"], AutocorrelationMemory]:
        """Prediction in [-1, 1] and scale of the sample after each code, and the next memory; no gradients."""
        settings = self.settings
        if memory.history.shape != (len(codes), settings.window_length):
            raise UserError(
                f"linear prediction: expected a memory of {len(codes)} lanes of {settings.window_length} samples, got "
                f"{tuple(memory.history.shape)}; pass zero_memory or the memory of the chunk before"
            )
        own = [tensor.detach() for tensor in memory]
        features, *own = _follow(codes, document_starts, *own, self._waveform, self._window, self._numbers)
        return features, AutocorrelationMemory(*own)


@torch.library.custom_op("ct_audio::follow", mutates_args=())  # so that torch.compile takes it as one operation
def _follow(
    codes: Tensor,
    document_starts: Tensor | None,
    history: Tensor,
    weights: Tensor,
    residual: Tensor,
    count: Tensor,
    waveform: Tensor,
    window: Tensor,
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features and the next memory; `waveform` and `window` are on the CPU, the others may be anywhere."""
    device, kernels = codes.device, _kernels()
    own = [tensor.to("cpu", copy=True).contiguous() for tensor in (history, weights, residual, count)]
    starts = torch.zeros(codes.shape, dtype=torch.bool) if document_starts is None else document_starts.cpu()
    features = torch.empty(*codes.shape, 2, dtype=torch.float64)
    arrays = [tensor.numpy() for tensor in (codes.cpu().contiguous(), starts.contiguous(), *own, features)]
    predictor = kernels.Predictor(waveform.numpy(), window.numpy(), np.array(numbers))

    def run(lane: int) -> None:
        kernels.follow(lane, predictor, *arrays)

    num_threads = min(len(codes), torch.get_num_threads()) if codes.shape[1] > 1 else 1
    if num_threads == 1:
        for lane in range(len(codes)):
            run(lane)
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(run, range(len(codes))))
    moved = [tensor.to(device) for tensor in (features, *own)]
    return moved[0], moved[1], moved[2], moved[3], moved[4]


@_follow.register_fake
def _shapes(codes: Tensor, document_starts: Any, *tensors: Any) -> tuple[Tensor, ...]:
    features = torch.empty(*codes.shape, 2, dtype=torch.float64, device=codes.device)
    return (features, *(torch.empty_like(tensor) for tensor in tensors[:4]))


def _kernels() -> Any:
    from ct_audio.models import kernels  # imports numba, half a second

    return kernels


def cell_width(sample: Float[Tensor, "*N"], vocab_size: int) -> Float[Tensor, "*N"]:
    """Width of the mu-law cells around a sample in [-1, 1]: the slope of the expanding curve, times a code."""
    mu = vocab_size - 1
    return 2 * math.log1p(mu) / mu * (sample.abs() + 1 / mu)
