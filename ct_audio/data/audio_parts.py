"""What an audio file holds, found from its bytes: the parts of joined files, lengths that its header does not know.

Decoders stop where the first header says so, or guess a length from the first frame. So frames of mp3, pages of ogg and
chunks of wav, w64, aiff and caf are counted here, and each part is given to the decoder as a file of its own.
"""

import functools
import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

_BLOCK_BYTES = 1 << 20
_MAX_UNCOUNTED_BYTES = 4096  # tags and text at the end of a file are no sound; more may be


class Part(NamedTuple):
    """A stretch of a file that is a whole audio file, after a header of ours where its own does not do."""

    begin: int
    end: int
    header: bytes = b""


class PartFile(io.RawIOBase):
    """A part as a file; an error of the disk is kept in `error`, since callbacks of a C library cannot raise it."""

    def __init__(self, handle: BinaryIO, part: Part) -> None:
        super().__init__()
        self._descriptor, self._part, self._place = handle.fileno(), part, 0
        self.error: OSError | None = None

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        size = len(self._part.header) + self._part.end - self._part.begin
        self._place = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: size}[whence])
        return self._place

    def tell(self) -> int:
        """As of any file."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """As of any file, at most up to the end of the part."""
        header, begin, end = self._part.header, self._part.begin, self._part.end
        if self._place < len(header):
            content = header[self._place : self._place + len(buffer)]
        else:
            place = begin + self._place - len(header)
            try:
                content = os.pread(self._descriptor, max(0, min(len(buffer), end - place)), place)
            except OSError as error:
                self.error, content = error, b""
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def find_parts(handle: BinaryIO) -> list[Part]:
    """The parts of an audio file in their order; the whole file where it has only one, or is of no known format.

    Args:
        handle: buffered, of a plain file.
    Raises:
        ValueError: it is truncated or damaged, or holds bytes that may be sound and cannot be read.
    """
    size, parts = handle.seek(0, os.SEEK_END), []
    begin = _after_tags(handle, 0, size)  # any format may stand behind ID3
    while begin < size:
        find = _finder(handle, begin, size)
        if find is None:
            break
        parts += find(handle, begin, size)
        begin = _after_tags(handle, parts[-1].end, size)
    if not parts:
        return [Part(0, size)]
    _require_no_sound(handle, begin, size)
    return parts


def _finder(handle: BinaryIO, begin: int, size: int) -> Callable[[BinaryIO, int, int], list[Part]] | None:
    """What finds the parts of the format that begins here; None where none does that is known."""
    magic = _bytes_at(handle, begin, 16)
    if magic.startswith(b"OggS"):
        return _ogg_parts
    if magic.startswith(b"fLaC"):
        return _flac_parts
    if magic.startswith(b".snd"):
        return _au_parts
    for layout in _LAYOUTS:
        if magic.startswith(layout.magic):
            return functools.partial(_chunked_parts, layout)
    header = _parse_mp3_header(magic[:4])
    return _mp3_parts if header is not None and _is_followed(handle, begin, header, size) else None


def _flac_parts(handle: BinaryIO, begin: int, size: int) -> list[Part]:
    """One part, up to where the next file begins; the stream's header says where it ends, if it knows."""
    return [Part(begin, _search(handle, _FLAC_END, begin + 8, size))]


def _bytes_at(handle: BinaryIO, place: int, length: int) -> bytes:
    handle.seek(place)
    return handle.read(length)


def _search(handle: BinaryIO, pattern: re.Pattern[bytes], begin: int, end: int) -> int:
    """Where a pattern of less than 64 bytes is found first, or `end`."""
    for start in range(begin, end, _BLOCK_BYTES):
        found = pattern.search(_bytes_at(handle, start, min(_BLOCK_BYTES + 64, end - start)))
        if found:
            return start + found.start()
    return end


def _require_no_sound(handle: BinaryIO, begin: int, end: int) -> None:
    """Zeros pad files, and tags stand at their end; more than that may be sound that no header counts."""
    num_bytes = 0
    for start in range(begin, end, _BLOCK_BYTES):
        block = _bytes_at(handle, start, min(_BLOCK_BYTES, end - start))
        num_bytes += len(block) - block.count(0)
        if num_bytes > _MAX_UNCOUNTED_BYTES:
            raise ValueError(f"damaged: its header counts {begin} bytes, {end - begin} more follow")


# Ogg: a chain of pages; a page that begins a stream after others went on begins a new link (RFC 3533).


