"""NLL by kind of code: by how often it occurs in training, by its place in the window, by loudness and voicing.

A grouping gives every code of a stretch a group; `GroupSums` adds up the NLL of each while the stretch is scored.

Shape letters: N codes of a stretch, B lanes, T codes of a piece, G groups, V codes of the vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int, Int8, Int64, Integer
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.common.progress import Progress
from ct_audio.common.units import nats_to_bits, perplexity
from ct_audio.data.acoustics import find_pitch
from ct_audio.data.corpus import Corpus, Split
from ct_audio.models import SequenceModel

TRAINING_COUNTS = (10_000, 1_000, 100)
"""Table 7 of the paper."""
TRAINING_SHARES = (0.01, 0.001, 0.0001)
"""The same for vocabularies in which every code is frequent: shares of the training codes."""
LEVELS_DBFS = (-60, -50, -40, -30, -20)
FRAME_SECONDS = 1024 / 24_000
"""Stretch around a code that decides how loud it is there."""
WINDOW_PARTS = 8
_PIECE_SECONDS = 30.0  # pitch is found piece by piece: its cost in memory grows with the length
_COUNT_CODES = 1 << 22


@dataclass(frozen=True)
class Grouping:
    """A group for each code of a stretch.

    Attributes:
        name: as in GROUPINGS.
        group_of: [N], index of a label, or -1 for a code that belongs to none.
        unions: further rows of the table, label to groups; "all" is added.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    group_of: Int8[np.ndarray, " N"]
    unions: dict[str, tuple[int, ...]] = field(default_factory=dict)


class GroupSums:
    """NLL and number of the codes of each group: an `on_nll` of `evaluate_nll`."""

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping
        self.nll_sums_nats: Float64[np.ndarray, " G"] = np.zeros(len(grouping.labels))
        self.counts: Int64[np.ndarray, " G"] = np.zeros(len(grouping.labels), dtype=np.int64)

    def __call__(self, positions: Int[Tensor, " B"], nll: Float[Tensor, "B T"]) -> None:
        groups = self.grouping.group_of[positions.numpy()[:, None] + np.arange(nll.shape[1])].astype(np.int64)
        known, values = groups >= 0, nll.double().cpu().numpy()
        self.nll_sums_nats += np.bincount(groups[known], values[known], minlength=len(self.counts))
        self.counts += np.bincount(groups[known], minlength=len(self.counts))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each group, then for each union: label, num_units, share, nll_nats, nll_bits, perplexity.

        The last three are None for a group without codes.
        """
        everything = tuple(range(len(self.counts)))
        parts = {label: (group,) for group, label in enumerate(self.grouping.labels)}
        rows = []
        for label, groups in (parts | self.grouping.unions | {"all": everything}).items():
            count, total = int(self.counts[list(groups)].sum()), float(self.nll_sums_nats[list(groups)].sum())
            nats = total / count if count else None
            row = {"group": label, "num_units": count, "share": count / max(1, int(self.counts.sum()))}
            row |= {"nll_nats": nats, "nll_bits": None if nats is None else nats_to_bits(nats)}
            rows.append(row | {"perplexity": None if nats is None else perplexity(nats)})
        return rows


def make_groupings(
    names: list[str], model: SequenceModel, corpus: Corpus, split: Split, *, num_codes: int
) -> list[Grouping]:
    """Groupings of the first `num_codes` codes of a split by name; "all" stands for those that apply to the corpus.

    Raises:
        UserError: there is none of that name, or it does not apply; the message names those that do.
    """
    possible = ["count", "share"]
    possible += ["window"] if model.window_length > 1 else []
    possible += ["level", "voicing"] if corpus.codec.sample_rate_hz else []
    wrong = [name for name in names if name not in [*possible, "all"]]
    if wrong:
        raise UserError(f"--by {wrong[0]}: expected out of {', '.join(possible)} or all for this run and corpus")
    chosen = [name for name in GROUPINGS if name in (possible if "all" in names else names)]
    return [GROUPINGS[name](model, corpus, split, num_codes) for name in chosen]


def count_codes(codes: Integer[np.ndarray, " _"], vocab_size: int) -> Int64[np.ndarray, " V"]:
    """How often each code occurs; a memory map is read piece by piece."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for begin in range(0, len(codes), _COUNT_CODES):
        counts += np.bincount(codes[begin : begin + _COUNT_CODES], minlength=vocab_size)
    return counts


def by_training_count(_model: SequenceModel, corpus: Corpus, split: Split, num_codes: int) -> Grouping:
    """How often the code occurs in the training split, as in Table 7: more than 10K times, 1K to 10K, ..."""
    counts = count_codes(corpus.split("train").codes, corpus.codec.vocab_size)
    most, *others = TRAINING_COUNTS
    group_of_code = sum((counts < limit).astype(np.int8) for limit in others) + (counts <= most)
    short = [f"{limit // 1000}K" if limit % 1000 == 0 else str(limit) for limit in TRAINING_COUNTS]
    labels = (f"> {short[0]}", *(f"{b}-{a}" for a, b in itertools.pairwise(short)), f"< {short[-1]}")
    title = f"{corpus.codec.unit}s by how often they occur in training"
    return Grouping("count", title, labels, group_of_code.astype(np.int8)[split.codes[:num_codes]])


