"""Streaming evaluation: the NLL of a stretch of codes, each scored exactly once, memory carried from its beginning.

Shape letters: N codes of the stretch, B lanes, T codes of a chunk.
A long stretch may be cut into lanes that run side by side; each later lane is first run over the codes that precede it,
unscored, and the protocol in the result says so.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.common.progress import Progress
from ct_audio.common.units import nats_to_bits
from ct_audio.data.corpus import Corpus
from ct_audio.data.lanes import shift_by_one
from ct_audio.models import SequenceModel
from ct_audio.models.state import detach_memory, map_memory
from ct_audio.runs.config import DataConfig


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate_nll`.

    Attributes:
        nll_nats: mean negative log-likelihood of a code in nats.
        nll_bits: the same in bits.
        num_units: codes scored.
        wall_seconds: time that it took.
        protocol: how it was measured; plain values, ready for JSON.
    """

    nll_nats: float
    nll_bits: float
    num_units: int
    wall_seconds: float
    protocol: dict[str, Any]

    @property
    def units_per_second(self) -> float:
        """Codes scored in a second of wall time."""
        return self.num_units / max(self.wall_seconds, 1e-9)


@dataclass(frozen=True)
class Lane:
    """A lane's part of the stretch: codes [start, stop), run after the `warmup` codes before it."""

    start: int
    stop: int
    warmup: int


@dataclass(frozen=True)
class Stretch:
    """Codes that are scored as one stream from its beginning, and how they are run.

    Attributes:
        codes: a memory map will do.
        start_code: what precedes the first code (with resets: each document's first code).
        chunk_length: codes of a lane in one forward; whole windows. It changes speed and memory use, not the result.
        document_offsets: index of the first code of each document, also of those beyond the stretch; needed with
            `reset_memory_at_document`.
        reset_memory_at_document: memory ends where a document begins; else the stretch is one continuous stream.
        num_lanes: parts of the stretch that run side by side; lowered where there are fewer whole chunks than lanes.
        warmup_length: codes before a later lane's part that are run, unscored, to fill its memory; whole windows. A
            lane that begins earlier than that is warmed up from the beginning of the stretch.
        memory_length, compressed_memory_length: in place of the configuration's, as `zero_memory` takes them.
    """

    codes: Integer[np.ndarray, " N"]
    start_code: int
    chunk_length: int
    document_offsets: Integer[np.ndarray, " num_documents"] | None = None
    reset_memory_at_document: bool = False
    num_lanes: int = 1
    warmup_length: int = 0
    memory_length: int | None = None
    compressed_memory_length: int | None = None

    @property
    def memory_lengths(self) -> dict[str, int | None]:
        """As arguments of `zero_memory`."""
        return {"memory_length": self.memory_length, "compressed_memory_length": self.compressed_memory_length}


def stretch_of(
    corpus: Corpus, split: str, data: DataConfig, *, num_codes: int | None = None, **changes: Any
) -> Stretch:
    """The beginning of a split, run as in training: start code, documents, chunk length.

    Args:
        data: of the run's configuration.
        num_codes: at the beginning of the split; None: all of it.
        changes: other fields of `Stretch`.
    """
    fields = {"chunk_length": data.chunk_length, "reset_memory_at_document": data.reset_memory_at_document} | changes
    codes, offsets = corpus.split(split).codes[:num_codes], corpus.split(split).document_offsets
    return Stretch(codes, corpus.codec.start_code, document_offsets=offsets, **fields)


