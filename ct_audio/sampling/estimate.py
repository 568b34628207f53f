"""How long sampling will take, and how lanes are best spread on this machine: measured before it begins.

Side by side, lanes share what is read of the weights; one after another, each has the caches to itself; threads share
the memory's bandwidth. What is fastest depends on model and machine. It is measured once and kept in a file of the
user's; it changes no bit of a sample.
"""

import dataclasses
import hashlib
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ct_audio.common.files import read_json, write_json
from ct_audio.common.machine import cpu_name, usable_cpus, user_cache
from ct_audio.models import SequenceModel
from ct_audio.sampling.sampler import Sampler, Stepper

_BUDGET_SECONDS = 1.0  # of an estimate, and of all that a choice tries
_WORTH = 1.1  # as much faster, or it is not worth another thread
_SIDE_BY_SIDE = (1, 2, 4, 8, 16, 32)


class Spread(NamedTuple):
    """How lanes are spread.

    Attributes:
        num_threads, lanes_together: as of `Sampler`.
        kept_in: the file that remembers it; None where it cannot be written, or there is no choice.
    """

    num_threads: int
    lanes_together: int
    kept_in: Path | None = None

    def in_words(self) -> str:
        """As "8 lanes side by side, 2 threads"; empty for one lane after another in one thread."""
        parts = [f"{self.lanes_together} lanes side by side"] if self.lanes_together > 1 else []
        parts += [f"{self.num_threads} threads"] if self.num_threads > 1 else []
        parts += [f"found fastest on this machine, {self.kept_in}"] if self.kept_in else []
        return ", ".join(parts)


def estimate_code_seconds(
    model: SequenceModel,
    *,
    num_lanes: int,
    max_codes: int = 10_000,
    budget_seconds: float = _BUDGET_SECONDS,
    stepper: Stepper = "auto",
) -> tuple[float, Spread | None]:
    """Wall time in seconds of one code of each lane, as it is once memory is full, measured on a throw-away sample.

    Args:
        max_codes: at least 1; codes of the throw-away sample at most, not counting those to warm up.
        budget_seconds: it is broken off after this time, about; a choice of how to spread takes as much once more.
    Returns:
        the time, and how lanes are best spread (None with the eager stepper).
    """
    sampler = Sampler(model, num_lanes=num_lanes, seed=0, start_code=0, stepper=stepper)
    sampler.begin_full()
    list(sampler.blocks(2, seconds=0.0))  # first calls are slower: the kernels are compiled, or read from disk
    if sampler.stepper == "eager":
        return _code_seconds(sampler, max_codes, budget_seconds), None
    spread = _best_spread(model, sampler, max_codes, budget_seconds)
    sampler.num_threads, sampler.lanes_together = spread.num_threads, spread.lanes_together
    return _code_seconds(sampler, max_codes, budget_seconds), spread


def _best_spread(model: SequenceModel, sampler: Sampler, max_codes: int, budget_seconds: float) -> Spread:
    """The fastest way, from the file or measured and then kept there."""
    num_lanes, most_threads = sampler.num_lanes, min(torch.get_num_threads(), sampler.num_lanes)
    if num_lanes == 1:
        return Spread(1, 1)
    path, key = user_cache() / "sampling.json", _key(model, num_lanes, most_threads)
    known = _read(path)
    if (found := known.get(key)) is not None:
        return Spread(*found, kept_in=path)
    ways = [
        Spread(threads, together)
        for threads in sorted({1, *(2**power for power in range(1, 10) if 2**power < most_threads), most_threads})
        for together in _SIDE_BY_SIDE
        if together == 1 or together <= num_lanes // threads
    ]
    seconds = {}
    for way in ways:
        sampler.num_threads, sampler.lanes_together = way.num_threads, way.lanes_together
        seconds[way] = _code_seconds(sampler, max_codes, budget_seconds / len(ways))
    best = ways[0]
    for way in ways:  # fewer threads first
        worth = _WORTH if way.num_threads > best.num_threads else 1.0
        best = way if seconds[way] * worth < seconds[best] else best
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _read(path) | {key: best[:2]})
    except OSError:  # measured again next time
        return best
    return best._replace(kept_in=path)


def _key(model: SequenceModel, num_lanes: int, most_threads: int) -> str:
    """What the choice depends on: machine, model, kernels, lanes, threads."""
    config = json.dumps(dataclasses.asdict(model.config), sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode()).hexdigest()[:12]
    machine = f"{cpu_name()}, {usable_cpus()} cores, numba {version('numba')}"
    return f"{machine}; {model.config.name} {digest}, {num_lanes} lanes, at most {most_threads} threads"


def _read(path: Path) -> dict[str, Any]:
    """What is kept; nothing where the file is missing or damaged."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    sound = isinstance(content, dict) and all(
        isinstance(found, list) and len(found) == 2 and all(type(number) is int and number > 0 for number in found)
        for found in content.values()
    )
    return content if sound else {}


def _code_seconds(sampler: Sampler, max_codes: int, budget_seconds: float) -> float:
    """Without the first eighth, where blocks are short and each costs something for itself."""
    began, num_before, points = time.perf_counter(), sampler.num_codes, []
    blocks = sampler.blocks(max_codes, seconds=budget_seconds / 4)
    for codes, _ in blocks:
        codes.tolist()  # waits for the device
        points.append((time.perf_counter() - began, sampler.num_codes - num_before))
        if points[-1][0] > budget_seconds:
            break
    blocks.close()
    seconds, num_codes = points[-1]
    earlier = [(0.0, 0), *points[:-1]]
    first_seconds, first_codes = next((point for point in earlier if point[1] >= num_codes / 8), earlier[-1])
    return (seconds - first_seconds) / (num_codes - first_codes)
