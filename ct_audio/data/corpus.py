"""A prepared corpus on disk: one memory-mapped `<split>.codes` a split, and `corpus.json` that describes them.

    corpus.json   format version, codec, unit, rate; per split: num_codes, seconds, sha256, document offsets and names,
                  of text its bytes and words; the source and the settings of the preparation
    vocabulary.json   of words or subwords
    train.codes   raw codes, little-endian, one after another without gaps (uint8, or int32 for over 256 codes)

Nothing is pickled; whatever is read is checked. Shape letters: N codes, R documents (recordings).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json, sync_directory, write_json
from ct_audio.data.codecs import Codec, codec_from_json, write_codec_files

FORMAT = "ct_audio corpus"
FORMAT_VERSION = 1
_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Split:
    """One split of a corpus.

    Attributes:
        name: as "train", "valid", "test".
        codes: [N] read-only memory map, uint8 or int32.
        document_offsets: [R] where each document starts; the first is 0, strictly increasing.
        document_names: R names.
        sha256: of the file of codes, as corpus.json states it.
        sample_rate_hz: codes a second; None for text.
        num_bytes: of the text; None for audio.
        num_words: of the text, that word-level perplexity is counted in: exp(NLL of the split / num_words); None for
            audio.
    """

    name: str
    codes: Integer[np.ndarray, " N"]
    document_offsets: Int64[np.ndarray, " R"]
    document_names: tuple[str, ...]
    sha256: str
    sample_rate_hz: int | None
    num_bytes: int | None = None
    num_words: int | None = None

    @property
    def num_codes(self) -> int:
        """Length in codes."""
        return len(self.codes)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus that has been opened and checked.

    Attributes:
        path: its directory.
        codec: turns its codes back into audio or text.
        splits: by name.
        description: corpus.json as it is, without the documents.
    """

    path: Path
    codec: Codec
    splits: dict[str, Split]
    description: dict[str, Any] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Hash over the codec and the sha256 of every split: equal if and only if the codes are."""
        parts = [json.dumps(self.codec.to_json(), sort_keys=True)]
        parts += [f"{name} {split.sha256}" for name, split in sorted(self.splits.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def split(self, name: str) -> Split:
        """A split by its name.

        Raises:
            UserError: there is none of that name; the message lists those that there are.
        """
        if name not in self.splits:
            advice = f"; recipes/folder makes it with --overwrite -- --{name}-percent 5" if name != "train" else ""
            raise UserError(
                f"corpus {self.path} has no split {name!r}; expected one of {', '.join(sorted(self.splits))}{advice}"
            )
        return self.splits[name]


def open_corpus(path: str | Path, *, verify: bool = False) -> Corpus:
    """Open a prepared corpus and check that it is whole.

    Args:
        path: directory that holds corpus.json.
        verify: also read all codes and compare their sha256 (seconds a GiB); without it sizes alone are compared.
    Raises:
        UserError: something is missing, left over, of the wrong size or version, or not what corpus.json says.
    """
    path = Path(path)
    description = _read_description(path)
    try:
        codec = codec_from_json(description.get("codec"), path)
    except UserError as error:
        raise _damaged(path, str(error)) from error
    entries = description.get("splits")
    if not isinstance(entries, dict) or not entries:
        raise _damaged(path, "expected splits, a mapping of at least one")
    splits = {name: _open_split(path, name, entry, codec) for name, entry in entries.items()}
    left_over = sorted({file.name for file in path.glob("*.codes")} - {f"{name}.codes" for name in splits})
    if left_over:
        raise _damaged(path, f"files that it does not name: {', '.join(left_over)}")
    if verify:
        for split in splits.values():
            _verify_split(path, split, codec)
    return Corpus(path, codec, splits, {key: value for key, value in description.items() if key != "splits"})


class CorpusWriter:
    """Writes a corpus beside its place and renames it at the end: what is there is whole.

    Args:
        path: directory that `finish` makes.
        codec: of the codes.
        source: where the data comes from, for corpus.json.
        preparation: settings, for corpus.json; must say in which order documents come.
        work_dir: where to write; default `path` + ".partial". What lies there is deleted first.
    """

    def __init__(
        self,
        path: str | Path,
        codec: Codec,
        *,
        source: dict[str, Any],
        preparation: dict[str, Any],
        work_dir: str | Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.work_dir = Path(work_dir) if work_dir else self.path.with_name(self.path.name + ".partial")
        self._codec = codec
        self._header = {"source": source, "preparation": preparation}
        self.dtype = code_dtype(codec)
        self._splits: dict[str, _SplitInProgress] = {}
        shutil.rmtree(self.work_dir, ignore_errors=True)
        self.work_dir.mkdir(parents=True)

    def add_document(
        self, split: str, name: str, codes: Integer[np.ndarray, " N"], *, num_bytes: int = 0, num_words: int = 0
    ) -> None:
        """Append a document to a split.

        Args:
            num_bytes, num_words: of a text; see `Split`.
        Raises:
            UserError: the split's name is no plain word, the document is empty, or a code is not of the codec.
        """
        if not _SPLIT_NAME.fullmatch(split):
            raise UserError(f"split {split!r}: expected a name of letters, digits, _ and -")
        if not len(codes):
            raise UserError(f"document {name!r} is empty; leave it out")
        checked = self._checked(name, codes)
        if split not in self._splits:
            self._splits[split] = _SplitInProgress(self.work_dir / f"{split}.codes")
        self._splits[split].begin(name, num_bytes=num_bytes, num_words=num_words)
        self._splits[split].extend(checked)

    def extend_document(self, split: str, codes: Integer[np.ndarray, " N"]) -> None:
        """Append codes to the last document of a split: for documents that are never held in memory.

        Raises:
            UserError: a code is not of the codec.
        """
        self._splits[split].extend(self._checked(self._splits[split].names[-1], codes))

    def _checked(self, name: str, codes: np.ndarray) -> np.ndarray:
        last = self._codec.vocab_size - 1
        if codes.size and (codes.min() < 0 or codes.max() > last):
            raise UserError(f"document {name!r}: expected codes in 0..{last}, got {codes.min()}..{codes.max()}")
        return codes.astype(self.dtype)

    def describe(self) -> dict[str, Any]:
        """What corpus.json will say."""
        rate = self._codec.sample_rate_hz
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "codec": self._codec.to_json(),
            "unit": self._codec.unit,
            "sample_rate_hz": rate,
            **self._header,
            "splits": {
                name: {
                    "file": f"{name}.codes",
                    "dtype": self.dtype.name,
                    "num_codes": split.num_codes,
                    "seconds": round(split.num_codes / rate, 3) if rate else None,
                    "sha256": split.sha256.hexdigest(),
                    **({} if rate else {"num_bytes": split.num_bytes, "num_words": split.num_words}),
                    "num_documents": len(split.names),
                    "document_offsets": split.offsets,
                    "document_names": split.names,
                }
                for name, split in sorted(self._splits.items())
            },
        }

    def finish(self, *, overwrite: bool = False) -> None:
        """Write corpus.json and move the directory to its place.

        Raises:
            UserError: no document was added, or `path` exists and `overwrite` is False.
        """
        if not self._splits:
            raise UserError(f"corpus {self.path}: there is no document to write")
        if self.path.exists() and not overwrite:
            raise UserError(f"{self.path} exists; choose another directory, or pass --overwrite")
        for split in self._splits.values():
            split.sync()
        write_codec_files(self._codec, self.work_dir)
        write_json(self.work_dir / "corpus.json", self.describe())
        move_directory(self.work_dir, self.path)


def move_directory(source: Path, target: Path) -> None:
    """Rename a finished directory to its place; what was there is moved aside first and deleted last.

    Raises:
        OSError: it cannot be renamed; what was there is back in its place.
    """
    aside = target.with_name(target.name + ".replaced")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    try:
        source.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    sync_directory(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


class _SplitInProgress:
    def __init__(self, file: Path) -> None:
        self.names: list[str] = []
        self.offsets: list[int] = []
        self.num_codes = self.num_bytes = self.num_words = 0
        self.sha256 = hashlib.sha256()
        self._file = file

    def begin(self, name: str, *, num_bytes: int, num_words: int) -> None:
        self.names.append(name)
        self.offsets.append(self.num_codes)
        self.num_bytes += num_bytes
        self.num_words += num_words

    def extend(self, codes: np.ndarray) -> None:
        raw = codes.tobytes()
        try:
            with self._file.open("ab") as handle:
                handle.write(raw)
        except OSError as error:
            error.filename = str(self._file)
            raise
        self.sha256.update(raw)
        self.num_codes += len(codes)

    def sync(self) -> None:
        with self._file.open("rb") as handle:
            os.fsync(handle.fileno())


def _read_description(path: Path) -> dict[str, Any]:
    file = path / "corpus.json"
    if not file.is_file():
        raise UserError(
            f"{path.absolute()} is no prepared corpus: there is no corpus.json in it; make one with ct-audio prepare"
        )
    try:
        description = read_json(file)
    except (OSError, ValueError) as error:
        raise _damaged(path, f"not readable as JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise _damaged(path, f"expected format {FORMAT!r} at the top level")
    if description.get("format_version") != FORMAT_VERSION:
        raise _damaged(path, f"expected format_version {FORMAT_VERSION}, got {description.get('format_version')!r}")
    for key in ("source", "preparation"):
        if not isinstance(description.get(key, {}), dict):
            raise _damaged(path, f"expected {key}, a mapping")
    return description


def _open_split(path: Path, name: str, entry: Any, codec: Codec) -> Split:
    if not _SPLIT_NAME.fullmatch(name):
        raise _damaged(path, f"split {name!r}: expected a name of letters, digits, _ and -")
    expected = {"file": f"{name}.codes", "dtype": code_dtype(codec).name}
    if not isinstance(entry, dict) or any(entry.get(key) != value for key, value in expected.items()):
        raise _damaged(path, f"split {name}: expected {expected}")
    num_codes, sha256 = entry.get("num_codes"), entry.get("sha256")
    if type(num_codes) is not int or num_codes < 1:
        raise _damaged(path, f"split {name}: expected num_codes of at least 1, got {num_codes!r}")
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise _damaged(path, f"split {name}: expected sha256 as 64 hexadecimal digits, got {sha256!r}")
    offsets, names = _check_documents(path, name, entry, num_codes)
    file = path / f"{name}.codes"
    if not file.is_file() or file.is_symlink():
        raise _damaged(path, f"{file.name} is missing or no plain file")
    num_bytes, found = num_codes * code_dtype(codec).itemsize, file.stat().st_size
    if found != num_bytes:
        raise _damaged(path, f"{file.name}: expected {num_bytes} bytes, got {found}")
    codes = np.memmap(file, dtype=code_dtype(codec), mode="r", shape=(num_codes,))
    counts = {} if codec.sample_rate_hz else _text_counts(path, name, entry)
    return Split(name, codes, offsets, names, sha256, codec.sample_rate_hz, **counts)


def _text_counts(path: Path, name: str, entry: dict[str, Any]) -> dict[str, int]:
    counts = {key: entry.get(key) for key in ("num_bytes", "num_words")}
    for key, value in counts.items():
        if type(value) is not int or not 0 <= value < 2**63:
            raise _damaged(path, f"split {name}: expected {key} as a whole number of at least 0, got {value!r}")
    return counts  # type: ignore[return-value]


def _check_documents(
    path: Path, name: str, entry: dict[str, Any], num_codes: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    offsets, names = entry.get("document_offsets"), entry.get("document_names")
    if not isinstance(offsets, list) or not isinstance(names, list) or len(offsets) != len(names):
        raise _damaged(path, f"split {name}: expected document_offsets and document_names, lists of one length")
    if not all(isinstance(document, str) for document in names):
        raise _damaged(path, f"split {name}: expected strings as document_names")
    if not offsets or any(type(offset) is not int for offset in offsets) or offsets[0] != 0:
        raise _damaged(path, f"split {name}: expected whole numbers as document_offsets, the first of them 0")
    if any(after <= before for before, after in zip(offsets, [*offsets[1:], num_codes], strict=True)):
        raise _damaged(path, f"split {name}: expected document_offsets that increase and stay below {num_codes}")
    return np.array(offsets, dtype=np.int64), tuple(names)


def _verify_split(path: Path, split: Split, codec: Codec) -> None:
    digest = hashlib.sha256()
    for block in _blocks(path / f"{split.name}.codes"):
        digest.update(block)
        codes = np.frombuffer(block, dtype=split.codes.dtype)
        if codes.min() < 0 or codes.max() >= codec.vocab_size:
            raise _damaged(path, f"{split.name}.codes: expected codes in 0..{codec.vocab_size - 1}")
    if digest.hexdigest() != split.sha256:
        raise _damaged(path, f"{split.name}.codes: expected sha256 {split.sha256}, got {digest.hexdigest()}")


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as handle:
        while block := handle.read(_BLOCK_BYTES):
            yield block


def code_dtype(codec: Codec) -> np.dtype:
    """Of the codes on disk: uint8, or little-endian int32 for over 256 codes."""
    return np.dtype(np.uint8) if codec.vocab_size <= 256 else np.dtype("<i4")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"corpus {path}: corpus.json does not fit: {what}; prepare it again with ct-audio prepare")
