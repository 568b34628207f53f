"""Object matching: choose the object that is not the one seen before. A gymnasium `VectorEnv` in numpy.

A small counterpart of DeepMind Lab's `rooms_select_nonmatching_object`, which the paper's section 5.7 uses and which
can no longer be built. An episode:

    room 1     shows an object that is out of reach, and a pad `cue_length` steps ahead; `forward` walks towards it
    corridor   touching the pad leads into a corridor of exactly `delay` steps, whatever the agent does
    room 2     shows two objects, left and right, one of them that of room 1; `left` and `right` take one, the one that
               does not match for +1, the other for -1, and the episode ends

Shape letters: N environments, F features of an observation, C kinds of objects.
"""

import ast
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Float32, Int, UInt8

from ct_audio.agents.config import ObjectMatchingConfig
from ct_audio.common.errors import UserError

FORWARD, LEFT, RIGHT = 0, 1, 2
ROOM_1, CORRIDOR, ROOM_2 = 0, 1, 2
ROOMS = ("room 1", "corridor", "room 2")
_INTEGERS = ("room", "left", "cue", "time")
_IMAGE_HEIGHT, _IMAGE_WIDTH = 48, 80


class ObjectMatching(VectorEnv):
    """Environments side by side; where an episode ends, `step` returns the first observation of the next one.

    An observation [F] holds: which room, as one of three; steps to the pad, as a share of `cue_length`; the object of
    room 1, the left and the right one of room 2 and each distractor, as one of C each (zeros where there is none).

    `info` of `step`: "success", +1 and -1 where an object was taken, else 0; "forced", where the action had no effect
    by design; "final_obs" and "_final_obs", the last observation of episodes that have ended, and where.

    Args:
        config: of the task.
        seed: of cues, places and distractors; `reset(seed=...)` replaces it.
        render_mode: "ansi" or "rgb_array", what `render` returns; None for nothing.
    """

    metadata = {  # noqa: RUF012 (gymnasium's way)
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "render_modes": ["ansi", "rgb_array"],
    }

    def __init__(self, config: ObjectMatchingConfig, *, seed: int = 0, render_mode: str | None = None) -> None:
        if render_mode not in (None, "ansi", "rgb_array"):
            raise UserError(f"render_mode: expected ansi, rgb_array or None, got {render_mode!r}")
        self.config = config
        self.num_envs = config.num_environments
        self.render_mode = render_mode
        self.num_features = 4 + (3 + config.num_distractors) * config.num_objects
        self.single_observation_space = Box(0.0, 1.0, (self.num_features,), np.float32)
        self.single_action_space = Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.time_limit = config.time_limit or 10 * config.cue_length + config.delay + 20
        self._everyone = np.arange(self.num_envs)
        self._random = np.random.default_rng(seed)
        self.room, self.left, self.cue, self.time = (np.zeros(self.num_envs, np.int64) for _ in _INTEGERS)
        self.pair = np.zeros((self.num_envs, 2), np.int64)
        self.distractors = np.zeros((self.num_envs, config.num_distractors), np.int64)
        self._begin(self._everyone)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Float32[np.ndarray, "N F"], dict]:
        """Begin a new episode everywhere."""
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self._begin(self._everyone)
        self._draw_distractors()
        return self._observe(), {}

    def step(
        self, actions: Int[np.ndarray, " N"]
    ) -> tuple[
        Float32[np.ndarray, "N F"],
        Float[np.ndarray, " N"],
        Bool[np.ndarray, " N"],
        Bool[np.ndarray, " N"],
        dict[str, Any],
    ]:
        """One step everywhere: observations, rewards, where episodes ended, where the time limit broke them off."""
        rewards, success = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        self.time += 1
        walks = (self.room == ROOM_1) & (actions == FORWARD)
        forced = self.room == CORRIDOR
        takes = (self.room == ROOM_2) & (actions != FORWARD)
        self.left -= walks | forced
        arrived = self.left == 0  # nowhere in room 2
        touched, through = walks & arrived, forced & arrived
        if self.config.delay:
            self.room[touched], self.left[touched] = CORRIDOR, self.config.delay
        else:
            through = touched
        self._enter_room_2(np.flatnonzero(through))
        rewards[touched] = self.config.touch_reward
        if takes.any():
            taken = self.pair[takes, actions[takes] - 1]
            success[takes] = np.where(taken == self.cue[takes], -1, 1)
            rewards += success
        truncated = (self.time >= self.time_limit) & ~takes
        self._draw_distractors()
        info: dict[str, Any] = {"success": success, "forced": forced}
        ended = takes | truncated
        if ended.any():
            info["final_obs"], info["_final_obs"] = self._observe(), ended
            self._begin(np.flatnonzero(ended))
        return self._observe(), rewards * self.config.reward_scale, takes, truncated, info

    def state(self) -> dict[str, np.ndarray]:
        """Everything that decides what happens next, the random generator too, as arrays; for `load_state`."""
        generator = repr(self._random.bit_generator.state).encode()
        arrays = {name: getattr(self, name).copy() for name in (*_INTEGERS, "pair", "distractors")}
        return {**arrays, "generator": np.frombuffer(generator.ljust(512), np.uint8).copy()}

    def load_state(self, state: dict[str, np.ndarray]) -> Float32[np.ndarray, "N F"]:
        """Go on from a `state` of an environment of the same configuration; returns the present observations."""
        for name in (*_INTEGERS, "pair", "distractors"):
            getattr(self, name)[:] = state[name]
        self._random.bit_generator.state = ast.literal_eval(state["generator"].tobytes().decode().strip())
        return self._observe()

    def render(self) -> tuple[Any, ...] | None:
        """Of each environment a line of text, or an image [48, 80, 3] of uint8."""
        if self.render_mode is None:
            return None
        return tuple(self.text(i) if self.render_mode == "ansi" else self.image(i) for i in range(self.num_envs))

    def _begin(self, at: Int[np.ndarray, " _"]) -> None:
        self.cue[at] = self._random.integers(self.config.num_objects, size=len(at))
        self.room[at], self.left[at], self.time[at] = ROOM_1, self.config.cue_length, 0

    def _enter_room_2(self, at: Int[np.ndarray, " _"]) -> None:
        if not len(at):
            return
        kinds, cue = self.config.num_objects, self.cue[at]
        other = (cue + self._random.integers(1, kinds, size=len(at))) % kinds
        matches_left = self._random.integers(2, size=len(at)) == 0
        self.pair[at, 0], self.pair[at, 1] = np.where(matches_left, cue, other), np.where(matches_left, other, cue)
        self.room[at], self.left[at] = ROOM_2, -1

    def _draw_distractors(self) -> None:
        if self.config.num_distractors:
            self.distractors[:] = self._random.integers(self.config.num_objects, size=self.distractors.shape)

    def _observe(self) -> Float32[np.ndarray, "N F"]:
        observations, kinds = np.zeros((self.num_envs, self.num_features), np.float32), self.config.num_objects
        observations[self._everyone, self.room] = 1
        first, second = np.flatnonzero(self.room == ROOM_1), np.flatnonzero(self.room == ROOM_2)
        observations[first, 3] = self.left[first] / self.config.cue_length
        observations[first, 4 + self.cue[first]] = 1
        for side in (0, 1):
            observations[second, 4 + (1 + side) * kinds + self.pair[second, side]] = 1
        for place in range(self.config.num_distractors):
            observations[self._everyone, 4 + (3 + place) * kinds + self.distractors[:, place]] = 1
        return observations

    def text(self, i: int) -> str:
        """What environment i shows, on one line."""
        sees = {
            ROOM_1: f"object {letter(self.cue[i])}, pad {self.left[i]} steps ahead",
            CORRIDOR: f"{self.left[i]} steps to go",
            ROOM_2: f"left {letter(self.pair[i, 0])}, right {letter(self.pair[i, 1])}",
        }[int(self.room[i])]
        beside = "".join(f", distractor {letter(kind)}" for kind in self.distractors[i])
        return f"{ROOMS[self.room[i]]:8}  {sees}{beside}"

    def image(self, i: int) -> UInt8[np.ndarray, "48 80 3"]:
        """What environment i shows, as a small picture; it is drawn for people, the agent does not see it."""
        image = np.full((_IMAGE_HEIGHT, _IMAGE_WIDTH, 3), (200, 200, 200), np.uint8)
        image[36:] = 120  # the floor
        room, kinds = int(self.room[i]), self.config.num_objects
        if room == ROOM_1:
            _draw_object(image, self.cue[i], kinds, row=6, column=32)
            column = 8 + round(60 * self.left[i] / self.config.cue_length)
            image[38:46, column + 3 : column + 5] = image[41:43, column : column + 8] = (255, 255, 255)  # the pad
            image[38:46, 2:6] = (30, 30, 30)  # the agent
        elif room == CORRIDOR:
            image[:, :20] = image[:, 60:] = (80, 80, 80)
            image[38:46, 38:42] = (30, 30, 30)
        else:
            _draw_object(image, self.pair[i, 0], kinds, row=16, column=12)
            _draw_object(image, self.pair[i, 1], kinds, row=16, column=52)
            image[38:46, 38:42] = (30, 30, 30)
        for place, kind in enumerate(self.distractors[i]):
            image[1:5, 2 + 6 * place : 6 + 6 * place] = _colour(kind, kinds)
        return image


def letter(kind: int | np.integer) -> str:
    """A name for a kind of object: A, B, ...; O26 and so on after Z."""
    return chr(ord("A") + int(kind)) if kind < 26 else f"O{kind}"


def _colour(kind: int | np.integer, num_kinds: int) -> tuple[int, int, int]:
    """Colours around the wheel."""
    from matplotlib.colors import hsv_to_rgb

    red, green, blue = (255 * hsv_to_rgb((kind / num_kinds, 0.9, 0.85))).astype(int)
    return int(red), int(green), int(blue)


def _draw_object(image: np.ndarray, kind: int | np.integer, num_kinds: int, *, row: int, column: int) -> None:
    """A square, a disc, a diamond or a frame of 16 pixels, by kind."""
    y, x = np.mgrid[-7.5:8, -7.5:8]
    shapes = [np.maximum(abs(x), abs(y)) < 7, np.hypot(x, y) < 8, abs(x) + abs(y) < 9, np.maximum(abs(x), abs(y)) > 4]
    image[row : row + 16, column : column + 16][shapes[int(kind) % len(shapes)]] = _colour(kind, num_kinds)
