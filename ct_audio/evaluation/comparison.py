"""Two evaluations side by side: whether they may be compared, and how sure their difference is.

The interval is a paired block bootstrap: both runs are scored on the same codes, the difference is taken block by
block, and the blocks, not the codes, are drawn again with replacement, since errors on speech come in stretches.
Evaluations are as `stored.find_evaluation` returns them.

Shape letters: K blocks.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from ct_audio.common.errors import UserError

BOOTSTRAP_SECONDS = 2.0
"""A block of the bootstrap. On one voice that reads sentences, differences 0.3 s apart were no longer correlated and
intervals grew no more from blocks of 1 s on."""
BOOTSTRAP_CODES = 9_600
"""The same for text. On bytes, words and subwords (six splits) differences 7,200 codes apart were correlated by less
than 0.25, and blocks twice as long gave intervals of 0.6 to 1.2 times the width."""
NUM_RESAMPLES = 10_000
MIN_BLOCKS = 10
"""With fewer an interval would pretend to a certainty that is not there."""

# The model's own: lengths of memory, and the size of a forward, which changes speed and not the result. The fingerprint
# is of the whole corpus; the split's own hash stays.
_OF_THE_MODEL = {"memory_length", "compressed_memory_length", "chunk_length", "corpus_fingerprint"}


class Difference(NamedTuple):
    """Mean NLL of a run less that of the first (nats per code); no interval for fewer than MIN_BLOCKS blocks."""

    nats: float
    low: float | None
    high: float | None
    num_blocks: int


def comparable_protocol(protocol: dict[str, Any]) -> dict[str, Any]:
    """The part of a protocol that has to be equal in a column; float64 (linear prediction) counts as float32.

    Where no precision is stated (older files), the forward pass was of the dtype of the NLL.
    """
    whole = protocol | {"precision": protocol.get("precision", protocol.get("dtype"))}
    exact = {key: "float32" for key in ("dtype", "precision") if whole.get(key) == "float64"}
    return {key: value for key, value in (whole | exact).items() if key not in _OF_THE_MODEL}


def require_alike(evaluations: dict[str, dict[str, Any]]) -> None:
    """Check that evaluations may stand in one column.

    Args:
        evaluations: by the label of the run.
    Raises:
        UserError: they are of different codes or were scored differently; the message names the first difference.
    """
    (first, expected), *others = [(label, comparable_protocol(e["protocol"])) for label, e in evaluations.items()]
    for label, found in others:
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                raise UserError(
                    f"{first} and {label} were not scored alike on {expected.get('split')}: {key} is "
                    f"{expected.get(key)} against {found.get(key)}; they belong into tables of their own"
                )


def paired_difference(first: dict[str, Any], other: dict[str, Any]) -> Difference:
    """Mean NLL of `other` less that of `first` on the same codes, with a 95% interval.

    Args:
        first, other: evaluations that `require_alike` has let pass.
    """
    blocks = [evaluation["blocks"] for evaluation in (first, other)]
    if blocks[0]["counts"] != blocks[1]["counts"]:
        raise UserError(f"{first['name']} and {other['name']} were stored in different blocks; evaluate them again")
    differences = np.array(blocks[1]["nll_sums_nats"]) - np.array(blocks[0]["nll_sums_nats"])
    counts = np.array(blocks[0]["counts"], dtype=np.int64)
    seconds = first["seconds"]
    codes = BOOTSTRAP_SECONDS * first["num_units"] / seconds if seconds else BOOTSTRAP_CODES
    starts = np.arange(0, len(counts), math.ceil(codes / blocks[0]["length"]))
    sums, counts = np.add.reduceat(differences, starts), np.add.reduceat(counts, starts)
    low, high = bootstrap_interval(sums, counts) if len(sums) >= MIN_BLOCKS else (None, None)
    return Difference(float(sums.sum() / counts.sum()), low, high, len(sums))


def bootstrap_interval(
    sums: Float64[np.ndarray, " K"],
    counts: Int64[np.ndarray, " K"],
    *,
    num_resamples: int | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a mean over codes, by drawing blocks with replacement.

    Args:
        sums: of what the mean is of, a block each.
        counts: codes of each block.
        num_resamples: each of K blocks; None: NUM_RESAMPLES.
        level: share of the resamples' means that the interval holds, the rest halved on both sides.
    Source: Efron and Tibshirani 1993, chapters 8.6 and 13; blocks do not overlap.
    """
    generator, means = np.random.default_rng(seed), np.empty(NUM_RESAMPLES if num_resamples is None else num_resamples)
    for resample in range(len(means)):  # one at a time: memory stays flat however long the split
        drawn = generator.integers(0, len(sums), len(sums))
        means[resample] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
