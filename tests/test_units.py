"""Units of the NLL."""

import math

import pytest

from ct_audio.common.units import nats_to_bits, perplexity


def test_a_fair_coin_is_one_bit():
    assert nats_to_bits(math.log(2)) == 1.0
    assert nats_to_bits(math.log(256)) == pytest.approx(8.0, rel=1e-15)


def test_even_odds_have_the_perplexity_of_their_number():
    assert perplexity(math.log(267_735)) == pytest.approx(267_735)
    assert perplexity(0.0) == 1.0
    assert perplexity(709.0) == math.exp(709.0)
    assert perplexity(710.0) is None
