"""One episode of an agent, step by step: what it saw, did and got, and where in the past its attention lay.

Shape letters: L layers, T steps of the episode, F features of an observation, S keys of a window, A actions.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure

from ct_audio.agents.agent import Agent
from ct_audio.agents.config import CompressiveConfig, load_agent_config
from ct_audio.agents.environments import Environments
from ct_audio.common.errors import UserError
from ct_audio.models.compressive.layer import CompressiveLayer
from ct_audio.models.compressive.stack import CompressiveStack
from ct_audio.runs.checkpoint_files import find_checkpoint, load_model, read_state


class Attention(NamedTuple):
    """Attention from each step of an episode to each earlier one.

    Attributes:
        weights: of each layer, the mean over heads; rows sum to 1. Attention to a compressed row is shared evenly by
            the steps that it stands for.
        compressed: which of them went through the compressed memory.
    """

    weights: Float[np.ndarray, "L T T"]
    compressed: Bool[np.ndarray, "L T T"]


class Episode(NamedTuple):
    """What happened.

    Attributes:
        shown: what the environment showed before each step, as text; "" where it has none.
        images: the same as images, where the environment has some.
        actions, rewards: of each step.
        action_names: what the actions are called.
        policy: probability of each action.
        values: what the agent expected.
        attention: None for a memory without attention.
        success: +1 or -1 where the last step won or lost a trial, else 0.
        step: environment steps that the agent had learnt from.
    """

    shown: list[str]
    images: list[np.ndarray]
    actions: Int[np.ndarray, " T"]
    rewards: Float[np.ndarray, " T"]
    action_names: tuple[str, ...]
    policy: Float[np.ndarray, "T A"]
    values: Float[np.ndarray, " T"]
    attention: Attention | None
    success: int
    step: int


@torch.no_grad()
def watch_episode(run_dir: Path, *, seed: int = 0) -> Episode:
    """Let the agent of a run's last checkpoint play one episode from an empty memory; actions are drawn as in training.

    Raises:
        UserError: there is no checkpoint, or it does not fit.
    """
    checkpoint = find_checkpoint(run_dir, "last")
    if checkpoint is None:
        raise UserError(f"{run_dir} has no checkpoint; train it first, with train.checkpoint_every_steps above 0")
    config = load_agent_config(checkpoint / "config.yaml")
    alone = dataclasses.replace(config.environment, num_environments=1)
    env = Environments(alone, seed=seed)
    agent = Agent(config.model, num_features=env.num_features, num_actions=env.num_actions)
    load_model(checkpoint, agent)
    generator = torch.Generator().manual_seed(seed)
    observations = torch.from_numpy(env.reset())
    last_action, last_reward = torch.tensor([agent.num_actions]), torch.zeros(1)
    state, starts = agent.begin_steps(agent.zero_memory(1), 1), torch.tensor([True])
    rows, steps, ended, success, images = [], [], False, 0, []
    while not ended:
        text, image = env.show()
        images += [] if image is None else [image]
        rows.append(agent.rows(observations, last_action, last_reward)[0])
        log_policy, value, state = agent.act(observations, last_action, last_reward, state, starts=starts)
        action = torch.multinomial(log_policy.exp(), 1, generator=generator)[:, 0]
        outcome = env.step(action.numpy())
        shown = "" if text is None else text
        steps.append((shown, int(action), float(outcome.rewards[0]), log_policy[0].exp().numpy(), float(value)))
        ended, success = bool(outcome.ended[0]), int(outcome.successes[0])
        observations, starts = torch.from_numpy(outcome.observations), torch.tensor([False])
        last_action = action.masked_fill(torch.from_numpy(outcome.forced), agent.num_actions)
        last_reward = torch.from_numpy(outcome.rewards).float()
    env.close()
    attention = None
    if isinstance(config.model, CompressiveConfig):
        attention = episode_attention(cast(CompressiveStack, agent.stack), torch.stack(rows))
    shown, actions, rewards, policy, values = zip(*steps, strict=True)
    return Episode(
        shown=list(shown),
        images=images,
        actions=np.array(actions),
        rewards=np.array(rewards),
        action_names=env.action_names,
        policy=np.array(policy),
        values=np.array(values),
        attention=attention,
        success=success,
        step=read_state(checkpoint)["step"],
    )


@torch.no_grad()
def episode_attention(stack: CompressiveStack, rows: Float[torch.Tensor, "T D"]) -> Attention:
    """Attention of each layer from each row of a stream to each earlier one.

    Compressed rows of `most_used` stand for no fixed steps: their attention is left out.
    """
    num_layers, total, length = len(stack.layers), len(rows), stack.window_length
    found = Attention(np.zeros((num_layers, total, total)), np.zeros((num_layers, total, total), bool))
    with contextlib.ExitStack() as hooks:
        observers = [_Observer() for _ in range(num_layers)]
        for layer, observer in zip(stack.layers, observers, strict=True):
            hooks.callback(layer.register_forward_hook(observer).remove)
        memory = stack.zero_memory(1)
        for begin in range(0, total, length):
            memory = stack(rows[None, begin : begin + length], memory).memory
            for weights, compressed, observer in zip(*found, observers, strict=True):
                observer.place(weights[begin : begin + length], compressed[begin : begin + length], begin)
    return found


class _Observer:
    """A forward hook of a layer that runs one window of one lane at a time."""

    def __call__(self, module: torch.nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        layer, (rows, memory, view) = cast(CompressiveLayer, module), arguments
        self.weights = layer.attention(rows, memory, view)[0].mean(dim=0).double().numpy()  # T S
        self.geometry, self.has_groups = view.geometry, not layer.chooses_most_used

    def place(self, weights: np.ndarray, compressed: np.ndarray, begin: int) -> None:
        """Put the weights of a window that begins at step `begin` where the keys stood in the episode."""
        rate, num_compressed = self.geometry.compression_rate, self.geometry.compressed_memory_length
        firsts = begin - self.geometry.memory_length + rate * np.arange(-num_compressed, 0)
        for key, first in enumerate(firsts):  # groups begin where windows do: each is of the episode, or before it
            if first >= 0 and self.has_groups:
                weights[:, first : first + rate] += self.weights[:, key, None] / rate
                compressed[:, first : first + rate] = True
        seen = slice(max(0, begin - self.geometry.memory_length), begin + len(weights))
        weights[:, seen] += self.weights[:, self.weights.shape[1] - (seen.stop - seen.start) :]


def episode_text(episode: Episode) -> str:
    """A line for each step, and the steps that got most of the attention at the last one."""
    lines = []
    for t, shown in enumerate(episode.shown):
        action = episode.action_names[episode.actions[t]]
        probability = episode.policy[t, episode.actions[t]]
        reward = f"  reward {episode.rewards[t]:+.2f}" if episode.rewards[t] else ""
        lines.append(f"{t:4}  {shown:44}  {action} ({probability:.2f})  value {episode.values[t]:+.2f}{reward}")
    if episode.attention is not None:
        weights_of, through_of = (part[:, -1] for part in episode.attention)
        for layer, (weights, through) in enumerate(zip(weights_of, through_of, strict=True)):
            best = sorted(np.argsort(-weights)[:8])
            where = ", ".join(f"{t}{'c' if through[t] else ''} {weights[t]:.2f}" for t in best if weights[t] > 0.005)
            lines.append(f"attention of the last step, layer {layer}: {where}  (c: compressed)")
    outcome = {1: "won", -1: "lost", 0: "broken off"}[episode.success]
    return "\n".join([*lines, f"{outcome} after {len(episode.shown)} steps; return {episode.rewards.sum():+.2f}"])


def episode_figure(episode: Episode, title: str) -> Figure:
    """Scenes of the episode, the attention of each layer, value and policy over the steps."""
    total, attention = len(episode.shown), episode.attention
    layers = 0 if attention is None else len(attention.weights)
    heights = [1.2] * bool(episode.images) + [4.0] * layers + [1.6]
    figure = Figure(figsize=(8, 1.2 * sum(heights) + 0.6), layout="constrained")
    panels = iter(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    figure.suptitle(title)
    if episode.images:
        panel = next(panels)
        chosen = np.linspace(0, total - 1, 8).round().astype(int)
        panel.imshow(np.concatenate([np.pad(episode.images[t], ((1, 1), (2, 2), (0, 0))) for t in chosen], axis=1))
        width = episode.images[0].shape[1] + 4
        panel.set(
            yticks=[], xticks=[(i + 0.5) * width for i in range(len(chosen))], xticklabels=[f"{t}" for t in chosen]
        )
        panel.set_xlabel("what the environment shows at some of the steps")
    for layer in range(layers):
        assert attention is not None
        panel, weights = next(panels), attention.weights[layer]
        image = panel.imshow(np.sqrt(weights), vmin=0, vmax=1, cmap="magma", aspect="auto", interpolation="nearest")
        through = attention.compressed[layer].astype(float)
        if through.any():
            panel.contour(through, levels=[0.5], colors="cyan", linewidths=0.8)
        panel.set(ylabel="step that looks", xlabel=f"step that is looked at, layer {layer} (framed: compressed memory)")
        figure.colorbar(image, ax=panel, label="square root of attention")
    panel = next(panels)
    panel.plot(episode.values, label="value", color="black")
    for name, probability in zip(episode.action_names, episode.policy.T, strict=True):
        panel.plot(probability, label=f"probability of {name}", linewidth=1)
    panel.set(xlabel="step", xlim=(-0.5, total - 0.5))
    panel.legend(fontsize="small", ncols=4)
    return figure
