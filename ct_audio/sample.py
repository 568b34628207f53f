"""Sampling: codes one by one from a model, with their log-probabilities, and what a sample is like.

Shape letters: B lanes, P codes of a prime, T sampled codes, V codes of the vocabulary, N samples of a waveform.
Lane k draws from a generator of its own, seeded from (seed, k): the first codes of a longer sample are the shorter
sample, and for the same number of lanes, threads and device every bit is the same.
"""

import math
import time
from collections.abc import Generator
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Integer
from torch import Tensor

from ct_audio.errors import UserError
from ct_audio.evaluate import evaluation_mode, model_device
from ct_audio.models import SequenceModel

_DRAWS_AHEAD = 4096  # uniform numbers a lane that are drawn at a time; draws do not depend on it
_CHECK_EVERY = 64  # codes between two looks for NaN; each look waits for the device
_PIECE_LENGTH = 4096  # codes of a prime, or of a re-scored sample, that one forward takes at most

SILENT_RMS_DBFS = -75.0
"""Quieter is no pause: codes 127 and 128 alone give -81 dBFS, the noise floor of quiet recordings is about -60."""
CLIPPED_SHARE = 0.01
"""Share of samples at either end of the scale; recorded speech has none or single ones."""
STUCK_RUN_SECONDS = 0.1
"""One code for so long; in recorded speech, pauses included, the longest runs last 2 ms."""
STUCK_DISTINCT_CODES = 8
"""Fewer codes in a whole sample; recorded speech has at least 15 in every tenth of a second, pauses included."""
RUNAWAY_RMS_DBFS = -12.0
"""Louder is noise: the loudest tenth of a second of recorded speech has -17 dBFS, codes drawn evenly have -10.5."""
RUNAWAY_DC = 0.1
"""Mean of the waveform; recordings have below 0.001."""
RUNAWAY_NLL_SHARE = 0.95
"""Mean NLL as a share of ln V, that of even odds: above it the model finds no structure in its own output."""
DRIFT_NATS = 1.0
"""Mean NLL above that of the validation split; recordings of one speaker differ by 0.7 from one second to another."""
DRIFT_SECONDS = 1.0
"""Shorter samples may be one loud sound, and are not judged so."""
SILENCE_FLOOR_DBFS = -120.0
"""What is written for the level of exact zeros, because JSON has no infinity."""


