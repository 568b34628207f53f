"""A training session: the run's directory, set-up or resume of everything that the loop works with, and signals.

Shape letters: B lanes of this rank or micro-batch, T codes of a chunk.
"""

import contextlib
import dataclasses
import functools
import secrets
import shlex
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from ct_audio.common.errors import UserError
from ct_audio.common.figures import spectrogram_figure
from ct_audio.common.files import hold_alone, write_file
from ct_audio.data.codecs import write_codec_files
from ct_audio.data.corpus import Corpus, open_corpus
from ct_audio.data.lanes import WindowStream
from ct_audio.models import SequenceModel, build_model
from ct_audio.models.state import map_counts, map_memory, named_leaves
from ct_audio.runs.checkpoint_files import find_checkpoint, read_state
from ct_audio.runs.config import DataConfig, RunConfig, TrainConfig, config_to_yaml, load_config
from ct_audio.runs.device import choose_device
from ct_audio.runs.metrics import MetricsWriter, read_metrics, tensorboard_page
from ct_audio.runs.same_run import flat_config, require_same_run
from ct_audio.runs.weights_and_biases import WandbLogger
from ct_audio.training.checkpoint import load_checkpoint, split_memory
from ct_audio.training.monitor import Monitor
from ct_audio.training.parallel import World, all_gather, data_parallel, on_first_rank
from ct_audio.training.schedules import completes_update, make_optimizer, update_steps

T = TypeVar("T")

COMPARED_KEYS = frozenset(
    [f"model.{key}" for key in ("name", "front_end", "head", "num_layers", "width", "window_length", "memory_length")]
    + [f"model.compress{key}" for key in ("ed_memory_length", "ion_rate", "ion_function", "ion_loss")]
    + ["data.num_lanes", "data.chunk_length", "optim.peak_learning_rate", "train.seed"]
)
"""Columns of TensorBoard's table of runs, with the numbers of parameters; the whole configuration is a text there."""
SEEN_WITHIN_SECONDS = 60.0
"""How long a file of one machine may take to show on another, as NFS keeps what it knows of a directory."""
COMPARED_TAGS = ["nll/valid_nats", "nll/train_nats", "throughput/codes_per_second"]


class ChunkLoss(nn.Module):
    """Forward pass and losses of a chunk as one module, so that data parallelism wraps all of it.

    Args:
        device_type: "cpu" or "cuda".
        precision, compile: as in `TrainConfig`.
        backend: of torch.compile.
    """

    def __init__(
        self,
        model: SequenceModel,
        *,
        device_type: str,
        precision: str,
        compile: bool | str = False,
        backend: str = "inductor",
    ) -> None:
        super().__init__()
        self.model = model
        self._device_type = device_type
        self._autocast = precision == "bfloat16"
        self._replays, self._compiled = compile == "cuda_graphs", None
        if compile:
            mode: Any = {"mode": "reduce-overhead"} if self._replays and backend == "inductor" else {}
            self._compiled = torch.compile(self._losses, fullgraph=True, dynamic=None, backend=backend, **mode)

    def forward(
        self,
        inputs: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        memory: Any,
        document_starts: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T"], Any, dict[str, Float[Tensor, ""]]]:
        """NLL of each target in nats, next memory, auxiliary losses."""
        if self._compiled is None:
            return self._losses(inputs, targets, memory, document_starts)
        # A graph for a memory that is full and one for all others, not one for each number of codes that it lacks.
        until_full = [leaf for _, leaf in named_leaves(memory) if type(leaf) is int]
        not_within = (inputs.shape[1] + 1) * any(until_full)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # of the adaptive softmax
            if self._replays:
                torch.compiler.cudagraph_mark_step_begin()
            given = map_counts(lambda _: not_within, memory)
            nll, next_memory, losses = self._compiled(inputs, targets, given, document_starts)
        if self._replays:  # the next replay writes where these lie
            nll, next_memory = nll.clone(), map_memory(torch.clone, next_memory)
            losses = {name: loss.clone() for name, loss in losses.items()}
        if document_starts is None:
            left = iter(max(0, count - inputs.shape[1]) for count in until_full)
            next_memory = map_counts(lambda _: next(left), next_memory)
        return nll, next_memory, losses

    def _losses(
        self, inputs: Tensor, targets: Tensor, memory: Any, document_starts: Tensor | None
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._autocast):
            output = self.model(inputs, memory, document_starts=document_starts)
            nll = self.model.nll(output.features, targets)  # type: ignore[operator]
        return nll, output.memory, output.auxiliary_losses

    def run(self, function: Callable[[], T]) -> T:
        """Call a function that uses the model otherwise, see `parallel.run_sharded`."""
        return function()


@dataclass
class Progress:
    """How far a run is; stands in state.json, so that a resumed run reports as if it had never stopped.

    Attributes:
        step: steps completed.
        wall_seconds: since the run began, over all sessions.
        training_seconds: the part of it that went into steps (no validation, sampling, checkpoints).
        best_valid_nll_nats: of all validations.
        last: the step of the last log, validation, sample and checkpoint.
        sums: sums since the last log, by tag, and the "steps", "updates" and "seconds" that they are of.
    """

    step: int = 0
    wall_seconds: float = 0.0
    training_seconds: float = 0.0
    best_valid_nll_nats: float | None = None
    last: dict[str, int] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)

    def is_due(self, what: str, every_steps: int, num_steps: int) -> bool:
        """Whether a multiple of the period, or the end of the run, was reached since the last time."""
        last = self.last.get(what, 0)
        if every_steps == 0 or self.step == last:
            return False
        return self.step == num_steps or self.step // every_steps > last // every_steps

    def add(self, values: dict[str, float]) -> None:
        """Add to the sums."""
        for tag, value in values.items():
            self.sums[tag] = self.sums.get(tag, 0.0) + value


