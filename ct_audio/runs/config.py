"""Run configuration: frozen dataclasses, one complete YAML a run, overrides `a.b=c`.

The only importer of yaml. `model.name` is read first and puts that model's dataclass in the `model` slot.
How large and how small numbers may be stands in `BOUNDS`; what else one dataclass can check stands in its
`__post_init__`, what needs two of them in `RunConfig`.
"""

import dataclasses
import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import yaml

from ct_audio.common.errors import UserError
from ct_audio.common.recipes import config_file
from ct_audio.common.text import printable
from ct_audio.models import model_config_class
from ct_audio.runs.device import MAX_THREADS

T = TypeVar("T")

_MAX_CHARACTERS = 1 << 20
_MAX_DEPTH = 50
_MAX_CODES, _MAX_STEPS, _MAX_WIDTH = 2**24, 10**10, 2**20
_RATE = (0.0, 1e3)

BOUNDS: dict[str, tuple[float, float]] = {
    "data.chunk_length": (1, _MAX_CODES),
    "data.num_lanes": (1, 2**20),
    "optim.peak_learning_rate": (1e-30, 1e3),
    "optim.initial_learning_rate": _RATE,
    "optim.final_learning_rate": _RATE,
    "optim.warmup_steps": (0, _MAX_STEPS),
    "optim.decay_steps": (0, _MAX_STEPS),
    "optim.max_gradient_norm": (1e-30, 1e6),
    "optim.beta1": (0.0, 1.0),
    "optim.beta2": (0.0, 1.0),
    "optim.epsilon": (1e-30, 1e3),
    "train.num_steps": (1, _MAX_STEPS),
    "train.num_micro_batches": (1, 2**20),
    "train.seed": (0, 2**62),
    "train.num_threads": (0, MAX_THREADS),
    "train.timeout_seconds": (1.0, 86_400.0),
    "train.valid_codes": (0, 2**48),
    "train.log_every_steps": (1, _MAX_STEPS),
    "train.valid_every_steps": (0, _MAX_STEPS),
    "train.checkpoint_every_steps": (0, _MAX_STEPS),
    "train.sample_every_steps": (0, _MAX_STEPS),
    "train.sample_seconds": (1e-6, 3600.0),
    "model.vocab_size": (1, 2**24),
    "model.num_layers": (1, 1000),
    "model.width": (1, _MAX_WIDTH),
    "model.num_heads": (1, _MAX_WIDTH),
    "model.num_kv_heads": (0, _MAX_WIDTH),
    "model.feedforward_width": (1, _MAX_WIDTH),
    "model.position_width": (2, _MAX_WIDTH),
    "model.dropout": (0.0, 1.0),
    "model.window_length": (1, _MAX_CODES),
    "model.memory_length": (0, _MAX_CODES),
    "model.compressed_memory_length": (0, _MAX_CODES),
    "model.convolution_length": (0, 65_536),
    "model.reconstruction_query_share": (0.0, 1.0),
    "model.adaptive_span_ramp": (1, _MAX_CODES),
    "model.adaptive_span_loss": (0.0, 1e6),
    "model.adaptive_div": (1, _MAX_WIDTH),
    "model.layers_per_cycle": (1, 20),
    "model.skip_width": (1, _MAX_WIDTH),
    "model.order": (1, 4096),
    "model.prediction_order": (1, 4096),
    "model.prediction_window_length": (2, 65_536),
    "model.prediction_hop_length": (1, 65_536),
    "model.num_components": (1, 256),
    "model.forgetting": (0.0, 1.0),
    "model.regularisation": (0.0, 1e6),
    "model.scale_decay": (0.0, 1.0),
    "model.uniform_share": (0.0, 1.0),
    "environment.num_environments": (1, 2**16),
    "environment.delay": (0, 10**6),
    "environment.cue_length": (1, 10**6),
    "environment.num_objects": (2, 1024),
    "environment.num_distractors": (0, 64),
    "environment.touch_reward": (-1e3, 1e3),
    "environment.reward_scale": (1e-6, 1e6),
    "environment.time_limit": (0, 10**8),
    "actors.num_actors": (1, 1024),
    "actors.unroll_length": (1, _MAX_CODES),
    "actors.lag": (0, 1024),
    "learner.learning_rate": (1e-30, 1e3),
    "learner.final_learning_rate": _RATE,
    "learner.decay_steps": (0, 10**15),
    "learner.entropy_cost": (0.0, 1e3),
    "learner.value_cost": (0.0, 1e3),
    "learner.discount": (0.0, 1.0),
    "learner.importance_clip": (1e-6, 1e6),
    "learner.trace_clip": (1e-6, 1e6),
    "learner.max_gradient_norm": (1e-30, 1e6),
    "learner.epsilon": (1e-30, 1e3),
}
"""Lowest and highest value of every number, by key; what is beyond is a slip of the hand, or stalls the machine."""


