"""A short training of every tiny model, whose losses must stay what they were: "no behaviour changes" as numbers.

`python tests/test_golden.py` prints the losses as they are now; a change that is meant to alter them replaces
golden.json by its output and says so in LOG.md. The file was first written by the code before there were packages
(commit 7692ed3).
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY_MODELS, tiny_model

GOLDEN = Path(__file__).with_name("golden.json")
STEPS, LANES, CHUNK_LENGTH = 6, 2, 48
TOLERANCE = 1e-9
"""In nats, float64: other processors round differently, by far less."""
TRAINED = [name for name, plain in TINY_MODELS.items() if plain["name"] != "linear_prediction"]


def fixed_codes() -> torch.Tensor:
    """A walk through the codes, the same on every machine: integer arithmetic only."""
    codes, state = [], 1
    for _ in range(LANES * (STEPS * CHUNK_LENGTH + 1)):
        state = (1103515245 * state + 12345) % 2**31
        codes.append((codes[-1] + (state >> 16) % 5 - 2) % 32 if codes else 16)
    return torch.tensor(codes).view(LANES, -1)


def detached(memory: Any) -> Any:
    if isinstance(memory, tuple):
        parts = [detached(part) for part in memory]
        return type(memory)(*parts) if hasattr(memory, "_fields") else tuple(parts)
    return memory.detach() if isinstance(memory, torch.Tensor) else memory


def losses_of(name: str) -> list[float]:
    """NLL and auxiliary losses, summed, of each step; lane 1 has document starts."""
    torch.manual_seed(0)
    model: Any = tiny_model(name).double()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    codes, memory, losses = fixed_codes(), model.zero_memory(LANES), []
    for step in range(STEPS):
        piece = codes[:, step * CHUNK_LENGTH : (step + 1) * CHUNK_LENGTH + 1]
        starts = torch.zeros(LANES, CHUNK_LENGTH, dtype=torch.bool)
        starts[1, 11 * step % CHUNK_LENGTH] = step > 2
        features, memory, auxiliary = model(piece[:, :-1], memory, document_starts=starts)
        memory = detached(memory)
        loss = model.nll(features, piece[:, 1:]).mean() + sum(auxiliary.values())
        loss.backward()
        for group in model.gradient_groups().values():
            torch.nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()
        model.after_update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", TRAINED)
def test_losses_are_what_they_were(name: str) -> None:
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    assert losses_of(name) == pytest.approx(expected, abs=TOLERANCE, rel=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({name: losses_of(name) for name in TRAINED}, sys.stdout, indent=1)
    print()
