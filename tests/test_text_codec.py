"""Words and subwords: exact round trips, lines, order by frequency, vocabulary files that anybody may have written."""

import hashlib
import itertools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from ct_audio.common.errors import UserError
from ct_audio.data.codecs import Byte, codec_from_json, read_codes
from ct_audio.data.vocabulary_codecs import BYTE_OF_CHARACTER, Subword, Word

ARTICLE = b" \n = A title = \n \n The cat @-@ like <unk> , the hat . \n \n"
PROSE = (
    "It was the best of times,\r\nit was the worst of times; it's Ärger 12\u00a0times — 猫!\n\n\n  The end.\n".encode()
)
WORD = Word.from_counts(Counter(ARTICLE.replace(b"\n", b" <eos> ").split()))
SUBWORD = Subword.train([PROSE], 300)
TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from("\n\n\r \tab")).map(lambda text: text.encode())


def test_wikitext_layout_survives():
    assert WORD.decode(WORD.encode(ARTICLE)) == ARTICLE
    assert WORD.encode(ARTICLE).dtype == np.int32
    assert len(WORD.encode(ARTICLE)) == len(ARTICLE.split()) + ARTICLE.count(b"\n")


@given(st.lists(st.integers(0, WORD.vocab_size - 1)))
def test_any_words_survive_decoding_and_encoding(codes):
    assert WORD.encode(WORD.decode(np.array(codes, dtype=np.int64))).tolist() == codes


def test_words_are_sorted_by_frequency_then_bytes():
    words = Word.from_counts(Counter([b"b", b"a", b"c", b"c", b"<eos>", b"<eos>", b"<eos>", "é".encode(), b"z"]))
    assert words.words == ("<eos>", "c", "a", "b", "z", "é", "<unk>")
    assert words.start_code == 0


def test_unknown_words():
    assert WORD.decode(WORD.encode("the dog \n")) == b" the <unk> \n"
    assert WORD.decode(np.zeros(0, np.int32)) == b""


@given(TEXTS)
@example(PROSE)
@example(b" \n\n \n  x \n")
def test_every_text_survives_subwords(text):
    codes = SUBWORD.encode(text)
    assert SUBWORD.decode(codes) == text
    assert SUBWORD.encode(SUBWORD.decode(codes)).tolist() == codes.tolist()


@given(st.lists(st.integers(0, SUBWORD.vocab_size - 1)))
def test_any_subwords_can_be_decoded_piece_by_piece(codes):
    pieces = [SUBWORD.decode(np.array([code])) for code in codes]
    assert SUBWORD.decode(np.array(codes, dtype=np.int64)) == b"".join(pieces)


@pytest.mark.parametrize("codec", [Byte(), WORD, SUBWORD], ids=lambda codec: codec.name)
@given(first=TEXTS, second=TEXTS)
def test_lines_are_encoded_one_by_one(codec, first, second):
    first += b"\n"
    whole = codec.encode(first + second).tolist()
    assert whole == codec.encode(first).tolist() + codec.encode(second).tolist()


def oracle(subword: Subword, piece: str) -> list[str]:
    """Byte-pair encoding of one piece as it is defined: the earliest merge first, all its places from the left."""
    parts = list(piece)
    ranks = {pair: rank for rank, pair in enumerate(subword.merges)}
    while True:
        found = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not found:
            return parts
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_subwords_are_those_of_the_definition():
    pieces = [
        piece
        for line in PROSE.decode().splitlines(keepends=True)
        for piece, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(line)
    ]
    expected = [part for piece in pieces for part in oracle(SUBWORD, piece)]
    assert [SUBWORD.subwords[code] for code in SUBWORD.encode(PROSE)] == expected
    assert len(expected) < len(PROSE) / 1.5


def test_the_alphabet_is_that_of_byte_level_bpe():
    assert set(BYTE_OF_CHARACTER) == set(ByteLevel.alphabet())
    assert sorted(BYTE_OF_CHARACTER.values()) == list(range(256))
    assert SUBWORD.decode(SUBWORD.encode(bytes(range(128)))) == bytes(range(128))


