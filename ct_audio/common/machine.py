"""What the machine offers."""

import os
import platform
from pathlib import Path


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
