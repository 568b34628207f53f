"""Parts of the transformer: linear maps whose products are shared, feed-forward block, normalisation helpers, and the
first and the last layer: a plain table of codes, or adaptive ones for vocabularies of words.

Shape letters: B lanes, T rows, D width, O outputs, N rows of any batch, V codes, E width of a band's table, C codes of
the first band and one entry for each further one.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**27
"""Logits that `nll` makes at a time (512 MiB in float32); more are made in blocks, and again for the gradient."""


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, detached_inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(inputs, weight)
        output = F.linear(inputs, weight)
        return output, output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        own, later = gradients
        for_inputs = own @ weight if ctx.needs_input_grad[0] else None
        for_detached = later @ weight if ctx.needs_input_grad[1] else None
        for_weight = (own + later).flatten(0, -2).T @ inputs.flatten(0, -2) if ctx.needs_input_grad[2] else None
        return for_inputs, for_detached, for_weight


def shared_linear(
    inputs: Float[Tensor, "B T D"], detached_inputs: Float[Tensor, "B T D"], weight: Float[Tensor, "O D"]
) -> tuple[Float[Tensor, "B T O"], Float[Tensor, "B T O"]]:
    """One matrix product that is read twice: by the codes' own window and, detached, by later windows.

    Args:
        inputs: what the own window reads.
        detached_inputs: equal in value; the gradient that later windows send back goes here instead (it ends at the
            detached raw rows, or reaches the parameters of the norm in between).
        weight: gets the gradient of both.
    Returns:
        own, later: equal in value.
    """
    if torch.is_autocast_enabled(inputs.device.type):
        dtype = torch.get_autocast_dtype(inputs.device.type)
        inputs, detached_inputs, weight = inputs.to(dtype), detached_inputs.to(dtype), weight.to(dtype)
    return _SharedLinear.apply(inputs, detached_inputs, weight)  # type: ignore[return-value]


def linear(in_features: int, out_features: int, *, bias: bool = False, gain: float = 1.0) -> nn.Linear:
    """A linear map with N(0, gain^2 / in_features) weights and zero bias."""
    module = nn.Linear(in_features, out_features, bias=bias)
    nn.init.normal_(module.weight, std=gain * in_features**-0.5)
    if bias:
        nn.init.zeros_(module.bias)
    return module


def frozen_layer_norm(norm: nn.LayerNorm, rows: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """The norm's values, with no gradient to its parameters."""
    return F.layer_norm(rows, norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps)


