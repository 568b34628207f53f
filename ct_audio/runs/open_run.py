"""Everything that opening a run takes: its model out of a checkpoint, its corpus, its codec."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ct_audio.common.errors import UserError
from ct_audio.data.codecs import Codec, codec_from_json
from ct_audio.data.corpus import Corpus, open_corpus
from ct_audio.models import SequenceModel, build_model
from ct_audio.runs.checkpoint_files import find_checkpoint, load_model, model_tensors, read_state, read_tensors
from ct_audio.runs.config import RunConfig, load_config


@dataclass(frozen=True)
class LoadedRun:
    """A model out of a run's checkpoint.

    Attributes:
        config: the run's configuration.
        model: in evaluation mode, on the device asked for.
        step: steps completed when the checkpoint was written.
        checkpoint_path: its directory.
        state: what the training loop wrote beside the tensors (progress, corpus_fingerprint, codec, ...).
    """

    config: RunConfig
    model: SequenceModel
    step: int
    checkpoint_path: Path
    state: dict[str, Any]


def load_run_model(run_dir: str | Path, *, which: str = "best", device: str | torch.device = "cpu") -> LoadedRun:
    """The model of a run, for evaluation and sampling.

    Args:
        run_dir: the run's directory.
        which: "best" (falls back to "last" where nothing was validated yet) or "last".
    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    for attempt in range(3):
        path = find_checkpoint(Path(run_dir), which)
        if path is None and which == "best":
            path = find_checkpoint(Path(run_dir), "last")
        if path is None:
            raise UserError(f"{run_dir}: no checkpoint {which!r}; expected a directory that ct-audio train made")
        try:
            state = read_state(path)
            config = load_config(path / "config.yaml")
            _require_shapes(path / "model.safetensors", config)
            model = build_model(config)
            if config.train.precision == "float64":
                model.double()
            load_model(path, model)
        except UserError:
            if path.exists() or attempt == 2:  # else a training run has just deleted it for a newer one
                raise
            continue
        model.to(device).eval()
        return LoadedRun(config, model, state["step"], path, state)
    raise AssertionError("unreachable")


def _require_shapes(path: Path, config: RunConfig) -> None:
    """Compare names and shapes before the model is built: a configuration may ask for more memory than there is."""
    try:
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in model_tensors(build_model(config)).items()}
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: cannot build the model of config.yaml: {str(error).splitlines()[0]}") from error
    found = {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}
    if expected != found:
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(
            f"{path} does not fit the model of config.yaml: {different[0]}: expected {expected.get(different[0])}, "
            f"got {found.get(different[0])}; {len(different)} tensors differ"
        )


def run_corpus(run: LoadedRun, path: str | None = None, *, allow_other: bool = False) -> Corpus:
    """The corpus to score a run on, checked against the one of its checkpoint by its fingerprint, wherever it is.

    Args:
        path: in place of the one that the configuration names.
        allow_other: go on if it holds other codes.
    Raises:
        UserError: it is not there, holds other codes, or is of another vocabulary.
    """
    if path is None:
        path = run.config.data.corpus
        if not Path(path).exists():
            raise UserError(
                f"{run.config.name} was trained on the corpus {path}, which is not there (looked in {Path.cwd()}); "
                "where it has moved, pass --corpus DIR"
            )
    corpus = open_corpus(path)
    trained_on = run.state.get("corpus_fingerprint")
    if corpus.fingerprint != trained_on and not allow_other:
        raise UserError(
            f"{corpus.path} holds other codes than the corpus that {run.config.name} was trained on (fingerprint "
            f"{corpus.fingerprint[:12]}, expected {str(trained_on)[:12]}); bring that one back, or evaluate with "
            "--corpus or --allow-other-corpus"
        )
    if corpus.codec.vocab_size != run.model.vocab_size:
        raise UserError(
            f"{corpus.path} has {corpus.codec.vocab_size} codes, the model {run.model.vocab_size}; pass --corpus"
        )
    return corpus


def run_codec(run: LoadedRun, run_dir: Path) -> Codec:
    """The codec that the checkpoint names, else that of the run's corpus; a vocabulary lies in the run or the corpus.

    Raises:
        UserError: there is none, or it has another vocabulary than the model.
    """
    known, corpus = run.state.get("codec"), Path(run.config.data.corpus)
    if known is None:
        codec = open_corpus(corpus).codec
    else:
        places = [place for place in (run_dir, corpus) if (place / "vocabulary.json").is_file()]
        codec = codec_from_json(known, *places[:1])
    if codec.vocab_size != run.model.vocab_size:
        raise UserError(f"the codec {codec.name} has {codec.vocab_size} codes, the model {run.model.vocab_size}")
    return codec
