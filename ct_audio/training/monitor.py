"""Losses and gradient norms as training goes on, kept on the device until somebody looks.

To look at a number on a GPU is to wait until all work before it is done, and meanwhile nothing new is begun. So steps
add to sums on the device, and note there what was the first that is not finite; the loop looks when it logs, and before
it validates, samples or saves.

Shape letters: B lanes, T codes of a chunk, N losses (or norms).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_NOTHING = -1


class Failure(NamedTuple):
    """The first that was not finite since the last look.

    Attributes:
        step: 0-based.
        part: number of the micro-batch; None for a gradient norm, of all of them.
        tag: of the loss, or of the norm.
        value: what it was.
        place: lane and offset of the first NLL that was not finite; None where another number was not.
    """

    step: int
    part: int | None
    tag: str
    value: float
    place: tuple[int, int] | None


class Monitor:
    """Sums by tag and the first failure since the last look."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Float64[Tensor, " N"]] = {}
        self._failures: dict[tuple[str, ...], Float64[Tensor, " N4"]] = {}
        self._chunk_length = 1

    def add(self, values: dict[str, Float[Tensor, ""]], before: dict[str, float]) -> None:
        """Add to sums which had the values of `before` at the last look."""
        tags = tuple(values)
        if tags not in self._sums:
            start = torch.tensor([before.get(tag, 0.0) for tag in tags], dtype=torch.float64)
            self._sums[tags] = start.to(values[tags[0]].device, non_blocking=True)
        self._sums[tags] = self._sums[tags] + torch.stack(list(values.values()))

    def check_losses(
        self, step: int, part: int, losses: dict[str, Float[Tensor, ""]], nll: Float[Tensor, "B T"]
    ) -> None:
        """Note the first loss of a micro-batch, or NLL of any of its codes, that is not finite."""
        self._chunk_length = nll.shape[1]
        bad = ~nll.detach().flatten().isfinite()
        place = bad.to(torch.uint8).argmax()
        value = nll.detach().flatten().gather(0, place[None])[0].double()
        self._note(step, part, torch.where(bad.any(), place, _NOTHING), value, losses)

    def check_norms(self, step: int, norms: dict[str, Float[Tensor, ""]]) -> None:
        """Note the first norm of a gradient that is not finite."""
        nowhere = torch.full_like(next(iter(norms.values())), _NOTHING)
        self._note(step, _NOTHING, nowhere, nowhere, norms)

    def look(self, sums: dict[str, float]) -> Failure | None:
        """Wait for the device: bring `sums` up to date, and return what failed first."""
        for tags, values in self._sums.items():
            sums.update(zip(tags, values.tolist(), strict=True))
        failures = [self._read(tags, noted.tolist()) for tags, noted in self._failures.items()]
        self._sums, self._failures = {}, {}
        failed = [failure for failure in failures if failure is not None]
        return min(failed, key=lambda failure: (failure.step, failure.part is None), default=None)

    def _note(self, step: int, part: int, place: Tensor, value: Tensor, numbers: dict[str, Tensor]) -> None:
        """Keep them if one is not finite, or a place is given, and nothing is kept yet (of numbers of these tags)."""
        tags, values = tuple(numbers), torch.stack([number.detach().double() for number in numbers.values()])
        is_bad = (place >= 0) | ~values.isfinite().all()
        counts = [values.new_full((), count) for count in (step + 1, part)]
        noted = torch.cat([torch.stack([*counts, place.double(), value.double()]), values])
        if tags not in self._failures:
            self._failures[tags] = torch.zeros_like(noted)
        before = self._failures[tags]
        self._failures[tags] = torch.where(is_bad & (before[0] == 0), noted, before)

    def _read(self, tags: tuple[str, ...], noted: list[float]) -> Failure | None:
        (count, part, place), value, values = map(int, noted[:3]), noted[3], noted[4:]
        if count == 0:
            return None
        if place >= 0:
            return Failure(count - 1, part, tags[0], value, divmod(place, self._chunk_length))
        tag, value = next(pair for pair in zip(tags, values, strict=True) if not math.isfinite(pair[1]))
        return Failure(count - 1, None if part < 0 else part, tag, value, None)
