"""Run by torchrun for test_distributed.py: training steps of tiny models on shards, beside one process with all lanes.

Prints, as JSON, the largest differences of weights, moments, memories and gradient norms by case.
"""

import contextlib
import copy
import json
import sys
import traceback
from typing import Any

import torch
from tiny import TINY_MODELS, tiny_model
from torch import Tensor

from ct_audio.models import SequenceModel
from ct_audio.models.interface import clip_gradients
from ct_audio.models.state import detach_memory, named_tensors
from ct_audio.runs.config import OptimConfig
from ct_audio.training.parallel import (
    World,
    all_gather,
    data_parallel,
    distributed_world,
    is_sharded,
    no_synchronisation,
    whole,
)
from ct_audio.training.schedules import make_optimizer
from ct_audio.training.session import ChunkLoss, checkpoint_layers

CHUNK_LENGTH, NUM_STEPS, LANES, OPTIM = 16, 6, 4, OptimConfig(initial_learning_rate=1e-3, max_gradient_norm=0.1)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, {}, {}) for name in TINY_MODELS if not name.startswith("linear_prediction")},
    "no_compression_loss": ("compressive_transformer", {"compression_loss": "none"}, {}),
    "update_period_2": ("compressive_transformer", {}, {"update_period": 2}),
    "documents": ("compressive_transformer_zero", {}, {"documents": True}),
    "checkpoint_layers": ("compressive_transformer_pre_norm", {"dropout": 0.0}, {"checkpoint": True}),
    "checkpoint_layers_most_used": ("compressive_transformer_most_used", {}, {"checkpoint": True}),
    "checkpoint_layers_bptt": ("compressive_transformer_bptt", {}, {"checkpoint": True}),
}


def steps(
    model: SequenceModel, world: World, codes: Tensor, starts: Tensor | None, update_period: int
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """All tensors after the steps, whole, and the gradient norms of each update."""
    loss = ChunkLoss(model, device_type="cpu", precision="float64")
    how: dict[str, Any] = {"kind": "fsdp", "units": model.shard_units(), "device": torch.device("cpu")}
    loss = data_parallel(loss, world, **how)
    assert is_sharded(loss) == (world.world_size > 1)
    optimizer, norms = make_optimizer(model, OPTIM), []
    memory = model.zero_memory(len(codes))
    for step in range(NUM_STEPS):
        part = slice(step * CHUNK_LENGTH, (step + 1) * CHUNK_LENGTH)
        targets = codes[:, part.start + 1 : part.stop + 1]
        updates = (step + 1) % update_period == 0
        with contextlib.nullcontext() if updates else no_synchronisation(loss):
            nll, memory, auxiliary = loss(codes[:, part], targets, memory, None if starts is None else starts[:, part])
            (torch.stack([nll.mean(), *auxiliary.values()]).sum() / update_period).backward()
        memory = detach_memory(memory)
        if updates:
            found = clip_gradients(model.gradient_groups(), OPTIM.max_gradient_norm)
            norms.append(
                {name: float(whole(torch.as_tensor(norm, dtype=torch.float64))) for name, norm in found.items()}
            )
            optimizer.step()
            model.after_update()
            optimizer.zero_grad()
    tensors = {f"weights/{name}": whole(parameter.detach()) for name, parameter in model.named_parameters()}
    for name, parameter in model.trained_parameters():
        tensors |= {f"moments/{name}/{key}": whole(value) for key, value in optimizer.state[parameter].items()}
    lanes = all_gather(dict(named_tensors(memory))) if world.world_size > 1 else [dict(named_tensors(memory))]
    return tensors | {f"memory/{name}": torch.cat([lane[name] for lane in lanes]) for name in lanes[0]}, norms


def compare(world: World, name: str, changes: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """Largest differences between shards and one process."""
    torch.manual_seed(0)
    model = tiny_model(name, **changes).double()
    alone = copy.deepcopy(model)
    if options.get("checkpoint"):
        checkpoint_layers(model)
    random_numbers = torch.Generator().manual_seed(1)
    codes = torch.randint(model.vocab_size, (LANES, CHUNK_LENGTH * NUM_STEPS + 1), generator=random_numbers)
    starts = torch.rand(codes.shape, generator=random_numbers) < 0.03 if options.get("documents") else None
    period, lanes = options.get("update_period", 1), LANES // world.world_size
    own = slice(world.rank * lanes, (world.rank + 1) * lanes)
    found, norms = steps(model, world, codes[own], None if starts is None else starts[own], period)
    expected, expected_norms = steps(alone, World(), codes, starts, period)
    assert found.keys() == expected.keys()
    differences = {"norms": 0.0, "weights": 0.0, "moments": 0.0, "memory": 0.0}
    for key, tensor in expected.items():
        kind = key.partition("/")[0]
        if tensor.numel():
            differences[kind] = max(differences[kind], float((found[key] - tensor).abs().max()))
    for left, right in zip(norms, expected_norms, strict=True):
        assert left.keys() == right.keys()
        differences["norms"] = max(differences["norms"], *(abs(left[group] - right[group]) for group in left))
    return differences


if __name__ == "__main__":
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with distributed_world() as world:
        for case in sys.argv[1:] or list(CASES):
            try:
                results[case] = compare(world, *CASES[case])
            except Exception:
                results[case] = traceback.format_exc()
                print(results[case], file=sys.stderr, flush=True)
        if world.is_first:
            print(json.dumps(results, indent=1))
