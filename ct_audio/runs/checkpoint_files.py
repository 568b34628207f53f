"""Checkpoints on disk: where they lie, whether one is whole, and the reading of its tensors.

    runs/<name>/checkpoints/step_00001000/  model.safetensors           parameters and buffers
                                            training.safetensors        optimizer: parameter_name/exp_avg, ...
                                            memory-rankK.safetensors    memory/... of the rank's lanes, rng/... as uint8
                                            config.yaml, state.json     state.json holds size and sha256 of the others
    runs/<name>/checkpoints/{last,best}     links to one of these, or files that hold its name
                            previous        while last has not been followed by a finite step: the one before

Whatever is read here anybody may have written or damaged; nothing of it is run. `training/checkpoint.py` writes it.
"""

import hashlib
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ct_audio.common.errors import UserError
from ct_audio.common.files import follow_link, read_json

FORMAT = "ct_audio checkpoint"
FORMAT_VERSION = 1
_ADVICE = "use another checkpoint or start a new run"


def find_checkpoint(run_dir: Path, which: str) -> Path | None:
    """Directory of the run's checkpoint `which` ("last", "best" or "previous"), links resolved; None if there is none.

    Raises:
        UserError: there is one, but not whole, or its link is missing or leads elsewhere; such a run is never taken for
            a new one.
    """
    link = run_dir / "checkpoints" / which
    place = follow_link(link)
    if (place / "state.json").is_file():
        if place.resolve().parent != link.parent.resolve():
            raise UserError(f"checkpoint {link} leads out of its directory, to {place.resolve()}; copy that here")
        return place.resolve()
    if link.is_symlink() or link.exists():
        raise UserError(f"checkpoint {link}: state.json is missing; bring it back, or choose another name")
    written = sorted(path.name for path in link.parent.glob("step_*") if not path.name.startswith("step_00000000"))
    if which == "last" and written:
        raise UserError(
            f"{link.parent} holds {', '.join(written)}, but no link named last (lost in a copy?); write the name of "
            f"one into a file: echo {max(written)} > {link}; or choose another name"
        )
    return None


def find_model(run_dir: Path, which: str) -> Path | None:
    """Directory of the checkpoint to take a model from: `which` ("best" or "last"), else the last; None without any.

    In a copy of a run that has lost its links it is the newest checkpoint, and a warning on stderr says so.

    Raises:
        UserError: a link is there, but what it leads to is not whole or elsewhere.
    """
    root = run_dir / "checkpoints"
    links = [root / name for name in dict.fromkeys((which, "last"))]
    for link in links:
        if link.exists() or link.is_symlink():
            return find_checkpoint(run_dir, link.name)
    written = sorted(path for path in root.glob("step_*") if (path / "state.json").is_file())
    if not written:
        return None
    names = " or ".join(link.name for link in links)
    print(f"warning: {root} has no link {names} (lost in a copy?); {written[-1].name} is taken", file=sys.stderr)
    return written[-1].resolve()


