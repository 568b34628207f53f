"""Runs made by hand, without training, a corpus for them, and commands as functions of their words, for tests."""

import contextlib
import importlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY_MODELS

from ct_audio.commands.command_line import run_tool
from ct_audio.data.codecs import MuLaw
from ct_audio.data.corpus import CorpusWriter, open_corpus
from ct_audio.models import build_model
from ct_audio.runs.config import RunConfig, config_from_dict
from ct_audio.training.checkpoint import save_checkpoint
from ct_audio.training.parallel import World
from ct_audio.training.schedules import make_optimizer

ROOT = Path(__file__).resolve().parents[1]
RATE = 24_000
Tool = Callable[..., int]


def tool(name: str, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """A command as a function of its words, which returns the exit status."""
    module = importlib.import_module(f"ct_audio.commands.{name}")

    def call(*arguments: Any) -> int:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return run_tool(module.main)

    return call


def options_of(name: str) -> set[str]:
    """The options that the help of a command names."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        tool(name, patch)("--help")
    return set(re.findall(r"--[a-z-]+", printed.getvalue()))


def speech_like(num_samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, num_samples).astype(np.float32)


def noise_corpus(path: Path) -> Path:
    """Four short documents: one in train, two in valid, one in test."""
    writer = CorpusWriter(path, MuLaw(), source={}, preparation={"order": "as written"})
    for seed, split in enumerate(["train", "valid", "valid", "test"]):
        writer.add_document(split, f"document_{seed}", MuLaw().encode(speech_like(300 + 7 * seed, seed)))
    writer.finish()
    return path


def make_run(corpus: Path, runs_dir: Path, name: str = "wavenet", width_of_codes: float = 20.0) -> Path:
    """A run whose model draws codes from a bell around 128, whatever came before if it is a WaveNet."""
    plain = {
        "name": f"{name}_run",
        "runs_dir": str(runs_dir),
        "model": TINY_MODELS[name] | {"vocab_size": 256},
        "data": {"corpus": str(corpus), "chunk_length": 64, "num_lanes": 1},
    }
    config = config_from_dict(plain)
    torch.manual_seed(0)
    model: Any = build_model(config)
    if config.model.name == "wavenet":
        with torch.no_grad():
            model.head.projection.weight.mul_(0.1)
            model.head.projection.bias.copy_(-0.5 * ((torch.arange(256.0) - 128) / width_of_codes) ** 2)
    save(config, model, fingerprint=open_corpus(corpus).fingerprint)
    return config.run_dir


def save(config: RunConfig, model: Any, *, fingerprint: str) -> None:
    save_checkpoint(
        config.run_dir,
        config=config,
        model=model,
        optimizer=make_optimizer(model, config.optim),
        memories=[model.zero_memory(1)],
        state={"step": 7, "corpus_fingerprint": fingerprint},
        world=World(0, 1, 0),
    )


def read_json(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
