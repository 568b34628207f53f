"""Preparation of texts: the same corpus as a few plain lines make, whatever is interrupted, and decoded back."""

import hashlib
import itertools
import json
import os

import numpy as np
import pytest
from recordings import count_calls

from ct_audio.common.errors import UserError
from ct_audio.common.files import hold_alone, write_json
from ct_audio.data.corpus import open_corpus
from ct_audio.preparation import texts as module
from ct_audio.preparation.text_blocks import (
    Text,
    hash_texts,
    read_blocks,
    require_decodes_back,
    whole_file,
)
from ct_audio.preparation.text_tables import statistics_table, vocabulary_table
from ct_audio.preparation.texts import TextSettings, prepare_text
from ct_audio.preparation.workers import join_hashes

SETTINGS = {
    "byte": TextSettings("byte"),
    "word": TextSettings("word"),
    "subword": TextSettings("subword", vocab_size=290),
}


def make_texts(folder, num=7):
    """Small books of different lengths, one of them empty, one without an end of its last line."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    vocabulary = ["the", "cat", "sat", "Ärger", "猫", "on,", "a", "mat."]
    texts = []
    for number in range(num):
        lines = [" ".join(rng.choice(vocabulary, size=int(rng.integers(0, 9)))) for _ in range(40 * number)]
        file = folder / f"{number}.txt"
        file.write_bytes("\n".join(lines).encode() + b"\n" * (number % 2))
        texts.append(whole_file(file, ("train", "valid", "test")[max(0, number - 4)], f"book {number}"))
    return texts


def run(texts, out, codec="subword", **options):
    """Prepare with the usual settings."""
    return prepare_text(texts, out, settings=SETTINGS[codec], source={"recipe": "x", "path": "y"}, **options)


def contents(folder):
    """Every file of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def small_parts(monkeypatch):
    """Shards and blocks so small that these texts have many."""
    monkeypatch.setattr(module, "SHARD_BYTES", 2000)
    monkeypatch.setattr(module, "_BLOCK_CODES", 100)


@pytest.mark.parametrize("codec", sorted(SETTINGS))
def test_the_corpus_holds_the_texts(tmp_path, codec, small_parts):
    texts = make_texts(tmp_path / "in")
    corpus, was_there = run(texts, tmp_path / "out", codec)
    assert not was_there
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out"]
    corpus = open_corpus(tmp_path / "out", verify=True)
    assert corpus.split("train").document_names == ("book 1", "book 2", "book 3", "book 4")
    for split in corpus.splits.values():
        raw = [text.path.read_bytes() for text in texts if text.split == split.name]
        expected = [corpus.codec.encode(part) for part in raw if part]  # each text at once
        assert split.codes.tolist() == np.concatenate(expected).tolist()
        assert split.document_offsets.tolist() == np.cumsum([0, *map(len, expected)])[:-1].tolist()
        assert split.num_bytes == sum(map(len, raw))
        assert split.num_words == (split.num_codes if codec == "word" else sum(len(part.split()) for part in raw))
    assert require_decodes_back(corpus, texts) == sum(text.num_bytes for text in texts)


@pytest.mark.parametrize("codec", ["word", "subword"])
def test_codes_are_sorted_by_frequency_in_training(tmp_path, codec):
    corpus, _ = run(make_texts(tmp_path / "in"), tmp_path / "out", codec)
    counts = np.bincount(corpus.split("train").codes, minlength=corpus.codec.vocab_size)
    assert (np.diff(counts) <= 0).all()
    assert counts[-1] < counts[0]


def test_any_blocks_make_the_text(tmp_path):
    (tmp_path / "t").write_bytes(b"0123\n\nab" + b"x" * 50 + b"\nend")
    text = Text(tmp_path / "t", "train", "t", 2, 60)
    for block_bytes in (1, 2, 7, 100):
        blocks = list(read_blocks(text, block_bytes=block_bytes))
        assert b"".join(blocks) == (tmp_path / "t").read_bytes()[2:60]
        assert all(block.endswith(b"\n") for block in blocks[:-1])
    with pytest.raises(UserError, match="shorter"):
        list(read_blocks(Text(tmp_path / "t", "train", "t", 0, 99)))


