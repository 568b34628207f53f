"""Which front end and which head a model has, by its configuration."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ct_audio.common.errors import UserError
from ct_audio.models.autocorrelation import AutocorrelationSettings
from ct_audio.models.front_ends import CodeEmbedding, LinearPredictionFeatures, WaveformFeatures
from ct_audio.models.heads import Categorical, LogisticMixture
from ct_audio.models.interface import Head


@dataclass(frozen=True)
class PartsConfig:
    """Keys that models of codes share.

    Attributes:
        vocab_size: number V of codes.
        front_end: "codes": an embedding (the paper's); for mu-law codes also "waveform": and features of the samples,
            or "linear_prediction": and features of the samples relative to stable adaptive linear prediction.
        prediction_order, prediction_window_length, prediction_hop_length: of that prediction, in samples.
        head: "categorical": a softmax (the paper's); with a front end that hears the waveform also "logistic_mixture".
        num_components: K, of the mixture.
    """

    vocab_size: int = 256
    front_end: Literal["codes", "waveform", "linear_prediction"] = "codes"
    prediction_order: int = 32
    prediction_window_length: int = 480
    prediction_hop_length: int = 24
    head: Literal["categorical", "logistic_mixture"] = "categorical"
    num_components: int = 4

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise UserError(f"model.vocab_size: expected at least 2, got {self.vocab_size}")
        if self.num_components < 1:
            raise UserError(f"model.num_components: expected at least 1, got {self.num_components}")
        if self.head == "logistic_mixture" and self.front_end == "codes":
            raise UserError(
                "model.head = logistic_mixture needs the waveform; write model.front_end=linear_prediction or waveform"
            )
        if self.front_end != "codes" and self.vocab_size < 4:
            raise UserError(f"model.front_end = {self.front_end} needs 4 mu-law codes or more, got {self.vocab_size}")
        self.prediction  # noqa: B018 (it checks its numbers)

    @property
    def prediction(self) -> AutocorrelationSettings:
        """Of the front end "linear_prediction"."""
        lengths = (self.prediction_order, self.prediction_window_length, self.prediction_hop_length)
        return AutocorrelationSettings(*lengths)


def make_front_end(
    config: PartsConfig, table: nn.Embedding, *, scale: float | None = None, dropout: float = 0.0
) -> CodeEmbedding:
    """The front end around a table of codes; its other parameters are drawn from torch's global generator."""
    if config.front_end == "linear_prediction":
        return LinearPredictionFeatures(config.prediction, table, scale=scale, dropout=dropout)
    kind = WaveformFeatures if config.front_end == "waveform" else CodeEmbedding
    return kind(table, scale=scale, dropout=dropout)


def make_head(config: PartsConfig, projection: nn.Linear) -> Head:
    """The head for a stack's rows.

    Args:
        projection: from the rows to the logits of a softmax.
    """
    if config.head == "logistic_mixture":
        return LogisticMixture(projection.in_features, config.vocab_size, num_components=config.num_components)
    return Categorical(projection)
