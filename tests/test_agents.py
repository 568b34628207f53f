"""Parts of the agent: the task against a slow copy of its rules, V-trace against its definition, what actors see and
what learners make of it."""

import dataclasses
import importlib.util
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import assert_close, assert_same_memory
from torch import Tensor, nn

from ct_audio.agents.actors import Actor, weights_of
from ct_audio.agents.config import (
    ActorsConfig,
    AgentConfig,
    CompressiveConfig,
    GymnasiumConfig,
    LearnerConfig,
    LstmConfig,
    NoMemoryConfig,
    ObjectMatchingConfig,
)
from ct_audio.agents.environments import Environments
from ct_audio.agents.loop import learner_losses
from ct_audio.agents.memories import LstmMemory, LstmStack, build_memory
from ct_audio.agents.object_matching import (
    CORRIDOR,
    FORWARD,
    LEFT,
    RIGHT,
    ROOM_1,
    ROOM_2,
    ObjectMatching,
)
from ct_audio.agents.vtrace import vtrace
from ct_audio.common.errors import UserError

COMPRESSIVE = CompressiveConfig(
    num_layers=1,
    width=16,
    num_heads=2,
    feedforward_width=24,
    position_width=8,
    window_length=4,
    memory_length=4,
    compressed_memory_length=4,
    compression_rate=2,
    straddling_groups="zero",
    norm_position="pre",
)
MEMORIES = {
    "compressive": COMPRESSIVE,
    "most_used": dataclasses.replace(COMPRESSIVE, compression_function="most_used"),
    "transformer_xl": dataclasses.replace(COMPRESSIVE, memory_length=8, compressed_memory_length=0),
    "lstm": LstmConfig(num_layers=2, width=16),
    "none": NoMemoryConfig(width=16, feedforward_width=24),
}
every_memory = pytest.mark.parametrize("memory", MEMORIES)
TASK = ObjectMatchingConfig(num_environments=24, delay=3, cue_length=2, num_distractors=2)


def make_config(memory: str = "compressive", **sections: Any) -> AgentConfig:
    parts: dict[str, Any] = {"environment": TASK, "actors": ActorsConfig(unroll_length=8)}
    return AgentConfig(name="test", model=MEMORIES[memory], **(parts | sections))


class SlowTask:
    """One environment as a list of rules; what is random it is told."""

    def __init__(self, config: ObjectMatchingConfig) -> None:
        self.config, self.limit = config, config.time_limit or 10 * config.cue_length + config.delay + 20

    def begin(self) -> None:
        self.place, self.steps = [ROOM_1, self.config.cue_length], 0

    def step(self, action: int, cue: int, pair: tuple[int, int]) -> tuple[float, bool, bool, int]:
        """Reward, whether the episode has ended, whether the action was forced, success."""
        self.steps += 1
        room, left = self.place
        forced, reward, success = room == CORRIDOR, 0.0, 0
        if room == ROOM_1 and action == FORWARD:
            left -= 1
            if left == 0:
                reward = self.config.touch_reward
                room, left = CORRIDOR, self.config.delay + 1
        if room == CORRIDOR:
            left -= 1
            if left == 0:
                room = ROOM_2
        elif room == ROOM_2 and action in (LEFT, RIGHT):
            success = 1 if pair[action - 1] != cue else -1
            reward = float(success)
        self.place = [room, left]
        ended = success != 0 or self.steps == self.limit
        return reward * self.config.reward_scale, ended, forced, success


@pytest.mark.parametrize("delay", [0, 1, 3])
@pytest.mark.parametrize("time_limit", [0, 12])
def test_object_matching_follows_its_rules(delay: int, time_limit: int) -> None:
    config = dataclasses.replace(TASK, delay=delay, time_limit=time_limit, reward_scale=2.0)
    env, random = ObjectMatching(config, seed=3), np.random.default_rng(0)
    tasks = [SlowTask(config) for _ in range(env.num_envs)]
    observations, _ = env.reset()
    for task in tasks:
        task.begin()
    ended_before, outcomes = [True] * env.num_envs, []
    for _ in range(400):
        seen = [(task.place[0], task.place[1], int(env.cue[i]), tuple(env.pair[i])) for i, task in enumerate(tasks)]
        for i, (room, left, cue, pair) in enumerate(seen):
            check_observation(config, observations[i], room, left, cue, pair, env.distractors[i])
            assert not ended_before[i] or (room, left) == (ROOM_1, config.cue_length)
            assert room != ROOM_2 or (cue in pair and pair[0] != pair[1])
        actions = random.integers(3, size=env.num_envs)
        observations, rewards, terminated, truncated, info = env.step(actions)
        for i, task in enumerate(tasks):
            reward, ended, forced, success = task.step(int(actions[i]), seen[i][2], seen[i][3])
            got = (rewards[i], terminated[i] | truncated[i], info["forced"][i], info["success"][i])
            assert got == (reward, ended, forced, success)
            assert terminated[i] == (success != 0)
            if ended:
                check_room(info["final_obs"][i], task.place[0])
                assert info["_final_obs"][i]
                task.begin()
                outcomes.append(success)
            ended_before[i] = ended
    assert {1, -1} <= set(outcomes)
    assert (0 in outcomes) == bool(time_limit)


