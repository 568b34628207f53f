"""Sets of samples made one after another: the estimate, the sampling, verification, files, the report on a sweep."""

import signal
import sys
import threading
import time
from typing import Any, NamedTuple

from ct_audio.data.corpus import Corpus
from ct_audio.sampling.estimate import estimate_code_seconds
from ct_audio.sampling.output import write_samples
from ct_audio.sampling.sample_set import STREAM_CODES, SampleSet, SampleStream
from ct_audio.sampling.temperature_report import require_comparable, write_report

VERIFY_LIMIT = 1e-3
"""Nats; float32 steps and float32 forward passes of a sound implementation differ by about 1e-5."""

_PATIENCE_SECONDS = 5.0
_COMPILING = "compiling the stepper: about half a minute, once on this machine"


class Outcome(NamedTuple):
    """How a session ended.

    Attributes:
        stopped_by: number of the signal that ended it early, else 0.
        is_verified: False where a verification found more than VERIFY_LIMIT.
        is_faulty: something is wrong with a sample, as audio or as text.
    """

    stopped_by: int
    is_verified: bool
    is_faulty: bool


def sample_sets(
    sets: list[SampleSet],
    *,
    signals: list[int],
    save_every_seconds: float,
    stream: SampleStream | None = None,
    corpus: Corpus | None = None,
    verify: bool = False,
    plots: bool = False,
) -> Outcome:
    """Sample and write sets that differ in temperature alone; arguments as in `SampleSet.sample` and `write_samples`.

    Args:
        corpus: of the run, for a report on the temperatures beside the sets; None: no report.
    Raises:
        UserError: there can be no report; nothing has been sampled then.
    """
    if corpus is not None:
        require_comparable(sets, corpus)
    _print_estimate(sets)
    is_verified, is_faulty = True, False
    for one in sets:
        if stream is not None and not one.num_resumed:
            stream.write(one.decoded_prime())
        label = "sampling" if corpus is None else f"temperature {one.request.temperature:g}"
        keep = None if stream is None or verify else STREAM_CODES
        _sample(one, signals=signals, stream=stream, save_every_seconds=save_every_seconds, label=label, keep=keep)
        if one.stopped_by:
            saved = (
                f"saved in {one.directory}; go on with --resume" if one.directory else "nothing is saved without --out"
            )
            name = signal.Signals(one.stopped_by).name
            print(f"stopped by {name} at {one.in_words(one.num_codes)}; {saved}", file=sys.stderr)
            return Outcome(one.stopped_by, is_verified, is_faulty)
        if one.num_codes:  # else the reader of the stream has gone at once
            difference = _verify(one) if verify else None
            is_verified &= difference is None or difference <= VERIFY_LIMIT
            is_faulty |= any(write_samples(one, verify_difference=difference, plots=plots))
    if corpus is not None and sets[0].directory is not None:
        write_report(sets[0].directory.parent, sets, corpus)
    return Outcome(0, is_verified, is_faulty)


def _print_estimate(sets: list[SampleSet]) -> None:
    """Say how long it will take and which stepper does it; the sets spread their lanes as was found best."""
    num_codes = sum(one.num_left for one in sets)
    if not num_codes:
        return
    first, num_lanes = sets[0], sets[0].request.num_lanes
    told = threading.Timer(_PATIENCE_SECONDS, lambda: print(_COMPILING, file=sys.stderr, flush=True))
    told.daemon = True
    if first.stepper == "compiled":
        told.start()
    try:
        max_codes = max(16 + num_codes // 50, 256 if first.stepper == "compiled" else 0)
        code_seconds, spread = estimate_code_seconds(
            first.run.model, num_lanes=num_lanes, max_codes=max_codes, stepper=first.stepper
        )
    finally:
        told.cancel()
    how: str = first.stepper
    if spread is not None:
        how = ", ".join(filter(None, (how, spread.in_words())))
        for one in sets:
            one.spread(spread.num_threads, spread.lanes_together)
    total = f"{num_codes * num_lanes} {first.codec.unit}s ({num_lanes} x {num_codes})"
    print(f"about {code_seconds * num_codes:.0f} s for {total}; stepper: {how}", flush=True)


def _sample(one: SampleSet, **how: Any) -> None:
    """Sample what is left of a set, see `SampleSet.sample`, with a bar, and print the speed."""
    began, num_before = time.perf_counter(), one.num_codes
    one.sample(**how)
    seconds = max(time.perf_counter() - began, 1e-9)
    total = (one.num_codes - num_before) * one.request.num_lanes
    if total and not one.stopped_by:
        unit, rate = one.codec.unit, one.codec.sample_rate_hz
        times = f", {total / seconds / rate:.4f} x real time" if rate else ""
        print(f"{total} {unit}s in {seconds:.1f} s: {total / seconds:.0f} {unit}s/s{times}")


def _verify(one: SampleSet) -> float:
    difference = one.verify()
    print(f"largest difference of log-probabilities between steps and forward: {difference:.3g} nats")
    if not difference <= VERIFY_LIMIT:
        print(f"error: verification failed: {difference:.3g} nats, expected at most {VERIFY_LIMIT}", file=sys.stderr)
    return difference
