"""What the machine offers."""

import os


def usable_cpus() -> int:
    """CPU cores that this process may use, at least 1: those that it is bound to, else (macOS, Windows) all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