@dataclass
class Session:
    """What one call of the training command works with; signals that come are noted here.

    `optimizer` is None for a model without parameters; `positions` are where in the corpus the lanes of each step and
    micro-batch since the last look at `monitor` began; `last_has_held` says that a step from the last checkpoint has
    been finite.
    """

    config: RunConfig
    world: World
    device: torch.device
    corpus: Corpus
    model: SequenceModel
    loss: nn.Module
    optimizer: torch.optim.Adam | None
    stream: WindowStream
    memories: list[Any]
    progress: Progress
    metrics: MetricsWriter
    signals: list[int]
    began: float
    resumed: bool
    monitor: Monitor = field(default_factory=Monitor)
    positions: dict[tuple[int, int], Int[Tensor, " B"]] = field(default_factory=dict)
    last_has_held: bool = False

    @property
    def codes_per_step(self) -> int:
        """Codes that all ranks together consume in a step."""
        return self.config.data.num_lanes * self.config.data.chunk_length

    @property
    def audio_seconds(self) -> float | None:
        """Seconds of audio seen; None for text."""
        rate = self.corpus.codec.sample_rate_hz
        return self.progress.step * self.codes_per_step / rate if rate else None


def enter_run(stack: contextlib.ExitStack, config: RunConfig) -> bool:
    """On rank 0: lock the run's directory and check that it is this configuration's; returns whether it is finished."""
    if not config.run_dir.exists():
        open_corpus(config.data.corpus)  # its errors, before anything is written
    config.run_dir.mkdir(parents=True, exist_ok=True)
    busy = f"another process is training {config.run_dir}; wait for it, or choose another name"
    stack.enter_context(hold_alone(config.run_dir / "train.lock", busy))
    checkpoint = find_checkpoint(config.run_dir, "last")
    if checkpoint is not None:
        require_same_run(load_config(checkpoint / "config.yaml"), config)
        step = read_state(checkpoint)["step"]
        if step > config.train.num_steps:
            raise UserError(
                f"train.num_steps = {config.train.num_steps}, but {config.run_dir} has completed {step} already; "
                "num_steps may only grow"
            )
        if step == config.train.num_steps:
            done = [line for line in read_metrics(config.run_dir) if line["step"] == step]
            scored = config.train.valid_every_steps == 0 or not config.train.validate_whole_split
            if scored or any("nll/valid_full_nats" in line for line in done):
                return True
    write_file(config.run_dir / "config.yaml", config_to_yaml(config).encode())
    return False


def require_shared_directory(run_dir: Path, world: World) -> None:
    """Check that all ranks see the directory that rank 0 has made; they call it together.

    Raises:
        UserError: on every rank, where one of them sees another directory, or none.
    """
    if world.world_size == 1:
        return
    place = run_dir / "train.token"
    token = on_first_rank(lambda: _write_token(place))
    give_up = time.monotonic() + SEEN_WITHIN_SECONDS
    while not (seen := _holds(place, token)) and time.monotonic() < give_up:
        time.sleep(0.1)
    blind = [found for found in all_gather(None if seen else f"rank {world.rank} on {socket.gethostname()}") if found]
    on_first_rank(lambda: place.unlink(missing_ok=True))
    if blind:
        raise UserError(
            f"{', '.join(blind)} cannot see the run's directory of rank 0, {run_dir.absolute()}; all machines of a run "
            "need it: set runs_dir to a place on a file system that they share (the corpus may be local)"
        )


def _write_token(place: Path) -> str:
    token = secrets.token_hex(16)
    write_file(place, token.encode())
    return token


