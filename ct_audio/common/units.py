"""Units of a negative log-likelihood: nats, bits, perplexity."""

import math
import sys


def nats_to_bits(nats: float) -> float:
    """The same amount of information in bits: nats / ln 2."""
    return nats / math.log(2.0)


def perplexity(nll_nats: float) -> float | None:
    """exp of a mean NLL in nats: among how many equally probable units the model hesitates.

    For word-level perplexity of subwords, the mean is the sum over all subwords divided by the number of words.

    Returns:
        at least 1; None where it is beyond float64 (JSON has no infinity).
    Source: Rae et al. 2019, section 5.2 (word-level perplexity of PG-19).
    """
    return math.exp(nll_nats) if nll_nats < math.log(sys.float_info.max) else None
