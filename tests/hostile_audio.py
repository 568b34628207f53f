"""A corpus of bad audio: every kind with the outcome that it must have, so that nothing can pass unseen.

Some kinds look bad and are fine; they must be accepted. `make_hostile_corpus` writes all of them into one folder.
"""

import os
import re
import socket
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
from recordings import voice

RATE = 24_000
ACCEPTED = "accepted"


@dataclass(frozen=True)
class Kind:
    """One bad file, or one that only looks bad.

    Attributes:
        what: in words, for the report.
        path: below the folder; may hold bytes that are no UTF-8, as `os.fsdecode` gives them.
        make: writes it, or returns False where this machine cannot.
        expected: "accepted", or what the reason to drop it must begin with.
        shown: the name that the report must give it, where that is not `path`.
        seconds: length that the corpus must hold; None where the kind leaves it open, or is dropped.
    """

    what: str
    path: str
    make: Callable[[Path], None]
    expected: str
    shown: str | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        """As the report must show it."""
        return self.shown or self.path


def make_hostile_corpus(folder: Path) -> None:
    """Write every kind, and the good recordings between them."""
    for index, path in enumerate(GOOD):
        _write(folder / path, voice(index))
    for kind in KINDS:
        (folder / kind.path).parent.mkdir(parents=True, exist_ok=True)
        kind.make(folder / kind.path)


def unlock(folder: Path) -> None:
    """Give back the permissions, so that the folder can be deleted."""
    for kind in KINDS:
        if kind.expected.endswith("Permission denied"):
            (folder / kind.path).chmod(stat.S_IRWXU)


def riff(
    *,
    channels: int = 1,
    rate: int = RATE,
    bits: int = 16,
    tag: int = 1,
    data: bytes | None = None,
    promised: int | None = None,
    before: bytes = b"",
    after: bytes = b"",
    order: str = "<",
    fmt_length: int = 16,
) -> bytes:
    """A wav file by hand, so that every field of its header can lie.

    Args:
        promised: what the data chunk says its length is; None: the truth.
        before, after: further chunks, before and after the data chunk.
        order: "<" for RIFF, ">" for RIFX.
    """
    if data is None:
        data = (voice(5) * 32768).astype(order + "i2").tobytes()
    frame = channels * bits // 8
    fmt = struct.pack(order + "HHIIHH", tag, channels, rate, rate * frame % 2**32, frame % 2**16, bits)
    body = b"WAVE" + b"fmt " + struct.pack(order + "I", fmt_length) + fmt + before
    body += b"data" + struct.pack(order + "I", len(data) if promised is None else promised) + data + after
    return (b"RIFX" if order == ">" else b"RIFF") + struct.pack(order + "I", len(body)) + body


def chunk(name: bytes, content: bytes, *, length: int | None = None) -> bytes:
    """A chunk of a RIFF file with its pad byte."""
    pad = b"\0" * (len(content) % 2)
    return name + struct.pack("<I", len(content) if length is None else length) + content + pad


def encoded(waveform: np.ndarray, kind: str, subtype: str | None = None, rate: int = RATE) -> bytes:
    """A waveform as libsndfile writes it into a file of a format."""
    memory = BytesIO()
    soundfile.write(memory, waveform, rate, format=kind, subtype=subtype)
    return memory.getvalue()


def mp3(waveform: np.ndarray, rate: int = RATE, *, mode: str = "VARIABLE", counted: bool = True) -> bytes:
    """A waveform as mp3, below 44.1 kHz of up to 160 kbit/s.

    Args:
        mode: of the bit rate: CONSTANT, AVERAGE or VARIABLE.
        counted: whether the first frame states the number of frames; otherwise it is left out.
    """
    memory = BytesIO()
    channels = 1 if waveform.ndim == 1 else waveform.shape[1]
    options = {"format": "MP3", "bitrate_mode": mode, "compression_level": 0.3}
    with soundfile.SoundFile(memory, "w", rate, channels, **options) as file:
        file.write(waveform)
    content = memory.getvalue()
    again = content.find(content[:2], 2 if counted else 100)
    return content if counted else content[again:]


def ogg_page(content: bytes, number: int) -> slice:
    """Where a page is; the checksums of the others do not change when it is changed or cut out."""
    starts = [found.start() for found in re.finditer(b"OggS\0", content)]
    return slice(starts[number], [*starts, len(content)][number + 1])


