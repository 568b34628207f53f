"""Preparation of texts: files, or parts of them, -> codes -> corpus; streamed, parallel, resumable.

The vocabulary, where the codec has one, is made from the training split. Texts go in shards of some megabytes through
worker processes; their codes lie in OUT.partial until all are there; then the corpus is put together and renamed to
OUT. Texts are read in blocks of whole lines, which every text codec encodes as it does the whole: no text is ever held
in memory.

The corpus's `source` says what was prepared: a hash over names, splits and places of the texts, and one over their
bytes, `content_sha256`, taken while they are encoded. A finished corpus is current if both are the same; the second is
taken only where all else is, and reads every byte (about 6 s a GB), since times of files change when they are copied,
and need not when they are written. Shards of an interrupted run, which nobody keeps, go by sizes and times.

Shape letters: N codes, V codes of the vocabulary.
"""

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json, write_file, write_json
from ct_audio.common.progress import Progress
from ct_audio.data.codecs import VOCABULARY_CODECS, Codec, codec_from_json, write_codec_files
from ct_audio.data.corpus import Corpus, CorpusWriter, code_dtype
from ct_audio.data.vocabulary_codecs import Subword, Word
from ct_audio.preparation.listing import warn
from ct_audio.preparation.text_blocks import Text, as_words, hash_texts, read_blocks
from ct_audio.preparation.workers import CONTENT_KEY, existing_corpus, join_hashes, prepare_once, run_tasks

PREPARATION_VERSION = 1
SHARD_BYTES = 8 << 20
_VOCABULARY_BLOCK_BYTES = 1 << 16  # the tokenizers library holds 256 at a time
_BLOCK_CODES = 1 << 20


