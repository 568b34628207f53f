"""Runs of agents: resumed equals uninterrupted, processes change nothing, a small task is learnt, watching, sweeps."""

import dataclasses
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_agents import MEMORIES, make_config

from ct_audio.agents import loop, sweep
from ct_audio.agents.actors import LocalActor, ProcessActor, weights_of
from ct_audio.agents.config import (
    ENVIRONMENTS,
    ActorsConfig,
    AgentConfig,
    AgentTrainConfig,
    CompressiveConfig,
    GymnasiumConfig,
    LearnerConfig,
    ObjectMatchingConfig,
    load_agent_config,
)
from ct_audio.agents.config import (
    MEMORIES as MEMORY_CONFIGS,
)
from ct_audio.agents.loop import train_agent
from ct_audio.agents.watch import episode_attention, episode_figure, episode_text, watch_episode
from ct_audio.common.errors import UserError
from ct_audio.models.compressive.stack import CompressiveStack
from ct_audio.runs.checkpoint_files import find_checkpoint, read_tensors
from ct_audio.runs.config import config_to_yaml
from ct_audio.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
STEPS = 24 * 8  # of an unroll of `make_config`
EIGHT_UNROLLS = AgentTrainConfig(num_steps=8 * STEPS, log_every_steps=2 * STEPS, checkpoint_every_steps=4 * STEPS)
TWO_AHEAD = ActorsConfig(num_actors=2, unroll_length=8, lag=3)


def run_config(runs_dir: Path, memory: str = "compressive", **sections: Any) -> AgentConfig:
    return make_config(memory, **{"runs_dir": str(runs_dir), "train": EIGHT_UNROLLS, "actors": TWO_AHEAD} | sections)


def last_tensors(config: AgentConfig) -> dict[str, Any]:
    checkpoint = find_checkpoint(config.run_dir, "last")
    assert checkpoint is not None
    files = ("model.safetensors", "training.safetensors", "memory-rank0.safetensors")
    return {f"{file}/{name}": tensor for file in files for name, tensor in read_tensors(checkpoint / file).items()}


def curves(config: AgentConfig) -> list[dict[str, Any]]:
    return [
        {tag: value for tag, value in line.items() if "second" not in tag and "time" not in tag}
        for line in read_metrics(config.run_dir)
    ]


def assert_same_run(one: AgentConfig, other: AgentConfig) -> None:
    expected, got = last_tensors(one), last_tensors(other)
    assert expected.keys() == got.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, got[name])]
    assert curves(one) == curves(other)


@pytest.mark.parametrize("memory", ["compressive", "lstm"])
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path: Path, memory: str) -> None:
    """Bit for bit, with two actors three unrolls ahead: stopped at a checkpoint, then by a signal between two."""
    whole = run_config(tmp_path / "whole", memory)
    assert train_agent(whole) == 0
    halves = run_config(tmp_path / "halves", memory)
    shorter = dataclasses.replace(EIGHT_UNROLLS, num_steps=4 * STEPS)
    assert train_agent(dataclasses.replace(halves, train=shorter)) == 0
    assert stopped_after(3, halves) == 128 + signal.SIGTERM
    assert train_agent(halves) == 0
    assert_same_run(whole, halves)
    tags = {tag for line in curves(whole) for tag in line}
    assert {"agent/success", "agent/return", "agent/episode_length", "agent/entropy", "agent/value_loss"} <= tags
    assert ("attention_reconstruction/layer_00" in tags) == (memory == "compressive")
    assert train_agent(halves) == 0  # is finished


