"""Everything that opening a run takes: its model out of a checkpoint or an exported folder, its corpus, its codec."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ct_audio.common.errors import UserError
from ct_audio.common.recipes import model_names
from ct_audio.data.codecs import Codec, codec_from_json
from ct_audio.data.corpus import Corpus, open_corpus
from ct_audio.models import SequenceModel, build_model
from ct_audio.runs.checkpoint_files import find_model, load_model, model_tensors, read_state, read_tensors
from ct_audio.runs.config import RunConfig, load_config
from ct_audio.runs.exported import CONFIG_FILE, MODEL_FILE, is_exported, read_exported


@dataclass(frozen=True)
class LoadedRun:
    """A model out of a run's checkpoint, or out of a folder that was exported.

    Attributes:
        config: the run's configuration.
        model: in evaluation mode, on the device asked for.
        step: steps completed when the checkpoint was written.
        checkpoint_path: its directory, or the exported folder.
        state: what the training loop wrote beside the tensors (progress, corpus_fingerprint, codec, ...).
        run_dir: where results are kept and the vocabulary is; None for an exported folder, and for a checkpoint that
            lies outside of a run: nothing is written there.
    """

    config: RunConfig
    model: SequenceModel
    step: int
    checkpoint_path: Path
    state: dict[str, Any]
    run_dir: Path | None

    @property
    def config_path(self) -> Path:
        """The file that the configuration was read from."""
        path = self.checkpoint_path
        return path / (CONFIG_FILE if is_exported(path) else "config.yaml")


def run_directory(path: Path) -> Path | None:
    """The run that a path is, or whose checkpoint it is; None for an exported folder and for a checkpoint alone."""
    if is_exported(path):
        return None
    if not (path / "state.json").is_file():
        return path
    root = path.resolve().parent
    return root.parent if root.name == "checkpoints" else None


def is_model(path: Path) -> bool:
    """Whether a path is that of a run with checkpoints, of a checkpoint, or of an exported folder."""
    return is_exported(path) or (path / "state.json").is_file() or (path / "checkpoints").is_dir()


def load_run_model(path: str | Path, *, which: str = "best", device: str | torch.device = "cpu") -> LoadedRun:
    """The model of a run, of one of its checkpoints or of an exported folder, for evaluation and sampling.

    Args:
        path: the directory of a run, of a checkpoint (it holds state.json), or an exported one (config.json).
        which: of a run, "best" (falls back to "last" where nothing was validated yet) or "last".
    Raises:
        UserError: there is no such checkpoint, or what is there is damaged.
    """
    path = Path(path)
    is_run = run_directory(path) == path
    if not is_run and which != "best":
        raise UserError(f"--checkpoint {which}: {path} is one model, not a run with several; leave it out")
    if is_exported(path):
        exported = read_exported(path)
        model = _load_model(path, exported.config, device)
        return LoadedRun(exported.config, model, exported.state["step"], path, exported.state, None)
    for attempt in range(3):
        checkpoint = find_model(path, which) if is_run else path
        if checkpoint is None:
            if not path.exists():
                shipped = ", ".join(model_names())
                raise UserError(f"{path}: no checkpoint: there is no such folder; models that are shipped: {shipped}")
            raise UserError(
                f"{path}: no checkpoint {which!r}; expected a directory that ct-audio train or ct-audio export made"
            )
        try:
            state = read_state(checkpoint, needed=("config.yaml", MODEL_FILE))
            config = load_config(checkpoint / "config.yaml")
            model = _load_model(checkpoint, config, device)
        except UserError:
            if checkpoint.exists() or attempt == 2:  # else a training run has just deleted it for a newer one
                raise
            continue
        return LoadedRun(config, model, state["step"], checkpoint, state, run_directory(path))
    raise AssertionError("unreachable")


def _load_model(directory: Path, config: RunConfig, device: str | torch.device) -> SequenceModel:
    """The model of a configuration with the weights of model.safetensors, in evaluation mode."""
    _require_shapes(directory / MODEL_FILE, config)
    model = build_model(config)
    if config.train.precision == "float64":
        model.double()
    load_model(directory, model)
    return model.to(device).eval()


def _require_shapes(path: Path, config: RunConfig) -> None:
    """Compare names and shapes before the model is built: a configuration may ask for more memory than there is."""
    try:
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in model_tensors(build_model(config)).items()}
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: cannot build the model of its configuration: {str(error).splitlines()[0]}") from error
    found = {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}
    if expected != found:
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(
            f"{path} does not fit the model of its configuration: {different[0]}: expected "
            f"{expected.get(different[0])}, got {found.get(different[0])}; {len(different)} tensors differ"
        )


def run_corpus(run: LoadedRun, path: str | None = None, *, allow_other: bool = False) -> Corpus:
    """The corpus to score a run on, checked against the one of its checkpoint by its fingerprint, wherever it is.

    Args:
        path: in place of the one that the configuration names.
        allow_other: go on if it holds other codes.
    Raises:
        UserError: it is not there, holds other codes, or is of another vocabulary.
    """
    if path is None and is_exported(run.checkpoint_path):
        raise UserError(
            f"{run.checkpoint_path} is an exported model and knows no place of a corpus (it was trained on "
            f"{run.config.data.corpus}); pass --corpus DIR"
        )
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


def run_codec(run: LoadedRun) -> Codec:
    """The codec that the checkpoint names, else that of the run's corpus; a vocabulary lies in the run or the corpus.

    Raises:
        UserError: there is none, or it has another vocabulary than the model.
    """
    known, corpus = run.state.get("codec"), Path(run.config.data.corpus)
    if known is None:
        codec = open_corpus(corpus).codec
    else:
        places = [run.run_dir or run.checkpoint_path, *([] if is_exported(run.checkpoint_path) else [corpus])]
        codec = codec_from_json(known, *[place for place in places if (place / "vocabulary.json").is_file()][:1])
    if codec.vocab_size != run.model.vocab_size:
        raise UserError(f"the codec {codec.name} has {codec.vocab_size} codes, the model {run.model.vocab_size}")
    return codec
