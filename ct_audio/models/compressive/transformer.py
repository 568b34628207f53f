"""The Compressive Transformer (Rae et al. 2019); with no compressed memory it is Transformer-XL (Dai et al. 2019)."""

from torch import nn

from ct_audio.models.adaptive_vocabulary import AdaptiveInput, AdaptiveSoftmax
from ct_audio.models.composition import ComposedModel
from ct_audio.models.compressive.config import Config
from ct_audio.models.compressive.stack import CompressiveStack
from ct_audio.models.front_ends import CodeEmbedding
from ct_audio.models.heads import Categorical
from ct_audio.models.interface import FrontEnd, Head
from ct_audio.models.layers import linear


class CompressiveTransformer(ComposedModel):
    """Embedding (or adaptive input), `CompressiveStack`, softmax (or adaptive softmax); fresh parameters are drawn from
    torch's global generator."""

    config: Config
    stack: CompressiveStack

    def __init__(self, config: Config) -> None:
        front_end = _front_end(config)
        super().__init__(config, front_end, CompressiveStack(config), _head(config, front_end))


def _front_end(config: Config) -> FrontEnd:
    if config.adaptive_cutoffs is not None:
        bands = (config.vocab_size, config.width, config.adaptive_cutoffs, config.adaptive_div)
        return AdaptiveInput(*bands, dropout=config.dropout)
    table = nn.Embedding(config.vocab_size, config.width)
    nn.init.normal_(table.weight, std=config.width**-0.5 if config.tie_embeddings else 1.0)
    scale = config.width**0.5 if config.tie_embeddings else None
    return CodeEmbedding(table, scale=scale, dropout=config.dropout)


def _head(config: Config, front_end: FrontEnd) -> Head:
    if isinstance(front_end, AdaptiveInput):
        tied = front_end if config.tie_embeddings else None
        return AdaptiveSoftmax(config.vocab_size, config.width, config.adaptive_cutoffs, config.adaptive_div, tied=tied)
    projection = linear(config.width, config.vocab_size, bias=True, gain=0.5)
    if config.tie_embeddings:
        assert isinstance(front_end, CodeEmbedding)
        projection.weight = front_end.table.weight
    return Categorical(projection)
