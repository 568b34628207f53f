"""Linear prediction of the decoded waveform: the baseline without trained parameters.

Each sample is predicted as a weighted sum of the samples before it; what is left over is modelled as a logistic
distribution whose scale follows the size of the last residuals, cut at the edges of the codes' cells. The weights
follow the signal (recursive least squares, or the stable autocorrelation method of `autocorrelation.py`) or are
computed once from the training split (`fit`). All of it is float64 on the CPU, whatever the model's dtype and device:
a loop over time, compiled by numba when it is first used.
Shape letters: B lanes, T codes of a chunk, R codes before stepping, P order, Q rows of the covariance (P, or 0 where
the weights are fixed), V codes of the vocabulary, N codes of a split.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, no_type_check

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int, Integer
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.common.progress import Progress
from ct_audio.models.autocorrelation import AutocorrelationMemory, AutocorrelationPredictor, AutocorrelationSettings
from ct_audio.models.interface import UNLIMITED_RANGE, BlockSampler, ModelOutput, SequenceModel, refuse_lengths
from ct_audio.models.state import map_memory

_FIRST_RESIDUAL = 0.01  # mean size of the residuals before any has been seen
_SMALLEST_SCALE = 1e-5  # a tenth of the narrowest cell: digital silence still costs next to nothing
_FIT_PIECE = 2**20  # codes of a split that are read at a time; the result does not depend on it


@dataclass(frozen=True)
class Config:
    """Linear prediction; the defaults are tuned on the validation split of recipes/kathleen.

    Attributes:
        vocab_size: number of mu-law codes V (mu = V - 1).
        order: samples that a prediction is made from.
        adaptation: how the weights follow the signal: "recursive_least_squares", or "autocorrelation", which is stable
            whatever the signal; "none": they are fitted once.
        prediction_window_length, prediction_hop_length: of the autocorrelation method, in samples (see
            `AutocorrelationSettings`).
        forgetting: weight of an error in least squares against that of the next sample's, in (0, 1).
        regularisation: least squares as if white noise of this power were added to the past samples, above 0.
        scale_decay: of the exponential average of the residuals' size, in [0, 1]; 1: the scale is fixed (that of all
            residuals of the training split, or that of the beginning where the weights adapt).
        uniform_share: share of the probability that is spread evenly over all codes, in (0, 1).
    """

    name: Literal["linear_prediction"] = "linear_prediction"
    vocab_size: int = 256
    order: int = 16
    adaptation: Literal["recursive_least_squares", "autocorrelation", "none"] = "recursive_least_squares"
    prediction_window_length: int = 480
    prediction_hop_length: int = 24
    forgetting: float = 0.993
    regularisation: float = 1e-8
    scale_decay: float = 0.9
    uniform_share: float = 1e-4

    def __post_init__(self) -> None:
        for field, minimum in {"vocab_size": 4, "order": 1}.items():
            if getattr(self, field) < minimum:
                raise UserError(f"model.{field}: expected at least {minimum}, got {getattr(self, field)}")
        for field in ("forgetting", "uniform_share"):
            if not 0 < getattr(self, field) < 1:
                raise UserError(f"model.{field}: expected a number in (0, 1), got {getattr(self, field)}")
        if not 0 < self.regularisation < math.inf:
            raise UserError(f"model.regularisation: expected a number above 0, got {self.regularisation}")
        if not 0 <= self.scale_decay <= 1:
            raise UserError(f"model.scale_decay: expected a number in [0, 1], got {self.scale_decay}")
        if self.adaptation == "autocorrelation":
            self.autocorrelation  # noqa: B018 (it checks its numbers)

    @property
    def autocorrelation(self) -> AutocorrelationSettings:
        """Of the adaptation of that name."""
        lengths = (self.order, self.prediction_window_length, self.prediction_hop_length)
        return AutocorrelationSettings(*lengths, scale_decay=self.scale_decay)

    @property
    def temporal_range(self) -> int:
        """Distance in codes to the farthest code that can change a prediction; averages never forget altogether."""
        if self.adaptation == "autocorrelation":
            return self.autocorrelation.temporal_range
        fixed = self.adaptation == "none" and self.scale_decay == 1
        return self.order - 1 if fixed else UNLIMITED_RANGE

    @property
    def attention_cost(self) -> int:
        """0: there is no attention."""
        return 0


class LinearPredictionMemory(NamedTuple):
    """What a lane remembers; all zeros before the stream begins.

    Attributes:
        history: the last P samples, newest first.
        weights: of the prediction.
        covariance: inverse of the forgetting, regularised autocorrelation matrix (P of recursive least squares).
        residual: mean size of the last residuals.
        count: codes seen; at 0 the other tensors are set to what a stream begins with.
    """

    history: Float64[Tensor, "B P"]
    weights: Float64[Tensor, "B P"]
    covariance: Float64[Tensor, "B Q Q"]
    residual: Float64[Tensor, " B"]
    count: Int[Tensor, " B"]


@dataclass(slots=True)
class StepState:
    """State of the incremental path; `step` overwrites the memory's tensors."""

    memory: LinearPredictionMemory | AutocorrelationMemory


