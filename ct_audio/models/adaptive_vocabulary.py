"""First and last layer for vocabularies of words: codes are cut into bands by frequency, rarer bands are narrower.

Shape letters: B lanes, T codes of a chunk, D width, N rows of any batch, V codes, E width of a band's table, C codes of
the first band and one entry for each further one.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ct_audio.models.heads import RowHead, at_least_float32
from ct_audio.models.interface import FrontEnd, FrontEndOutput


def band_edges(cutoffs: Sequence[int], vocab_size: int) -> list[tuple[int, int]]:
    """First code of each band of the vocabulary, and the first one after it."""
    return list(itertools.pairwise([0, *cutoffs, vocab_size]))


class AdaptiveInput(FrontEnd):
    """Embedding whose codes are cut into bands by frequency: rarer bands have narrower tables, projected to the width.

    Band i has a table [codes of the band, width / div^i] and a projection to `width`; the first one too. Rows of the
    tables have the scale of output embeddings (N(0, 1 / E)), so that they can be tied; sqrt(width) makes rows of
    unit variance of them.

    Args:
        vocab_size: V; codes must be sorted by falling frequency.
        width: D.
        cutoffs: first code of each band but the first, increasing, in 1..V - 1.
        div: factor from a band's width to the next one's.
        dropout: of the rows.
    Source: Baevski & Auli 2019, arXiv 1809.10853, section 3.1.
    """

    def __init__(self, vocab_size: int, width: int, cutoffs: Sequence[int], div: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.width = width
        self.edges = band_edges(cutoffs, vocab_size)
        widths = [width // div**band for band in range(len(self.edges))]
        self.tables = nn.ParameterList(
            torch.randn(end - begin, narrow) * narrow**-0.5
            for (begin, end), narrow in zip(self.edges, widths, strict=True)
        )
        self.projections = nn.ParameterList(torch.randn(width, narrow) * width**-0.5 for narrow in widths)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, codes: Int[Tensor, "B T"], memory: Any, *, document_starts: Bool[Tensor, "B T"] | None = None
    ) -> FrontEndOutput:
        """Rows of unit variance; nothing of one code's row reaches another's."""
        flat, width = codes.flatten(), self.projections[0].shape[0]
        found, places = [], []
        for (begin, end), table, projection in zip(self.edges, self.tables, self.projections, strict=True):
            (here,) = ((flat >= begin) & (flat < end)).nonzero(as_tuple=True)
            with torch.autocast(codes.device.type, enabled=False):  # what all layers add to is no narrower than a table
                found.append(F.linear(F.embedding(flat[here] - begin, table), projection))
            places.append(here)
        rows = torch.cat(found) * width**0.5  # by band; each has its place, and a band without codes a zero gradient
        rows = torch.empty_like(rows).index_copy(0, torch.cat(places), rows).unflatten(0, codes.shape)
        return FrontEndOutput(self.dropout(rows), memory)


class AdaptiveSoftmax(RowHead):
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
        self.num_logits = self.edges[0][1] + num_further

    @property
    def dtype(self) -> torch.dtype:
        return self.bands.dtype

    def nll_of_rows(self, rows: Float[Tensor, "N D"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Only rows of a further band meet its codes: the largest tensor is [N, C], never [N, V]."""
        num_first = self.edges[0][1]
        in_head, further = targets, []
        for band, (begin, end) in enumerate(self.edges[1:]):
            here = (targets >= begin) & (targets < end)
            in_head = torch.where(here, num_first + band, in_head)
            further.append(here.nonzero(as_tuple=True)[0])
        nll = F.cross_entropy(self._head(rows), in_head, reduction="none")
        for band, here in enumerate(further):  # without any target too: every parameter has a gradient, as DDP wants
            logits = self._band(band, rows[here])
            within = F.cross_entropy(logits, targets[here] - self.edges[band + 1][0], reduction="none")
            nll = nll.index_add(0, here, within)
        return nll

    def log_probabilities_of_rows(self, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        head, num_first = torch.log_softmax(self._head(rows), dim=-1), self.edges[0][1]
        parts = [head[:, :num_first]]
        for band in range(len(self.edges) - 1):
            within = torch.log_softmax(self._band(band, rows), dim=-1)
            parts.append(within + head[:, num_first + band, None])
        return torch.cat(parts, dim=-1)

    def _head(self, rows: Tensor) -> Float[Tensor, "N C"]:
        num_first, vocab_size = self.edges[0][1], self.edges[-1][1]
        weight = torch.cat([self.tables[0], self.bands])
        bias = torch.cat([self.bias[:num_first], self.bias[vocab_size:]])
        return at_least_float32(F.linear(rows, weight, bias))

    def _band(self, band: int, rows: Tensor) -> Float[Tensor, "N E"]:
        begin, end = self.edges[band + 1]
        projected = F.linear(rows, self.projections[band].mT)
        return at_least_float32(F.linear(projected, self.tables[band + 1], self.bias[begin:end]))