def read_state(checkpoint: Path, *, needed: Collection[str] | None = None) -> dict[str, Any]:
    """state.json of a checkpoint, after checking that its files are whole.

    Args:
        needed: files that must be there; None: all. Others may be missing, as in a copy, but not damaged.
    Raises:
        UserError: a file is missing, of another size or content than when it was written, or of another format.
    """
    try:
        state = read_json(checkpoint / "state.json")
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {checkpoint}: cannot read state.json: {error}") from error
    if not isinstance(state, dict) or (state.get("format"), state.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise UserError(f"checkpoint {checkpoint}: expected state.json of {FORMAT}, version {FORMAT_VERSION}")
    _check_state(checkpoint, state)
    files = {
        file: entry
        for file, entry in state["files"].items()
        if needed is None or file in needed or (checkpoint / file).exists()
    }
    require_whole(checkpoint, files, what=f"checkpoint {checkpoint}", advice=_ADVICE)
    return state


def require_whole(directory: Path, files: dict[str, dict[str, Any]], *, what: str, advice: str) -> None:
    """Raise `UserError` where a file of a directory is missing, or has another `digest` than stated.

    Args:
        files: digests by name.
        what, advice: how the message begins and ends.
    """
    for file, expected in sorted(files.items()):
        path = directory / file
        if not path.is_file() or path.is_symlink():
            raise UserError(f"{what}: {file} is missing or no plain file; {advice}")
        found = digest(path)
        if found != expected:
            raise UserError(
                f"{what}: {file} is damaged: expected {expected['bytes']} bytes with sha256 "
                f"{expected['sha256'][:12]}, got {found['bytes']} with {found['sha256'][:12]}; {advice}"
            )


def _check_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Raise `UserError` where state.json does not say what every checkpoint's says."""
    rules: dict[str, Callable[[Any], bool]] = {
        "step": lambda step: type(step) is int and 0 <= step < 2**63,
        "world_size": lambda size: type(size) is int and 0 < size <= 2**20,
        "files": lambda files: isinstance(files, dict) and all(map(is_digest, files.values())),
        "progress": lambda progress: (
            isinstance(progress, dict) and isinstance(progress.get("best_valid_nll_nats"), float | None)
        ),
        "stream": lambda stream: isinstance(stream, dict),
        "codec": lambda codec: isinstance(codec, dict),
        "corpus_fingerprint": lambda fingerprint: isinstance(fingerprint, str),
    }
    for key, holds in rules.items():
        if (key in state or key in ("step", "world_size", "files")) and not holds(state.get(key)):
            raise UserError(
                f"checkpoint {checkpoint}: state.json does not fit: {key} is {str(state.get(key))[:80]}; {_ADVICE}"
            )
    memories = {f"memory-rank{rank}.safetensors" for rank in range(state["world_size"])}
    expected = {"config.yaml", "model.safetensors", "training.safetensors"} | memories
    if state["files"].keys() != expected:
        raise UserError(
            f"checkpoint {checkpoint}: state.json does not fit: expected files {sorted(expected)[:4]}, "
            f"got {sorted(state['files'])[:8]}; {_ADVICE}"
        )


def is_digest(entry: Any) -> bool:
    """Whether something that was read looks like what `digest` returns."""
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
        return False
    return type(entry["bytes"]) is int and isinstance(entry["sha256"], str)


def digest(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as state.json states them."""
    with path.open("rb") as handle:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Live parameters (tied ones once) and persistent buffers by name."""
    kept = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**{name: parameter.detach() for name, parameter in model.named_parameters()}, **buffers}


def load_model(
    checkpoint: Path, model: nn.Module, *, part_like: Callable[[Tensor, Tensor], Tensor] = lambda like, tensor: tensor
) -> None:
    """Put a checkpoint's parameters and buffers into a model, in place.

    Args:
        part_like: makes of a tensor of the file what is copied into the model's first argument, where that is a shard.
    Raises:
        UserError: the file cannot be read, or its names, shapes or types are not the model's; nothing is changed then.
    """
    path = checkpoint / "model.safetensors"
    expected, found = model_tensors(model), read_tensors(path)
    if expected.keys() != found.keys():
        difference = sorted(expected.keys() ^ found.keys())
        raise UserError(f"{path} does not fit the model: missing or left over: {', '.join(difference)}")
    for name, tensor in expected.items():
        require_like(path, name, tensor, found[name])
    for name, tensor in expected.items():
        tensor.copy_(part_like(tensor, found[name]))


def require_like(path: Path, name: str, expected: Tensor, found: Tensor) -> None:
    """Raise `UserError` where a tensor of a file has another shape or type than the one that it is for."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise UserError(
            f"{path}: {name}: expected {tuple(expected.shape)} {expected.dtype}, "
            f"got {tuple(found.shape)} {found.dtype}; use the configuration that the run was started with"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name, on the CPU.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}; {_ADVICE}") from error
