"""Corpus on disk: round trip, and every kind of damage is one error."""

import json
import shutil

import numpy as np
import pytest

from ct_audio.common.errors import UserError
from ct_audio.data.codecs import MuLaw
from ct_audio.data.corpus import CorpusWriter, open_corpus
from ct_audio.data.vocabulary_codecs import Word


def write_corpus(path, seed=0, codec=None):
    """Three recordings in train, one in valid."""
    codec = codec or MuLaw()
    rng = np.random.default_rng(seed)
    documents = {("train", "a"): 500, ("train", "b"): 1, ("valid", "c"): 240, ("train", "d"): 77}
    made = {key: rng.integers(0, 256, length).astype(np.uint8) for key, length in documents.items()}
    writer = CorpusWriter(path, codec, source={"path": "nowhere"}, preparation={"gain_db": 0.0})
    for (split, name), codes in made.items():
        writer.add_document(split, name, codes)
    writer.finish()
    return made


def edit(path, change):
    """Apply a change to corpus.json."""
    file = path / "corpus.json"
    description = json.loads(file.read_text())
    change(description)
    file.write_text(json.dumps(description))


def test_round_trip(tmp_path):
    made = write_corpus(tmp_path / "c")
    corpus = open_corpus(tmp_path / "c", verify=True)
    assert corpus.codec == MuLaw()
    assert sorted(corpus.splits) == ["train", "valid"]
    train = corpus.split("train")
    expected = np.concatenate([made["train", "a"], made["train", "b"], made["train", "d"]])
    assert np.array_equal(train.codes, expected)
    assert train.document_offsets.tolist() == [0, 500, 501]
    assert train.document_names == ("a", "b", "d")
    assert train.num_codes == 578
    assert corpus.description["source"] == {"path": "nowhere"}
    assert isinstance(train.codes, np.memmap)
    assert not train.codes.flags.writeable
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_text_is_counted_and_keeps_its_vocabulary(tmp_path):
    codec = Word(("b", "a", "<unk>", "<eos>"))
    writer = CorpusWriter(tmp_path / "c", codec, source={}, preparation={})
    writer.add_document("train", "x", np.array([0, 1]), num_bytes=7, num_words=2)
    writer.extend_document("train", np.array([2, 3, 3]))
    writer.add_document("train", "y", np.array([1]), num_bytes=4, num_words=1)
    with pytest.raises(UserError, match=r"document 'y': expected codes in 0\.\.3, got 4\.\.4"):
        writer.extend_document("train", np.array([4]))
    writer.finish()
    corpus = open_corpus(tmp_path / "c", verify=True)
    train = corpus.split("train")
    assert (train.num_bytes, train.num_words, train.codes.dtype) == (11, 3, np.uint8)
    assert train.codes.tolist() == [0, 1, 2, 3, 3, 1]
    assert train.document_offsets.tolist() == [0, 5]
    assert corpus.codec == codec
    for key in ("num_bytes", "num_words"):
        for value in (-1, 1.0, True, None, 2**63):
            edit(tmp_path / "c", set_train(**{key: value}))
            with pytest.raises(UserError, match=f"expected {key}"):
                open_corpus(tmp_path / "c")
        edit(tmp_path / "c", set_train(**{key: 3}))
    (tmp_path / "c" / "vocabulary.json").write_bytes(Word(("a", "b", "<unk>", "<eos>")).files()["vocabulary.json"])
    with pytest.raises(UserError, match="has sha256"):
        open_corpus(tmp_path / "c")
    (tmp_path / "c" / "vocabulary.json").unlink()
    with pytest.raises(UserError, match=r"cannot read the vocabulary .*vocabulary\.json"):
        open_corpus(tmp_path / "c")


def test_audio_has_no_words(tmp_path):
    write_corpus(tmp_path / "c")
    assert open_corpus(tmp_path / "c").split("train").num_words is None