def _holds(place: Path, token: str) -> bool:
    try:
        return place.read_text() == token
    except OSError:
        return False


def set_up(config: RunConfig, world: World, signals: list[int]) -> Session:
    """Open, build and, where there is a checkpoint, load everything."""
    device = _claim_device(config.train, world)
    checkpoint = on_first_rank(lambda: find_checkpoint(config.run_dir, "last"))
    if checkpoint is not None and not Path(config.data.corpus).exists():
        raise UserError(
            f"data.corpus = {config.data.corpus} is not there (looked in {Path.cwd()}); where it has moved, add "
            "data.corpus=DIR to the command"
        )
    corpus = open_corpus(config.data.corpus)
    stream = _open_stream(config.data, corpus, world)
    num_lanes = config.data.num_lanes // world.world_size
    _check(config, corpus, num_lanes)
    settings, model = config.train, _build(config, world)
    if settings.checkpoint_layers:
        checkpoint_layers(model)
    loss = ChunkLoss(model, device_type=device.type, precision=settings.precision, compile=settings.compile)
    how: dict[str, Any] = {"device": device, "kind": settings.parallel, "units": model.shard_units()}
    loss = data_parallel(loss, world, **how)
    optimizer = make_optimizer(model, config.optim) if model.has_parameters else None
    memories = split_memory(model.zero_memory(num_lanes), num_lanes, settings.num_micro_batches)
    progress, before = Progress(), world.world_size
    if checkpoint is not None:
        lanes = {"num_lanes": num_lanes, "num_micro_batches": config.train.num_micro_batches}
        memories, state = load_checkpoint(checkpoint, model=model, optimizer=optimizer, world=world, **lanes)
        progress, before = _resume_stream(state, config, corpus, stream), state["world_size"]
    if world.is_first:
        write_codec_files(corpus.codec, config.run_dir)  # so that the run alone can be sampled
    second = None
    if world.is_first and config.train.logger == "wandb":
        second = WandbLogger(config.run_dir, flat_config(config))
    session = Session(
        config=config,
        world=world,
        device=device,
        corpus=corpus,
        model=model,
        loss=loss,
        optimizer=optimizer,
        stream=stream,
        memories=memories,
        progress=progress,
        metrics=MetricsWriter(config.run_dir, step=progress.step, enabled=world.is_first, second=second),
        signals=signals,
        began=time.perf_counter() - progress.wall_seconds,
        resumed=checkpoint is not None,
    )
    _announce(session, processes_before=before)
    return session


def _claim_device(settings: TrainConfig, world: World) -> torch.device:
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    device = choose_device(settings.device, local_rank=world.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose random generator is saved and whose memory is reported
    return device


def _open_stream(data: DataConfig, corpus: Corpus, world: World) -> WindowStream:
    return WindowStream(
        corpus.split("train").codes,
        corpus.split("train").document_offsets,
        start_code=corpus.codec.start_code,
        chunk_length=data.chunk_length,
        num_lanes=data.num_lanes,
        reset_memory_at_document=data.reset_memory_at_document,
        rank=world.rank,
        world_size=world.world_size,
    )


def _build(config: RunConfig, world: World) -> SequenceModel:
    """The model on the CPU, freshly initialised alike on every rank."""
    torch.manual_seed(config.train.seed)
    model = build_model(config)
    model.to(torch.float64 if config.train.precision == "float64" else None)
    torch.manual_seed(config.train.seed + 1_000_003 * (world.rank + 1))  # dropout differs between ranks
    return model


def checkpoint_layers(model: SequenceModel) -> None:
    """From here on backward passes run each layer again, of which only the inputs have been kept; no number changes.

    Raises:
        UserError: the model has no layers that are modules.
    """
    if not model.shard_units():
        raise UserError(
            f"train.checkpoint_layers: {model.config.name} has no layers that can be run again one by one; write "
            "train.checkpoint_layers=false"
        )
    for layer in model.shard_units():
        layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False)


def _resume_stream(state: dict[str, Any], config: RunConfig, corpus: Corpus, stream: WindowStream) -> Progress:
    """Put the stream where a checkpoint's state.json says; returns how far the run is."""
    if state.get("corpus_fingerprint") != corpus.fingerprint:
        raise UserError(
            f"data.corpus = {config.data.corpus} holds other codes than when {config.run_dir} was started "
            f"(fingerprint {corpus.fingerprint[:12]}, expected {str(state.get('corpus_fingerprint'))[:12]}); "
            "bring that corpus back, where it has moved add data.corpus=DIR, or choose another name"
        )
    stream.load_state_dict(state.get("stream", {}))
    return _progress_from_json(state.get("progress", {}), step=state["step"])


