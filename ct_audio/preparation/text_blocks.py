"""Texts as parts of files, read in blocks of whole lines, hashed; and the proof that a corpus decodes back to them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from ct_audio.common.errors import UserError
from ct_audio.common.progress import Progress
from ct_audio.common.text import require_utf8
from ct_audio.data.codecs import Codec
from ct_audio.data.corpus import Corpus, Split
from ct_audio.data.vocabulary_codecs import LINE_END, UNKNOWN, Word
from ct_audio.preparation.workers import join_hashes

BLOCK_BYTES = 1 << 20
_BLOCK_CODES = 1 << 18
_ARCHIVES = {
    "a gzip archive": (b"\x1f\x8b", "gunzip < FILE > NEW_FILE"),
    "a zip archive": (b"PK\3\4", "unzip FILE"),
    "a zstd archive": (b"\x28\xb5\x2f\xfd", "zstd -d < FILE > NEW_FILE"),
    "a bzip2 archive": (b"BZh", "bunzip2 < FILE > NEW_FILE"),
    "an xz archive": (b"\xfd7zXZ\0", "unxz < FILE > NEW_FILE"),
    "a 7z archive": (b"7z\xbc\xaf\x27\x1c", "7z x FILE"),
}
"""By the bytes that they begin with; no text begins so."""


@dataclass(frozen=True)
class Text:
    """One document: bytes `begin` to `end` of a file.

    Attributes:
        path: of the file, UTF-8 unless the codec is of bytes.
        split: where it goes, as "train".
        name: printable; need not be unique.
        begin, end: in bytes.
    """

    path: Path
    split: str
    name: str
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Length in bytes."""
        return self.end - self.begin


def whole_file(path: Path, split: str, name: str) -> Text:
    """A file as one text."""
    return Text(path, split, name, 0, path.stat().st_size)


def read_blocks(text: Text, *, block_bytes: int = BLOCK_BYTES, utf8: bool = False) -> Iterator[bytes]:
    """A text in blocks, each but the last one ending with a line feed (a longer line is held as a whole).

    Args:
        utf8: whether it must be UTF-8.
    Raises:
        UserError: the file ends before the text does, is an archive, or is no UTF-8 and must be.
    """
    rest, left, begin = b"", text.num_bytes, text.begin
    for part in _read_parts(text, part_bytes=block_bytes):
        left -= len(part)
        block = rest + part
        cut = block.rfind(b"\n") + 1 if left else len(block)
        block, rest = block[:cut], block[cut:]
        if not block:
            continue
        if utf8:
            require_utf8(block, text.path, begin)
        yield block
        begin += cut


def _read_parts(text: Text, *, part_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """A text in parts that end anywhere, at most as long."""
    left = text.num_bytes
    with text.path.open("rb") as handle:
        handle.seek(text.begin)
        while left:
            part = handle.read(min(left, part_bytes))
            if not part:
                raise UserError(f"{text.path}: expected {text.end} bytes, it has become shorter; run the command again")
            if left == text.num_bytes and not text.begin:
                _require_no_archive(text.path, part)
            left -= len(part)
            yield part


def _require_no_archive(path: Path, beginning: bytes) -> None:
    for kind, (magic, unpack) in _ARCHIVES.items():
        if beginning.startswith(magic):
            raise UserError(f"{path.absolute()}: expected text, got {kind}; unpack it, as with: {unpack}")


def hash_texts(texts: Sequence[Text]) -> str:
    """Hash of what texts hold, all of which is read (about 6 s a GB), a block at a time.

    Raises:
        UserError: a file ends before its text does, or cannot be read.
    """
    hashes = []
    with Progress(total=sum(t.num_bytes for t in texts), unit="B", unit_scale=True, desc="hash") as bar:
        for text in texts:
            try:
                digest = hashlib.sha256()
                for block in _read_parts(text):
                    digest.update(block)
                    bar.update(len(block))
            except OSError as error:
                raise UserError(f"cannot read {text.path}: {error.strerror}") from error
            hashes.append(digest.hexdigest())
    return join_hashes(hashes)


def as_words(text: bytes) -> list[bytes]:
    """Words as the word codec sees them, `<eos>` for each line feed."""
    return text.replace(b"\n", f" {LINE_END} ".encode()).split()


def require_decodes_back(corpus: Corpus, texts: Sequence[Text]) -> int:
    """Compare what a corpus decodes to with its texts: byte by byte, or word by word where the codec is of words.

    Args:
        texts: in the order in which they were prepared, within each split.
    Returns:
        bytes of the texts.
    Raises:
        UserError: they differ; the message says where.
    """
    is_words = isinstance(corpus.codec, Word)
    compare = _compare_words if is_words else _compare_bytes
    documents = {name: _documents(split) for name, split in corpus.splits.items()}
    with Progress(total=sum(t.num_bytes for t in texts), unit="B", unit_scale=True, desc="verify") as bar:
        for text in texts:
            if not any(map(as_words, read_blocks(text)) if is_words else [text.num_bytes]):
                continue  # nothing in it
            name, codes = next(documents[text.split], ("nothing", np.zeros(0, np.uint8)))
            if name != text.name:
                raise UserError(f"{corpus.path}, {text.split}: expected the document {text.name!r}, got {name!r}")
            compare(corpus.codec, codes, text)
            bar.update(text.num_bytes)
    for name, left in documents.items():
        if next(left, None) is not None:
            raise UserError(f"{corpus.path}, {name}: it has more documents than there are texts")
    return sum(text.num_bytes for text in texts)


def _documents(split: Split) -> Iterator[tuple[str, Integer[np.ndarray, " N"]]]:
    ends = [*split.document_offsets[1:].tolist(), split.num_codes]
    for name, begin, end in zip(split.document_names, split.document_offsets.tolist(), ends, strict=True):
        yield name, split.codes[begin:end]


def _compare_bytes(codec: Codec, codes: Integer[np.ndarray, " N"], text: Text) -> None:
    num_bytes = 0
    with text.path.open("rb") as handle:
        handle.seek(text.begin)
        for begin in range(0, len(codes), _BLOCK_CODES):
            decoded = codec.decode(np.asarray(codes[begin : begin + _BLOCK_CODES]))
            if decoded != handle.read(len(decoded)):
                raise UserError(f"{text.path}, {text.name!r}: differs from what was decoded after byte {num_bytes}")
            num_bytes += len(decoded)
    if num_bytes != text.num_bytes:
        raise UserError(f"{text.path}, {text.name!r}: expected {text.num_bytes} bytes, decoded {num_bytes}")


def _compare_words(codec: Codec, codes: Integer[np.ndarray, " N"], text: Text) -> None:
    assert isinstance(codec, Word)
    known, num_codes, unknown = set(codec.words), 0, UNKNOWN.encode()
    for block in read_blocks(text):
        words = as_words(block)
        decoded = as_words(codec.decode(np.asarray(codes[num_codes : num_codes + len(words)])))
        decoded += [b""] * (len(words) - len(decoded))
        for index, (word, found) in enumerate(zip(words, decoded, strict=True)):
            if word != found and (found != unknown or word.decode("utf-8", "replace") in known):
                place = num_codes + index
                raise UserError(f"{text.path}, {text.name!r}, word {place}: expected {word!r}, decoded {found!r}")
        num_codes += len(words)
    if num_codes != len(codes):
        raise UserError(f"{text.path}, {text.name!r}: expected {num_codes} words, the corpus has {len(codes)}")