def stopped_after(num_updates: int, config: AgentConfig) -> int:
    """Exit status of a session that gets SIGTERM during an update."""
    update, left = loop._update, [num_updates]

    def update_and_stop(*arguments: Any) -> dict[str, float]:
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)
        return update(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_update", update_and_stop)
        return train_agent(config)


@pytest.mark.timeout(900)
def test_actors_in_processes_change_no_number(tmp_path: Path) -> None:
    """The first half within the loop, the second half in processes: with the unrolls that waited in between."""
    within, beside = run_config(tmp_path / "within"), run_config(tmp_path / "beside")
    assert train_agent(within) == 0
    shorter = dataclasses.replace(EIGHT_UNROLLS, num_steps=4 * STEPS)
    assert train_agent(dataclasses.replace(beside, train=shorter)) == 0
    in_processes = dataclasses.replace(TWO_AHEAD, in_processes=True)
    assert train_agent(dataclasses.replace(beside, actors=in_processes)) == 0
    assert_same_run(within, beside)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_actors_process_that_dies_is_named() -> None:
    actor = ProcessActor(make_config(actors=ActorsConfig(unroll_length=8, in_processes=True)), 3)
    try:
        weights = weights_of(LocalActor(make_config(), 0)._actor.agent)
        actor.start(weights)
        assert actor.result().rewards.shape == (24, 8)
        actor._process.kill()
        actor._process.join()
        with pytest.raises(RuntimeError, match="the process of actor 3 has ended with status -9"):
            actor.state(0)
    finally:
        actor.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_says_what_its_environment_cannot_be() -> None:
    config = make_config(environment=GymnasiumConfig(id="Pendulum-v1", num_environments=2))
    actor = ProcessActor(config, 0)
    try:
        with pytest.raises(UserError, match="expected actions 0, 1"):
            actor.state(0)
    finally:
        actor.close()


def test_environments_that_cannot_be_saved_begin_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = GymnasiumConfig(id="CartPole-v1", num_environments=4)
    train = AgentTrainConfig(num_steps=64, log_every_steps=32, checkpoint_every_steps=32)
    config = make_config("none", environment=environment, train=train, runs_dir=str(tmp_path))
    assert train_agent(config) == 0
    assert "CartPole-v1 cannot be saved: a resumed run begins new episodes" in capsys.readouterr().out
    assert train_agent(dataclasses.replace(config, train=dataclasses.replace(train, num_steps=128))) == 0
    assert "resumed at step 64" in capsys.readouterr().out
    assert [line["step"] for line in curves(config)] == [32, 64, 96, 128]


def small_task(memory: str, runs_dir: Path) -> AgentConfig:
    """Delay 4, within reach of compressed memory only: the cue is 6 rows back, memory and window hold 4 at most."""
    model = {
        "compressive": CompressiveConfig(
            num_layers=1,
            width=24,
            num_heads=2,
            feedforward_width=32,
            position_width=8,
            window_length=2,
            memory_length=2,
            compressed_memory_length=2,
            compression_rate=2,
            straddling_groups="zero",
            norm_position="pre",
        ),
        "none": dataclasses.replace(MEMORIES["none"], width=24),
    }[memory]
    return AgentConfig(
        name=memory,
        runs_dir=str(runs_dir),
        environment=ObjectMatchingConfig(num_environments=128, delay=4, cue_length=3, num_objects=2),
        model=model,
        actors=ActorsConfig(unroll_length=16),
        learner=LearnerConfig(learning_rate=5e-3, final_learning_rate=5e-3),
        train=AgentTrainConfig(num_steps=250_000, log_every_steps=25_000, checkpoint_every_steps=250_000),
    )


@pytest.mark.timeout(600)
def test_a_small_task_is_learnt_with_compressed_memory_alone(tmp_path: Path) -> None:
    """At most 30 core-seconds, at least 10,000 steps a core-second; without a memory it stays at chance."""
    config, began = small_task("compressive", tmp_path), time.process_time()
    assert train_agent(config) == 0
    seconds = time.process_time() - began
    success = [line["agent/success"] for line in curves(config)]
    assert np.mean(success[-2:]) > 0.9, success
    assert seconds < 30
    assert config.train.num_steps / seconds > 10_000
    without = small_task("none", tmp_path)
    without = dataclasses.replace(without, train=dataclasses.replace(without.train, num_steps=50_000))
    assert train_agent(without) == 0
    assert 0.4 < curves(without)[-1]["agent/success"] < 0.6


def test_an_episode_can_be_watched(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    with pytest.raises(UserError, match="has no checkpoint; train it first"):
        watch_episode(config.run_dir)
    assert train_agent(config) == 0
    episode = watch_episode(config.run_dir, seed=2)
    length = len(episode.shown)
    assert episode.shown[0].startswith("room 1    object ")
    assert abs(episode.rewards.sum() - 0.1 - episode.success) < 1e-6
    assert episode.policy.shape == (length, 3)
    assert episode.attention is not None
    weights = episode.attention.weights
    assert weights.shape == (1, length, length)
    assert not np.triu(weights[0], 1).any()
    assert np.allclose(weights.sum(axis=-1), 1)
    text = episode_text(episode).splitlines()
    assert len(text) == length + 2
    assert text[-1].startswith(("won after", "lost after"))
    figure = episode_figure(episode, "title")
    assert len(figure.axes) == 4  # scenes, attention, its colour bar, value and policy
    lstm = run_config(tmp_path / "lstm", "lstm")
    assert train_agent(lstm) == 0
    assert watch_episode(lstm.run_dir).attention is None


def test_the_attention_of_an_episode_reaches_as_far_as_the_memory() -> None:
    """Of a stack with uniform attention: 4 keys of own window, 4 of memory, 4 groups of 2, before row 16 fewer."""
    config = make_config().model
    stack: Any = CompressiveStack(config)
    with torch.no_grad():
        layer: Any = stack.layers[0]
        for parameter in (layer.query.weight, layer.position):
            parameter.zero_()
    found = episode_attention(stack, torch.randn(18, config.width))
    assert np.allclose(found.weights[0, 17], [0, 0, 0, 0, *[1 / 20] * 8, *[1 / 10] * 6])
    assert np.allclose(found.weights[0, 5], [1 / 6] * 6 + [0] * 12)
    assert found.compressed[0, 17].nonzero()[0].tolist() == list(range(4, 12))


def test_the_command_trains_watches_and_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ct_audio.commands import agent, agent_sweep
    from ct_audio.commands.command_line import run_tool

    files = []
    for memory in ("compressive", "lstm"):
        files.append(tmp_path / f"{memory}.yaml")
        files[-1].write_text(config_to_yaml(run_config(tmp_path, memory)))

    def command(main: Any, *words: object) -> tuple[int, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["tool", *map(str, words)])
            status = run_tool(main)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    assert command(agent.main, files[0], "name=run", "--seed", 1) == (2, "error: --seed: only with --watch\n")
    assert command(agent.main, files[0], "name=run")[0] == 0
    assert command(agent.main, files[0], "name=run") == (
        0,
        f"{tmp_path}/run is finished: 1536 steps; nothing to do\n",
    )
    status, text = command(agent.main, files[0], "name=run", "environment.delay=4")
    assert (status, "environment.delay (was 3, now 4)" in text) == (2, True)
    status, text = command(agent.main, files[0], "name=run", "--watch", "--picture", tmp_path / "episode.png")
    assert (status, "attention of the last step, layer 0:" in text) == (0, True)
    assert (tmp_path / "episode.png").read_bytes().startswith(b"\x89PNG")

    out = tmp_path / "sweep"
    words = [*files, "--out", out, "--seeds", 7, "--delays", 1, 3, "--set", "train.num_steps=768"]
    status, text = command(agent_sweep.main, *words)
    assert status == 0
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table] == ["| memory", "| ---"] + ["| compressive"] * 2 + ["| lstm"] * 2
    assert [row[1] for row in table[2:]] == ["1", "3", "1", "3"]
    assert (out / "table.md").read_text() in text
    assert {"success.png", "delays.png", "success.csv", "table.md", "runs"} == {path.name for path in out.iterdir()}
    again, text = command(agent_sweep.main, *words)
    assert (again, text.count("is finished")) == (0, 4)
    status, text = command(agent_sweep.main, *words, "train.seed=3")
    assert (status, "train.seed=3: the command sets it itself" in text) == (2, True)


def made_up_run(memory: str, delay: int, seed: int, success: list[float]) -> sweep.Run:
    config = make_config("compressive" if memory == "a" else "lstm")
    return sweep.Run(memory, delay, seed, config, 50_000 * np.arange(1, 5), np.array(success))


def test_tables_and_figures_of_sweeps_say_what_the_runs_did() -> None:
    runs = [
        made_up_run("a", 8, 0, [0.5, 0.6, 0.8, 1.0]),
        made_up_run("a", 8, 1, [0.5, 0.5, 0.6, 0.7]),
        made_up_run("b", 8, 0, [0.5, 0.5, 0.5, 0.5]),
        made_up_run("a", 16, 0, [0.5, 0.5, 0.4, 0.5]),
    ]
    rows = sweep.summary(runs).splitlines()
    assert rows[2] == "| a | 8 | 12 | 12 | 200,000 | 2 | 0.775 | 0.650 | 0.900 |"
    assert rows[3] == "| b | 8 | - | - | 200,000 | 1 | 0.500 | 0.500 | 0.500 |"
    assert rows[4].startswith("| a | 16 | ")
    first, second = sweep.success_figure(runs).axes
    line = first.lines[0]
    assert np.allclose(line.get_ydata(), [0.5, 0.55, 0.7, 0.85])
    assert np.allclose(line.get_xdata(), [0.05, 0.1, 0.15, 0.2])
    assert "delay 16, 1 seeds" in second.get_title()
    (panel,) = sweep.delay_figure(runs).axes
    assert np.allclose(panel.lines[0].get_ydata(), [0.775, 0.45])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "environment.name=labyrinth",
            "environment.name: there is none named 'labyrinth'; expected one of object_match",
        ),
        ("model.name=wavenet", "model.name: there is none named 'wavenet'; expected one of compressive, lstm, none"),
        ("environment.delya=3", "unknown key environment.delya; did you mean delay"),
        ("environment.time_limit=5", "environment.time_limit = 5: the shortest episode has 41 steps"),
        (
            "actors.unroll_length=12",
            "actors.unroll_length = 12 is not a whole number of windows of model.window_length",
        ),
        ("model.compression_loss=bptt", "reaches f_c only in unrolls of at least 3 windows"),
        ("name=a/b", "name: expected a plain directory name"),
        ("environment.delay=-1", "environment.delay: expected a number from 0"),
        ("learner.discount=1.5", "learner.discount: expected a number from 0.0 to 1.0, got 1.5"),
    ],
)
def test_wrong_configurations_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_agent_config(ROOT / "recipes/object_matching/rate_4.yaml", [override])
    assert message in str(caught.value)


