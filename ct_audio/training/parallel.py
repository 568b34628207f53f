"""Processes under torchrun: set-up, small collectives, data parallelism. The only importer of torch.distributed.

Everything here also works in a single process without torchrun, where it does nothing. Numbers and messages travel over
gloo on the CPU, and may wait for days; gradients on CUDA devices over NCCL, with torch's timeout of ten minutes.
"""

import contextlib
import datetime
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from ct_audio.common.errors import UserError

T = TypeVar("T")

_CPU_TIMEOUT = datetime.timedelta(days=30)  # rank 0 validates, however long; torchrun ends all when a process dies


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
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield World()
        return
    world = World(int(os.environ["RANK"]), world_size, int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo", timeout=_CPU_TIMEOUT)
    try:
        yield world
    finally:
        gc.collect()  # data parallelism holds the group in a cycle; the group's threads must end before the interpreter
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes of a tensor on the CPU, which is overwritten and returned."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather(value: Any) -> list[Any]:
    """Every process's value (anything that pickles), by rank; also a barrier."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until all processes are here."""
    all_gather(None)


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
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def data_parallel(module: nn.Module, world: World) -> nn.Module:
    """Wrap a module so that its gradients are averaged over processes in backward; alone, the module itself.

    All ranks call it together.
    """
    if world.world_size == 1:
        return module
    on_cuda = next(module.parameters()).is_cuda
    group = dist.new_group(backend="nccl") if on_cuda else None  # None: that of the CPU
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, process_group=group)


def no_synchronisation(module: nn.Module) -> AbstractContextManager[None]:
    """Inside it a backward pass adds to the local gradients only (a step, or micro-batch, without an update)."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
