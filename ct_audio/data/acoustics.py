"""Acoustic measures of a waveform: level, log-mel frames and their Frechet distance, pitch.

Shape letters: N samples of a waveform, F frames, D dimensions (mel bands).
"""

import math

import numpy as np
import torch
import torchaudio
from jaxtyping import Float, Float64

SILENT_RMS_DBFS = -75.0
"""Quieter is no pause: codes 127 and 128 alone give -81 dBFS, the noise floor of quiet recordings is about -60."""
MEL_BANDS = 40
MEL_FLOOR = 1e-10
"""Power of a band below which nothing is told apart: the quantisation noise of mu-law silence has 1e-9."""
LOWEST_PITCH_HZ, HIGHEST_PITCH_HZ = 60.0, 500.0
SILENCE_FLOOR_DBFS = -120.0
"""What is written for the level of exact zeros, because JSON has no infinity."""


def level_dbfs(waveform: Float[np.ndarray, " N"]) -> float:
    """Root mean square in decibels; 0 is the constant 1."""
    rms = math.sqrt(float(np.mean(waveform.astype(np.float64) ** 2)))
    return max(20 * math.log10(rms), SILENCE_FLOOR_DBFS) if rms else SILENCE_FLOOR_DBFS


def mel_frame_length(sample_rate_hz: int) -> int:
    """Samples of a frame of `log_mel_frames`: the power of two nearest to 43 ms, 1024 at 24 kHz."""
    return 2 ** round(math.log2(0.043 * sample_rate_hz))


def log_mel_frames(waveform: Float[np.ndarray, " N"], sample_rate_hz: int) -> Float64[np.ndarray, "F D"]:
    """Natural logarithm of the power in mel bands of whole Hann-windowed frames, a quarter of a frame apart.

    Returns:
        [F, MEL_BANDS]; no frame where the waveform is shorter than one. Unit power is a white noise of variance 1.
    """
    length = mel_frame_length(sample_rate_hz)
    if len(waveform) < length:
        return np.zeros((0, MEL_BANDS))
    frames = {"n_fft": length, "hop_length": length // 4, "center": False}
    bands = {"n_mels": MEL_BANDS, "normalized": True, "mel_scale": "slaney"}
    transform = torchaudio.transforms.MelSpectrogram(sample_rate_hz, **frames, **bands).double()
    power = transform(torch.from_numpy(waveform.astype(np.float64)))
    return power.clamp(min=MEL_FLOOR).log().T.numpy()


def frechet_distance(first: Float[np.ndarray, "F1 D"], second: Float[np.ndarray, "F2 D"]) -> float:
    """Frechet distance of the Gaussians with the means and covariances of two sets of at least two frames.

    Source: Kilgour et al. 2019, arXiv 1812.08466. Differs: log-mel frames in place of a network's embedding.
    """
    one, other = ((np.mean(frames, axis=0), np.cov(frames, rowvar=False)) for frames in (first, second))
    return gaussian_frechet_distance(one, other)


def gaussian_frechet_distance(
    first: tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"]],
    second: tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"]],
) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared 2-Wasserstein distance of two Gaussians (m, C).

    The last trace is the sum of the singular values of C1^(1/2) C2^(1/2): symmetric, and sound where a covariance is
    singular, as that of fewer frames than bands is.
    Source: Dowson and Landau 1982.
    """
    cross = np.linalg.svd(_square_root(first[1]) @ _square_root(second[1]), compute_uv=False).sum()
    spread = np.trace(first[1]) + np.trace(second[1]) - 2 * cross
    return float(np.sum((first[0] - second[0]) ** 2) + max(spread, 0.0))


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def find_pitch(waveform: Float[np.ndarray, " N"], sample_rate_hz: int) -> Float[np.ndarray, " F"]:
    """Fundamental frequency in Hz every 20 ms, NaN where the sound is not voiced (probabilistic YIN, 60 to 500 Hz).

    What is quieter than SILENT_RMS_DBFS is not voiced: rounding errors of a constant would count as periodic.
    """
    import librosa  # takes seconds

    centred = waveform - waveform.mean()
    frame_length, hop_length = 2 ** math.ceil(math.log2(0.08 * sample_rate_hz)), max(1, sample_rate_hz // 50)
    frames = {"frame_length": frame_length, "hop_length": hop_length}
    pitch, _, _ = librosa.pyin(centred, fmin=LOWEST_PITCH_HZ, fmax=HIGHEST_PITCH_HZ, sr=sample_rate_hz, **frames)
    quiet = librosa.feature.rms(y=centred, **frames)[0] < 10 ** (SILENT_RMS_DBFS / 20)
    return np.where(quiet, np.nan, pitch)
