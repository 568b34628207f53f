"""Preparation of texts: files, or parts of them, -> codes -> corpus; streamed, parallel, resumable.

Texts go in shards of some megabytes through worker processes; their codes lie in OUT.partial until all are there; then
the corpus is put together and renamed to OUT. Nothing larger than a shard is held in memory: a text is read in blocks
of whole lines, which every text codec encodes as it does the whole (`encode(a + b)` is `encode(a)` and `encode(b)`
where `a` ends with a line feed). Shape letters: N codes.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer
from tqdm import tqdm

from ct_audio.codec import Codec, codec_from_json
from ct_audio.corpus import Corpus, CorpusWriter, code_dtype, open_corpus
from ct_audio.errors import UserError
from ct_audio.files import hold_alone, read_json, write_file
from ct_audio.preparation import existing_corpus, run_tasks

PREPARATION_VERSION = 1
SHARD_BYTES = 8 << 20
_BLOCK_BYTES = 1 << 20
_BLOCK_CODES = 1 << 20


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


def whole_file(path: Path, split: str, name: str) -> Text:
    """A file as one text."""
    return Text(path, split, name, 0, path.stat().st_size)


@dataclass(frozen=True)
class TextSettings:
    """How texts become codes.

    Attributes:
        codec: name of a text codec.
    """

    codec: str

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the codes of a text."""
        fixed = {
            "preparation_version": PREPARATION_VERSION,
            "document_order": "as the recipe lists them, within a split",
            "words": "separated by ASCII white space",
        }
        return asdict(self) | fixed


def read_blocks(text: Text, *, block_bytes: int = _BLOCK_BYTES) -> Iterator[bytes]:
    """A text in blocks, each but the last one ending with a line feed (a longer line is held as a whole).

    Raises:
        UserError: the file ends before the text does.
    """
    rest, left = b"", text.end - text.begin
    with text.path.open("rb") as handle:
        handle.seek(text.begin)
        while left:
            block = handle.read(min(left, block_bytes))
            if not block:
                raise UserError(f"{text.path}: expected {text.end} bytes, it has become shorter; run the command again")
            left -= len(block)
            block = rest + block
            cut = block.rfind(b"\n") + 1 if left else len(block)
            rest = block[cut:]
            if cut:
                yield block[:cut]


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
        overwrite: replace a corpus that stands at `out` and was made otherwise.
    Returns:
        the corpus, opened, and whether it was there already.
    Raises:
        UserError: nothing to prepare, a text that is not of the codec, or `out` is taken.
    """
    out, listed = Path(out), [text for text in texts if text.end > text.begin]
    if not listed:
        raise UserError("there is nothing to prepare: the recipe found no text")
    listed.sort(key=lambda text: text.split)  # stable
    source = source | {"num_texts": len(listed), "listing_sha256": _hash_listing(listed)}
    partial = out.with_name(out.name + ".partial")
    there = existing_corpus(out, source, settings.to_json(), overwrite=overwrite)
    if there is not None and not partial.exists():
        return there, True
    partial.mkdir(parents=True, exist_ok=True)
    busy = f"another process is preparing into {partial}; wait for it, or choose another --out"
    with hold_alone(partial / "lock", busy):
        there = existing_corpus(out, source, settings.to_json(), overwrite=overwrite)
        if there is None:
            (partial / "shards").mkdir(exist_ok=True)
            codec = codec_from_json({"name": settings.codec})
            shards = _encode(listed, partial / "shards", codec, settings, num_processes)
            _assemble(shards, codec, partial, out, settings, source)
        shutil.rmtree(partial, ignore_errors=True)
    return open_corpus(out), there is not None


@dataclass(frozen=True)
class _Shard:
    """Consecutive texts of one split, and where their codes go."""

    texts: tuple[Text, ...]
    target: Path
    codec: Codec
    settings: TextSettings


@dataclass(frozen=True)
class _Result:
    """Codes and words of each text of a shard; checksum of the file of codes."""

    num_codes: tuple[int, ...]
    num_words: tuple[int, ...]
    crc32: int


def _encode(
    texts: list[Text], directory: Path, codec: Codec, settings: TextSettings, num_processes: int
) -> list[tuple[_Shard, _Result]]:
    shards = [_Shard(tuple(part), directory / f"{i:06d}", codec, settings) for i, part in enumerate(_group(texts))]
    results = {index: result for index, shard in enumerate(shards) if (result := _reusable(shard)) is not None}
    todo = {index: shard for index, shard in enumerate(shards) if index not in results}
    sizes = [sum(text.end - text.begin for text in shard.texts) for shard in shards]
    num_processes = min(num_processes, -(-sum(sizes) // SHARD_BYTES))  # a process takes seconds to start
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="encode", disable=None) as progress:
        progress.update(sum(sizes[index] for index in results))
        for index, result in run_tasks(_encode_shard, todo, num_processes, preload=["ct_audio.prepare_text"]):
            results[index] = result
            progress.update(sizes[index])
    return [(shard, results[index]) for index, shard in enumerate(shards)]


def _group(texts: list[Text]) -> Iterator[list[Text]]:
    """Consecutive texts of one split, together at least SHARD_BYTES where there are as many."""
    part: list[Text] = []
    for text in texts:
        if part and (text.split != part[0].split or sum(t.end - t.begin for t in part) >= SHARD_BYTES):
            yield part
            part = []
        part.append(text)
    yield part


def _encode_shard(shard: _Shard) -> _Result:
    """Codes of a shard's texts, one after another, in `target`.codes; what is known of them in `target`.json."""
    key, dtype, crc32 = _key(shard), code_dtype(shard.codec), 0
    num_codes, num_words = [0] * len(shard.texts), [0] * len(shard.texts)
    with shard.target.with_suffix(".codes").open("wb") as handle:  # the JSON file is what makes it count
        for index, text in enumerate(shard.texts):
            for block in read_blocks(text):
                codes = _encode_block(shard.codec, block, text)
                raw = codes.astype(dtype).tobytes()
                handle.write(raw)
                crc32 = zlib.crc32(raw, crc32)
                num_codes[index] += len(codes)
                num_words[index] += _count_words(block, shard.settings)
    result = _Result(tuple(num_codes), tuple(num_words), crc32)
    record = json.dumps({"key": key, "result": asdict(result)})
    write_file(shard.target.with_suffix(".json"), record.encode(), sync=False)
    return result


