"""A model put together from its parts: front end, stack, head.

Shape letters: B lanes, T codes of a chunk, R codes of an unfinished window, D features, V codes of the vocabulary.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ct_audio.models.interface import BlockSampler, FrontEnd, Head, ModelOutput, SequenceModel, Stack
from ct_audio.models.state import map_memory


class ModelMemory(NamedTuple):
    """The memories of the parts."""

    front_end: Any
    stack: Any


class ModelState(NamedTuple):
    """State between two calls of `step`: the front end's memory and the stack's step state."""

    front_end: Any
    stack: Any

    @property
    def memory(self) -> ModelMemory:
        """The memory as of the last whole window of the stack."""
        return ModelMemory(self.front_end, self.stack.memory)


class ComposedModel(SequenceModel):
    """Front end, stack and head as one `SequenceModel`.

    Args:
        config: the frozen dataclass that the parts were built from; it has `vocab_size`.
    """

    def __init__(self, config: Any, front_end: FrontEnd, stack: Stack, head: Head) -> None:
        super().__init__()
        assert front_end.width == stack.width, f"rows of {front_end.width} do not fit a stack of {stack.width}"
        self.config = config
        self.front_end = front_end
        self.stack = stack
        self.head = head

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def window_length(self) -> int:
        return self.stack.window_length

    @property
    def temporal_range(self) -> int:
        return self.front_end.temporal_range + self.stack.temporal_range

    def zero_memory(
        self, num_lanes: int, *, memory_length: int | None = None, compressed_memory_length: int | None = None
    ) -> ModelMemory:
        lengths = {"memory_length": memory_length, "compressed_memory_length": compressed_memory_length}
        return ModelMemory(self.front_end.zero_memory(num_lanes), self.stack.zero_memory(num_lanes, **lengths))

    def full_memory(self, num_lanes: int) -> ModelMemory:
        return ModelMemory(self.front_end.zero_memory(num_lanes), self.stack.full_memory(num_lanes))

    def recount_memory(self, memory: ModelMemory) -> ModelMemory:
        return memory._replace(stack=self.stack.recount_memory(memory.stack))

    def forward(
        self, codes: Int[Tensor, "B T"], memory: ModelMemory, *, document_starts: Bool[Tensor, "B T"] | None = None
    ) -> ModelOutput:
        rows, front_end, side = self.front_end(codes, memory.front_end, document_starts=document_starts)
        features, stack, auxiliary_losses = self.stack(rows, memory.stack, document_starts=document_starts)
        return ModelOutput(_beside(features, side), ModelMemory(front_end, stack), auxiliary_losses)

    def nll(self, features: Float[Tensor, "*batch D"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return self.head.nll(features, targets)

    def log_probabilities(self, features: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        return self.head.log_probabilities(features)

    def begin_steps(self, memory: ModelMemory, codes: Int[Tensor, "B R"]) -> ModelState:
        output = self.front_end(codes, memory.front_end)
        return ModelState(output.memory, self.stack.begin_steps(memory.stack, output.rows))

    def step(self, codes: Int[Tensor, " B"], state: ModelState) -> tuple[Float[Tensor, "B D"], ModelState]:
        rows, front_end, side = self.front_end.step(codes, state.front_end)
        features, stack = self.stack.step(rows, state.stack)
        return _beside(features, side), ModelState(front_end, stack)

    def clone_state(self, state: ModelState) -> ModelState:
        return ModelState(map_memory(torch.clone, state.front_end), self.stack.clone_state(state.stack))

    def block_sampler(self) -> BlockSampler:
        from ct_audio.models.compiled import CompiledModel  # imports numba

        return CompiledModel(self.front_end, self.stack, self.head, ModelState)

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = {name: part for name, part in self.stack.gradient_groups().items() if name != "model"}
        apart = {id(parameter) for part in groups.values() for parameter in part}
        rest = [parameter for _, parameter in self.trained_parameters() if id(parameter) not in apart]
        return {"model": rest, **groups}

    def shard_units(self) -> list[nn.Module]:
        return self.stack.shard_units()

    def after_update(self) -> None:
        self.stack.after_update()


def _beside(features: Tensor, side: Tensor | None) -> Tensor:
    """Features with what the front end has for the head at their end, in the wider of both types."""
    return features if side is None else torch.cat([features, side], dim=-1)
