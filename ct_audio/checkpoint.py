"""Checkpoints of a run: atomic save, exact load, and what may change between two sessions of one run.

    runs/<name>/checkpoints/step_00001000/  model.safetensors           parameters and buffers
                                            training.safetensors        optimizer: parameter_name/exp_avg, ...
                                            memory-rankK.safetensors    memory/... of the rank's lanes, rng/... as uint8
                                            config.yaml, state.json     state.json holds size and sha256 of the others
    runs/<name>/checkpoints/{last,best}     links to one of these

A checkpoint is written to a fresh directory, synced and renamed; then the link is replaced in one instant, and what no
link points at is deleted. So `last` is loadable whenever the process is killed. safetensors and JSON only, never
pickle.
"""

import itertools
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ct_audio.checkpoint_files import FORMAT, FORMAT_VERSION, digest, find_checkpoint, read_state
from ct_audio.config import RunConfig, config_to_yaml, load_config
from ct_audio.distributed import World, all_gather, barrier
from ct_audio.errors import UserError
from ct_audio.files import write_file, write_json
from ct_audio.models import SequenceModel, build_model
from ct_audio.models.memory import map_memory, memory_from_tensors, named_tensors
from ct_audio.optim import trained_parameters


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


def save_checkpoint(
    run_dir: Path,
    *,
    config: RunConfig,
    model: SequenceModel,
    optimizer: torch.optim.Optimizer | None,
    memories: list[Any],
    state: dict[str, Any],
    world: World,
    is_best: bool = False,
) -> None:
    """Write a checkpoint and switch `last` (and `best`) to it; all ranks call it together.

    Args:
        run_dir: the run's directory.
        optimizer: None for a model without parameters.
        memories: of this rank's lanes, one a micro-batch, in the order of the lanes.
        state: JSON-able; must hold "step", the steps completed. Only rank 0's is written.
        is_best: the checkpoint is the best one so far by validation NLL.
    Raises:
        OSError: it cannot be written; the checkpoints of before are untouched.
    """
    root = run_dir / "checkpoints"
    name = f"step_{state['step']:08d}"
    beside = root / f"writing-{name}"
    files = {f"memory-rank{world.rank}.safetensors": _lane_tensors(memories)}
    if world.is_first:
        for stale in root.glob("writing-*"):
            shutil.rmtree(stale)
        beside.mkdir(parents=True)
        files["model.safetensors"] = _model_tensors(model)
        files["training.safetensors"] = _optimizer_tensors(model, optimizer)
    barrier()
    try:
        digests = {file: _write_tensors(beside / file, tensors) for file, tensors in files.items()}
        digests = {file: digest for part in all_gather(digests) for file, digest in part.items()}
        if world.is_first:
            write_file(beside / "config.yaml", config_to_yaml(config).encode())
            digests["config.yaml"] = digest(beside / "config.yaml")
            header = {"format": FORMAT, "format_version": FORMAT_VERSION, "world_size": world.world_size}
            write_json(beside / "state.json", header | state | {"files": digests})
            _sync_directory(beside)
            place = _unused(root / name)  # a step may be saved twice, and `last` must never be touched
            beside.rename(place)
            _sync_directory(root)
            for link in ("last", "best")[: 1 + is_best]:
                _switch(root / link, place.name)
            _delete_unreferenced(root)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)  # it may be what fills the disk
        raise
    barrier()


def load_checkpoint(
    checkpoint: Path,
    *,
    model: SequenceModel,
    optimizer: torch.optim.Optimizer | None,
    num_lanes: int,
    num_micro_batches: int,
    world: World,
) -> tuple[list[Any], dict[str, Any]]:
    """Put a training session back where it was: weights, optimizer and torch's random generators, in place.

    Args:
        checkpoint: its directory.
        num_lanes: lanes of this rank.
        num_micro_batches: parts into which this rank's lanes are split now.
    Returns:
        the memories, one a micro-batch, and state.json.
    Raises:
        UserError: the checkpoint is damaged, does not fit the model, or is of another number of processes.
    """
    state = read_state(checkpoint)
    if state["world_size"] != world.world_size:
        raise UserError(
            f"checkpoint {checkpoint} is of {state['world_size']} processes, this session has {world.world_size}; "
            "start as many as before"
        )
    _load_model(checkpoint, model)
    _load_optimizer(checkpoint, model, optimizer)
    tensors = _read_tensors(checkpoint / f"memory-rank{world.rank}.safetensors")
    prefix = "memory/"
    lanes = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    memory = memory_from_tensors(model.zero_memory(num_lanes), lanes)
    try:
        _set_rng_state({name.removeprefix("rng/"): t for name, t in tensors.items() if name.startswith("rng/")})
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {checkpoint}: memory-rank{world.rank}.safetensors: expected rng/cpu, a state of torch's "
            f"random generator: {error}; use another checkpoint or start a new run"
        ) from error
    return split_memory(memory, num_lanes, num_micro_batches), state


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
            raise UserError(f"{run_dir}: no checkpoint {which!r}; expected a directory that tools/train.py made")
        try:
            state = read_state(path)
            config = load_config(path / "config.yaml")
            _require_shapes(path / "model.safetensors", config)
            model = build_model(config)
            if config.train.precision == "float64":
                as_module(model).double()
            _load_model(path, model)
        except UserError:
            if path.exists() or attempt == 2:  # else a training run has just deleted it for a newer one
                raise
            continue
        as_module(model).to(device).eval()
        return LoadedRun(config, model, state["step"], path, state)
    raise AssertionError("unreachable")


