"""Runs made by hand, without training, a corpus for them, and commands as functions of their words, for tests."""

import contextlib
import importlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY_MODELS

from ct_audio.commands.command_line import run_tool
from ct_audio.common.files import write_json
from ct_audio.data.audio_files import write_wav
from ct_audio.data.codecs import Codec, MuLaw
from ct_audio.data.corpus import CorpusWriter, open_corpus
from ct_audio.models import build_model
from ct_audio.runs.config import RunConfig, config_from_dict
from ct_audio.training.checkpoint import save_checkpoint
from ct_audio.training.parallel import World
from ct_audio.training.schedules import make_optimizer

ROOT = Path(__file__).resolve().parents[1]
RATE = 24_000
Tool = Callable[..., int]
Output = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def tool(name: str, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """A command as a function of its words, which returns the exit status."""
    module = importlib.import_module(f"ct_audio.commands.{name}")

    def call(*arguments: Any) -> int:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return run_tool(module.main)

    return call


def refusal(capsys: Output, command: Tool, *words: Any) -> str:
    """What a command says that ends with exit status 2: one line, and nothing on stdout."""
    capsys.readouterr()
    assert command(*words) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def options_of(name: str) -> set[str]:
    """The options that the help of a command names."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        tool(name, patch)("--help")
    return set(re.findall(r"--[a-z-]+", printed.getvalue()))


def without_speed(path: Path) -> bytes:
    """A file of a sample without the speed, which a sidecar has and which no two samplings share."""
    return re.sub(rb'"codes_per_second": [0-9.e+-]+', b"", path.read_bytes())


def speech_like(num_samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, num_samples).astype(np.float32)


def write_corpus(path: Path, codec: Codec, documents: Iterable[tuple[str, Any]]) -> Path:
    """A corpus of documents: a split, and a waveform or text."""
    writer = CorpusWriter(path, codec, source={}, preparation={})
    for number, (split, content) in enumerate(documents):
        writer.add_document(split, f"document_{number}", codec.encode(content))
    writer.finish()
    return path


def write_sample(
    directory: Path, waveform: np.ndarray, lane: int = 0, *, prime_length: int = 0, **changes: Any
) -> Path:
    """A sample with its sidecar, as ct-audio sample writes them; returns the wav."""
    directory.mkdir(parents=True, exist_ok=True)
    wav = directory / f"sample_{lane}.wav"
    write_wav(wav, MuLaw().decode(MuLaw().encode(waveform)), RATE)
    sidecar = {
        "name": "model",
        "step": 7,
        "lane": lane,
        "codec": MuLaw().to_json(),
        "sample_rate_hz": RATE,
        "prime_seconds": prime_length / RATE,
        "prime_included": bool(prime_length),
        "prime": "prime.wav" if prime_length else None,
        "nll_nats": 2.25,
        "rms_dbfs": -30.0,
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "seed": 0,
        "warnings": [],
    }
    write_json(wav.with_suffix(".json"), sidecar | changes)
    return wav


def page_data(page: Path) -> dict[str, Any]:
    """What a listening page was made from."""
    (found,) = re.findall('<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    return json.loads(found)


def noise_corpus(path: Path) -> Path:
    """Four short documents: one in train, two in valid, one in test."""
    splits = enumerate(["train", "valid", "valid", "test"])
    return write_corpus(path, MuLaw(), [(split, speech_like(300 + 7 * seed, seed)) for seed, split in splits])


def make_run(corpus: Path, runs_dir: Path, name: str = "wavenet", width_of_codes: float = 20.0) -> Path:
    """A run whose model draws codes from a bell around 128, whatever came before if it is a WaveNet."""

    def shape(model: Any) -> None:
        if TINY_MODELS[name]["name"] == "wavenet":
            model.head.projection.weight.mul_(0.1)
            model.head.projection.bias.copy_(-0.5 * ((torch.arange(256.0) - 128) / width_of_codes) ** 2)

    return untrained_run(corpus, runs_dir, name, shape)


def text_run(directory: Path, codec: Codec, text: str | bytes, *, is_even: bool = False) -> Path:
    """A corpus of a short text and a transformer on it that was never trained; with even odds for every code or not."""

    def shape(model: Any) -> None:
        if is_even:
            model.head.projection.weight.zero_()

    corpus = write_corpus(directory / "corpus", codec, [("train", text), ("valid", text)])
    return untrained_run(corpus, directory, "compressive_transformer", shape)


def untrained_run(corpus: Path, runs_dir: Path, name: str, shape: Callable[[Any], None]) -> Path:
    """A run at step 7 whose model `shape` has changed."""
    opened = open_corpus(corpus)
    plain = {
        "name": f"{name}_run",
        "runs_dir": str(runs_dir),
        "model": TINY_MODELS[name] | {"vocab_size": opened.codec.vocab_size},
        "data": {"corpus": str(corpus), "chunk_length": 64, "num_lanes": 1},
    }
    config = config_from_dict(plain)
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        shape(model)
    save(config.run_dir, config, model, step=7, fingerprint=opened.fingerprint)
    return config.run_dir


def save(run_dir: Path, config: RunConfig, model: Any, *, step: int, fingerprint: str, is_best: bool = False) -> None:
    save_checkpoint(
        run_dir,
        config=config,
        model=model,
        optimizer=make_optimizer(model, config.optim) if model.has_parameters else None,
        memories=[model.zero_memory(1)],
        state={"step": step, "corpus_fingerprint": fingerprint},
        world=World(0, 1, 0),
        is_best=is_best,
    )
