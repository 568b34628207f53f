"""Whether `kill -9` harms: a training run is killed many times, started again, compared with one left alone.

Makes a small synthetic corpus and a small Compressive Transformer with dropout in a temporary directory. Kills fall at
random moments: three quarters of them around a random step (checkpoints are written all the time), one quarter while
the command is starting. With several processes a kill hits all of them or a single worker. At the end weights,
optimizer, memory and random generators must be equal bit for bit.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ct_audio.common.progress import Progress
from ct_audio.common.recipes import PROGRAM
from ct_audio.data.codecs import MuLaw
from ct_audio.data.corpus import CorpusWriter
from ct_audio.runs.checkpoint_files import find_checkpoint, read_state

CONFIG = """
name: {name}
runs_dir: {directory}
data: {{corpus: {directory}/corpus, chunk_length: 32, num_lanes: 4}}
model: {{name: compressive_transformer, num_layers: 2, width: 16, num_heads: 2, feedforward_width: 32,
  position_width: 8, window_length: 16, memory_length: 16, compressed_memory_length: 8, compression_rate: 4,
  dropout: 0.1}}
optim: {{peak_learning_rate: 0.003, warmup_steps: 20, decay_steps: 500, max_gradient_norm: 1.0,
  update_period: {{0: 1, 100: 2}}}}
train: {{num_steps: {num_steps}, seed: 3, device: cpu, num_threads: 1, valid_codes: 500, log_every_steps: 1,
  valid_every_steps: 25, checkpoint_every_steps: 3}}
"""


def kill_and_compare(*, num_kills: int, num_processes: int, num_steps: int, seed: int) -> list[str]:
    """Train twice, once with kills, and return the names of what differs between the last checkpoints: none should.

    Args:
        num_processes: 1, or as many under torchrun; a divisor of 4, the number of lanes.
        num_steps: of training; even, since the last updates take two.
    """
    with tempfile.TemporaryDirectory() as directory:
        _write_corpus(Path(directory) / "corpus")
        for name in ("alone", "killed"):
            text = CONFIG.format(name=name, directory=directory, num_steps=num_steps)
            Path(directory, f"{name}.yaml").write_text(text, encoding="utf-8")
        _finish(_start(directory, "alone", num_processes))
        chance = random.Random(seed)
        for kill in Progress(range(num_kills), unit="kill"):
            steps = (kill / num_kills * num_steps, (kill + 1) / num_kills * num_steps)
            killed = _kill_once(_start(directory, "killed", num_processes), Path(directory) / "killed", steps, chance)
            print(f"kill {kill + 1}: {killed}", flush=True)
        _finish(_start(directory, "killed", num_processes))
        return _differences(Path(directory) / "alone", Path(directory) / "killed")


def _kill_once(process: subprocess.Popen, run_dir: Path, steps: tuple[float, float], chance: random.Random) -> str:
    """Kill a training somewhere between two steps, or at its start; returns what was killed where."""
    if chance.random() < 0.25:
        _sleep_or_end(process, chance.uniform(0, 10))
    else:
        target = int(chance.uniform(*steps))
        while _last_step(run_dir) < target and process.poll() is None:
            time.sleep(0.005)
        _sleep_or_end(process, chance.uniform(0, 0.3))
    family = _family(process.pid)
    alone = len(family) > 1 and chance.random() < 0.5
    for pid in [chance.choice(family[1:])] if alone else family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
    for pid in family:  # an orphan would still hold the lock
        while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
            time.sleep(0.01)
    last = find_checkpoint(run_dir, "last")
    where = f"step {read_state(last)['step']}" if last else "no checkpoint yet"
    return f"{'one worker' if alone else 'everything'}; last checkpoint: {where}"


def _start(directory: str, name: str, processes: int) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    program = [str(PROGRAM), "train", f"{directory}/{name}.yaml"]
    command = [sys.executable, *(torchrun if processes > 1 else []), *program]
    output = (Path(directory) / f"{name}.log").open("ab")
    return subprocess.Popen(command, stdout=output, stderr=output)


def _finish(process: subprocess.Popen) -> None:
    if process.wait():
        raise RuntimeError(f"{process.args} ended with status {process.returncode}")


def _sleep_or_end(process: subprocess.Popen, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)


def _last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def _family(pid: int) -> list[int]:
    """A process and all that it has started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        threads = [Path(task, "children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return [pid]
    found = sorted({int(child) for part in [children, *threads] for child in part})
    return [pid, *(one for child in found for one in _family(child))]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _differences(first: Path, second: Path) -> list[str]:
    paths = [find_checkpoint(run, "last") for run in (first, second)]
    left_path, right_path = (path for path in paths if path)
    states = [read_state(left_path), read_state(right_path)]
    different = [key for key in ("step", "stream") if states[0][key] != states[1][key]]
    for file in states[0]["files"]:
        if file.endswith(".safetensors"):
            left, right = load_file(left_path / file), load_file(right_path / file)
            names = sorted(left.keys() | right.keys())
            same = {name for name in left.keys() & right.keys() if torch.equal(left[name], right[name])}
            different += [f"{file}:{name}" for name in names if name not in same]
    return different


def _write_corpus(path: Path) -> None:
    random_numbers = np.random.default_rng(0)
    writer = CorpusWriter(path, MuLaw(), source={"synthetic": "sines"}, preparation={})
    for split, num_documents in (("train", 20), ("valid", 2)):
        for document in range(num_documents):
            phases = random_numbers.uniform(0.02, 0.3) * np.arange(1000)
            noisy = 0.5 * np.sin(phases) + random_numbers.normal(scale=0.01, size=1000)
            writer.add_document(split, f"{split}{document}", MuLaw().encode(noisy.astype(np.float32)))
    writer.finish()
