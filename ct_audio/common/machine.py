"""What the machine offers."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

MEMORY = Path("/proc/self/status")
"""Where Linux says how much memory a process holds."""
_PEAK = Path("/proc/self/clear_refs")
T = TypeVar("T")


def usable_cpus() -> int:
    """CPU cores that this process may use, at least 1: those that it is bound to, else (macOS, Windows) all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """What the processor is called, as well as is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def user_cache() -> Path:
    """The folder for what can be measured again; it may not be there. CT_AUDIO_CACHE_DIR names another."""
    import platformdirs  # --help needs no installation

    return Path(os.environ.get("CT_AUDIO_CACHE_DIR") or platformdirs.user_cache_path("ct_audio"))


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process, so that it pays for no other's memory; its module is imported once for all."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    context = get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """The most memory held within, in MiB above what was held before (Linux only)."""
    _PEAK.write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    found: list[float] = []
    yield lambda: found[0]
    found.append(max(0.0, (_status("VmHWM") - before) / 1024))


def _status(key: str) -> int:
    line = next(line for line in MEMORY.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])
