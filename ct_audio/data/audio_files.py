"""Audio files: read any that libsndfile knows as mono float32, write PCM16 wav, resample.

The only importer of soundfile. Shape letters: N samples, C channels.
"""

import os
import re
import stat
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float

from ct_audio.common.errors import UserError
from ct_audio.common.files import write_file

AUDIO_SUFFIXES = frozenset(
    [
        ".wav",
        ".wave",
        ".flac",
        ".ogg",
        ".oga",
        ".opus",
        ".mp3",
        ".aif",
        ".aiff",
        ".aifc",
        ".au",
        ".caf",
        ".w64",
        ".rf64",
    ]
)
MIN_RATE_HZ, MAX_RATE_HZ = 1000, 2**20
"""A header that says less or more lies; resampling from 1 Hz would make a day of audio out of a small file."""
_BLOCK_FRAMES = 1 << 18
_UNKNOWN_LENGTH_BYTES = 0x7FFFF000  # writers to a pipe put about 2^31 or 2^32 where a size belongs
_HEADER_SLACK_BYTES = 8  # some writers count the container's own header
_SHORTER_THAN_PROMISED = re.compile(r"^\s*(\S[\w ]*?)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)


def read_wav(path: str | Path) -> tuple[Float[np.ndarray, "N"], int]:
    """Read an audio file of any format of libsndfile (wav, flac, ogg, mp3, ...) and of any number of channels.

    Returns:
        waveform: float32, the mean of the channels; full scale of an integer format is [-1, 1), a float format comes
            as it is (it may exceed 1 or hold NaN: see `require_finite`).
        sample_rate_hz: the file's.
    Raises:
        UserError: the file is missing, no plain file, unreadable, damaged, shorter than its own header promises, or of
            a sample rate outside 1000 Hz to 2^20 Hz.
    Differs: an mp3 without a length header cannot tell that it was cut; nothing notices that.
    """
    path = Path(path)
    try:
        _require_plain(path)
        # by descriptor: any name goes, and an error within Python's own reading would be printed and ignored
        with path.open("rb") as handle, soundfile.SoundFile(handle.fileno(), closefd=False) as file:
            _require_whole_container(path, file)
            sample_rate_hz = file.samplerate
            if not MIN_RATE_HZ <= sample_rate_hz <= MAX_RATE_HZ:
                raise ValueError(f"sample rate {sample_rate_hz} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ}")
            blocks = []
            # not file.blocks(): it hides that a file ends early
            while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                blocks.append(_channel_mean(block))
            num_promised = file.frames
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from error
    waveform = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if len(waveform) < num_promised:
        raise UserError(f"cannot read {path}: truncated: {num_promised} samples promised, {len(waveform)} found")
    return waveform, sample_rate_hz


def write_wav(path: str | Path, waveform: Float[np.ndarray, "N"], sample_rate_hz: int) -> None:
    """Write mono PCM16, beside first and renamed at the end.

    Args:
        path: of the wav; its folder must exist.
        waveform: what lies outside [-1, 1] is clipped.
        sample_rate_hz: at least 1.
    Raises:
        UserError: the waveform is not finite, or the folder is missing or locked.
        OSError: the disk is full; nothing is left of the file.
    """
    path = Path(path)
    require_finite(waveform, str(path))
    levels = np.clip(np.rint(waveform.astype(np.float64) * 32768.0), -32768, 32767).astype(np.int16)
    encoded = BytesIO()  # libsndfile hides what a full disk says
    try:
        soundfile.write(encoded, levels, sample_rate_hz, format="WAV", subtype="PCM_16")
        write_file(path, encoded.getvalue())
    except (soundfile.SoundFileError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write {path}: {_reason(error)}") from error


def resample(waveform: Float[np.ndarray, "N"], from_hz: int, to_hz: int) -> Float[np.ndarray, "M"]:
    """Band-limited change of the sample rate (soxr, quality HQ: -100 dB), float32.

    Differs: soxr and not torchaudio's windowed sinc, which is five times slower from 48 kHz, rolls off far below the
    new Nyquist frequency at its defaults, and needs gigabytes for pairs of rates without a common factor.
    """
    if min(from_hz, to_hz) < 1:
        raise UserError(f"resample: expected rates of at least 1 Hz, got {from_hz} and {to_hz}")
    waveform = waveform.astype(np.float32, copy=False)
    if from_hz == to_hz or not len(waveform):
        return waveform
    return soxr.resample(waveform, from_hz, to_hz, quality="HQ")


def require_finite(waveform: Float[np.ndarray, "*shape"], what: str) -> None:
    """Raise `UserError` naming `what` if a sample is NaN or infinite."""
    num_bad = int(waveform.size - np.isfinite(waveform).sum())
    if num_bad:
        raise UserError(f"{what}: {num_bad} of {waveform.size} samples are NaN or infinite; repair the audio")


def _require_plain(path: Path) -> None:
    """A FIFO would wait for ever, a device may never end; a folder fails when it is opened."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError("not a plain file")


def _channel_mean(block: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N"]:
    total = block[:, 0].copy()
    with np.errstate(invalid="ignore", over="ignore"):
        for channel in range(1, block.shape[1]):
            total += block[:, channel]
    return total / np.float32(block.shape[1])


def _require_whole_container(path: Path, file: soundfile.SoundFile) -> None:
    """libsndfile quietly shortens cut files of some formats; its own log, or the last page of an ogg, tells."""
    for name, promised, found in _SHORTER_THAN_PROMISED.findall(file.extra_info):
        slack = 0 if name in ("data", "SSND", "Data Size") else _HEADER_SLACK_BYTES
        if int(promised) > int(found) + slack and int(promised) < _UNKNOWN_LENGTH_BYTES:
            raise UserError(f"cannot read {path}: truncated: {promised} bytes promised, {found} found ({name})")
    if file.format == "OGG" and not _ends_with_last_ogg_page(path):
        raise UserError(f"cannot read {path}: truncated: the ogg stream does not end with its last page")


def _ends_with_last_ogg_page(path: Path) -> bool:
    """Whether the last page is complete and carries the end-of-stream flag (RFC 3533, section 6)."""
    with path.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, size - 70_000))  # a page is at most 65,307 bytes
        tail = handle.read()
    page = tail.rfind(b"OggS\0")
    if page < 0 or page + 27 > len(tail):
        return False
    segment_lengths = tail[page + 27 : page + 27 + tail[page + 26]]
    complete = page + 27 + tail[page + 26] + sum(segment_lengths) <= len(tail)
    return complete and bool(tail[page + 5] & 4)


def _reason(error: Exception) -> str:
    if isinstance(error, soundfile.LibsndfileError):
        return error.error_string.rstrip(".")
    return getattr(error, "strerror", None) or str(error)
