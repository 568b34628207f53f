"""Codecs: what turns a waveform or a text into integer codes and back, and what a code means.

Shape letters: N samples, codes or bytes. To add a codec, write a frozen dataclass with the members of `Codec` and name
it in `CODECS` at the foot. Those with a vocabulary are in vocabulary_codecs.py.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Integer, UInt8

from ct_audio.common.errors import UserError
from ct_audio.common.files import write_file
from ct_audio.data.audio_files import CheckedRecording
from ct_audio.data.vocabulary_codecs import Subword, Word, read_vocabulary, require_codes


@runtime_checkable
class Codec(Protocol):
    """Structural type of every codec.

    Attributes:
        name: its key in `CODECS`.
        vocab_size: number of codes; codes are 0..vocab_size - 1.
        unit: what one code is: "sample", "byte", ...
        start_code: the code that precedes every stream.
        sample_rate_hz: codes a second; None for text.
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def unit(self) -> str: ...
    @property
    def start_code(self) -> int: ...
    @property
    def sample_rate_hz(self) -> int | None: ...

    def encode(self, source: Any, /) -> Integer[np.ndarray, " N"]:
        """Codes of a waveform or text; uint8 where they fit, else int32."""
        ...

    def decode(self, codes: Integer[np.ndarray, " N"], /) -> Any:
        """What the codes stand for, a waveform or bytes; `encode(decode(codes))` is `codes` (but see `Subword`)."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Plain description; with `files` the inverse of `codec_from_json`."""
        ...

    def files(self) -> dict[str, bytes]:
        """Files that must lie beside the description, by name; none where the description says all."""
        ...


_CODES = np.loadtxt(Path(__file__).with_name("mu_law.csv"), np.float32, delimiter=",", skiprows=1)
"""Of each mu-law code: itself, the lowest float32 that has it, and the level that it is decoded to."""
_LOWEST, _LEVELS = _CODES[:, 1], _CODES[:, 2].copy()
_STEPS = 32_768
_FIRST_CODE = np.searchsorted(_LOWEST[1:], np.arange(-_STEPS, _STEPS + 1, dtype=np.float32) / _STEPS, "right")
"""The code of the lowest value of each 1/32768 of [-1, 1]; it has at most one code more."""
_FIRST_CODE, _NEXT_LOWEST = _FIRST_CODE.astype(np.uint8), np.append(_LOWEST[1:], np.float32(2))[_FIRST_CODE]


@dataclass(frozen=True)
class MuLaw:
    """mu-law companding of a waveform to 256 codes, exactly torchaudio's in float32.

    code = floor((sign(x) log(1 + mu |x|) / log(1 + mu) + 1) / 2 * mu + 0.5) with mu = 255; silence is code 128. The
    codes and levels that torchaudio computes are kept as a table: so they are the same with every processor and version
    of torch, and preparation, which needs them alone, loads no torch.

    Attributes:
        sample_rate_hz: of the waveforms, in 1..2^20.
    Source: ITU-T G.711's curve as continuous function; torchaudio.functional.mu_law_encoding.
    """

    sample_rate_hz: int = 24_000

    name: str = field(default="mu_law", init=False)
    vocab_size: int = field(default=256, init=False)
    unit: str = field(default="sample", init=False)
    start_code: int = field(default=128, init=False)

    def __post_init__(self) -> None:
        rate = self.sample_rate_hz
        if not isinstance(rate, int) or isinstance(rate, bool) or not 1 <= rate <= 2**20:
            raise UserError(f"codec mu_law: expected sample_rate_hz as a whole number in 1..{2**20}, got {rate!r}")

    def encode(self, waveform: Float[np.ndarray, "*shape"], /) -> UInt8[np.ndarray, "*shape"]:
        """Codes of a waveform in [-1, 1], computed in float32; what lies outside is clipped to it first.

        Raises:
            UserError: the waveform holds NaN or infinities.
        """
        clipped = np.clip(waveform.astype(np.float32), -1.0, 1.0)
        if not np.isfinite(waveform).all():
            raise UserError("mu-law: expected finite samples, got NaN or infinity; repair the audio")
        steps = np.floor(clipped * np.float32(_STEPS)).astype(np.intp) + _STEPS
        return _FIRST_CODE[steps] + (clipped >= _NEXT_LOWEST[steps])

    def decode(self, codes: Integer[np.ndarray, "*shape"], /) -> Float[np.ndarray, "*shape"]:
        """Waveform in [-1, 1], float32.

        Raises:
            UserError: a code is not in 0..255.
        """
        require_codes(codes, self.vocab_size, self.name)
        return _LEVELS[codes.astype(np.intp)]

    def to_json(self) -> dict[str, Any]:
        """Plain description; the inverse of `codec_from_json`."""
        return {"name": self.name, "sample_rate_hz": self.sample_rate_hz}

    def files(self) -> dict[str, bytes]:
        """No files: the description says all."""
        return {}


