"""Bits per unit over time of any recording or text, under any run's model.

Shape letters: N codes, K bins.
"""

import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int, Int64, Integer
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.data.acoustics import level_dbfs
from ct_audio.data.codecs import Codec
from ct_audio.evaluation.nll import Evaluation, Stretch, evaluate_nll
from ct_audio.runs.open_run import LoadedRun

_LONGEST_TEXT = 60


@dataclass(frozen=True)
class Score:
    """What a model says about a file.

    Attributes:
        evaluation: mean NLL of a code, and its protocol.
        codes: [N]. nll_nats: [N], of each code, given all before it in the file.
    """

    evaluation: Evaluation
    codes: Integer[np.ndarray, " N"]
    nll_nats: Float64[np.ndarray, " N"]


def score_codes(
    run: LoadedRun, codec: Codec, codes: Integer[np.ndarray, " N"], *, progress: str | None = None
) -> Score:
    """NLL of every code of a stream of its own, from its first code on."""
    nll_nats = np.full(len(codes), np.nan)

    def collect(positions: Int[Tensor, " B"], nll: Float[Tensor, "B T"]) -> None:
        for first, row in zip(positions.tolist(), nll.double().cpu().numpy(), strict=True):
            nll_nats[first : first + len(row)] = row

    stretch = Stretch(codes, codec.start_code, run.config.data.chunk_length)
    evaluation = evaluate_nll(run.model, stretch, on_nll=collect, progress=progress)
    if not math.isfinite(evaluation.nll_nats):
        raise UserError(f"the NLL is {evaluation.nll_nats}: the model has diverged; use another checkpoint")
    return Score(evaluation, codes, nll_nats)


def bins_over_time(score: Score, codec: Codec, bin_length: int) -> list[dict[str, Any]]:
    """Means over consecutive bins of `bin_length` codes, at least 1; the last one may be shorter.

    Returns:
        for each bin: start (index of its first code), num_units, nll_nats and nll_bits (means of a code); for audio
        start_seconds and level_dbfs; for text the beginning of what stands there.
    """
    if bin_length < 1:
        raise UserError(f"bins: expected at least 1 {codec.unit} each, got {bin_length}")
    starts: Int64[np.ndarray, " K"] = np.arange(0, len(score.codes), bin_length)
    counts = np.diff([*starts, len(score.codes)])
    means = np.add.reduceat(score.nll_nats, starts) / counts
    rows = []
    for start, count, nats in zip(starts.tolist(), counts.tolist(), means.tolist(), strict=True):
        row = {"start": start, "num_units": count, "nll_nats": nats, "nll_bits": nats / math.log(2)}
        decoded = codec.decode(score.codes[start : start + count])
        if codec.sample_rate_hz:
            row |= {"start_seconds": start / codec.sample_rate_hz, "level_dbfs": level_dbfs(decoded)}
        else:
            row |= {"text": decoded.decode("utf-8", "replace")[:_LONGEST_TEXT]}
        rows.append(row)
    return rows


def most_surprising(rows: list[dict[str, Any]], number: int = 3) -> list[dict[str, Any]]:
    """The bins with the highest NLL, the highest first."""
    return heapq.nlargest(number, rows, key=lambda row: row["nll_nats"])
