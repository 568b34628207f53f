"""Signals that save and end whatever runs."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""They save and end a run; SIGKILL does no harm either. Windows has no SIGUSR1."""


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list to which SIGINT, SIGTERM and SIGUSR1 append themselves instead of ending the process."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, lambda came, _frame: caught.append(came)) for number in SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
