"""Training: one flat loop, from chunk to checkpoint. It knows models by their interface only.

The same configuration again resumes the run from its last checkpoint, bit for bit on a CPU. Checkpoints, validations
and samples wait for the step that completes an update; so does a signal.

Shape letters: B lanes of this rank or micro-batch, T codes of a chunk.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from ct_audio.checkpoint import (
    as_module,
    find_checkpoint,
    flat_config,
    load_checkpoint,
    read_state,
    require_same_run,
    run_lock,
    save_checkpoint,
    split_memory,
    write_config,
)
from ct_audio.config import RunConfig, config_to_yaml, load_config
from ct_audio.corpus import Corpus, open_corpus
from ct_audio.distributed import (
    World,
    all_gather,
    all_reduce_sum,
    choose_device,
    data_parallel,
    distributed_world,
    no_synchronisation,
    on_first_rank,
)
from ct_audio.errors import UserError
from ct_audio.evaluate import evaluate_nll
from ct_audio.losses import nats_to_bits
from ct_audio.metrics import MetricsWriter, memory_use_mib, read_metrics, spectrogram_figure
from ct_audio.models import SequenceModel, build_model
from ct_audio.models.memory import detach_memory
from ct_audio.optim import (
    clip_gradients,
    completes_update,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    update_steps,
)
from ct_audio.sample import sample_codes
from ct_audio.wav import write_wav
from ct_audio.window_stream import Chunk, WindowStream, split_chunk

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class NonFiniteLossError(UserError):
    """The loss, or a gradient, is NaN or infinite; the weights have not been touched by it."""


class ChunkLoss(nn.Module):
    """Forward pass and losses of a chunk as one module, so that data parallelism wraps all of it."""

    def __init__(self, model: SequenceModel, *, device_type: str, precision: str) -> None:
        super().__init__()
        self.model = as_module(model)
        self._device_type = device_type
        self._autocast = precision == "bfloat16"

    def forward(
        self,
        inputs: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        memory: Any,
        document_starts: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T"], Any, dict[str, Float[Tensor, ""]]]:
        """NLL of each target in nats, next memory, auxiliary losses."""
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._autocast):
            output = self.model(inputs, memory, document_starts=document_starts)
            nll = self.model.nll(output.features, targets)  # type: ignore[operator]
        return nll, output.memory, output.auxiliary_losses


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
    """What one call of the training command works with; signals that come and losses that are NaN are noted here."""

    config: RunConfig
    world: World
    device: torch.device
    corpus: Corpus
    model: SequenceModel
    loss: nn.Module
    optimizer: torch.optim.Adam
    stream: WindowStream
    memories: list[Any]
    progress: Progress
    metrics: MetricsWriter
    signals: list[int]
    began: float
    failures: list[str] = field(default_factory=list)

    @property
    def codes_per_step(self) -> int:
        """Codes that all ranks together consume in a step."""
        return self.config.data.num_lanes * self.config.data.chunk_length

    @property
    def audio_seconds(self) -> float | None:
        """Seconds of audio seen; None for text."""
        rate = self.corpus.codec.sample_rate_hz
        return self.progress.step * self.codes_per_step / rate if rate else None


def train(config: RunConfig) -> int:
    """Train a model, or go on with it, until `train.num_steps` are completed.

    Returns:
        exit status: 0 when the run is complete; 128 + the signal's number when SIGINT, SIGTERM or SIGUSR1 stopped it,
        after it was saved.
    Raises:
        UserError: configuration, corpus and run directory do not fit, or another process trains the run.
        NonFiniteLossError: the loss is NaN or infinite.
    """
    with distributed_world() as world, contextlib.ExitStack() as stack:
        if on_first_rank(lambda: _enter_run(stack, config)):
            if world.is_first:
                print(f"{config.run_dir} is finished: {config.train.num_steps} steps; nothing to do", flush=True)
            return 0
        session = _set_up(config, world, stack.enter_context(_caught_signals()))
        stack.callback(session.metrics.close)
        return _loop(session) or _validate_whole_split(session)


def _loop(session: Session) -> int:
    """Steps until the run is complete (returns 0) or a signal has come (128 + its number)."""
    config, progress, optimizer = session.config, session.progress, session.optimizer
    num_steps = config.train.num_steps
    _when_due(session, stop=0)  # what a signal has put off in the session before
    hidden = None if session.world.is_first else True
    with tqdm(total=num_steps, initial=progress.step, unit="step", disable=hidden, leave=False) as bar:
        for step in range(progress.step, num_steps):
            step_began, stop = time.perf_counter(), 0
            progress.add(_forward_and_backward(session, step))
            if completes_update(step, config.optim):
                stop = _agree(session)
                norms = clip_gradients(session.model.gradient_groups(), config.optim.max_gradient_norm)
                _require_finite_gradients(session, norms, step)
                set_learning_rate(optimizer, learning_rate(step, config.optim))
                optimizer.step()
                optimizer.zero_grad()
                progress.add({"updates": 1, **{f"gradient_norm/{group}": norm for group, norm in norms.items()}})
            progress.step = step + 1
            seconds = time.perf_counter() - step_began
            progress.training_seconds += seconds
            progress.add({"steps": 1, "seconds": seconds})
            bar.update()
            if progress.is_due("log", config.train.log_every_steps, num_steps):
                _log(session, bar)
            if completes_update(step, config.optim):
                _when_due(session, stop=stop)
            if stop:
                _say(session, f"stopped by {signal.Signals(stop).name} and saved at step {progress.step}")
                return 128 + stop
    return 0


def _forward_and_backward(session: Session, step: int) -> dict[str, float]:
    """Add a step's gradients, weighted so that an update's are means over its period; returns mean losses by tag."""
    period, parts = (
        update_steps(step, session.config.optim),
        split_chunk(session.stream.next_chunk(), len(session.memories)),
    )
    means: dict[str, float] = {}
    for index, part in enumerate(parts):
        synchronises = step + 1 == period.stop and index + 1 == len(parts)
        inputs, targets, document_starts = (
            None if tensor is None else tensor.to(session.device) for tensor in part[:3]
        )
        with contextlib.nullcontext() if synchronises else no_synchronisation(session.loss):
            nll, memory, auxiliary = session.loss(inputs, targets, session.memories[index], document_starts)
            losses = {"nll/train_nats": nll.mean(), **auxiliary}
            (torch.stack(list(losses.values())).sum() / (len(parts) * len(period))).backward()
        session.memories[index] = detach_memory(memory)
        values = torch.stack([loss.detach().double() for loss in losses.values()]).tolist()
        if not all(map(math.isfinite, values)):
            session.failures.append(
                _describe_failure(session, step, index, part, nll.detach(), dict(zip(losses, values, strict=True)))
            )
        for tag, value in zip(losses, values, strict=True):
            means[tag] = means.get(tag, 0.0) + value / len(parts)
    return means


def _when_due(session: Session, *, stop: int) -> None:
    """After an update: validate, sample, save, each if it is due; a signal (`stop`) puts off all but the saving."""
    settings, progress, improved = session.config.train, session.progress, False
    if not stop and progress.is_due("valid", settings.valid_every_steps, settings.num_steps):
        improved = _validate(session) and settings.checkpoint_every_steps > 0
    if not stop and progress.is_due("sample", settings.sample_every_steps, settings.num_steps):
        _sample(session)
    if stop or improved or progress.is_due("checkpoint", settings.checkpoint_every_steps, settings.num_steps):
        _save(session, is_best=improved)


def _agree(session: Session) -> int:
    """What has come on any rank since the last update, before it reaches the weights: a signal's number, or 0.

    Raises:
        NonFiniteLossError: on every rank, with what the rank concerned has to say.
    """
    flags = torch.tensor([float(bool(session.failures))] + [float(number in session.signals) for number in _SIGNALS])
    flags = all_reduce_sum(flags).tolist()
    if flags[0]:
        failures = [failure for part in all_gather(session.failures) for failure in part]
        raise NonFiniteLossError(failures[0] + _last_good(session))
    return next((int(number) for number, flag in zip(_SIGNALS, flags[1:], strict=True) if flag), 0)


def _describe_failure(
    session: Session, step: int, index: int, part: Chunk, nll: Float[Tensor, "B T"], values: dict[str, float]
) -> str:
    bad = (~torch.isfinite(nll)).nonzero()
    if not len(bad):
        name = next(tag for tag, value in values.items() if not math.isfinite(value))
        return f"step {step + 1}: the loss {name} is {values[name]}"
    lane, offset = (int(place) for place in bad[0])
    first_lane = session.world.rank * len(session.memories) + index
    position = (int(part.positions[lane]) + offset) % session.stream.num_codes_used
    return (
        f"step {step + 1}: the loss is {nll[lane, offset].item()} in lane {first_lane * len(part.inputs) + lane}, "
        f"corpus position {position} of the train split"
    )


def _require_finite_gradients(session: Session, norms: dict[str, float], step: int) -> None:
    for group, norm in norms.items():
        if not math.isfinite(norm):
            raise NonFiniteLossError(f"step {step + 1}: the gradient norm of {group} is {norm}" + _last_good(session))


def _last_good(session: Session) -> str:
    checkpoint = find_checkpoint(session.config.run_dir, "last")
    kept = f"the last good checkpoint, {checkpoint.name}, is kept" if checkpoint else "nothing was saved yet"
    return f"; {kept}; lower optim.peak_learning_rate or lengthen optim.warmup_steps, and choose another name"


def _log(session: Session, bar: tqdm) -> None:
    """Means since the last log, over all ranks."""
    progress, config = session.progress, session.config
    tags = sorted(progress.sums)
    sums = torch.tensor([progress.sums[tag] for tag in tags], dtype=torch.float64)
    means = dict(zip(tags, (all_reduce_sum(sums) / session.world.world_size).tolist(), strict=True))
    steps, updates, seconds = means.pop("steps"), means.pop("updates", 0), means.pop("seconds")
    values = {tag: total / (updates if tag.startswith("gradient_norm/") else steps) for tag, total in means.items()}
    values["nll/train_bits"] = nats_to_bits(values["nll/train_nats"])
    values["optim/learning_rate"] = learning_rate(progress.step - 1, config.optim)
    values["optim/update_period"] = len(update_steps(progress.step - 1, config.optim))
    rate = steps * session.codes_per_step / seconds
    values["throughput/codes_per_second"] = rate
    if session.corpus.codec.sample_rate_hz:
        values["throughput/times_real_time"] = rate / session.corpus.codec.sample_rate_hz
    values["throughput/training_seconds"] = progress.training_seconds
    _write_scalars(session, values | memory_use_mib())
    progress.last["log"], progress.sums = progress.step, {}
    bar.set_postfix_str(f"{values['nll/train_nats']:.4f} nats", refresh=False)
    if bar.disable:  # not a terminal
        left = (config.train.num_steps - progress.step) * seconds / steps
        _say(
            session,
            f"step {progress.step}/{config.train.num_steps}  nll {values['nll/train_nats']:.4f} nats "
            f"{values['nll/train_bits']:.4f} bits  {rate:.0f} codes/s  {left / 60:.1f} min left",
        )


def _validate(session: Session) -> bool:
    """Score the fixed stretch; returns whether it is the best so far. A signal breaks it off and puts it off."""
    progress, nll_nats = session.progress, _valid_nll(session, max_codes=session.config.train.valid_codes or None)
    if nll_nats is None:
        return False
    if not math.isfinite(nll_nats):
        raise NonFiniteLossError(f"step {progress.step}: the validation NLL is {nll_nats}" + _last_good(session))
    progress.last["valid"] = progress.step
    _write_scalars(session, {"nll/valid_nats": nll_nats, "nll/valid_bits": nats_to_bits(nll_nats)})
    _say(session, f"step {progress.step}  valid nll {nll_nats:.4f} nats {nats_to_bits(nll_nats):.4f} bits")
    if progress.best_valid_nll_nats is not None and nll_nats >= progress.best_valid_nll_nats:
        return False
    progress.best_valid_nll_nats = nll_nats
    return True


def _validate_whole_split(session: Session) -> int:
    """At the end of a run: score all of the validation split; returns the exit status."""
    if session.config.train.valid_every_steps == 0:
        return 0
    nll_nats = _valid_nll(session, max_codes=None)
    if nll_nats is None:
        return 128 + on_first_rank(lambda: session.signals[0])
    _write_scalars(session, {"nll/valid_full_nats": nll_nats, "nll/valid_full_bits": nats_to_bits(nll_nats)})
    session.metrics.flush()
    _say(session, f"whole validation split: {nll_nats:.4f} nats {nats_to_bits(nll_nats):.4f} bits a code")
    return 0


class _Interrupted(Exception):  # noqa: N818
    """Breaks off a validation."""


def _valid_nll(session: Session, *, max_codes: int | None) -> float | None:
    """Mean NLL in nats over the beginning of the validation split, on rank 0; None if a signal broke it off."""
    config, codec, split = session.config, session.corpus.codec, session.corpus.split("valid")

    def stop_at_signal(_positions: Any, _nll: Any) -> None:
        if session.signals:
            raise _Interrupted

    def score() -> float | None:
        autocast = config.train.precision == "bfloat16"
        try:
            with torch.autocast(session.device.type, torch.bfloat16, enabled=autocast):
                return evaluate_nll(
                    session.model,
                    split.codes,
                    start_code=codec.start_code,
                    chunk_length=config.data.chunk_length,
                    document_offsets=split.document_offsets,
                    reset_memory_at_document=config.data.reset_memory_at_document,
                    max_codes=max_codes,
                    on_nll=stop_at_signal,
                    progress="validate",
                ).nll_nats
        except _Interrupted:
            return None

    return on_first_rank(score)


def _sample(session: Session) -> None:
    """Sample some audio on rank 0, to samples/ and to TensorBoard; the seed is the same every time."""
    progress, codec, settings = session.progress, session.corpus.codec, session.config.train
    progress.last["sample"] = progress.step
    rate = codec.sample_rate_hz
    if rate is None or not session.world.is_first:
        return
    num_codes, codes = max(1, round(settings.sample_seconds * rate)), []
    steps = sample_codes(
        session.model, num_lanes=1, num_codes=num_codes, seed=settings.seed, start_code=codec.start_code
    )
    for code, _ in tqdm(steps, total=num_codes, desc="sample", unit="code", leave=False, disable=None):
        codes.append(int(code))
        if session.signals:
            steps.close()
            return
    waveform = codec.decode(np.array(codes, dtype=np.uint8))
    directory = session.config.run_dir / "samples"
    directory.mkdir(exist_ok=True)
    write_wav(directory / f"step_{progress.step:08d}_0.wav", waveform, rate)
    session.metrics.audio("sample/0", waveform, step=progress.step, sample_rate_hz=rate)
    session.metrics.figure("sample_spectrogram/0", spectrogram_figure(waveform, rate), step=progress.step)


def _save(session: Session, *, is_best: bool) -> None:
    progress = session.progress
    progress.last["checkpoint"] = progress.step
    progress.wall_seconds = time.perf_counter() - session.began
    session.metrics.flush()
    save_checkpoint(
        session.config.run_dir,
        config=session.config,
        model=session.model,
        optimizer=session.optimizer,
        memories=session.memories,
        state={
            "step": progress.step,
            "progress": dataclasses.asdict(progress),
            "stream": session.stream.state_dict(),
            "corpus_fingerprint": session.corpus.fingerprint,
        },
        world=session.world,
        is_best=is_best,
    )


def _enter_run(stack: contextlib.ExitStack, config: RunConfig) -> bool:
    """On rank 0: lock the run's directory and check that it is this configuration's; returns whether it is finished."""
    stack.enter_context(run_lock(config.run_dir))
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
            if config.train.valid_every_steps == 0 or any("nll/valid_full_nats" in line for line in done):
                return True
    write_config(config.run_dir, config)
    return False


def _set_up(config: RunConfig, world: World, signals: list[int]) -> Session:
    """Open, build and, where there is a checkpoint, load everything; a new run gets its first checkpoint."""
    settings, data = config.train, config.data
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    device = choose_device(settings.device, local_rank=world.local_rank)
    corpus = open_corpus(data.corpus)
    stream = WindowStream(
        corpus.split("train").codes,
        corpus.split("train").document_offsets,
        start_code=corpus.codec.start_code,
        chunk_length=data.chunk_length,
        num_lanes=data.num_lanes,
        reset_memory_at_document=data.reset_memory_at_document,
        rank=world.rank,
        world_size=world.world_size,
    )
    num_lanes = data.num_lanes // world.world_size
    _check(config, corpus, num_lanes)
    torch.manual_seed(settings.seed)
    model = build_model(config)
    as_module(model).to(device, torch.float64 if settings.precision == "float64" else None)
    torch.manual_seed(settings.seed + 1_000_003 * (world.rank + 1))  # dropout differs between ranks
    optimizer = make_optimizer(model, config.optim)
    memories = split_memory(model.zero_memory(num_lanes), num_lanes, settings.num_micro_batches)
    checkpoint, progress = on_first_rank(lambda: find_checkpoint(config.run_dir, "last")), Progress()
    if checkpoint is not None:
        lanes = {"num_lanes": num_lanes, "num_micro_batches": settings.num_micro_batches}
        memories, state = load_checkpoint(checkpoint, model=model, optimizer=optimizer, world=world, **lanes)
        if state["corpus_fingerprint"] != corpus.fingerprint:
            raise UserError(
                f"data.corpus = {data.corpus} holds other codes than when {config.run_dir} was started; "
                "bring that corpus back, or choose another name"
            )
        stream.load_state_dict(state["stream"])
        progress = Progress(**state["progress"])
    loss = data_parallel(ChunkLoss(model, device_type=device.type, precision=settings.precision), world)
    rate = corpus.codec.sample_rate_hz or math.inf
    metrics = MetricsWriter(
        config.run_dir,
        step=progress.step,
        audio_seconds=progress.step * data.num_lanes * data.chunk_length / rate,
        enabled=world.is_first,
    )
    began = time.perf_counter() - progress.wall_seconds
    session = Session(
        config, world, device, corpus, model, loss, optimizer, stream, memories, progress, metrics, signals, began
    )
    _announce(session, checkpoint)
    if checkpoint is None and settings.checkpoint_every_steps:
        _save(session, is_best=False)
    return session


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


def _announce(session: Session, checkpoint: Path | None) -> None:
    config, model = session.config, session.model
    counts = {group: sum(p.numel() for p in parameters) for group, parameters in model.gradient_groups().items()}
    what = ", ".join(f"{count:,} parameters of {group}" for group, count in counts.items())
    beginning = f"resumed at step {session.progress.step}" if checkpoint else "new run"
    _say(session, f"{config.run_dir}: {beginning}; {config.model.name} with {what}; {session.device}")
    session.metrics.text("config", config_to_yaml(config), step=session.progress.step)
    if checkpoint is None:
        session.metrics.hyperparameters(
            flat_config(config) | {f"parameters.{group}": count for group, count in counts.items()},
            ["nll/valid_nats", "nll/valid_bits", "nll/train_nats"],
        )


def _write_scalars(session: Session, values: dict[str, float]) -> None:
    progress = session.progress
    progress.wall_seconds = time.perf_counter() - session.began
    session.metrics.scalars(
        values, step=progress.step, wall_seconds=progress.wall_seconds, audio_seconds=session.audio_seconds
    )


def _say(session: Session, text: str) -> None:
    if session.world.is_first:
        with tqdm.external_write_mode():
            print(text, flush=True)


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """A list to which SIGINT, SIGTERM and SIGUSR1 append themselves instead of ending the process."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, lambda came, _frame: caught.append(came)) for number in _SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
