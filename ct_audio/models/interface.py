"""The contract that every sequence model keeps: state goes in and comes out, modules keep none.

Shape letters: B lanes, T codes of a chunk, R codes of an unfinished window, D features, V codes of the vocabulary.

The contract in prose
    * A *lane* is one contiguous stream of the batch. `codes[:, t]` are integers in [0, vocab_size).
    * `features[:, t]` predict the code that follows `codes[:, t]`. A stream is preceded by the codec's start code, so
      that its first code is scored too.
    * NLL goes through `nll`; training makes no [B, T, V] tensor of log-probabilities if the model can avoid it.
    * Memory is an immutable nest of tuples of tensors, the lane first in every tensor (`memory.py` has helpers that
      map over it). `forward` never detaches what it returns; the caller does, between chunks. Inside a chunk memories
      are detached where they are read.
    * T is any number of whole windows. A shorter last window may end a stream: it is scored, and the memory that comes
      back is final: passing it to `forward` again raises.
    * `document_starts[:, t]` is True where `codes[:, t]` is the first code of a document: nothing before t then has any
      influence at t or later. None means that the streams are continuous.
    * A model may have a method `fit(codes)`, given the train split's codes as one stream before anything else: what it
      computes it keeps in buffers. A model without parameters is not trained: the trainer calls `fit`, if it is there,
      writes the checkpoint and stops.
    * `begin_steps` and `step` are the incremental path. `step` consumes its state and may reuse its buffers;
      `clone_state` makes an independent copy first.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

UNLIMITED_RANGE = 2**40
"""`temporal_range` of a model whose memory fades but never ends: more codes than a stream has."""


class ModelOutput(NamedTuple):
    """What a forward pass returns.

    Attributes:
        features: [B, T, D]; `features[:, t]` predict the code after `codes[:, t]`.
        memory: the model's memory after the chunk, to be passed to the next forward.
        auxiliary_losses: scalar losses by name, each normalised like a mean over the chunk's codes, so that the loss of
            a chunk of k windows is the mean of the losses of its windows. Summed into the training loss, weight 1.
            Names are TensorBoard-ready, as `attention_reconstruction/layer_03`.
    """

    features: Float[Tensor, "B T D"]
    memory: Any
    auxiliary_losses: dict[str, Float[Tensor, ""]]


@runtime_checkable
class SequenceModel(Protocol):
    """Structural type of every model in `ct_audio.models`; all of them are `torch.nn.Module` too."""

    @property
    def config(self) -> Any:
        """The frozen dataclass that built the model."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number V of codes."""
        ...

    @property
    def window_length(self) -> int:
        """Codes a window; a chunk is a whole number of windows. 1 for models without windows."""
        ...

    @property
    def temporal_range(self) -> int:
        """Distance in codes to the farthest code that can change a prediction made at the start of a window."""
        ...

    @property
    def attention_cost(self) -> int:
        """Rows that one code attends to, summed over layers (0 for a model without attention)."""
        ...

    def zero_memory(
        self, num_lanes: int, *, memory_length: int | None = None, compressed_memory_length: int | None = None
    ) -> Any:
        """Memory of a stream that has not begun, on the model's device and in its dtype.

        Lengths default to the configuration's; evaluation may pass others. A model that has no such memory raises
        `UserError` when a length is passed.
        """
        ...

    def forward(
        self, codes: Int[Tensor, "B T"], memory: Any, *, document_starts: Bool[Tensor, "B T"] | None = None
    ) -> ModelOutput:
        """Features, next memory and auxiliary losses of a chunk."""
        ...

    def __call__(
        self, codes: Int[Tensor, "B T"], memory: Any, *, document_starts: Bool[Tensor, "B T"] | None = None
    ) -> ModelOutput: ...

    def nll(self, features: Float[Tensor, "*batch D"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Negative log-likelihood of each target in nats (float32 or wider)."""
        ...

    def log_probabilities(self, features: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Normalised log-probabilities of every code in nats."""
        ...

    def begin_steps(self, memory: Any, codes: Int[Tensor, "B R"]) -> Any:
        """State for `step` after R codes of an unfinished window (0 <= R < window_length), computed in parallel."""
        ...

    def step(self, codes: Int[Tensor, "B"], state: Any) -> tuple[Float[Tensor, "B D"], Any]:
        """Features after one more code a lane, and the next state. Consumes `state`."""
        ...

    def clone_state(self, state: Any) -> Any:
        """An independent copy of a step state."""
        ...

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by clipping group: "model", and "compression" for f_c where it has parameters."""
        ...

    def after_update(self) -> None:
        """Bring parameters that have a range back into it; to be called after each update of the weights."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
