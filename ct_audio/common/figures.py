"""Figures: written whole or not at all; waveform and spectrogram.

Shape letters: N samples.
"""

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure

from ct_audio.common.files import write_file


def spectrogram_figure(waveform: Float[np.ndarray, "N"], sample_rate_hz: int) -> Figure:
    """Waveform over its spectrogram (Hann windows of 1024 samples, hop 256, decibels; 0 is a sine of full scale)."""
    samples = torch.from_numpy(waveform).float()
    padded = torch.nn.functional.pad(samples, (0, max(0, 1024 - len(samples))))
    spectrum = torch.stft(padded, 1024, 256, window=torch.hann_window(1024), return_complex=True).abs() / 256
    figure = Figure(figsize=(8, 4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    seconds = len(padded) / sample_rate_hz
    upper.plot(np.arange(len(waveform)) / sample_rate_hz, waveform, linewidth=0.5)
    upper.set(ylabel="amplitude", ylim=(-1, 1))
    decibels = 20 * spectrum.clamp(min=1e-5).log10().numpy()
    extent = (0.0, seconds, 0.0, sample_rate_hz / 2000)
    lower.imshow(decibels, origin="lower", aspect="auto", extent=extent, vmin=-100, vmax=0)
    lower.set(xlabel="seconds", ylabel="kHz")
    return figure


def plain_text(text: str) -> str:
    """Text of others, as names, for a title, a label or a legend: matplotlib draws it as it is, and no formula."""
    return text.replace("$", r"\$")


def write_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    write_file(path, content.getvalue())
