"""Learning: one flat loop, from unroll to checkpoint. The same configuration again resumes the run.

On a CPU a resumed run equals an uninterrupted one bit for bit, with actors in processes of their own too, where the
environments can be saved (object matching). All metrics are over environment steps.

Shape letters: B environments, T steps of an unroll.
"""

import contextlib
import math
import signal
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from ct_audio.agents.actors import SUMS, Unroll, open_actors, weights_of
from ct_audio.agents.agent import Agent
from ct_audio.agents.config import AgentConfig, LearnerConfig, load_agent_config
from ct_audio.agents.environments import Environments
from ct_audio.agents.vtrace import vtrace
from ct_audio.common.errors import UserError
from ct_audio.common.files import hold_alone, write_file
from ct_audio.common.signals import caught_signals
from ct_audio.models.interface import clip_gradients
from ct_audio.runs.checkpoint_files import find_checkpoint, read_state
from ct_audio.runs.config import config_to_yaml
from ct_audio.runs.metrics import MetricsWriter
from ct_audio.runs.same_run import flat_config, require_same_run
from ct_audio.training.checkpoint import load_session, save_checkpoint
from ct_audio.training.parallel import World
from ct_audio.training.schedules import set_learning_rate


@dataclass
class AgentProgress:
    """How far a run is; stands in state.json.

    Attributes:
        step: environment steps that have been learnt from.
        started: unrolls that have been started.
        wall_seconds: since the run began, over all sessions.
        sums: since the last log, by tag.
    """

    step: int = 0
    started: int = 0
    wall_seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        """Add to the sums."""
        for tag, value in values.items():
            self.sums[tag] = self.sums.get(tag, 0.0) + value


@dataclass
class _Learning:
    """What one call works with."""

    config: AgentConfig
    agent: Agent
    optimizer: torch.optim.Adam
    actors: list[Any]
    waiting: deque[int]
    progress: AgentProgress
    metrics: MetricsWriter
    began: float


def train_agent(config: AgentConfig) -> int:
    """Let an agent act and learn, or go on with it, until `train.num_steps` are completed.

    Returns:
        exit status: 0 when the run is complete; 128 + the signal's number when SIGINT, SIGTERM or SIGUSR1 stopped it,
        after it was saved.
    Raises:
        UserError: configuration, environment and run directory do not fit, another process works on the run, or the
            loss is not finite.
    """
    with contextlib.ExitStack() as stack:
        if _enter_run(stack, config):
            print(f"{config.run_dir} is finished: {config.train.num_steps} steps; nothing to do", flush=True)
            return 0
        signals = stack.enter_context(caught_signals())
        learning = _set_up(stack, config)
        return _loop(learning, signals)