@pytest.mark.slow
def test_processes_make_no_difference(tmp_path, small_parts):
    texts = make_texts(tmp_path / "in")
    run(texts, tmp_path / "one")
    run(texts, tmp_path / "two", num_processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_same_again_does_nothing_and_another_needs_leave(tmp_path):
    texts = make_texts(tmp_path / "in")
    run(texts, tmp_path / "out")
    assert run(texts, tmp_path / "out")[1]
    with pytest.raises(UserError, match=r"made otherwise .*codec: 'subword' there, 'word' asked for"):
        run(texts, tmp_path / "out", "word")
    with pytest.raises(UserError, match=r"made otherwise .*listing_sha256"):
        run(texts[:-1], tmp_path / "out")
    assert not run(texts, tmp_path / "out", "word", overwrite=True)[1]
    assert open_corpus(tmp_path / "out").codec.name == "word"


def exchange(text, old, new):
    """Change what a text holds, not how long it is."""
    raw = text.path.read_bytes()
    assert old in raw
    assert len(old) == len(new)
    text.path.write_bytes(raw.replace(old, new))


@pytest.mark.parametrize("codec", sorted(SETTINGS))
def test_texts_that_have_changed_at_the_same_size_are_noticed(tmp_path, codec):
    texts = make_texts(tmp_path / "in")
    made, _ = run(texts, tmp_path / "out", codec)
    in_order = sorted((text for text in texts if text.num_bytes), key=lambda text: text.split)
    assert made.description["source"]["content_sha256"] == hash_texts(in_order)
    (tmp_path / "moved").mkdir()
    moved = []
    for text in texts:  # a copy has the same bytes, at another place and time
        (tmp_path / "moved" / text.path.name).write_bytes(text.path.read_bytes())
        os.utime(tmp_path / "moved" / text.path.name, (1, 1))
        moved.append(whole_file(tmp_path / "moved" / text.path.name, text.split, text.name))
    assert run(moved, tmp_path / "out", codec)[1]
    status = texts[5].path.stat()
    exchange(texts[5], b"cat", b"dog")  # in the validation split; of words: unknown there
    os.utime(texts[5].path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"their bytes have changed \(content_sha256: .* now\); pass --overwrite"):
        run(texts, tmp_path / "out", codec)
    corpus, was_there = run(texts, tmp_path / "out", codec, overwrite=True)
    assert not was_there
    assert require_decodes_back(corpus, texts)
    assert corpus.fingerprint != made.fingerprint
    assert run(texts, tmp_path / "out", codec)[1]
    description = json.loads((tmp_path / "out" / "corpus.json").read_text())
    del description["source"]["content_sha256"]
    write_json(tmp_path / "out" / "corpus.json", description)
    with pytest.raises(UserError, match=r"\(content_sha256: None there, .* now\); pass --overwrite"):
        run(texts, tmp_path / "out", codec)


def test_texts_are_hashed_in_parts(tmp_path, monkeypatch):
    (tmp_path / "t").write_bytes(b"0123\n\nab" + b"x" * 50 + b"\nend")
    cuts = [0, 3, 40, 62]
    texts = [Text(tmp_path / "t", "train", "t", *cut) for cut in itertools.pairwise(cuts)]
    parts = [(tmp_path / "t").read_bytes()[begin:end] for begin, end in itertools.pairwise(cuts)]
    expected = join_hashes([hashlib.sha256(part).hexdigest() for part in parts])
    assert hash_texts(texts) == expected
    assert hash_texts(texts[::-1]) != expected
    monkeypatch.setattr("ct_audio.preparation.text_blocks._read_parts.__kwdefaults__", {"part_bytes": 7})
    assert hash_texts(texts) == expected
    with pytest.raises(UserError, match="shorter"):
        hash_texts([Text(tmp_path / "t", "train", "t", 0, 99)])
    with pytest.raises(UserError, match="cannot read"):
        hash_texts([Text(tmp_path / "gone", "train", "t", 0, 9)])


def interrupt(texts, out) -> list[str]:
    """Break off after two shards; returns which."""
    with pytest.MonkeyPatch.context() as patch:
        worked = count_calls(patch, module, "_encode_shard", lambda shard: shard.target.name, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            run(texts, out)
    return worked


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, small_parts):
    texts = make_texts(tmp_path / "in")
    run(texts, tmp_path / "whole" / "out")
    before = interrupt(texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    trained = []
    monkeypatch.setattr(module.Subword, "train", lambda *arguments: trained.append(arguments))
    after = count_calls(monkeypatch, module, "_encode_shard", lambda shard: shard.target.name, stop_after=None)
    run(texts, tmp_path / "out")
    assert not trained  # the vocabulary was kept
    assert not set(before) & set(after)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_changed_texts_and_damaged_shards_are_noticed(tmp_path, small_parts):
    texts = make_texts(tmp_path / "in")
    interrupt(texts, tmp_path / "out")
    first, *_ = sorted((tmp_path / "out.partial" / "shards").glob("*.codes"))
    first.write_bytes(bytes(first.stat().st_size))
    with pytest.raises(UserError, match="damaged since it was written; run the same command again"):
        run(texts, tmp_path / "out")
    texts[1].path.write_bytes(texts[1].path.read_bytes().replace(b"cat", b"dog"))
    corpus, _ = run(texts, tmp_path / "out")
    assert require_decodes_back(corpus, texts)
    with hold_alone(tmp_path / "lock", "x"):
        (tmp_path / "other.partial").mkdir()
        (tmp_path / "other.partial" / "lock").hardlink_to(tmp_path / "lock")
        with pytest.raises(UserError, match="another process"):
            run(texts, tmp_path / "other")


@pytest.mark.parametrize("codec", sorted(SETTINGS))
def test_what_decodes_otherwise_is_found(tmp_path, codec):
    texts = make_texts(tmp_path / "in")
    corpus, _ = run(texts, tmp_path / "out", codec)
    raw = texts[2].path.read_bytes()
    texts[2].path.write_bytes(raw.replace(b"sat", b"mat", 1))
    with pytest.raises(UserError, match=r"2\.txt, 'book 2'"):
        require_decodes_back(corpus, texts)
    texts[2].path.write_bytes(raw)
    with pytest.raises(UserError, match="expected the document 'book 2', got 'book 1'"):
        require_decodes_back(corpus, texts[2:])
    with pytest.raises(UserError, match="more documents than there are texts"):
        require_decodes_back(corpus, texts[:-1])


def test_user_errors(tmp_path):
    texts = make_texts(tmp_path / "in")
    with pytest.raises(UserError, match="found no text"):
        run(texts[:1], tmp_path / "out")
    with pytest.raises(UserError, match="no text of the split train"):
        run(texts[5:], tmp_path / "out")
    texts[2].path.write_bytes(b"caf\xe9 " * 99 + b"\n")
    with pytest.raises(UserError, match=r"expected UTF-8"):
        run([whole_file(text.path, text.split, text.name) for text in texts], tmp_path / "out")
    texts[3].path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        run(texts, tmp_path / "other", "word")
    for codec, vocab_size in (("subword", None), ("word", 300)):
        with pytest.raises(UserError, match="vocab_size"):
            TextSettings(codec, vocab_size)


def test_statistics(tmp_path):
    texts = make_texts(tmp_path / "in")
    corpus, _ = run(texts, tmp_path / "out", "byte")
    raw = [text.path.read_bytes() for text in texts if text.split == "train" and text.num_bytes]
    words, num_bytes = sum(len(part.split()) for part in raw), sum(map(len, raw))
    row = f"| out | train | 4 | {words:,} | {words / 4:,.0f} | {num_bytes:,} | {num_bytes:,} | 1.000 |"
    assert statistics_table([corpus]).splitlines()[2] == row
    assert (
        vocabulary_table([corpus]).splitlines()[2]
        == f"| out | {words / 4:,.0f} | {num_bytes / 1e6:,.1f} | 256 | byte |"
    )
    assert json.loads((tmp_path / "out" / "corpus.json").read_text())["preparation"]["codec"] == "byte"