def sample_codes(
    model: SequenceModel,
    *,
    num_lanes: int,
    num_codes: int,
    seed: int,
    start_code: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    prime: Int[Tensor, "B P"] | None = None,
) -> Generator[tuple[Int[Tensor, "B"], Float[Tensor, "B"]], None, None]:
    """Sample code by code; the cost of a code does not depend on how many came before.

    Args:
        num_lanes: samples made side by side (B).
        num_codes: codes to sample in each lane.
        seed: at least 0.
        start_code: what precedes the stream (and the prime).
        temperature: divides the log-probabilities; 0 takes the most probable code.
        top_k: draw from this many most probable codes only, in [1, V].
        top_p: then, of these, from the fewest whose share of the probability reaches this, in (0, 1].
        prime: codes that come first, computed in parallel; the sample goes on after them.
    Returns:
        iterator of the codes [B] and of their log-probabilities [B] in nats, at temperature 1 before top-k and top-p.
        The model is in evaluation mode until the iterator is exhausted or closed.
    Raises:
        UserError: an argument is out of its range, or the model says NaN (seen with a delay of up to 64 codes).
    Source: top-p is nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751.
    """
    vocab_size = model.vocab_size
    if num_lanes < 1 or num_codes < 0:
        raise UserError(f"expected at least one lane and no negative number of codes, got {num_lanes} and {num_codes}")
    if seed < 0:
        raise UserError(f"seed: expected at least 0, got {seed}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature: expected a finite number of at least 0, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise UserError(f"top-k: expected 1 to {vocab_size}, the number of codes, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top-p: expected a share in (0, 1], got {top_p}")
    inputs = _preceded(prime, num_lanes, start_code, vocab_size, model_device(model))
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return _sample(model, inputs, num_codes, _LaneUniforms(seed, num_lanes, inputs.device), settings)


@torch.inference_mode()
def verify_steps(
    model: SequenceModel,
    codes: Int[Tensor, "B T"],
    log_probabilities: Float[Tensor, "B T"],
    *,
    start_code: int,
    prime: Int[Tensor, "B P"] | None = None,
) -> float:
    """Score sampled codes again, with forward passes over many codes at once in place of steps.

    Args:
        codes, log_probabilities: what `sample_codes` gave, in the order of time.
        start_code, prime: what it was given.
    Returns:
        largest absolute difference of a code's two log-probabilities in nats; NaN where either is NaN.
    """
    inputs = torch.cat([_preceded(prime, len(codes), start_code, model.vocab_size, codes.device), codes], dim=1)
    skipped = inputs.shape[1] - codes.shape[1] - 1  # the prime's codes are given, not scored
    memory, parts = model.zero_memory(len(codes)), []
    with evaluation_mode(model):
        for begin in range(0, inputs.shape[1] - 1, _piece_length(model)):
            targets = inputs[:, begin + 1 : begin + 1 + _piece_length(model)]
            features, memory, _ = model(inputs[:, begin : begin + targets.shape[1]], memory)
            parts.append(model.nll(features, targets))
    if not parts:
        return 0.0
    difference = torch.cat(parts, dim=1)[:, skipped:] + log_probabilities
    return difference.abs().max().item() if difference.numel() else 0.0


def estimate_code_seconds(
    model: SequenceModel, *, num_lanes: int, start_code: int, max_codes: int = 10_000, budget_seconds: float = 1.0
) -> float:
    """Wall time in seconds of one code of each lane, measured on a throw-away sample.

    Args:
        max_codes: at least 1; codes of the throw-away sample at most, not counting two to warm up.
        budget_seconds: it is broken off after this time.
    """
    iterator = sample_codes(model, num_lanes=num_lanes, num_codes=max_codes + 2, seed=0, start_code=start_code)
    for codes, _ in islice(iterator, 2):  # first calls are slower
        codes.tolist()
    began, count = time.perf_counter(), 0
    for codes, _ in iterator:
        count += 1
        codes.tolist()  # waits for the device
        if time.perf_counter() - began > budget_seconds:
            break
    iterator.close()
    return (time.perf_counter() - began) / count


def measure_sample(
    codes: Integer[np.ndarray, "N"],
    log_probabilities: Float[np.ndarray, "N"],
    waveform: Float[np.ndarray, "N"],
    *,
    vocab_size: int,
    sample_rate_hz: int,
) -> dict[str, Any]:
    """What a sampled waveform is like, in plain numbers ready for JSON.

    Args:
        codes: of one lane.
        log_probabilities: of these codes under the model, in nats.
        waveform: the decoded codes, in [-1, 1].
    Returns:
        seconds, num_samples, nll_nats (mean), nll_bits, nll_nats_per_second (of each second, the last may be shorter),
        rms_dbfs, peak, dc (mean), clipped_share (at the lowest or highest code), distinct_codes,
        distinct_codes_share (of the vocabulary), longest_run_seconds (of one code).
    """
    if not len(codes):
        raise UserError("expected a sample of at least one code, got none; sample more seconds")
    wide = waveform.astype(np.float64)
    nll = -log_probabilities.astype(np.float64)
    starts = np.r_[0, np.flatnonzero(np.diff(codes.astype(np.int64))) + 1, len(codes)]
    distinct = len(np.unique(codes))
    rms = math.sqrt(float(np.mean(wide**2)))
    return {
        "seconds": len(codes) / sample_rate_hz,
        "num_samples": len(codes),
        "nll_nats": float(nll.mean()),
        "nll_bits": float(nll.mean()) / math.log(2),
        "nll_nats_per_second": [
            float(nll[begin : begin + sample_rate_hz].mean()) for begin in range(0, len(nll), sample_rate_hz)
        ],
        "rms_dbfs": max(20 * math.log10(rms), SILENCE_FLOOR_DBFS) if rms else SILENCE_FLOOR_DBFS,
        "peak": float(np.abs(wide).max()),
        "dc": float(wide.mean()),
        "clipped_share": float(np.mean((codes == 0) | (codes == vocab_size - 1))),
        "distinct_codes": distinct,
        "distinct_codes_share": distinct / vocab_size,
        "longest_run_seconds": int(np.diff(starts).max()) / sample_rate_hz,
    }


def find_faults(measures: dict[str, Any], *, vocab_size: int, valid_nll_nats: float | None = None) -> list[str]:
    """What is wrong with a sample as audio: silent, clipped, stuck or runaway; empty where nothing is.

    Args:
        measures: of `measure_sample`.
        valid_nll_nats: the model's NLL on recordings, against which that of the sample is held; None where it has none.
    """
    seconds, rms_dbfs, dc = measures["seconds"], measures["rms_dbfs"], measures["dc"]
    run_seconds, distinct = measures["longest_run_seconds"], measures["distinct_codes"]
    faults = []
    if rms_dbfs < SILENT_RMS_DBFS:
        faults.append(f"silent: RMS {rms_dbfs:.1f} dBFS, below {SILENT_RMS_DBFS:.0f}")
    if measures["clipped_share"] > CLIPPED_SHARE:
        faults.append(f"clipped: {measures['clipped_share']:.1%} of the samples at full scale")
    if run_seconds > min(STUCK_RUN_SECONDS, seconds / 2):
        faults.append(f"stuck: one code for {run_seconds:.3f} s")
    if seconds >= STUCK_RUN_SECONDS and distinct < STUCK_DISTINCT_CODES:
        faults.append(f"stuck: only {distinct} distinct codes")
    if rms_dbfs > RUNAWAY_RMS_DBFS:
        faults.append(f"runaway: RMS {rms_dbfs:.1f} dBFS, above {RUNAWAY_RMS_DBFS:.0f}")
    if seconds >= STUCK_RUN_SECONDS and abs(dc) > RUNAWAY_DC:
        faults.append(f"runaway: mean {dc:.2f} instead of about 0")
    if measures["nll_nats"] > RUNAWAY_NLL_SHARE * math.log(vocab_size):
        faults.append(f"runaway: {measures['nll_nats']:.2f} nats a sample, even odds are {math.log(vocab_size):.2f}")
    elif valid_nll_nats is not None and seconds >= DRIFT_SECONDS and measures["nll_nats"] > valid_nll_nats + DRIFT_NATS:
        faults.append(
            f"runaway: {measures['nll_nats']:.2f} nats a sample, recordings have {valid_nll_nats:.2f} under this "
            "model: it has drifted into noise; lower --temperature, or train longer"
        )
    return faults


def _sample(
    model: SequenceModel, inputs: Tensor, num_codes: int, uniforms: "_LaneUniforms", settings: dict[str, Any]
) -> Generator[tuple[Tensor, Tensor], None, None]:
    with evaluation_mode(model):
        codes, state = inputs[:, -1], _run_prime(model, inputs[:, :-1])
        for index in range(num_codes):
            with torch.inference_mode():  # left before each yield: it must not leak to the caller
                features, state = model.step(codes, state)
                log_probabilities = model.log_probabilities(features)
                codes = draw_codes(log_probabilities, uniforms.next(), **settings)
                chosen = log_probabilities.gather(-1, codes[:, None])[:, 0]
                if index % _CHECK_EVERY == 0 or index == num_codes - 1:
                    _require_finite(chosen, index)
            yield codes, chosen


@torch.inference_mode()
def _run_prime(model: SequenceModel, inputs: Int[Tensor, "B _"]) -> Any:
    """State for `step` after these codes: whole windows in a few forwards, the rest by `begin_steps`."""
    whole = inputs.shape[1] // model.window_length * model.window_length
    memory = model.zero_memory(len(inputs))
    for begin in range(0, whole, _piece_length(model)):
        memory = model(inputs[:, begin : min(begin + _piece_length(model), whole)], memory).memory
    return model.begin_steps(memory, inputs[:, whole:])


def draw_codes(
    log_probabilities: Float[Tensor, "B V"],
    uniforms: Float64[Tensor, "B"],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Int[Tensor, "B"]:
    """One code a lane by inversion of the cumulative distribution; a code without probability never comes.

    Args:
        log_probabilities: in nats.
        uniforms: a number in [0, 1) for each lane.
        temperature, top_k, top_p: as in `sample_codes`.
    """
    if temperature == 0:
        return log_probabilities.argmax(dim=-1)
    logits = log_probabilities.double()
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(dim=-1)
    if (top_k is not None and top_k < logits.shape[-1]) or (top_p is not None and top_p < 1):
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            ranked[:, top_k:] = 0
        if top_p is not None and top_p < 1:
            more_probable = ranked.cumsum(-1) - ranked  # the probability of the codes before
            ranked[more_probable >= top_p * ranked.sum(-1, keepdim=True)] = 0
        probabilities = torch.zeros_like(ranked).scatter_(-1, order, ranked)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))  # rounding must not reach past the last code
    point = torch.minimum(uniforms[:, None] * total, below_total)
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