def by_training_share(_model: SequenceModel, corpus: Corpus, split: Split, num_codes: int) -> Grouping:
    """Which share of the training split the code makes up."""
    counts = count_codes(corpus.split("train").codes, corpus.codec.vocab_size)
    group_of_code = sum((counts < limit * counts.sum()).astype(np.int8) for limit in TRAINING_SHARES)
    first, *_, last = TRAINING_SHARES
    labels = (f">= {first:.4g}", *(f"{b:.4g}-{a:.4g}" for a, b in itertools.pairwise(TRAINING_SHARES)), f"< {last:.4g}")
    title = "codes by their share of the training split"
    return Grouping("share", title, labels, np.asarray(group_of_code, dtype=np.int8)[split.codes[:num_codes]])


def by_place_in_window(model: SequenceModel, _corpus: Corpus, _split: Split, num_codes: int) -> Grouping:
    """Place in the window, in WINDOW_PARTS parts; also what only the recent part of each window would give.

    The last code of a window sees all of the window before it, the first one memory only.
    """
    length = model.window_length
    parts = max(part for part in range(1, WINDOW_PARTS + 1) if length % part == 0)
    size = length // parts
    group_of = (np.arange(num_codes) % length // size).astype(np.int8)
    labels = tuple(f"{part * size}-{(part + 1) * size - 1}" for part in range(parts))
    unions = {
        f"last {name}": tuple(range(parts - parts // divisor, parts))
        for name, divisor in (("half", 2), ("quarter", 4), ("eighth", 8))
        if parts % divisor == 0
    }
    return Grouping("window", f"codes by their place in the window of {length}", labels, group_of, unions)


def by_level(_model: SequenceModel, corpus: Corpus, split: Split, num_codes: int) -> Grouping:
    """Root mean square of the surroundings of the code, in decibels below full scale; documents are kept apart."""
    codes = split.codes[:num_codes]
    rate, group_of = _rate(corpus), np.empty(len(codes), dtype=np.int8)
    for begin, end in _documents(split, num_codes):
        levels = surrounding_level_dbfs(corpus.codec.decode(codes[begin:end]), round(FRAME_SECONDS * rate))
        group_of[begin:end] = np.digitize(levels, LEVELS_DBFS)
    labels = tuple(f"{a} to {b}" for a, b in itertools.pairwise(LEVELS_DBFS))
    labels = (f"below {LEVELS_DBFS[0]}", *labels, f"above {LEVELS_DBFS[-1]}")
    return Grouping("level", "samples by the level around them (dBFS)", labels, group_of)


def by_voicing(_model: SequenceModel, corpus: Corpus, split: Split, num_codes: int) -> Grouping:
    """Whether the sound around the code has a pitch (probabilistic YIN; about 7 times real time on one core)."""
    codes = split.codes[:num_codes]
    rate, group_of = _rate(corpus), np.empty(len(codes), dtype=np.int8)
    piece, bounds = round(_PIECE_SECONDS * rate), []
    for begin, end in _documents(split, num_codes):
        bounds += [(start, min(start + piece, end)) for start in range(begin, end, piece)]
    with Progress(total=len(codes), desc="pitch", unit="code", unit_scale=True) as bar:
        for begin, end in bounds:
            voiced = ~np.isnan(find_pitch(corpus.codec.decode(codes[begin:end]), rate))
            nearest = np.rint(np.arange(end - begin) / (rate // 50)).astype(np.int64)  # a frame each 20 ms
            group_of[begin:end] = np.where(voiced[nearest.clip(max=len(voiced) - 1)], 0, 1)
            bar.update(end - begin)
    return Grouping("voicing", "samples by whether the sound has a pitch", ("voiced", "unvoiced"), group_of)


def surrounding_level_dbfs(waveform: Float[np.ndarray, " N"], frame_length: int) -> Float64[np.ndarray, " N"]:
    """Level in decibels around each sample: RMS of the `frame_length` samples of which it is the middle, fewer at the
    ends; 0 is the constant 1, and -200 the lowest."""
    energy = np.concatenate([[0.0], np.cumsum(waveform.astype(np.float64) ** 2)])
    places = np.arange(len(waveform))
    first = np.maximum(places - frame_length // 2, 0)
    stop = np.minimum(places + (frame_length + 1) // 2, len(waveform))
    return 10 * np.log10(np.maximum((energy[stop] - energy[first]) / (stop - first), 1e-20))


def _documents(split: Split, num_codes: int) -> Iterator[tuple[int, int]]:
    stops = [*split.document_offsets[1:].tolist(), split.num_codes]
    for begin, end in zip(split.document_offsets.tolist(), stops, strict=True):
        if begin < num_codes:
            yield begin, min(end, num_codes)


def _rate(corpus: Corpus) -> int:
    assert corpus.codec.sample_rate_hz is not None
    return corpus.codec.sample_rate_hz


GROUPINGS: dict[str, Callable[[SequenceModel, Corpus, Split, int], Grouping]] = {
    "count": by_training_count,
    "share": by_training_share,
    "window": by_place_in_window,
    "level": by_level,
    "voicing": by_voicing,
}