RECIPES = sorted([*ROOT.glob("recipes/object_matching/*.yaml"), *ROOT.glob("recipes/popgym/*.yaml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_complete(path: Path) -> None:
    import yaml

    config, written = load_agent_config(path), yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.name == f"{path.parent.name}_{path.stem}"
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert f"ct-audio agent recipes/{path.parent.name}/{path.name}" in path.read_text(encoding="utf-8")
    for section in ("environment", "model", "actors", "learner", "train"):
        assert written[section].keys() == {item.name for item in dataclasses.fields(getattr(config, section))}


@pytest.mark.parametrize("path", ROOT.glob("recipes/object_matching/*.yaml"), ids=lambda path: path.stem)
def test_recipes_of_object_matching_differ_in_their_memory_only(path: Path) -> None:
    config = load_agent_config(path)
    base = load_agent_config(ROOT / "recipes/object_matching/rate_4.yaml")
    if path.stem == "paper":
        return
    assert dataclasses.replace(config, name=base.name, model=base.model) == base
    if path.stem.startswith("rate_"):
        rate = int(path.stem.removeprefix("rate_"))
        assert config.model == dataclasses.replace(base.model, compression_rate=rate)
    if path.stem == "two_layers":
        assert config.model == dataclasses.replace(base.model, num_layers=2)
    if path.stem == "transformer_xl":
        changed = dataclasses.replace(base.model, memory_length=16, compressed_memory_length=0)
        assert config.model == changed
        assert config.model.attention_cost == base.model.attention_cost


def test_every_environment_and_memory_has_a_configuration() -> None:
    assert {cls(id="x").name if name == "gymnasium" else cls().name for name, cls in ENVIRONMENTS.items()} == set(
        ENVIRONMENTS
    )
    assert {cls().name for cls in MEMORY_CONFIGS.values()} == set(MEMORY_CONFIGS)
