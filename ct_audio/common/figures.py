"""Figures: written whole or not at all; waveform and spectrogram. No audio library is needed to draw.

Shape letters: N samples.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure

from ct_audio.common.files import write_file


def spectrogram_figure(waveform: Float[np.ndarray, "N"], sample_rate_hz: int) -> Figure:
    """Waveform over its spectrogram."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(np.arange(len(waveform)) / sample_rate_hz, waveform, linewidth=0.5)
    upper.set(ylabel="amplitude", ylim=(-1, 1))
    draw_spectrogram(lower, waveform, sample_rate_hz)
    lower.set_xlabel("seconds")
    return figure


def draw_spectrogram(
    panel: Any, waveform: Float[np.ndarray, "N"], sample_rate_hz: int, *, hop_length: int = 256
) -> None:
    """Draw Hann windows of 1024 samples over seconds and kHz; -100 to 0 dB, of which 0 is a sine of full scale."""
    samples = torch.from_numpy(waveform).float()
    padded = torch.nn.functional.pad(samples, (0, max(0, 1024 - len(samples))))
    window = torch.hann_window(1024)
    spectrum = torch.stft(padded, 1024, hop_length, window=window, return_complex=True).abs() / 256
    decibels = 20 * spectrum.clamp(min=1e-5).log10().numpy()
    extent = (0.0, len(padded) / sample_rate_hz, 0.0, sample_rate_hz / 2000)
    panel.imshow(decibels, origin="lower", aspect="auto", extent=extent, vmin=-100, vmax=0)
    panel.set_ylabel("kHz")


def plain_text(text: str) -> str:
    """Text of others, as names, for a title, a label or a legend: matplotlib draws it as it is, and no formula."""
    return text.replace("$", r"\$")


def write_figure(figure: Figure, path: Path, *, dpi: int = 110) -> None:
    """Write a PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    write_file(path, content.getvalue())
