"""Sums, counts and units of the NLL."""

import math

import pytest
import torch

from ct_audio.common.units import nats_to_bits, nll_sum_and_count, perplexity


def test_sum_and_count_of_all_codes_in_float64():
    nll = torch.full((3, 5), 0.1, dtype=torch.float32)
    total, count = nll_sum_and_count(nll)
    assert total.dtype == torch.float64
    assert count == 15
    assert total.item() == pytest.approx(15 * float(nll[0, 0]), rel=1e-15)


def test_what_is_masked_may_be_nan():
    nll = torch.tensor([[1.0, math.nan], [2.0, 4.0]])
    total, count = nll_sum_and_count(nll, torch.tensor([[True, False], [True, True]]))
    assert (total.item(), count) == (7.0, 3)


def test_a_fair_coin_is_one_bit():
    assert nats_to_bits(math.log(2)) == 1.0
    assert nats_to_bits(math.log(256)) == pytest.approx(8.0, rel=1e-15)


def test_even_odds_have_the_perplexity_of_their_number():
    assert perplexity(math.log(267_735)) == pytest.approx(267_735)
    assert perplexity(0.0) == 1.0
    assert perplexity(709.0) == math.exp(709.0)
    assert perplexity(710.0) is None
