"""Small synthetic recordings and access to the recipes, for tests."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parents[1]


def voice(seed: int, seconds: float = 0.4, rate: int = 24_000) -> np.ndarray:
    """[N] float32: a decaying harmonic tone with a little noise, peak below 0.5."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    pitch = 100 + 20 * (seed % 7)
    tone = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in (1, 2, 3, 4))
    return (0.15 * tone * np.exp(-2 * time) + 0.01 * rng.standard_normal(len(time))).astype(np.float32)


def write(path: Path, waveform: np.ndarray, rate: int = 24_000, subtype: str | None = None) -> None:
    """Write an audio file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, rate, subtype=subtype)


def count_calls(
    patch: pytest.MonkeyPatch, module: ModuleType, function: str, name_of: Callable[[Any], str], stop_after: int | None
) -> list[str]:
    """Note by name what a function of one argument is called with, and press Ctrl-C after some calls."""
    called: list[str] = []
    original = getattr(module, function)

    def noting(argument: Any) -> Any:
        if stop_after is not None and len(called) == stop_after:
            raise KeyboardInterrupt
        called.append(name_of(argument))
        return original(argument)

    patch.setattr(module, function, noting)
    return called


def load_script(path: str, name: str) -> ModuleType:
    """Import a file of the project that is in no package, as recipes/folder/prepare.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