@dataclass(frozen=True)
class Byte:
    """The bytes of a text; the start code is the line feed."""

    name: str = field(default="byte", init=False)
    vocab_size: int = field(default=256, init=False)
    unit: str = field(default="byte", init=False)
    start_code: int = field(default=10, init=False)
    sample_rate_hz: int | None = field(default=None, init=False)

    def encode(self, text: str | bytes, /) -> UInt8[np.ndarray, " N"]:
        """Bytes of a text (a str in UTF-8)."""
        raw = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8).copy()

    def decode(self, codes: Integer[np.ndarray, " N"], /) -> bytes:
        """The bytes themselves.

        Raises:
            UserError: a code is not in 0..255.
        """
        require_codes(codes, self.vocab_size, self.name)
        return codes.astype(np.uint8).tobytes()

    def to_json(self) -> dict[str, Any]:
        """Plain description; the inverse of `codec_from_json`."""
        return {"name": self.name}

    def files(self) -> dict[str, bytes]:
        """No files: the description says all."""
        return {}


def codec_from_json(description: Any, directory: Path | None = None) -> Codec:
    """Build a codec from its plain description, as `{"name": "mu_law", "sample_rate_hz": 24000}`.

    Args:
        directory: where its files are (of a corpus or a run); None: for codecs that have none.
    Raises:
        UserError: the name or a field is unknown, or a value or a file does not fit.
    """
    name = description.get("name") if isinstance(description, dict) else None
    if not isinstance(description, dict) or not isinstance(name, str) or name not in CODECS:
        raise UserError(f"codec: expected a name out of {', '.join(sorted(CODECS))}, got {description!r}")
    if name in VOCABULARY_CODECS:
        if directory is None:
            raise UserError(f"codec {name}: expected the directory of its vocabulary, of the corpus or the run")
        return read_vocabulary(description, directory)
    fields = {key: value for key, value in description.items() if key != "name"}
    try:
        return CODECS[name](**fields)
    except TypeError as error:
        raise UserError(f"codec {description['name']}: {error}; got {description!r}") from error


def write_codec_files(codec: Codec, directory: Path) -> None:
    """Write the files of a codec, each whole or not at all."""
    for name, content in codec.files().items():
        write_file(directory / name, content)


CODECS: dict[str, type[MuLaw] | type[Byte] | type[Word] | type[Subword]] = {
    "mu_law": MuLaw,
    "byte": Byte,
    "word": Word,
    "subword": Subword,
}
VOCABULARY_CODECS = ("word", "subword")
"""Codecs that are made from a training split and read back from a file."""


_SIGNAL_DISTANCE, _SIGNAL_SHARE = 4, 0.001


def require_signal(histogram: Integer[np.ndarray, " V"], path: Path) -> None:
    """Raise `UserError` if nearly all codes of a recording are the same few: too quiet for mu-law, or a constant.

    Args:
        histogram: how often each code occurs; of its codes, 0.1% must be farther than 4 from the most frequent one.
    """
    most = int(histogram.argmax())
    total = int(histogram.sum())
    near = int(histogram[max(0, most - _SIGNAL_DISTANCE) : most + _SIGNAL_DISTANCE + 1].sum())
    if total - near < _SIGNAL_SHARE * total:
        raise UserError(
            f"cannot use {path}: hardly any different codes: {near} of {total} are within {_SIGNAL_DISTANCE} of code "
            f"{most}; amplify the recording (prepare: --gain-db), or take another"
        )


def read_codes(path: Path, codec: Codec, *, num_codes: int | None = None) -> Integer[np.ndarray, " N"]:
    """Codes of a recording (any format, mixed down and resampled to the codec's rate) or of a text.

    Args:
        num_codes: only so many, the first; None: all.
    Raises:
        UserError: the file cannot be read, holds nothing or less than `num_codes`, or is of the other kind; a recording
            fails one of the checks of `CheckedRecording` and `require_signal`, as in preparation.
    """
    if codec.sample_rate_hz:
        recording, blocks = CheckedRecording(path, codec.sample_rate_hz), []
        histogram = np.zeros(codec.vocab_size, np.int64)
        for waveform in recording.blocks():
            blocks.append(codec.encode(waveform))
            histogram += np.bincount(blocks[-1], minlength=codec.vocab_size)
        require_signal(histogram, path)
        codes = np.concatenate(blocks)
    else:
        try:
            codes = codec.encode(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except UserError as error:
            raise UserError(f"cannot use {path}: {error}") from error
    if not len(codes):
        raise UserError(f"{path} is empty; expected at least one {codec.unit}")
    if num_codes is not None and num_codes > len(codes):
        rate = codec.sample_rate_hz
        found, wanted = (f" ({number / rate:.3f} s)" if rate else "" for number in (len(codes), num_codes))
        raise UserError(
            f"{path} is too short: it holds {len(codes)} {codec.unit}s{found}, {num_codes}{wanted} asked for"
        )
    return codes[:num_codes]