def check_room(observation: np.ndarray, room: int) -> None:
    assert observation[:3].tolist() == [float(room == i) for i in range(3)]


def check_observation(
    config: ObjectMatchingConfig,
    observation: np.ndarray,
    room: int,
    left: int,
    cue: int,
    pair: tuple[int, int],
    distractors: np.ndarray,
) -> None:
    check_room(observation, room)
    assert observation[3] == np.float32(left / config.cue_length if room == ROOM_1 else 0)
    slots = observation[4:].reshape(-1, config.num_objects)
    shown = [cue if room == ROOM_1 else None, *(pair if room == ROOM_2 else (None, None)), *distractors]
    for slot, kind in zip(slots, shown, strict=True):
        assert slot.tolist() == [float(kind is not None and i == kind) for i in range(config.num_objects)]


def test_places_and_cues_are_fair_and_chance_is_one_half() -> None:
    env, random = ObjectMatching(ObjectMatchingConfig(num_environments=512, delay=1, cue_length=1)), None
    random = np.random.default_rng(1)
    env.reset(seed=5)
    successes, matches_left, cues = [], [], []
    for _ in range(120):
        second = env.room == ROOM_2
        matches_left += list(env.pair[second, 0] == env.cue[second])
        cues += list(env.cue[second])
        successes += list(env.step(random.integers(3, size=512))[4]["success"])
    won = np.array([s for s in successes if s])
    for share, expected, count in (
        ((won > 0).mean(), 0.5, len(won)),
        (np.mean(matches_left), 0.5, len(matches_left)),
        *((np.mean(np.array(cues) == kind), 0.25, len(cues)) for kind in range(4)),
    ):
        assert abs(share - expected) < 4 * math.sqrt(0.25 / count)


def test_environments_saved_in_the_middle_go_on_the_same() -> None:
    env, other, random = ObjectMatching(TASK, seed=1), ObjectMatching(TASK, seed=9), np.random.default_rng(0)
    env.reset()
    for _ in range(7):
        env.step(random.integers(3, size=env.num_envs))
    other.load_state(env.state())
    for _ in range(60):
        actions = random.integers(3, size=env.num_envs)
        for one, two in zip(env.step(actions)[:4], other.step(actions)[:4], strict=True):
            assert np.array_equal(one, two)


def test_spaces_text_and_pictures() -> None:
    from gymnasium.utils.env_checker import data_equivalence

    env = ObjectMatching(dataclasses.replace(TASK, num_environments=2), render_mode="ansi")
    observations, info = env.reset(seed=4)
    assert data_equivalence(env.reset(seed=4)[0], observations)
    assert info == {}
    assert env.observation_space.contains(observations)
    assert env.action_space.contains(np.array([0, 2]))
    shown = []
    for action in (FORWARD, FORWARD, LEFT, RIGHT, FORWARD, FORWARD):
        frames = env.render()
        assert frames is not None
        shown.append(frames[0].split(", distractor")[0])
        assert env.image(0).shape == (48, 80, 3)
        env.step(np.array([action, action]))
    letter = "ABCD"[env.cue[0]]
    assert shown[:2] == [f"room 1    object {letter}, pad {n} steps ahead" for n in (2, 1)]
    assert shown[2:5] == [f"corridor  {n} steps to go" for n in (3, 2, 1)]
    assert shown[5].startswith("room 2    left ")
    env.render_mode = "rgb_array"
    images = env.render()
    assert images is not None
    assert images[0].dtype == np.uint8
    with pytest.raises(UserError, match="render_mode: expected ansi, rgb_array or None, got 'human'"):
        ObjectMatching(TASK, render_mode="human")
    assert len(Environments(TASK, seed=0).action_names) == 3


