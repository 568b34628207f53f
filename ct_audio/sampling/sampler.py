"""Sampling: codes one by one from a model, with their log-probabilities.

Shape letters: B lanes, P codes of a prime, T sampled codes, V codes of the vocabulary, G bytes of a generator's state,
R uniform numbers drawn ahead.
Lane k draws from a generator of its own, seeded from (seed, k): the first codes of a longer sample are the shorter
sample, and for the same number of lanes, threads and device every bit is the same.
"""

import math
import time
from collections.abc import Generator
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.models import SequenceModel
from ct_audio.models.state import named_leaves, state_from_leaves

_DRAWS_AHEAD = 4096  # uniform numbers a lane that are drawn at a time; draws do not depend on it
_CHECK_EVERY = 64  # codes between two looks for NaN; each look waits for the device
_PIECE_LENGTH = 4096  # codes of a prime, or of a re-scored sample, that one forward takes at most


class Sampler:
    """Samples code by code; the cost of a code does not depend on how many came before.

    Its state can be taken out between two codes and put back: it goes on bit for bit.

    Args:
        num_lanes: samples made side by side (B).
        seed: at least 0.
        start_code: what precedes the stream (and the prime).
        temperature: divides the log-probabilities; 0 takes the most probable code.
        top_k: draw from this many most probable codes only, in [1, V].
        top_p: then, of these, from the fewest whose share of the probability reaches this, in (0, 1].
        prime: codes that come first, computed in parallel; the sample goes on after them.
    Attributes:
        num_codes: codes sampled so far in each lane.
    Raises:
        UserError: an argument is out of its range.
    Source: top-p is nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751.
    """

    def __init__(
        self,
        model: SequenceModel,
        *,
        num_lanes: int,
        seed: int,
        start_code: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        prime: Int[Tensor, "B P"] | None = None,
    ) -> None:
        vocab_size = model.vocab_size
        if num_lanes < 1:
            raise UserError(f"expected at least one lane, got {num_lanes}")
        if seed < 0:
            raise UserError(f"seed: expected at least 0, got {seed}")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise UserError(f"temperature: expected a finite number of at least 0, got {temperature}")
        if top_k is not None and not 1 <= top_k <= vocab_size:
            raise UserError(f"top-k: expected 1 to {vocab_size}, the number of codes, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"top-p: expected a share in (0, 1], got {top_p}")
        self._model = model
        self._inputs = _preceded(model, prime, num_lanes, start_code)
        self._settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self._uniforms = _LaneUniforms(seed, num_lanes, self._inputs.device)
        self._codes: Tensor = self._inputs[:, -1]
        self._state: Any = None
        self._has_begun = False  # True once the prime has been run and the state is one for `step`
        self.num_lanes, self.num_codes = num_lanes, 0

    def run(self, num_codes: int) -> Generator[tuple[Int[Tensor, "B"], Float[Tensor, "B"]], None, None]:
        """Sample so many more codes.

        Returns:
            iterator of the codes [B] and of their log-probabilities [B] in nats, at temperature 1 before top-k and
            top-p. The model is in evaluation mode until the iterator is exhausted or closed.
        Raises:
            UserError: the model says NaN (seen with a delay of up to 64 codes).
        """
        if num_codes < 0:
            raise UserError(f"expected no negative number of codes, got {num_codes}")
        return self._run(self.num_codes + num_codes)

    def _run(self, stop: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        model = self._model
        with model.evaluation_mode():
            if not self._has_begun:
                self._state, self._has_begun = _run_prime(model, self._inputs[:, :-1]), True
            while self.num_codes < stop:
                with torch.inference_mode():  # left before each yield: it must not leak to the caller
                    features, self._state = model.step(self._codes, self._state)
                    log_probabilities = model.log_probabilities(features)
                    codes = draw_codes(log_probabilities, self._uniforms.next(), **self._settings)
                    chosen = log_probabilities.gather(-1, codes[:, None])[:, 0]
                    if self.num_codes % _CHECK_EVERY == 0 or self.num_codes == stop - 1:
                        _require_finite(chosen, self.num_codes)
                self._codes = codes
                self.num_codes += 1
                yield codes, chosen

    def leaves(self) -> dict[str, Any]:
        """All that the next code depends on: tensors (of this sampler, not copies) and plain values by name."""
        generators, ahead = self._uniforms.tensors()
        own = {"codes": self._codes, "num_codes": self.num_codes, "generators": generators, "uniforms": ahead}
        return own | dict(named_leaves(self._state, "step"))

    def restore(self, leaves: dict[str, Any]) -> None:
        """Put back what `leaves` of a sampler with the same arguments gave.

        Raises:
            UserError: the leaves are of another model or number of lanes.
        """
        own = {"codes", "num_codes", "generators", "uniforms"}
        if not own <= leaves.keys() or leaves["codes"].shape != self._codes.shape:
            raise UserError(f"state of a sampler: expected {', '.join(sorted(own))} of {self.num_lanes} lanes")
        device = self._inputs.device
        placed = {name: leaf.to(device) if isinstance(leaf, Tensor) else leaf for name, leaf in leaves.items()}
        like = self._model.begin_steps(self._model.zero_memory(self.num_lanes), self._inputs[:, :0])
        step = {name.removeprefix("step").removeprefix("/"): placed[name] for name in placed.keys() - own}
        self._state, self._has_begun = state_from_leaves(like, step), True
        self._uniforms.restore(leaves["generators"], leaves["uniforms"])
        self._codes, self.num_codes = placed["codes"].clone(), leaves["num_codes"]


@torch.inference_mode()
def verify_steps(
    model: SequenceModel,
    codes: Int[Tensor, "B T"],
    log_probabilities: Float[Tensor, "B T"],
    *,
    start_code: int,
    prime: Int[Tensor, "B P"] | None = None,
) -> float:
    """Score sampled codes again, with forward passes over many codes at once in place of steps.

    Args:
        codes, log_probabilities: what `Sampler.run` gave, in the order of time.
    Returns:
        largest absolute difference of a code's two log-probabilities in nats; NaN where either is NaN.
    """
    inputs = torch.cat([_preceded(model, prime, len(codes), start_code), codes], dim=1)
    skipped = inputs.shape[1] - codes.shape[1] - 1  # the prime's codes are given, not scored
    memory, parts = model.zero_memory(len(codes)), []
    with model.evaluation_mode():
        for begin in range(0, inputs.shape[1] - 1, _piece_length(model)):
            targets = inputs[:, begin + 1 : begin + 1 + _piece_length(model)]
            features, memory, _ = model(inputs[:, begin : begin + targets.shape[1]], memory)
            parts.append(model.nll(features, targets))
    if not parts:
        return 0.0
    difference = torch.cat(parts, dim=1)[:, skipped:] + log_probabilities
    return difference.abs().max().item() if difference.numel() else 0.0


def estimate_code_seconds(
    model: SequenceModel, *, num_lanes: int, start_code: int, max_codes: int = 10_000, budget_seconds: float = 1.0
) -> float:
    """Wall time in seconds of one code of each lane, measured on a throw-away sample.

    Args:
        max_codes: at least 1; codes of the throw-away sample at most, not counting two to warm up.
        budget_seconds: it is broken off after this time.
    """
    iterator = Sampler(model, num_lanes=num_lanes, seed=0, start_code=start_code).run(max_codes + 2)
    for codes, _ in islice(iterator, 2):  # first calls are slower
        codes.tolist()
    began, count = time.perf_counter(), 0
    for codes, _ in iterator:
        count += 1
        codes.tolist()  # waits for the device
        if time.perf_counter() - began > budget_seconds:
            break
    iterator.close()
    return (time.perf_counter() - began) / count


@torch.inference_mode()
def _run_prime(model: SequenceModel, inputs: Int[Tensor, "B _"]) -> Any:
    """State for `step` after these codes: whole windows in a few forwards, the rest by `begin_steps`."""
    whole = inputs.shape[1] // model.window_length * model.window_length
    memory = model.zero_memory(len(inputs))
    for begin in range(0, whole, _piece_length(model)):
        memory = model(inputs[:, begin : min(begin + _piece_length(model), whole)], memory).memory
    return model.begin_steps(memory, inputs[:, whole:])


def draw_codes(
    log_probabilities: Float[Tensor, "B V"],
    uniforms: Float64[Tensor, "B"],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Int[Tensor, "B"]:
    """One code a lane by inversion of the cumulative distribution; a code without probability never comes.

    Args:
        uniforms: a number in [0, 1) for each lane.
        temperature, top_k, top_p: as in `Sampler`.
    """
    if temperature == 0:
        return log_probabilities.argmax(dim=-1)
    logits = log_probabilities.double()
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(dim=-1)
    if (top_k is not None and top_k < logits.shape[-1]) or (top_p is not None and top_p < 1):
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            ranked[:, top_k:] = 0
        if top_p is not None and top_p < 1:
            more_probable = ranked.cumsum(-1) - ranked  # the probability of the codes before
            ranked[more_probable >= top_p * ranked.sum(-1, keepdim=True)] = 0
        probabilities = torch.zeros_like(ranked).scatter_(-1, order, ranked)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))  # rounding must not reach past the last code
    point = torch.minimum(uniforms[:, None] * total, below_total)
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


class _LaneUniforms:
    """Uniform float64 numbers in [0, 1); lane k's are from a generator of its own on the CPU, seeded from (seed, k)."""

    def __init__(self, seed: int, num_lanes: int, device: torch.device) -> None:
        # 32 bits, because torch's CPU generator ignores higher ones; SeedSequence mixes so that no two lanes are alike
        words = [np.random.SeedSequence((seed, lane)).generate_state(1, np.uint32)[0] for lane in range(num_lanes)]
        self._generators = [torch.Generator().manual_seed(int(word)) for word in words]
        self._device, self._used = device, 0
        self._ahead = torch.empty(num_lanes, 0, dtype=torch.float64)

    def next(self) -> Tensor:
        """The next number of each lane, [B]."""
        if self._used == self._ahead.shape[1]:
            rows = [torch.rand(_DRAWS_AHEAD, generator=g, dtype=torch.float64) for g in self._generators]
            self._ahead, self._used = torch.stack(rows).to(self._device), 0
        self._used += 1
        return self._ahead[:, self._used - 1]

    def tensors(self) -> tuple[UInt8[Tensor, "B G"], Float64[Tensor, "B R"]]:
        """The generators' states, and the numbers that were drawn ahead and not used yet."""
        return torch.stack([generator.get_state() for generator in self._generators]), self._ahead[:, self._used :]

    def restore(self, generators: UInt8[Tensor, "B G"], ahead: Float64[Tensor, "B R"]) -> None:
        """Put back what `tensors` gave."""
        for generator, state in zip(self._generators, generators, strict=True):
            generator.set_state(state.clone())
        self._ahead, self._used = ahead.to(self._device).clone(), 0


def _preceded(model: SequenceModel, prime: Tensor | None, num_lanes: int, start_code: int) -> Int[Tensor, "B _"]:
    """The start code and then the prime of each lane."""
    vocab_size = model.vocab_size
    if not 0 <= start_code < vocab_size:
        raise UserError(f"start_code: expected a code in [0, {vocab_size}), got {start_code}")
    start = torch.full((num_lanes, 1), start_code, dtype=torch.int64, device=model.device)
    if prime is None:
        return start
    if len(prime) != num_lanes:
        raise UserError(f"prime: expected a row for each of {num_lanes} lanes, got {len(prime)}")
    if prime.numel() and not 0 <= int(prime.min()) <= int(prime.max()) < vocab_size:
        raise UserError(f"prime: expected codes in [0, {vocab_size}), got {int(prime.min())} to {int(prime.max())}")
    return torch.cat([start, prime.to(start)], dim=1)


def _piece_length(model: SequenceModel) -> int:
    return max(1, _PIECE_LENGTH // model.window_length) * model.window_length


def _require_finite(log_probabilities: Tensor, index: int) -> None:
    broken = (~torch.isfinite(log_probabilities)).nonzero().flatten().tolist()
    if broken:
        where = f"at code {index} of lane {broken[0]}"
        advice = "its parameters are damaged or diverged: use another checkpoint"
        raise UserError(f"the model's log-probabilities are not finite {where}; {advice}")
