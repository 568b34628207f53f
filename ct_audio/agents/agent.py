"""The agent: an encoder, a stack that remembers, a policy and a value.

Shape letters: B environments, T steps, F features of an observation, A actions, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ct_audio.agents.memories import build_memory
from ct_audio.models.compressive.stack import gradient_groups
from ct_audio.models.interface import Stack, StatefulModule


class Agent(StatefulModule):
    """What acts and learns.

    A row is made of the observation, of the last action (none after the start of an episode and where the action was
    forced: it would be a place to write notes) and of the last reward.

    Args:
        model: the `model` section of an `AgentConfig`.
        num_features, num_actions: F and A, of the environment.
    """

    def __init__(self, model: Any, *, num_features: int, num_actions: int) -> None:
        super().__init__()
        self.config = model
        self.num_actions = num_actions
        self.stack: Stack = build_memory(model)
        self.encoder = nn.Linear(num_features + num_actions + 1, self.stack.width)
        self.policy = nn.Linear(self.stack.output_width, num_actions)
        self.value = nn.Linear(self.stack.output_width, 1)
        nn.init.normal_(self.policy.weight, std=0.01)  # at first all actions are equally probable
        for head in (self.policy, self.value):
            nn.init.zeros_(head.bias)

    def rows(
        self,
        observations: Float[Tensor, "*batch F"],
        last_actions: Int[Tensor, "*batch"],
        last_rewards: Float[Tensor, "*batch"],
    ) -> Float[Tensor, "*batch D"]:
        """What the stack gets.

        Args:
            last_actions: A stands for none.
        """
        actions = F.one_hot(last_actions, self.num_actions + 1)[..., : self.num_actions]
        return self.encoder(torch.cat([observations, actions.to(observations.dtype), last_rewards[..., None]], dim=-1))

    def act(
        self,
        observations: Float[Tensor, "B F"],
        last_actions: Int[Tensor, " B"],
        last_rewards: Float[Tensor, " B"],
        state: Any,
        *,
        starts: Bool[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B A"], Float[Tensor, " B"], Any]:
        """Log-probabilities of the actions, value, and the next state of the stack, which is consumed."""
        rows = self.rows(observations, last_actions, last_rewards)
        features, state = self.stack.step(rows, state, document_starts=starts)
        return *self.heads(features), state

    def heads(self, features: Float[Tensor, "*batch D"]) -> tuple[Float[Tensor, "*batch A"], Float[Tensor, "*batch"]]:
        """Log-probabilities of the actions, and value."""
        return torch.log_softmax(self.policy(features), dim=-1), self.value(features)[..., 0]

    def begin_steps(self, memory: Any, num_lanes: int) -> Any:
        """State of the stack for `act`, with the weights as they are now."""
        return self.stack.begin_steps(memory, self.policy.weight.new_zeros(num_lanes, 0, self.stack.width))

    def zero_memory(
        self, num_lanes: int, *, memory_length: int | None = None, compressed_memory_length: int | None = None
    ) -> Any:
        lengths = {"memory_length": memory_length, "compressed_memory_length": compressed_memory_length}
        return self.stack.zero_memory(num_lanes, **lengths)

    def clone_state(self, state: Any) -> Any:
        return self.stack.clone_state(state)

    def after_update(self) -> None:
        self.stack.after_update()

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters by clipping group: f_c apart."""
        return gradient_groups(self)
