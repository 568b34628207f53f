"""Models behind one interface (`interface.py`); the name of a model is the name of its module."""

import importlib
import pkgutil
from typing import Any

from ct_audio.errors import UserError
from ct_audio.models.interface import ModelOutput, SequenceModel

__all__ = ["ModelOutput", "SequenceModel", "build_model", "model_config_class", "model_names"]


def model_names() -> list[str]:
    """Names of all models: the modules of this package that define `Config` and `build`."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(name for name in names if hasattr(importlib.import_module(f"{__name__}.{name}"), "build"))


def model_config_class(name: str) -> type:
    """The frozen configuration dataclass of a model.

    Raises:
        UserError: there is no model of that name.
    """
    if name not in model_names():
        raise UserError(f"model.name: there is no model {name!r}; expected one of {', '.join(model_names())}")
    return importlib.import_module(f"{__name__}.{name}").Config


def build_model(config: Any) -> SequenceModel:
    """Build a model with freshly initialised parameters (from torch's global generator).

    Args:
        config: a model's configuration dataclass, or a whole run configuration (its `model` is taken).
    """
    config = getattr(config, "model", config)
    model_config_class(config.name)
    return importlib.import_module(f"{__name__}.{config.name}").build(config)
