"""Training: one flat loop, from chunk to checkpoint. It knows models by their interface only.

The same configuration again resumes the run from its last checkpoint, bit for bit on a CPU. Checkpoints, validations
and samples wait for the step that completes an update; so does a signal.

Shape letters: B lanes of this rank or micro-batch, T codes of a chunk.
"""

import contextlib
import dataclasses
import math
import signal
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ct_audio.common.errors import UserError
from ct_audio.common.figures import spectrogram_figure
from ct_audio.common.progress import Progress
from ct_audio.common.signals import SIGNALS, caught_signals
from ct_audio.common.units import nats_to_bits
from ct_audio.data.audio_files import write_wav
from ct_audio.data.lanes import split_chunk
from ct_audio.evaluation.nll import evaluate_nll, stretch_of
from ct_audio.models.interface import clip_gradients
from ct_audio.models.state import detach_memory, named_tensors
from ct_audio.runs.checkpoint_files import find_checkpoint, model_tensors
from ct_audio.runs.config import RunConfig
from ct_audio.runs.metrics import memory_use_mib
from ct_audio.sampling.sampler import Sampler
from ct_audio.training.checkpoint import drop_previous, go_back, save_checkpoint
from ct_audio.training.monitor import Failure
from ct_audio.training.parallel import (
    World,
    all_gather,
    all_reduce_sum,
    distributed_world,
    gathered,
    is_sharded,
    no_synchronisation,
    on_first_rank,
    own_part,
    run_sharded,
    set_timeout,
    whole,
)
from ct_audio.training.schedules import completes_update, learning_rate, set_learning_rate, update_steps
from ct_audio.training.session import Session, enter_run, require_shared_directory, say, set_up


class NonFiniteLossError(UserError):
    """The loss, or a gradient, is NaN or infinite; nothing of it has been saved."""


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
        return _train(config, world, stack)


def _train(config: RunConfig, world: World, stack: contextlib.ExitStack) -> int:
    if on_first_rank(lambda: enter_run(stack, config)):
        if world.is_first:
            print(f"{config.run_dir} is finished: {config.train.num_steps} steps; nothing to do", flush=True)
        return 0
    require_shared_directory(config.run_dir, world)
    session = set_up(config, world, stack.enter_context(caught_signals()))
    stack.callback(session.metrics.close)
    if session.optimizer is None:
        return _without_steps(session) or _validate_whole_split(session)
    if not session.resumed and config.train.checkpoint_every_steps:
        _save(session, is_best=False)  # so that from here on there is always one to go on from
    return _loop(session) or _validate_whole_split(session)


def _loop(session: Session) -> int:
    """Steps until the run is complete (returns 0) or a signal has come (128 + its number)."""
    config, progress, optimizer = session.config, session.progress, session.optimizer
    assert optimizer is not None
    num_steps, has_updated = config.train.num_steps, False
    _when_due(session, stop=0)  # what a signal has put off in the session before
    hidden = None if session.world.is_first else True
    with tqdm(total=num_steps, initial=progress.step, unit="step", disable=hidden, leave=False) as bar:
        for step in range(progress.step, num_steps):
            step_began, stop = time.perf_counter(), 0
            _forward_and_backward(session, step)
            if completes_update(step, config.optim):
                stop = _agree_on_signal(session)
                norms = clip_gradients(session.model.gradient_groups(), config.optim.max_gradient_norm)
                norms = {f"gradient_norm/{group}": whole(norm).double() for group, norm in norms.items()}
                session.monitor.check_norms(step, norms)
                session.monitor.add(norms, progress.sums)
                if not has_updated:  # what is slow once, as compilation, has been done on every rank
                    set_timeout(config.train.timeout_seconds)
                    has_updated = True
                set_learning_rate(optimizer, learning_rate(step, config.optim))
                optimizer.step()
                session.model.after_update()
                optimizer.zero_grad()
                progress.add({"updates": 1.0})
            progress.step = step + 1
            if stop or _is_anything_due(session):
                _look(session)
            seconds = time.perf_counter() - step_began
            progress.training_seconds += seconds
            progress.add({"steps": 1.0, "seconds": seconds})
            bar.update()
            if progress.is_due("log", config.train.log_every_steps, num_steps):
                _log(session, bar)
            if completes_update(step, config.optim):
                _when_due(session, stop=stop)
            if stop:
                say(session, f"stopped by {signal.Signals(stop).name} and saved at step {progress.step}")
                return 128 + stop
    return 0


