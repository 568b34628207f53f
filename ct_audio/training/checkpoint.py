"""Save a training session as a checkpoint, and put one back: exact, and atomic. Layout: `runs/checkpoint_files.py`.

A checkpoint is written to a fresh directory, synced and renamed; then the link is replaced in one instant, and what no
link leads to is deleted. So `last` is loadable whenever the process is killed. safetensors and JSON only, never pickle.

Weights may be finite and useless all the same. So the checkpoint before stays as `previous` until a step from the last
one has been finite (`drop_previous`); where it has not been, `previous` becomes `last` again (`go_back`).
"""

import itertools
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.common.files import follow_link, switch_link, sync_directory, write_file, write_json
from ct_audio.models import SequenceModel
from ct_audio.models.interface import StatefulModule
from ct_audio.models.state import map_memory, memory_from_tensors, named_tensors
from ct_audio.runs.checkpoint_files import (
    FORMAT,
    FORMAT_VERSION,
    digest,
    find_checkpoint,
    load_model,
    model_tensors,
    read_state,
    read_tensors,
    require_like,
)
from ct_audio.runs.config import config_to_yaml
from ct_audio.training.parallel import World, all_gather, barrier, on_first_rank, part_like, whole


def save_checkpoint(
    run_dir: Path,
    *,
    config: Any,
    model: StatefulModule,
    optimizer: torch.optim.Optimizer | None,
    memories: list[Any],
    state: dict[str, Any],
    world: World,
    is_best: bool = False,
    keep_previous: bool = False,
) -> None:
    """Write a checkpoint and switch `last` (and `best`) to it; all ranks call it together.

    Args:
        run_dir: the run's directory.
        config: a `RunConfig`, or the configuration of another kind of run.
        optimizer: None for a model without parameters.
        memories: of this rank's lanes, one a micro-batch, in the order of the lanes.
        state: JSON-able; must hold "step", the steps completed. Only rank 0's is written.
        is_best: the checkpoint is the best one so far by validation NLL.
        keep_previous: what `last` led to stays as `previous`; else what is `previous` already stays it.
    Raises:
        OSError: it cannot be written; the checkpoints of before are untouched.
    """
    root = run_dir / "checkpoints"
    name = f"step_{state['step']:08d}"
    beside = place = root / f"writing-{name}"
    files = {"model": lambda: model_tensors(model), "training": lambda: _optimizer_tensors(model, optimizer)}
    if world.is_first:
        for stale in root.glob("writing-*"):
            shutil.rmtree(stale)
        beside.mkdir(parents=True)
    barrier(patient=True)
    try:
        own = f"memory-rank{world.rank}.safetensors"
        digests = {own: _write_tensors(beside / own, _lane_tensors(memories))}
        for file, tensors in files.items():
            found = _gather(tensors(), world)
            if world.is_first:
                digests[f"{file}.safetensors"] = _write_tensors(beside / f"{file}.safetensors", found)
            del found
            barrier(patient=True)  # rank 0 writes
        digests = {file: digest for part in all_gather(digests) for file, digest in part.items()}
        if world.is_first:
            write_file(beside / "config.yaml", config_to_yaml(config).encode())
            digests["config.yaml"] = digest(beside / "config.yaml")
            header = {"format": FORMAT, "format_version": FORMAT_VERSION, "world_size": world.world_size}
            write_json(beside / "state.json", header | state | {"files": digests})
            sync_directory(beside)
            before = find_checkpoint(run_dir, "last")
            place = _unused(root / name)  # a step may be saved twice, and `last` must never be touched
            beside.rename(place)
            sync_directory(root)
            if keep_previous and before is not None and before.name.startswith("step_"):
                _switch(root / "previous", before.name)
            for link in ("last", "best")[: 1 + is_best]:
                _switch(root / link, place.name)
            _delete_unreferenced(root)
    except OSError:
        if place not in _referenced(root):
            shutil.rmtree(place, ignore_errors=True)  # it may be what fills the disk
        shutil.rmtree(beside, ignore_errors=True)
        raise
    barrier(patient=True)


def drop_previous(run_dir: Path) -> None:
    """The last checkpoint has been followed by a finite step: the one before is no longer needed. For rank 0."""
    link = run_dir / "checkpoints" / "previous"
    if link.is_dir() and not link.is_symlink():  # of a copy
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    _delete_unreferenced(link.parent)


