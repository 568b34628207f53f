"""Equality 6: processes under torchrun are one process with all lanes, also on shards; what one rank has, all learn."""

import datetime
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_runs import assert_same_checkpoint, checkpoint_state, tiny_run

from ct_audio.common.errors import UserError
from ct_audio.experiments.kill_resume import _family, _last_step
from ct_audio.runs.config import RunConfig, TrainConfig, config_to_yaml
from ct_audio.runs.device import choose_device, set_up_device
from ct_audio.runs.metrics import read_metrics
from ct_audio.training.checkpoint import _deal_lanes
from ct_audio.training.loop import train
from ct_audio.training.parallel import (
    World,
    all_gather,
    all_reduce_sum,
    data_parallel,
    distributed_world,
    on_first_rank,
)
from ct_audio.training.session import _claim_device

ROOT = Path(__file__).parents[1]
CHANGES: dict[str, Any] = {
    "optim__update_period": {0: 1, 3: 2},
    "train__num_steps": 9,
    "train__log_every_steps": 3,
    "data__num_lanes": 4,
}


EARLIER = {4: 5.78607702255249, 5: 5.656888008117676}
"""NLL of the steps that the version which wrote `golden_run` made next, on two processes."""


def torchrun(
    config: RunConfig, script: Path = ROOT / "tools" / "train.py", *, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    """Processes of the training tool, or of another script that takes a YAML."""
    config.run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = config.run_dir.parent / f"{config.name}.yaml"
    path.write_text(config_to_yaml(config))
    return start(script, str(path), processes=processes)


def start(script: Path, *words: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script), *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=900, env=environment)


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one_with_all_lanes(tmp_path: Path, parallel: str):
    """Four lanes in two micro-batches; updates every step, then every second one (without synchronisation between).

    Weights and moments also of shards, in checkpoints of the same form; validations and samples too.
    """
    changes = CHANGES | {"train__num_micro_batches": 2, "train__sample_every_steps": 9, "train__sample_seconds": 1e-3}
    one = tiny_run(tmp_path, name="one", **changes)
    two = tiny_run(tmp_path, name="two", **changes, train__parallel=parallel)
    assert train(one) == 0
    result = torchrun(two)
    assert result.returncode == 0, result.stderr
    paths = [config.run_dir / "checkpoints" / "last" for config in (one, two)]
    weights = [load_file(path / "model.safetensors") for path in paths]
    moments = [load_file(path / "training.safetensors") for path in paths]
    assert largest_difference(*weights) < 1e-10
    assert largest_difference(*moments) < 1e-10
    whole, *ranks = (
        {name: t for name, t in load_file(path / file).items() if name.startswith("memory/")}
        for path, file in [(paths[0], "memory-rank0"), (paths[1], "memory-rank0"), (paths[1], "memory-rank1")]
        for file in [f"{file}.safetensors"]
    )
    assert largest_difference(whole, {name: torch.cat([rank[name] for rank in ranks]) for name in whole}) < 1e-10
    assert checkpoint_state(one)["stream"] == checkpoint_state(two)["stream"]
    assert (two.run_dir / "samples/step_00000009_0.wav").exists()
    tags = ["nll/train_nats", "nll/valid_nats", "gradient_norm/model", "attention_reconstruction/layer_00"]
    for tag in tags:
        curves = [[line[tag] for line in read_metrics(config.run_dir) if tag in line] for config in (one, two)]
        assert len(curves[0]) == 3
        assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    whole_split = [read_metrics(config.run_dir)[-1]["nll/valid_full_nats"] for config in (one, two)]
    assert whole_split[0] == pytest.approx(whole_split[1], rel=1e-9)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_shards_of_every_model_are_one_process():
    """Six steps of every compression function and loss, tied and adaptive tables, spans, WaveNet; layers run again."""
    result = start(ROOT / "tests" / "sharded_steps.py")
    assert result.returncode == 0, result.stderr
    cases = json.loads(result.stdout)
    assert len(cases) > 25
    for case, differences in cases.items():
        assert isinstance(differences, dict), f"{case}: {differences}"
        assert max(differences.values()) < 1e-10, f"{case}: {differences}"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_nan_on_one_rank_ends_both_and_is_named(tmp_path: Path):
    script = tmp_path / "poisoned.py"
    script.write_text(
        textwrap.dedent(
            """
            import math, os, sys
            from ct_audio.commands.command_line import run_tool
            from ct_audio.runs.config import load_config
            from ct_audio.training.loop import train
            from ct_audio.training.session import ChunkLoss

            original, calls = ChunkLoss.forward, [0]

            def forward(self, *arguments):
                nll, memory, auxiliary = original(self, *arguments)
                calls[0] += 1
                if os.environ["RANK"] == "1" and calls[0] == 5:
                    nll = nll * math.nan
                return nll, memory, auxiliary

            ChunkLoss.forward = forward
            sys.exit(run_tool(lambda: train(load_config(sys.argv[1]))))
            """
        )
    )
    config = tiny_run(tmp_path, **CHANGES)
    result = torchrun(config, script)
    assert result.returncode != 0
    assert "error: step 5: the loss is nan in lane 2, corpus position 564 of the train split" in result.stderr
    assert checkpoint_state(config)["step"] == 3


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_signal_to_one_rank_saves_on_both(tmp_path: Path):
    script = tmp_path / "interrupted.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, sys
            from ct_audio.commands.command_line import run_tool
            from ct_audio.runs.config import load_config
            from ct_audio.training.loop import train
            from ct_audio.training.session import ChunkLoss

            original, calls = ChunkLoss.forward, [0]

            def forward(self, *arguments):
                calls[0] += 1
                if os.environ["RANK"] == "1" and calls[0] == 4:  # the first of the steps 4 and 5 of an update
                    os.kill(os.getpid(), signal.SIGUSR1)
                return original(self, *arguments)

            ChunkLoss.forward = forward
            status = run_tool(lambda: train(load_config(sys.argv[1])))
            print(f"rank {os.environ['RANK']} status {status}", flush=True)
            """
        )
    )
    changes: dict[str, Any] = {**CHANGES, "train__checkpoint_every_steps": 100}
    config, straight = tiny_run(tmp_path, **changes), tiny_run(tmp_path, name="straight", **changes)
    result = torchrun(config, script)
    assert result.returncode == 0, result.stderr
    assert "rank 0 status 138" in result.stdout
    assert "rank 1 status 138" in result.stdout
    assert checkpoint_state(config)["step"] == 5
    for run in (config, straight):
        result = torchrun(run)
        assert result.returncode == 0, result.stderr
    for file in ("model", "training", "memory-rank0", "memory-rank1"):
        left, right = (load_file(c.run_dir / f"checkpoints/last/{file}.safetensors") for c in (config, straight))
        assert all(torch.equal(left[name], right[name]) for name in left)


TROUBLE = """
import os, signal, sys, time
from ct_audio.commands.command_line import run_tool
from ct_audio.runs.config import load_config
from ct_audio.training.loop import train
from ct_audio.training.session import ChunkLoss

