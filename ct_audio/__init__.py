"""ct_audio: the Compressive Transformer (Rae et al. 2019, arXiv 1911.05507) for raw audio.

    model = ct_audio.load("kathleen/wavenet")
    waveform = ct_audio.sample(model, seconds=5)

Importing the package is cheap: torch is imported when one of these names is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ct_audio.export.pretrained import Pretrained, load, sample

__version__ = "0.1.0"
__all__ = ["Pretrained", "__version__", "load", "sample"]

_PLACES = dict.fromkeys(("Pretrained", "load", "sample"), "ct_audio.export.pretrained")


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