def _ogg_parts(handle: BinaryIO, begin: int, size: int) -> list[Part]:
    """Raises ValueError where a page is damaged, missing or cut, or a stream does not end with its last page."""
    starts, place = [begin], begin
    next_numbers: dict[int, int] = {}
    open_streams: set[int] = set()
    in_headers, has_sound = True, False
    while place < size:
        head = _bytes_at(handle, place, 27)
        if head[:4] != b"OggS" and not open_streams:
            break
        if head[:4] != b"OggS":
            again = _search(handle, re.compile(rb"OggS\x00"), place, size)
            if again < size:
                raise ValueError(f"damaged: {again - place} bytes at byte {place} are no page of ogg")
            break
        lengths = handle.read(head[26]) if len(head) == 27 else b""
        body = handle.read(sum(lengths))
        if len(head) < 27 or len(lengths) < head[26] or len(body) < sum(lengths):
            raise ValueError("truncated: the ogg stream does not end with its last page")
        flags, granule, stream, number, checksum = struct.unpack("<BqIII", head[5:26])
        if _ogg_checksum(head[:22] + bytes(4) + head[26:] + lengths + body) != checksum:
            raise ValueError(f"damaged: the ogg page at byte {place} does not have its checksum")
        if flags & 2:
            if not in_headers:
                starts.append(place)
                in_headers, has_sound = True, False
            if starts[-1] == place and open_streams:
                break
            open_streams.add(stream)
        elif stream in open_streams:
            in_headers = False
            if has_sound and number != next_numbers[stream]:  # recorded from a broadcast, the headers come from earlier
                raise ValueError(f"damaged: ogg pages {next_numbers[stream]} to {number - 1} are missing")
            has_sound = has_sound or granule > 0
        next_numbers[stream] = (number + 1) % 2**32
        if flags & 4:
            open_streams.discard(stream)
        place += 27 + len(lengths) + len(body)
    if open_streams:
        raise ValueError("truncated: the ogg stream does not end with its last page")
    return [Part(*pair) for pair in zip(starts, [*starts[1:], place], strict=True)]


_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 of Ogg, which takes the highest bit first: zlib's over reversed bits, without its inversions."""
    reflected = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(reflected.to_bytes(4, "little").translate(_REVERSED_BITS), "big")


# Files of chunks, and au.


class _Layout(NamedTuple):
    """A container of chunks: an id, a length (which may count its own header) and content, padded.

    Attributes:
        first: offset of the first chunk.
        data: id of the chunk of samples.
    """

    magic: bytes
    first: int
    id_bytes: int
    length: struct.Struct
    counted_header: int
    alignment: int
    data: bytes


_W64_SUFFIX = bytes.fromhex("f3acd3118cd100c04f8edb8a")
_LAYOUTS = (
    _Layout(b"RIFF", 12, 4, struct.Struct("<I"), 0, 2, b"data"),
    _Layout(b"RIFX", 12, 4, struct.Struct(">I"), 0, 2, b"data"),
    _Layout(b"RF64", 12, 4, struct.Struct("<I"), 0, 2, b"data"),
    _Layout(b"FORM", 12, 4, struct.Struct(">I"), 0, 2, b"SSND"),
    _Layout(b"riff.\x91\xcf\x11", 40, 16, struct.Struct("<Q"), 24, 8, b"data" + _W64_SUFFIX),
    _Layout(b"caff", 8, 4, struct.Struct(">Q"), 0, 1, b"data"),
)
_MAGIC = re.compile(rb"RIF[FX]....WAVE|RF64....WAVE|FORM....AIF[FC]|riff\.\x91\xcf\x11|caff\x00\x01", re.DOTALL)
_FLAC_END = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22|OggS\x00\x02|" + _MAGIC.pattern, re.DOTALL)
_DS64_RIFF_LENGTH, _DS64_DATA_LENGTH = 20, 28


def _chunked_parts(layout: _Layout, handle: BinaryIO, begin: int, size: int) -> list[Part]:
    """The part that begins here; its header is mended where it says 0 and samples follow.

    A length beyond the end of the file is left to the decoder, which tells a cut file from an unknown length.
    """
    place, data = begin + layout.first, None
    head_bytes = layout.id_bytes + layout.length.size
    unknown = False
    while place + head_bytes <= size:
        head = _bytes_at(handle, place, head_bytes)
        name, length = head[: layout.id_bytes], layout.length.unpack(head[layout.id_bytes :])[0]
        is_data = name == layout.data and data is None
        if layout.magic == b"RF64" and is_data:
            length = struct.unpack("<Q", _bytes_at(handle, begin + _DS64_DATA_LENGTH, 8).ljust(8, b"\0"))[0]
        length = max(0, length - layout.counted_header)
        is_name = name[:4].isascii() and name[:4].decode().isprintable()
        if not is_data and (not is_name or _finder(handle, place, size) is not None):
            break
        if is_data and layout.magic in (b"RF64", b"caff") and length >= 2**63 - 1:
            return [_with_length(handle, begin, place + head_bytes, size, layout)]
        if length > size - place - head_bytes:
            unknown = is_data
            break
        if is_data:
            data = (place + head_bytes, length)
        place += head_bytes + length
        padding = -(place - begin) % layout.alignment
        place += padding if not any(_bytes_at(handle, place, padding)) else 0  # some writers forget it
    if unknown:
        return [Part(begin, _search(handle, _MAGIC, place + head_bytes, size))]
    place = min(place, size)
    if data is None:
        return [Part(begin, size)]
    if data == (place, 0) and _finder(handle, place, size) is None:
        return [_with_length(handle, begin, place, _search(handle, _MAGIC, place, size), layout)]
    return [Part(begin, place)]