original, calls = ChunkLoss.forward, [0]

def forward(self, *arguments):
    calls[0] += 1
    if os.environ["RANK"] == "1" and calls[0] == 5:
        print("trouble at", time.time(), flush=True)
        {trouble}
    return original(self, *arguments)

ChunkLoss.forward = forward
status = run_tool(lambda: train(load_config(sys.argv[1])))
print(f"rank {{os.environ['RANK']}} status {{status}} at", time.time(), flush=True)
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("trouble", ["os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(10000)"])
def test_a_rank_that_dies_or_hangs_ends_the_others(tmp_path: Path, trouble: str, parallel: str):
    """Within a minute, and the same command resumes the run."""
    script = tmp_path / "trouble.py"
    script.write_text(TROUBLE.format(trouble=trouble))
    config = tiny_run(tmp_path, **CHANGES, train__parallel=parallel, train__timeout_seconds=10.0)
    result = torchrun(config, script)
    ended = time.time()
    assert result.returncode != 0
    began = float(re.search(r"trouble at (\S+)", result.stdout)[1])  # type: ignore[index]
    if "sleep" in trouble:  # torchrun kills the sleeper half a minute after the others have ended
        assert "rank 0: another process has ended, or has not answered in time" in result.stderr, result.stderr
        ended = float(re.search(r"rank 0 status 2 at (\S+)", result.stdout)[1])  # type: ignore[index]
    assert ended - began < 60
    result = torchrun(config)
    assert result.returncode == 0, result.stderr
    assert checkpoint_state(config)["step"] == 9


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_directory_that_is_not_shared_is_an_error(tmp_path: Path):
    script = tmp_path / "apart.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            from ct_audio.commands.command_line import run_tool
            from ct_audio.runs.config import load_config
            from ct_audio.training import session
            from ct_audio.training.loop import train

            session.SEEN_WITHIN_SECONDS = 1.0
            config = load_config(sys.argv[1])
            config = load_config(sys.argv[1], [f"runs_dir={config.runs_dir}/{os.environ['RANK']}"])
            sys.exit(run_tool(lambda: train(config)))
            """
        )
    )
    config = tiny_run(tmp_path, **CHANGES)
    result = torchrun(config, script)
    assert result.returncode != 0
    for words in (
        "rank 1 on ",
        f"cannot see the run's directory of rank 0, {config.runs_dir}/0/run",
        "set runs_dir to",
    ):
        assert words in result.stderr
    assert not list(tmp_path.rglob("train.token"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_another_number_of_processes_goes_on(tmp_path: Path):
    """Shards on two, whole models on three, one: the run of one process, up to rounding."""
    changes: dict[str, Any] = CHANGES | {"data__num_lanes": 6, "train__valid_every_steps": 0}
    straight = tiny_run(tmp_path, name="straight", **changes)
    assert train(straight) == 0
    for num_steps, processes, parallel in ((3, 2, "fsdp"), (5, 3, "ddp"), (7, 3, "fsdp"), (9, 1, "ddp")):
        changes |= {"train__num_steps": num_steps, "train__parallel": parallel}
        config = tiny_run(tmp_path, **changes)
        if processes == 1:
            assert train(config) == 0
        else:
            result = torchrun(config, processes=processes)
            assert result.returncode == 0, result.stderr
            assert ("3 processes in place of 2" in result.stdout) == (num_steps == 5)
    for file in ("model", "training", "memory-rank0"):
        left, right = (load_file(c.run_dir / f"checkpoints/last/{file}.safetensors") for c in (config, straight))
        for tensors in (left, right):
            tensors.pop("rng/cpu", None)
        assert largest_difference(left, right) < 1e-10


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_nodes_of_which_one_is_killed(tmp_path: Path, parallel: str):
    """Two agents of torchrun meet on the loopback; one is killed with its process, started again, and both go on."""
    changes: dict[str, Any] = {"model__dropout": 0.1, "train__num_steps": 100, "train__parallel": parallel}
    straight, config = (tiny_run(tmp_path, name=name, **changes) for name in ("straight", "killed"))
    result = torchrun(straight)
    assert result.returncode == 0, result.stderr
    place = tmp_path / "killed.yaml"
    place.write_text(config_to_yaml(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"

    def agent(node: int) -> subprocess.Popen[bytes]:
        words = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=test"]
        words += [f"--rdzv-endpoint={endpoint}", f"--rdzv-conf=is_host={int(node == 0)}"]
        command = [sys.executable, "-m", "torch.distributed.run", *words, str(ROOT / "tools" / "train.py"), str(place)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or torch 2.11 does not let an agent come back
        with (tmp_path / f"node{node}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    agents = [agent(0), agent(1)]
    try:
        while _last_step(config.run_dir) < 30:
            assert agents[0].poll() is None, (tmp_path / "node0.log").read_text()
            time.sleep(0.02)
        for process in _family(agents[1].pid):
            os.kill(process, signal.SIGKILL)
        agents[1].wait()
        agents[1] = agent(1)
        assert [one.wait() for one in agents] == [0, 0], (tmp_path / "node0.log").read_text()
    finally:
        for one in agents:
            for process in _family(one.pid) if one.poll() is None else ():
                os.kill(process, signal.SIGKILL)
            one.wait()
    assert re.search(
        r"resumed at step [1-9]", (tmp_path / "node0.log").read_text() + (tmp_path / "node1.log").read_text()
    )
    assert checkpoint_state(config)["step"] == 100
    assert_same_checkpoint(config, straight)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2), (6, 4), (1, 12)])
def test_lanes_are_dealt_out_anew(tmp_path: Path, before: int, after: int):
    """12 lanes; a rank reads its own, whichever files they are in, and no others."""
    rows, counts = torch.randn(12, 3, 2), torch.arange(12)
    for rank in range(before):
        part = slice(rank * 12 // before, (rank + 1) * 12 // before)
        tensors = {"memory/0": rows[part].clone(), "memory/1": counts[part].clone(), "rng/cpu": torch.get_rng_state()}
        save_file(tensors, tmp_path / f"memory-rank{rank}.safetensors")
    dealt = [
        _deal_lanes(tmp_path, before, (rows[: 12 // after], counts[: 12 // after]), World(rank, after))
        for rank in range(after)
    ]
    assert torch.equal(torch.cat([part["memory/0"] for part in dealt]), rows)
    assert torch.equal(torch.cat([part["memory/1"] for part in dealt]), counts)
    with pytest.raises(UserError, match="expected 15 lanes in"):
        _deal_lanes(tmp_path, before, (rows[:5],), World(0, 3))


def test_an_earlier_version_s_checkpoint_goes_on_with_another_number_of_processes(tmp_path: Path):
    """`tests/golden_run` was written at step 3 by two processes, by the code before lanes could be dealt out anew."""
    shutil.copytree(ROOT / "tests" / "golden_run", tmp_path / "earlier")
    shape = {"num_layers": 1, "width": 8, "feedforward_width": 8}
    changes: dict[str, Any] = {f"model__{key}": value for key, value in shape.items()}
    changes |= {"train__precision": "float32", "train__num_steps": 5, "train__valid_every_steps": 0}
    config = tiny_run(tmp_path, name="earlier", runs_dir=str(tmp_path), **changes)
    assert train(config) == 0
    found = {line["step"]: line["nll/train_nats"] for line in read_metrics(config.run_dir) if "nll/train_nats" in line}
    assert {step: found[step] for step in (4, 5)} == pytest.approx(EARLIER, rel=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [1, 2])
def test_three_kills_do_no_harm(processes: int):
    """A short form of tools/kill_test.py."""
    command = ["--kills", "3", "--steps", "60", "--processes", str(processes), "--seed", "1"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "kill_test.py"), *command], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 tensors differ" in result.stdout


def test_alone_the_collectives_do_nothing():
    with distributed_world() as world:
        assert world == World(rank=0, world_size=1, local_rank=0)
        assert world.is_first
        assert torch.equal(all_reduce_sum(torch.ones(2)), torch.ones(2))
        assert all_gather("a") == ["a"]
        assert on_first_rank(lambda: 7) == 7


@pytest.mark.parametrize("is_cuda", [False, True])
def test_only_one_group_waits_for_days(monkeypatch: pytest.MonkeyPatch, is_cuda: bool) -> None:
    """Gradients on CUDA have a group of their own; the patient one is for work of rank 0 alone."""
    groups: list[Any] = []
    module, wrapped = torch.nn.Linear(1, 1), []
    monkeypatch.setattr(dist, "init_process_group", lambda *backend, **options: groups.append((backend, options)))
    monkeypatch.setattr(dist, "new_group", lambda **options: groups.append(((), options)) or "gradients")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(
        torch.nn.parallel, "DistributedDataParallel", lambda module, **options: wrapped.append(options) or module
    )
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
    for name, value in (("WORLD_SIZE", 8), ("RANK", 1), ("LOCAL_RANK", 1)):
        monkeypatch.setenv(name, str(value))
    with distributed_world() as world:
        assert world == World(rank=1, world_size=8, local_rank=1)
        assert data_parallel(module, world, device=torch.device("cuda" if is_cuda else "cpu")) is module
    minutes, days = datetime.timedelta(minutes=15), datetime.timedelta(days=30)
    assert groups[:2] == [(("gloo",), {"timeout": minutes}), ((), {"backend": "gloo", "timeout": days})]
    assert groups[2:] == ([((), {"backend": "nccl", "timeout": minutes})] if is_cuda else [])
    assert wrapped == [{"broadcast_buffers": False, "process_group": "gradients" if is_cuda else None}]


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device(name, local_rank=rank).index for rank in (0, 1)] == [0, 1]
    with pytest.raises(UserError, match=f"device {name}: process 3 of this machine, which has 2 CUDA devices; start"):
        choose_device(name, local_rank=2)
    assert choose_device("cpu", local_rank=2) == torch.device("cpu")


def test_training_sets_the_device_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint saves the random generator of the current device, and its memory is what is reported."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("auto", "cuda", "cpu"):
        _claim_device(TrainConfig(device=name), World(rank=5, world_size=8, local_rank=1))
    assert chosen == [torch.device("cuda", 1)] * 2


@pytest.mark.parametrize("number", [-1, 1025, 10**6])
def test_threads_have_bounds(number: int) -> None:
    with pytest.raises(UserError, match=f"threads: expected 0 .* to 1024, got {number}"):
        set_up_device("cpu", num_threads=number)


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no usable CUDA device; use --device cpu"):
            choose_device("cuda")