def patched(content: bytes, *changes: tuple[bytes | int, int, bytes]) -> bytes:
    """A file with other bytes at some places, each given as a mark or offset and a distance from it."""
    changed = bytearray(content)
    for mark, distance, new in changes:
        place = (mark if isinstance(mark, int) else content.index(mark)) + distance
        changed[place : place + len(new)] = new
    return bytes(changed)


def _write(path: Path, waveform: np.ndarray, rate: int = RATE, subtype: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(waveform, "WAV", subtype, rate))


def _bytes(content: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(content)

    return make


def _wave(waveform: np.ndarray, rate: int = RATE, subtype: str | None = None) -> Callable[[Path], None]:
    return lambda path: _write(path, waveform, rate, subtype)


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _cut(content: bytes, share: float) -> Callable[[Path], None]:
    return _bytes(content[: int(len(content) * share)])


def _flipped(content: bytes, place: float) -> Callable[[Path], None]:
    changed = bytearray(content)
    changed[int(len(content) * place)] ^= 0xFF
    return _bytes(bytes(changed))


def _locked(path: Path) -> None:
    _write(path, VOICE)
    path.chmod(0)


def _locked_folder(path: Path) -> None:
    _write(path / "inside.wav", VOICE)
    path.chmod(0)


def _socket(path: Path) -> None:
    """A listening socket's file; by way of a descriptor, because addresses are at most 107 bytes long."""
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def _with(value: float, dtype: type = np.float32, *, like: np.ndarray | None = None) -> np.ndarray:
    changed = (VOICE if like is None else like).astype(dtype)
    changed[777] = value
    return changed


VOICE = voice(3)
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, RATE // 2).astype(np.float32)
HISS = (10 ** (-79 / 20) * np.random.default_rng(1).standard_normal(len(VOICE))).astype(np.float32)
SPEECH = np.tile(np.concatenate([voice(index, 1.0) for index in range(4)]), 2)
LONG_NAME = "n" * 251 + ".wav"
GOOD = ("good_a.wav", "m_good.wav", "z_good.wav", "folder/good_b.wav", "x.wav/good_c.wav")
WHOLE_WAV = encoded(VOICE, "WAV")

ODD_BUT_FINE = [
    Kind("8 bit, stereo, 8 kHz", "8bit.wav", _wave(np.stack([VOICE] * 2, 1), 8000, "PCM_U8"), ACCEPTED, seconds=1.2),
    Kind("float, 192 kHz", "192k.wav", _wave(voice(3, rate=192_000), 192_000, "FLOAT"), ACCEPTED, seconds=0.4),
    Kind("12 channels", "12.wav", _wave(np.stack([VOICE] * 12, 1)), ACCEPTED, seconds=0.4),
    Kind("a rate without common factor, 44,099 Hz", "44099.wav", _wave(voice(3, rate=44_099), 44_099), ACCEPTED),
    Kind("mu-law wav", "ulaw.wav", _wave(VOICE, subtype="ULAW"), ACCEPTED, seconds=0.4),
    Kind("IMA ADPCM wav", "adpcm.wav", _wave(VOICE, subtype="IMA_ADPCM"), ACCEPTED),
    Kind("flac named .wav", "flac.wav", _bytes(encoded(VOICE, "FLAC")), ACCEPTED, seconds=0.4),
    Kind("mp3 named .wav", "mp3.wav", _bytes(encoded(VOICE, "MP3")), ACCEPTED),
    Kind("wav named .mp3", "wav.mp3", _bytes(WHOLE_WAV), ACCEPTED, seconds=0.4),
    Kind("upper-case suffix", "LOUD.WAV", _bytes(WHOLE_WAV), ACCEPTED, seconds=0.4),
    Kind("RIFX (big-endian wav)", "rifx.wav", _bytes(riff(order=">")), ACCEPTED, seconds=0.4),
    Kind("an odd chunk before the data", "odd.wav", _bytes(riff(before=chunk(b"LIST", b"odd"))), ACCEPTED, seconds=0.4),
    Kind("an unknown chunk after the data", "after.wav", _bytes(riff(after=chunk(b"zzzz", b"zz"))), ACCEPTED),
    Kind("text after the audio", "appended.wav", _bytes(riff() + b"<html>" * 99), ACCEPTED, seconds=0.4),
    Kind("length unknown, from a pipe", "pipe.wav", _bytes(riff(promised=2**32 - 1)), ACCEPTED, seconds=0.4),
    Kind("symlink to a good file", "link.wav", _link("good_a.wav"), ACCEPTED, seconds=0.4),
    Kind("name with spaces", " a  b .wav", _bytes(WHOLE_WAV), ACCEPTED, seconds=0.4),
    Kind("name with a newline", "a\nb.wav", _bytes(WHOLE_WAV), ACCEPTED, shown="a\\nb.wav"),
    Kind("name with a terminal's escape", "a\x1b[31m.wav", _bytes(WHOLE_WAV), ACCEPTED, shown="a\\x1b[31m.wav"),
    Kind("name that is no UTF-8", os.fsdecode(b"\xff.wav"), _bytes(WHOLE_WAV), ACCEPTED, shown="\\udcff.wav"),
    Kind("name like the one above", "\\udcff.wav", _bytes(WHOLE_WAV), ACCEPTED, shown="\\\\udcff.wav"),
    Kind("name like an option", "--out=x.wav", _bytes(WHOLE_WAV), ACCEPTED, seconds=0.4),
    Kind("name of 255 bytes", LONG_NAME, _bytes(WHOLE_WAV), ACCEPTED, seconds=0.4),
    Kind("name with quotes and wildcards", "'`*?$(x)\".wav", _bytes(WHOLE_WAV), ACCEPTED, seconds=0.4),
    Kind("full scale everywhere", "loud.wav", _wave(np.sign(NOISE)), ACCEPTED, seconds=0.5),
    Kind("float a little beyond full scale", "beyond.wav", _wave(VOICE * 3, subtype="FLOAT"), ACCEPTED, seconds=0.4),
]
NO_AUDIO = [
    Kind("empty file", "nothing.wav", _bytes(b""), "unreadable"),
    Kind("text", "text.wav", _bytes(b"I am no audio.\n" * 99), "unreadable"),
    Kind("web page", "page.mp3", _bytes(b"<!DOCTYPE html><html>404</html>"), "unreadable"),
    Kind("zeros", "zeros.wav", _bytes(bytes(9999)), "unreadable"),
    Kind("random bytes", "random.flac", _bytes(np.random.default_rng(0).bytes(9999)), "unreadable"),
    Kind("zip", "zip.ogg", _bytes(b"PK\3\4" + bytes(99)), "unreadable"),
    Kind("link to the folder itself", "ring", _link("."), "unreadable: Is a directory"),
    Kind("such a link named like audio", "ring.wav", _link("."), "unreadable: Is a directory"),
    Kind("empty folder", "folder.wav", lambda path: path.mkdir(), "unreadable: Is a directory"),
    Kind("FIFO", "fifo.wav", os.mkfifo, "unreadable: not a plain file"),
    Kind("socket", "socket.wav", _socket, "unreadable: not a plain file"),
    Kind("symlink to an endless device", "zero.wav", _link("/dev/zero"), "unreadable: not a plain file"),
    Kind("symlink to nothing", "dangling.wav", _link("nowhere"), "unreadable: No such file"),
    Kind("symlink to itself", "loop.wav", _link("loop.wav"), "unreadable: Too many levels of symbolic links"),
    Kind("symlinks in a circle", "circle.wav", _link("circle2.wav"), "unreadable: Too many levels of symbolic links"),
    Kind("the circle's other half", "circle2.wav", _link("circle.wav"), "unreadable: Too many levels of symbolic"),
    Kind("file without permission", "locked.wav", _locked, "unreadable: Permission denied"),
    Kind("folder without permission", "locked", _locked_folder, "unreadable: Permission denied"),
]
CUT_OR_FLIPPED = [
    Kind("wav, 3 bytes", "cut3.wav", _bytes(WHOLE_WAV[:3]), "unreadable"),
    Kind("wav, cut in its header", "cut20.wav", _bytes(WHOLE_WAV[:20]), "unreadable"),
    Kind("wav, header alone", "cut44.wav", _bytes(WHOLE_WAV[:44]), "truncated"),
    Kind("wav, half", "half.wav", _cut(WHOLE_WAV, 0.5), "truncated"),
    Kind("wav without its last byte", "cut1.wav", _bytes(WHOLE_WAV[:-1]), "truncated"),
    Kind("flac, half", "half.flac", _cut(encoded(NOISE, "FLAC"), 0.5), "unreadable"),
    Kind("flac without its last byte", "cut1.flac", _bytes(encoded(NOISE, "FLAC")[:-1]), "unreadable"),
    Kind("flac, a byte flipped", "flip.flac", _flipped(encoded(NOISE, "FLAC"), 0.5), "unreadable"),
    Kind("ogg, half", "half.ogg", _cut(encoded(NOISE, "OGG"), 0.5), "truncated"),
    Kind("ogg without its last byte", "cut1.ogg", _bytes(encoded(NOISE, "OGG")[:-1]), "truncated"),
    Kind("opus, half", "half.opus", _cut(encoded(NOISE, "OGG", "OPUS"), 0.5), "truncated"),
    Kind("mp3, half", "half.mp3", _cut(encoded(np.tile(NOISE, 4), "MP3"), 0.5), "truncated"),
    Kind("aiff, half", "half.aiff", _cut(encoded(VOICE, "AIFF"), 0.5), "truncated"),
    Kind("caf, half", "half.caf", _cut(encoded(VOICE, "CAF"), 0.5), "unreadable"),
    Kind("w64, half", "half.w64", _cut(encoded(VOICE, "W64"), 0.5), "truncated"),
]
LYING_HEADERS = [
    Kind("RIFF turned into RUFF", "ruff.wav", _bytes(b"RUFF" + WHOLE_WAV[4:]), "unreadable"),
    Kind("no data chunk", "nodata.wav", _bytes(WHOLE_WAV[:36]), "unreadable"),
    Kind("no fmt chunk", "nofmt.wav", _bytes(WHOLE_WAV[:12] + WHOLE_WAV[36:]), "unreadable"),
    Kind("sample rate 0", "rate0.wav", _bytes(riff(rate=0)), "unreadable"),
    Kind("sample rate 1 Hz", "rate1.wav", _bytes(riff(rate=1)), "unreadable: sample rate"),
    Kind("sample rate of 2^31 - 1 Hz", "rate31.wav", _bytes(riff(rate=2**31 - 1)), "unreadable: sample rate"),
    Kind("sample rate of 2^32 - 1 Hz", "rate32.wav", _bytes(riff(rate=2**32 - 1)), "unreadable"),
    Kind("0 channels", "channels0.wav", _bytes(riff(channels=0)), "unreadable"),
    Kind("65,535 channels", "channels65535.wav", _bytes(riff(channels=65_535)), "unreadable"),
    Kind("0 bits", "bits0.wav", _bytes(riff(bits=0)), "unreadable"),
    Kind("77 bits", "bits77.wav", _bytes(riff(bits=77)), "unreadable"),
    Kind("unknown encoding", "tag.wav", _bytes(riff(tag=0x9999)), "unreadable"),
    Kind("a data chunk of 1.9 GB promised", "promise.wav", _bytes(riff(promised=0x70000000)), "truncated"),
    Kind("a fmt chunk of 4 GB", "fmt.wav", _bytes(riff(fmt_length=2**32 - 16)), "unreadable"),
    Kind("a LIST chunk of 4 GB", "list.wav", _bytes(riff(before=chunk(b"LIST", b"", length=2**32 - 2))), "unreadable"),
    Kind("half a sample at the end", "half_sample.wav", _bytes(riff(data=WHOLE_WAV[44:] + b"\1")), ACCEPTED),
]
STALE = patched(encoded(SPEECH, "WAV"), (40, 0, struct.pack("<I", 9600)))
OGG, OPUS = encoded(SPEECH, "OGG"), encoded(SPEECH, "OGG", "OPUS")
MP3 = mp3(SPEECH)
TAG_FIRST, TAG_LAST = b"ID3\4\0\0\0\0\1\0" + bytes(128), b"TAG" + b"x" * 125
JOINED = [
    Kind(f"two files in one, {name}", f"joined.{name}", _bytes(first + second), ACCEPTED, seconds=0.7)
    for name, first, second in [
        (name, encoded(VOICE, *kind), encoded(voice(4, 0.3), *kind))
        for name, kind in {
            "ogg": ("OGG",),
            "opus": ("OGG", "OPUS"),
            "flac": ("FLAC",),
            "mp3": ("MP3",),
            "wav": ("WAV",),
            "aiff": ("AIFF",),
            "caf": ("CAF",),
            "au": ("AU",),
            "w64": ("W64",),
            "rf64": ("RF64",),
        }.items()
    ]
]
JOINED += [
    Kind("mp3 thrice with tags", "tags.mp3", _bytes((TAG_FIRST + MP3 + TAG_LAST) * 3), ACCEPTED, seconds=24.0),
    Kind("mp3, the first part cut", "cut_joined.mp3", _bytes(MP3[: len(MP3) // 2] + MP3), "damaged"),
    Kind("ogg, the first part cut", "cut_joined.ogg", _bytes(OGG[: len(OGG) // 2] + OGG), "damaged"),
    Kind(
        "ogg, the first part without its last page",
        "cut.ogg",
        _bytes(OGG[: ogg_page(OGG, -1).start] + OGG),
        "truncated",
    ),
    Kind("ogg and opus in one", "mixed.ogg", _bytes(OGG + OPUS), ACCEPTED, seconds=16.0),
    Kind("flac and wav in one", "mixed.flac", _bytes(encoded(VOICE, "FLAC") + WHOLE_WAV), ACCEPTED, seconds=0.8),
    Kind("w64 and text", "text.w64", _bytes(encoded(VOICE, "W64") + b"text" * 99), ACCEPTED, seconds=0.4),
    Kind("id3 and wav", "id3.wav", _bytes(TAG_FIRST + WHOLE_WAV + TAG_LAST), ACCEPTED, seconds=0.4),
    Kind("id3 and flac", "id3.flac", _bytes(TAG_FIRST + encoded(VOICE, "FLAC") + TAG_LAST), ACCEPTED, seconds=0.4),
    Kind(
        "mp3s of different rates in one",
        "rates.mp3",
        _bytes(MP3 + encoded(voice(1, rate=16_000), "MP3", rate=16_000)),
        "unreadable: joined from parts of [16000, 24000] Hz",
    ),
]
UNKNOWN_LENGTH = [
    Kind("wav, lengths 0", "stream.wav", _bytes(patched(WHOLE_WAV, (4, 0, bytes(4)), (40, 0, bytes(4)))), ACCEPTED),
    Kind("wav, data of length 0", "died.wav", _bytes(riff(promised=0)), ACCEPTED, seconds=0.4),
    Kind("RIFX, data of length 0", "died_x.wav", _bytes(riff(promised=0, order=">")), ACCEPTED, seconds=0.4),
    Kind("rf64, lengths 0", "0.rf64", _bytes(patched(encoded(VOICE, "RF64"), (20, 0, bytes(24)))), ACCEPTED),
    Kind("rf64, lengths 2^64 - 1", "-1.rf64", _bytes(patched(encoded(VOICE, "RF64"), (20, 0, b"\xff" * 24))), ACCEPTED),
    Kind("w64, lengths 0", "0.w64", _bytes(patched(encoded(VOICE, "W64"), (b"data", 16, bytes(8)))), ACCEPTED),
    Kind("caf, length -1", "-1.caf", _bytes(patched(encoded(VOICE, "CAF"), (b"data", 4, b"\xff" * 8))), ACCEPTED),
    Kind("au, length 0", "0.au", _bytes(patched(encoded(VOICE, "AU"), (8, 0, bytes(4)))), ACCEPTED, seconds=0.4),
    Kind("au, length -1", "-1.au", _bytes(patched(encoded(VOICE, "AU"), (8, 0, b"\xff" * 4))), ACCEPTED, seconds=0.4),
    Kind("aiff, length 0", "0.aiff", _bytes(patched(encoded(VOICE, "AIFF"), (b"SSND", 4, bytes(4)))), ACCEPTED),
    Kind(
        "flac, 0 samples in all",
        "0.flac",
        _bytes(patched(encoded(VOICE, "FLAC"), (21, 0, b"\xf0"), (22, 0, bytes(4)))),
        ACCEPTED,
        seconds=0.4,
    ),
    Kind("mp3 of many rates, no count", "vbr.mp3", _bytes(mp3(SPEECH, counted=False)), ACCEPTED),
    Kind("the same twice", "vbr2.mp3", _bytes(mp3(SPEECH, counted=False) * 2), ACCEPTED),
    Kind("mp3 of one rate, no count", "cbr.mp3", _bytes(mp3(SPEECH, mode="CONSTANT", counted=False)), ACCEPTED),
    Kind("mp3, no count, last frame cut", "cut.mp3", _bytes(mp3(SPEECH, counted=False)[:-9]), "truncated"),
    Kind("wav, the header counts a part only", "stale.wav", _bytes(STALE), "damaged: its header counts"),
    Kind("mp3 with other bytes in it", "junk.mp3", _bytes(MP3[:9999] + b"junk" * 99 + MP3[9999:]), "damaged"),
    Kind("ogg without one of its pages", "hole.ogg", _bytes(OGG.replace(OGG[ogg_page(OGG, 4)], b"")), "damaged"),
    Kind("ogg, a byte flipped", "flip.ogg", _flipped(OGG, 0.5), "damaged"),
    Kind("opus, a byte flipped", "flip.opus", _flipped(OPUS, 0.5), "damaged"),
    Kind("wav and zeros", "padded.wav", _bytes(WHOLE_WAV + bytes(100_000)), ACCEPTED, seconds=0.4),
]
BAD_SAMPLES = [
    Kind("no samples", "frames0.wav", _wave(VOICE[:0]), "empty"),
    Kind("one sample", "one.wav", _wave(VOICE[500:501]), "silent"),
    Kind("50 ms", "short.wav", _wave(VOICE[:1200]), "too short"),
    Kind("silence", "silent.wav", _wave(0 * VOICE), "silent"),
    Kind("silence with an offset", "offset.wav", _wave(0 * VOICE + 0.25), "silent"),
    Kind(
        "channels that cancel out",
        "cancel.wav",
        _wave(np.stack([VOICE, -VOICE], 1), subtype="FLOAT"),
        "channels cancel out",
    ),
    Kind(
        "channels that cancel out, and noise",
        "cancel2.wav",
        _wave(np.stack([VOICE, HISS - VOICE], 1)),
        "channels cancel out",
    ),
    Kind(
        "three channels, a third of each cancels",
        "cancel3.wav",
        _wave(VOICE[:, None] * [1, 1, -1.98]),
        "channels cancel out",
    ),
    Kind("an offset of 0.3 and noise", "offset2.wav", _wave(HISS + 0.3), "offset"),
    Kind("a voice on an offset of -0.6", "offset3.wav", _wave(VOICE - 0.6), "offset"),
    Kind("noise of -79 dBFS", "faint.wav", _wave(HISS, subtype="PCM_24"), "hardly any different codes"),
    Kind("noise of -79 dBFS and a click", "click.wav", _wave(_with(0.9, like=HISS)), "hardly any different codes"),
    Kind(
        "a voice at 0.002 of its level", "quiet.wav", _wave(VOICE / 500, subtype="PCM_24"), "hardly any different codes"
    ),
    Kind("a peak of 300", "300.wav", _wave(VOICE / abs(VOICE).max() * 300, subtype="FLOAT"), "out of range"),
    Kind("NaN", "nan.wav", _wave(_with(np.nan), subtype="FLOAT"), "not finite"),
    Kind("infinity", "inf.wav", _wave(_with(np.inf), subtype="FLOAT"), "not finite"),
    Kind("minus infinity", "minus_inf.wav", _wave(_with(-np.inf), subtype="FLOAT"), "not finite"),
    Kind("1e300 in float64", "double.wav", _wave(_with(1e300, np.float64), subtype="DOUBLE"), "not finite"),
    Kind("a value of 3e38", "huge.wav", _wave(_with(3e38), subtype="FLOAT"), "out of range"),
    Kind("values of 3e38 and -3e38", "huge2.wav", _wave(np.sign(NOISE) * 3e38, subtype="FLOAT"), "out of range"),
    Kind("3e38 in two channels", "huge3.wav", _wave(np.stack([_with(3e38)] * 2, 1), subtype="FLOAT"), "not finite"),
    Kind("3e38 at 48 kHz", "huge4.wav", _wave(np.sign(NOISE) * 3e38, 48_000, "FLOAT"), "out of range"),
    Kind("float on the scale of 16 bits", "scale.wav", _wave(VOICE * 32768, subtype="FLOAT"), "out of range"),
]
KINDS = [*ODD_BUT_FINE, *NO_AUDIO, *CUT_OR_FLIPPED, *LYING_HEADERS, *JOINED, *UNKNOWN_LENGTH, *BAD_SAMPLES]
