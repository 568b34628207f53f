"""The contract that every sequence model keeps: state goes in and comes out, modules keep none.

Shape letters: B lanes, T codes of a chunk, R codes of an unfinished window, N rows of any batch, D width of a row or of
features, V codes of the vocabulary.

A model is front end, stack, head (`composition.py` puts them together): the front end makes a row of each code, the
stack makes features of rows, the head makes probabilities of features. Linear prediction is a model as a whole.

The contract in prose:

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
* A model without parameters is not trained: the trainer calls `fit` with the train split's codes as one stream,
  writes the checkpoint and stops.
* `begin_steps` and `step` are the incremental path. `step` consumes its state and may reuse its buffers;
  `clone_state` makes an independent copy first.
"""

import abc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Integer
from torch import Tensor, nn

from ct_audio.common.errors import UserError

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


class FrontEndOutput(NamedTuple):
    """What a front end makes of codes.

    Attributes:
        rows: [B, T, D], for the stack.
        memory: after these codes; () where there is none.
        side: [B, T, S], what the head gets beside the stack's rows, at the end of the features; None where it gets
            nothing.
    """

    rows: Float[Tensor, "B T D"]
    memory: Any
    side: Float[Tensor, "B T S"] | None = None


class FrontEnd(nn.Module, abc.ABC):
    """What a code becomes: codes in, rows out; and a memory of its own, where it has one.

    Attributes:
        width: D, of its rows.
        side_width: S, of what it has for the head.
    """

    width: int
    side_width: int = 0

    @property
    def temporal_range(self) -> int:
        """Distance in codes to the farthest earlier code that can change a row."""
        return 0

    def zero_memory(self, num_lanes: int) -> Any:
        """Memory of a stream that has not begun, the lane first in every tensor; () where there is none."""
        return ()

    @abc.abstractmethod
    def forward(
        self, codes: Int[Tensor, "B T"], memory: Any, *, document_starts: Bool[Tensor, "B T"] | None = None
    ) -> FrontEndOutput:
        """Rows of any number of codes (0 too), and the next memory."""

    def step(self, codes: Int[Tensor, " B"], memory: Any) -> FrontEndOutput:
        """The row of one more code a lane [B, D], what the head gets [B, S], and the next memory."""
        rows, memory, side = self(codes[:, None], memory)
        return FrontEndOutput(rows[:, 0], memory, None if side is None else side[:, 0])


class StackOutput(NamedTuple):
    """What a stack makes of the rows of a chunk.

    Attributes:
        rows: [B, T, D'], features where the stack is part of a model.
        memory: after the chunk.
        auxiliary_losses: as those of `ModelOutput`.
    """

    rows: Float[Tensor, "B T D"]
    memory: Any
    auxiliary_losses: dict[str, Float[Tensor, ""]]


class CompiledStack(abc.ABC):
    """A stack's weights as they are now, packed for its kernel, and its step state as arrays, the lane first.

    Attributes:
        weights: a NamedTuple of numpy arrays.
        sample: the kernel, see `kernels.sample_wavenet`.
        lanes_together: how many lanes a thread steps side by side; more come one after another, block by block.
    """

    weights: Any
    sample: Callable[..., None]
    lanes_together: int

    @abc.abstractmethod
    def num_lanes(self, state: Any) -> int:
        """Of a step state."""

    @abc.abstractmethod
    def from_state(self, state: Any) -> Any:
        """Arrays of their own for a step state of the stack."""

    @abc.abstractmethod
    def to_state(self, state: Any) -> Any:
        """A step state for the stack, equal up to rounding."""


class StatefulModule(nn.Module, abc.ABC):
    """What stacks and models have in common: a memory, and parameters that somebody trains.

    Attributes:
        config: the frozen dataclass that built it; it knows `temporal_range` and `attention_cost`.
    """

    config: Any

    @property
    def window_length(self) -> int:
        """Codes (rows) a window; a chunk is a whole number of windows. 1 where there are no windows."""
        return 1

    @property
    def temporal_range(self) -> int:
        """Distance in codes to the farthest code that can change a prediction made at the start of a window."""
        return self.config.temporal_range

    @property
    def attention_cost(self) -> int:
        """Rows that one code attends to, summed over layers (0 without attention)."""
        return self.config.attention_cost

    @abc.abstractmethod
    def zero_memory(
        self, num_lanes: int, *, memory_length: int | None = None, compressed_memory_length: int | None = None
    ) -> Any:
        """Memory of a stream that has not begun, on the module's device and in its dtype.

        Lengths default to the configuration's; evaluation may pass others. Without such a memory, a length that is
        passed raises `UserError`.
        """

    def full_memory(self, num_lanes: int) -> Any:
        """Zeros that count as a memory that a long stream has filled: for measurements of speed."""
        return self.zero_memory(num_lanes)

    def recount_memory(self, memory: Any) -> Any:
        """A memory whose tensors came from outside, as from a file: what it knows of them on the host is read anew."""
        return memory

    @abc.abstractmethod
    def clone_state(self, state: Any) -> Any:
        """An independent copy of a step state."""

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimizer updates: f_c stays as it was drawn with `compression_loss: none`."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters by clipping group: "model", and "compression" for f_c where it has parameters."""
        return {"model": [parameter for _, parameter in self.trained_parameters()]}

    def shard_units(self) -> list[nn.Module]:
        """Modules whose parameters are gathered, or whose activations are recomputed, one module at a time.

        `forward` calls them as modules, and nothing outside of them reads their parameters while it runs. The rest of
        the parameters is one unit more. None: the module is one unit.
        """
        return []

    def after_update(self) -> None:
        """Bring parameters that have a range back into it; to be called after each update of the weights."""
        return


