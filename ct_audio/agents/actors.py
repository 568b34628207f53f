"""Actors: they act with the weights that they are given, and hand out unrolls. In the learner's process or beside it.

Shape letters: B environments, T steps of an unroll, F features of an observation, A actions.
"""

import contextlib
import signal
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ct_audio.agents.agent import Agent
from ct_audio.agents.config import AgentConfig
from ct_audio.agents.environments import Environments
from ct_audio.common.errors import UserError
from ct_audio.common.signals import SIGNALS
from ct_audio.models.state import map_memory

Weights = dict[str, np.ndarray]


class Unroll(NamedTuple):
    """What an actor did in T steps.

    Attributes:
        memory: of the agent before the first step.
        observations, last_actions, last_rewards: what the agent saw; an action of A stands for none.
        starts: where episodes began.
        actions, log_probabilities: what it did, and log mu of it.
        rewards: what came of it.
        ended: where episodes ended with the step.
        bootstrap: value of what came after the last step, by the actor's weights.
        sums: float64 sums over episodes and trials that ended: see `SUMS`.
    """

    memory: Any
    observations: Float[Tensor, "B T F"]
    last_actions: Int[Tensor, "B T"]
    last_rewards: Float[Tensor, "B T"]
    starts: Bool[Tensor, "B T"]
    actions: Int[Tensor, "B T"]
    log_probabilities: Float[Tensor, "B T"]
    rewards: Float[Tensor, "B T"]
    ended: Bool[Tensor, "B T"]
    bootstrap: Float[Tensor, " B"]
    sums: Float[Tensor, "5"]


SUMS = ("episodes", "returns", "lengths", "trials", "successes")
"""Ended episodes, their returns (scaled rewards) and lengths in steps; trials won or lost, and those won."""


class ActorState(NamedTuple):
    """Where an actor is between two unrolls, as tensors that a checkpoint can hold.

    Attributes:
        memory: of the agent.
        observations, last_actions, last_rewards, starts: what it will see next.
        returns, lengths: of the episodes that are running.
        generator: of actions.
        environments: of `Environments.state`, in the order of its names.
    """

    memory: Any
    observations: Float[Tensor, "B F"]
    last_actions: Int[Tensor, " B"]
    last_rewards: Float[Tensor, " B"]
    starts: Bool[Tensor, " B"]
    returns: Float[Tensor, " B"]
    lengths: Int[Tensor, " B"]
    generator: UInt8[Tensor, " _"]
    environments: tuple[Tensor, ...]


class Actor:
    """Environments and an agent that acts in them.

    Args:
        config: of the run.
        index: of the actor; its environments and its actions have seeds of their own.
    """

    def __init__(self, config: AgentConfig, index: int) -> None:
        self._unroll_length = config.actors.unroll_length
        seed = 1_000_003 * config.train.seed + index
        self._environments = Environments(config.environment, seed=seed)
        env = self._environments
        self.agent = Agent(config.model, num_features=env.num_features, num_actions=env.num_actions)
        self._generator = torch.Generator().manual_seed(seed)
        lanes = config.environment.num_environments
        self._memory = self.agent.stack.zero_memory(lanes)
        self._observations = torch.from_numpy(env.reset())
        self._last_actions, self._last_rewards = torch.full((lanes,), env.num_actions), torch.zeros(lanes)
        self._starts = torch.ones(lanes, dtype=torch.bool)
        self._returns, self._lengths = np.zeros(lanes), np.zeros(lanes, np.int64)

    @torch.no_grad()
    def unroll(self, weights: Weights) -> Unroll:
        """Act for T steps with these weights; caches of keys and values are made anew, as they hold the old ones."""
        for name, parameter in self.agent.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
        before, sums = self._memory, np.zeros(len(SUMS))
        state = self.agent.begin_steps(before, len(self._starts))
        steps: list[tuple[Tensor, ...]] = []
        for _ in range(self._unroll_length):
            seen = (self._observations, self._last_actions, self._last_rewards, self._starts)
            log_policy, _, state = self.agent.act(*seen[:3], state, starts=self._starts)
            actions = torch.multinomial(log_policy.exp(), 1, generator=self._generator)
            log_probabilities = log_policy.gather(1, actions)[:, 0]
            actions = actions[:, 0]
            outcome = self._environments.step(actions.numpy())
            rewards, ended = torch.from_numpy(outcome.rewards).float(), torch.from_numpy(outcome.ended)
            steps.append((*seen, actions, log_probabilities, rewards, ended))
            self._observations, self._starts = torch.from_numpy(outcome.observations), ended
            untold = ended | torch.from_numpy(outcome.forced)
            self._last_actions = actions.masked_fill(untold, self.agent.num_actions)
            self._last_rewards = rewards.masked_fill(ended, 0.0)
            sums += self._count(outcome.rewards, outcome.ended, outcome.successes)
        self._memory = state.memory
        seen = (self._observations, self._last_actions, self._last_rewards)
        _, bootstrap, _ = self.agent.act(*seen, state, starts=self._starts)  # a look ahead: this state is thrown away
        columns = [torch.stack(column, dim=1) for column in zip(*steps, strict=True)]
        return Unroll(before, *columns, bootstrap=bootstrap, sums=torch.from_numpy(sums))  # type: ignore[call-arg]

    def state(self) -> ActorState:
        """Where it is; a copy."""
        environments = self._environments.state()
        state = ActorState(
            memory=self._memory,
            observations=self._observations,
            last_actions=self._last_actions,
            last_rewards=self._last_rewards,
            starts=self._starts,
            returns=torch.from_numpy(self._returns),
            lengths=torch.from_numpy(self._lengths),
            generator=self._generator.get_state(),
            environments=tuple(torch.from_numpy(environments[name]) for name in sorted(environments)),
        )
        return map_memory(torch.clone, state)

    def load_state(self, state: ActorState) -> None:
        """Go on from a `state`; environments that cannot be saved begin new episodes."""
        names = sorted(self._environments.state())
        arrays = {name: tensor.numpy() for name, tensor in zip(names, state.environments, strict=True)}
        self._generator.set_state(state.generator)
        if self._environments.load_state(arrays) is None:
            return
        state = map_memory(torch.clone, state)
        self._memory, self._observations = state.memory, state.observations
        self._last_actions, self._last_rewards, self._starts = state.last_actions, state.last_rewards, state.starts
        self._returns, self._lengths = state.returns.numpy(), state.lengths.numpy()

    def close(self) -> None:
        """Let go of the environments."""
        self._environments.close()

    def _count(self, rewards: np.ndarray, ended: np.ndarray, successes: np.ndarray) -> np.ndarray:
        """Sums of what ended with a step."""
        self._returns += rewards
        self._lengths += 1
        episodes = (ended.sum(), self._returns[ended].sum(), self._lengths[ended].sum())
        self._returns[ended], self._lengths[ended] = 0, 0
        return np.array([*episodes, (successes != 0).sum(), (successes > 0).sum()], np.float64)


