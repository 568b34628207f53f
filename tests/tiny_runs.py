"""A tiny corpus and tiny runs on it, for the tests of training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tiny import TINY_MODELS

from ct_audio.data.codecs import MuLaw
from ct_audio.data.corpus import CorpusWriter
from ct_audio.runs.config import RunConfig, config_from_dict
from ct_audio.runs.metrics import read_metrics


def write_corpus(path: Path, *, seed: int = 0) -> Path:
    """Noisy sines: 10 documents of 100 codes in train, 3 of 32 codes in valid."""
    random_numbers = np.random.default_rng(seed)
    writer = CorpusWriter(path, MuLaw(), source={}, preparation={})
    for split, num_documents, length in (("train", 10, 100), ("valid", 3, 32)):
        for document in range(num_documents):
            waveform = 0.5 * np.sin(0.1 * np.arange(length)) + random_numbers.normal(scale=0.01, size=length)
            writer.add_document(split, f"{split}{document}", MuLaw().encode(waveform.astype(np.float32)))
    writer.finish()
    return path


def tiny_run(directory: Path, model: str = "compressive_transformer", **changes: Any) -> RunConfig:
    """A configuration of 6 steps of 2 lanes of 16 codes; `changes` are "section.key" (or "section__key") values."""
    if not (directory / "corpus").exists():
        write_corpus(directory / "corpus")
    plain: dict[str, Any] = {
        "name": "run",
        "runs_dir": str(directory / "runs"),
        "data": {"corpus": str(directory / "corpus"), "chunk_length": 16, "num_lanes": 2},
        "model": TINY_MODELS[model]
        | {"vocab_size": 256}
        | ({"num_layers": 2} if "num_layers" in TINY_MODELS[model] else {}),
        "optim": {"peak_learning_rate": 0.01, "warmup_steps": 3, "decay_steps": 20, "max_gradient_norm": 1.0},
        "train": {
            "num_steps": 6,
            "device": "cpu",
            "precision": "float64",
            "num_threads": 1,
            "valid_codes": 48,
            "log_every_steps": 1,
            "valid_every_steps": 3,
            "checkpoint_every_steps": 2,
        },
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = plain[sections[0]] if sections else plain
        section[name] = value
    return config_from_dict(plain)


def checkpoint_tensors(config: RunConfig, which: str = "last") -> dict[str, torch.Tensor]:
    """All tensors of a run's checkpoint by file and name."""
    directory = config.run_dir / "checkpoints" / which
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) >= 3
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def checkpoint_state(config: RunConfig, which: str = "last") -> dict[str, Any]:
    """state.json of a run's checkpoint."""
    return json.loads((config.run_dir / "checkpoints" / which / "state.json").read_text())


def assert_same_checkpoint(first: RunConfig, second: RunConfig) -> None:
    """Both runs' last checkpoints are equal bit for bit: weights, optimizer, memory, generators, stream."""
    left, right = checkpoint_tensors(first), checkpoint_tensors(second)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different
    for key in ("step", "stream"):
        assert checkpoint_state(first)[key] == checkpoint_state(second)[key]


def logged_values(config: RunConfig) -> list[dict[str, Any]]:
    """metrics.jsonl without times and memory use."""
    times = {"wall_seconds", "throughput/codes_per_second", "throughput/times_real_time", "throughput/training_seconds"}
    return [
        {tag: value for tag, value in line.items() if tag not in times and not tag.startswith("memory_use/")}
        for line in read_metrics(config.run_dir)
    ]
