"""What a sampled waveform is like, in plain numbers, what is wrong with it as audio, and how far it is from recordings.

Shape letters: N samples of a waveform, F frames, D dimensions (mel bands).
"""

import math
from typing import Any

import librosa
import numpy as np
import torch
import torchaudio
from jaxtyping import Float, Float64, Integer

from ct_audio.errors import UserError

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
MEL_BANDS = 40
MEL_FLOOR = 1e-10
"""Power of a band below which nothing is told apart: the quantisation noise of mu-law silence has 1e-9."""
LOWEST_PITCH_HZ, HIGHEST_PITCH_HZ = 60.0, 500.0
SILENCE_FLOOR_DBFS = -120.0
"""What is written for the level of exact zeros, because JSON has no infinity."""


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
    return {
        "seconds": len(codes) / sample_rate_hz,
        "num_samples": len(codes),
        "nll_nats": float(nll.mean()),
        "nll_bits": float(nll.mean()) / math.log(2),
        "nll_nats_per_second": [
            float(nll[begin : begin + sample_rate_hz].mean()) for begin in range(0, len(nll), sample_rate_hz)
        ],
        "rms_dbfs": level_dbfs(waveform),
        "peak": float(np.abs(wide).max()),
        "dc": float(wide.mean()),
        "clipped_share": float(np.mean((codes == 0) | (codes == vocab_size - 1))),
        "distinct_codes": distinct,
        "distinct_codes_share": distinct / vocab_size,
        "longest_run_seconds": int(np.diff(starts).max()) / sample_rate_hz,
    }


def level_dbfs(waveform: Float[np.ndarray, "N"]) -> float:
    """Root mean square in decibels; 0 is the constant 1."""
    rms = math.sqrt(float(np.mean(waveform.astype(np.float64) ** 2)))
    return max(20 * math.log10(rms), SILENCE_FLOOR_DBFS) if rms else SILENCE_FLOOR_DBFS


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


def mel_frame_length(sample_rate_hz: int) -> int:
    """Samples of a frame of `log_mel_frames`: the power of two nearest to 43 ms, 1024 at 24 kHz."""
    return 2 ** round(math.log2(0.043 * sample_rate_hz))


def log_mel_frames(waveform: Float[np.ndarray, "N"], sample_rate_hz: int) -> Float64[np.ndarray, "F D"]:
    """Natural logarithm of the power in mel bands of whole Hann-windowed frames, a quarter of a frame apart.

    Returns:
        [F, MEL_BANDS]; no frame where the waveform is shorter than one. Unit power is a white noise of variance 1.
    """
    length = mel_frame_length(sample_rate_hz)
    if len(waveform) < length:
        return np.zeros((0, MEL_BANDS))
    transform = torchaudio.transforms.MelSpectrogram(
        sample_rate_hz,
        n_fft=length,
        hop_length=length // 4,
        n_mels=MEL_BANDS,
        center=False,
        normalized=True,
        mel_scale="slaney",
    ).double()
    power = transform(torch.from_numpy(waveform.astype(np.float64)))
    return power.clamp(min=MEL_FLOOR).log().T.numpy()


def frechet_distance(first: Float[np.ndarray, "F1 D"], second: Float[np.ndarray, "F2 D"]) -> float:
    """Frechet distance of the Gaussians with the means and covariances of two sets of at least two frames.

    Source: Kilgour et al. 2019, arXiv 1812.08466. Differs: log-mel frames in place of a network's embedding.
    """
    moments = [(np.mean(frames, axis=0), np.cov(frames, rowvar=False)) for frames in (first, second)]
    return gaussian_frechet_distance(*moments[0], *moments[1])


def gaussian_frechet_distance(
    first_mean: Float[np.ndarray, "D"],
    first_covariance: Float[np.ndarray, "D D"],
    second_mean: Float[np.ndarray, "D"],
    second_covariance: Float[np.ndarray, "D D"],
) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    The last trace is the sum of the singular values of C1^(1/2) C2^(1/2): symmetric, and sound where a covariance is
    singular, as that of fewer frames than bands is.
    Source: Dowson and Landau 1982.
    """
    root = [_square_root(covariance) for covariance in (first_covariance, second_covariance)]
    cross = np.linalg.svd(root[0] @ root[1], compute_uv=False).sum()
    spread = np.trace(first_covariance) + np.trace(second_covariance) - 2 * cross
    return float(np.sum((first_mean - second_mean) ** 2) + max(spread, 0.0))


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def find_pitch(waveform: Float[np.ndarray, "N"], sample_rate_hz: int) -> Float[np.ndarray, "F"]:
    """Fundamental frequency in Hz every 20 ms, NaN where the sound is not voiced (probabilistic YIN, 60 to 500 Hz).

    What is quieter than SILENT_RMS_DBFS is not voiced: rounding errors of a constant would count as periodic.
    """
    centred = waveform - waveform.mean()
    frame_length, hop_length = 2 ** math.ceil(math.log2(0.08 * sample_rate_hz)), max(1, sample_rate_hz // 50)
    frames = {"frame_length": frame_length, "hop_length": hop_length}
    pitch, _, _ = librosa.pyin(centred, fmin=LOWEST_PITCH_HZ, fmax=HIGHEST_PITCH_HZ, sr=sample_rate_hz, **frames)
    quiet = librosa.feature.rms(y=centred, **frames)[0] < 10 ** (SILENT_RMS_DBFS / 20)
    return np.where(quiet, np.nan, pitch)
