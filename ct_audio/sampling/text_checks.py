"""What a sampled text is like, in plain numbers, and what is wrong with it as text.

Shape letters: N codes.
"""

import codecs
import math
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from ct_audio.sampling.audio_checks import RUNAWAY_NLL_SHARE, measure_codes

STUCK_COPIES = 4
STUCK_BYTES = 400
"""The same again and again for so long; half of the sample where that is shorter. 2 MB of enwik8 have 141 at most."""
MAX_PERIOD_BYTES = 1024
"""Of what is repeated; a longer piece that comes again is not found."""
LAST_BYTES = 100_000
"""Only so much of the end is searched: the time grows with it, and what is stuck stays so."""
UNDECODABLE_SHARE = 0.01
"""Share of bytes that are no UTF-8; in the corpora of the recipes there are none."""


def measure_text(
    codes: Integer[np.ndarray, " N"], log_probabilities: Float[np.ndarray, " N"], text: bytes, *, vocab_size: int
) -> dict[str, Any]:
    """What a lane's decoded codes, a text, are like, in plain numbers ready for JSON.

    Returns:
        those of `measure_codes`, and num_units, num_bytes, repeat_bytes and repeat_period_bytes (the longest stretch
        that says the same thing again and again, 0 where none has two copies of it), undecodable_share (of the bytes;
        not counting a character that the end cuts off).
    """
    measures = measure_codes(codes, log_probabilities, vocab_size=vocab_size)
    repeat_bytes, period = longest_repeat(text[-LAST_BYTES:])
    return measures | {
        "num_units": len(codes),
        "num_bytes": len(text),
        "repeat_bytes": repeat_bytes,
        "repeat_period_bytes": period,
        "undecodable_share": undecodable_bytes(text) / max(1, len(text)),
    }


def find_text_faults(measures: dict[str, Any], *, vocab_size: int) -> list[str]:
    """What is wrong with a sample as text: stuck, undecodable or runaway; empty where nothing is."""
    repeat_bytes, period = measures["repeat_bytes"], measures["repeat_period_bytes"]
    faults = []
    if repeat_bytes >= STUCK_COPIES * period > 0 and repeat_bytes > min(STUCK_BYTES, measures["num_bytes"] / 2):
        faults.append(f"stuck: the same {period} bytes again and again, {repeat_bytes} bytes long")
    if measures["undecodable_share"] > UNDECODABLE_SHARE:
        faults.append(f"undecodable: {measures['undecodable_share']:.1%} of the bytes are no UTF-8")
    if measures["nll_nats"] > RUNAWAY_NLL_SHARE * math.log(vocab_size):
        faults.append(f"runaway: {measures['nll_nats']:.2f} nats per unit, even odds are {math.log(vocab_size):.2f}")
    return faults


def longest_repeat(text: bytes) -> tuple[int, int]:
    """Length and period in bytes of the longest stretch that is two or more copies of one piece (the last cut off).

    Of equally long ones that with the shortest piece; (0, 0) where nothing comes twice in a row.
    """
    values = np.frombuffer(text, dtype=np.uint8)
    longest, longest_period = 0, 0
    for period in range(1, min(MAX_PERIOD_BYTES, len(values) // 2) + 1):
        is_other = values[period:] != values[:-period]
        edges = np.concatenate([[-1], np.flatnonzero(is_other), [len(is_other)]])
        num_same = int(np.diff(edges).max()) - 1
        if num_same >= period and num_same + period > longest:
            longest, longest_period = num_same + period, period
    return longest, longest_period


def undecodable_bytes(text: bytes) -> int:
    """Number of bytes that belong to no character of UTF-8; a character that the end cuts off is not counted."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    decoded = decoder.decode(text)
    pending, _ = decoder.getstate()
    return len(text) - len(pending) - len(decoded.encode())
