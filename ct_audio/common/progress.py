"""How far a long stage is: a bar on a terminal; elsewhere a line when it proves long, then one a minute."""

import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

FIRST_SECONDS, EVERY_SECONDS = 10.0, 60.0
"""When the first line comes, if about as much is left by then, and how long after it the next ones."""


class Progress(tqdm):
    """tqdm where stderr is a terminal; else lines, as "validating 101.6 s of audio: 12%, about 40 s left".

    Args:
        arguments, options: of tqdm; `desc`, `total` and `unit` make the lines.
        quiet: neither bar nor lines.
    """

    def __init__(self, *arguments: Any, quiet: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **{"leave": False, "disable": True if quiet else None, **options})
        self._writes_lines = bool(self.disable) and not quiet
        self._what = options.get("desc") or options.get("unit", "it")
        self._began = time.monotonic()
        self._next, self._first_done = self._began + FIRST_SECONDS, self.n

    def __iter__(self) -> Iterator[Any]:
        if not self._writes_lines:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: int | float | None = 1) -> bool | None:
        """Count `n` more; a line is written where it is time for one."""
        if not self._writes_lines:
            return super().update(n)
        self.n += n or 0
        now = time.monotonic()
        if now >= self._next:
            self._next = now + EVERY_SECONDS
            self._write_line(now - self._began)
        return None

    def _write_line(self, seconds: int | float) -> None:
        done = self.n - self._first_done
        if not self.total or done <= 0:
            print(f"{self._what}: {self.n:,} so far", file=sys.stderr, flush=True)
            return
        if done < self.total / 1000:  # the first of it says little: it may have waited for a compiler
            print(f"{self._what}: {self.n / self.total:.0%}", file=sys.stderr, flush=True)
            return
        left = (self.total - self.n) / done * seconds
        if left >= FIRST_SECONDS or seconds > EVERY_SECONDS:
            print(f"{self._what}: {self.n / self.total:.0%}, about {_time(left)} left", file=sys.stderr, flush=True)


def _time(seconds: int | float) -> str:
    """As "40 s", "12 min" or "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