class Stack(StatefulModule):
    """Rows in, rows out, memory in and out: the part of a model that remembers. Usable without the other parts.

    Attributes:
        width: D, of the rows that come in.
        output_width: D', of the rows that go out.
    """

    width: int
    output_width: int

    @abc.abstractmethod
    def forward(
        self, rows: Float[Tensor, "B T D"], memory: Any, *, document_starts: Bool[Tensor, "B T"] | None = None
    ) -> StackOutput:
        """Outputs, next memory and auxiliary losses of a chunk.

        Args:
            document_starts: True where nothing before has any influence from there on (a document, an episode).
        """

    @abc.abstractmethod
    def begin_steps(
        self, memory: Any, rows: Float[Tensor, "B R D"], *, document_starts: Bool[Tensor, "B R"] | None = None
    ) -> Any:
        """State for `step` after R rows of an unfinished window; its `memory` is that of the last whole window."""

    @abc.abstractmethod
    def step(
        self, rows: Float[Tensor, "B D"], state: Any, *, document_starts: Bool[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B D"], Any]:
        """Output for one more row a lane, and the next state. Consumes `state`.

        Args:
            document_starts: lanes for which nothing before has any influence from this row on; None for none.
        """

    def compiled(self) -> CompiledStack:
        """This stack as it is now, in float32 on the CPU, for stepping in machine code.

        Raises:
            UserError: it offers no such thing.
        """
        raise UserError(f"compiled stepping knows no stack {type(self).__name__}; use the eager stepper")


class Head(nn.Module, abc.ABC):
    """Features in, probabilities of the next code out: always in float32 or wider, under autocast too."""

    @abc.abstractmethod
    def nll(self, features: Float[Tensor, "*batch D"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """As a model's."""

    @abc.abstractmethod
    def log_probabilities(self, features: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """As a model's."""


class BlockSampler(abc.ABC):
    """Steps of a model in machine code, draws included, with the weights as they were when it was made."""

    @abc.abstractmethod
    def begin(self, state: Any) -> Any:
        """State for `sample_block` from one for `step`, at any place of a window: tensors, the lane first."""

    @abc.abstractmethod
    def end(self, state: Any) -> Any:
        """A state for `step`, equal up to rounding."""

    @abc.abstractmethod
    def sample_block(
        self,
        codes: Int[Tensor, " B"],
        state: Any,
        uniforms: Float64[Tensor, "B N"],
        *,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        num_threads: int = 1,
        lanes_together: int | None = None,
    ) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"], Any]:
        """Sample N more codes a lane; consumes `state`.

        Args:
            codes: the last code of each lane.
            uniforms: in [0, 1), a number for each draw.
            temperature, top_k, top_p: as in `Sampler`.
            num_threads: at least 1, a share of the lanes each; the bits do not depend on it, nor on `lanes_together`.
            lanes_together: lanes that a thread steps side by side, None for the best.
        Returns:
            codes, their log-probabilities in nats at temperature 1 before top-k and top-p, and the next state.
        """


class SequenceModel(StatefulModule):
    """What trainer, evaluator and sampler know of a model."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number V of codes."""

    @abc.abstractmethod
    def forward(
        self, codes: Int[Tensor, "B T"], memory: Any, *, document_starts: Bool[Tensor, "B T"] | None = None
    ) -> ModelOutput:
        """Features, next memory and auxiliary losses of a chunk."""

    @abc.abstractmethod
    def nll(self, features: Float[Tensor, "*batch D"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Negative log-likelihood of each target in nats (float32 or wider)."""

    @abc.abstractmethod
    def log_probabilities(self, features: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Normalised log-probabilities of every code in nats (float32 or wider)."""

    @abc.abstractmethod
    def begin_steps(self, memory: Any, codes: Int[Tensor, "B R"]) -> Any:
        """State for `step` after R codes of an unfinished window (0 <= R < window_length), computed in parallel."""

    @abc.abstractmethod
    def step(self, codes: Int[Tensor, " B"], state: Any) -> tuple[Float[Tensor, "B D"], Any]:
        """Features after one more code a lane, and the next state. Consumes `state`."""

    def block_sampler(self) -> BlockSampler:
        """What samples many codes a call in machine code; float32 on the CPU only.

        Raises:
            UserError: the model offers no such thing; it says why.
        """
        raise UserError(f"compiled stepping knows no model {type(self).__name__}; use the eager stepper")

    def fit(self, codes: Integer[np.ndarray, " N"]) -> None:
        """Compute what a model without trained parameters keeps in buffers from the training split, as one stream."""
        return

    @property
    def device(self) -> torch.device:
        """Of the parameters or buffers; the CPU for a model that has none."""
        return next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0)).device

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything to train."""
        return next(self.parameters(), None) is not None

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Dropout off inside, the mode of before put back after."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)


def refuse_lengths(model_name: str, **lengths: int | None) -> None:
    """Raise `UserError` where a length of memory is passed to a model that has no such memory."""
    for name, length in lengths.items():
        if length is not None:
            raise UserError(f"{model_name}: the {name.replace('_', ' ')} cannot be set (got {length}); leave it out")


def clip_gradients(groups: Mapping[str, Sequence[nn.Parameter]], max_norm: float) -> dict[str, Float[Tensor, ""]]:
    """Scale each group's gradients, in place, to a global norm of at most `max_norm`.

    f_c's group apart from the model's: one norm over both would couple the two losses again.

    Args:
        groups: parameters by group (`model.gradient_groups()`).
        max_norm: above 0.
    Returns:
        Each group's norm before clipping, on its device; not finite where a gradient is not.
    """
    return {name: nn.utils.clip_grad_norm_(parameters, max_norm) for name, parameters in groups.items() if parameters}
