"""Models behind one interface (`interface.py`), and the parts that they are put together from, by name."""

from typing import Any

from ct_audio.common.errors import UserError
from ct_audio.models import linear_prediction, wavenet
from ct_audio.models.adaptive_vocabulary import AdaptiveInput, AdaptiveSoftmax
from ct_audio.models.compressive import transformer
from ct_audio.models.compressive.stack import CompressiveStack
from ct_audio.models.front_ends import CodeEmbedding
from ct_audio.models.heads import Categorical
from ct_audio.models.interface import FrontEnd, Head, ModelOutput, SequenceModel, Stack

__all__ = [
    "FRONT_ENDS",
    "HEADS",
    "MODELS",
    "STACKS",
    "ModelOutput",
    "SequenceModel",
    "build_model",
    "model_config_class",
]

MODELS: dict[str, tuple[type, type[SequenceModel]]] = {
    "compressive_transformer": (transformer.Config, transformer.CompressiveTransformer),
    "linear_prediction": (linear_prediction.Config, linear_prediction.LinearPrediction),
    "wavenet": (wavenet.Config, wavenet.WaveNet),
}
"""By `model.name` of a configuration: its frozen dataclass, and the model that is built from it."""
FRONT_ENDS: dict[str, type[FrontEnd]] = {"codes": CodeEmbedding, "adaptive": AdaptiveInput}
STACKS: dict[str, type[Stack]] = {"compressive": CompressiveStack, "wavenet": wavenet.WaveNetStack}
HEADS: dict[str, type[Head]] = {"categorical": Categorical, "adaptive_softmax": AdaptiveSoftmax}
"""Parts; `tests/tiny.py` has a model with each, which the contract tests in `tests/test_models.py` run over."""


def model_config_class(name: str) -> type:
    """The frozen configuration dataclass of a model.

    Raises:
        UserError: there is no model of that name.
    """
    if name not in MODELS:
        raise UserError(f"model.name: there is no model {name!r}; expected one of {', '.join(MODELS)}")
    return MODELS[name][0]


def build_model(config: Any) -> SequenceModel:
    """Build a model with freshly initialised parameters (from torch's global generator).

    Args:
        config: a model's configuration dataclass, or a whole run configuration (its `model` is taken).
    """
    config = getattr(config, "model", config)
    model_config_class(config.name)
    return MODELS[config.name][1](config)