class LinearPrediction(SequenceModel):
    """Linear prediction with a discretised logistic residual.

        mean = clip(w . (x[t], x[t-1], ...), -1, 1)        scale = E|residual| / (2 ln 2)
        p(code) = (1 - u) (S((upper - mean) / scale) - S((lower - mean) / scale)) + u / V,   S the logistic function

    Features are (mean, scale) of the next sample. The weights are those that minimise, over the samples so far,

        sum_i forgetting^(t-i) ((x[i] - w . past[i])^2 + P regularisation w[i mod P]^2) + the same of before the stream

    The second term never ends, which bounds the covariance, however long digital silence lasts: its eigenvalues are
    at most (1 - f^P) / (P r f^(P-1)), and at least the inverse of P / (1 - f) + P r / (1 - f^P), with f `forgetting`
    and r `regularisation`.
    Source: S. Haykin, Adaptive Filter Theory, recursive least squares. Differs: the regularisation is renewed, one
    weight a sample, so that it is not forgotten; the scale and the cells are our own.
    """

    lower_edges: Float64[Tensor, " V"]
    upper_edges: Float64[Tensor, " V"]
    coefficients: Float64[Tensor, " P"]
    mean_residual: Float64[Tensor, ""]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        lower, upper, waveform = mu_law_cells(config.vocab_size)
        self.register_buffer("lower_edges", torch.tensor(lower), persistent=False)
        self.register_buffer("upper_edges", torch.tensor(upper), persistent=False)
        self._waveform = waveform
        self._predictor: AutocorrelationPredictor | None = None
        if config.adaptation == "autocorrelation":
            self._predictor = AutocorrelationPredictor(config.autocorrelation, waveform)
        if config.adaptation == "none":
            self.register_buffer("coefficients", torch.zeros(config.order, dtype=torch.float64))
            self.register_buffer("mean_residual", torch.tensor(_FIRST_RESIDUAL, dtype=torch.float64))

    @property
    def vocab_size(self) -> int:
        """Number V of codes."""
        return self.config.vocab_size

    def zero_memory(
        self, num_lanes: int, *, memory_length: int | None = None, compressed_memory_length: int | None = None
    ) -> LinearPredictionMemory | AutocorrelationMemory:
        """Memory of a stream that has not begun.

        Raises:
            UserError: a length was passed; the order alone decides.
        """
        refuse_lengths(
            "linear_prediction", memory_length=memory_length, compressed_memory_length=compressed_memory_length
        )
        if self._predictor is not None:
            return self._predictor.zero_memory(num_lanes, self.lower_edges.device)
        order = self.config.order
        rows = order if self.config.adaptation == "recursive_least_squares" else 0
        zeros = functools.partial(self.lower_edges.new_zeros, dtype=torch.float64)
        return LinearPredictionMemory(
            history=zeros((num_lanes, order)),
            weights=zeros((num_lanes, order)),
            covariance=zeros((num_lanes, rows, rows)),
            residual=zeros((num_lanes,)),
            count=zeros((num_lanes,), dtype=torch.int64),
        )

    def forward(
        self,
        codes: Int[Tensor, "B T"],
        memory: LinearPredictionMemory | AutocorrelationMemory,
        *,
        document_starts: Bool[Tensor, "B T"] | None = None,
    ) -> ModelOutput:
        """Features (mean, scale) [B, T, 2] and next memory of a chunk of any length; no gradients."""
        features, memory = self._follow(codes, memory, document_starts)
        return ModelOutput(features, memory, {})

    def nll(self, features: Float[Tensor, "*batch 2"], targets: Int[Tensor, "*batch"]) -> Float64[Tensor, "*batch"]:
        """Negative log-likelihood of each target in nats."""
        return -self._log_probability(features, self.lower_edges[targets], self.upper_edges[targets])

    def log_probabilities(self, features: Float[Tensor, "*batch 2"]) -> Float64[Tensor, "*batch V"]:
        """Normalised log-probabilities of every code in nats."""
        return self._log_probability(features[..., None, :], self.lower_edges, self.upper_edges)

    def begin_steps(
        self, memory: LinearPredictionMemory | AutocorrelationMemory, codes: Int[Tensor, "B R"]
    ) -> StepState:
        """State for `step` after R more codes (any number, 0 too)."""
        return StepState(self._follow(codes, memory, None)[1])

    def step(self, codes: Int[Tensor, " B"], state: StepState) -> tuple[Float64[Tensor, "B 2"], StepState]:
        """Features after one more code a lane; consumes `state`."""
        features, memory = self._follow(codes[:, None], state.memory, None)
        return features[:, 0], StepState(memory)

    def clone_state(self, state: StepState) -> StepState:
        """An independent copy of a step state."""
        return StepState(map_memory(torch.clone, state.memory))

    def fit(self, codes: Integer[np.ndarray, " N"]) -> None:
        """Compute the fixed weights and their mean residual by the autocorrelation method; deterministic.

        Nothing is done where the weights adapt.

        Args:
            codes: the split as one stream, a memory map will do; it is read twice.
        Raises:
            UserError: the split is too short.
        """
        if self.config.adaptation != "none":
            return
        order = self.config.order
        if len(codes) <= 2 * order:
            raise UserError(f"linear_prediction: expected more than {2 * order} codes to fit, got {len(codes)}")
        sums, past = np.zeros(order + 1), np.zeros(order + 1)
        for piece in _pieces(codes, "autocorrelation"):
            _autocorrelation()(piece, self._waveform, sums, past)
        lags = np.arange(order)
        matrix = sums[np.abs(lags[:, None] - lags)] + len(codes) * self.config.regularisation * np.eye(order)
        self.coefficients.copy_(torch.from_numpy(np.linalg.solve(matrix, sums[1:])))
        memory, size, predicted = self.zero_memory(1), 0.0, 0.0
        for piece in _pieces(codes, "residual"):
            features, memory, _ = self(torch.from_numpy(piece[None]).to(self.coefficients.device), memory)
            means = features[0, :, 0].cpu().numpy()
            size += float(np.abs(self._waveform[piece] - np.r_[predicted, means[:-1]]).sum())
            predicted = means[-1]
        self.mean_residual.fill_(size / len(codes))

    def _log_probability(self, features: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """Of the cells between `lower` and `upper`: S(b) - S(a) = S(b) S(-a) (1 - exp(a - b)), exact in both tails."""
        mean, scale = features.double().unbind(-1)
        a, b = (lower - mean) / scale, (upper - mean) / scale
        logistic = F.logsigmoid(b) + F.logsigmoid(-a) + torch.log(-torch.expm1(a - b))
        share = self.config.uniform_share
        evenly = torch.full_like(logistic, math.log(share / self.config.vocab_size))
        return torch.logaddexp(logistic + math.log1p(-share), evenly)

    def _own(self, memory: Any, num_lanes: int) -> LinearPredictionMemory:
        """A copy that the loop may overwrite, on the CPU."""
        expected = [(num_lanes, *tensor.shape[1:]) for tensor in self.zero_memory(1)]
        got = [tuple(tensor.shape) for tensor in memory]
        if got != expected:
            raise UserError(
                f"linear_prediction: expected a memory of shapes {expected}, got {got}; "
                f"pass zero_memory({num_lanes}) or the memory of the chunk before"
            )
        return LinearPredictionMemory(*(tensor.detach().to("cpu", copy=True).contiguous() for tensor in memory))

    def _follow(
        self, codes: Int[Tensor, "B T"], memory: Any, document_starts: Bool[Tensor, "B T"] | None
    ) -> tuple[Float64[Tensor, "B T 2"], LinearPredictionMemory | AutocorrelationMemory]:
        """Features of codes, and the next memory."""
        if self._predictor is not None:
            return self._predictor.follow(codes, memory, document_starts)
        own = self._own(memory, codes.shape[0])
        if document_starts is None:
            document_starts = torch.zeros(codes.shape, dtype=torch.bool)
        features = torch.empty(*codes.shape, 2, dtype=torch.float64)
        kernels = _kernels()
        arrays = [tensor.numpy() for tensor in (codes.cpu().contiguous(), document_starts.cpu().contiguous())]
        state = kernels.AdaptiveState(*(tensor.numpy() for tensor in own))
        kernels.follow_adaptive(self._adaptive_predictor(), *arrays, state, features.numpy())
        return features.to(codes.device), LinearPredictionMemory(*(tensor.to(codes.device) for tensor in own))

    def _adaptive_predictor(self) -> Any:
        """What the kernels need: a `kernels.AdaptivePredictor`."""
        config, weights, residual = self.config, np.zeros(self.config.order), _FIRST_RESIDUAL
        if config.adaptation == "none":
            weights, residual = self.coefficients.cpu().numpy().copy(), float(self.mean_residual)
        numbers = (residual, config.forgetting, config.regularisation, config.scale_decay, _SMALLEST_SCALE)
        return _kernels().AdaptivePredictor(self._waveform, weights, np.array(numbers))

    def block_sampler(self) -> BlockSampler:
        from ct_audio.models.compiled_prediction import CompiledPrediction  # imports numba

        if self.device.type != "cpu":
            raise UserError(f"compiled stepping: expected the CPU, got {self.device.type}; use the eager stepper")
        edges = torch.cat([self.lower_edges, self.upper_edges[-1:]]).numpy()
        predictor = self._adaptive_predictor() if self._predictor is None else self._predictor.compiled()
        memory = type(self.zero_memory(1))
        return CompiledPrediction(predictor, edges, self.config.uniform_share, lambda own: StepState(memory(*own)))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Buffers move between devices and stay float64: `.float()` must not round them."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if getattr(self, name).dtype != buffer.dtype:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def mu_law_cells(
    vocab_size: int,
) -> tuple[Float64[np.ndarray, " V"], Float64[np.ndarray, " V"], Float64[np.ndarray, " V"]]:
    """Lower and upper edge of each code's cell, the first and the last infinite, and the sample that it decodes to."""
    mu = vocab_size - 1

    def expand(code: np.ndarray) -> np.ndarray:
        companded = 2 * code / mu - 1
        return np.sign(companded) * np.expm1(np.abs(companded) * math.log1p(mu)) / mu

    codes = np.arange(vocab_size, dtype=np.float64)
    edges = expand(codes[1:] - 0.5)
    return np.r_[-np.inf, edges], np.r_[edges, np.inf], expand(codes)


def _pieces(codes: Integer[np.ndarray, " N"], what: str) -> Iterator[Int[np.ndarray, " _"]]:
    """Consecutive pieces as int64, with a progress bar."""
    begins = range(0, len(codes), _FIT_PIECE)
    for begin in Progress(begins, desc=f"fit: {what}", unit="piece"):
        yield codes[begin : begin + _FIT_PIECE].astype(np.int64)


def _kernels() -> Any:
    from ct_audio.models import kernels  # imports numba, half a second

    return kernels


@functools.cache
@no_type_check
def _autocorrelation():
    """Add a piece's products of samples 0, 1, ... apart to `sums`; `past` is carried from piece to piece."""
    from numba import njit

    @njit(nogil=True)
    def add(codes, waveform, sums, past):
        for code in codes:
            for lag in range(len(past) - 1, 0, -1):
                past[lag] = past[lag - 1]
            past[0] = waveform[code]
            for lag in range(len(past)):
                sums[lag] += past[0] * past[lag]

    return add
