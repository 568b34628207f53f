"""Figures: written whole or not at all; waveforms and spectrograms. No audio library is needed to draw.

Shape letters: N samples, K bins, F frames.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from ct_audio.common.files import write_file

WINDOW_LENGTH = 256
"""Of a spectrogram, in samples: 10.7 ms at 24 kHz, so that formants and the pulses of a voice are seen."""
_HOP_SHARE = 4
_LOWEST_AMPLITUDE = 1e-7  # -140 dB
_WIDEST_RANGE_DB = 90.0
_LABEL_LENGTH = 24  # characters that fit beside a row of spectrograms


class Sound(NamedTuple):
    """A waveform in [-1, 1], of whose samples the first `prime_length` were given to the model."""

    waveform: Float[np.ndarray, " N"]
    prime_length: int = 0


def spectrogram_figure(waveform: Float[np.ndarray, " N"], sample_rate_hz: int) -> Figure:
    """Waveform over its spectrogram, each in the range of what it shows."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(np.arange(len(waveform)) / sample_rate_hz, waveform, linewidth=0.5)
    upper.set_ylabel("amplitude")
    image = draw_spectrogram(lower, waveform, sample_rate_hz)
    figure.colorbar(image, ax=lower).set_label("dB")
    lower.set_xlabel("seconds")
    return figure


def spectrograms_figure(
    rows: Mapping[str, Sequence[Sound | None]],
    sample_rate_hz: int,
    *,
    columns: Sequence[str],
    title: str,
) -> Figure:
    """Spectrograms of sounds in rows and columns, all in the one range of decibels of the first row's sounds.

    A dashed line stands where the prime of a sound ends.

    Args:
        rows: by name; each has a sound, or None for an empty panel, for each of the columns.
    """
    figure = Figure(figsize=(1.5 + 6.5 * len(columns), 0.9 + 1.7 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), sharey=True, sharex="col", squeeze=False)
    first = [spectrogram_decibels(sound.waveform) for sound in next(iter(rows.values())) if sound is not None]
    limits = decibel_range(np.concatenate([decibels.ravel() for decibels in first]))
    image: Any = None
    for (name, sounds), line in zip(rows.items(), panels, strict=True):
        for sound, panel in zip(sounds, line, strict=True):
            if sound is None:
                panel.set_axis_off()
                continue
            image = draw_spectrogram(panel, sound.waveform, sample_rate_hz, limits=limits)
            panel.set(ylabel="")
            if sound.prime_length:
                panel.axvline(sound.prime_length / sample_rate_hz, color="white", linestyle="--", linewidth=1.5)
        line[0].set_ylabel("\n".join([*_short_lines(name), "kHz"]), fontsize=9)
    for panel, column in zip(panels[0], columns, strict=True):
        panel.set_title(plain_text(column), fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("seconds")
    figure.colorbar(image, ax=panels, fraction=0.02, pad=0.01).set_label("dB, 0 is a sine of full scale")
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _short_lines(name: str) -> list[str]:
    """A name in lines that fit beside their row, broken after spaces, hyphens, underscores and slashes."""
    lines = [""]
    for piece in re.split(r"(?<=[-_/\s])", name):
        if lines[-1] and len(lines[-1]) + len(piece) > _LABEL_LENGTH:
            lines.append("")
        lines[-1] += piece
    return [plain_text(line) for line in lines]


def draw_spectrogram(
    panel: Any,
    waveform: Float[np.ndarray, " N"],
    sample_rate_hz: int,
    *,
    window_length: int = WINDOW_LENGTH,
    limits: tuple[float, float] | None = None,
) -> Any:
    """Draw `spectrogram_decibels` over seconds and kHz; returns the image.

    Args:
        limits: decibels of the darkest and of the brightest colour; None: the `decibel_range` of the waveform.
    """
    decibels = spectrogram_decibels(waveform, window_length=window_length)
    low, high = decibel_range(decibels) if limits is None else limits
    extent = (0.0, max(len(waveform), window_length) / sample_rate_hz, 0.0, sample_rate_hz / 2000)
    image = panel.imshow(
        decibels, origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high, interpolation="antialiased"
    )
    panel.set_ylabel("kHz")
    return image


def spectrogram_decibels(
    waveform: Float[np.ndarray, " N"], *, window_length: int = WINDOW_LENGTH
) -> Float[np.ndarray, "K F"]:
    """Magnitude in decibels of Hann windows, a quarter of a window apart; 0 is a sine of full scale, the least -140."""
    import torch  # here: a histogram needs none, and preparation has to be small

    samples = torch.from_numpy(np.ascontiguousarray(waveform)).float()
    padded = torch.nn.functional.pad(samples, (0, max(0, window_length - len(samples))))
    window = torch.hann_window(window_length)
    hop_length = window_length // _HOP_SHARE
    spectrum = torch.stft(padded, window_length, hop_length, window=window, return_complex=True)
    amplitude = spectrum.abs() / (window_length / 4)  # half the sum of the window, the peak of a sine of full scale
    return 20 * amplitude.clamp(min=_LOWEST_AMPLITUDE).log10().numpy()


def decibel_range(decibels: Float[np.ndarray, "..."]) -> tuple[float, float]:
    """Darkest and brightest level of a spectrogram: 0.5% and 99% of its values, in whole tens, 90 dB at most."""
    low, high = np.percentile(decibels, [0.5, 99])
    highest = 10.0 * math.ceil(high / 10)
    lowest = 10.0 * min(math.floor(low / 10), math.ceil(high / 10) - 1)
    return max(lowest, highest - _WIDEST_RANGE_DB), highest


def plain_text(text: str) -> str:
    """Text of others, as names, for a title, a label or a legend: matplotlib draws it as it is, and no formula."""
    return text.replace("$", r"\$")


def write_figure(figure: Figure, path: Path, *, dpi: int = 110) -> None:
    """Write a PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    write_file(path, content.getvalue())
