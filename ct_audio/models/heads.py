"""Heads: from features to the probabilities of the next code. The adaptive softmax is in `adaptive_vocabulary.py`.

Shape letters: N rows of any batch, D features, V codes of the vocabulary.
"""

import abc
import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ct_audio.models.interface import Head

MAX_LOGITS = 2**27
"""Logits that `nll` makes at a time (512 MiB in float32); more are made in blocks, and again for the gradient."""


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
    def nll_of_rows(self, rows: Float[Tensor, "N D"], targets: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
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
    """One linear map to the logits of all codes.

    Args:
        projection: with bias; its weight may be a front end's table.
    """

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.num_logits = projection.out_features
        self.projection = projection

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.weight.dtype

    def nll_of_rows(self, rows: Float[Tensor, "N D"], targets: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        return F.cross_entropy(at_least_float32(self.projection(rows)), targets, reduction="none")

    def log_probabilities_of_rows(self, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        return torch.log_softmax(at_least_float32(self.projection(rows)), dim=-1)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Costs nothing where there is none: a sampler comes here for every code."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else contextlib.nullcontext()


def nll_in_blocks(
    nll: Callable[[Tensor, Tensor], Tensor], rows: Float[Tensor, "N D"], targets: Int[Tensor, "N"], num_logits: int
) -> Float[Tensor, "N"]:
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
