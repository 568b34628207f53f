"""Audio files: read any that libsndfile knows as mono float32, resample and check it, write PCM16 wav.

The only importer of soundfile; what libsndfile does not know is read by `av_files`. Files are read in blocks, so a
recording of any length needs the same memory.
Shape letters: N samples, C channels.
"""

import itertools
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from io import BufferedReader, BytesIO
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float

from ct_audio.common.errors import UserError
from ct_audio.common.files import write_file
from ct_audio.data.audio_parts import Part, PartFile, find_parts
from ct_audio.data.av_files import AV_SUFFIXES, read_av_blocks

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
SILENCE = 2.0**-15
"""-90 dBFS, one step of 16 bits."""
OUT_OF_RANGE = 16.0
"""24 dB over full scale: no loud recording, but a file of another scale, or damaged."""
_CANCELLED = 0.02  # of the power that the mean of independent channels has: two channels with a correlation of -0.98
_OFFSET = 0.05  # of full scale
_BLOCK_SAMPLES = 1 << 15  # of all channels together
_UNKNOWN_LENGTH_BYTES = 0x7FFFF000  # writers to a pipe put about 2^31 or 2^32 where a size belongs
_UNKNOWN_FRAMES = 1 << 62
_HEADER_SLACK_BYTES = 8  # some writers count the container's own header
_SHORTER_THAN_PROMISED = re.compile(r"^\s*(\S[\w ]*?)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)


def read_wav(path: str | Path) -> tuple[Float[np.ndarray, " N"], int]:
    """Read an audio file as `read_blocks` does, in one piece.

    Returns:
        waveform: float32, the mean of the channels.
        sample_rate_hz: the file's.
    Raises:
        UserError: see `read_blocks`.
    """
    blocks, rates = zip(*((_channel_mean(block), rate) for block, rate in read_blocks(path)), strict=True)
    return np.concatenate(blocks), rates[0]


def read_blocks(path: str | Path) -> Iterator[tuple[Float[np.ndarray, "N C"], int]]:
    """Read an audio file of any format of libsndfile (wav, flac, ogg, mp3, ...) and of any number of channels.

    All of it is read: every part of joined files, and all samples where the header does not know their number. A file
    with one of `AV_SUFFIXES` (m4a, webm, ...) is read by PyAV, where that is installed.

    Yields:
        block: float32; the last one is empty. Full scale of an integer format is [-1, 1), a float format comes as it is
            (it may exceed 1 or hold NaN: see `require_finite`).
        sample_rate_hz: the file's.
    Raises:
        UserError: the file is missing, no plain file, unreadable, damaged, shorter than its own header promises, joined
            from parts of different sample rates, or of a sample rate outside 1000 Hz to 2^20 Hz.
    Differs: frames of mp3 have no checksums; flipped bits within one are heard, not noticed.
    """
    path, rates = Path(path), set()
    try:
        _require_plain(path)
        if path.suffix.lower() in AV_SUFFIXES:
            for block, sample_rate_hz in read_av_blocks(path):
                _require_rate(sample_rate_hz)
                yield block, sample_rate_hz
            return
        with path.open("rb") as handle:
            parts = find_parts(handle)
            for part in parts:
                for block, sample_rate_hz in _read_part(path, part):
                    rates.add(sample_rate_hz)
                    if len(rates) > 1:
                        raise ValueError(f"joined from parts of {sorted(rates)} Hz; split it, or resample one part")
                    if len(block):
                        yield block, sample_rate_hz
        yield block[:0], sample_rate_hz
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from error


class CheckedRecording:
    """An audio file as mono blocks at another sample rate, checked while it is read: for corpora, primes and scores.

    Args:
        sample_rate_hz: of the blocks.
        gain_db: the blocks are amplified by this.
    Attributes:
        source_rate_hz, num_source_samples: of the file; set once it has been read.
    """

    def __init__(self, path: str | Path, sample_rate_hz: int, *, gain_db: float = 0.0) -> None:
        self.path, self.sample_rate_hz, self._gain = Path(path), sample_rate_hz, 10 ** (gain_db / 20)
        self.source_rate_hz = self.num_source_samples = 0

    def blocks(self) -> Iterator[Float[np.ndarray, " N"]]:
        """Resample and amplify block by block; this can be done again.

        Raises:
            UserError: the file cannot be read, or it is empty, not finite, out of range (beyond 16 times full scale
                after the gain) or silent, its channels cancel out, or it is mostly a constant offset. What concerns
                the whole file is found after the last block.
        """
        levels = _Levels()
        mono = self._mono_blocks(levels)
        first = next(mono)  # the source's rate is known then
        for waveform in resample(itertools.chain([first], mono), self.source_rate_hz, self.sample_rate_hz):
            yield waveform if self._gain == 1 else waveform * np.float32(self._gain)
        self.num_source_samples = levels.num_samples
        if (fault := levels.fault()) is not None:
            raise UserError(f"cannot use {self.path}: {fault}")

    def _mono_blocks(self, levels: "_Levels") -> Iterator[Float[np.ndarray, " N"]]:
        for block, sample_rate_hz in read_blocks(self.path):
            self.source_rate_hz = sample_rate_hz
            waveform = _channel_mean(block)
            self._require_in_range(waveform, levels.num_samples)
            levels.add(block, waveform)
            yield waveform

    def _require_in_range(self, waveform: Float[np.ndarray, " N"], num_before: int) -> None:
        if not len(waveform):
            return
        place = int(np.argmax(np.abs(waveform)))  # of NaN, if there is one
        seconds, value = (num_before + place) / self.source_rate_hz, float(waveform[place])
        if not math.isfinite(value):
            raise UserError(
                f"cannot use {self.path}: not finite: NaN or infinity at {seconds:.3f} s; repair the recording"
            )
        if abs(value) * self._gain > OUT_OF_RANGE:
            raise UserError(
                f"cannot use {self.path}: out of range: {value * self._gain:.3g} at {seconds:.3f} s, full scale is 1; "
                "scale the recording, or use a lower gain"
            )


def write_wav(path: str | Path, waveform: Float[np.ndarray, " N"], sample_rate_hz: int) -> None:
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


def library_version() -> str:
    """Version of libsndfile."""
    return soundfile.__libsndfile_version__


def unreadable_formats() -> list[str]:
    """Those of the common formats that this libsndfile does not read, tried on what it writes itself."""
    kinds = {"wav": ("WAV", "PCM_24"), "flac": ("FLAC", "PCM_16"), "aiff": ("AIFF", "PCM_16")}
    kinds |= {"ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"), "mp3": ("MP3", "MPEG_LAYER_III")}
    waveform, missing = np.sin(np.arange(4800, dtype=np.float32) / 8), []
    for name, (container, coding) in kinds.items():
        file = BytesIO()
        try:
            soundfile.write(file, waveform, 24_000, format=container, subtype=coding)
            file.seek(0)
            is_read = len(soundfile.read(file)[0]) >= 4800
        except (soundfile.SoundFileError, ValueError):  # ValueError: soundfile knows of no such format
            is_read = False
        missing += [] if is_read else [name]
    return missing


