"""Memory that a training run needs, from its configuration alone: sizes of fake tensors, which hold no numbers.

What is counted is what stands as the backward pass begins: weights, gradients and moments of Adam; what autograd keeps
of a chunk; the memories of the lanes. Not counted are single tensors that come and go, and what the allocator wastes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from ct_audio.common.errors import UserError
from ct_audio.common.text import markdown_table
from ct_audio.models import build_model
from ct_audio.models.state import named_tensors
from ct_audio.runs.config import RunConfig
from ct_audio.training.session import ChunkLoss, checkpoint_layers

_NOT_KNOWN = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
_COPIES = 4  # weight, gradient, two moments


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process, on its device.

    Attributes:
        num_parameters: of the whole model.
        num_lanes: of the process; `num_lanes_together` of them are in a micro-batch.
        whole_state: weights, gradients and moments, with `train.parallel: ddp`.
        sharded_state: the same with fsdp: a share of each, and what is whole at one time: weights and gradients of what
            is outside of layers and of the largest layer, and the weights of the next one, which is fetched meanwhile.
        activations: kept for the backward pass of a micro-batch; None where that depends on the codes, or in float64.
        activations_with_checkpoints: the same with `train.checkpoint_layers`; None also where there are no layers.
        memories: of all lanes of the process, once.
    """

    num_parameters: int
    num_lanes: int
    num_lanes_together: int
    whole_state: int
    sharded_state: int
    activations: int | None
    activations_with_checkpoints: int | None
    memories: int


def footprint(config: RunConfig, *, num_processes: int = 1) -> Footprint:
    """What each process of a run needs.

    Args:
        num_processes: at least 1; they share the lanes.
    Raises:
        UserError: the lanes cannot be shared.
    """
    parts = num_processes * config.train.num_micro_batches
    if num_processes < 1 or config.data.num_lanes % parts:
        raise UserError(
            f"--processes {num_processes}: data.num_lanes = {config.data.num_lanes} is not divisible by them times "
            f"train.num_micro_batches = {config.train.num_micro_batches}; change one of them"
        )
    together = config.data.num_lanes // parts
    num_lanes = together * config.train.num_micro_batches
    with torch.device("meta"):
        model = build_model(config)
        memory = model.zero_memory(num_lanes)
    width = 8 if config.train.precision == "float64" else 4
    layers = [sum(parameter.numel() for parameter in unit.parameters()) for unit in model.shard_units()]
    count = sum(parameter.numel() for parameter in model.parameters())
    at_once = 2 * (count - sum(layers)) + 3 * max(layers, default=0)
    known = [
        _activations(config, together, with_checkpoints=checkpoints) if layers or not checkpoints else None
        for checkpoints in (False, True)
    ]
    return Footprint(
        num_parameters=count,
        num_lanes=num_lanes,
        num_lanes_together=together,
        whole_state=_COPIES * count * width,
        sharded_state=(_COPIES * -(-count // num_processes) + (at_once if num_processes > 1 else 0)) * width,
        activations=known[0],
        activations_with_checkpoints=known[1],
        memories=sum(_sizes(tensor for _, tensor in named_tensors(memory)).values()),
    )


def footprint_table(configs: list[RunConfig], *, num_processes: int) -> str:
    """The footprints of configurations as Markdown, in GiB a process."""
    header = ["configuration", "parameters", "lanes of a process", "weights, gradients, Adam: ddp", "fsdp"]
    rows = [[*header, "activations", "with checkpoint_layers", "memories"]]
    for config in configs:
        found = footprint(config, num_processes=num_processes)
        parts = config.train.num_micro_batches
        lanes = f"{found.num_lanes}" if parts == 1 else f"{found.num_lanes} ({found.num_lanes_together} at a time)"
        sizes = (found.whole_state, found.sharded_state, found.activations, found.activations_with_checkpoints)
        rows.append(
            [config.name, f"{found.num_parameters:,}", lanes, *map(_gibibytes, sizes), _gibibytes(found.memories)]
        )
    count = f"{num_processes} process" + ("es" if num_processes > 1 else "")
    return f"GiB of each of {count}, by `ct-audio describe`:\n\n{markdown_table(rows)}"


def _gibibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.3f}" if size < 2**30 else f"{size / 2**30:.2f}"


def _activations(config: RunConfig, num_lanes: int, *, with_checkpoints: bool) -> int | None:
    """Bytes that autograd keeps of a chunk of lanes whose memories are full."""
    if config.train.precision == "float64":  # a fake model stays in the type in which it was made
        return None
    try:
        with FakeTensorMode():
            model = build_model(config)
            if with_checkpoints:
                checkpoint_layers(model)
            codes = torch.zeros(num_lanes, config.data.chunk_length, dtype=torch.int64)
            loss = ChunkLoss(model, device_type="cpu", precision=config.train.precision)
            return kept_bytes(loss, codes, model.full_memory(num_lanes))[0]
    except _NOT_KNOWN:
        return None


def kept_bytes(loss: ChunkLoss, codes: Tensor, memory: Any) -> tuple[int, Any]:
    """Bytes that autograd keeps of a forward pass, parameters, codes and memory apart; and what the pass returned.

    Args:
        codes: inputs and targets, int64 [B, T].
        memory: of B lanes.
    """
    own = [*loss.parameters(), *loss.buffers(), codes, *(tensor for _, tensor in named_tensors(memory))]
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = loss(codes, codes, memory, None)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in _sizes(own)), output


def _sizes(tensors: Any) -> dict[int, int]:
    """Bytes of each storage, by its place."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