@dataclass(frozen=True)
class DataConfig:
    """Where the codes come from and how they are dealt out to lanes.

    Attributes:
        corpus: directory of a prepared corpus (it holds corpus.json).
        chunk_length: codes a lane consumes in one training step.
        num_lanes: contiguous streams of the (global) batch.
        reset_memory_at_document: memory ends where a document (recording) begins; False: one continuous stream.
    """

    corpus: str
    chunk_length: int = 3840
    num_lanes: int = 32
    reset_memory_at_document: bool = False

    def __post_init__(self) -> None:
        require_bounds("data", vars(self))


@dataclass(frozen=True)
class OptimConfig:
    """Adam and its schedules (paper, section 4.1): linear warmup, then cosine decay, both counted in steps.

    Attributes:
        peak_learning_rate: reached at the end of warmup.
        initial_learning_rate: at step 0.
        final_learning_rate: reached `decay_steps` steps after warmup, and kept.
        warmup_steps: steps of linear warmup (0: none).
        decay_steps: steps of cosine decay (0: none, the peak is kept).
        max_gradient_norm: gradients are clipped to this global norm, a group at a time (f_c is a group of its own).
        update_period: {first step: steps an optimizer update}; must start at step 0.
        beta1, beta2, epsilon: Adam's.
    """

    peak_learning_rate: float = 3e-4
    initial_learning_rate: float = 1e-6
    final_learning_rate: float = 1e-6
    warmup_steps: int = 4000
    decay_steps: int = 100_000
    max_gradient_norm: float = 0.1
    update_period: dict[int, int] = field(default_factory=lambda: {0: 1})
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        require_bounds("optim", vars(self))
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 1:
                raise UserError(f"optim.{name}: expected a number in [0, 1), got {getattr(self, name)}")
        periods = self.update_period
        whole = 0 in periods and all(
            0 <= first <= _MAX_STEPS and 1 <= periods[first] <= _MAX_STEPS for first in periods
        )
        if not whole:
            raise UserError(
                f"optim.update_period: expected {{first step: period}} with step 0 and periods of 1 to {_MAX_STEPS}, "
                f"got {dict(periods)}; write for example {{0: 1, 60000: 4}}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    When a run is resumed num_steps may grow; device, compile, num_threads, parallel, checkpoint_layers,
    timeout_seconds, the `*_every_steps`, sample_seconds, logger and validate_whole_split may change, without dropout
    num_micro_batches too; seed, precision and valid_codes may not, nor may any key of model, optim or data, except the
    place of the same corpus.

    Attributes:
        num_steps: chunks a lane to train on.
        num_micro_batches: parts into which a rank's lanes are split to save memory; but for the order of sums the
            result is the same, except with dropout, which draws other numbers.
        seed: of initialisation and dropout.
        device: "auto" takes CUDA where there is one.
        precision: "bfloat16" runs the forward pass under autocast, weights stay float32.
        compile: whether torch.compile makes machine code of the forward and the backward pass, some minutes at the
            first two chunks; "cuda_graphs": and replays it as CUDA graphs. Results are the same up to rounding.
        num_threads: CPU threads a process (0: torch's default).
        valid_codes: codes of the fixed stretch at the start of the validation split that is scored on the way
            (0: all of it).
        validate_whole_split: score all of the validation split once, at the end; False for searches over many short
            runs, which are compared on the stretch.
        log_every_steps, valid_every_steps, checkpoint_every_steps, sample_every_steps: periods in steps (0: never;
            a final validation, checkpoint and sample are made all the same where the period is not 0).
        sample_seconds: audio that is sampled at each sampling (of text nothing is sampled).
        checkpoint_layers: keep only the inputs of each layer for the backward pass, which runs the layer again: less
            memory, more time, the same numbers.
        parallel: how processes under torchrun share the work: "ddp": each holds all parameters; "fsdp": each holds a
            part of all parameters, gradients and moments, and layers are gathered one by one when they are needed.
        timeout_seconds: how long a process may keep the others waiting before they end; not while rank 0 alone
            validates, samples or writes, nor before the first update of a session.
        logger: a second place for curves, sounds and figures, beside TensorBoard and metrics.jsonl: "wandb" is
            Weights & Biases.
    """

    num_steps: int = 100_000
    num_micro_batches: int = 1
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    compile: Literal[False, True, "cuda_graphs"] = False
    num_threads: int = 0
    valid_codes: int = 480_000
    validate_whole_split: bool = True
    log_every_steps: int = 100
    valid_every_steps: int = 1000
    checkpoint_every_steps: int = 1000
    sample_every_steps: int = 0
    sample_seconds: float = 1.0
    checkpoint_layers: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    timeout_seconds: float = 60.0
    logger: Literal["none", "wandb"] = "none"

    def __post_init__(self) -> None:
        require_bounds("train", vars(self))
        if self.compile and self.parallel == "fsdp":
            raise UserError(
                f"train.compile = {str(self.compile).lower()}: a forward pass on shards (train.parallel=fsdp) is no "
                "single graph; write train.compile=false, or train.parallel=ddp"
            )


def require_directory_name(name: str) -> None:
    """Raise `UserError` where a run's name is no plain directory name."""
    if not name or name.startswith(".") or any(c in name for c in "/\\\0\n"):
        raise UserError(f"name: expected a plain directory name, got {name!r}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run does.

    Attributes:
        name: the run's directory under `runs_dir`.
        model: the configuration dataclass of the model that `model.name` names.
    """

    name: str
    model: Any
    data: DataConfig
    runs_dir: str = "runs"
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        require_directory_name(self.name)
        if self.data.num_lanes % self.train.num_micro_batches:
            raise UserError(
                f"data.num_lanes = {self.data.num_lanes} is not divisible by "
                f"train.num_micro_batches = {self.train.num_micro_batches}; change one of them"
            )
        window_length = getattr(self.model, "window_length", 1)
        if self.data.chunk_length % window_length:
            raise UserError(
                f"data.chunk_length = {self.data.chunk_length} is not a whole number of windows of "
                f"model.window_length = {window_length}; change one of them"
            )
        min_chunk_length = getattr(self.model, "min_chunk_windows", 1) * window_length
        if self.data.chunk_length < min_chunk_length:
            raise UserError(
                f"data.chunk_length = {self.data.chunk_length}: with model.compression_loss = bptt the task loss "
                f"reaches f_c only in chunks of at least {min_chunk_length} codes (ceil(n_m / n_s) + 2 windows)"
            )

    @property
    def run_dir(self) -> Path:
        """Directory of the run."""
        return Path(self.runs_dir) / self.name


Section = type | Callable[[str], type]
"""The dataclass of a section of a YAML, or what finds it by the section's `name`."""
_SECTIONS: dict[str, Section] = {
    "data": DataConfig,
    "model": model_config_class,
    "optim": OptimConfig,
    "train": TrainConfig,
}


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML and apply overrides of the form `a.b=c`.

    Args:
        path: the run's YAML, or a recipe's name for one, see `config_file`.
        overrides: each `key=value`, the value in YAML syntax; lists and `optim.update_period` replace, never merge.
            Where the key is of text, a number is text as it is written: `name=0042`, `name=42`.
    Raises:
        UserError: the file is missing or no YAML, a key is unknown, a value has the wrong type or does not fit; the
            message names the allowed ones.
    """
    return read_config(path, overrides, RunConfig, _SECTIONS)


def read_config(
    path: str | Path, overrides: list[str] | tuple[str, ...], top: type[T], sections: Mapping[str, Section]
) -> T:
    """Read a YAML as a configuration of any kind; see `load_config`.

    Args:
        top: its dataclass, with the fields `name`, `runs_dir` and one for each section.
        sections: the dataclass of each section, or what finds it by the `name` that stands in the section.
    """
    path = config_file(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from error
    plain = read_yaml(text, str(path)) or {}  # of an empty file
    if not isinstance(plain, dict):
        raise UserError(f"{path}: expected a mapping of keys at the top level, got {type(plain).__name__}")
    _require_plain(plain, str(path))
    for override in overrides:
        _apply_override(plain, override)
    return _from_dict(plain, _Source(str(path), overrides), top, sections)


def config_from_dict(plain: dict[str, Any]) -> RunConfig:
    """Build and check a `RunConfig` from nested plain dictionaries (as `config_to_dict` makes them)."""
    _require_plain(plain, "configuration")
    return _from_dict(plain, _Source("configuration"), RunConfig, _SECTIONS)


@dataclass(frozen=True)
class _Source:
    """Where values come from: a file, and the overrides of some of them."""

    file: str
    overrides: list[str] | tuple[str, ...] = ()

    def of(self, key: str) -> str:
        """For a message about `a.b`: the last override of it, of `a` or of `a.b.c`, else the file."""
        override = self._last_override(key)
        return f"override {override!r}" if override else self.file

    def text(self, key: str, value: Any) -> Any:
        """The value of a key that is text: what an override says, also where it reads as a number or a truth."""
        name, _, text = (self._last_override(key) or "").partition("=")
        return text.strip() if name.strip() == key and isinstance(value, bool | int | float) else value

    def _last_override(self, key: str) -> str | None:
        for override in reversed(self.overrides):
            shorter, longer = sorted([f"{override.partition('=')[0].strip()}.", f"{key}."], key=len)
            if longer.startswith(shorter):
                return override
        return None


def _from_dict(plain: dict[str, Any], source: _Source, top: type[T], sections: Mapping[str, Section]) -> T:
    classes = {}
    for name, section in sections.items():
        if not isinstance(section, type):
            values = plain.get(name)
            if not isinstance(values, dict) or not isinstance(values.get("name"), str):
                raise UserError(f"{source.of(f'{name}.name')}: expected {name}.name, a string naming the {name}")
            section = section(values["name"])
        classes[name] = section
    top_level = [f.name for f in dataclasses.fields(cast(Any, top))]
    for key in plain:
        if key not in top_level:
            raise UserError(f"{source.of(str(key))}: unknown key {key!r}{_suggest(str(key), top_level)}")
    built = {name: _build_section(cls, plain.get(name, {}), name, source) for name, cls in classes.items()}
    scalars = {name: source.text(name, plain[name]) for name in ("name", "runs_dir") if name in plain}
    if "name" not in scalars:
        raise UserError(f"{source.file}: expected name, the run's directory under runs_dir")
    for name, value in scalars.items():
        if not isinstance(value, str):
            raise UserError(f"{source.of(name)}: {name}: expected a string, got {value!r}")
    return top(**scalars, **built)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries of a configuration of any kind; for a `RunConfig` the inverse of `config_from_dict`."""
    plain = dataclasses.asdict(config)
    return {  # the name of a section says what its other keys are
        key: {"name": value["name"], **value} if isinstance(value, dict) and "name" in value else value
        for key, value in plain.items()
    }


def config_to_yaml(config: Any) -> str:
    """The complete configuration as YAML."""
    return to_yaml(config_to_dict(config))


def to_yaml(plain: dict[str, Any]) -> str:
    """Plain values as YAML, in the order that they have."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(text: str, what: str) -> Any:
    """Plain values out of a YAML that anybody may have written; no tag, anchor or interpolation is obeyed.

    Raises:
        UserError: it is no such YAML; the message begins with `what`.
    """
    if len(text) > _MAX_CHARACTERS:
        raise UserError(f"{what}: expected a configuration of at most {_MAX_CHARACTERS} characters, got {len(text)}")
    if "${" in text:
        raise UserError(f"{what}: interpolation (`${{`) is not supported; write the value itself")
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an int of over 4300 digits
        raise UserError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """Reads numbers as they are written: 1e-3 is one, while 010, 1:30 and yes, which YAML 1.1 turns into 8, 90 and
    True, stay text. Refuses tags, anchors, aliases, keys that come twice, and a deep nest before it is read."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's way)
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        is_plain = not isinstance(event, yaml.AliasEvent) and event.anchor is None and event.tag is None
        if not is_plain or self._depth == _MAX_DEPTH:
            refused = "anchors (`&`), aliases (`*`) and tags (`!`) are not supported; write the value itself"
            problem = f"nested deeper than {_MAX_DEPTH}" if is_plain else refused
            raise yaml.MarkedYAMLError(None, None, problem, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            [(key, _)] = Counter(str(key.value) for key, _ in node.value).most_common(1)
            raise yaml.MarkedYAMLError(None, None, f"the key {key!r} comes twice", node.start_mark)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` or YAML 1.1 would read as something else."""


for _kind, _pattern in {
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?i:inf))|\.(?i:nan)",
}.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), None)


def _build_section(cls: type, values: Any, name: str, source: _Source) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{source.of(name)}: {name}: expected a mapping of keys, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            full, others = f"{name}.{printable(str(key))}", _suggest(str(key), list(fields))
            raise UserError(f"{source.of(full)}: unknown key {full}{others}")
    typed = {}
    for key, item in fields.items():
        full = f"{name}.{key}"
        if key in values:
            value = source.text(full, values[key]) if item.type is str else values[key]
            try:
                typed[key] = _typed(value, item.type)
            except TypeError:
                raise UserError(f"{source.of(full)}: {full}: expected {_type_name(item.type)}, got {value!r}") from None
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise UserError(f"{source.file}: {full} is missing; expected {_type_name(item.type)}")
    require_bounds(name, typed)  # of a model before it is made: it may loop over its layers
    return cls(**typed)


def _typed(value: Any, kind: Any) -> Any:
    """A plain value as a field of this type holds it: int becomes float, which is finite; bool is no number.

    Raises:
        TypeError: it cannot be held so.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is dict and isinstance(value, dict):
        return {_typed(key, arguments[0]): _typed(part, arguments[1]) for key, part in value.items()}
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    is_choice = origin is Literal and any(type(value) is type(choice) and value == choice for choice in arguments)
    if kind is Any or is_choice or (type(value) is kind and kind is not float):
        return value
    raise TypeError


def _require_plain(value: Any, what: str) -> None:
    """Raise where a number is beyond 64 bits, a text cannot be written down, or a value is left open (`???`)."""
    if isinstance(value, dict | list):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        for part in parts:
            _require_plain(part, what)
    elif isinstance(value, int) and value.bit_length() > 63:
        raise UserError(f"{what}: a number has {value.bit_length()} bits; expected at most 63")
    elif isinstance(value, str) and (value.encode("utf-8", "replace").decode() != value or "\0" in value):
        raise UserError(f"{what}: {value!r} is no text; write it without \\0 and \\ud800 to \\udfff")
    elif value == "???":
        raise UserError(f"{what}: `???` stands for a value that is missing; write the value")


def _apply_override(plain: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"override {override!r}: expected key=value, as train.num_steps=100")
    node = plain
    *parents, last = key.strip().split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} is not a group of keys")
    node[last] = read_yaml(text, f"override {override!r}: the value")
    _require_plain(node[last], f"override {override!r}")


def require_bounds(section: str, values: Mapping[str, Any]) -> None:
    """Raise where a number is beyond its `BOUNDS`."""
    for name, value in values.items():
        low, high = BOUNDS.get(f"{section}.{name}", (-math.inf, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"{section}.{name}: expected a number from {low} to {high}, got {value}")


def _suggest(key: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(key, allowed, n=1)
    return (f"; did you mean {close[0]}?" if close else "") + f" Allowed: {', '.join(sorted(allowed))}"


def _type_name(annotation: Any) -> str:
    if annotation is float:
        return "a finite number"
    if get_origin(annotation) is Literal:
        values = get_args(annotation)
        return f"one of {', '.join(str(each).lower() if isinstance(each, bool) else str(each) for each in values)}"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