def test_fingerprint_tells_codes_apart(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_corpus(tmp_path / name, seed)
    first, again, other = (open_corpus(tmp_path / name).fingerprint for name in "abc")
    assert first == again != other


def test_missing_split_names_the_others(tmp_path):
    write_corpus(tmp_path / "c")
    with pytest.raises(UserError, match="no split 'test'; expected one of train, valid"):
        open_corpus(tmp_path / "c").split("test")


def test_nothing_looks_whole_before_the_end(tmp_path):
    writer = CorpusWriter(tmp_path / "c", MuLaw(), source={}, preparation={})
    writer.add_document("train", "a", np.zeros(5, np.uint8))
    assert not (tmp_path / "c").exists()
    for path in (tmp_path / "c", writer.work_dir):
        with pytest.raises(UserError, match=r"no corpus\.json"):
            open_corpus(path)


def test_writer_refuses_what_does_not_fit(tmp_path):
    writer = CorpusWriter(tmp_path / "c", MuLaw(), source={}, preparation={})
    with pytest.raises(UserError, match="no document"):
        writer.finish()
    for split in ("../train", "", "a b", ".x"):
        with pytest.raises(UserError, match="expected a name"):
            writer.add_document(split, "a", np.zeros(5, np.uint8))
    with pytest.raises(UserError, match="empty"):
        writer.add_document("train", "a", np.zeros(0, np.uint8))
    with pytest.raises(UserError, match=r"0\.\.255"):
        writer.add_document("train", "a", np.array([256]))


def test_writer_replaces_only_when_told(tmp_path):
    write_corpus(tmp_path / "c")
    with pytest.raises(UserError, match="exists"):
        write_corpus(tmp_path / "c", 1)
    was = open_corpus(tmp_path / "c", verify=True).fingerprint
    writer = CorpusWriter(tmp_path / "c", MuLaw(), source={}, preparation={})
    writer.add_document("train", "a", np.zeros(5, np.uint8))
    writer.finish(overwrite=True)
    assert open_corpus(tmp_path / "c", verify=True).fingerprint != was
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def set_train(**values):
    """A change of the train split's entry."""
    return lambda description: description["splits"]["train"].update(values)


def rename_train(name):
    """A change of the train split's name (and of its file's)."""

    def change(description):
        description["splits"][name] = description["splits"].pop("train") | {"file": f"{name}.codes"}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="zip"), "expected format"),
        (lambda d: d.update(format_version=2), "format_version 1, got 2"),
        (lambda d: d.update(codec={"name": "a_law"}), "codec"),
        (lambda d: d.pop("codec"), "codec"),
        (lambda d: d.update(splits={}), "at least one"),
        (lambda d: d.update(splits=[]), "at least one"),
        (lambda d: d["splits"].update(train=None), "split train"),
        (lambda d: d["splits"].pop("train"), r"does not name: train\.codes"),
        (lambda d: d["splits"].update(extra=dict(d["splits"]["valid"], file="extra.codes")), "missing"),
        (rename_train("../c/train"), "expected a name"),
        (rename_train("/etc/passwd"), "expected a name"),
        (set_train(file="../c/train.codes"), "split train: expected"),
        (set_train(file="valid.codes"), "split train: expected"),
        (set_train(dtype="int32"), "split train: expected"),
        (set_train(num_codes=577), r"expected 577 bytes|stay below"),
        (set_train(num_codes=579), "expected 579 bytes, got 578"),
        (set_train(num_codes=0), "num_codes"),
        (set_train(num_codes=True), "num_codes"),
        (set_train(num_codes=578.0), "num_codes"),
        (set_train(sha256="abc"), "sha256"),
        (set_train(document_offsets=[0, 501, 500]), "increase"),
        (set_train(document_offsets=[0, 500, 500]), "increase"),
        (set_train(document_offsets=[0, 500, 578]), "stay below"),
        (set_train(document_offsets=[1, 500, 501]), "first of them 0"),
        (set_train(document_offsets=[0, 500.0, 501]), "whole numbers"),
        (set_train(document_offsets=[], document_names=[]), "whole numbers"),
        (set_train(document_offsets=[0, 500]), "one length"),
        (set_train(document_names=["a", "b", 3]), "strings"),
    ],
)
def test_damaged_description_is_one_error(tmp_path, change, message):
    write_corpus(tmp_path / "c")
    edit(tmp_path / "c", change)
    with pytest.raises(UserError, match=message):
        open_corpus(tmp_path / "c")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", "[" * 100_000], ids=range(6))
def test_bad_json_is_one_error(tmp_path, text):
    write_corpus(tmp_path / "c")
    (tmp_path / "c" / "corpus.json").write_text(text)
    with pytest.raises(UserError, match=r"corpus\.json does not fit"):
        open_corpus(tmp_path / "c")


def test_damaged_files_are_one_error(tmp_path):
    write_corpus(tmp_path / "c")
    file = tmp_path / "c" / "train.codes"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    with pytest.raises(UserError, match="expected 578 bytes, got 577"):
        open_corpus(tmp_path / "c")
    file.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    open_corpus(tmp_path / "c")
    with pytest.raises(UserError, match="expected sha256"):
        open_corpus(tmp_path / "c", verify=True)
    file.write_bytes(raw)
    open_corpus(tmp_path / "c", verify=True)
    shutil.copy(file, tmp_path / "c" / "other.codes")
    with pytest.raises(UserError, match=r"does not name: other\.codes"):
        open_corpus(tmp_path / "c")
    (tmp_path / "c" / "other.codes").unlink()
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="missing"):
        open_corpus(tmp_path / "c")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no plain file"):
        open_corpus(tmp_path / "c")


def test_no_corpus_at_all(tmp_path):
    with pytest.raises(UserError, match="make one with ct-audio prepare"):
        open_corpus(tmp_path / "none")
