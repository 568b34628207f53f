"""Sampling that is stopped and taken up again equals sampling that never stopped, bit for bit, for every model."""

from typing import Any

import pytest
import torch
from tiny import TINY_MODELS, as_module, tiny_model

from ct_audio.sample import Sampler

START_CODE = 16


def sampler_of(model: Any, **arguments: Any) -> Sampler:
    settings: dict[str, Any] = {"num_lanes": 2, "seed": 5, "start_code": START_CODE, "top_p": 0.95}
    return Sampler(model, **(settings | arguments))


def taken(sampler: Sampler, num_codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = list(sampler.run(num_codes))
    return torch.stack([codes for codes, _ in pairs], 1), torch.stack([logs for _, logs in pairs], 1)


def copied(leaves: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for name, leaf in leaves.items()}


@pytest.mark.parametrize("prime_length", [0, 21])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_restored_sampler_goes_on_bit_for_bit(name: str, prime_length: int) -> None:
    model = as_module(tiny_model(name))
    prime = torch.randint(32, (2, prime_length)) if prime_length else None
    codes, logs = taken(sampler_of(model, prime=prime), 61)
    for stop in (1, 16, 37):
        first = sampler_of(model, prime=prime)
        begun = taken(first, stop)
        leaves = copied(first.leaves())
        taken(first, 5)  # what the first one does later has no influence on what was taken out
        second = sampler_of(model, prime=prime)
        second.restore(leaves)
        rest = taken(second, 61 - stop)
        assert second.num_codes == 61
        assert torch.equal(torch.cat([begun[0], rest[0]], 1), codes)
        assert torch.equal(torch.cat([begun[1], rest[1]], 1), logs)
