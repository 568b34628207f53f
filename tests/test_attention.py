"""Equality 3: every attention backend equals a double loop over queries and keys; and the fused kernel really runs."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ct_audio.models.compressive.attention import (
    ATTENTION_BACKENDS,
    additive_mask,
    attend_one,
    attention_weights,
    content_attention,
    rotate,
    sinusoids,
)

CASES = {"window": (8, 20, False), "lanes_with_invalid_rows": (8, 20, True), "no_memory": (6, 6, False)}


def double_loop(case: dict[str, Any]) -> Tensor:
    """Transformer-XL attention in float64, one query and one key at a time, with sines of the distance itself."""
    content, position, keys, values = (
        case[k].double().tolist() for k in ("content_query", "position_query", "keys", "values")
    )
    mask = case["mask"].expand(len(content), 1, -1, -1).tolist()
    query_positions, key_positions = case["query_positions"].tolist(), case["key_positions"].tolist()
    head_width, pairs = len(keys[0][0][0]), len(position[0][0][0]) // 2
    output = torch.zeros(len(content), len(content[0]), len(query_positions), head_width, dtype=torch.float64)
    for n, h, t in itertools.product(*map(range, output.shape[:3])):
        weights = []
        for s, key in enumerate(keys[n][h]):
            score = sum(a * b for a, b in zip(content[n][h][t], key, strict=True))
            for pair in range(pairs):
                angle = (query_positions[t] - key_positions[s]) / 10_000.0 ** (2 * pair / (2 * pairs))
                score += position[n][h][t][pair] * math.sin(angle)
                score += position[n][h][t][pairs + pair] * math.cos(angle)
            weights.append(math.exp(score / math.sqrt(head_width)) if mask[n][0][t][s] == 0 else 0.0)
        for s, weight in enumerate(weights):
            for e in range(head_width):
                output[n, h, t, e] += weight / sum(weights) * values[n][h][s][e]
    return output


def make_case(name: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    num_queries, num_keys, some_invalid = CASES[name]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    visible = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    if some_invalid:
        valid = torch.arange(num_keys) >= torch.tensor([0, 5, 12])[:, None]
        visible = (visible & valid[:, None])[:, None]
    return {
        "content_query": random(3, 2, num_queries, 8),
        "position_query": random(3, 2, num_queries, 6),
        "keys": random(3, 2, num_keys, 8),
        "values": random(3, 2, num_keys, 8),
        "query_positions": torch.arange(num_queries, dtype=torch.float64),
        "key_positions": torch.arange(num_queries - num_keys, num_queries, dtype=torch.float64),
        "mask": additive_mask(visible, dtype),
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_backend_equals_double_loop_in_float64(backend: str, name: str) -> None:
    case = make_case(name, torch.float64, seed=0)
    assert (ATTENTION_BACKENDS[backend](**case) - double_loop(case)).abs().max() <= 1e-12


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_real_valued_positions(backend: str) -> None:
    """A compressed row may carry the mean position of its codes: positions need not be whole numbers."""
    case = make_case("window", torch.float64, seed=1)
    case["key_positions"] = case["key_positions"] - torch.linspace(40.25, 0.0, 20, dtype=torch.float64)
    assert (ATTENTION_BACKENDS[backend](**case) - double_loop(case)).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_as_accurate_as_the_reference(dtype: torch.dtype) -> None:
    """RMS error against float64, over 5 seeds, at most twice that of the reference in the same dtype."""
    squares = dict.fromkeys(ATTENTION_BACKENDS, 0.0)
    for seed in range(5):
        case = make_case("lanes_with_invalid_rows", dtype, seed)
        exact = double_loop(case)
        for backend, attend in ATTENTION_BACKENDS.items():
            squares[backend] += (attend(**case).double() - exact).square().mean().item()
    assert 0 < squares["fused"] ** 0.5 <= 2 * squares["reference"] ** 0.5


def test_gradients_of_backends_agree() -> None:
    gradients = {}
    for backend, attend in ATTENTION_BACKENDS.items():
        case = make_case("lanes_with_invalid_rows", torch.float64, seed=2)
        leaves = [case[k].requires_grad_() for k in ("content_query", "position_query", "keys", "values")]
        gradients[backend] = torch.autograd.grad(attend(**case).sin().sum(), leaves)
    for fused, reference in zip(gradients["fused"], gradients["reference"], strict=True):
        assert (fused - reference).abs().max() <= 1e-12


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_flash_kernel_runs(dtype: torch.dtype, name: str) -> None:
    case = make_case(name, dtype, seed=3)
    leaves = [case[k].requires_grad_() for k in ("content_query", "position_query", "keys", "values")]
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        ATTENTION_BACKENDS["fused"](**case).sum().backward()
    kernels = {event.key for event in profiler.key_averages() if "scaled_dot_product" in event.key}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in kernels, kernels
    assert not any("math" in kernel for kernel in kernels), kernels
    assert all(leaf.grad is not None for leaf in leaves)


def test_long_window_in_blocks_equals_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("lanes_with_invalid_rows", torch.float64, seed=4)
    whole = ATTENTION_BACKENDS["fused"](**case)
    monkeypatch.setattr("ct_audio.models.compressive.attention.CPU_QUERY_BLOCK_LENGTH", 3)
    assert (ATTENTION_BACKENDS["fused"](**case) - whole).abs().max() <= 1e-12


def test_one_query_over_caches_equals_the_reference() -> None:
    case = make_case("lanes_with_invalid_rows", torch.float64, seed=5)
    whole = ATTENTION_BACKENDS["reference"](**case)
    position_keys = sinusoids(-case["key_positions"], 6).expand(*case["keys"].shape[:3], 6)
    rotated = rotate(case["position_query"], case["query_positions"])
    one, weights = attend_one(
        torch.cat([case["content_query"], rotated], dim=-1)[:, :, -1] * 8**-0.5,
        torch.cat([case["keys"], position_keys], dim=-1),
        case["values"],
        case["mask"][:, :, -1:],
    )
    assert (one - whole[:, :, -1]).abs().max() <= 1e-12
    arguments = {key: value for key, value in case.items() if key != "values"}
    assert (weights - attention_weights(**arguments)[:, :, -1]).abs().max() <= 1e-12


def test_a_share_multiplies_weights_before_they_are_normalised() -> None:
    case = make_case("window", torch.float64, seed=2)
    del case["values"]
    share = torch.rand(case["keys"].shape[1], 1, case["keys"].shape[2], dtype=torch.float64)
    share[:, :, :3] = 0
    share = share.requires_grad_()
    plain = attention_weights(**case)
    expected = plain * share / (plain * share).sum(dim=-1, keepdim=True)
    found = attention_weights(**case, share=share)
    assert (found - expected).abs().max() <= 1e-12
    chosen = torch.randn_like(found)
    (gradient,) = torch.autograd.grad((found * chosen).sum(), share)
    (expected_gradient,) = torch.autograd.grad((expected * chosen).sum(), share)
    assert (gradient - expected_gradient)[:, :, 3:].abs().max() <= 1e-12
    assert not gradient[:, :, :3].any()  # none, rather than NaN: their distance has left the ramp


def test_a_share_of_nothing_wins_against_any_score() -> None:
    """Rows with a share lie so far below the others that their weights are 0 in float32."""
    query = torch.tensor([[[[20.0, 0.0]]]])
    keys = torch.tensor([[[[20.0, 0.0], [-20.0, 0.0]]]])
    share = torch.tensor([[[0.0, 1.0]]])
    _, weights = attend_one(query[:, :, 0], keys, keys, None, share)
    assert weights.tolist() == [[[0.0, 1.0]]]
    zeros = torch.zeros(1)
    weights = attention_weights(
        query, query, keys, query_positions=zeros, key_positions=torch.zeros(2), mask=torch.zeros(1, 2), share=share
    )
    assert weights.tolist() == [[[[0.0, 1.0]]]]


def test_rotation_turns_a_distance_into_two_positions() -> None:
    vector = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i, j in [(0, 0), (5, -7), (3839, -768), (700, 2.5)]:
        at_i, at_j = (torch.tensor([p], dtype=torch.float64) for p in (i, j))
        folded = rotate(vector, at_i) @ sinusoids(-at_j, 6).T
        assert (folded - vector @ sinusoids(at_i - at_j, 6).T).abs().max() <= 1e-12


def test_content_attention_ignores_invalid_rows() -> None:
    case = make_case("lanes_with_invalid_rows", torch.float64, seed=6)
    query, keys, values = case["content_query"], case["keys"], case["values"]
    mask = additive_mask(torch.arange(20) >= torch.tensor([0, 5, 12])[:, None], torch.float64)[:, None, None]
    attended = content_attention(query, keys, values, mask)
    for n, first in enumerate([0, 5, 12]):
        lane = slice(n, n + 1)
        alone = content_attention(query[lane], keys[lane, :, first:], values[lane, :, first:], None)
        assert (attended[n : n + 1] - alone).abs().max() <= 1e-12