def _without_steps(session: Session) -> int:
    """A run of a model without parameters: fit it, if it has `fit`, score it and save it as complete.

    Its validation NLL is written at the first and at the last step: a level line beside other models' curves.

    Returns:
        0; or 128 + the number of the signal that came before it was saved (the same command then starts afresh).
    """
    settings, progress = session.config.train, session.progress
    fit = getattr(session.model, "fit", None)
    if fit is not None and not session.resumed:
        fit(session.corpus.split("train").codes)
    for step in (1, settings.num_steps):
        if step > progress.step:
            progress.step = step
            if settings.valid_every_steps:
                _validate(session)
    if progress.is_due("sample", settings.sample_every_steps, settings.num_steps):
        _sample(session)
    stop = _agree_on_signal(session)
    if stop:
        return 128 + stop
    if progress.is_due("checkpoint", settings.checkpoint_every_steps, settings.num_steps):
        _save(session, is_best=True)
    return 0


def _forward_and_backward(session: Session, step: int) -> None:
    """Add a step's gradients, weighted so that an update's are means over its period; never waits for the device."""
    period, parts = (
        update_steps(step, session.config.optim),
        split_chunk(session.stream.next_chunk(), len(session.memories)),
    )
    means: dict[str, Tensor] = {}
    for index, part in enumerate(parts):
        synchronises = step + 1 == period.stop and index + 1 == len(parts)
        inputs, targets, document_starts = (
            None if tensor is None else tensor.to(session.device, non_blocking=True) for tensor in part[:3]
        )
        with contextlib.nullcontext() if synchronises else no_synchronisation(session.loss):
            nll, memory, auxiliary = session.loss(inputs, targets, session.memories[index], document_starts)
            losses = {"nll/train_nats": nll.mean(), **auxiliary}
            (torch.stack(list(losses.values())).sum() / (len(parts) * len(period))).backward()
        session.memories[index] = detach_memory(memory)
        session.monitor.check_losses(step, index, losses, nll)
        session.positions[step, index] = part.positions
        for tag, loss in losses.items():
            means[tag] = means.get(tag, 0.0) + loss.detach().double() / len(parts)
    session.monitor.add(means, session.progress.sums)


def _is_anything_due(session: Session) -> bool:
    """Whether the loop logs now or, at the end of an update, validates, samples or saves."""
    settings = session.config.train
    if session.progress.is_due("log", settings.log_every_steps, settings.num_steps):
        return True
    periods = {
        "valid": settings.valid_every_steps,
        "sample": settings.sample_every_steps,
        "checkpoint": settings.checkpoint_every_steps,
    }
    due = any(session.progress.is_due(what, every, settings.num_steps) for what, every in periods.items())
    return due and completes_update(session.progress.step - 1, session.config.optim)


def _look(session: Session) -> None:
    """Wait for the device and see what has been since the last look, on any rank.

    Raises:
        NonFiniteLossError: on every rank, with what the rank concerned has to say.
    """
    progress = session.progress
    failure, positions = session.monitor.look(progress.sums), session.positions
    session.positions = {}
    if all_reduce_sum(torch.tensor([float(failure is not None)])).item():
        own = None  # a loss before a norm of gradients, into which it has gone on all ranks
        if failure is not None:
            own = (failure.step, failure.part is None, _describe_failure(session, failure, positions))
        num_finite, _, what = min(found for found in all_gather(own) if found is not None)
        _note_held(session, num_finite)
        raise NonFiniteLossError(what + _last_good(session))
    _note_held(session, progress.step)


def _when_due(session: Session, *, stop: int) -> None:
    """After an update: validate, sample, save, each if it is due; a signal (`stop`) puts off all but the saving."""
    settings, progress, improved = session.config.train, session.progress, False
    if not stop and progress.is_due("valid", settings.valid_every_steps, settings.num_steps):
        improved = _validate(session) and settings.checkpoint_every_steps > 0
    if not stop and progress.is_due("sample", settings.sample_every_steps, settings.num_steps):
        _sample(session)
    if stop or improved or progress.is_due("checkpoint", settings.checkpoint_every_steps, settings.num_steps):
        _save(session, is_best=improved)
        if progress.last.get("valid") == progress.step:  # these weights have a finite NLL
            _has_held(session)


def _agree_on_signal(session: Session) -> int:
    """The number of a signal that has come on any rank since the last update, or 0."""
    flags = all_reduce_sum(torch.tensor([float(number in session.signals) for number in SIGNALS])).tolist()
    return next((int(number) for number, flag in zip(SIGNALS, flags, strict=True) if flag), 0)