def test_over_300000_steps_a_core_second() -> None:
    """CPU time of one thread, 128 environments; measured about 2,000,000 (2.5 GHz, AVX-512)."""
    env, random = ObjectMatching(ObjectMatchingConfig()), np.random.default_rng(0)
    env.reset()
    actions = random.integers(3, size=(500, env.num_envs))
    began = time.process_time()
    for row in actions:
        env.step(row)
    assert actions.size / (time.process_time() - began) > 300_000


def vtrace_by_definition(
    mu: Tensor, pi: Tensor, rewards: Tensor, discounts: Tensor, values: Tensor, bootstrap: Tensor, rho: float, c: float
) -> tuple[list[list[float]], list[list[float]]]:
    """v_s = V_s + sum over t of (product of discount_i c_i, s <= i < t) rho_t (r_t + discount_t V_{t+1} - V_t)."""
    targets, advantages = [], []
    for b in range(len(rewards)):
        length = rewards.shape[1]
        value = [*values[b].tolist(), bootstrap[b].item()]
        ratio = [math.exp(pi[b, t].item() - mu[b, t].item()) for t in range(length)]
        row = []
        for s in range(length):
            total, product = value[s], 1.0
            for t in range(s, length):
                difference = rewards[b, t].item() + discounts[b, t].item() * value[t + 1] - value[t]
                total += product * min(rho, ratio[t]) * difference
                product *= discounts[b, t].item() * min(c, ratio[t])
            row.append(total)
        after = [*row[1:], value[-1]]
        advantages.append(
            [
                min(rho, ratio[s]) * (rewards[b, s].item() + discounts[b, s].item() * after[s] - value[s])
                for s in range(length)
            ]
        )
        targets.append(row)
    return targets, advantages


