"""Codecs of text with a vocabulary made from a training split: words and subwords. Bytes are in codecs.py.

Both sort their codes by frequency in training, as adaptive softmax wants it, decode to bytes, and encode line by line:
`encode(a + b)` is `encode(a)` and `encode(b)` where `a` ends with a line feed, so a text can be read in blocks. The
vocabulary is a JSON file beside corpus.json or config.yaml; its sha256 stands in the description.
Shape letters: N codes, V codes of the vocabulary.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json

VOCABULARY_FILE = "vocabulary.json"
LINE_END, UNKNOWN = "<eos>", "<unk>"
MAX_VOCAB_SIZE = 1 << 24
_MAX_WORD_LENGTH = 1 << 16


class _VocabularyCodec:
    """What both share; each says what a code stands for and what its vocabulary file holds."""

    name: str
    sample_rate_hz: int | None = None
    _pieces: Any  # bytes of each code
    _content: Any  # of the file, plain values

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return len(self._pieces)

    def decode(self, codes: Integer[np.ndarray, " N"], /) -> bytes:
        """The bytes that the codes stand for, one after the other.

        Raises:
            UserError: a code is not in the vocabulary.
        """
        require_codes(codes, self.vocab_size, self.name)
        return b"".join(map(self._pieces.__getitem__, codes.tolist()))

    def to_json(self) -> dict[str, Any]:
        """Plain description; with `files` the inverse of `codec_from_json`."""
        sha256 = hashlib.sha256(self._file).hexdigest()
        return {"name": self.name, "vocab_size": self.vocab_size, "vocabulary": VOCABULARY_FILE, "sha256": sha256}

    def files(self) -> dict[str, bytes]:
        """The vocabulary as JSON, an entry a line in the order of the codes."""
        return {VOCABULARY_FILE: self._file}

    @cached_property
    def _file(self) -> bytes:
        return (json.dumps(self._content, ensure_ascii=False, indent=0) + "\n").encode("utf-8")


@dataclass(frozen=True)
class Word(_VocabularyCodec):
    """Words separated by ASCII white space; a line feed is the word `<eos>`, an unknown word is `<unk>`.

    Decoding gives the layout of WikiText's files: " = Title = \\n", a space after every word and before each line.
    `decode(encode(text))` is `text` where it is in that layout, has known words only and ends with a line feed.

    Attributes:
        words: V of them, different ones, with `<eos>` and `<unk>`; as UTF-8 they hold no white space.
    """

    words: tuple[str, ...] = field(repr=False)

    name: str = field(default="word", init=False)
    unit: str = field(default="word", init=False)

    def __post_init__(self) -> None:
        if not {LINE_END, UNKNOWN} <= set(self.words):
            raise UserError(f"codec word: expected {LINE_END} and {UNKNOWN} in the vocabulary")
        if len(self._index) != len(self.words):
            raise UserError("codec word: expected every word once in the vocabulary")
        for word, raw in zip(self.words, self._index, strict=True):
            if raw.split() != [raw]:
                raise UserError(f"codec word: {word!r} in the vocabulary is no word: it is empty or has white space")

    @property
    def start_code(self) -> int:
        """The code of `<eos>`."""
        return self._index[LINE_END.encode()]

    @cached_property
    def _index(self) -> dict[bytes, int]:
        return {word.encode("utf-8"): code for code, word in enumerate(self.words)}

    @cached_property
    def _pieces(self) -> list[bytes]:
        return [b" \n" if word == LINE_END else f" {word}".encode() for word in self.words]

    @property
    def _content(self) -> dict[str, Any]:
        return {"format": "ct_audio words", "words": list(self.words)}

    def encode(self, text: str | bytes, /) -> Int32[np.ndarray, " N"]:
        """Codes of a text (a str in UTF-8)."""
        raw = text.encode("utf-8") if isinstance(text, str) else text
        words = raw.replace(b"\n", f" {LINE_END} ".encode()).split()
        unknown = self._index[UNKNOWN.encode()]
        return np.fromiter(map(self._index.get, words, repeat(unknown)), dtype=np.int32, count=len(words))

    @classmethod
    def from_counts(cls, counts: Counter[bytes]) -> "Word":
        """The codec of all words counted, the most frequent first, equally frequent ones in the order of their bytes.

        Raises:
            UserError: a word is no UTF-8.
        """
        every = {LINE_END.encode(): 0, UNKNOWN.encode(): 0} | counts
        ordered = sorted(every, key=lambda word: (-every[word], word))
        return cls(tuple(map(_decode_utf8, ordered)))

    @classmethod
    def from_file(cls, content: Any) -> "Word":
        """The codec of a vocabulary file as JSON.

        Raises:
            UserError: it is none.
        """
        return cls(tuple(_strings(content, "words", format_name="ct_audio words")))


@dataclass(frozen=True)
class Subword(_VocabularyCodec):
    """Byte-level byte-pair encoding (BPE): every text can be encoded, and `decode(encode(text))` is `text`.

    Subwords never cross a line feed nor, within a line, a border of GPT-2's pattern (words with the space before them,
    numbers, punctuation). Differs from other codecs: any codes can be decoded, to bytes that need not be UTF-8, and
    `encode(decode(codes))` is `codes` only where `encode` made them.

    Attributes:
        subwords: V of them, in the alphabet of byte-level BPE: one printable character a byte, "Ġ" for the space.
        merges: pairs of subwords in the order in which they are merged.
    """

    subwords: tuple[str, ...] = field(repr=False)
    merges: tuple[tuple[str, str], ...] = field(repr=False)

    name: str = field(default="subword", init=False)
    unit: str = field(default="subword", init=False)

    def __post_init__(self) -> None:
        known = set(self.subwords)
        if len(known) != len(self.subwords):
            raise UserError("codec subword: expected every subword once in the vocabulary")
        if not set(BYTE_OF_CHARACTER) <= known:
            raise UserError("codec subword: expected all 256 bytes in the vocabulary")
        if not all(set(subword) <= BYTE_OF_CHARACTER.keys() and subword for subword in self.subwords):
            raise UserError("codec subword: expected subwords in the alphabet of byte-level BPE")
        for left, right in self.merges:
            if not {left, right, left + right} <= known:
                raise UserError(f"codec subword: merge of {left!r} and {right!r}: expected all three in the vocabulary")

    @property
    def start_code(self) -> int:
        """The code of the line feed."""
        return self.subwords.index(_character(ord("\n")))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return _tokenizer(BPE({subword: code for code, subword in enumerate(self.subwords)}, list(self.merges)))

    @cached_property
    def _pieces(self) -> list[bytes]:
        return [bytes(BYTE_OF_CHARACTER[character] for character in subword) for subword in self.subwords]

    @property
    def _content(self) -> dict[str, Any]:
        merges = [f"{left} {right}" for left, right in self.merges]
        return {"format": "ct_audio subwords", "subwords": list(self.subwords), "merges": merges}

    def encode(self, text: str | bytes, /) -> Int32[np.ndarray, " N"]:
        """Codes of a text.

        Raises:
            UserError: it is no UTF-8.
        """
        text = text if isinstance(text, str) else _decode_utf8(text)
        return np.array(self._tokenizer.encode(text).ids, dtype=np.int32)

    def sorted_by(self, counts: Integer[np.ndarray, " V"]) -> tuple["Subword", Int32[np.ndarray, " V"]]:
        """The same subwords, the most frequent first.

        Returns:
            the codec, and for each code of this one its new code.
        """
        order = np.argsort(-counts, kind="stable")
        new_codes = np.empty(len(order), dtype=np.int32)
        new_codes[order] = np.arange(len(order), dtype=np.int32)
        return Subword(tuple(self.subwords[code] for code in order), self.merges), new_codes

    @classmethod
    def train(cls, blocks: Iterable[bytes], vocab_size: int) -> "Subword":
        """Byte-pair encoding of a text's blocks of lines; the same text gives the same codec.

        Args:
            vocab_size: at most; at least 256.
        Raises:
            UserError: a block is no UTF-8.
        """
        if vocab_size < 256:
            raise UserError(f"subwords: expected a vocabulary of at least 256, got {vocab_size}")
        tokenizer = _tokenizer(BPE())
        alphabet = sorted(BYTE_OF_CHARACTER)
        trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[], show_progress=False)  # type: ignore[call-arg]
        tokenizer.train_from_iterator(map(_decode_utf8, blocks), trainer)
        model = json.loads(tokenizer.to_str())["model"]
        subwords = sorted(model["vocab"], key=model["vocab"].__getitem__)
        return cls(tuple(subwords), tuple((left, right) for left, right in model["merges"]))

    @classmethod
    def from_file(cls, content: Any) -> "Subword":
        """The codec of a vocabulary file as JSON.

        Raises:
            UserError: it is none.
        """
        pairs = [tuple(merge.split(" ")) for merge in _strings(content, "merges", format_name="ct_audio subwords")]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError("codec subword: expected merges of two subwords each")
        subwords = _strings(content, "subwords", format_name="ct_audio subwords")
        return cls(tuple(subwords), tuple((pair[0], pair[1]) for pair in pairs))


def read_vocabulary(description: dict[str, Any], directory: Path) -> Word | Subword:
    """Codec of a description and of the vocabulary file in `directory`.

    Raises:
        UserError: the file is missing, not the one of the description, or no vocabulary.
    """
    name, file = description["name"], directory / VOCABULARY_FILE
    expected = {"name", "vocab_size", "vocabulary", "sha256"}
    if description.keys() != expected or description["vocabulary"] != VOCABULARY_FILE:
        raise UserError(f"codec {name}: expected {', '.join(sorted(expected))}, got {str(description)[:200]}")
    try:
        if file.is_symlink() or file.stat().st_size > MAX_VOCAB_SIZE * 64:
            raise UserError(f"codec {name}: {file} is no plain file, or too large")
        content = read_json(file)
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"codec {name}: cannot read the vocabulary {file}: {error}") from error
    if found != description["sha256"]:
        wanted = str(description["sha256"])[:12]
        raise UserError(f"codec {name}: {file} has sha256 {found[:12]}, expected {wanted}; bring that file back")
    codec = (Word if name == "word" else Subword).from_file(content)
    if codec.vocab_size != description["vocab_size"]:
        raise UserError(f"codec {name}: {file} has {codec.vocab_size} codes, expected {description['vocab_size']!r}")
    return codec


def require_codes(codes: Integer[np.ndarray, "*shape"], vocab_size: int, name: str) -> None:
    """Raise `UserError` where a code is not in 0..vocab_size - 1."""
    if codes.size and (codes.min() < 0 or codes.max() >= vocab_size):
        raise UserError(f"codec {name}: expected codes in 0..{vocab_size - 1}, got {codes.min()}..{codes.max()}")


def _character(byte: int) -> str:
    """Byte-level BPE's printable character of a byte: itself, or one of those from U+0100 on, counted up."""
    hidden = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255)]
    return chr(256 + hidden.index(byte)) if byte in hidden else chr(byte)


BYTE_OF_CHARACTER = {_character(byte): byte for byte in range(256)}


def _tokenizer(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    lines = Split("\n", "merged_with_previous")
    tokenizer.pre_tokenizer = Sequence([lines, ByteLevel(add_prefix_space=False, use_regex=True)])  # type: ignore
    return tokenizer


def _strings(content: Any, key: str, *, format_name: str) -> list[str]:
    if not isinstance(content, dict) or content.get("format") != format_name:
        raise UserError(f"vocabulary: expected a file of format {format_name!r}")
    strings = content.get(key)
    if not isinstance(strings, list) or len(strings) > MAX_VOCAB_SIZE:
        raise UserError(f"vocabulary: expected {key}, a list of at most {MAX_VOCAB_SIZE}")
    if not all(isinstance(string, str) and len(string) <= _MAX_WORD_LENGTH for string in strings):
        raise UserError(f"vocabulary: expected {key}, a list of strings of at most {_MAX_WORD_LENGTH} characters")
    return strings


def _decode_utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        around = raw[max(0, error.start - 10) : error.end + 10]
        raise UserError(f"expected UTF-8, got {around!r}; convert the file to UTF-8") from error