def learner_losses(
    agent: Agent, unroll: Unroll, config: LearnerConfig
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Loss of an unroll, and its parts by tag: policy gradient, squared error of the value, entropy, losses of f_c.

    Source: Espeholt et al. 2018, section 4.2. Differs: means over steps, where the paper has sums.
    """
    rows = agent.rows(unroll.observations, unroll.last_actions, unroll.last_rewards)
    output = agent.stack(rows, unroll.memory, document_starts=unroll.starts)
    log_policy, values = agent.heads(output.rows)
    log_probabilities = log_policy.gather(2, unroll.actions[..., None])[..., 0]
    targets, advantages = vtrace(
        behaviour_log_probabilities=unroll.log_probabilities,
        log_probabilities=log_probabilities.detach(),
        rewards=unroll.rewards,
        discounts=config.discount * (~unroll.ended).to(values.dtype),
        values=values.detach(),
        bootstrap=unroll.bootstrap,
        importance_clip=config.importance_clip,
        trace_clip=config.trace_clip,
    )
    policy_loss = -(advantages * log_probabilities).mean()
    value_loss = 0.5 * (targets - values).square().mean()
    entropy = -(log_policy.exp() * log_policy).sum(dim=-1).mean()
    auxiliary = output.auxiliary_losses
    loss = policy_loss + config.value_cost * value_loss - config.entropy_cost * entropy
    parts = {"agent/policy_loss": policy_loss, "agent/value_loss": value_loss, "agent/entropy": entropy, **auxiliary}
    return loss + sum(auxiliary.values()), parts


def _enter_run(stack: contextlib.ExitStack, config: AgentConfig) -> bool:
    """Lock the run's directory and check that it is this configuration's; returns whether it is finished."""
    if not config.run_dir.exists():
        Environments(config.environment, seed=0).close()  # its errors, before anything is written
    config.run_dir.mkdir(parents=True, exist_ok=True)
    busy = f"another process is training {config.run_dir}; wait for it, or choose another name"
    stack.enter_context(hold_alone(config.run_dir / "train.lock", busy))
    checkpoint = find_checkpoint(config.run_dir, "last")
    if checkpoint is not None:
        require_same_run(load_agent_config(checkpoint / "config.yaml"), config)
        if read_state(checkpoint)["step"] >= config.train.num_steps:
            return True
    write_file(config.run_dir / "config.yaml", config_to_yaml(config).encode())
    return False


def _set_up(stack: contextlib.ExitStack, config: AgentConfig) -> _Learning:
    """Build and, where there is a checkpoint, load everything."""
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    checkpoint = find_checkpoint(config.run_dir, "last")
    actors = stack.enter_context(open_actors(config))
    torch.manual_seed(config.train.seed)
    env = Environments(config.environment, seed=0)
    agent = Agent(config.model, num_features=env.num_features, num_actions=env.num_actions)
    optimizer = torch.optim.Adam(
        [parameter for _, parameter in agent.trained_parameters()],
        lr=config.learner.learning_rate,
        eps=config.learner.epsilon,
        fused=True,
    )
    progress, waiting = AgentProgress(), deque[int]()
    if checkpoint is not None:
        progress = _progress(read_state(checkpoint))
        waiting = _waiting(config, progress)
        like = (tuple(actor.state(0)[0] for actor in actors), (_unroll_like(config, agent, env),) * len(waiting))
        where = {"model": agent, "optimizer": optimizer, "world": World()}
        (states, unrolls), _ = load_session(checkpoint, like=like, **where)
        for index, actor in enumerate(actors):
            own = [unroll for owner, unroll in zip(waiting, unrolls, strict=True) if owner == index]
            actor.load_state(states[index], own)
    elif not env.can_be_saved and config.train.checkpoint_every_steps:
        print(f"{config.environment.id} cannot be saved: a resumed run begins new episodes", flush=True)
    env.close()
    metrics = MetricsWriter(config.run_dir, step=progress.step)
    stack.callback(metrics.close)
    counts = {group: sum(p.numel() for p in parameters) for group, parameters in agent.gradient_groups().items()}
    what = ", ".join(f"{count:,} parameters of {group}" for group, count in counts.items())
    beginning = f"resumed at step {progress.step:,}" if checkpoint is not None else "new run"
    print(f"{config.run_dir}: {beginning}; {config.model.name} with {what}", flush=True)
    metrics.text("config", config_to_yaml(config), step=progress.step)
    if checkpoint is None:
        metrics.hyperparameters(flat_config(config), ["agent/success", "agent/return"])
    began = time.perf_counter() - progress.wall_seconds
    return _Learning(config, agent, optimizer, actors, waiting, progress, metrics, began)


def _progress(state: dict[str, Any]) -> AgentProgress:
    """What state.json says; raises `UserError` where that is no progress of an agent."""
    fields = state.get("progress", {})
    sums = fields.get("sums", {})
    fits = (
        fields.keys() == {"step", "started", "wall_seconds", "sums"}
        and fields["step"] == state["step"]
        and type(fields["started"]) is int
        and isinstance(sums, dict)
        and all(isinstance(value, float) for value in [fields["wall_seconds"], *sums.values()])
    )
    if not fits:
        raise UserError("state.json: its progress is not that of an agent; use another checkpoint or start a new run")
    return AgentProgress(**fields)


def _waiting(config: AgentConfig, progress: AgentProgress) -> deque[int]:
    """Whose unrolls wait, the oldest first: actors take turns."""
    learnt = progress.step // config.steps_per_unroll
    return deque(number % config.actors.num_actors for number in range(learnt, progress.started))


def _unroll_like(config: AgentConfig, agent: Agent, env: Environments) -> Unroll:
    """An unroll of zeros."""
    lanes, length = config.environment.num_environments, config.actors.unroll_length
    numbers, booleans = torch.zeros(lanes, length), torch.zeros(lanes, length, dtype=torch.bool)
    return Unroll(
        memory=agent.zero_memory(lanes),
        observations=torch.zeros(lanes, length, env.num_features),
        last_actions=numbers.long(),
        last_rewards=numbers,
        starts=booleans,
        actions=numbers.long(),
        log_probabilities=numbers,
        rewards=numbers,
        ended=booleans,
        bootstrap=torch.zeros(lanes),
        sums=torch.zeros(len(SUMS), dtype=torch.float64),
    )


def _loop(learning: _Learning, signals: list[int]) -> int:
    """Unrolls and updates until the run is complete (returns 0) or a signal has come (128 + its number)."""
    config, progress, waiting = learning.config, learning.progress, learning.waiting
    settings, agent, size = config.train, learning.agent, config.steps_per_unroll
    with tqdm(total=settings.num_steps, initial=progress.step, unit="step", leave=False, disable=None) as bar:
        while progress.step < settings.num_steps:
            began = time.perf_counter()
            while len(waiting) <= config.actors.lag:  # actors are `lag` unrolls ahead, with the weights of now
                index = progress.started % config.actors.num_actors
                learning.actors[index].start(weights_of(agent))
                waiting.append(index)
                progress.started += 1
            unroll = learning.actors[waiting.popleft()].result()
            acted = time.perf_counter()
            progress.add(_update(learning, unroll))
            progress.add({"seconds": time.perf_counter() - began, "seconds_acting": acted - began})
            before, progress.step = progress.step, progress.step + size
            bar.update(size)
            ends = progress.step >= settings.num_steps
            if ends or before // settings.log_every_steps < progress.step // settings.log_every_steps:
                _log(learning, bar)
            every = settings.checkpoint_every_steps
            if every and (ends or signals or before // every < progress.step // every):
                _save(learning)
            if signals and not ends:
                saved = "saved" if every else "not saved"
                print(f"stopped by {signal.Signals(signals[0]).name} and {saved} at step {progress.step}", flush=True)
                return 128 + signals[0]
    return 0


def _update(learning: _Learning, unroll: Unroll) -> dict[str, float]:
    """One update of the weights; what it adds to the sums."""
    config, agent, progress = learning.config.learner, learning.agent, learning.progress
    loss, parts = learner_losses(agent, unroll, config)
    loss.backward()
    norms = clip_gradients(agent.gradient_groups(), config.max_gradient_norm)
    values = {tag: float(part.detach()) for tag, part in parts.items()}
    values |= {f"gradient_norm/{group}": float(norm) for group, norm in norms.items()}
    bad = next((tag for tag, value in values.items() if not math.isfinite(value)), None)
    if bad is not None:
        raise UserError(
            f"step {progress.step}: {bad} is {values[bad]}; the weights have not been touched by it; lower "
            "learner.learning_rate, and choose another name"
        )
    set_learning_rate(learning.optimizer, _learning_rate(progress.step, config))
    learning.optimizer.step()
    agent.after_update()
    learning.optimizer.zero_grad()
    sums = dict(zip((f"sums/{name}" for name in SUMS), unroll.sums.tolist(), strict=True))
    return {**values, **sums, "updates": 1.0}


def _learning_rate(step: int, config: LearnerConfig) -> float:
    """Linear from the first to the final one."""
    share = min(1.0, step / config.decay_steps) if config.decay_steps else 0.0
    return config.learning_rate + share * (config.final_learning_rate - config.learning_rate)


def _log(learning: _Learning, bar: tqdm) -> None:
    """Means since the last log."""
    progress, config = learning.progress, learning.config
    sums, progress.sums = progress.sums, {}
    updates, seconds, acting = sums.pop("updates"), sums.pop("seconds"), sums.pop("seconds_acting")
    ended = {name: sums.pop(f"sums/{name}") for name in SUMS}
    values = {tag: total / updates for tag, total in sums.items()}
    if ended["trials"]:
        values["agent/success"] = ended["successes"] / ended["trials"]
    if ended["episodes"]:
        values["agent/return"] = ended["returns"] / ended["episodes"]
        values["agent/episode_length"] = ended["lengths"] / ended["episodes"]
    values["optim/learning_rate"] = _learning_rate(progress.step, config.learner)
    rate = updates * config.steps_per_unroll / seconds
    values["throughput/steps_per_second"] = rate
    values["throughput/share_of_time_acting"] = acting / seconds  # or waiting for actors in processes
    progress.wall_seconds = time.perf_counter() - learning.began
    learning.metrics.scalars(values, step=progress.step, wall_seconds=progress.wall_seconds)
    success = f"success {values['agent/success']:.3f}" if "agent/success" in values else "no trial ended"
    bar.set_postfix_str(success, refresh=False)
    if bar.disable:  # not a terminal
        total = config.train.num_steps
        returns = f"  return {values['agent/return']:.3f}" if "agent/return" in values else ""
        print(f"step {progress.step:,}/{total:,}  {success}{returns}  {rate:,.0f} steps/s", flush=True)


def _save(learning: _Learning) -> None:
    """A checkpoint of everything, unrolls that wait too."""
    progress, waiting = learning.progress, learning.waiting
    states, unrolls = [], {}
    for index, actor in enumerate(learning.actors):
        state, unrolls[index] = actor.state(waiting.count(index))
        states.append(state)
    nest = (tuple(states), tuple(unrolls[index].pop(0) for index in waiting))
    progress.wall_seconds = time.perf_counter() - learning.began
    learning.metrics.flush()
    save_checkpoint(
        learning.config.run_dir,
        config=learning.config,
        model=learning.agent,
        optimizer=learning.optimizer,
        memories=[nest],
        state={"step": progress.step, "progress": vars(progress).copy()},
        world=World(),
    )