def _with_length(handle: BinaryIO, begin: int, data: int, end: int, layout: _Layout) -> Part:
    """A part whose header does not know its length, as of a pipe or a recorder that died, with the one that it has."""
    header = bytearray(_bytes_at(handle, begin, data - begin))
    length = end - data
    if layout.magic == b"RF64":
        struct.pack_into("<Q", header, _DS64_RIFF_LENGTH, end - begin - 8)
        struct.pack_into("<Q", header, _DS64_DATA_LENGTH, length)
    else:
        most = 2 ** (8 * layout.length.size) - 1
        struct_place = len(header) - layout.length.size
        layout.length.pack_into(header, struct_place, min(length + layout.counted_header, most))
    return Part(data, end, bytes(header))


def _au_parts(handle: BinaryIO, begin: int, size: int) -> list[Part]:
    head = _bytes_at(handle, begin, 12)
    offset, length = struct.unpack(">II", head[4:12].ljust(8, b"\0"))
    data = begin + offset
    if length == 0 or 2**31 - 2**12 <= length < 2**31:
        header = bytearray(_bytes_at(handle, begin, offset)).ljust(12, b"\0")
        struct.pack_into(">I", header, 8, 2**32 - 1)
        return [Part(min(data, size), size, bytes(header))]
    return [Part(begin, min(size, data + length))]


# MPEG audio: a chain of frames, tags between them, and perhaps a first frame that counts the others.

