"""What an agent may remember with: the compressive stack, and stacks to compare it with.

Shape letters: B environments, T rows of a chunk, R rows before steps, L layers, D width.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ct_audio.agents.config import CompressiveConfig, LstmConfig, NoMemoryConfig
from ct_audio.models.compressive.stack import CompressiveStack
from ct_audio.models.interface import Stack, StackOutput, refuse_lengths
from ct_audio.models.layers import FeedForward
from ct_audio.models.state import map_memory


class LstmMemory(NamedTuple):
    """Hidden state and cell of each layer."""

    hidden: Float[Tensor, "B L D"]
    cell: Float[Tensor, "B L D"]


class LstmState(NamedTuple):
    """State between two calls of `step`."""

    memory: LstmMemory


class LstmStack(Stack):
    """Long short-term memory, layer above layer; a lane that begins anew begins with zeros."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        self.config = config
        self.width = self.output_width = config.width
        self.cells = nn.ModuleList(nn.LSTMCell(config.width, config.width) for _ in range(config.num_layers))

    def zero_memory(
        self, num_lanes: int, *, memory_length: int | None = None, compressed_memory_length: int | None = None
    ) -> LstmMemory:
        refuse_lengths("lstm", memory_length=memory_length, compressed_memory_length=compressed_memory_length)
        zeros = next(self.parameters()).new_zeros(num_lanes, len(self.cells), self.width)
        return LstmMemory(zeros, zeros.clone())

    def forward(
        self, rows: Float[Tensor, "B T D"], memory: LstmMemory, *, document_starts: Bool[Tensor, "B T"] | None = None
    ) -> StackOutput:
        outputs = []
        for t in range(rows.shape[1]):
            starts = None if document_starts is None else document_starts[:, t]
            output, memory = self._step(rows[:, t], memory, starts)
            outputs.append(output)
        return StackOutput(torch.stack(outputs, dim=1), memory, {})

    def begin_steps(
        self, memory: LstmMemory, rows: Float[Tensor, "B R D"], *, document_starts: Bool[Tensor, "B R"] | None = None
    ) -> LstmState:
        return LstmState(self(rows, memory, document_starts=document_starts).memory if rows.shape[1] else memory)

    def step(
        self, rows: Float[Tensor, "B D"], state: LstmState, *, document_starts: Bool[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B D"], LstmState]:
        output, memory = self._step(rows, state.memory, document_starts)
        return output, LstmState(memory)

    def clone_state(self, state: LstmState) -> LstmState:
        return map_memory(torch.clone, state)

    def _step(self, rows: Tensor, memory: LstmMemory, starts: Tensor | None) -> tuple[Tensor, LstmMemory]:
        hidden, cell = memory
        if starts is not None:
            keeps = ~starts[:, None, None]
            hidden, cell = hidden * keeps, cell * keeps
        found = []
        for index, layer in enumerate(self.cells):
            found.append(layer(rows, (hidden[:, index], cell[:, index])))
            rows = found[-1][0]
        hidden, cell = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
        return rows, LstmMemory(hidden, cell)


class NoMemoryState(NamedTuple):
    """State between two calls of `step`: nothing."""

    memory: tuple[()] = ()


class NoMemory(Stack):
    """Every row for itself, through a feed-forward block."""

    def __init__(self, config: NoMemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.width = self.output_width = config.width
        self.block = FeedForward(config.width, config.feedforward_width, dropout=0.0, output_gain=1.0)

    def zero_memory(
        self, num_lanes: int, *, memory_length: int | None = None, compressed_memory_length: int | None = None
    ) -> tuple[()]:
        refuse_lengths("none", memory_length=memory_length, compressed_memory_length=compressed_memory_length)
        return ()

    def forward(self, rows: Tensor, memory: tuple[()], *, document_starts: Tensor | None = None) -> StackOutput:
        return StackOutput(rows + self.block(rows), (), {})

    def begin_steps(self, memory: tuple[()], rows: Tensor, *, document_starts: Tensor | None = None) -> NoMemoryState:
        return NoMemoryState()

    def step(
        self, rows: Tensor, state: NoMemoryState, *, document_starts: Tensor | None = None
    ) -> tuple[Tensor, NoMemoryState]:
        return rows + self.block(rows), state

    def clone_state(self, state: NoMemoryState) -> NoMemoryState:
        return state


def build_memory(config: Any) -> Stack:
    """The stack of an agent's `model` section, with fresh parameters from torch's global generator."""
    stacks: dict[type, Any] = {CompressiveConfig: CompressiveStack, LstmConfig: LstmStack, NoMemoryConfig: NoMemory}
    return stacks[type(config)](config)
