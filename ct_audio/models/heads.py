"""Heads: from features to the probabilities of the next code. The adaptive softmax is in `adaptive_vocabulary.py`.

Shape letters: N rows of any batch, D features, V codes of the vocabulary.
"""

import abc
import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ct_audio.models.autocorrelation import cell_width
from ct_audio.models.interface import Head
from ct_audio.models.linear_prediction import mu_law_cells

MAX_LOGITS = 2**27
"""Logits that `nll` makes at a time (512 MiB in float32); more are made in blocks, and again for the gradient."""

_FAR = 1e4
"""Edge of the outermost cells, which are open."""
FLOOR_CELLS = 0.1
"""Least width of a component, in widths of the cell that the prediction lies in: narrower ones freeze a sample."""


class RowHead(Head):
    """A head that sees rows one by one: any batch is flattened, autocast is off, a large NLL is made in blocks.

    Under bfloat16 autocast logits would be off by percents of a nat, so features meet the weights in the weights' type.

    Attributes:
        num_logits: how many a row makes in `nll`.
    """

    num_logits: int

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    @abc.abstractmethod
    def nll_of_rows(self, rows: Float[Tensor, "N D"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Negative log-likelihood of each target in nats; no random numbers in it."""

    @abc.abstractmethod
    def log_probabilities_of_rows(self, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Log-probabilities of all codes in nats."""

    def nll(self, features: Float[Tensor, "*batch D"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        with _without_autocast(features.device.type):
            rows = features.flatten(0, -2).to(self.dtype)
            return nll_in_blocks(self.nll_of_rows, rows, targets.flatten(), self.num_logits).view(targets.shape)

    def log_probabilities(self, features: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        with _without_autocast(features.device.type):
            rows = features.flatten(0, -2).to(self.dtype)
            return self.log_probabilities_of_rows(rows).view(*features.shape[:-1], -1)


class Categorical(RowHead):
    """One linear map from the stack's rows to the logits of all codes.

    Args:
        projection: with bias; its weight may be a front end's table. Features beyond its inputs are not looked at.
    """

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.num_logits = projection.out_features
        self.projection = projection

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.weight.dtype

    def nll_of_rows(self, rows: Float[Tensor, "N D"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        return F.cross_entropy(self._logits(rows), targets, reduction="none")

    def log_probabilities_of_rows(self, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        return torch.log_softmax(self._logits(rows), dim=-1)

    def _logits(self, rows: Tensor) -> Float[Tensor, "N V"]:
        return at_least_float32(self.projection(rows[:, : self.projection.in_features]))


class LogisticMixture(RowHead):
    """A mixture of logistic distributions over the waveform, cut at the edges of the codes' cells.

        mean_k = prediction + d_k scale        width_k = scale exp(r_k), not below a share of the predicted cell's width
        p(code) = (1 - u) sum_k w_k (S((upper - mean_k) / width_k) - S((lower - mean_k) / width_k)) + u / V

    with S the logistic function: an exact categorical distribution over the V mu-law codes. w (softmax), d and r are
    linear in the stack's rows; prediction and scale are the last two features (see `WaveformFeatures`). The weights are
    zeros at first, so that training begins near the predictor.

    Args:
        width: of the stack's rows.
        vocab_size: V, mu-law codes.
        num_components: K.
        uniform_share: u, of the probability that is spread evenly, in (0, 1): at 24 kHz one sampled code in seven
            minutes. It bounds the NLL of a code by 22 nats; with 1e-4 samples had one to three clicks a second.
    Source: Salimans et al. 2017, arXiv 1701.05517 (PixelCNN++), section 2.1. Differs: relative to a prediction.
    """

    lower: Tensor
    upper: Tensor

    def __init__(self, width: int, vocab_size: int, *, num_components: int = 4, uniform_share: float = 1e-7) -> None:
        super().__init__()
        self.num_logits = 3 * num_components
        self.num_components, self.uniform_share, self.vocab_size = num_components, uniform_share, vocab_size
        lower, upper, _ = mu_law_cells(vocab_size)
        # Finite, so that gradients are: nothing that a mixture can say lies beyond.
        self.register_buffer("lower", torch.tensor(lower.clip(min=-_FAR)), persistent=False)
        self.register_buffer("upper", torch.tensor(upper.clip(max=_FAR)), persistent=False)
        self.projection = nn.Linear(width, 3 * num_components)
        nn.init.zeros_(self.projection.weight)
        spread = torch.linspace(-1, 1, num_components) if num_components > 1 else torch.zeros(1)
        with torch.no_grad():
            self.projection.bias.copy_(torch.cat([torch.zeros(num_components), 0.3 * spread, 0.8 * spread]))

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.weight.dtype

    def nll_of_rows(self, rows: Float[Tensor, "N D"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Only the target's cell is looked at."""
        mixture = self._mixture(rows)
        return -self._log_mass(mixture, self.lower[targets][:, None], self.upper[targets][:, None])

    def log_probabilities_of_rows(self, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        log_weights, mean, width = (part[:, None] for part in self._mixture(rows))
        return self._log_mass((log_weights, mean, width), self.lower[:, None], self.upper[:, None])

    def _mixture(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, means and widths [N, K], in float32 or wider."""
        prediction, scale = at_least_float32(rows[:, -2:, None]).unbind(1)
        weights, shift, ratio = at_least_float32(self.projection(rows[:, :-2])).chunk(3, dim=-1)
        floor = FLOOR_CELLS * cell_width(prediction, self.vocab_size)
        width = torch.maximum(scale * ratio.clamp(-6, 6).exp(), floor)
        return torch.log_softmax(weights, dim=-1), prediction + shift * scale, width

    def _log_mass(self, mixture: tuple[Tensor, Tensor, Tensor], lower: Tensor, upper: Tensor) -> Tensor:
        """Of the cells between `lower` and `upper`: S(b) - S(a) = S(b) S(-a) (1 - exp(a - b)), exact in both tails."""
        log_weights, mean, width = mixture
        a, b = (lower.to(mean.dtype) - mean) / width, (upper.to(mean.dtype) - mean) / width
        log_mass = F.logsigmoid(b) + F.logsigmoid(-a) + torch.log(-torch.expm1((a - b).clamp(max=-1e-7)))
        log_mixture = torch.logsumexp(log_weights + log_mass, dim=-1) + math.log1p(-self.uniform_share)
        evenly = torch.full_like(log_mixture, math.log(self.uniform_share / self.vocab_size))
        return torch.logaddexp(log_mixture, evenly)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Costs nothing where there is none: a sampler comes here for every code."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else contextlib.nullcontext()


def nll_in_blocks(
    nll: Callable[[Tensor, Tensor], Tensor], rows: Float[Tensor, "N D"], targets: Int[Tensor, " N"], num_logits: int
) -> Float[Tensor, " N"]:
    """The NLL of each row, with at most `MAX_LOGITS` logits at a time, so that a batch of any size fits.

    Args:
        nll: of any number of rows and their targets [N], in nats; no random numbers in it.
        num_logits: how many one row makes.
    """
    length = max(1, MAX_LOGITS // num_logits)
    if len(targets) <= length:
        return nll(rows, targets)
    blocks = zip(rows.split(length), targets.split(length), strict=True)
    found = [checkpoint(nll, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return torch.cat(found)  # type: ignore[arg-type]


def at_least_float32(logits: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch V"]:
    """Logits in float32 where a narrower type made them."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
