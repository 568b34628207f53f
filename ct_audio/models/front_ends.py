"""Front ends: what a code becomes before a stack sees it. The adaptive one is in `adaptive_vocabulary.py`.

Shape letters: B lanes, T codes of a chunk, D width, V codes of the vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ct_audio.models.autocorrelation import (
    FIRST_RESIDUAL,
    AutocorrelationMemory,
    AutocorrelationPredictor,
    AutocorrelationSettings,
)
from ct_audio.models.interface import FrontEnd, FrontEndOutput
from ct_audio.models.linear_prediction import mu_law_cells

SCALE_WITHOUT_PREDICTION = 0.05
"""Scale of the next sample for `WaveformFeatures`, which predicts silence: speech has a mean size of about that."""


class CodeEmbedding(FrontEnd):
    """A table with a row for each code.

    Args:
        scale: what the rows are multiplied by; a table that is tied to the head's has the scale of output weights.
        dropout: of the rows of a chunk, in training.
    """

    def __init__(self, table: nn.Embedding, *, scale: float | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.width = table.embedding_dim
        self.scale = scale
        self.table = table
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, codes: Int[Tensor, "B T"], memory: Any, *, document_starts: Bool[Tensor, "B T"] | None = None
    ) -> FrontEndOutput:
        return FrontEndOutput(self.dropout(self.rows(codes)), memory)

    def step(self, codes: Int[Tensor, " B"], memory: Any) -> FrontEndOutput:
        return FrontEndOutput(self.rows(codes), memory)

    def rows(self, codes: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        """Of the table, scaled."""
        rows = F.embedding(codes, self.table.weight)
        return rows if self.scale is None else rows * self.scale


class WaveformFeatures(CodeEmbedding):
    """Code embedding plus a linear map of what the codes are as a waveform, relative to a prediction of it.

    Features of each sample x: companded x; asinh((x - its prediction) / scale); log scale; companded prediction of the
    next sample; asinh((that - x) / scale). The head gets prediction and scale of the next sample beside the rows.
    This class predicts silence at a fixed scale; `LinearPredictionFeatures` predicts.

    Args:
        table, scale, dropout: as `CodeEmbedding`'s, with mu-law codes.
    """

    side_width = 2
    companded: Tensor
    waveform: Tensor

    def __init__(self, table: nn.Embedding, *, scale: float | None = None, dropout: float = 0.0) -> None:
        super().__init__(table, scale=scale, dropout=dropout)
        self.samples = mu_law_cells(table.num_embeddings)[2]
        self.register_buffer("waveform", torch.tensor(self.samples), persistent=False)
        self.features = nn.Linear(5, self.width)

    def forward(
        self, codes: Int[Tensor, "B T"], memory: Any, *, document_starts: Bool[Tensor, "B T"] | None = None
    ) -> FrontEndOutput:
        before, after, memory = self.predictions(codes, memory, document_starts)
        sample, mu = self.waveform[codes].double(), self.table.num_embeddings - 1
        (said, size), (next_sample, next_size) = before.unbind(-1), after.unbind(-1)
        features = [
            2 * _compand(sample, mu),
            torch.asinh((sample - said) / size) / 1.5,
            (next_size.log() + 6) / 2,
            2 * _compand(next_sample, mu),
            torch.asinh((next_sample - sample) / next_size) / 1.5,
        ]
        dtype = self.table.weight.dtype
        rows = self.dropout(self.rows(codes) + self.features(torch.stack(features, dim=-1).to(dtype)))
        return FrontEndOutput(rows, memory, after.to(dtype))

    def step(self, codes: Int[Tensor, " B"], memory: Any) -> FrontEndOutput:
        return FrontEnd.step(self, codes, memory)

    def predictions(
        self, codes: Int[Tensor, "B T"], memory: Any, document_starts: Bool[Tensor, "B T"] | None
    ) -> tuple[Float[Tensor, "B T 2"], Float[Tensor, "B T 2"], Any]:
        """Prediction and scale, in float64, of each code's sample and of the next one; and the next memory."""
        silence = torch.zeros(codes.shape, dtype=torch.float64, device=codes.device)
        fixed = torch.stack([silence, silence + SCALE_WITHOUT_PREDICTION], dim=-1)
        return fixed, fixed, memory


class LinearPredictionFeatures(WaveformFeatures):
    """`WaveformFeatures` relative to stable adaptive linear prediction, whose state is this front end's memory.

    Args:
        settings: of the predictor.
        table, scale, dropout: as `WaveformFeatures`'.
    """

    def __init__(
        self,
        settings: AutocorrelationSettings,
        table: nn.Embedding,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(table, scale=scale, dropout=dropout)
        self.predictor = AutocorrelationPredictor(settings, self.samples)

    @property
    def temporal_range(self) -> int:
        return self.predictor.settings.temporal_range

    def zero_memory(self, num_lanes: int) -> tuple[AutocorrelationMemory, Float[Tensor, "B 2"]]:
        """The predictor's memory, and the prediction and scale that it has made last (zeros before the stream)."""
        device = self.table.weight.device
        said = torch.zeros(num_lanes, 2, dtype=torch.float64, device=device)
        return self.predictor.zero_memory(num_lanes, device), said

    def predictions(
        self, codes: Int[Tensor, "B T"], memory: Any, document_starts: Bool[Tensor, "B T"] | None
    ) -> tuple[Float[Tensor, "B T 2"], Float[Tensor, "B T 2"], Any]:
        followed, said = memory
        is_first = followed.count == 0
        after, followed = self.predictor.follow(codes, followed, document_starts)
        before = torch.cat([said[:, None], after], dim=1)
        begins = torch.zeros_like(codes, dtype=torch.bool) if document_starts is None else document_starts.clone()
        begins[:, :1] |= is_first[:, None]
        first = (0.0, FIRST_RESIDUAL / (2 * math.log(2)))
        parts = zip(before[:, :-1].unbind(-1), first, strict=True)
        said_before = torch.stack([part.masked_fill(begins, value) for part, value in parts], dim=-1)
        return said_before, after, (followed, before[:, -1].clone())


def _compand(sample: Tensor, mu: int) -> Tensor:
    return sample.sign() * (mu * sample.abs()).log1p() / math.log1p(mu)
