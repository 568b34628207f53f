"""A model that is handed on: one folder with all that evaluating and sampling it takes, in the layout of a model hub.

    DIR/  config.json           format, configuration, codec, training, evaluations, clip, size and sha256 of the files
          model.safetensors     parameters and buffers, as in a checkpoint
          vocabulary.json       of a codec that has one
          clip.wav or clip.txt  a clip whose NLL config.json states: a reader that gets another one has another model
          samples/, README.md   what it sounds like; the model card

Nothing is ever written into such a folder by those who use it. Whatever is read here anybody may have written or
damaged; nothing of it is run. `export/model_folder.py` writes it.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json
from ct_audio.runs.checkpoint_files import is_digest, require_whole
from ct_audio.runs.config import RunConfig, config_from_dict

FORMAT = "ct_audio model"
FORMAT_VERSION = 1
CONFIG_FILE, MODEL_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
SECTIONS = ("name", "model", "data", "optim", "train")
"""Keys of config.json that are those of a run's configuration; `data` names no corpus."""
_ADVICE = "get the folder again, or export the run again"


@dataclass(frozen=True)
class Exported:
    """What config.json of a folder says, checked.

    Attributes:
        config: as in training, but for the places of the corpus and of the run, which are not known.
        plain: all of config.json.
        state: the part that a checkpoint's state.json would say: step, progress, corpus_fingerprint, codec, files.
    """

    config: RunConfig
    plain: dict[str, Any]
    state: dict[str, Any]


def is_exported(path: Path) -> bool:
    """Whether a path is such a folder, whole or not: it has config.json, or weights outside of a checkpoint."""
    return (path / CONFIG_FILE).is_file() or ((path / MODEL_FILE).is_file() and not (path / "state.json").is_file())


def read_exported(folder: Path) -> Exported:
    """config.json of a folder, after checking it and that the files that it names are whole.

    Raises:
        UserError: a file is missing, damaged or of another format.
    """
    what = f"exported model {folder}"
    try:
        plain = read_json(folder / CONFIG_FILE)
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: cannot read {CONFIG_FILE}: {error}; {_ADVICE}") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise UserError(f"{what}: expected a {CONFIG_FILE} of the format {FORMAT!r}, as ct-audio export writes it")
    if plain.get("format_version") != FORMAT_VERSION:
        found, writer = str(plain.get("format_version"))[:20], str(plain.get("ct_audio_version"))[:20]
        raise UserError(
            f"{what}: {CONFIG_FILE} is of version {found} of its format, written by ct_audio {writer}; this ct_audio "
            f"reads version {FORMAT_VERSION}: use that version of ct_audio"
        )
    wrong = [key for key, holds in _RULES.items() if not holds(plain.get(key))]
    if wrong:
        value = str(plain.get(wrong[0]))[:80]
        raise UserError(f"{what}: {CONFIG_FILE} does not fit: {wrong[0]} is {value}; {_ADVICE}")
    require_whole(folder, plain["files"], what=what, advice=_ADVICE)
    given = {key: plain[key] for key in SECTIONS if key in plain}
    given["data"] = {**plain["data"], "corpus": plain["training"]["corpus"]}
    try:
        config = config_from_dict(_with_numbers(given))
    except UserError as error:
        raise UserError(f"{what}: {CONFIG_FILE}: {error}") from error
    training = plain["training"]
    state = {
        "step": training["step"],
        "progress": {"best_valid_nll_nats": training.get("best_valid_nll_nats")},
        "corpus_fingerprint": training["corpus_fingerprint"],
        "codec": plain["codec"],
        "files": plain["files"],
    }
    return Exported(config, plain, state)


def _with_numbers(plain: dict[str, Any]) -> dict[str, Any]:
    """What JSON cannot say: the keys of `optim.update_period` are numbers."""
    optim = plain.get("optim")
    period = optim.get("update_period") if isinstance(optim, dict) else None
    if not isinstance(optim, dict) or not isinstance(period, dict):
        return plain
    numbers = {int(key) if re.fullmatch("[0-9]{1,18}", key) else key: value for key, value in period.items()}
    return plain | {"optim": optim | {"update_period": numbers}}


def _is_training(training: Any) -> bool:
    return (
        isinstance(training, dict)
        and type(training.get("step")) is int
        and 0 <= training["step"] < 2**63
        and isinstance(training.get("corpus"), str)
        and isinstance(training.get("corpus_fingerprint"), str | None)
        and isinstance(training.get("best_valid_nll_nats"), float | None)
    )


def _is_clip(clip: Any) -> bool:
    nll = clip.get("nll_nats") if isinstance(clip, dict) else None
    return isinstance(nll, float) and math.isfinite(nll) and isinstance(clip["file"], str)


def _are_files(files: Any) -> bool:
    return (
        isinstance(files, dict)
        and MODEL_FILE in files
        and all(not name.startswith(".") and not set(name) & set("/\\\0") for name in files)
        and all(map(is_digest, files.values()))
    )


_RULES: dict[str, Callable[[Any], bool]] = {
    "data": lambda data: isinstance(data, dict),
    "codec": lambda codec: isinstance(codec, dict),
    "training": _is_training,
    "evaluations": lambda found: isinstance(found, list) and all(isinstance(each, dict) for each in found),
    "clip": _is_clip,
    "files": _are_files,
}
"""What config.json must say, by key; the configuration has checks of its own."""
