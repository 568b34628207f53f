"""Configuration of the compressive stack and of the model around it, checked where it is made."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

from ct_audio.common.errors import UserError
from ct_audio.models.parts import PartsConfig


@dataclass(frozen=True)
class StackConfig:
    """A stack of compressive layers; lengths are in codes (rows of the stream) or in rows of memory.

    Attributes:
        num_layers, width, num_heads, feedforward_width: as in any transformer; head width is width / num_heads.
        num_kv_heads: heads of keys and values, each shared by as many heads in a row; 0 for as many as `num_heads`.
        positions: "relative" as in the paper (Transformer-XL's), or "rotary" (Su et al. 2021, arXiv 2104.09864):
            queries and keys turned by their positions, without parameters; faster, not the paper's.
        position_width: P, width of the sinusoidal table (the paper's is `width`), even; of no concern to "rotary".
        dropout: of each sublayer's output and inside the feed-forward block (in a model also of the embedding).
        window_length: n_s. memory_length: n_m. compressed_memory_length: n_cm; 0 gives Transformer-XL.
        compression_rate: c, one number or a list with one a layer.
        compression_function: f_c; "most_used" keeps the rows with the largest attention instead of compressing.
        compression_loss: what trains f_c: "attention_reconstruction" (the paper's best), "autoencoding" (with a decoder
            of its own), "bptt" (the task loss, through the windows of a chunk), or "none" (f_c stays as it was
            initialised).
        reconstruction_query_share: part of a window's queries that the attention-reconstruction loss uses, in (0, 1].
        memory_layers: indices of the layers that keep memory and compressed memory; null for all. The others see their
            window only.
        adaptive_span: a learned soft span of each head over memory and compressed memory (reference backend only).
        adaptive_span_ramp: rows over which attention fades at the end of a span.
        adaptive_span_loss: weight of the mean span, in rows, in the loss.
        compressed_positions: what position a compressed row has: its "index" as in the paper, right before the
            memory, or "temporal", the mean position of the codes that it stands for.
        straddling_groups: what becomes of c rows that leave together where a document starts among them: "drop" (their
            compressed row belongs to nobody: a document may lose its first c - 1 rows) or "zero" (rows of earlier
            documents are zeroed before f_c sees them). Of no concern to most_used, which has no groups.
        attention_backend: "fused" or "reference" (slow, the formula as it is written).
        norm_position: "post" as in the paper, or "pre".
        convolution_length: rows that a causal convolution before each attention sees, a kernel of its own for every
            channel; 0 for none, as in the paper.
    """

    num_layers: int = 20
    width: int = 384
    num_heads: int = 6
    num_kv_heads: int = 0
    feedforward_width: int = 1024
    positions: Literal["relative", "rotary"] = "relative"
    position_width: int = 64
    dropout: float = 0.0
    window_length: int = 768
    memory_length: int = 768
    compressed_memory_length: int = 768
    compression_rate: Any = 4
    compression_function: Literal["conv", "dilated_conv", "gru", "mean", "max", "most_used"] = "conv"
    compression_loss: Literal["attention_reconstruction", "autoencoding", "bptt", "none"] = "attention_reconstruction"
    reconstruction_query_share: float = 1.0
    memory_layers: Any = None
    compressed_positions: Literal["index", "temporal"] = "index"
    straddling_groups: Literal["drop", "zero"] = "drop"
    adaptive_span: bool = False
    adaptive_span_ramp: int = 32
    adaptive_span_loss: float = 2e-6
    attention_backend: Literal["fused", "reference"] = "fused"
    norm_position: Literal["post", "pre"] = "post"
    convolution_length: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "width", "num_heads", "feedforward_width", "window_length"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("memory_length", "compressed_memory_length", "convolution_length"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name}: expected at least 0, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise UserError(f"model.width = {self.width} is not divisible by model.num_heads = {self.num_heads}")
        if self.num_kv_heads < 0 or (self.num_kv_heads and self.num_heads % self.num_kv_heads):
            raise UserError(
                f"model.num_kv_heads: expected 0 or a divisor of model.num_heads = {self.num_heads}, got "
                f"{self.num_kv_heads}"
            )
        if self.positions == "rotary" and self.width // self.num_heads % 2:
            raise UserError(
                f"model.positions = rotary: expected an even head width, got model.width / model.num_heads = "
                f"{self.width // self.num_heads}"
            )
        if self.position_width < 2 or self.position_width % 2:
            raise UserError(f"model.position_width: expected an even number above 0, got {self.position_width}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout: expected a number in [0, 1), got {self.dropout}")
        if not 0 < self.reconstruction_query_share <= 1:
            raise UserError(
                "model.reconstruction_query_share: expected a share above 0 and at most 1, got "
                f"{self.reconstruction_query_share}"
            )
        if self.adaptive_span and self.attention_backend == "fused":
            raise UserError(
                "model.adaptive_span: the fused kernel has no soft spans; write attention_backend: reference"
            )
        if self.adaptive_span_ramp < 1 or not self.adaptive_span_loss >= 0:
            raise UserError(
                "model.adaptive_span_ramp, model.adaptive_span_loss: expected at least 1 and at least 0, got "
                f"{self.adaptive_span_ramp} and {self.adaptive_span_loss}"
            )
        if self.compression_function == "most_used" and self.compressed_memory_length:
            if self.compression_loss in ("autoencoding", "bptt"):
                raise UserError(
                    f"model.compression_loss = {self.compression_loss}: most_used has nothing to train; write none"
                )
            if self.compressed_positions == "temporal":
                raise UserError(
                    "model.compressed_positions = temporal: the rows that most_used keeps stand for no fixed positions"
                    "; write index, or another compression_function"
                )
        for layer, rate in enumerate(self.compression_rates):
            if self.keeps_memory(layer):
                check_whole_groups(self.compressed_memory_length, rate, window=self.window_length)
                check_whole_groups(self.compressed_memory_length, rate, memory=self.memory_length)

    @property
    def rotation_width(self) -> int:
        """Width of what is turned by a position: of the position query, or with rotary positions of a head."""
        return self.width // self.num_heads if self.positions == "rotary" else self.position_width

    @property
    def key_width(self) -> int:
        """Of the keys of all heads together, and of the values."""
        return self.width // self.num_heads * (self.num_kv_heads or self.num_heads)

    @property
    def compression_rates(self) -> tuple[int, ...]:
        """The compression rate of each layer."""
        rate = self.compression_rate
        rates = tuple(rate) if isinstance(rate, list | tuple) else (rate,) * self.num_layers
        whole = all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in rates)
        if len(rates) != self.num_layers or not whole:
            raise UserError(
                f"model.compression_rate: expected a whole number of at least 1, or a list of {self.num_layers}, "
                f"got {rate}"
            )
        return rates

    def keeps_memory(self, layer: int) -> bool:
        """Whether a layer keeps memory and compressed memory."""
        layers = self.memory_layers
        if layers is None:
            return True
        whole = isinstance(layers, list | tuple) and all(type(index) is int for index in layers)
        if not whole or len(set(layers)) != len(layers) or not all(0 <= index < self.num_layers for index in layers):
            raise UserError(
                f"model.memory_layers: expected null or a list of different layers out of 0 to {self.num_layers - 1}, "
                f"got {layers}"
            )
        return layer in layers

    @property
    def min_chunk_windows(self) -> int:
        """Windows that a training chunk must have: with bptt, as many as let the task loss reach f_c."""
        if self.compression_loss != "bptt" or not self.compressed_memory_length:
            return 1
        return -(-self.memory_length // self.window_length) + 2

    @property
    def reach_of_layers(self) -> tuple[int, ...]:
        """How far before its window's first code each layer looks: n_m + c_l n_cm, 0 for a layer without memory."""
        return tuple(
            (self.memory_length + rate * self.compressed_memory_length) * self.keeps_memory(layer)
            for layer, rate in enumerate(self.compression_rates)
        )

    @property
    def temporal_range(self) -> int:
        """Distance from the first code of a window to the farthest code that can change what is said there.

        A row in the middle of its window looks back from that window's start, so that the range is larger than the
        paper's sum where a layer's reach is not a whole number of windows. With most_used, what is kept comes from this
        range, but older codes too have had a say in the choice.
        """
        distance = 0
        for reach in reversed(self.reach_of_layers):
            distance = math.ceil(distance / self.window_length) * self.window_length + reach
            distance += max(self.convolution_length - 1, 0)
        return distance

    @property
    def paper_temporal_range(self) -> int:
        """The sum over layers of n_m + c_l n_cm, l (n_m + c n_cm) in the paper (section 3), for tables."""
        return sum(self.reach_of_layers)

    @property
    def attention_cost(self) -> int:
        """Sum over layers of n_s + n_m + n_cm, in rows."""
        num_remembering = sum(self.keeps_memory(layer) for layer in range(self.num_layers))
        remembered = num_remembering * (self.memory_length + self.compressed_memory_length)
        return self.num_layers * self.window_length + remembered


@dataclass(frozen=True)
class Config(StackConfig, PartsConfig):
    """The Compressive Transformer: a compressive stack between a front end and a head.

    Attributes:
        adaptive_cutoffs: null, or the first code of each band but the first: embedding and softmax are adaptive then,
            and codes must be sorted by falling frequency (WikiText-103: [20000, 40000, 200000]).
        adaptive_div: by what the width of a band's table is divided for the next band.
        tie_embeddings: embedding and softmax share their tables (adaptive: their projections too).
        The others: see `StackConfig` and `PartsConfig`.
    """

    name: Literal["compressive_transformer"] = "compressive_transformer"
    adaptive_cutoffs: Any = None
    adaptive_div: int = 4
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        StackConfig.__post_init__(self)
        PartsConfig.__post_init__(self)
        adapts = self.adaptive_cutoffs is not None
        if (adapts and self.front_end != "codes") or ((adapts or self.tie_embeddings) and self.head != "categorical"):
            raise UserError(
                "model.adaptive_cutoffs, model.tie_embeddings: expected front_end codes and head categorical beside "
                f"them, got {self.front_end} and {self.head}; leave them out"
            )
        _check_bands(self.adaptive_cutoffs, self.adaptive_div, vocab_size=self.vocab_size, width=self.width)


def check_whole_groups(compressed_memory_length: int, rate: int, **lengths: int) -> None:
    """Raise `UserError` where a length is not a whole number of groups of `rate` rows."""
    for name, length in lengths.items():
        if compressed_memory_length and length % rate:
            raise UserError(
                f"model.{name}_length = {length} is not divisible by model.compression_rate = {rate}; a group of "
                f"{rate} must not mix valid and invalid rows"
            )


def _check_bands(cutoffs: Any, div: int, *, vocab_size: int, width: int) -> None:
    if div < 1:
        raise UserError(f"model.adaptive_div: expected at least 1, got {div}")
    if cutoffs is None:
        return
    whole = isinstance(cutoffs, list | tuple) and cutoffs and all(type(cutoff) is int for cutoff in cutoffs)
    if not whole or not all(a < b for a, b in itertools.pairwise([0, *cutoffs, vocab_size])):
        raise UserError(
            f"model.adaptive_cutoffs: expected null or a list of increasing codes between 0 and model.vocab_size = "
            f"{vocab_size}, got {cutoffs}"
        )
    if width < div ** len(cutoffs):
        raise UserError(
            f"model.adaptive_div = {div}: with {len(cutoffs)} cutoffs the last band's width would be below 1 "
            f"(model.width = {width}); write fewer cutoffs or a smaller adaptive_div"
        )