def random_unroll(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    mu, pi, rewards, values = torch.randn(4, 5, 19, generator=generator, dtype=torch.float64)
    ended = torch.rand(5, 19, generator=generator) < 0.15
    return {
        "behaviour_log_probabilities": -mu.abs(),
        "log_probabilities": -pi.abs(),
        "rewards": rewards,
        "discounts": 0.97 * (~ended).double(),
        "values": values,
        "bootstrap": torch.randn(5, generator=generator, dtype=torch.float64),
    }


@pytest.mark.parametrize(("rho", "c"), [(1.0, 1.0), (2.0, 0.7)])
def test_vtrace_is_its_definition(rho: float, c: float) -> None:
    unroll = random_unroll(0)
    found = vtrace(**unroll, importance_clip=rho, trace_clip=c)
    targets, advantages = vtrace_by_definition(*unroll.values(), rho=rho, c=c)
    assert_close(found.targets, torch.tensor(targets, dtype=torch.float64))
    assert_close(found.advantages, torch.tensor(advantages, dtype=torch.float64))


def test_vtrace_of_ones_own_policy_is_the_return() -> None:
    unroll = random_unroll(1)
    unroll["behaviour_log_probabilities"] = unroll["log_probabilities"]
    expected, running = [], unroll["bootstrap"]
    for t in reversed(range(19)):
        running = unroll["rewards"][:, t] + unroll["discounts"][:, t] * running
        expected.insert(0, running)
    assert_close(vtrace(**unroll).targets, torch.stack(expected, dim=1))


@pytest.mark.skipif(importlib.util.find_spec("torchrl") is None, reason="torchrl is not installed")
def test_vtrace_is_torchrls() -> None:
    from torchrl.objectives.value.functional import vtrace_advantage_estimate  # type: ignore[import-not-found]

    unroll = random_unroll(2)
    next_values = torch.cat([unroll["values"][:, 1:], unroll["bootstrap"][:, None]], dim=1)
    rows = [
        part[..., None]
        for part in (
            unroll["log_probabilities"],
            unroll["behaviour_log_probabilities"],
            unroll["values"],
            next_values,
            unroll["rewards"],
            unroll["discounts"] == 0,
        )
    ]
    advantages, targets = vtrace_advantage_estimate(0.97, *rows)
    found = vtrace(**unroll)
    assert_close(found.targets, targets[..., 0])
    assert_close(found.advantages, advantages[..., 0])


@every_memory
def test_every_memory_steps_as_it_runs_and_forgets_at_resets(memory: str) -> None:
    torch.manual_seed(0)
    stack = build_memory(MEMORIES[memory]).double()
    rows, starts = torch.randn(3, 24, 16, dtype=torch.float64), torch.rand(3, 24) < 0.15
    starts[0, 13] = True
    with torch.no_grad():
        whole = stack(rows, stack.zero_memory(3), document_starts=starts)
        state, stepped = stack.begin_steps(stack.zero_memory(3), rows[:, :0]), []
        for t in range(24):
            row, state = stack.step(rows[:, t], state, document_starts=starts[:, t])
            stepped.append(row)
        others = rows.clone()
        others[0, :13] += 1
        changed = stack(others, stack.zero_memory(3), document_starts=starts)
    assert_close(torch.stack(stepped, dim=1), whole.rows)
    assert_same_memory(state.memory, whole.memory)
    assert torch.equal(changed.rows[0, 13:], whole.rows[0, 13:])
    assert_same_memory(changed.memory, whole.memory, tolerance=0)


def test_the_lstm_is_torchs() -> None:
    torch.manual_seed(0)
    stack, reference = LstmStack(LstmConfig(num_layers=2, width=8)), nn.LSTM(8, 8, num_layers=2, batch_first=True)
    for index, cell in enumerate(stack.cells):
        cell.load_state_dict({name: getattr(reference, f"{name}_l{index}") for name in cell.state_dict()})
    rows, memory = torch.randn(3, 7, 8), LstmMemory(torch.randn(3, 2, 8), torch.randn(3, 2, 8))
    found = stack(rows, memory)
    expected, (hidden, cell) = reference(rows, tuple(part.transpose(0, 1).contiguous() for part in memory))
    torch.testing.assert_close(found.rows, expected)
    torch.testing.assert_close(found.memory.hidden, hidden.transpose(0, 1))
    torch.testing.assert_close(found.memory.cell, cell.transpose(0, 1))


@every_memory
def test_the_learner_sees_what_the_actor_saw(memory: str) -> None:
    """With the actor's weights the learner finds its log-probabilities again, over unrolls with episodes in them."""
    config = make_config(memory)
    torch.manual_seed(1)
    actor = Actor(config, 0)
    with torch.no_grad():
        actor.agent.policy.weight.mul_(100)  # a policy that depends on what it sees
    weights = weights_of(actor.agent)
    unrolls = [actor.unroll(weights) for _ in range(8)]
    assert sum(int(unroll.ended.sum()) for unroll in unrolls) > 10
    for unroll, after in zip(unrolls, [*unrolls[1:], None], strict=True):
        rows = actor.agent.rows(unroll.observations, unroll.last_actions, unroll.last_rewards)
        output = actor.agent.stack(rows, unroll.memory, document_starts=unroll.starts)
        log_policy, _ = actor.agent.heads(output.rows)
        found = log_policy.gather(2, unroll.actions[..., None])[..., 0]
        torch.testing.assert_close(found, unroll.log_probabilities, rtol=0, atol=2e-5)
        if after is not None:
            assert_same_memory(after.memory, output.memory, tolerance=2e-5)
            seen = (after.observations[:, 0], after.last_actions[:, 0], after.last_rewards[:, 0])
            state = actor.agent.begin_steps(after.memory, len(after.starts))
            _, value, _ = actor.agent.act(*seen, state, starts=after.starts[:, 0])
            torch.testing.assert_close(value, unroll.bootstrap, rtol=0, atol=2e-5)


def test_an_actor_is_not_told_of_forced_actions_nor_of_the_episode_before() -> None:
    actor = Actor(make_config(), 0)
    unrolls = [actor.unroll(weights_of(actor.agent)) for _ in range(3)]
    joined = {
        name: torch.cat([getattr(unroll, name) for unroll in unrolls], dim=1)
        for name in ("observations", "last_actions", "last_rewards", "starts", "actions", "rewards", "ended")
    }
    before, after = slice(0, -1), slice(1, None)
    corridor = joined["observations"][:, before, CORRIDOR] == 1
    untold = corridor | joined["ended"][:, before]
    expected = torch.where(untold, 3, joined["actions"][:, before])
    assert torch.equal(joined["last_actions"][:, after], expected)
    assert torch.equal(joined["starts"][:, after], joined["ended"][:, before])
    rewards = joined["rewards"][:, before].masked_fill(joined["ended"][:, before], 0)
    assert torch.equal(joined["last_rewards"][:, after], rewards)
    assert joined["starts"][:, 0].all()
    assert bool((joined["last_actions"][:, 0] == 3).all())
    agent = actor.agent
    assert torch.equal(  # none is not one of the actions
        agent.rows(torch.zeros(1, agent.encoder.in_features - 4), torch.tensor([3]), torch.zeros(1)),
        agent.encoder(torch.zeros(1, agent.encoder.in_features)),
    )


def test_losses_are_their_formulas_and_train_everything() -> None:
    """The loss of an unroll by loops over steps; f_c learns from its own loss alone."""
    config = make_config()
    actor, learner = Actor(config, 0), LearnerConfig(entropy_cost=0.3, value_cost=0.7)
    unrolls = [actor.unroll(weights_of(actor.agent)) for _ in range(4)]
    unroll, agent = unrolls[-1], actor.agent
    with torch.no_grad():
        agent.policy.weight.add_(0.1 * torch.randn_like(agent.policy.weight))  # the learner is ahead
    loss, parts = learner_losses(agent, unroll, learner)
    rows = agent.rows(unroll.observations, unroll.last_actions, unroll.last_rewards)
    output = agent.stack(rows, unroll.memory, document_starts=unroll.starts)
    log_policy, values = agent.heads(output.rows)
    log_probabilities = log_policy.gather(2, unroll.actions[..., None])[..., 0]
    arguments = (unroll.log_probabilities, log_probabilities, unroll.rewards, 0.95 * (~unroll.ended).float(), values)
    targets, advantages = vtrace_by_definition(*arguments, unroll.bootstrap, rho=1.0, c=1.0)
    policy_loss = -(torch.tensor(advantages) * log_probabilities).mean()
    value_loss = 0.5 * (torch.tensor(targets) - values).square().mean()
    entropy = torch.distributions.Categorical(logits=log_policy).entropy().mean()
    torch.testing.assert_close(parts["agent/policy_loss"], policy_loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts["agent/value_loss"], value_loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts["agent/entropy"], entropy)
    total = policy_loss + 0.7 * value_loss - 0.3 * entropy + parts["attention_reconstruction/layer_00"]
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert all(parameter.grad is not None for _, parameter in agent.trained_parameters())
    of_compression = agent.gradient_groups()["compression"]
    for parameter in agent.parameters():
        parameter.grad = None
    total = loss = learner_losses(agent, unroll, learner)[0] - parts["attention_reconstruction/layer_00"].detach()
    parts = learner_losses(agent, unroll, learner)[1]
    parts["attention_reconstruction/layer_00"].backward()
    trained = {id(parameter) for parameter in agent.parameters() if parameter.grad is not None and parameter.grad.any()}
    assert trained == {id(parameter) for parameter in of_compression}


def test_environments_of_gymnasium_become_vectors() -> None:
    from gymnasium import spaces

    from ct_audio.agents.environments import _features, _num_features

    space = spaces.Dict(
        {
            "box": spaces.Box(-1, 1, (2, 2), np.float64),
            "kind": spaces.Discrete(3, start=1),
            "pair": spaces.Tuple([spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)]),
        }
    )
    samples = {
        "box": np.arange(8.0).reshape(2, 2, 2) / 8,
        "kind": np.array([1, 3]),
        "pair": (np.array([[0, 2], [1, 0]]), np.array([[0, 1], [1, 1]])),
    }
    found = np.concatenate(_features(space, samples), axis=1)
    assert found.shape == (2, _num_features(space))
    assert found[0].tolist() == [0, 0.125, 0.25, 0.375, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1]
    assert found[1].tolist() == [0.5, 0.625, 0.75, 0.875, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1]


def test_an_environment_of_gymnasium_runs_and_says_what_it_cannot_be() -> None:
    env = Environments(GymnasiumConfig(id="CartPole-v1", num_environments=3, reward_scale=0.5), seed=1)
    assert (env.num_features, env.num_actions, env.can_be_saved) == (4, 2, False)
    observations = env.reset()
    assert observations.shape == (3, 4)
    outcomes = [env.step(np.array([0, 1, 0])) for _ in range(30)]
    assert any(outcome.ended.any() for outcome in outcomes)
    assert all(set(outcome.rewards.tolist()) == {0.5} for outcome in outcomes)
    assert not outcomes[0].forced.any()
    env.close()
    for name, message in {
        "NoSuch-v0": "NoSuch",
        "Pendulum-v1": r"expected actions 0, 1, \.\.\., got the space Box",
    }.items():
        with pytest.raises(UserError, match=message):
            Environments(GymnasiumConfig(id=name), seed=0)
    with pytest.raises(UserError, match=r"No module named 'nosuch'.*install what it needs"):
        Environments(GymnasiumConfig(id="nosuch:x-v0"), seed=0)
