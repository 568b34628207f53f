"""Audio that libsndfile does not know, as phones and browsers record it, through PyAV. The only importer of av.

PyAV is an extra (`pip install 'ct_audio[av]'`): it brings the libraries of FFmpeg, 100 MB.
Shape letters: N samples, C channels.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:  # the extra may not be installed
    import av.container

AV_SUFFIXES = frozenset(
    [
        *(".m4a", ".m4b", ".m4r", ".mp4", ".mov", ".3gp", ".3ga", ".3g2", ".aac", ".adts", ".alac", ".amr", ".awb"),
        *(".webm", ".weba", ".mka", ".mkv", ".wma", ".ac3", ".eac3", ".ape", ".mp2", ".tta", ".wv"),
    ]
)
INSTALL = "python -m pip install av"
_KNOW_THEIR_LENGTH = ("mov", "matroska", "asf")
"""Containers whose duration is written down; that of others is a guess from the size of the file."""
_TOLERANCE_SECONDS = 0.5  # of that duration, which may count what a decoder leaves out at both ends
_BLOCK_SAMPLES = 1 << 15


def has_av() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def read_av_blocks(path: Path) -> Iterator[tuple[Float[np.ndarray, "N C"], int]]:
    """Blocks of the first audio stream of a file, and its sample rate; the last block is empty.

    Raises:
        ValueError: PyAV is not installed, or the file has no audio, is damaged or is shorter than it says.
        OSError: it cannot be opened.
    Differs: what is lost within a packet is concealed by some decoders, and heard, not noticed. Decoders of FFmpeg
        compute in float32: codes of such files may differ by one between processors.
    """
    if not has_av():
        raise ValueError(f"{path.suffix[1:]} is read by PyAV, which is not installed; run: {INSTALL}")
    import av

    with path.open("rb") as handle:  # any name goes, and nothing is taken for an address
        try:
            with av.open(handle, mode="r") as container:
                if not container.streams.audio:
                    raise ValueError("there is no audio in it")
                yield from _decode(container)
        except av.FFmpegError as error:
            raise ValueError(f"damaged, or of another format: {error.strerror or error}") from error


def _decode(container: "av.container.InputContainer") -> Iterator[tuple[Float[np.ndarray, "N C"], int]]:
    import av

    stream = container.streams.audio[0]
    stream.codec_context.thread_count = 1
    to_float = av.AudioResampler(format="fltp")
    num_samples, sample_rate_hz, waiting = 0, 0, []
    for frame in container.decode(stream):
        if sample_rate_hz not in (0, frame.sample_rate):
            raise ValueError(f"its sample rate changes from {sample_rate_hz} to {frame.sample_rate} Hz; resample it")
        sample_rate_hz = frame.sample_rate
        waiting += [part.to_ndarray() for part in to_float.resample(frame)]
        if sum(part.shape[1] for part in waiting) >= _BLOCK_SAMPLES:
            block, waiting = np.concatenate(waiting, axis=1).T, []
            num_samples += len(block)
            yield block, sample_rate_hz
    if not sample_rate_hz:
        raise ValueError("empty: no samples")
    waiting += [part.to_ndarray() for part in to_float.resample(None)]
    block = np.concatenate(waiting, axis=1).T if waiting else np.zeros((0, 1), np.float32)
    num_samples += len(block)
    promised = _promised_seconds(container)
    if num_samples / sample_rate_hz < promised - _TOLERANCE_SECONDS:
        raise ValueError(f"truncated: {promised:.2f} s promised, {num_samples / sample_rate_hz:.2f} found")
    if len(block):
        yield block, sample_rate_hz
    yield block[:0], sample_rate_hz


def _promised_seconds(container: "av.container.InputContainer") -> float:
    """Length of the audio as the file says it; 0 where it does not."""
    stream = container.streams.audio[0]
    if not any(name in container.format.name for name in _KNOW_THEIR_LENGTH):
        return 0.0
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    is_alone = len(container.streams) == 1
    return container.duration / 1e6 if container.duration is not None and is_alone else 0.0
