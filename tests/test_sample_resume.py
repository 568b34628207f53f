"""Sampling that is stopped and taken up again equals sampling that never stopped, bit for bit, for every model."""

from typing import Any

import torch
from model_cases import every_model
from tiny import tiny_model

from ct_audio.sampling.sampler import Sampler

START_CODE = 16


def sampler_of(model: Any, **arguments: Any) -> Sampler:
    settings: dict[str, Any] = {"num_lanes": 2, "seed": 5, "start_code": START_CODE, "top_p": 0.95}
    return Sampler(model, **(settings | arguments))


def taken(sampler: Sampler, num_codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = list(sampler.run(num_codes))
    return torch.stack([codes for codes, _ in pairs], 1), torch.stack([logs for _, logs in pairs], 1)


def copied(leaves: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for name, leaf in leaves.items()}


@every_model
def test_a_restored_sampler_goes_on_bit_for_bit(name: str) -> None:
    model = tiny_model(name)
    prime = torch.randint(32, (2, 21))
    first = sampler_of(model, prime=prime)
    pieces, states = [], []
    for num_codes in (1, 7, 11, 18):  # stops at a window's end and within windows
        pieces.append(taken(first, num_codes))
        states.append((first.num_codes, copied(first.leaves())))
    codes, logs = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
    for stop, leaves in states:
        second = sampler_of(model, prime=prime)
        second.restore(leaves)
        if stop < 37:
            rest = taken(second, 37 - stop)
            assert torch.equal(rest[0], codes[:, stop:])
            assert torch.equal(rest[1], logs[:, stop:])
        assert second.num_codes == 37
