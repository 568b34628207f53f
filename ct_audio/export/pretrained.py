"""Models from a program, in three lines: `ct_audio.load` and `ct_audio.sample`.

    model = ct_audio.load("kathleen/wavenet")
    waveform = ct_audio.sample(model, seconds=5)

Shape letters: N samples of a waveform, S samples side by side.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer

from ct_audio.common.errors import UserError
from ct_audio.common.recipes import model_folder
from ct_audio.data.codecs import Codec, read_codes
from ct_audio.models import SequenceModel
from ct_audio.runs.config import RunConfig
from ct_audio.runs.open_run import LoadedRun, load_run_model, run_codec
from ct_audio.sampling.sample_set import Request, SampleSet


@dataclass(frozen=True)
class Pretrained:
    """A trained model and its codec.

    Attributes:
        run: where it comes from, and what is known of its training.
        codec: turns waveforms or texts into codes and back.
    """

    run: LoadedRun
    codec: Codec

    @property
    def model(self) -> SequenceModel:
        """The model, in evaluation mode."""
        return self.run.model

    @property
    def config(self) -> RunConfig:
        """The configuration that it was trained with."""
        return self.run.config

    @property
    def sample_rate_hz(self) -> int | None:
        """Of its waveforms; None for text."""
        return self.codec.sample_rate_hz


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Pretrained:
    """A trained model with its codec, from files alone: nothing is downloaded.

    Args:
        path: an exported folder, a run, a checkpoint, or the name of a model that is shipped, as "kathleen/wavenet".
    Raises:
        UserError: there is no such model, or it is damaged.
    """
    run = load_run_model(model_folder(path), device=device)
    return Pretrained(run, run_codec(run))


def sample(
    model: Pretrained,
    *,
    seconds: float | int | None = None,
    length: int | None = None,
    num: int | None = None,
    prime: str | Path | np.ndarray | bytes | None = None,
    include_prime: bool = False,
    seed: int = 0,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Any:
    """Sample a waveform, or a text, from a model. Equal arguments give equal samples, as `ct-audio sample` does.

    Args:
        seconds: of audio; or
        length: codes (samples of a waveform, bytes, words, subwords).
        num: samples side by side; None: one, without that dimension.
        prime: what the sample continues: a file of any format and rate, a waveform [N] in [-1, 1] at the model's rate,
            or a text as bytes.
        include_prime: begin with the prime.
        seed: at least 0.
        temperature: below 1: safer; 0: the most probable code.
        top_k, top_p: draw from the most probable codes only (see `Sampler`).
    Returns:
        a waveform [N], float32 in [-1, 1], with `num` [S N]; of a text bytes, with `num` a list of them.
    Raises:
        UserError: an argument is out of its range.
    """
    codec, rate = model.codec, model.codec.sample_rate_hz
    if (seconds is None) == (length is None):
        raise UserError("sample: expected seconds (of audio) or length (in codes)")
    if seconds is not None:
        if rate is None:
            raise UserError(f"sample: {codec.unit}s have no seconds; pass length")
        if not math.isfinite(seconds):
            raise UserError(f"sample: expected seconds as a finite number, got {seconds}")
        length = round(seconds * rate)
    if length is None or length < 1:
        raise UserError(f"sample: expected at least one {codec.unit}, got {length if seconds is None else seconds}")
    codes = _prime_codes(codec, prime)
    request = Request(
        num_codes=length,
        num_lanes=1 if num is None else num,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        prime=codes,
        include_prime=include_prime,
    )
    samples = SampleSet(model.run, codec, request, None)
    samples.sample(signals=[])
    first = samples.decoded_prime()
    if rate is None:
        texts = [first + each for each in samples.decoded()]
        return texts[0] if num is None else texts
    waveforms = np.stack([np.concatenate([first, each]) for each in samples.decoded()])
    return waveforms[0] if num is None else waveforms


def _prime_codes(codec: Codec, prime: Any) -> Integer[np.ndarray, " N"] | None:
    if prime is None:
        return None
    if isinstance(prime, str | Path):
        return read_codes(Path(prime), codec)
    if isinstance(prime, np.ndarray) != (codec.sample_rate_hz is not None) or getattr(prime, "ndim", 1) != 1:
        wanted = "a waveform [N]" if codec.sample_rate_hz else "bytes"
        raise UserError(f"sample: expected prime as a path or {wanted}, got {type(prime).__name__}")
    return codec.encode(prime)