def _describe_failure(session: Session, failure: Failure, positions: dict[tuple[int, int], Tensor]) -> str:
    where = f"step {failure.step + 1}"
    if failure.part is None:
        return f"{where}: the gradient norm of {failure.tag.removeprefix('gradient_norm/')} is {failure.value}"
    if failure.place is None:
        return f"{where}: the loss {failure.tag} is {failure.value}"
    (lane, offset), first_codes = failure.place, positions[failure.step, failure.part]
    first_lane = session.world.rank * len(session.memories) + failure.part
    position = (int(first_codes[lane]) + offset) % session.stream.num_codes_used
    return (
        f"{where}: the loss is {failure.value} in lane {first_lane * len(first_codes) + lane}, "
        f"corpus position {position} of the train split"
    )


def _note_held(session: Session, num_finite: int) -> None:
    """Note whether a whole update from the last checkpoint was finite, given that so many steps of the run were."""
    if update_steps(num_finite, session.config.optim).start > session.progress.last.get("checkpoint", 0):
        _has_held(session)


def _has_held(session: Session) -> None:
    """A step, or a validation, from the last checkpoint has been finite."""
    if not session.last_has_held and session.world.is_first:
        drop_previous(session.config.run_dir)
    session.last_has_held = True


def _last_good(session: Session) -> str:
    """For a message; a checkpoint from which no step has been finite is not good, and gives way to the one before."""

    def say_what_is_kept() -> str:
        deleted = None if session.last_has_held else go_back(session.config.run_dir)
        gone = f"no step from {deleted} was finite, so it is deleted; " if deleted else ""
        checkpoint = find_checkpoint(session.config.run_dir, "last")
        if checkpoint is None:
            return "nothing was saved yet"
        if deleted or session.last_has_held:
            return f"{gone}the last good checkpoint, {checkpoint.name}, is kept"
        return f"{checkpoint.name} is kept, but no step from it has been finite"

    advice = "lower optim.peak_learning_rate or lengthen optim.warmup_steps, and choose another name"
    return f"; {on_first_rank(say_what_is_kept)}; {advice}"


def _log(session: Session, bar: tqdm) -> None:
    """Means since the last log, over all ranks."""
    progress, config = session.progress, session.config
    means = _mean_sums(session)
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
        say(
            session,
            f"step {progress.step}/{config.train.num_steps}  nll {values['nll/train_nats']:.4f} nats "
            f"{values['nll/train_bits']:.4f} bits  {rate:.0f} codes/s  {left / 60:.1f} min left",
        )


def _mean_sums(session: Session) -> dict[str, float]:
    """`progress.sums`, the mean over all ranks."""
    sums = session.progress.sums
    total = all_reduce_sum(torch.tensor([sums[tag] for tag in sorted(sums)], dtype=torch.float64))
    return dict(zip(sorted(sums), (total / session.world.world_size).tolist(), strict=True))


def _validate(session: Session) -> bool:
    """Score the fixed stretch; returns whether it is the best so far. A signal breaks it off and puts it off."""
    progress, nll_nats = session.progress, _valid_nll(session, max_codes=session.config.train.valid_codes or None)
    if nll_nats is None:
        return False
    if not math.isfinite(nll_nats):
        raise NonFiniteLossError(f"step {progress.step}: the validation NLL is {nll_nats}" + _last_good(session))
    progress.last["valid"] = progress.step
    _write_scalars(session, {"nll/valid_nats": nll_nats, "nll/valid_bits": nats_to_bits(nll_nats)})
    say(session, f"step {progress.step}  valid nll {nll_nats:.4f} nats {nats_to_bits(nll_nats):.4f} bits")
    if progress.best_valid_nll_nats is not None and nll_nats >= progress.best_valid_nll_nats:
        return False
    progress.best_valid_nll_nats = nll_nats
    return True


def _validate_whole_split(session: Session) -> int:
    """At the end of a run: score all of the validation split, unless that is off; returns the exit status."""
    if session.config.train.valid_every_steps == 0 or not session.config.train.validate_whole_split:
        return 0
    nll_nats = _valid_nll(session, max_codes=None)
    if nll_nats is None:
        return 128 + _agree_on_signal(session)
    if not math.isfinite(nll_nats):
        raise NonFiniteLossError(f"whole validation split: the NLL is {nll_nats}" + _last_good(session))
    _has_held(session)
    _write_scalars(session, {"nll/valid_full_nats": nll_nats, "nll/valid_full_bits": nats_to_bits(nll_nats)})
    session.metrics.flush()
    say(session, f"whole validation split: {nll_nats:.4f} nats {nats_to_bits(nll_nats):.4f} bits per code")
    return 0