def split_memory(memory: Any, num_lanes: int, num_parts: int) -> list[Any]:
    """Cut a memory of `num_lanes` lanes into equal parts of consecutive lanes."""
    size = num_lanes // num_parts
    return [
        map_memory(lambda tensor, first=part * size: tensor[first : first + size].clone(), memory)
        for part in range(num_parts)
    ]


def as_module(model: SequenceModel) -> nn.Module:
    """The same object, typed as the module that every model is."""
    assert isinstance(model, nn.Module)
    return model


def _model_tensors(model: SequenceModel) -> dict[str, Tensor]:
    """Live parameters (tied ones once) and persistent buffers by name."""
    module = as_module(model)
    kept = module.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    return {**{name: parameter.detach() for name, parameter in module.named_parameters()}, **buffers}


def _require_shapes(path: Path, config: RunConfig) -> None:
    """Compare names and shapes before the model is built: a configuration may ask for more memory than there is."""
    try:
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in _model_tensors(build_model(config)).items()}
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: cannot build the model of config.yaml: {str(error).splitlines()[0]}") from error
    found = {name: tuple(tensor.shape) for name, tensor in _read_tensors(path).items()}
    if expected != found:
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(
            f"{path} does not fit the model of config.yaml: {different[0]}: expected {expected.get(different[0])}, "
            f"got {found.get(different[0])}; {len(different)} tensors differ"
        )


def _load_model(checkpoint: Path, model: SequenceModel) -> None:
    path = checkpoint / "model.safetensors"
    expected, found = _model_tensors(model), _read_tensors(path)
    if expected.keys() != found.keys():
        difference = sorted(expected.keys() ^ found.keys())
        raise UserError(f"{path} does not fit the model: missing or left over: {', '.join(difference)}")
    for name, tensor in expected.items():
        _require_like(path, name, tensor, found[name])
    for name, tensor in expected.items():
        tensor.copy_(found[name])


def _optimizer_tensors(model: SequenceModel, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    if optimizer is None:
        return {}
    return {
        f"{name}/{key}": value
        for name, parameter in trained_parameters(model)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(checkpoint: Path, model: SequenceModel, optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is None:
        return
    path = checkpoint / "training.safetensors"
    found = _read_tensors(path)
    if not found:  # written before the first update
        optimizer.state.clear()
        return
    parameters = dict(trained_parameters(model))
    expected = {f"{name}/{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")}
    if expected != found.keys():
        difference = sorted(expected ^ found.keys())
        raise UserError(f"{path} does not fit the model: missing or left over: {', '.join(difference)}")
    for name, parameter in parameters.items():
        for key in ("exp_avg", "exp_avg_sq"):
            _require_like(path, f"{name}/{key}", parameter, found[f"{name}/{key}"])
        _require_like(path, f"{name}/step", torch.zeros((), dtype=torch.float32), found[f"{name}/step"])
        optimizer.state[parameter] = {
            key: found[f"{name}/{key}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
        }


def _lane_tensors(memories: list[Any]) -> dict[str, Tensor]:
    """Memory of this rank's lanes, micro-batches joined, and the state of torch's generators."""
    parts = [dict(named_tensors(memory)) for memory in memories]
    tensors = {f"memory/{name}": torch.cat([part[name] for part in parts]) for name in parts[0]}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def _set_rng_state(states: dict[str, UInt8[Tensor, "_"]]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _require_like(path: Path, name: str, expected: Tensor, found: Tensor) -> None:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise UserError(
            f"{path}: {name}: expected {tuple(expected.shape)} {expected.dtype}, "
            f"got {tuple(found.shape)} {found.dtype}; use the configuration that the run was started with"
        )


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write, sync, and return size and sha256."""
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        reason = (
            (int(number[1]), os.strerror(int(number[1])), str(path)) if number else (f"cannot write {path}: {error}",)
        )
        raise OSError(*reason) from error
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())
    return digest(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}; use another checkpoint or start a new run") from error


def _switch(link: Path, target: str) -> None:
    """Make `link` point at its sibling `target`, in one instant."""
    beside = link.with_name(f"{link.name}.tmp")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target, target_is_directory=True)
    if link.is_dir() and not link.is_symlink():  # a copy of a run in which links became directories
        link.rename(link.with_name(f"step_of_{link.name}"))
    beside.replace(link)
    _sync_directory(link.parent)


def _unused(path: Path) -> Path:
    others = (path.with_name(f"{path.name}-{count}") for count in itertools.count(2))
    return path if not path.exists() else next(other for other in others if not other.exists())


def _delete_unreferenced(root: Path) -> None:
    referenced = {(root / link).resolve() for link in ("last", "best")}
    for directory in root.glob("step_*"):
        if directory.resolve() not in referenced:
            shutil.rmtree(directory)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
