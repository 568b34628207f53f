"""Environments by configuration, and what an agent sees of them: plain vectors.

Shape letters: N environments, F features of an observation, A actions.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8

from ct_audio.agents.config import ObjectMatchingConfig
from ct_audio.common.errors import UserError


class Outcome(NamedTuple):
    """Of one step everywhere.

    Attributes:
        observations: after the step; the first of the next episode where one has ended.
        rewards: scaled.
        ended: episodes that ended with the step, or were broken off (which the learner takes for an end too).
        forced: actions that had no effect by design; the agent is not told of them.
        successes: +1 where a trial was won, -1 where it was lost, 0 elsewhere.
    """

    observations: Float32[np.ndarray, "N F"]
    rewards: Float[np.ndarray, " N"]
    ended: Bool[np.ndarray, " N"]
    forced: Bool[np.ndarray, " N"]
    successes: Int[np.ndarray, " N"]


class Environments:
    """A gymnasium `VectorEnv` with discrete actions, its observations as vectors.

    Args:
        config: the `environment` section.
        seed: of everything that is random in them.
    Attributes:
        num_features, num_actions: F and A.
    Raises:
        UserError: gymnasium is not installed, there is no such environment, or its spaces are of another kind.
    """

    def __init__(self, config: Any, *, seed: int) -> None:
        self._env, self._seed, self._config = _make(config, seed), seed, config
        self._begun = False
        space = self._env.single_observation_space
        self.num_features, self.num_actions = _num_features(space), _num_actions(self._env)

    def reset(self) -> Float32[np.ndarray, "N F"]:
        """First observations of new episodes everywhere; the first time from the seed, then from where it has led."""
        observations, _ = self._env.reset(seed=None if self._begun else self._seed)
        self._begun = True
        return self._vectors(observations)

    def step(self, actions: Int[np.ndarray, " N"]) -> Outcome:
        """Act everywhere."""
        observations, rewards, terminated, truncated, info = self._env.step(actions)
        forced = info.get("forced")
        successes = info.get("success")
        return Outcome(
            observations=self._vectors(observations),
            rewards=rewards if isinstance(self._config, ObjectMatchingConfig) else rewards * self._config.reward_scale,
            ended=terminated | truncated,
            forced=np.zeros(len(rewards), bool) if forced is None else forced,
            successes=np.sign(rewards).astype(np.int64) if successes is None else successes.astype(np.int64),
        )

    def show(self) -> tuple[str | None, UInt8[np.ndarray, "H W 3"] | None]:
        """What the first environment shows people, as text and as a picture; None where it has none."""
        has_pictures = isinstance(self._config, ObjectMatchingConfig)
        return (self._env.text(0), self._env.image(0)) if has_pictures else (None, None)

    @property
    def action_names(self) -> tuple[str, ...]:
        """What the actions are called."""
        if isinstance(self._config, ObjectMatchingConfig):
            return ("forward", "left", "right")
        return tuple(f"action {action}" for action in range(self.num_actions))

    @property
    def can_be_saved(self) -> bool:
        """Whether `state` is there: a run that is resumed then goes on as if it had never stopped."""
        return hasattr(self._env, "load_state")

    def state(self) -> dict[str, np.ndarray]:
        """Where the environments are, as arrays; {} where they cannot be saved."""
        return self._env.state() if self.can_be_saved else {}

    def load_state(self, state: dict[str, np.ndarray]) -> Float32[np.ndarray, "N F"] | None:
        """Go on from a `state`; None where the environments cannot be saved, and `reset` begins new episodes."""
        if not self.can_be_saved:
            return None
        self._begun = True
        return self._vectors(self._env.load_state(state))

    def close(self) -> None:
        """Let go of them."""
        self._env.close()

    def _vectors(self, observations: Any) -> Float32[np.ndarray, "N F"]:
        space = self._env.single_observation_space
        if isinstance(observations, np.ndarray) and observations.dtype == np.float32 and observations.ndim == 2:
            return observations
        return np.concatenate(_features(space, observations), axis=1, dtype=np.float32)


def _make(config: Any, seed: int) -> Any:
    try:
        import gymnasium
        from gymnasium.vector import AutoresetMode

        if isinstance(config, ObjectMatchingConfig):
            from ct_audio.agents.object_matching import ObjectMatching

            return ObjectMatching(config, seed=seed)
        make = functools.partial(gymnasium.make, config.id, disable_env_checker=True)
        make_all = [make for _ in range(config.num_environments)]
        return gymnasium.vector.SyncVectorEnv(make_all, autoreset_mode=AutoresetMode.SAME_STEP)
    except ImportError as error:
        raise UserError(
            f"environment: {error}; install what it needs, as with: python -m pip install 'ct_audio[agent]'"
        ) from error
    except gymnasium.error.Error as error:
        raise UserError(f"environment.id = {getattr(config, 'id', '')}: {error}") from error


def _num_actions(env: Any) -> int:
    from gymnasium.spaces import Discrete

    space = env.single_action_space
    if not isinstance(space, Discrete) or space.start != 0:
        raise UserError(f"environment: expected actions 0, 1, ..., got the space {space}; wrap it")
    return int(space.n)


def _num_features(space: Any) -> int:
    from gymnasium.spaces import Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
    from gymnasium.spaces.utils import flatdim

    kinds = (Discrete, MultiBinary, MultiDiscrete, Tuple, Dict)
    if not isinstance(space, kinds) and not (getattr(space, "shape", None) is not None and space.is_np_flattenable):
        raise UserError(f"environment: expected observations that can be flattened, got the space {space}; wrap it")
    return flatdim(space)


def _features(space: Any, observations: Any) -> list[np.ndarray]:
    """Observations of all environments as columns: numbers as they are, one of n as n zeros and ones."""
    from gymnasium.spaces import Dict, Discrete, MultiDiscrete, Tuple

    if isinstance(space, Discrete):
        return [np.eye(int(space.n), dtype=np.float32)[np.asarray(observations) - space.start]]
    if isinstance(space, MultiDiscrete):
        values = (np.asarray(observations) - space.start).reshape(len(observations), -1)
        return [np.eye(int(n), dtype=np.float32)[values[:, i]] for i, n in enumerate(space.nvec.reshape(-1))]
    if isinstance(space, Tuple):
        return [column for part, values in zip(space, observations, strict=True) for column in _features(part, values)]
    if isinstance(space, Dict):
        return [column for name, part in space.items() for column in _features(part, observations[name])]
    return [np.asarray(observations, np.float32).reshape(len(observations), -1)]