def resample(blocks: Iterable[Float[np.ndarray, " _"]], from_hz: int, to_hz: int) -> Iterator[Float[np.ndarray, " M"]]:
    """Band-limited change of the sample rate of float32 blocks (soxr, quality HQ: -100 dB); the cuts do not matter.

    Differs: soxr and not torchaudio's windowed sinc, which is five times slower from 48 kHz, rolls off far below the
    new Nyquist frequency at its defaults, and needs gigabytes for pairs of rates without a common factor.
    """
    if min(from_hz, to_hz) < 1:
        raise UserError(f"resample: expected rates of at least 1 Hz, got {from_hz} and {to_hz}")
    if from_hz == to_hz:
        yield from (block for block in blocks if len(block))
        return
    stream, was_fed = soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32", quality="HQ"), False
    for block in blocks:
        if len(block):
            yield stream.resample_chunk(block)
            was_fed = True
    if was_fed:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


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


def _require_rate(sample_rate_hz: int) -> None:
    if not MIN_RATE_HZ <= sample_rate_hz <= MAX_RATE_HZ:
        raise ValueError(f"sample rate {sample_rate_hz} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ}")


def _channel_mean(block: Float[np.ndarray, "N C"]) -> Float[np.ndarray, " N"]:
    total = block[:, 0].copy()
    with np.errstate(invalid="ignore", over="ignore"):
        for channel in range(1, block.shape[1]):
            total += block[:, channel]
    return total / np.float32(block.shape[1])


