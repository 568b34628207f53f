"""The compressive stack with the calling convention of `nn.LSTM`: `output, memory = core(inputs, memory)`.

Shape letters: B lanes, T inputs of a call, I width of an input, R rows of an unfinished window, D width.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ct_audio.common.errors import UserError
from ct_audio.models.compressive.config import StackConfig
from ct_audio.models.compressive.memory import Memory
from ct_audio.models.compressive.stack import CompressiveStack


class CoreMemory(NamedTuple):
    """What a `CompressiveCore` carries from call to call; `state.detach_memory` cuts it from the graph.

    Attributes:
        stack: memory of the stack as of the last whole window.
        rows: of the unfinished window.
        starts: where in it a lane began anew.
        auxiliary_loss: what trains f_c, of the windows that the call has completed; to be added to the loss. As a mean
            over the inputs of the call, so that the mean over calls of T inputs each is that of one call with all.
    """

    stack: Memory
    rows: Float[Tensor, "B R D"]
    starts: Bool[Tensor, "B R"]
    auxiliary_loss: Float[Tensor, ""]


class CompressiveCore(nn.Module):
    """A linear map and a `CompressiveStack`, in the place of `nn.LSTM(input_size, config.width, batch_first=True)`.

    A call may have any number of inputs: how a stream is cut into calls changes nothing in its outputs. The rows of an
    unfinished window are computed again by the next call, so calls of few inputs cost up to a window each; for one
    input at a time without gradients `CompressiveStack.step` is faster.

    Args:
        input_size: I.
        config: of the stack; `config.width` takes the place of `hidden_size`.
    """

    def __init__(self, input_size: int, config: StackConfig) -> None:
        super().__init__()
        if input_size < 1:
            raise UserError(f"input_size: expected at least 1, got {input_size}")
        self.input = nn.Linear(input_size, config.width)
        self.stack = CompressiveStack(config)

    def zero_memory(self, num_lanes: int) -> CoreMemory:
        """Memory of streams that have not begun, as None stands for in `forward`."""
        rows = self.input.weight.new_zeros(num_lanes, 0, self.stack.width)
        starts = torch.zeros(num_lanes, 0, dtype=torch.bool, device=rows.device)
        return CoreMemory(self.stack.zero_memory(num_lanes), rows, starts, rows.new_zeros(()))

    def forward(
        self,
        inputs: Float[Tensor, "B T I"],
        memory: CoreMemory | None = None,
        *,
        document_starts: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], CoreMemory]:
        """Outputs and the next memory.

        Args:
            memory: of the call before; None where the streams begin.
            document_starts: where nothing before has any influence from there on (an episode); None for nowhere.
        Raises:
            UserError: there are no inputs, or the memory is of another number of lanes.
        """
        lanes, num_inputs = inputs.shape[:2]
        if num_inputs == 0:
            raise UserError("CompressiveCore: expected at least one input, got none")
        memory = self.zero_memory(lanes) if memory is None else memory
        if len(memory.rows) != lanes:
            raise UserError(
                f"CompressiveCore: inputs of {lanes} lanes with a memory of {len(memory.rows)}; pass the memory of the "
                "call before, or None where streams begin"
            )
        rows = torch.cat([memory.rows, self.input(inputs)], dim=1)
        new_starts = memory.starts.new_zeros(lanes, num_inputs) if document_starts is None else document_starts
        starts = torch.cat([memory.starts, new_starts], dim=1)
        whole = rows.shape[1] - rows.shape[1] % self.stack.window_length
        outputs, stack_memory, loss = [], memory.stack, rows.new_zeros(())
        for part in (slice(0, whole), slice(whole, rows.shape[1])):
            if part.start == part.stop:
                continue
            begins = starts[:, part] if bool(starts[:, part].any()) else None
            output = self.stack(rows[:, part], stack_memory, document_starts=begins)
            outputs.append(output.rows)
            if part.start == 0 and whole:
                stack_memory = output.memory
                loss = loss + sum(output.auxiliary_losses.values()) * (whole / num_inputs)
        found = torch.cat(outputs, dim=1)[:, memory.rows.shape[1] :]
        return found, CoreMemory(stack_memory, rows[:, whole:], starts[:, whole:], loss)
