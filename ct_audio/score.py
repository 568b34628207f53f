"""Bits a unit over time of any recording or text, under any run's model.

Shape letters: N codes, K bins.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64, Integer
from torch import Tensor

from ct_audio.checkpoint import LoadedRun
from ct_audio.codec import Codec, codec_from_json
from ct_audio.corpus import open_corpus
from ct_audio.errors import UserError
from ct_audio.evaluate import Evaluation, evaluate_nll
from ct_audio.sample_measures import level_dbfs
from ct_audio.wav import read_wav, require_finite, resample

_LONGEST_TEXT = 60


@dataclass(frozen=True)
class Score:
    """What a model says about a file.

    Attributes:
        evaluation: mean NLL of a code, and its protocol.
        codes: [N]. nll_nats: [N], of each code, given all before it in the file.
    """

    evaluation: Evaluation
    codes: Integer[np.ndarray, "N"]
    nll_nats: Float64[np.ndarray, "N"]


def run_codec(run: LoadedRun, run_dir: Path) -> Codec:
    """The codec that the checkpoint names, else that of the run's corpus; a vocabulary lies in the run or the corpus.

    Raises:
        UserError: there is none, or it has another vocabulary than the model.
    """
    known, corpus = run.state.get("codec"), Path(run.config.data.corpus)
    if known is None:
        codec = open_corpus(corpus).codec
    else:
        places = [place for place in (run_dir, corpus) if (place / "vocabulary.json").is_file()]
        codec = codec_from_json(known, *places[:1])
    if codec.vocab_size != run.model.vocab_size:
        raise UserError(f"the codec {codec.name} has {codec.vocab_size} codes, the model {run.model.vocab_size}")
    return codec


def read_codes(path: Path, codec: Codec) -> Integer[np.ndarray, "N"]:
    """Codes of a recording (any format, mixed down and resampled to the codec's rate) or of a text.

    Raises:
        UserError: the file cannot be read, holds nothing, or is of the other kind.
    """
    if codec.sample_rate_hz:
        waveform, sample_rate_hz = read_wav(path)
        require_finite(waveform, str(path))
        codes = codec.encode(resample(waveform, sample_rate_hz, codec.sample_rate_hz))
    else:
        try:
            codes = codec.encode(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not len(codes):
        raise UserError(f"{path} is empty; expected at least one {codec.unit}")
    return codes


def score_codes(run: LoadedRun, codec: Codec, codes: Integer[np.ndarray, "N"], *, progress: str | None = None) -> Score:
    """NLL of every code of a stream of its own, from its first code on."""
    nll_nats = np.full(len(codes), np.nan)

    def collect(positions: Int[Tensor, "B"], nll: Float[Tensor, "B T"]) -> None:
        for first, row in zip(positions.tolist(), nll.double().cpu().numpy(), strict=True):
            nll_nats[first : first + len(row)] = row

    evaluation = evaluate_nll(
        run.model,
        codes,
        start_code=codec.start_code,
        chunk_length=run.config.data.chunk_length,
        on_nll=collect,
        progress=progress,
    )
    if not math.isfinite(evaluation.nll_nats):
        raise UserError(f"the NLL is {evaluation.nll_nats}: the model has diverged; use another checkpoint")
    return Score(evaluation, codes, nll_nats)


def bins_over_time(score: Score, codec: Codec, bin_length: int) -> list[dict[str, Any]]:
    """Means over consecutive bins of codes; the last one may be shorter.

    Args:
        bin_length: codes, at least 1.
    Returns:
        for each bin: start (index of its first code), num_units, nll_nats and nll_bits (means of a code); for audio
        start_seconds and level_dbfs; for text the beginning of what stands there.
    """
    if bin_length < 1:
        raise UserError(f"bins: expected at least 1 {codec.unit} each, got {bin_length}")
    starts: Int64[np.ndarray, "K"] = np.arange(0, len(score.codes), bin_length)
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
    order = torch.tensor([row["nll_nats"] for row in rows]).argsort(descending=True, stable=True)
    return [rows[index] for index in order[:number].tolist()]
