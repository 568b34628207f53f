"""Training on words: the same loop, and a run whose codec can be had from the run alone."""

import shutil

import pytest
from tiny_runs import checkpoint_state, tiny_run

from ct_audio.common.errors import UserError
from ct_audio.data.codecs import codec_from_json
from ct_audio.data.corpus import open_corpus
from ct_audio.preparation.text_blocks import whole_file
from ct_audio.preparation.texts import TextSettings, prepare_text
from ct_audio.training.loop import train


def test_a_run_keeps_its_vocabulary(tmp_path):
    texts = []
    for split, lines in (("train", 60), ("valid", 12)):
        file = tmp_path / f"{split}.txt"
        file.write_text("".join(f" line {number % 7} of {number % 11} cats \n" for number in range(lines)))
        texts.append(whole_file(file, split, split))
    corpus, _ = prepare_text(texts, tmp_path / "corpus", settings=TextSettings("word"), source={})
    vocab_size = corpus.codec.vocab_size
    adaptive = {"model__adaptive_cutoffs": [6], "model__adaptive_div": 2, "model__tie_embeddings": True}
    config = tiny_run(tmp_path, model__vocab_size=vocab_size, **adaptive)
    assert train(config) == 0
    shutil.rmtree(tmp_path / "corpus")
    codec = codec_from_json(checkpoint_state(config)["codec"], config.run_dir)
    assert codec == corpus.codec
    (config.run_dir / "vocabulary.json").unlink()
    with pytest.raises(UserError, match=r"cannot read the vocabulary"):
        codec_from_json(checkpoint_state(config)["codec"], config.run_dir)
    with pytest.raises(UserError):
        open_corpus(tmp_path / "corpus")
