"""Front ends: what a code becomes before a stack sees it. The adaptive one is in `adaptive_vocabulary.py`.

Shape letters: B lanes, T codes of a chunk, D width.
"""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ct_audio.models.interface import FrontEnd


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
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        return self.dropout(self._rows(codes)), memory

    def step(self, codes: Int[Tensor, "B"], memory: Any) -> tuple[Float[Tensor, "B D"], Any]:
        return self._rows(codes), memory

    def _rows(self, codes: Tensor) -> Tensor:
        rows = F.embedding(codes, self.table.weight)
        return rows if self.scale is None else rows * self.scale
