"""Configuration of an agent's run; read and checked as that of a training (`runs/config.py`)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ct_audio.common.errors import UserError
from ct_audio.models.compressive.config import StackConfig
from ct_audio.models.interface import UNLIMITED_RANGE
from ct_audio.runs.config import Section, read_config, require_bounds, require_directory_name


@dataclass(frozen=True)
class ObjectMatchingConfig:
    """The task of `object_matching.py`.

    Attributes:
        num_environments: that an actor steps side by side.
        delay: forced steps in the corridor between the room of the cue and that of the choice.
        cue_length: steps to the pad, which is the least number of observations that show the cue.
        num_objects: kinds of objects.
        num_distractors: objects that every observation shows beside, drawn anew at each step.
        touch_reward: for touching the pad; the choice is worth +1 or -1.
        reward_scale: by which all rewards are multiplied.
        time_limit: steps after which an episode is broken off; 0: 10 cue_length + delay + 20.
    """

    name: Literal["object_matching"] = "object_matching"
    num_environments: int = 128
    delay: int = 32
    cue_length: int = 8
    num_objects: int = 4
    num_distractors: int = 0
    touch_reward: float = 0.1
    reward_scale: float = 1.0
    time_limit: int = 0

    def __post_init__(self) -> None:
        require_bounds("environment", vars(self))
        shortest = self.cue_length + self.delay + 1
        if 0 < self.time_limit < shortest:
            raise UserError(
                f"environment.time_limit = {self.time_limit}: the shortest episode has {shortest} steps; allow them"
            )


@dataclass(frozen=True)
class GymnasiumConfig:
    """Any environment that gymnasium knows, of a discrete action and observations that can be flattened.

    Attributes:
        id: as `popgym:popgym-RepeatPreviousEasy-v0`, the module to import first before the colon.
        num_environments: that an actor steps side by side.
        reward_scale: by which rewards are multiplied.
    """

    id: str
    name: Literal["gymnasium"] = "gymnasium"
    num_environments: int = 64
    reward_scale: float = 1.0

    def __post_init__(self) -> None:
        require_bounds("environment", vars(self))


@dataclass(frozen=True)
class CompressiveConfig(StackConfig):
    """A compressive stack; with compressed_memory_length 0 that of Transformer-XL."""

    name: Literal["compressive"] = "compressive"


@dataclass(frozen=True)
class LstmConfig:
    """Layers of long short-term memory of one width."""

    name: Literal["lstm"] = "lstm"
    num_layers: int = 1
    width: int = 32

    @property
    def temporal_range(self) -> int:
        """It fades but never ends."""
        return UNLIMITED_RANGE

    @property
    def attention_cost(self) -> int:
        """0: there is no attention."""
        return 0


@dataclass(frozen=True)
class NoMemoryConfig:
    """A feed-forward block with a residual connection: every row for itself."""

    name: Literal["none"] = "none"
    width: int = 32
    feedforward_width: int = 64

    @property
    def temporal_range(self) -> int:
        """0: nothing is remembered."""
        return 0

    @property
    def attention_cost(self) -> int:
        """0: there is no attention."""
        return 0


@dataclass(frozen=True)
class ActorsConfig:
    """Who acts, and how far ahead of the learner.

    Attributes:
        num_actors: each steps `environment.num_environments` environments; they take turns.
        in_processes: each actor is a process of its own; else all act within the learner's loop. It changes no number.
        unroll_length: steps between two updates, a whole number of windows.
        lag: unrolls that are under way or wait while the learner learns; with processes at least num_actors - 1 lets
            all of them act at once.
    """

    num_actors: int = 1
    in_processes: bool = False
    unroll_length: int = 16
    lag: int = 0

    def __post_init__(self) -> None:
        require_bounds("actors", vars(self))


@dataclass(frozen=True)
class LearnerConfig:
    """V-trace actor-critic (Espeholt et al. 2018) with Adam.

    Attributes:
        learning_rate: at the beginning.
        final_learning_rate: reached linearly after `decay_steps` environment steps, and kept (decay_steps 0: never).
        entropy_cost, value_cost: weights of the policy's entropy and of the value's squared error / 2 in the loss.
        discount: of a step.
        importance_clip, trace_clip: the paper's rho_bar and c_bar.
        max_gradient_norm: gradients are clipped to this global norm, f_c apart.
        epsilon: Adam's.
    """

    learning_rate: float = 2e-3
    final_learning_rate: float = 2e-3
    decay_steps: int = 0
    entropy_cost: float = 1e-2
    value_cost: float = 0.5
    discount: float = 0.95
    importance_clip: float = 1.0
    trace_clip: float = 1.0
    max_gradient_norm: float = 0.5
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        require_bounds("learner", vars(self))


@dataclass(frozen=True)
class AgentTrainConfig:
    """The loop. When a run is resumed num_steps may grow; num_threads and the `*_every_steps` may change.

    Attributes:
        num_steps: environment steps of all actors together.
        seed: of initialisation, environments and actions.
        num_threads: CPU threads of the learner (0: torch's default); an actor's process has one.
        log_every_steps, checkpoint_every_steps: periods in environment steps (0: never a checkpoint).
    """

    num_steps: int = 1_500_000
    seed: int = 0
    num_threads: int = 1
    log_every_steps: int = 25_000
    checkpoint_every_steps: int = 500_000

    def __post_init__(self) -> None:
        require_bounds("train", vars(self))


ENVIRONMENTS: dict[str, type] = {"object_matching": ObjectMatchingConfig, "gymnasium": GymnasiumConfig}
MEMORIES: dict[str, type] = {"compressive": CompressiveConfig, "lstm": LstmConfig, "none": NoMemoryConfig}


@dataclass(frozen=True)
class AgentConfig:
    """Everything that decides what an agent's run does.

    Attributes:
        name: the run's directory under `runs_dir`.
        environment: of the dataclass that `environment.name` names.
        model: the agent's memory, of the dataclass that `model.name` names.
    """

    name: str
    environment: Any
    model: Any
    runs_dir: str = "runs"
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    train: AgentTrainConfig = field(default_factory=AgentTrainConfig)

    def __post_init__(self) -> None:
        require_directory_name(self.name)
        window_length, unroll = getattr(self.model, "window_length", 1), self.actors.unroll_length
        if unroll % window_length:
            raise UserError(
                f"actors.unroll_length = {unroll} is not a whole number of windows of model.window_length = "
                f"{window_length}; change one of them"
            )
        if unroll < getattr(self.model, "min_chunk_windows", 1) * window_length:
            raise UserError(
                f"actors.unroll_length = {unroll}: with model.compression_loss = bptt the task loss reaches f_c only "
                f"in unrolls of at least {self.model.min_chunk_windows} windows"
            )

    @property
    def run_dir(self) -> Path:
        """Directory of the run."""
        return Path(self.runs_dir) / self.name

    @property
    def steps_per_unroll(self) -> int:
        """Environment steps of one unroll of one actor."""
        return self.environment.num_environments * self.actors.unroll_length


def load_agent_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> AgentConfig:
    """Read a YAML of recipes/object_matching (or one like it) and apply overrides of the form `a.b=c`.

    Raises:
        UserError: as `runs.config.load_config`.
    """
    return read_config(path, overrides, AgentConfig, _SECTIONS)


def _chosen(section: str, choices: dict[str, type]) -> Callable[[str], type]:
    """What finds the dataclass of a section by its `name`."""

    def find(name: str) -> type:
        if name not in choices:
            raise UserError(f"{section}.name: there is none named {name!r}; expected one of {', '.join(choices)}")
        return choices[name]

    return find


_SECTIONS: dict[str, Section] = {
    "environment": _chosen("environment", ENVIRONMENTS),
    "model": _chosen("model", MEMORIES),
    "actors": ActorsConfig,
    "learner": LearnerConfig,
    "train": AgentTrainConfig,
}