@dataclass(frozen=True)
class TextSettings:
    """How texts become codes.

    Attributes:
        codec: name of a text codec.
        vocab_size: of subwords, at most; None for other codecs, bytes having 256 and words all that occur.
    """

    codec: str
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if (self.codec == "subword") != (self.vocab_size is not None):
            raise UserError(f"codec {self.codec}: expected a vocab_size for subwords only, got {self.vocab_size}")

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the codes of a text."""
        fixed = {
            "preparation_version": PREPARATION_VERSION,
            "document_order": "as the recipe lists them, within a split",
            "words": "separated by ASCII white space" + (", and line ends" if self.codec == "word" else ""),
        }
        return asdict(self) | fixed


def prepare_text(
    texts: Sequence[Text],
    out: str | Path,
    *,
    settings: TextSettings,
    source: dict[str, Any],
    num_processes: int = 1,
    overwrite: bool = False,
) -> tuple[Corpus, bool]:
    """Prepare texts into a corpus at `out`; the same texts and settings give the same bytes, however many processes.

    Args:
        texts: documents in their order; empty ones are left out.
        source: where the texts come from, for corpus.json; `path` in it may differ between runs.
        overwrite: replace the corpus that stands at `out`.
    Returns:
        the corpus, opened, and whether it was there already.
    Raises:
        UserError: nothing to prepare, a text that is not of the codec, or `out` is taken: by something else, or by what
            these texts held before they changed.
    """
    out, listed = Path(out), [text for text in texts if text.num_bytes]
    if not listed:
        raise UserError("there is nothing to prepare: the recipe found no text")
    listed.sort(key=lambda text: text.split)  # stable
    source = source | {"num_texts": len(listed), "listing_sha256": _hash_listing(listed)}
    content_hash = cache(lambda: hash_texts(listed))

    def find_current() -> Corpus | None:
        return existing_corpus(out, source, settings.to_json(), content_hash=content_hash, overwrite=overwrite)

    def make(partial: Path) -> None:  # in place of what `find_current` saw
        _make_corpus(listed, out, partial, settings, source, num_processes)

    return prepare_once(out, find_current, make)


def _make_corpus(
    texts: list[Text], out: Path, partial: Path, settings: TextSettings, source: dict[str, Any], num_processes: int
) -> None:
    """Go on from what lies in `partial`; the corpus replaces what is at `out`."""
    (partial / "shards").mkdir(exist_ok=True)
    codec = _make_codec(texts, partial, settings, num_processes)
    shards = _encode(texts, partial, codec, settings, num_processes)
    codec, new_codes = _sort_codec(codec, shards)
    _warn_of_copies(shards)
    source = source | {CONTENT_KEY: join_hashes([found for _, result in shards for found in result.sha256])}
    writer = CorpusWriter(out, codec, source=source, preparation=settings.to_json(), work_dir=partial / "corpus")
    _assemble(shards, writer, new_codes)
    writer.finish(overwrite=True)


def _make_codec(texts: list[Text], partial: Path, settings: TextSettings, num_processes: int) -> Codec:
    """The codec; a vocabulary is made from the training texts, and kept in `partial`."""
    if settings.codec not in VOCABULARY_CODECS:
        return codec_from_json({"name": settings.codec})
    train = [text for text in texts if text.split == "train"]
    if not train:
        raise UserError("there is no text of the split train, which the vocabulary is made from")
    key = {"texts": _hash_files(train), "settings": settings.to_json()}
    try:
        record = read_json(partial / "codec.json")
        if record["key"] == json.loads(json.dumps(key)):
            return codec_from_json(record["codec"], partial)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        pass  # made again
    os.environ.setdefault("RAYON_NUM_THREADS", str(num_processes))  # of the tokenizers library
    with Progress(
        total=sum(text.num_bytes for text in train), unit="B", unit_scale=True, desc="vocabulary"
    ) as progress:
        blocks = _read_train(train, progress)
        if settings.vocab_size is not None:
            codec = Subword.train(blocks, settings.vocab_size)
        else:
            counts: Counter[bytes] = Counter()
            for block in blocks:
                counts.update(as_words(block))
            codec = Word.from_counts(counts)
    write_codec_files(codec, partial)
    write_json(partial / "codec.json", {"key": key, "codec": codec.to_json()})
    return codec


def _read_train(texts: list[Text], progress: Progress) -> Iterator[bytes]:
    for text in texts:
        for block in read_blocks(text, block_bytes=_VOCABULARY_BLOCK_BYTES, utf8=True):
            yield block
            progress.update(len(block))


@dataclass(frozen=True)
class _Shard:
    """Consecutive texts of one split, and where their codes go.

    Attributes:
        codec: its description as JSON; the codec is read from `directory`, once a process.
    """

    texts: tuple[Text, ...]
    target: Path
    codec: str
    directory: Path
    settings: TextSettings


@lru_cache(maxsize=1)
def _load_codec(description: str, directory: Path) -> Codec:
    return codec_from_json(json.loads(description), directory)


@dataclass(frozen=True)
class _Result:
    """Codes, words and SHA-256 of each text of a shard; checksum of the file of codes."""

    num_codes: tuple[int, ...]
    num_words: tuple[int, ...]
    sha256: tuple[str, ...]
    crc32: int


def _encode(
    texts: list[Text], partial: Path, codec: Codec, settings: TextSettings, num_processes: int
) -> list[tuple[_Shard, _Result]]:
    description = json.dumps(codec.to_json())
    shards = [
        _Shard(tuple(part), partial / "shards" / f"{index:06d}", description, partial, settings)
        for index, part in enumerate(_group(texts))
    ]
    results = {
        index: result
        for index, shard in enumerate(shards)
        if (result := _reusable(shard, code_dtype(codec))) is not None
    }
    todo = {index: shard for index, shard in enumerate(shards) if index not in results}
    sizes = [sum(text.num_bytes for text in shard.texts) for shard in shards]
    num_processes = min(num_processes, -(-sum(sizes) // SHARD_BYTES))  # a process takes seconds to start
    with Progress(total=sum(sizes), unit="B", unit_scale=True, desc="encode") as progress:
        progress.update(sum(sizes[index] for index in results))
        for index, result in run_tasks(_encode_shard, todo, num_processes, preload=["ct_audio.preparation.texts"]):
            results[index] = result
            progress.update(sizes[index])
    return [(shard, results[index]) for index, shard in enumerate(shards)]


def _group(texts: list[Text]) -> Iterator[list[Text]]:
    """Consecutive texts of one split, together at least SHARD_BYTES where there are as many."""
    part: list[Text] = []
    num_bytes = 0
    for text in texts:
        if part and (text.split != part[0].split or num_bytes >= SHARD_BYTES):
            yield part
            part, num_bytes = [], 0
        part.append(text)
        num_bytes += text.num_bytes
    yield part


def _encode_shard(shard: _Shard) -> _Result:
    """Codes of a shard's texts, one after another, in `target`.codes; what is known of them in `target`.json."""
    codec = _load_codec(shard.codec, shard.directory)
    key, dtype, crc32 = _key(shard), code_dtype(codec), 0
    num_codes, num_words = [0] * len(shard.texts), [0] * len(shard.texts)
    hashes = [hashlib.sha256() for _ in shard.texts]
    with shard.target.with_suffix(".codes").open("wb") as handle:  # the JSON file is what makes it count
        for index, text in enumerate(shard.texts):
            for block in read_blocks(text, utf8=codec.name != "byte"):
                hashes[index].update(block)
                codes = codec.encode(block)
                raw = codes.astype(dtype).tobytes()
                handle.write(raw)
                crc32 = zlib.crc32(raw, crc32)
                num_codes[index] += len(codes)
                num_words[index] += len(codes) if codec.name == "word" else len(block.split())
    result = _Result(tuple(num_codes), tuple(num_words), tuple(each.hexdigest() for each in hashes), crc32)
    record = json.dumps({"key": key, "result": asdict(result)})
    write_file(shard.target.with_suffix(".json"), record.encode(), sync=False)
    return result