class LocalActor:
    """An actor in the learner's process, as the loop knows actors: what is asked first is answered first."""

    def __init__(self, config: AgentConfig, index: int) -> None:
        self._actor, self._waiting = Actor(config, index), deque[Unroll]()

    def start(self, weights: Weights) -> None:
        """Begin an unroll with these weights."""
        self._waiting.append(self._actor.unroll(weights))

    def result(self) -> Unroll:
        """The oldest unroll that has been started and not been handed out."""
        return self._waiting.popleft()

    def state(self, num_waiting: int) -> tuple[ActorState, list[Unroll]]:
        """Where the actor is after all that was started, and the unrolls that wait, which stay.

        Args:
            num_waiting: unrolls that were started and not handed out.
        """
        return self._actor.state(), list(self._waiting)

    def load_state(self, state: ActorState, waiting: list[Unroll]) -> None:
        """Go on from there."""
        self._actor.load_state(state)
        self._waiting = deque(waiting)

    def close(self) -> None:
        """Let go of it."""
        self._actor.close()


class ProcessActor:
    """An actor in a process of its own, with one thread; see `LocalActor`."""

    def __init__(self, config: AgentConfig, index: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, config, index), daemon=True)
        self._process.start()
        other.close()
        self._waiting, self._index = deque[Unroll](), index

    def start(self, weights: Weights) -> None:
        """Begin an unroll with these weights, and do not wait for it."""
        self._send("unroll", weights)

    def result(self) -> Unroll:
        """Wait for the oldest unroll that has been started and not been handed out."""
        return self._waiting.popleft() if self._waiting else self._receive()

    def state(self, num_waiting: int) -> tuple[ActorState, list[Unroll]]:
        """As that of a `LocalActor`."""
        while len(self._waiting) < num_waiting:
            self._waiting.append(self._receive())
        self._send("state", None)
        return self._receive(), list(self._waiting)

    def load_state(self, state: ActorState, waiting: list[Unroll]) -> None:
        """Go on from there."""
        self._send("load_state", _to_arrays(state))
        self._receive()
        self._waiting = deque(waiting)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._connection.send(("close", None))
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()  # it ignores all other signals

    def _send(self, command: str, argument: Any) -> None:
        try:
            self._connection.send((command, argument))
        except OSError as error:
            raise self._gone() from error

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        if isinstance(answer, Exception):
            raise answer
        return _to_tensors(answer)

    def _gone(self) -> RuntimeError:
        self._process.join(timeout=5)
        return RuntimeError(f"the process of actor {self._index} has ended with status {self._process.exitcode}")


@contextlib.contextmanager
def open_actors(config: AgentConfig) -> Iterator[list[LocalActor] | list[ProcessActor]]:
    """All actors of a run, let go of at the end."""
    kind: Any = ProcessActor if config.actors.in_processes else LocalActor
    with contextlib.ExitStack() as stack:
        actors = []
        for index in range(config.actors.num_actors):
            actors.append(kind(config, index))
            stack.callback(actors[-1].close)
        yield actors


def weights_of(agent: Agent) -> Weights:
    """A copy of the parameters."""
    return {name: parameter.detach().numpy().copy() for name, parameter in agent.named_parameters()}


def _serve(connection: Any, config: AgentConfig, index: int) -> None:
    """What an actor's process does: obey until it is told to close, or the learner has gone."""
    for number in SIGNALS:  # a terminal sends them to all; the learner says when to end
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    actor: Actor | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while (message := connection.recv())[0] != "close":
            try:
                command, argument = message
                actor = actor or Actor(config, index)
                if command == "unroll":
                    answer: Any = actor.unroll(argument)
                else:
                    answer = actor.state() if command == "state" else actor.load_state(_to_tensors(argument))
                connection.send(_to_arrays(answer))
            except UserError as error:
                connection.send(error)


def _to_arrays(nest: Any) -> Any:
    """Tensors as arrays: so small ones travel faster than through shared memory."""
    return _map(lambda leaf: leaf.numpy() if isinstance(leaf, Tensor) else leaf, nest)


def _to_tensors(nest: Any) -> Any:
    return _map(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, nest)


def _map(function: Callable[[Any], Any], nest: Any) -> Any:
    """As `map_memory`, for leaves of any kind."""
    if not isinstance(nest, tuple):
        return function(nest)
    parts = [_map(function, part) for part in nest]
    return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)
