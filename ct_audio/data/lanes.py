"""Contiguous lanes of a split, chunk by chunk: what a model is trained on.

The split is cut into `num_lanes` equal segments (the remainder is dropped); lane b starts with segment b, goes on with
segment b + 1, and so on. Only where the used codes end does a lane jump, to corpus index 0. Inputs are the targets
shifted by one. All lanes move together, so that the whole position is one number, the same on every rank.

Shape letters: B lanes of this rank, T codes of a chunk.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64, Integer
from torch import Tensor

from ct_audio.common.errors import UserError


class Chunk(NamedTuple):
    """One training step's codes of this rank's lanes, see `shift_by_one`.

    Attributes:
        inputs, targets: int64 [B, T].
        document_starts: [B, T]; None where memory is not reset at documents.
        positions: int64 [B], corpus index of `targets[:, 0]`.
    """

    inputs: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    document_starts: Bool[Tensor, "B T"] | None
    positions: Int[Tensor, " B"]


class WindowStream:
    """Deals out a split in contiguous lanes, endlessly.

    Args:
        codes: all codes of the split, 1-D (a memory map will do).
        document_offsets: index of the first code of each document, ascending, the first is 0.
        start_code: the code that precedes a stream.
        chunk_length: codes a lane gives at a time (T).
        num_lanes: lanes over all ranks.
        reset_memory_at_document: mark document starts, and put `start_code` before each.
        rank, world_size: this process takes lanes [rank * B, (rank + 1) * B) with B = num_lanes / world_size.
    Raises:
        UserError: num_lanes is not divisible by world_size, or the split is too short for a chunk a lane.
    """

    def __init__(
        self,
        codes: np.ndarray,
        document_offsets: np.ndarray,
        *,
        start_code: int,
        chunk_length: int,
        num_lanes: int,
        reset_memory_at_document: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_lanes % world_size:
            raise UserError(
                f"data.num_lanes = {num_lanes} is not divisible by the {world_size} processes; change one of them"
            )
        self._segment_length = len(codes) // num_lanes
        if self._segment_length < chunk_length:
            raise UserError(
                f"the split has {len(codes)} codes; {num_lanes} lanes of a chunk of {chunk_length} need at least "
                f"{num_lanes * chunk_length}; lower data.num_lanes or data.chunk_length, or prepare more data"
            )
        self._codes = codes
        self._document_offsets = document_offsets
        self._start_code = start_code
        self._chunk_length = chunk_length
        self._num_lanes = num_lanes
        self._reset = reset_memory_at_document
        lanes_per_rank = num_lanes // world_size
        self._lanes = range(rank * lanes_per_rank, (rank + 1) * lanes_per_rank)
        self._codes_per_lane = 0

    @property
    def num_codes_used(self) -> int:
        """Codes that the lanes run over, before the first one jumps back to corpus index 0."""
        return self._segment_length * self._num_lanes

    def next_chunk(self) -> Chunk:
        """The next T codes of each of this rank's lanes."""
        used = self.num_codes_used
        positions = [(lane * self._segment_length + self._codes_per_lane) % used for lane in self._lanes]
        rows = zip(*map(self._read, positions), strict=True)
        inputs, targets, starts = (torch.from_numpy(np.stack(arrays)) for arrays in rows)
        self._codes_per_lane += self._chunk_length
        return Chunk(inputs, targets, starts if self._reset else None, torch.tensor(positions, dtype=torch.int64))

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-able, the same on every rank."""
        return {"codes_per_lane": self._codes_per_lane, "num_lanes": self._num_lanes, "num_codes": len(self._codes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that `state_dict` gave.

        Raises:
            UserError: the position is of a split of another size or of another number of lanes.
        """
        for key, value in self.state_dict().items():
            found = state.get(key)
            if type(found) is not int or found < 0 or (key != "codes_per_lane" and found != value):
                raise UserError(
                    f"stream position: expected {key} = {value}, got {found}; "
                    "resume with the corpus and the lanes that the run was started with"
                )
        self._codes_per_lane = state["codes_per_lane"]

    def _read(self, position: int) -> tuple[np.ndarray, ...]:
        """Inputs, targets and document starts [T] of the codes from `position` on, back to 0 at the end of the used."""
        until_end = min(self._chunk_length, self.num_codes_used - position)
        spans = [(position, position + until_end), (0, self._chunk_length - until_end)]
        offsets = self._document_offsets if self._reset else None
        parts = [
            shift_by_one(self._codes, begin, end, start_code=self._start_code, document_offsets=offsets)
            for begin, end in spans
            if begin < end
        ]
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def shift_by_one(
    codes: Integer[np.ndarray, " N"],
    begin: int,
    end: int,
    *,
    start_code: int,
    document_offsets: Integer[np.ndarray, " num_documents"] | None = None,
) -> tuple[Int64[np.ndarray, " T"], Int64[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
    """Inputs, targets and document starts of the codes [begin, end) of a stream.

    Args:
        start_code: the code that precedes index 0 and, with `document_offsets`, each document.
        document_offsets: index of the first code of each document, ascending; None: one continuous stream.
    Returns:
        the code before each target; targets; True where a target is the first of a document.
    """
    targets = np.array(codes[begin:end], dtype=np.int64)
    inputs = np.empty_like(targets)
    inputs[0] = codes[begin - 1] if begin else start_code
    inputs[1:] = targets[:-1]
    starts = np.zeros(len(targets), dtype=np.bool_)
    if document_offsets is not None:
        first, last = np.searchsorted(document_offsets, [begin, end])
        starts[document_offsets[first:last] - begin] = True
        inputs[starts] = start_code
    return inputs, targets, starts


def split_chunk(chunk: Chunk, num_parts: int) -> list[Chunk]:
    """Cut a chunk into `num_parts` groups of consecutive lanes, equally many lanes in each (micro-batches)."""
    parts = [torch.tensor_split(tensor, num_parts) if tensor is not None else (None,) * num_parts for tensor in chunk]
    return [Chunk(*fields) for fields in zip(*parts, strict=True)]  # type: ignore[arg-type]
