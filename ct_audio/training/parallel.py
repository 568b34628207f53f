"""Processes under torchrun: set-up, small collectives, data parallelism. The only importer of torch.distributed.

Everything here also works in a single process without torchrun, where it does nothing. Numbers and messages travel over
gloo on the CPU, gradients and shards of CUDA devices over NCCL. A process that has not answered within the timeout ends
the others; only while rank 0 works alone (`on_first_rank`, `barrier(patient=True)`) do they wait however long.
"""

import contextlib
import datetime
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout  # has no public form; it takes effect at the next call
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ct_audio.common.errors import UserError

T = TypeVar("T")
Kind = Literal["ddp", "fsdp"]

_PATIENCE = datetime.timedelta(days=30)  # rank 0 validates, however long; torchrun ends all when a process dies
_SET_UP = datetime.timedelta(minutes=15)  # processes read, build and compile at different speeds
_LOST = ("timed out", "connection closed by peer", "connection reset by peer", "broken pipe", "connection refused")

_groups: dict[str, Any] = {}  # of this process: "patient", and "gradients" on CUDA


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: in [0, world_size); rank 0 writes files and prints.
        world_size: number of processes.
        local_rank: rank on this machine; it chooses the CUDA device, see `choose_device`.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


@contextlib.contextmanager
def distributed_world() -> Iterator[World]:
    """Join the processes that torchrun started (by its environment variables), and leave them at the end.

    Without torchrun: a world of one process.

    Raises:
        UserError: in place of torch's error where another process has died or has not answered in time.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield World()
        return
    world = World(int(os.environ["RANK"]), world_size, int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo", timeout=_SET_UP)
    _groups["patient"] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield world
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in _LOST):
            raise
        raise UserError(
            f"rank {world.rank}: another process has ended, or has not answered in time ({str(error)[:200]}); "
            "see its messages; the same command resumes the run"
        ) from error
    finally:
        _groups.clear()
        gc.collect()  # data parallelism holds the group in a cycle; the group's threads must end before the interpreter
        dist.destroy_process_group()


def set_timeout(seconds: float) -> None:
    """How long this process waits for the others from here on; until then it is a quarter of an hour."""
    if dist.is_initialized():
        for group in (None, _groups.get("gradients")):
            _set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes of a tensor on the CPU, which is overwritten and returned."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather(value: Any, *, patient: bool = False) -> list[Any]:
    """Every process's value (anything that pickles), by rank; also a barrier, see there."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_groups["patient"] if patient else None)
    return values


def barrier(*, patient: bool = False) -> None:
    """Wait until all processes are here; patiently, where one has long work to do before."""
    all_gather(None, patient=patient)


def on_first_rank(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 while the others wait, and return its result (which must pickle) on every rank.

    Raises:
        UserError: on every rank, where rank 0 raised it; any other exception there is a UserError on the other ranks.
    """
    if not dist.is_initialized():
        return function()
    box: list[Any] = [None, None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except Exception as error:
            failure = error
            box[1] = str(error) if isinstance(error, UserError) else f"rank 0 failed: {type(error).__name__}: {error}"
    dist.broadcast_object_list(box, src=0, group=_groups["patient"])
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def data_parallel(
    module: nn.Module, world: World, *, device: torch.device, kind: Kind = "ddp", units: Sequence[nn.Module] = ()
) -> nn.Module:
    """Bring a module to its device and let backward average its gradients over the processes. All ranks call it.

    Args:
        module: on the CPU, equal on all ranks. With "fsdp" it must have a method `run`, see `run_sharded`.
        kind: "ddp": every process holds all parameters; "fsdp": a part of each, gathered when they are needed.
        units: parts that are gathered one at a time (`shard_units` of a model).
    Returns:
        what to call: another module with "ddp", the same one otherwise. Alone it is the module itself.
    """
    if world.world_size == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
        return module.to(device)
    if device.type == "cuda":
        _groups["gradients"] = dist.new_group(backend="nccl", timeout=_SET_UP)
    group = _groups.get("gradients")  # None: that of the CPU
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(module.to(device), broadcast_buffers=False, process_group=group)
    group = group or dist.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, device.type)
    for part in (*units, module):
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(module, "run")
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether its forward passes need all ranks."""
    return isinstance(module, FSDPModule)


def no_synchronisation(module: nn.Module) -> AbstractContextManager[None]:
    """Inside it a backward pass adds to the local gradients only (a step, or micro-batch, without an update).

    Not with shards: local gradients would be as large as the whole model.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


def run_sharded(module: Any, function: Callable[[], T]) -> T:
    """Call a function that makes forward passes of a part of a sharded module; all ranks do, as many of them.

    Args:
        module: has a method `run` that calls a function.
    """
    try:
        return module.run(function)
    finally:
        module.reshard()


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, each process holds all parameters of a sharded module, and no forward pass of a unit may be made."""
    units = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each rank holds a shard (all ranks call it); another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(like: Tensor, tensor: Tensor) -> Tensor:
    """A copy on the device of `like`, cut as that one is, where each rank has all of it."""
    copied = tensor.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return copied
    return distribute_tensor(copied, like.device_mesh, like.placements, src_data_rank=None)