class _SequentialFile(soundfile.SoundFile):
    """Read from start to end: soundfile would seek after each block, which fails where the length is unknown."""

    def seekable(self) -> bool:
        """No."""
        return False


def _read_part(path: Path, part: Part) -> Iterator[tuple[Float[np.ndarray, "N C"], int]]:
    """Blocks of a part and its sample rate; the last block is empty."""
    # by descriptor: any name goes, and an error within Python's own reading would be printed and ignored
    with path.open("rb", buffering=0) as handle:
        is_whole = part == Part(0, handle.seek(0, os.SEEK_END))
        handle.seek(0)
        piece = None if is_whole else PartFile(handle, part)
        source = handle.fileno() if piece is None else BufferedReader(piece)
        with _SequentialFile(source, closefd=False) as file:
            _require_whole_container(file)
            sample_rate_hz = file.samplerate
            _require_rate(sample_rate_hz)
            block_frames, num_left = max(1, _BLOCK_SAMPLES // file.channels), file.frames
            while len(block := file.read(min(block_frames, num_left), dtype="float32", always_2d=True)):
                num_left -= len(block)
                yield block, sample_rate_hz
            if piece is not None and piece.error is not None:
                raise piece.error
            if 0 < num_left < _UNKNOWN_FRAMES:
                raise ValueError(f"truncated: {file.frames} samples promised, {file.frames - num_left} found")
            yield block, sample_rate_hz


def _require_whole_container(file: soundfile.SoundFile) -> None:
    """libsndfile quietly shortens cut files of some formats; its own log tells."""
    for name, promised, found in _SHORTER_THAN_PROMISED.findall(file.extra_info):
        slack = 0 if name in ("data", "SSND", "Data Size") else _HEADER_SLACK_BYTES
        if int(promised) > int(found) + slack and int(promised) < _UNKNOWN_LENGTH_BYTES:
            raise ValueError(f"truncated: {promised} bytes promised, {found} found ({name})")


class _Levels:
    """Sums over a recording that tell what is wrong with all of it."""

    def __init__(self) -> None:
        self.num_samples, self._sum, self._lowest, self._highest = 0, 0.0, math.inf, -math.inf
        self._power = self._independent_power = 0.0

    def add(self, block: Float[np.ndarray, "N C"], waveform: Float[np.ndarray, " N"]) -> None:
        """Add a block and the mean of its channels."""
        if not len(waveform):
            return
        self.num_samples += len(waveform)
        self._sum += float(waveform.sum(dtype=np.float64))
        self._lowest = min(self._lowest, float(waveform.min()))
        self._highest = max(self._highest, float(waveform.max()))
        self._power += float(np.square(waveform, dtype=np.float64).sum())
        if block.shape[1] > 1:
            self._independent_power += float(np.square(block, dtype=np.float64).sum()) / block.shape[1] ** 2

    def fault(self) -> str | None:
        """What is wrong, or None."""
        if not self.num_samples:
            return "empty: no samples"
        if self._power < _CANCELLED * self._independent_power:
            decibels = 10 * math.log10(max(self._power, 1e-30) / self._independent_power)
            return (
                f"channels cancel out: their mean is {decibels:.0f} dB below that of independent ones; "
                "invert one, or keep one only"
            )
        mean = self._sum / self.num_samples
        deviation = max(self._highest - mean, mean - self._lowest)
        if deviation < SILENCE:
            return f"silent: no sample is farther than {deviation:.1e} from the mean"
        variance = max(0.0, self._power / self.num_samples - mean**2)
        if abs(mean) > _OFFSET and mean**2 > variance:
            return (
                f"offset: the mean is {mean:.2f} of full scale, more than the sound of {math.sqrt(variance):.2g} RMS; "
                "remove it, as a high-pass filter does"
            )
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, soundfile.LibsndfileError):
        return error.error_string.rstrip(".")
    return getattr(error, "strerror", None) or str(error)
