"""Sampling: codes from a model, with their log-probabilities.

There are two steppers: `eager` calls the model's `step` and draws with torch, which every model, type and device can;
`compiled` is a loop in machine code, draws included, which models offer in float32 on the CPU
(`SequenceModel.block_sampler`), some ten times as fast.
Lane k draws from a generator of its own, seeded from (seed, k): the first codes of a longer sample are the shorter
sample. For the same stepper and machine every bit is the same; with `eager`, if the numbers of lanes and threads are.
Shape letters: B lanes, P codes of a prime, T sampled codes, N codes of a block, V codes of the vocabulary, G bytes of a
generator's state, R uniform numbers drawn ahead.
"""

import contextlib
import math
import time
from collections.abc import Generator
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.models import SequenceModel
from ct_audio.models.interface import BlockSampler
from ct_audio.models.state import named_leaves, state_from_leaves

_DRAWS_AHEAD = 4096  # uniform numbers a lane that are drawn at a time; draws do not depend on it
_MAX_BLOCK = 4096  # codes of a block, however fast they come
Stepper = Literal["auto", "compiled", "eager"]
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
        stepper: "compiled", "eager", or "auto": compiled where the model offers it.
    Attributes:
        num_codes: codes sampled so far in each lane.
        stepper: which one it is.
        lanes_together: lanes that a thread of the compiled stepper steps side by side; None: as the model thinks best.
        num_threads: over which the compiled stepper spreads lanes; None: as many as torch has.
    Raises:
        UserError: an argument is out of its range, or "compiled" is asked for and not offered.
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
        stepper: Stepper = "auto",
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
        self._has_begun = False  # True once the prime has been run and the state is one for the stepper
        self._compiled = None if stepper == "eager" else _block_sampler(model, is_asked_for=stepper == "compiled")
        self.stepper: Stepper = "eager" if self._compiled is None else "compiled"
        self.num_lanes, self.num_codes = num_lanes, 0
        self.lanes_together: int | None = None
        self.num_threads: int | None = None

    def run(self, num_codes: int) -> Generator[tuple[Int[Tensor, " B"], Float[Tensor, " B"]], None, None]:
        """As `blocks`, code by code: what has been sampled is never ahead of what has been returned."""

        def one_by_one(blocks: Generator[tuple[Tensor, Tensor], None, None]) -> Generator[Any, None, None]:
            with contextlib.closing(blocks):
                for codes, log_probabilities in blocks:
                    yield codes[:, 0], log_probabilities[:, 0]

        return one_by_one(self.blocks(num_codes, seconds=0.0))

    def blocks(
        self, num_codes: int, *, seconds: float = 0.05
    ) -> Generator[tuple[Int[Tensor, "B N"], Float[Tensor, "B N"]], None, None]:
        """Sample so many more codes.

        Args:
            seconds: wall time that a block takes, about; 0: blocks of one code.
        Returns:
            iterator of blocks of codes and of their log-probabilities in nats, at temperature 1 before top-k and
            top-p. The model is in evaluation mode until the iterator is exhausted or closed.
        Raises:
            UserError: the model says NaN.
        """
        if num_codes < 0:
            raise UserError(f"expected no negative number of codes, got {num_codes}")
        return self._blocks(self.num_codes + num_codes, seconds)

    def _blocks(self, stop: int, seconds: float) -> Generator[tuple[Tensor, Tensor], None, None]:
        length = 1
        with self._model.evaluation_mode():
            if not self._has_begun:
                self._begin()
            while self.num_codes < stop:
                length, began = min(length, stop - self.num_codes), time.perf_counter()
                with torch.inference_mode():  # left before each yield: it must not leak to the caller
                    uniforms = self._uniforms.next(length)
                    codes, chosen = self._step(uniforms) if self._compiled is None else self._sample_block(uniforms)
                    _require_finite(chosen, self.num_codes)
                self._codes = codes[:, -1]
                self.num_codes += length
                growth = min(4.0, seconds / max(time.perf_counter() - began, 1e-6))
                length = max(1, min(_MAX_BLOCK, int(length * growth)))
                yield codes, chosen

    def begin_full(self) -> None:
        """Begin with a memory that is full of nothing, in the middle of a window: for measurements of speed."""
        model, num_lanes = self._model, self.num_lanes
        codes = self._inputs[:, -1:].expand(num_lanes, model.window_length // 2)
        with model.evaluation_mode(), torch.inference_mode():
            self._place(model.begin_steps(model.full_memory(num_lanes), codes))

    def _begin(self) -> None:
        self._place(_run_prime(self._model, self._inputs[:, :-1]))

    def _place(self, state: Any) -> None:
        self._state = state if self._compiled is None else self._compiled.begin(state)
        self._has_begun = True

    def _step(self, uniforms: Float64[Tensor, "B N"]) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"]]:
        """A block by the model's own steps."""
        last, codes, chosen = self._codes, [], []
        for column in uniforms.unbind(1):
            features, self._state = self._model.step(last, self._state)
            log_probabilities = self._model.log_probabilities(features)
            last = draw_codes(log_probabilities, column, **self._settings)
            codes.append(last)
            chosen.append(log_probabilities.gather(-1, last[:, None])[:, 0])
        return torch.stack(codes, dim=1), torch.stack(chosen, dim=1)

    def _sample_block(self, uniforms: Float64[Tensor, "B N"]) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"]]:
        assert self._compiled is not None
        how = {"num_threads": self.num_threads or torch.get_num_threads(), "lanes_together": self.lanes_together}
        codes, chosen, self._state = self._compiled.sample_block(
            self._codes, self._state, uniforms, **self._settings, **how
        )
        return codes, chosen

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
        like = like if self._compiled is None else self._compiled.begin(like)
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
    uniforms: Float64[Tensor, " B"],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Int[Tensor, " B"]:
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
            ranked = ranked.masked_fill(more_probable >= top_p * ranked.sum(-1, keepdim=True), 0)
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
        self._ahead = torch.empty(num_lanes, 0, dtype=torch.float64, device=device)

    def next(self, num: int) -> Float64[Tensor, "B N"]:
        """The next numbers of each lane."""
        while self._ahead.shape[1] - self._used < num:
            rows = [torch.rand(_DRAWS_AHEAD, generator=g, dtype=torch.float64) for g in self._generators]
            left = self._ahead[:, self._used :]
            self._ahead, self._used = torch.cat([left, torch.stack(rows).to(self._device)], dim=1), 0
        self._used += num
        return self._ahead[:, self._used - num : self._used]

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


def _block_sampler(model: SequenceModel, *, is_asked_for: bool) -> BlockSampler | None:
    """The compiled stepper of a model, None where it offers none, unless it is asked for."""
    try:
        return model.block_sampler()
    except UserError:
        if is_asked_for:
            raise
        return None


def _require_finite(log_probabilities: Float[Tensor, "B N"], num_before: int) -> None:
    is_broken = ~torch.isfinite(log_probabilities)
    if is_broken.any():
        index, lane = (int(place) for place in is_broken.T.nonzero()[0])  # the first in time
        where = f"at code {num_before + index} of lane {lane}"
        advice = "its parameters are damaged or diverged: use another checkpoint"
        raise UserError(f"the model's log-probabilities are not finite {where}; {advice}")
