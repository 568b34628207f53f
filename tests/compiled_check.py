"""torch.compile of tiny models against eager, as a program: the tests' checks of shapes are not to be compiled.

    python tests/compiled_check.py BACKEND MODEL ...

prints a line of JSON for each model: graphs compiled after each chunk, the largest difference of NLL, memory and
gradients (in float64, with inductor in float32), and whether the numbers that memories hold on the host are equal.
"""

import copy
import json
import sys

import torch
from tiny import tiny_model
from torch._dynamo.utils import counters

from ct_audio.models.state import detach_memory, named_leaves, named_tensors
from ct_audio.training.session import ChunkLoss

NUM_CHUNKS = 4


def check(name: str, backend: str, compile: bool | str, dtype: torch.dtype) -> dict[str, object]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(name).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    settings = {"device_type": "cpu", "precision": str(dtype).removeprefix("torch.")}
    eager, compiled = (
        ChunkLoss(copy.deepcopy(model), **settings),
        ChunkLoss(model, **settings, compile=compile, backend=backend),
    )
    memories = [part.model.zero_memory(2) for part in (eager, compiled)]
    codes = torch.randint(32, (2, 16 * NUM_CHUNKS + 1))
    graphs, differences, counts_equal = [], [], True
    for begin in range(0, 16 * NUM_CHUNKS, 16):
        found = []
        for index, loss in enumerate((eager, compiled)):
            inputs, targets = codes[:, begin : begin + 16], codes[:, begin + 1 : begin + 17]
            nll, memory, losses = loss(inputs.clone(), targets.clone(), memories[index], None)
            torch.stack([nll.mean(), *losses.values()]).sum().backward()
            memories[index] = detach_memory(memory)
            tensors = {"nll": nll.detach(), **dict(named_tensors(memories[index]))}
            tensors |= {name: part.grad for name, part in loss.model.named_parameters() if part.grad is not None}
            found.append({name: tensor.clone() for name, tensor in tensors.items()})
        assert found[0].keys() == found[1].keys()
        pairs = [(found[0][name], found[1][name]) for name in found[0] if found[0][name].numel()]
        differences += [(ours.double() - theirs.double()).abs().max().item() for ours, theirs in pairs]
        counts = [[leaf for _, leaf in named_leaves(memory) if isinstance(leaf, int)] for memory in memories]
        counts_equal &= counts[0] == counts[1]
        graphs.append(counters["stats"]["unique_graphs"])
    breaks = sum(counters["graph_break"].values())
    return {
        "model": name,
        "graphs": graphs,
        "graph_breaks": breaks,
        "largest_difference": max(differences),
        "counts_equal": counts_equal,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        # Inductor takes the CPU kernel of attention for one that sums in float32, and fails in float64.
        dtype = torch.float32 if sys.argv[1] == "inductor" else torch.float64
        print(json.dumps(check(name, sys.argv[1], True, dtype)), flush=True)
