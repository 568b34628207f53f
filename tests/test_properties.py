"""Properties of any corpus and any configuration; codec, lanes and schedules have theirs beside their tests."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ct_audio.common.errors import UserError
from ct_audio.data.codecs import Byte, MuLaw
from ct_audio.data.corpus import CorpusWriter, open_corpus
from ct_audio.models import model_config_class
from ct_audio.runs.config import DataConfig, OptimConfig, TrainConfig, config_from_dict, config_to_yaml, load_config

BASE = """
name: run
data: {corpus: data/x}
model: {name: wavenet, vocab_size: 256}
"""
NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name.encode("utf-8", "ignore").decode() == name)
DOCUMENTS = st.lists(
    st.tuples(st.sampled_from(["train", "valid", "test"]), NAMES, st.binary(min_size=1, max_size=60)),
    min_size=1,
    max_size=12,
)
SECTIONS = {"data": DataConfig, "optim": OptimConfig, "train": TrainConfig, "model": model_config_class("wavenet")}
KEYS = [f"{name}.{key.name}" for name, section in SECTIONS.items() for key in dataclasses.fields(section)]
SCALARS = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=6))
VALUES = st.one_of(SCALARS, st.lists(st.integers(0, 9)), st.dictionaries(st.integers(0, 9), st.integers(0, 9)))


@given(DOCUMENTS, st.sampled_from([Byte(), MuLaw(16_000)]))
def test_a_corpus_gives_back_every_document(documents: list[tuple[str, str, bytes]], codec: Byte | MuLaw) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = CorpusWriter(Path(folder) / "corpus", codec, source={}, preparation={})
        for split, name, raw in documents:
            writer.add_document(split, name, np.frombuffer(raw, np.uint8))
        writer.finish()
        corpus = open_corpus(Path(folder) / "corpus", verify=True)
        assert corpus.codec == codec
        assert corpus.splits.keys() == {split for split, _, _ in documents}
        for split_name, split in corpus.splits.items():
            expected = [(name, raw) for split, name, raw in documents if split == split_name]
            ends = [*split.document_offsets[1:].tolist(), split.num_codes]
            pieces = [bytes(split.codes[a:b]) for a, b in zip(split.document_offsets.tolist(), ends, strict=True)]
            assert list(zip(split.document_names, pieces, strict=True)) == expected


@given(DOCUMENTS, st.data())
def test_one_changed_bit_of_the_codes_is_found(documents: list[tuple[str, str, bytes]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus"
        writer = CorpusWriter(path, Byte(), source={}, preparation={})
        for split, name, raw in documents:
            writer.add_document(split, name, np.frombuffer(raw, np.uint8))
        writer.finish()
        before = open_corpus(path, verify=True).fingerprint
        file = data.draw(st.sampled_from(sorted(path.glob("*.codes"))))
        raw = bytearray(file.read_bytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(raw)
        assert open_corpus(path).fingerprint == before  # sizes alone say nothing ...
        try:
            open_corpus(path, verify=True)
        except UserError as error:
            found = str(error)
        assert f"{file.name}: expected sha256" in found  # ... and a look at the codes does


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_value_of_any_key_is_taken_or_is_one_error(changes: dict[str, Any]) -> None:
    """And what is taken is written and read back as it was."""
    plain: dict[str, Any] = {
        "name": "run",
        "data": {"corpus": "data/x"},
        "model": {"name": "wavenet", "vocab_size": 256},
    }
    for key, value in changes.items():
        section, name = key.split(".")
        plain.setdefault(section, {})[name] = value
    try:
        config = config_from_dict(plain)
    except UserError:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(config_to_yaml(config), encoding="utf-8")
        assert load_config(path) == config


@given(st.lists(st.one_of(st.text(max_size=30), st.builds("{}={}".format, st.sampled_from(KEYS), VALUES)), max_size=3))
def test_any_override_is_taken_or_is_one_error(overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(BASE, encoding="utf-8")
        with contextlib.suppress(UserError):
            config = load_config(path, overrides)
            path.write_text(config_to_yaml(config), encoding="utf-8")
            assert load_config(path) == config
