"""What a sampled waveform is like, in plain numbers, what is wrong with it as audio, and how far it is from recordings.

Shape letters: N samples of a waveform, F frames, D dimensions (mel bands).
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from ct_audio.common.errors import UserError
from ct_audio.data.acoustics import SILENT_RMS_DBFS, level_dbfs

FAULTS = ("silent", "clipped", "stuck", "runaway")
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
"""Mean NLL of a second above that of the validation split; in recordings the worst second is 0.8 above (5 splits, two
linear predictors), under the shipped WaveNet 0.98 (712 s of kathleen). Samples shorter than a second may be one loud
sound, and are not judged so."""
RARE_NATS = 10.0
"""A code of a higher NLL (a probability below 1 in 22,000) is rare: heard as a click where it is far from its place."""


def measure_codes(
    codes: Integer[np.ndarray, " N"], log_probabilities: Float[np.ndarray, " N"], *, vocab_size: int
) -> dict[str, Any]:
    """What a sample is like whatever it is of: nll_nats (mean), nll_bits, distinct_codes, distinct_codes_share.

    Args:
        codes, log_probabilities: of one lane; in nats, under the model.
    Raises:
        UserError: there are no codes.
    """
    if not len(codes):
        raise UserError("expected a sample of at least one code, got none; sample more")
    nll, distinct = -float(log_probabilities.astype(np.float64).mean()), len(np.unique(codes))
    shares = {"distinct_codes": distinct, "distinct_codes_share": distinct / vocab_size}
    return {"nll_nats": nll, "nll_bits": nll / math.log(2)} | shares


def measure_sample(
    codes: Integer[np.ndarray, " N"],
    log_probabilities: Float[np.ndarray, " N"],
    waveform: Float[np.ndarray, " N"],
    *,
    vocab_size: int,
    sample_rate_hz: int,
) -> dict[str, Any]:
    """What a lane's decoded codes, a waveform in [-1, 1], are like, in plain numbers ready for JSON.

    Returns:
        those of `measure_codes`, and seconds, num_samples, nll_nats_per_second and rms_dbfs_per_second (of each second,
        the last may be shorter), rare_codes (of more than RARE_NATS), rms_dbfs, peak, dc (mean), clipped_share (at the
        lowest or highest code), longest_run_seconds (of one code).
    """
    measures = measure_codes(codes, log_probabilities, vocab_size=vocab_size)
    wide = waveform.astype(np.float64)
    nll = -log_probabilities.astype(np.float64)
    seconds = [slice(begin, begin + sample_rate_hz) for begin in range(0, len(nll), sample_rate_hz)]
    starts = np.r_[0, np.flatnonzero(np.diff(codes.astype(np.int64))) + 1, len(codes)]
    return measures | {
        "seconds": len(codes) / sample_rate_hz,
        "num_samples": len(codes),
        "nll_nats_per_second": [float(nll[second].mean()) for second in seconds],
        "rms_dbfs_per_second": [level_dbfs(waveform[second]) for second in seconds],
        "rare_codes": int(np.count_nonzero(nll > RARE_NATS)),
        "rms_dbfs": level_dbfs(waveform),
        "peak": float(np.abs(wide).max()),
        "dc": float(wide.mean()),
        "clipped_share": float(np.mean((codes == 0) | (codes == vocab_size - 1))),
        "longest_run_seconds": int(np.diff(starts).max()) / sample_rate_hz,
    }


def find_faults(measures: dict[str, Any], *, vocab_size: int, valid_nll_nats: float | None = None) -> list[str]:
    """What is wrong with a sample, or with a second of it, as audio; empty where nothing is.

    Each begins with its kind, one of FAULTS.

    Args:
        valid_nll_nats: the model's NLL on recordings, against which that of the sample is held; None where it has none.
    """
    seconds, rms_dbfs, dc = measures["seconds"], measures["rms_dbfs"], measures["dc"]
    run_seconds, distinct = measures["longest_run_seconds"], measures["distinct_codes"]
    whole = int(seconds)  # seconds that are judged by themselves, beside the sample as a whole
    levels = [
        (rms_dbfs, ""),
        *((level, f" in second {i}") for i, level in enumerate(measures["rms_dbfs_per_second"][:whole], 1)),
    ]
    (quietest, when_quiet), (loudest, when_loud) = min(levels), max(levels)
    worst, when = max(((nll, i) for i, nll in enumerate(measures["nll_nats_per_second"][:whole], 1)), default=(0.0, 0))
    faults = []
    if quietest < SILENT_RMS_DBFS:
        faults.append(f"silent: RMS {quietest:.1f} dBFS{when_quiet}, below {SILENT_RMS_DBFS:.0f}")
    if measures["clipped_share"] > CLIPPED_SHARE:
        faults.append(f"clipped: {measures['clipped_share']:.1%} of the samples at full scale")
    if run_seconds > min(STUCK_RUN_SECONDS, seconds / 2):
        faults.append(f"stuck: one code for {run_seconds:.3f} s")
    if seconds >= STUCK_RUN_SECONDS and distinct < STUCK_DISTINCT_CODES:
        faults.append(f"stuck: only {distinct} distinct codes")
    if loudest > RUNAWAY_RMS_DBFS:
        faults.append(f"runaway: RMS {loudest:.1f} dBFS{when_loud}, above {RUNAWAY_RMS_DBFS:.0f}")
    if seconds >= STUCK_RUN_SECONDS and abs(dc) > RUNAWAY_DC:
        faults.append(f"runaway: mean {dc:.2f} instead of about 0")
    if measures["nll_nats"] > RUNAWAY_NLL_SHARE * math.log(vocab_size):
        faults.append(f"runaway: {measures['nll_nats']:.2f} nats per sample, even odds are {math.log(vocab_size):.2f}")
    elif valid_nll_nats is not None and worst > valid_nll_nats + DRIFT_NATS:
        faults.append(
            f"runaway: {worst:.2f} nats per sample in second {when}, recordings have {valid_nll_nats:.2f} under this "
            "model: it has drifted into noise; train longer or, with a categorical head, lower --temperature"
        )
    return faults
