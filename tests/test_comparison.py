"""Comparing evaluations: the interval against a plain loop and on data with a known answer; what is refused."""

import random
from typing import Any

import numpy as np
import pytest
from handmade_runs import Patch

from ct_audio.common.errors import UserError
from ct_audio.evaluation import comparison
from ct_audio.evaluation.comparison import bootstrap_interval, comparable_protocol, paired_difference, require_alike

RATE = 24_000
LENGTH = 2_400  # codes of a stored block: 0.1 s


def evaluation(means: Any, last: int = LENGTH, seconds: bool = True, **protocol: Any) -> dict[str, Any]:
    """As it is stored: blocks of 2,400 codes (the last one of `last`) with these means of the NLL."""
    counts = [LENGTH] * (len(means) - 1) + [last]
    sums = [float(mean) * count for mean, count in zip(means, counts, strict=True)]
    return {
        "name": "run",
        "num_units": sum(counts),
        "seconds": sum(counts) / RATE if seconds else None,
        "nll_nats": sum(sums) / sum(counts),
        "protocol": {"split": "valid", "split_sha256": "aa", "num_lanes": 1, "dtype": "float32"} | protocol,
        "blocks": {"length": LENGTH, "nll_sums_nats": sums, "counts": counts},
    }


def interval_by_hand(sums: list[float], counts: list[int], num_resamples: int, seed: int) -> tuple[float, float]:
    """Oracle: lists and loops; the percentiles by linear interpolation between the two nearest means."""
    generator, means = np.random.default_rng(seed), []
    for _ in range(num_resamples):
        total, count = 0.0, 0
        for block in generator.integers(0, len(sums), len(sums)).tolist():
            total += sums[block]
            count += counts[block]
        means.append(total / count)
    means.sort()

    def percentile(share: float) -> float:
        place = share * (num_resamples - 1)
        below = int(place)
        above = min(below + 1, num_resamples - 1)
        return means[below] + (place - below) * (means[above] - means[below])

    return percentile(0.025), percentile(0.975)


@pytest.mark.parametrize(("num_blocks", "num_resamples", "seed"), [(10, 100, 0), (37, 211, 5), (1, 3, 1)])
def test_the_interval_is_that_of_a_plain_loop(num_blocks: int, num_resamples: int, seed: int) -> None:
    sums = [random.gauss(0.1, 1.0) for _ in range(num_blocks)]
    counts = [random.randrange(1, 100) for _ in range(num_blocks)]
    found = bootstrap_interval(np.array(sums), np.array(counts), num_resamples=num_resamples, seed=seed)
    assert found == pytest.approx(interval_by_hand(sums, counts, num_resamples, seed), abs=1e-12)


def correlated(generator: np.random.Generator, num_blocks: int, memory: float) -> np.ndarray:
    """Differences of mean 0 whose blocks follow each other: x[t] = memory x[t - 1] + noise."""
    noise = generator.normal(size=num_blocks)
    values = [noise[0] / np.sqrt(1 - memory**2)]
    for value in noise[1:]:
        values.append(memory * values[-1] + value)
    return np.array(values)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """100 s whose blocks of 0.1 s are correlated by 0.7: drawing 2 s at a time covers, drawing 0.1 s does not."""
    generator, trials, joined, alone = np.random.default_rng(0), 120, 0, 0
    for _ in range(trials):
        values = correlated(generator, 1_000, 0.7)
        low, high = bootstrap_interval(values.reshape(50, 20).sum(1), np.full(50, 20), num_resamples=150)
        joined += low <= 0 <= high
        low, high = bootstrap_interval(values, np.full(1_000, 1), num_resamples=150)
        alone += low <= 0 <= high
    assert 0.88 <= joined / trials <= 0.99
    assert alone / trials < 0.75


def test_identical_runs_differ_by_exactly_nothing() -> None:
    means = np.random.default_rng(0).normal(2.5, 0.5, 405)
    assert paired_difference(evaluation(means), evaluation(means)) == (0.0, 0.0, 0.0, 21)


def test_a_small_shift_is_found_under_large_common_noise() -> None:
    """The difference is far smaller than what blocks differ by: only a paired interval can see it."""
    generator = np.random.default_rng(0)
    means = generator.normal(2.5, 0.5, 405)
    first, other = evaluation(means, last=700), evaluation(means + generator.normal(0.02, 0.05, 405), last=700)
    difference, back = paired_difference(first, other), paired_difference(other, first)
    assert difference.nats == pytest.approx(other["nll_nats"] - first["nll_nats"], abs=1e-12)
    assert difference.low is not None
    assert difference.high is not None
    assert 0 < difference.low < difference.nats < difference.high < 0.04
    assert back == pytest.approx((-difference.nats, -difference.high, -difference.low, 21), abs=1e-12)


@pytest.mark.parametrize(
    ("num_stored", "seconds", "joined", "expected"), [(405, True, 20, 21), (400, True, 20, 20), (405, False, 4, 102)]
)
def test_blocks_are_joined_to_two_seconds_or_some_pages(
    num_stored: int, seconds: bool, joined: int, expected: int, monkeypatch: Patch
) -> None:
    asked: list[tuple[np.ndarray, np.ndarray]] = []
    monkeypatch.setattr(comparison, "bootstrap_interval", lambda sums, counts: asked.append((sums, counts)) or (0, 0))
    means = np.arange(float(num_stored))
    first, other = (evaluation(m, last=300, seconds=seconds) for m in (np.zeros(num_stored), means))
    assert paired_difference(first, other).num_blocks == expected
    ((sums, counts),) = asked
    assert len(sums) == len(counts) == expected
    assert counts[:-1].tolist() == [joined * LENGTH] * (expected - 1)
    assert counts.sum() == first["num_units"]
    assert sums[1] == pytest.approx(sum(range(joined, 2 * joined)) * LENGTH)
    assert sums.sum() == pytest.approx(other["nll_nats"] * other["num_units"])


def test_too_few_blocks_have_no_interval() -> None:
    difference = paired_difference(evaluation([2.0] * 180), evaluation([2.5] * 180))
    assert difference == (0.5, None, None, 9)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"split": "test"}, "split is valid against test"),
        ({"split_sha256": "bb"}, "split_sha256 is aa against bb"),
        ({"num_lanes": 4}, "num_lanes is 1 against 4"),
        ({"dtype": "bfloat16"}, "dtype is float32 against bfloat16"),
        ({"something_new": True}, "something_new is None against True"),
    ],
)
def test_what_was_not_scored_alike_is_refused(change: dict[str, Any], named: str) -> None:
    one, other = evaluation([2.0]), evaluation([2.0], **change)
    with pytest.raises(UserError, match=f"a and c were not scored alike on valid: {named}"):
        require_alike({"a": one, "b": one, "c": other})


@pytest.mark.parametrize("key", ["memory_length", "compressed_memory_length", "chunk_length", "corpus_fingerprint"])
def test_what_belongs_to_the_model_may_differ(key: str) -> None:
    one, other = ({"protocol": {"split": "valid", key: value}} for value in (1, 2))
    require_alike({"a": one, "b": other, "c": {"protocol": {"split": "valid"}}})
    require_alike({"a": evaluation([2.0]), "b": evaluation([2.0], dtype="float64")})
    assert key not in comparable_protocol({key: 1, "split": "valid"})


def test_other_blocks_are_named() -> None:
    with pytest.raises(UserError, match="different blocks"):
        paired_difference(evaluation([2.0, 2.0]), evaluation([2.0]))
