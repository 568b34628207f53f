"""What this machine has."""

import os


def usable_cpus() -> int:
    """CPUs that this process may run on, at least 1; where the system does not say (macOS), all that there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