_BIT_RATES = {
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""In kbit/s, by version (2 stands for 2.5 too) and layer (ISO 11172-3, 13818-3)."""


class _Mp3Header(NamedTuple):
    """The first four bytes of a frame.

    Attributes:
        stream: what stays the same in all frames: version, layer, sample rate and whether it is mono.
        length: of the frame, in bytes.
        side_bytes: from the start of the frame to where a count of frames may stand.
    """

    raw: bytes
    stream: tuple[int, int, int, bool]
    length: int
    side_bytes: int


@functools.lru_cache(4096)
def _parse_mp3_header(raw: bytes) -> _Mp3Header | None:
    """None where it is no header, or of a frame of free length."""
    if len(raw) < 4 or raw[0] != 0xFF or raw[1] & 0xE0 != 0xE0:
        return None
    version, layer = raw[1] >> 3 & 3, 4 - (raw[1] >> 1 & 3)  # version: 0 is 2.5, 2 is 2, 3 is 1
    rate_index, bits_index = raw[2] >> 2 & 3, raw[2] >> 4
    if version == 1 or layer == 4 or rate_index == 3 or bits_index in (0, 15):
        return None
    is_first = version == 3
    rate = (44_100, 48_000, 32_000)[rate_index] >> (0 if is_first else 1 if version == 2 else 2)
    bits, padding = 1000 * _BIT_RATES[1 if is_first else 2, layer][bits_index], raw[2] >> 1 & 1
    if layer == 1:
        length = (12 * bits // rate + padding) * 4
    else:
        length = (72 if layer == 3 and not is_first else 144) * bits // rate + padding
    mono = raw[3] >> 6 == 3
    side_bytes = (17 if mono else 32) if is_first else (9 if mono else 17)
    return _Mp3Header(raw, (version, layer, rate, mono), length, 4 + side_bytes)


@dataclass
class _Mp3Stream:
    """Frames behind one another.

    Attributes:
        begin, end: the bytes of all its frames.
        sound: where the frames begin that hold sound.
        promised: number of frames that its first frame states, 0 if none; None: all frames hold sound.
        num_frames: that hold sound.
    """

    header: _Mp3Header
    begin: int
    sound: int
    end: int
    promised: int | None
    num_frames: int = 0


def _mp3_parts(handle: BinaryIO, begin: int, size: int) -> list[Part]:
    """Raises ValueError where the last frame is cut, frames are missing, or what stands between frames is no tag."""
    streams: list[_Mp3Stream] = []
    place, is_open = begin, False
    while place < size:
        frame = _bytes_at(handle, place, 64)
        header = _parse_mp3_header(frame[:4])
        goes_on = is_open and header is not None and header.stream == streams[-1].header.stream
        if header is None or not (goes_on or _is_followed(handle, place, header, size)):
            after = _after_tag(handle, place, size, frame)
            if after is None:
                after = _next_frame(handle, place, size, streams[-1].header)
                if after == size:
                    break
                if any(_bytes_at(handle, place, after - place)):
                    raise ValueError(f"damaged: {after - place} bytes at byte {place} are no frame of mp3")
            place, is_open = after, False
            continue
        if place + header.length > size:
            raise ValueError("truncated: the last frame of the mp3 is cut")
        promised = _promised_frames(frame, header)
        if not goes_on or promised is not None:
            sound = place + (header.length if promised is not None else 0)
            streams.append(_Mp3Stream(header, place, sound, place, promised))
            is_open = True
        place += header.length
        streams[-1].end = place
        streams[-1].num_frames += promised is None
    parts = []
    for stream in (stream for stream in streams if stream.num_frames):
        # some encoders count the first frame, which holds no sound
        if stream.promised and stream.num_frames < stream.promised - 1:
            raise ValueError(f"truncated: {stream.promised} frames promised, {stream.num_frames} found")
        if stream.promised in (stream.num_frames, stream.num_frames + 1):
            parts.append(Part(stream.begin, stream.end))
        else:
            parts.append(Part(stream.sound, stream.end, _counting_frame(stream)))
    return parts or [Part(begin, size)]


def _counting_frame(stream: _Mp3Stream) -> bytes:
    """A frame without sound that states the number of frames, as a decoder expects it before frames of many rates."""
    raw = bytearray(stream.header.raw)
    raw[1] |= 1  # no checksum
    raw[2] = 0xE0 | (raw[2] & 0x0C)  # the highest bit rate has room in every version
    header = _parse_mp3_header(bytes(raw))
    assert header is not None
    frame = bytes(raw) + bytes(header.side_bytes - 4) + b"Xing" + struct.pack(">II", 1, stream.num_frames)
    return frame.ljust(header.length, b"\0")


def _promised_frames(frame: bytes, header: _Mp3Header) -> int | None:
    """Number of frames that a frame states in place of sound (0: it states none), or None where it holds sound."""
    for at in (header.side_bytes, header.side_bytes + 2):  # after a checksum, in some
        if frame[at : at + 4] in (b"Xing", b"Info") and len(frame) >= at + 12:
            flags, number = struct.unpack(">II", frame[at + 4 : at + 12])
            return number if flags & 1 else 0
    if frame[36:40] == b"VBRI" and len(frame) >= 54:
        return struct.unpack(">I", frame[50:54])[0]
    return None


def _after_tags(handle: BinaryIO, place: int, size: int) -> int:
    """Where what follows any tags that stand here begins."""
    while (after := _after_tag(handle, place, size, _bytes_at(handle, place, 8))) is not None:
        place = after
    return place


def _after_tag(handle: BinaryIO, place: int, size: int, head: bytes) -> int | None:
    """Where a tag that stands here ends; None where there is none."""
    if head.startswith(b"ID3"):
        fields = _bytes_at(handle, place, 10).ljust(10, b"\0")
        length = sum((byte & 0x7F) << shift for byte, shift in zip(fields[6:], (21, 14, 7, 0), strict=True))
        return min(size, place + 10 + length + (10 if fields[5] & 16 else 0))
    if head.startswith(b"TAG"):
        return min(size, place + 128)
    if head.startswith(b"APETAGEX"):
        fields = _bytes_at(handle, place, 32).ljust(32, b"\0")
        length, _, flags = struct.unpack("<III", fields[12:24])
        return min(size, place + 32 + (length if flags & 1 << 29 else 0))
    return None


_FRAME_OR_TAG = re.compile(rb"\xff[\xe0-\xff]|ID3[\x02-\x04]|APETAGEX")


def _next_frame(handle: BinaryIO, begin: int, size: int, like: _Mp3Header) -> int:
    """Where the next frame or tag begins, or `size`."""
    for start in range(begin + 1, size, _BLOCK_BYTES):
        block = _bytes_at(handle, start, _BLOCK_BYTES + 8)
        for found in _FRAME_OR_TAG.finditer(block, 0, _BLOCK_BYTES + 7):
            place, header = start + found.start(), _parse_mp3_header(block[found.start() : found.start() + 4])
            if block[found.start()] != 0xFF:
                return place
            if header is not None and header.stream == like.stream and _is_followed(handle, place, header, size):
                return place
    return size


def _is_followed(handle: BinaryIO, place: int, header: _Mp3Header, size: int) -> bool:
    """Whether two more frames of the same stream, or the end of the file or a tag, follow a frame."""
    for _ in range(2):
        place += header.length
        head = _bytes_at(handle, place, 16)
        follower = _parse_mp3_header(head[:4])
        if place >= size or _after_tag(handle, place, size, head) is not None:
            return True
        if follower is None or follower.stream != header.stream:
            return False
        header = follower
    return True