def _progress_from_json(fields: dict[str, Any], *, step: int) -> Progress:
    """What state.json says; raises `UserError` where that is no progress of a run."""
    last, sums = fields.get("last", {}), fields.get("sums", {})
    seconds = [fields.get(key, 0.0) for key in ("wall_seconds", "training_seconds")]
    fits = (
        fields.keys() <= {field.name for field in dataclasses.fields(Progress)}
        and fields.get("step") == step
        and isinstance(last, dict)
        and isinstance(sums, dict)
        and all(type(at) is int and 0 <= at <= step for at in last.values())
        and all(isinstance(value, float) for value in [*seconds, *sums.values()])
    )
    if not fits:
        raise UserError(f"state.json: progress does not fit step {step}; use another checkpoint or start a new run")
    return Progress(**fields)


def _check(config: RunConfig, corpus: Corpus, num_lanes: int) -> None:
    """What only corpus, processes and schedule together can tell."""
    settings = config.train
    if corpus.codec.vocab_size != config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}, but the corpus {config.data.corpus} has a codec of "
            f"{corpus.codec.vocab_size} codes; write model.vocab_size={corpus.codec.vocab_size}"
        )
    if num_lanes % settings.num_micro_batches:
        raise UserError(
            f"train.num_micro_batches = {settings.num_micro_batches} does not divide the {num_lanes} lanes of a "
            "process; change it or data.num_lanes"
        )
    if not completes_update(settings.num_steps - 1, config.optim):
        period = update_steps(settings.num_steps - 1, config.optim)
        raise UserError(
            f"train.num_steps = {settings.num_steps} ends within an update of {len(period)} steps; "
            f"write train.num_steps={period.stop}"
        )
    if settings.valid_every_steps:
        corpus.split("valid")


def _announce(session: Session, *, processes_before: int) -> None:
    config, model, world = session.config, session.model, session.world
    counts = {group: sum(p.numel() for p in parameters) for group, parameters in model.gradient_groups().items()}
    what = ", ".join(f"{count:,} parameters of {group}" for group, count in counts.items())
    beginning = f"resumed at step {session.progress.step}" if session.resumed else "new run"
    say(session, f"{config.run_dir}: {beginning}; {config.model.name} with {what}; {session.device}")
    if processes_before != world.world_size:
        say(
            session,
            f"{world.world_size} processes in place of {processes_before}: the lanes are dealt out anew; equal to the "
            "run with as many as before up to rounding, but for the draws of dropout",
        )
    steps, optim = config.train.num_steps, config.optim
    if session.optimizer and not session.resumed:
        unit, rate, length = session.corpus.codec.unit, session.corpus.codec.sample_rate_hz, config.data.chunk_length
        audio = f", {length / rate:.2g} s of audio" if rate else ""
        say(
            session,
            f"{steps} steps; a step takes a chunk of {length} codes ({unit}s{audio}) from each of "
            f"{config.data.num_lanes} lanes (streams that read the training split side by side)",
        )
    if session.optimizer and optim.decay_steps and steps > (end := optim.warmup_steps + optim.decay_steps):
        say(
            session,
            f"the learning rate stays at optim.final_learning_rate = {optim.final_learning_rate} from step {end} "
            f"on; a longer run needs a longer decay, as optim.decay_steps={steps - optim.warmup_steps}",
        )
    session.metrics.text("config", config_to_yaml(config), step=session.progress.step)
    say(session, f"curves: tensorboard --logdir {shlex.quote(config.runs_dir)}\n  then open {tensorboard_page()}")
    if not session.resumed or not session.metrics.had_events:  # a branch is resumed before it has logged anything
        compared = {key: value for key, value in flat_config(config).items() if key in COMPARED_KEYS}
        compared |= {f"parameters.{group}": count for group, count in counts.items()}
        session.metrics.hyperparameters(compared, COMPARED_TAGS)
        session.metrics.layout()
        _log_reference(session)


def _log_reference(session: Session) -> None:
    """To TensorBoard, beside the samples to come: a recording as long as they are, from the middle of the split."""
    codec, settings = session.corpus.codec, session.config.train
    rate, split = codec.sample_rate_hz, session.corpus.splits.get("valid")
    if rate is None or split is None or not settings.sample_every_steps or not session.world.is_first:
        return
    length = min(max(1, round(settings.sample_seconds * rate)), split.num_codes)
    begin = (split.num_codes - length) // 2
    waveform = codec.decode(np.asarray(split.codes[begin : begin + length]))
    session.metrics.audio("sample/reference", waveform, step=0, sample_rate_hz=rate)
    session.metrics.figure("sample_spectrogram/reference", spectrogram_figure(waveform, rate), step=0)


def say(session: Session, text: str) -> None:
    if session.world.is_first:
        with tqdm.external_write_mode():
            print(text, flush=True)