def _encode_block(codec: Codec, block: bytes, text: Text) -> Integer[np.ndarray, "N"]:
    try:
        return codec.encode(block)
    except UserError as error:
        raise UserError(f"{text.path}, in {text.name!r}: {error}") from error


def _count_words(block: bytes, settings: TextSettings) -> int:
    return len(block.split())


def _reusable(shard: _Shard) -> _Result | None:
    """What an interrupted run left of a shard, if texts and settings are still the same."""
    try:
        record = read_json(shard.target.with_suffix(".json"))
        if record["key"] != json.loads(json.dumps(_key(shard))):
            return None
        found = record["result"]
        result = _Result(tuple(found["num_codes"]), tuple(found["num_words"]), found["crc32"])
        size = shard.target.with_suffix(".codes").stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None
    return result if size == sum(result.num_codes) * code_dtype(shard.codec).itemsize else None


def _key(shard: _Shard) -> dict[str, Any]:
    parts = []
    for text in shard.texts:
        try:
            status = text.path.stat()
        except OSError as error:
            raise UserError(f"cannot read {text.path}: {error.strerror}") from error
        parts.append([text.split, text.name, text.begin, text.end, status.st_size, status.st_mtime_ns])
    texts = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return {"texts": texts, "settings": shard.settings.to_json(), "codec": shard.codec.to_json()}


def _assemble(
    shards: list[tuple[_Shard, _Result]],
    codec: Codec,
    partial: Path,
    out: Path,
    settings: TextSettings,
    source: dict[str, Any],
) -> None:
    writer = CorpusWriter(out, codec, source=source, preparation=settings.to_json(), work_dir=partial / "corpus")
    for shard, result in tqdm(shards, unit="shard", desc="write", disable=None):
        codes, offset = _read_codes(shard, result), 0
        for text, num_codes, num_words in zip(shard.texts, result.num_codes, result.num_words, strict=True):
            if not num_codes:
                continue  # nothing but white space, for words
            part, offset = codes[offset : offset + num_codes], offset + num_codes
            counts = {"num_bytes": text.end - text.begin, "num_words": num_words}
            writer.add_document(text.split, text.name, part[:_BLOCK_CODES], **counts)
            for begin in range(_BLOCK_CODES, num_codes, _BLOCK_CODES):
                writer.extend_document(text.split, part[begin : begin + _BLOCK_CODES])
    writer.finish(overwrite=True)  # `existing_corpus` has seen what is there


def _read_codes(shard: _Shard, result: _Result) -> Integer[np.ndarray, "N"]:
    """Memory map of a shard's codes, checked."""
    file, dtype, crc32 = shard.target.with_suffix(".codes"), code_dtype(shard.codec), 0
    num_codes = sum(result.num_codes)
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


def _hash_listing(texts: list[Text]) -> str:
    """Hash over names, splits and places: tells whether texts were added, changed or moved to another split."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{text.split}\t{text.name}\t{text.begin}\t{text.end}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