class FeedForward(nn.Module):
    """Position-wise block: linear, ReLU, linear (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, width: int, feedforward_width: int, *, dropout: float, output_gain: float) -> None:
        super().__init__()
        self.expand = linear(width, feedforward_width, bias=True, gain=2**0.5)
        self.contract = linear(feedforward_width, width, bias=True, gain=output_gain)
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return self.contract(self.dropout(F.relu(self.expand(rows))))


def band_edges(cutoffs: Sequence[int], vocab_size: int) -> list[tuple[int, int]]:
    """First code of each band of the vocabulary, and the first one after it."""
    return list(itertools.pairwise([0, *cutoffs, vocab_size]))


class AdaptiveInput(nn.Module):
    """Embedding whose codes are cut into bands by frequency: rarer bands have narrower tables, projected to the width.

    Band i has a table [codes of the band, width / div^i] and a projection to `width`; the first one too. Rows of the
    tables have the scale of output embeddings (N(0, 1 / E)), so that they can be tied; sqrt(width) makes rows of
    unit variance of them.

    Args:
        vocab_size: V; codes must be sorted by falling frequency.
        width: D.
        cutoffs: first code of each band but the first, increasing, in 1..V - 1.
        div: factor from a band's width to the next one's.
    Source: Baevski & Auli 2019, arXiv 1809.10853, section 3.1.
    """

    def __init__(self, vocab_size: int, width: int, cutoffs: Sequence[int], div: int) -> None:
        super().__init__()
        self.edges = band_edges(cutoffs, vocab_size)
        widths = [width // div**band for band in range(len(self.edges))]
        self.tables = nn.ParameterList(
            torch.randn(end - begin, narrow) * narrow**-0.5
            for (begin, end), narrow in zip(self.edges, widths, strict=True)
        )
        self.projections = nn.ParameterList(torch.randn(width, narrow) * width**-0.5 for narrow in widths)

    def forward(self, codes: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        """Rows of unit variance; nothing of one code's row reaches another's."""
        flat, width = codes.flatten(), self.projections[0].shape[0]
        found, places = [], []
        for (begin, end), table, projection in zip(self.edges, self.tables, self.projections, strict=True):
            (here,) = ((flat >= begin) & (flat < end)).nonzero(as_tuple=True)
            with torch.autocast(codes.device.type, enabled=False):  # what all layers add to is no narrower than a table
                found.append(F.linear(F.embedding(flat[here] - begin, table), projection))
            places.append(here)
        rows = torch.cat(found) * width**0.5  # by band; each has its place, and a band without codes a zero gradient
        return torch.empty_like(rows).index_copy(0, torch.cat(places), rows).unflatten(0, codes.shape)


class AdaptiveSoftmax(nn.Module):
    """Softmax in two steps: over the first band's codes and one entry a further band, then within the band.

    log p(code) = log p_head(code) in the first band, else log p_head(band) + log p_band(code). The head multiplies the
    features themselves, a further band their projection to its width.

    Args:
        vocab_size, width, cutoffs, div: as `AdaptiveInput`'s.
        tied: use its tables, and its projections except the first, which the output has not.
    Source: Grave et al. 2017, arXiv 1609.04309; Baevski & Auli 2019, section 3.2. Differs: every code has a bias, as in
    Transformer-XL's code.
    """

    def __init__(
        self, vocab_size: int, width: int, cutoffs: Sequence[int], div: int, *, tied: AdaptiveInput | None = None
    ) -> None:
        super().__init__()
        source = tied or AdaptiveInput(vocab_size, width, cutoffs, div)
        self.edges = source.edges
        num_further = len(self.edges) - 1
        self.tables = source.tables
        self.projections = nn.ParameterList(list(source.projections)[1:])
        self.bands = nn.Parameter(torch.randn(num_further, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(vocab_size + num_further))

    def nll(self, features: Float[Tensor, "N D"], targets: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Negative log-likelihood of each target in nats; only rows of a further band meet its codes.

        The largest tensor is [N, C], never [N, V], and in blocks where that is large.
        """
        return nll_in_blocks(self._nll, features, targets, self.edges[0][1] + len(self.bands))

    def _nll(self, features: Float[Tensor, "N D"], targets: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        num_first = self.edges[0][1]
        in_head, further = targets, []
        for band, (begin, end) in enumerate(self.edges[1:]):
            here = (targets >= begin) & (targets < end)
            in_head = torch.where(here, num_first + band, in_head)
            further.append(here.nonzero(as_tuple=True)[0])
        nll = F.cross_entropy(self._head(features), in_head, reduction="none")
        for band, here in enumerate(further):  # without any target too: every parameter has a gradient, as DDP wants
            logits = self._band(band, features[here])
            within = F.cross_entropy(logits, targets[here] - self.edges[band + 1][0], reduction="none")
            nll = nll.index_add(0, here, within)
        return nll

    def log_probabilities(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Log-probabilities of all codes in nats."""
        head, num_first = torch.log_softmax(self._head(features), dim=-1), self.edges[0][1]
        parts = [head[:, :num_first]]
        for band in range(len(self.edges) - 1):
            within = torch.log_softmax(self._band(band, features), dim=-1)
            parts.append(within + head[:, num_first + band, None])
        return torch.cat(parts, dim=-1)

    def _head(self, features: Tensor) -> Float[Tensor, "N C"]:
        num_first, vocab_size = self.edges[0][1], self.edges[-1][1]
        weight = torch.cat([self.tables[0], self.bands])
        bias = torch.cat([self.bias[:num_first], self.bias[vocab_size:]])
        return at_least_float32(F.linear(features, weight, bias))

    def _band(self, band: int, features: Tensor) -> Float[Tensor, "N E"]:
        begin, end = self.edges[band + 1]
        projected = F.linear(features, self.projections[band].mT)
        return at_least_float32(F.linear(projected, self.tables[band + 1], self.bias[begin:end]))


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