def _warn_of_copies(shards: list[tuple[_Shard, _Result]]) -> None:
    """Say which held-out texts are in train too: they stay, since a data set of text brings its own splits."""
    train: dict[str, str] = {}
    held_out: list[tuple[str, Text]] = []
    for shard, result in shards:
        for text, sha256 in zip(shard.texts, result.sha256, strict=True):
            if text.split == "train":
                train.setdefault(sha256, text.name)
            else:
                held_out.append((sha256, text))
    copies = [(text, train[sha256]) for sha256, text in held_out if sha256 in train]
    if copies:
        text, name = copies[0]
        warn(
            f"{len(copies)} held-out texts are in train too, byte by byte, as {text.name!r} of {text.split}, which is "
            f"{name!r} there; remove one of the two files, or scores of {text.split} say too little"
        )


def _reusable(shard: _Shard, dtype: np.dtype) -> _Result | None:
    """What an interrupted run left of a shard, if texts and settings are still the same."""
    try:
        record = read_json(shard.target.with_suffix(".json"))
        if record["key"] != json.loads(json.dumps(_key(shard))):
            return None
        found = record["result"]
        result = _Result(tuple(found["num_codes"]), tuple(found["num_words"]), tuple(found["sha256"]), found["crc32"])
        size = shard.target.with_suffix(".codes").stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None
    return result if size == sum(result.num_codes) * dtype.itemsize else None


def _key(shard: _Shard) -> dict[str, Any]:
    return {"texts": _hash_files(shard.texts), "settings": shard.settings.to_json(), "codec": shard.codec}


def _hash_files(texts: Sequence[Text]) -> str:
    """Hash over texts and over the sizes and times of their files."""
    digest, found = hashlib.sha256(_hash_listing(texts).encode()), {}
    for text in texts:
        if text.path not in found:
            try:
                status = text.path.stat()
            except OSError as error:
                raise UserError(f"cannot read {text.path}: {error.strerror}") from error
            found[text.path] = f"{status.st_size} {status.st_mtime_ns}\n".encode()
        digest.update(found[text.path])
    return digest.hexdigest()


def _sort_codec(codec: Codec, shards: list[tuple[_Shard, _Result]]) -> tuple[Codec, Int32[np.ndarray, " V"] | None]:
    """Subwords sorted by how often training has them, and the new code of each; other codecs as they are."""
    if not isinstance(codec, Subword):
        return codec, None
    counts = np.zeros(codec.vocab_size, dtype=np.int64)
    for shard, result in shards:
        if shard.texts[0].split == "train":
            codes = _read_codes(shard, result, code_dtype(codec))
            for begin in range(0, len(codes), _BLOCK_CODES):
                counts += np.bincount(codes[begin : begin + _BLOCK_CODES], minlength=codec.vocab_size)
    return codec.sorted_by(counts)


def _assemble(
    shards: list[tuple[_Shard, _Result]], writer: CorpusWriter, new_codes: Int32[np.ndarray, " V"] | None
) -> None:
    """Write all texts in their order; `new_codes` maps their codes to the corpus's."""
    for shard, result in Progress(shards, unit="shard", desc="write"):
        codes, offset = _read_codes(shard, result, writer.dtype), 0
        for text, num_codes, num_words in zip(shard.texts, result.num_codes, result.num_words, strict=True):
            for begin in range(offset, offset + num_codes, _BLOCK_CODES):
                part = codes[begin : min(begin + _BLOCK_CODES, offset + num_codes)]
                part = part if new_codes is None else new_codes[part]
                if begin == offset:
                    counts = {"num_bytes": text.num_bytes, "num_words": num_words}
                    writer.add_document(text.split, text.name, part, **counts)
                else:
                    writer.extend_document(text.split, part)
            offset += num_codes


def _read_codes(shard: _Shard, result: _Result, dtype: np.dtype) -> Integer[np.ndarray, " N"]:
    """Memory map of a shard's codes, checked."""
    file, num_codes, crc32 = shard.target.with_suffix(".codes"), sum(result.num_codes), 0
    if not num_codes:
        return np.zeros(0, dtype)
    if file.stat().st_size == num_codes * dtype.itemsize:
        codes = np.memmap(file, dtype=dtype, mode="r", shape=(num_codes,))
        for begin in range(0, num_codes, _BLOCK_CODES):
            crc32 = zlib.crc32(codes[begin : begin + _BLOCK_CODES].tobytes(), crc32)
        if crc32 == result.crc32:
            return codes
    shard.target.with_suffix(".json").unlink()
    raise UserError(f"{file} was damaged since it was written; run the same command again")


def _hash_listing(texts: Sequence[Text]) -> str:
    """Hash over names, splits and places: tells whether texts were added, changed in size or moved to another split."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{text.split}\t{text.name}\t{text.begin}\t{text.end}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