def evaluate_nll(
    model: SequenceModel,
    stretch: Stretch,
    *,
    on_nll: Callable[[Int[Tensor, " B"], Float[Tensor, "B T"]], None] | None = None,
    update: Callable[[Float[Tensor, ""]], None] | None = None,
    progress: str | None = "evaluate",
) -> Evaluation:
    """Mean NLL of a stretch of codes as one stream: evaluation mode, memory carried, float64 sums, deterministic.

    Args:
        model: any model; its mode (train or eval) is put back afterwards.
        on_nll: called with the positions [B] of the first codes of a piece and its NLL [B, T] in nats, for each piece
            that is scored; every position comes once.
        update: called with the loss of each piece, a mean over its codes with the auxiliary losses as in training,
            after the piece has been scored; it may change the weights (dynamic evaluation). One lane only: what lanes
            further on see would change the weights that earlier codes are scored with.
        progress: label of the progress bar (shown on a terminal only); None: no bar.
    Raises:
        UserError: the stretch does not fit the model, or a code is not in the model's vocabulary.
    Source: Rae et al. 2019, sections 4.1 and 5.
    """
    _require_fits(model, stretch)
    if update is not None and stretch.num_lanes > 1:
        raise UserError(
            f"dynamic evaluation: expected num_lanes = 1, got {stretch.num_lanes}; later codes must not be known"
        )
    num_codes, chunk_length = len(stretch.codes), stretch.chunk_length
    lanes = cut_lanes(
        num_codes, chunk_length=chunk_length, num_lanes=stretch.num_lanes, warmup_length=stretch.warmup_length
    )
    began, nll_sum, num_scored, memory = time.perf_counter(), 0.0, 0, None
    dtype = ""
    total = num_codes + sum(lane.warmup for lane in lanes)
    bar = Progress(total=total, desc=progress, unit="code", unit_scale=True, quiet=not progress)
    with model.evaluation_mode(), torch.inference_mode(update is None), bar:
        for piece in _schedule(lanes, chunk_length):
            if piece.joining:
                fresh = model.zero_memory(piece.joining, **stretch.memory_lengths)
                memory = fresh if memory is None else concatenate_lanes(fresh, memory)
            memory = map_memory(lambda tensor, first=-piece.active: tensor[first:], memory)
            inputs, targets, document_starts = _read(stretch, piece, model)
            features, memory, auxiliary_losses = model(inputs, memory, document_starts=document_starts)
            if piece.scored:
                nll = model.nll(features, targets)
                dtype = str(nll.dtype).removeprefix("torch.")
                nll_sum = nll_sum + nll.detach().sum(dtype=torch.float64)
                num_scored += nll.numel()
                if on_nll is not None:
                    on_nll(torch.from_numpy(piece.positions), nll.detach())
                if update is not None:
                    update(torch.stack([nll.mean(), *auxiliary_losses.values()]).sum())
                    memory = detach_memory(memory)
            bar.update(inputs.numel())
    assert num_scored == num_codes, f"scored {num_scored} codes of {num_codes}"
    nll_nats = float(nll_sum) / num_codes
    precision = "bfloat16" if torch.is_autocast_enabled(model.device.type) else dtype
    protocol = _protocol(model, stretch, lanes, dtype) | {"precision": precision}
    return Evaluation(nll_nats, nats_to_bits(nll_nats), num_codes, time.perf_counter() - began, protocol)


def cut_lanes(num_codes: int, *, chunk_length: int, num_lanes: int, warmup_length: int) -> list[Lane]:
    """Cut a stretch into lanes that cover it exactly: whole chunks each, the remainder at the end of the last one.

    Returns:
        at most `num_lanes` lanes in order, whose numbers of whole chunks differ by at most one, the longer ones last.
    """
    num_chunks = num_codes // chunk_length
    num_lanes = max(1, min(num_lanes, num_chunks))
    base, extra = divmod(num_chunks, num_lanes)
    starts = [(base * lane + max(0, lane - (num_lanes - extra))) * chunk_length for lane in range(num_lanes)]
    stops = [*starts[1:], num_codes]
    return [Lane(start, stop, min(warmup_length, start)) for start, stop in zip(starts, stops, strict=True)]


