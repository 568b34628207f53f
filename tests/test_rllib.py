"""The compressive core as a module of Ray RLlib: steps equal chunks, one iteration of IMPALA."""

# pyright: reportMissingImports=false

import os

import numpy as np
import pytest
import torch

pytest.importorskip("ray", reason="an extra: python -m pip install 'ct_audio[rllib]'")

import gymnasium
from ray.rllib.core.columns import Columns

from ct_audio.agents.rllib import AUXILIARY_LOSS, CompressiveModule, impala_config
from ct_audio.models.compressive.config import StackConfig

CONFIG = StackConfig(
    num_layers=2,
    width=12,
    num_heads=2,
    feedforward_width=16,
    position_width=8,
    window_length=4,
    memory_length=4,
    compressed_memory_length=4,
    compression_rate=2,
    straddling_groups="zero",
    norm_position="pre",
)


def make_module() -> CompressiveModule:
    torch.manual_seed(0)
    (spec,) = [impala_config("CartPole-v1", CONFIG, unroll_length=8).rl_module_spec]
    return CompressiveModule(
        observation_space=gymnasium.spaces.Box(-1, 1, (3,), np.float32),
        action_space=gymnasium.spaces.Discrete(2),
        inference_only=False,
        model_config=spec.model_config,
    ).double()


def initial(module: CompressiveModule, lanes: int) -> dict[str, torch.Tensor]:
    state = {name: torch.from_numpy(np.stack([part] * lanes)) for name, part in module.get_initial_state().items()}
    return {name: part.double() if part.is_floating_point() else part.int() for name, part in state.items()}


def test_steps_are_a_chunk_wherever_the_lanes_are_in_their_windows() -> None:
    """Three lanes that have begun at different steps, then a chunk whose lanes are of different lengths."""
    module, lanes = make_module(), 3
    assert module.is_stateful()
    observations = torch.randn(lanes, 40, 3, dtype=torch.float64)
    alone = []  # each lane by itself, at once
    for lane, start in enumerate((0, 5, 6)):
        batch = {Columns.OBS: observations[lane : lane + 1, start:], Columns.STATE_IN: initial(module, 1)}
        alone.append(module._forward_train(batch)[Columns.ACTION_DIST_INPUTS][0])
    state, stepped = initial(module, lanes), [[] for _ in range(lanes)]
    for t in range(20):
        begins = [index for index, start in enumerate((0, 5, 6)) if t == start]
        for name, part in initial(module, lanes).items():
            state[name][begins] = part[begins].to(state[name].dtype)
        with torch.no_grad():
            found = module._forward({Columns.OBS: observations[:, t : t + 1], Columns.STATE_IN: state})
        state = found[Columns.STATE_OUT]
        for lane in range(lanes):
            stepped[lane].append(found[Columns.ACTION_DIST_INPUTS][lane, 0])
    for lane, start in enumerate((0, 5, 6)):
        assert torch.allclose(torch.stack(stepped[lane][start:]), alone[lane][: 20 - start], atol=1e-12, rtol=0)
    assert state["num_rows"].tolist() == [0, 3, 2]
    batch = {Columns.OBS: observations[:, 20:], Columns.STATE_IN: state, Columns.SEQ_LENS: torch.tensor([20, 20, 7])}
    found = module._forward_train(batch)
    for lane, (start, length) in enumerate(((0, 20), (5, 20), (6, 7))):
        logits = found[Columns.ACTION_DIST_INPUTS][lane, :length]
        assert torch.allclose(logits, alone[lane][20 - start : 20 - start + length], atol=1e-12, rtol=0)
    assert found[AUXILIARY_LOSS] > 0
    values = module.compute_values(batch, found[Columns.EMBEDDINGS])
    assert torch.equal(values, module.compute_values(batch))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # ray's own
def test_one_iteration_of_impala() -> None:
    import ray

    config = impala_config("CartPole-v1", CONFIG, unroll_length=8)
    config = config.env_runners(num_env_runners=1, num_envs_per_env_runner=2).reporting(min_time_s_per_iteration=3)
    config = config.training(train_batch_size_per_learner=64, grad_clip=0.5, grad_clip_by="global_norm")
    config = config.learners(num_learners=0, num_aggregator_actors_per_learner=0)  # in this process
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), os.getcwd()]))
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    try:
        algorithm = config.build_algo()
        module = algorithm.learner_group._learner.module["default_policy"].unwrapped()
        before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
        for _ in range(60):  # acting is asynchronous: at first the learner has nothing to learn from
            algorithm.train()
            after = {name: weight.detach().clone() for name, weight in module.named_parameters()}
            if not torch.equal(before["policy.weight"], after["policy.weight"]):
                break
        assert [name for name, old in before.items() if torch.equal(old, after[name])] == []
        assert all(bool(weight.isfinite().all()) for weight in after.values())
        algorithm.stop()
    finally:
        ray.shutdown()