class _Interrupted(Exception):  # noqa: N818
    """Breaks off a validation."""


def _valid_nll(session: Session, *, max_codes: int | None) -> float | None:
    """Mean NLL in nats over the beginning of the validation split; None if a signal broke it off.

    It is one stream, so rank 0 scores it alone; a sharded model needs all ranks for it, which do the same in step.
    """
    stretch = stretch_of(session.corpus, "valid", session.config.data, num_codes=max_codes)

    rate, num_codes = session.corpus.codec.sample_rate_hz, len(stretch.codes)
    what = f"validating {num_codes / rate:.1f} s of audio" if rate else f"validating {num_codes:,} codes"
    what = what if session.world.is_first else None

    def stop_at_signal(_positions: Any, _nll: Any) -> None:
        stop = float(bool(session.signals))
        if all_reduce_sum(torch.tensor(stop)) if is_sharded(session.loss) else stop:
            raise _Interrupted

    def score() -> float | None:
        autocast = session.config.train.precision == "bfloat16"
        try:
            with torch.autocast(session.device.type, torch.bfloat16, enabled=autocast):
                return evaluate_nll(session.model, stretch, on_nll=stop_at_signal, progress=what).nll_nats
        except _Interrupted:
            return None

    if not is_sharded(session.loss):
        return on_first_rank(score)
    nll_nats = run_sharded(session.loss, score)
    return on_first_rank(lambda: nll_nats)


def _sample(session: Session) -> None:
    """Sample on rank 0, to samples/ and to TensorBoard, while the others wait; the seed is the same every time."""
    session.progress.last["sample"] = session.progress.step
    rate = session.corpus.codec.sample_rate_hz
    if rate is not None:
        with gathered(session.loss):
            on_first_rank(lambda: _sample_alone(session, rate))


def _sample_alone(session: Session, rate: int) -> None:
    progress, codec, settings = session.progress, session.corpus.codec, session.config.train
    num_codes, parts = max(1, round(settings.sample_seconds * rate)), []
    sampler = Sampler(session.model, num_lanes=1, seed=settings.seed, start_code=codec.start_code)
    blocks = sampler.blocks(num_codes)
    with Progress(total=num_codes, desc=f"sampling {num_codes / rate:.2g} s of audio", unit="code") as bar:
        for codes, _ in blocks:
            parts.append(codes[0].numpy(force=True))
            bar.update(codes.shape[1])
            if session.signals:
                blocks.close()
                return
    waveform = codec.decode(np.concatenate(parts).astype(np.uint8))
    directory = session.config.run_dir / "samples"
    directory.mkdir(exist_ok=True)
    write_wav(directory / f"step_{progress.step:08d}_0.wav", waveform, rate)
    session.metrics.audio("sample/0", waveform, step=progress.step, sample_rate_hz=rate)
    session.metrics.figure("sample_spectrogram/0", spectrogram_figure(waveform, rate), step=progress.step)


def _save(session: Session, *, is_best: bool) -> None:
    """Save what is finite; raises `NonFiniteLossError` on every rank where anything is not."""
    progress = session.progress
    _require_finite_state(session)
    progress.last["checkpoint"] = progress.step
    progress.sums = _mean_sums(session)  # state.json is rank 0's, and every rank goes on from it
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
            "codec": session.corpus.codec.to_json(),
        },
        world=session.world,
        is_best=is_best,
        keep_previous=session.last_has_held,
    )
    session.last_has_held = False


def _require_finite_state(session: Session) -> None:
    """An update from a finite loss may still destroy the weights, as when the learning rate is far too high."""
    tensors = model_tensors(session.model)
    for index, memory in enumerate(session.memories):
        tensors |= {f"memory {index}/{name}": tensor for name, tensor in named_tensors(memory)}
    if session.optimizer is not None:
        for name, parameter in session.model.trained_parameters():
            moments = session.optimizer.state.get(parameter, {})
            tensors |= {f"{name}, {key} of Adam": tensor for key, tensor in moments.items()}
    tensors = {name: own_part(tensor) for name, tensor in tensors.items()}
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    bad = [name for part in all_gather(bad) for name in part]
    if bad:
        raise NonFiniteLossError(
            f"step {session.progress.step}: not finite after the update: {bad[0]}" + _last_good(session)
        )


def _write_scalars(session: Session, values: dict[str, float]) -> None:
    progress = session.progress
    progress.wall_seconds = time.perf_counter() - session.began
    session.metrics.scalars(
        values, step=progress.step, wall_seconds=progress.wall_seconds, audio_seconds=session.audio_seconds
    )