class _LaneUniforms:
    """Uniform float64 numbers in [0, 1); lane k's are from a generator of its own on the CPU, seeded from (seed, k)."""

    def __init__(self, seed: int, num_lanes: int, device: torch.device) -> None:
        # 32 bits, because torch's CPU generator ignores higher ones; SeedSequence mixes so that no two lanes are alike
        words = [np.random.SeedSequence((seed, lane)).generate_state(1, np.uint32)[0] for lane in range(num_lanes)]
        self._generators = [torch.Generator().manual_seed(int(word)) for word in words]
        self._device, self._used = device, 0
        self._ahead = torch.empty(num_lanes, 0, dtype=torch.float64)

    def next(self) -> Tensor:
        """The next number of each lane, [B]."""
        if self._used == self._ahead.shape[1]:
            rows = [torch.rand(_DRAWS_AHEAD, generator=g, dtype=torch.float64) for g in self._generators]
            self._ahead, self._used = torch.stack(rows).to(self._device), 0
        self._used += 1
        return self._ahead[:, self._used - 1]


def _preceded(
    prime: Tensor | None, num_lanes: int, start_code: int, vocab_size: int, device: torch.device
) -> Int[Tensor, "B _"]:
    """The start code and then the prime of each lane."""
    if not 0 <= start_code < vocab_size:
        raise UserError(f"start_code: expected a code in [0, {vocab_size}), got {start_code}")
    start = torch.full((num_lanes, 1), start_code, dtype=torch.int64, device=device)
    if prime is None:
        return start
    if len(prime) != num_lanes:
        raise UserError(f"prime: expected a row for each of {num_lanes} lanes, got {len(prime)}")
    if prime.numel() and not 0 <= int(prime.min()) <= int(prime.max()) < vocab_size:
        raise UserError(f"prime: expected codes in [0, {vocab_size}), got {int(prime.min())} to {int(prime.max())}")
    return torch.cat([start, prime.to(start)], dim=1)


def _piece_length(model: SequenceModel) -> int:
    return max(1, _PIECE_LENGTH // model.window_length) * model.window_length


def _require_finite(log_probabilities: Tensor, index: int) -> None:
    broken = (~torch.isfinite(log_probabilities)).nonzero().flatten().tolist()
    if broken:
        raise UserError(
            f"the model's log-probabilities are not finite at code {index} of lane {broken[0]}; "
            "its parameters are damaged or diverged: use another checkpoint"
        )
