"""IMPALA of Ray RLlib with a compressive core as its module, for actors on several machines; the only importer of ray.

    config = impala_config("CartPole-v1", StackConfig(...)).env_runners(num_env_runners=8)
    algorithm = config.build_algo()
    algorithm.train()

Shape letters: B lanes, T steps of a chunk, F features of an observation, R rows of an unfinished window, D width.
"""

# pyright: reportMissingImports=false

import dataclasses
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.impala.torch.impala_torch_learner import IMPALATorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from ct_audio.models.compressive.config import StackConfig
from ct_audio.models.compressive.core import CompressiveCore, CoreMemory
from ct_audio.models.compressive.stack import gradient_groups
from ct_audio.models.state import memory_from_tensors, named_tensors

AUXILIARY_LOSS = "auxiliary_loss"
"""What trains f_c, in what `forward_train` returns."""


class CompressiveModule(TorchRLModule, ValueFunctionAPI):
    """A compressive core, a policy and a value, of observations that are vectors.

    `model_config` holds the fields of a `StackConfig` and RLlib's `max_seq_len`, see `impala_config`. The state of a
    lane is the memory of the stack, the rows of its unfinished window (zeros behind them) and their number; an episode
    begins with the state of `get_initial_state`. The lanes of a batch may be at different places in their windows:
    those that are at the same one are computed together.
    """

    def setup(self) -> None:
        """Build the parts; called by RLlib."""
        fields = {field.name for field in dataclasses.fields(StackConfig)}
        config = StackConfig(**{key: value for key, value in self.model_config.items() if key in fields})
        self.core = CompressiveCore(self.observation_space.shape[0], config)
        self.policy = nn.Linear(config.width, int(self.action_space.n))
        self.value = nn.Linear(config.width, 1)

    def get_initial_state(self) -> dict[str, np.ndarray]:
        """The state of one lane where an episode begins."""
        memory = self.core.zero_memory(1)
        stack = {name: tensor[0].cpu().numpy() for name, tensor in named_tensors(memory.stack)}
        rows = np.zeros((self.core.stack.window_length - 1, self.core.stack.width), np.float32)
        return {"rows": rows, "num_rows": np.zeros((), np.int64), **stack}

    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Float[Tensor, "B T"]:
        """Values of all steps of a batch; `embeddings` are what `forward_train` returned."""
        features = self._features(batch)[0] if embeddings is None else embeddings
        return self.value(features)[..., 0]

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        features, state = self._features(batch)[:2]
        return {Columns.ACTION_DIST_INPUTS: self.policy(features), Columns.STATE_OUT: state}

    def _forward_train(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        features, _, loss = self._features(batch)
        logits = self.policy(features)
        return {Columns.ACTION_DIST_INPUTS: logits, Columns.EMBEDDINGS: features, AUXILIARY_LOSS: loss}

    def _features(self, batch: dict[str, Any]) -> tuple[Float[Tensor, "B T D"], dict[str, Tensor], Float[Tensor, ""]]:
        """Outputs of the core (0 behind the end of a lane), the next state, and the loss of f_c as a mean."""
        observations = batch[Columns.OBS]
        lanes, num_steps = observations.shape[:2]
        types = {name: part.dtype for name, part in named_tensors(self.core.zero_memory(1).stack)}  # RLlib has int32
        state = {name: part.to(types.get(name, part.dtype)) for name, part in batch[Columns.STATE_IN].items()}
        lengths = batch.get(Columns.SEQ_LENS, torch.full((lanes,), num_steps)).tolist()
        places = [*zip(state["num_rows"].tolist(), lengths, strict=True)]
        features = observations.new_zeros(lanes, num_steps, self.core.stack.width)
        after, loss = {name: part.clone() for name, part in state.items()}, features.new_zeros(())
        for place in sorted(set(places)):
            num_rows, length = place
            at = torch.tensor([index for index, other in enumerate(places) if other == place], device=features.device)
            start = self.core.zero_memory(len(at))
            tensors = {name: state[name][at] for name, _ in named_tensors(start.stack)}
            stack, rows = memory_from_tensors(start.stack, tensors), state["rows"][at, :num_rows]
            memory = CoreMemory(stack, rows, torch.zeros_like(rows[..., 0], dtype=torch.bool), start.auxiliary_loss)
            output, memory = self.core(observations[at, :length], memory)
            features[at, :length] = output
            loss = loss + memory.auxiliary_loss * (len(at) * length / sum(lengths))
            for name, part in named_tensors(memory.stack):
                after[name][at] = part.detach()
            left = memory.rows.shape[1]
            after["rows"][at] = nn.functional.pad(memory.rows.detach(), (0, 0, 0, after["rows"].shape[1] - left))
            after["num_rows"][at] = left
        return features, after, loss


class CompressiveLearner(IMPALATorchLearner):
    """RLlib's learner, with the loss of f_c, which has an optimizer of its own: its gradients are clipped apart."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Adam for each group of parameters that has any."""
        for name, parameters in gradient_groups(self.module[module_id].unwrapped()).items():
            if parameters:
                self.register_optimizer(
                    module_id=module_id,
                    optimizer_name=name,
                    optimizer=torch.optim.Adam(parameters),
                    params=parameters,
                    lr_or_lr_schedule=config.lr,
                )

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: dict, fwd_out: dict) -> Tensor:
        """V-trace's loss and that of f_c."""
        found = super().compute_loss_for_module(module_id=module_id, config=config, batch=batch, fwd_out=fwd_out)
        self.metrics.log_value((module_id, AUXILIARY_LOSS), fwd_out[AUXILIARY_LOSS].detach(), window=1)
        return found + fwd_out[AUXILIARY_LOSS]

    def after_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """Also what a stack does after an update."""
        super().after_gradient_based_update(timesteps=timesteps)
        for _, module in self.module.items():
            module.unwrapped().core.stack.after_update()


def impala_config(environment: Any, config: StackConfig, *, unroll_length: int = 16) -> IMPALAConfig:
    """RLlib's configuration of IMPALA with a compressive stack; the rest is set by RLlib's own methods.

    Args:
        environment: what RLlib's `environment` takes: an id of gymnasium, a registered name or a class; observations
            are vectors and actions discrete.
        config: of the stack.
        unroll_length: steps of an unroll, and of a chunk in training.
    """
    spec = RLModuleSpec(
        module_class=CompressiveModule, model_config={**dataclasses.asdict(config), "max_seq_len": unroll_length}
    )
    return (
        IMPALAConfig()
        .environment(environment)
        .env_runners(rollout_fragment_length=unroll_length)
        .rl_module(rl_module_spec=spec)
        .learners(learner_class=CompressiveLearner)
    )
