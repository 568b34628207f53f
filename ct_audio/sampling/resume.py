"""A sampling on disk, from which it goes on bit for bit: what was sampled, and all that the next code depends on.

    DIR/sampling.json                   settings, plain values, size and sha256 of the tensors; its own digest
    DIR/sampling-HASH.safetensors       codes and log-probabilities so far, step state, random generators

The tensors are written under a name of their own, then sampling.json is replaced in one instant, then older tensors are
deleted: whenever the process is killed, the state of the last save is there. safetensors and JSON only, never pickle.
Shape letters: B lanes, T sampled codes.
"""

import hashlib
import json
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.common.files import hold_alone, read_json, write_file, write_json

FORMAT = "ct_audio sampling"
FORMAT_VERSION = 1
_NAME = "sampling.json"
_KEYS = {"settings": dict, "complete": bool, "num_codes": int, "values": dict, "file": str, "bytes": int, "sha256": str}
_TENSORS = re.compile(r"sampling-[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class SavedSampling:
    """What was sampled so far and how it goes on.

    Attributes:
        settings: plain values that decide every code.
        complete: the wav files of these codes have been written.
        leaves: of the sampler (see `Sampler.leaves`).
    """

    settings: dict[str, Any]
    complete: bool
    codes: Int[Tensor, "B T"]
    log_probabilities: Float[Tensor, "B T"]
    leaves: dict[str, Any]


def save_sampling(directory: Path, saved: SavedSampling) -> None:
    """Write the state of a sampling in place of the one before, which an `OSError` leaves untouched."""
    plain = {name: leaf for name, leaf in saved.leaves.items() if not isinstance(leaf, Tensor)}
    tensors = {f"leaf/{name}": leaf for name, leaf in saved.leaves.items() if isinstance(leaf, Tensor)}
    tensors |= {"codes": saved.codes.int(), "log_probabilities": saved.log_probabilities}
    raw = safetensors.torch.save({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()})
    digest = hashlib.sha256(raw).hexdigest()
    name = f"sampling-{digest[:16]}.safetensors"
    write_file(directory / name, raw)
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "settings": saved.settings}
    header |= {"complete": saved.complete, "num_codes": saved.codes.shape[1], "values": plain}
    _write_header(directory, header | {"file": name, "bytes": len(raw), "sha256": digest})
    for path in directory.glob("sampling-*.safetensors*"):
        if path.name != name:
            path.unlink(missing_ok=True)


def mark_complete(directory: Path) -> None:
    """Note that the wav files of the saved codes have been written."""
    header = read_header(directory)
    assert header is not None
    _write_header(directory, header | {"complete": True})


def read_header(directory: Path) -> dict[str, Any] | None:
    """sampling.json, None where there is none; `UserError` where it is damaged or of another format."""
    if not (directory / _NAME).exists():
        return None
    try:
        header = read_json(directory / _NAME)
    except (OSError, ValueError) as error:
        raise _damaged(directory, f"{_NAME} cannot be read: {error}") from error
    if not isinstance(header, dict) or header.pop("digest", None) != _digest(header):
        raise _damaged(directory, f"the digest of {_NAME} does not fit")
    if (header.get("format"), header.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise _damaged(directory, f"expected {FORMAT}, version {FORMAT_VERSION}")
    wrong = [key for key, kind in _KEYS.items() if not isinstance(header.get(key), kind)]
    if wrong or not _TENSORS.fullmatch(header["file"]):
        raise _damaged(directory, f"{_NAME}: wrong or missing {', '.join(wrong) or 'name of the tensors'}")
    return header


def load_sampling(directory: Path) -> SavedSampling | None:
    """The state of a sampling, on the CPU, None where there is none; `UserError` where it is damaged or truncated."""
    header = read_header(directory)
    if header is None:
        return None
    try:
        raw = (directory / header["file"]).read_bytes()
    except OSError as error:
        raise _damaged(directory, f"{header['file']} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(raw).hexdigest()
    if (len(raw), digest) != (header["bytes"], header["sha256"]):
        expected = f"expected {header['bytes']} bytes with sha256 {header['sha256'][:12]}"
        raise _damaged(directory, f"{header['file']}: {expected}, got {len(raw)} with {digest[:12]}")
    try:
        tensors = safetensors.torch.load(raw)
        codes, log_probabilities = tensors.pop("codes").long(), tensors.pop("log_probabilities")
    except (SafetensorError, KeyError) as error:
        raise _damaged(directory, f"{header['file']}: {error}") from error
    if not codes.shape == log_probabilities.shape == (len(codes), header["values"].get("num_codes")):
        raise _damaged(directory, f"{header['file']}: its codes do not fit the numbers in {_NAME}")
    leaves = {name.removeprefix("leaf/"): tensor for name, tensor in tensors.items()} | header["values"]
    return SavedSampling(header["settings"], header["complete"], codes, log_probabilities, leaves)


def require_no_unfinished(directory: Path) -> None:
    """Raise `UserError` where a sampling was broken off, or is damaged; a finished one may be replaced."""
    header = read_header(directory)
    if header is not None and not header["complete"]:
        raise UserError(
            f"{directory} holds an unfinished sampling of {header['num_codes']} codes a lane; "
            f"add --resume to go on with it, or delete {directory / _NAME}"
        )


def require_same_settings(directory: Path, saved: SavedSampling, settings: dict[str, Any]) -> None:
    """Raise `UserError` where a sampling would not go on with the settings it began with; it names all that differ."""
    pairs = {key: (saved.settings.get(key), settings.get(key)) for key in sorted(saved.settings | settings)}
    changed = [f"{key} (was {was}, now {now})" for key, (was, now) in pairs.items() if was != now]
    if changed:
        raise UserError(
            f"{directory} was sampled with other settings: {', '.join(changed)}; "
            "resume with those of before, or choose another --out"
        )


def directory_lock(directory: Path) -> AbstractContextManager[None]:
    """Hold a directory for this process; `UserError` where another process holds it."""
    return hold_alone(directory, f"another process samples to {directory}; wait for it, or choose another --out")


def _write_header(directory: Path, header: dict[str, Any]) -> None:
    write_json(directory / _NAME, header | {"digest": _digest(header)})


def _digest(header: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in header.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(directory: Path, what: str) -> UserError:
    advice = f"bring it back, or delete {directory / _NAME} to begin anew"
    return UserError(f"{directory}: the state of its sampling is damaged: {what}; {advice}")