def go_back(run_dir: Path) -> str | None:
    """Let `last` lead to the checkpoint before, if that is there still, and delete what was the last. For rank 0.

    Returns:
        the name of the deleted checkpoint; None where nothing has been done.
    """
    root = run_dir / "checkpoints"
    last, previous = find_checkpoint(run_dir, "last"), follow_link(root / "previous").resolve()
    if last is None or last == previous or not (previous / "state.json").is_file():
        return None
    _switch(root / "last", previous.name)
    drop_previous(run_dir)
    return last.name


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
        UserError: the checkpoint is damaged, or does not fit the model or the number of processes.
    """
    like = model.zero_memory(num_lanes)
    memory, state = load_session(checkpoint, model=model, optimizer=optimizer, like=like, world=world)
    return split_memory(model.recount_memory(memory), num_lanes, num_micro_batches), state


def load_session(
    checkpoint: Path, *, model: StatefulModule, optimizer: torch.optim.Optimizer | None, like: Any, world: World
) -> tuple[Any, dict[str, Any]]:
    """As `load_checkpoint`, with whatever nest of tensors was saved as a memory.

    As many processes as before get back the states of their random generators, and go on bit for bit on a CPU. Another
    number gets the lanes dealt out anew; their sums have another order, and their generators draw other numbers.

    Args:
        like: a nest of its form, for this rank; the lane is first in every tensor where the number of ranks changes.
    Returns:
        the nest, and state.json.
    """
    state = on_first_rank(lambda: read_state(checkpoint))
    load_model(checkpoint, model, part_like=part_like)
    _load_optimizer(checkpoint, model, optimizer)
    as_before = state["world_size"] == world.world_size
    file = f"memory-rank{world.rank if as_before else 0}.safetensors"
    tensors = read_tensors(checkpoint / file)
    lanes = tensors if as_before else _deal_lanes(checkpoint, state["world_size"], like, world)
    memory = memory_from_tensors(like, _below("memory/", lanes))
    try:
        _set_rng_state(_below("rng/", tensors))
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {checkpoint}: {file}: expected rng/cpu, a state of torch's random generator: {error}; "
            "use another checkpoint or start a new run"
        ) from error
    if not as_before:
        torch.manual_seed(int(torch.randint(2**40, ())) + world.rank)
    return memory, state


def _deal_lanes(checkpoint: Path, num_files: int, like: Any, world: World) -> dict[str, Tensor]:
    """The memory of this rank's lanes, from files that hold all lanes one after another, equally many each."""
    num_lanes = max((len(tensor) for _, tensor in named_tensors(like)), default=0)
    per_file, left_over = divmod(num_lanes * world.world_size, num_files)
    lanes = range(world.rank * num_lanes, (world.rank + 1) * num_lanes)
    parts: dict[str, list[Tensor]] = {}
    for index in range(num_files):
        first, stop = (max(0, place - index * per_file) for place in (lanes.start, lanes.stop))
        if first >= min(stop, per_file):
            continue
        path = checkpoint / f"memory-rank{index}.safetensors"
        for name, tensor in read_tensors(path).items():
            if name.startswith("memory/"):
                if left_over or tensor.dim() == 0 or len(tensor) != per_file:
                    raise UserError(
                        f"{path}: {name}: expected {num_lanes * world.world_size} lanes in {num_files} files, got a "
                        f"tensor {tuple(tensor.shape)}; use the lanes that the run was started with"
                    )
                parts.setdefault(name, []).append(tensor[first:stop])
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def split_memory(memory: Any, num_lanes: int, num_parts: int) -> list[Any]:
    """Cut a memory of `num_lanes` lanes into equal parts of consecutive lanes."""
    size = num_lanes // num_parts
    return [
        map_memory(lambda tensor, first=part * size: tensor[first : first + size].clone(), memory)
        for part in range(num_parts)
    ]


def _optimizer_tensors(model: StatefulModule, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    if optimizer is None:
        return {}
    return {
        f"{name}/{key}": value
        for name, parameter in model.trained_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(checkpoint: Path, model: StatefulModule, optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is None:
        return
    path = checkpoint / "training.safetensors"
    found = read_tensors(path)
    if not found:  # written before the first update
        optimizer.state.clear()
        return
    parameters = dict(model.trained_parameters())
    expected = {f"{name}/{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")}
    if expected != found.keys():
        difference = sorted(expected ^ found.keys())
        raise UserError(f"{path} does not fit the model: missing or left over: {', '.join(difference)}")
    for name, parameter in parameters.items():
        for key in ("exp_avg", "exp_avg_sq"):
            require_like(path, f"{name}/{key}", parameter, found[f"{name}/{key}"])
        require_like(path, f"{name}/step", torch.zeros((), dtype=torch.float32), found[f"{name}/step"])
        step = found[f"{name}/step"].to(parameter.device, copy=True)  # else the file stays mapped, and NFS keeps it
        moments = {key: part_like(parameter, found[f"{name}/{key}"]) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": step, **moments}


def _lane_tensors(memories: list[Any]) -> dict[str, Tensor]:
    """Memory of this rank's lanes, micro-batches joined, and the state of torch's generators."""
    parts = [dict(named_tensors(memory)) for memory in memories]
    tensors = {f"memory/{name}": torch.cat([part[name] for part in parts]) for name in parts[0]}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def _set_rng_state(states: dict[str, UInt8[Tensor, " _"]]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _gather(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole copies on the CPU, on rank 0; nothing elsewhere. A shard at a time crosses the network."""
    copies = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())
        if world.is_first:
            copies[name] = tensor.cpu()
    return copies


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


def _switch(link: Path, target: str) -> None:
    """As `switch_link`; a copy of a run, in which links became directories, is made one with links again."""
    if link.is_dir() and not link.is_symlink():
        link.rename(link.with_name(f"step_of_{link.name}"))
    switch_link(link, target)


def _unused(path: Path) -> Path:
    others = (path.with_name(f"{path.name}-{count}") for count in itertools.count(2))
    return path if not path.exists() else next(other for other in others if not other.exists())


def _delete_unreferenced(root: Path) -> None:
    for directory in set(root.glob("step_*")) - _referenced(root):
        shutil.rmtree(directory, ignore_errors=True)  # NFS keeps what somebody reads; the next save tries again


def _referenced(root: Path) -> set[Path]:
    """What links of the directory `root` lead to."""
    return {root / follow_link(root / link).resolve().name for link in ("last", "best", "previous")}