def concatenate_lanes(first: Any, second: Any) -> Any:
    """The lanes of two memories of one model, one after the other; of plain values, what holds for all: the larger."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, tuple):
        parts = [concatenate_lanes(a, b) for a, b in zip(first, second, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return max(first, second)


@dataclass(frozen=True)
class _Piece:
    """One forward of the last lanes: `joining` new ones come in front, then the first leave until `active` are left."""

    joining: int
    active: int
    positions: Integer[np.ndarray, " B"]
    length: int
    scored: bool


def _schedule(lanes: list[Lane], chunk_length: int) -> Iterator[_Piece]:
    """The forwards of an evaluation in order: the warm-up, from the lanes that need most, then the codes themselves.

    Later lanes never have the shorter warm-up nor the shorter part, so those that are active are always the last ones.
    """
    starts = np.array([lane.start for lane in lanes])
    warmups = np.array([lane.warmup for lane in lanes])
    levels = sorted(set(warmups.tolist()), reverse=True)  # ends with 0: nothing comes before the first lane
    for level, next_level in itertools.pairwise(levels):
        joining, active = int((warmups == level).sum()), starts[warmups >= level]
        for ahead in range(level, next_level, -chunk_length):
            yield _Piece(joining, len(active), active - ahead, min(chunk_length, ahead - next_level), scored=False)
            joining = 0
    joining = int((warmups == 0).sum())
    stops = np.array([lane.stop for lane in lanes])
    for done in range(0, int((stops - starts).max()), chunk_length):
        active = starts[stops - starts > done] + done
        yield _Piece(joining, len(active), active, min(chunk_length, int(stops[-1] - active[-1])), scored=True)
        joining = 0


def _read(stretch: Stretch, piece: _Piece, model: SequenceModel) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs [B, T], targets [B, T] and document starts [B, T] (None without resets), on the model's device."""
    offsets = stretch.document_offsets if stretch.reset_memory_at_document else None
    rows = [
        shift_by_one(
            stretch.codes, begin, begin + piece.length, start_code=stretch.start_code, document_offsets=offsets
        )
        for begin in piece.positions.tolist()
    ]
    inputs, targets, starts = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows, strict=True))
    if targets.min() < 0 or targets.max() >= model.vocab_size:
        raise UserError(
            f"codes: expected all in [0, {model.vocab_size}), the model's vocabulary, got {targets.min()} to "
            f"{targets.max()}; use a corpus of the codec that the model was trained on"
        )
    inputs, targets, starts = (tensor.to(model.device, non_blocking=True) for tensor in (inputs, targets, starts))
    return inputs, targets, None if offsets is None else starts


def _protocol(model: SequenceModel, stretch: Stretch, lanes: list[Lane], dtype: str) -> dict[str, Any]:
    """How it was measured; the caller, who knows them, fills in the split and the seconds."""
    lengths = stretch.memory_lengths.items()
    return {
        "split": None,
        "num_units": len(stretch.codes),
        "seconds": None,
        "num_lanes": len(lanes),
        "warmup_length": max(lane.warmup for lane in lanes),
        "chunk_length": stretch.chunk_length,
        "reset_memory_at_document": stretch.reset_memory_at_document,
        "dtype": dtype,
        **{name: getattr(model.config, name, None) if given is None else given for name, given in lengths},
    }


def _require_fits(model: SequenceModel, stretch: Stretch) -> None:
    window_length = model.window_length
    if len(stretch.codes) < 1:
        raise UserError("codes to evaluate: expected at least one, got none; choose a longer stretch or another split")
    if not 0 <= stretch.start_code < model.vocab_size:
        raise UserError(f"start_code: expected a code in [0, {model.vocab_size}), got {stretch.start_code}")
    if stretch.chunk_length < 1 or stretch.chunk_length % window_length:
        raise UserError(f"chunk_length: expected whole windows of {window_length} codes, got {stretch.chunk_length}")
    if stretch.num_lanes < 1:
        raise UserError(f"num_lanes: expected at least 1, got {stretch.num_lanes}")
    if stretch.warmup_length < 0 or stretch.warmup_length % window_length:
        raise UserError(f"warmup_length: expected whole windows of {window_length} codes, got {stretch.warmup_length}")
    if stretch.reset_memory_at_document and stretch.document_offsets is None:
        raise UserError("reset_memory_at_document: expected document_offsets, got none; pass the split's offsets")