def test_sorting_changes_the_codes_and_nothing_else():
    counts = np.bincount(SUBWORD.encode(PROSE), minlength=SUBWORD.vocab_size)
    codec, new_codes = SUBWORD.sorted_by(counts)
    codes = codec.encode(PROSE)
    assert codes.tolist() == new_codes[SUBWORD.encode(PROSE)].tolist()
    assert codec.decode(codes) == PROSE
    sorted_counts = np.bincount(codes, minlength=codec.vocab_size)
    assert (np.diff(sorted_counts) <= 0).all()
    assert codec.decode(np.array([codec.start_code])) == b"\n"


def test_training_is_the_same_in_every_process():
    code = (
        "import sys, hashlib; from ct_audio.data.vocabulary_codecs import Subword;"
        "text = sys.stdin.buffer.read(); print(Subword.train([text], 300).to_json()['sha256'])"
    )
    done = subprocess.run([sys.executable, "-c", code], input=PROSE, capture_output=True, check=True)
    assert done.stdout.decode().strip() == SUBWORD.to_json()["sha256"]


def test_text_that_is_no_utf8_is_refused():
    with pytest.raises(UserError, match="expected UTF-8"):
        SUBWORD.encode(b"caf\xe9 is here")
    with pytest.raises(UserError, match="expected UTF-8"):
        Word.from_counts(Counter([b"caf\xe9"]))


@pytest.mark.parametrize("codec", [WORD, SUBWORD], ids=lambda codec: codec.name)
def test_codes_out_of_range_are_refused(codec):
    for bad in (np.array([codec.vocab_size]), np.array([-1])):
        with pytest.raises(UserError, match=rf"0\.\.{codec.vocab_size - 1}"):
            codec.decode(bad)


def damage(codec, **changes):
    """The vocabulary file with some keys changed."""
    return json.dumps({**json.loads(codec.files()["vocabulary.json"]), **changes}).encode()


BAD_WORDS = [["a"], ["a", "a", "<unk>", "<eos>"], ["", "<unk>", "<eos>"], ["a b", "<unk>", "<eos>"], [1], "x", None]
BAD_FILES = [(WORD, damage(WORD, words=words)) for words in BAD_WORDS]
BAD_FILES += [(SUBWORD, damage(SUBWORD, subwords=words)) for words in BAD_WORDS]
BAD_FILES += [(SUBWORD, damage(SUBWORD, merges=merges)) for merges in (["a"], ["a b c"], ["q zz"], [["a", "b"]], 3)]
BAD_FILES += [
    (SUBWORD, damage(SUBWORD, subwords=[*SUBWORD.subwords, "猫"])),
    (SUBWORD, WORD.files()["vocabulary.json"]),
]
BAD_FILES += [(WORD, raw) for raw in (b"", b"[]", b"\xff", b'{"format": "ct_audio words"}', b"[" * 99_999)]


@pytest.mark.parametrize(("codec", "raw"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_vocabulary_is_one_error(tmp_path, codec, raw):
    (tmp_path / "vocabulary.json").write_bytes(raw)
    description = codec.to_json() | {"sha256": hashlib.sha256(raw).hexdigest()}
    with pytest.raises(UserError):
        codec_from_json(description, tmp_path)


def test_a_wrong_description_is_one_error(tmp_path):
    (tmp_path / "vocabulary.json").write_bytes(WORD.files()["vocabulary.json"])
    assert codec_from_json(WORD.to_json(), tmp_path) == WORD
    for change in ({"vocab_size": 3}, {"vocabulary": "../x"}, {"sha256": None}, {"more": 1}, {"name": "subword"}):
        with pytest.raises(UserError, match="word"):
            codec_from_json(WORD.to_json() | change, tmp_path)
    with pytest.raises(UserError, match="directory of its vocabulary"):
        codec_from_json(WORD.to_json())
    (tmp_path / "vocabulary.json").rename(tmp_path / "other")
    (tmp_path / "vocabulary.json").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="no plain file"):
        codec_from_json(WORD.to_json(), tmp_path)


def test_a_text_that_is_no_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("häuser".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot use .*latin\.txt: expected UTF-8, got .*; convert the file to UTF-8"):
        read_codes(tmp_path / "latin.txt", SUBWORD)
