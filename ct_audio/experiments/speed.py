"""Speed: of training, of the layer-parallel chunk and the fused attention, of sampling early and late in a stream.

Whatever is compared runs interleaved, round after round, and the ratio is the median over rounds of the ratio within a
round: a machine that slows down for a while slows both sides. Times are of the process's wall clock.
"""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from ct_audio.common.errors import UserError
from ct_audio.common.text import markdown_table
from ct_audio.models import SequenceModel, build_model
from ct_audio.models.compressive.attention import ATTENTION_BACKENDS
from ct_audio.models.interface import clip_gradients
from ct_audio.models.state import detach_memory
from ct_audio.runs.config import RunConfig, load_config
from ct_audio.sampling.sampler import Sampler
from ct_audio.training.schedules import make_optimizer

Case = Callable[[], int]
"""Does a fixed amount of work and returns how many codes it was."""
SAMPLED_CODES = 500


def measure_speed(
    recipes: Sequence[str],
    what: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    num_lanes: int = 1,
    num_threads: int = 1,
    num_rounds: int = 5,
) -> dict[str, Any]:
    """Measure recipes on the CPU.

    Args:
        recipes: YAML files; the first is the base of ratios.
        what: keys of MEASUREMENTS.
        overrides: of all recipes.
        num_lanes: streams side by side.
        num_threads, num_rounds: at least 1; one round more warms up.
    Returns:
        the rows, and on what they were measured; plain values.
    Raises:
        UserError: a recipe does not fit, or something is to be measured that none of them has.
    """
    torch.set_num_threads(num_threads)
    configs = {Path(path).stem: load_config(path, list(overrides)) for path in recipes}
    if len(configs) < len(recipes):
        raise UserError("recipes: two files have the same name; measure them in two calls")
    for name, applies in APPLIES.items():
        if name in what and not any(map(applies, configs.values())):
            raise UserError(f"--what {name}: none of the recipes has anything to compare there; leave it out")
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": num_threads,
        "lanes": num_lanes,
        "rounds": num_rounds,
        "rows": [row for name in what for row in MEASUREMENTS[name](configs, num_lanes, num_rounds)],
    }


def compare(what: str, cases: dict[str, Case], num_rounds: int) -> list[dict[str, Any]]:
    """Codes a second of each case, and the median ratio to the first case; all run once a round, in turn."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for index in tqdm(range(num_rounds + 1), desc=what, unit="round", leave=False, disable=None):
        for name, case in cases.items():
            began = time.perf_counter()
            num_codes = case()
            if index:  # the first round warms up
                rates[name].append(num_codes / (time.perf_counter() - began))
    base = next(iter(rates.values()))
    return [
        {
            "measurement": what,
            "case": name,
            "codes_per_second": statistics.median(found),
            "ratio": statistics.median(a / b for a, b in zip(found, base, strict=True)),
        }
        for name, found in rates.items()
    ]


def measure_train(configs: dict[str, RunConfig], num_lanes: int, num_rounds: int) -> list[dict[str, Any]]:
    """A training step of each recipe: forward, backward, clipping, Adam."""
    cases = {name: _training_step(config, num_lanes) for name, config in configs.items()}
    return compare("train", cases, num_rounds)


def measure_chunk(configs: dict[str, RunConfig], num_lanes: int, num_rounds: int) -> list[dict[str, Any]]:
    """The windows of a chunk in one forward pass, layer by layer, against one forward pass a window."""
    rows: list[dict[str, Any]] = []
    for name, config in configs.items():
        if APPLIES["chunk"](config):
            length = config.model.window_length
            cases = {
                f"{name}, window after window": _training_step(config, num_lanes, piece_length=length),
                f"{name}, chunk at once": _training_step(config, num_lanes),
            }
            rows += compare("chunk", cases, num_rounds)
    return rows


def measure_attention(configs: dict[str, RunConfig], num_lanes: int, num_rounds: int) -> list[dict[str, Any]]:
    """A training step with each attention backend."""
    rows: list[dict[str, Any]] = []
    for name, config in configs.items():
        if APPLIES["attention"](config):
            cases = {
                f"{name}, {backend}": _training_step(
                    dataclasses.replace(config, model=dataclasses.replace(config.model, attention_backend=backend)),
                    num_lanes,
                )
                for backend in sorted(ATTENTION_BACKENDS, reverse=True)
            }
            rows += compare("attention", cases, num_rounds)
    return rows


def measure_sample(configs: dict[str, RunConfig], num_lanes: int, num_rounds: int) -> list[dict[str, Any]]:
    """Sampling over the first codes of a stream, and over as many after all memory is full."""
    rows: list[dict[str, Any]] = []
    for name, config in configs.items():
        model = build_model(config)
        late = model.temporal_range + config.data.chunk_length  # all memory is full
        prime = _random_codes(num_lanes, late, model.vocab_size)
        cases = {
            f"{name}, {when}": _sampling(model, num_lanes, codes, num_rounds)
            for when, codes in (("first codes", None), (f"after {late:,} codes", prime))
        }
        rows += compare("sample", cases, num_rounds)
    return rows


def _training_step(config: RunConfig, num_lanes: int, *, piece_length: int | None = None) -> Case:
    """A step on random codes with memory carried from call to call; `piece_length` codes a forward pass at a time."""
    torch.manual_seed(0)
    length = config.data.chunk_length
    piece_length = piece_length or length
    model = build_model(config)
    optimizer = make_optimizer(model, config.optim)
    codes = _random_codes(num_lanes, length + 1, model.vocab_size)
    memory = model.zero_memory(num_lanes)

    def step() -> int:
        nonlocal memory
        for begin in range(0, length, piece_length):
            piece = codes[:, begin : begin + piece_length + 1]
            features, memory, auxiliary_losses = model(piece[:, :-1], memory)
            loss = model.nll(features, piece[:, 1:]).sum() / (num_lanes * length)
            (loss + sum(auxiliary_losses.values()) * piece_length / length).backward()
            memory = detach_memory(memory)
        clip_gradients(model.gradient_groups(), config.optim.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        return num_lanes * length

    return step


def _sampling(model: SequenceModel, num_lanes: int, prime: Int[Tensor, "B P"] | None, num_rounds: int) -> Case:
    """From the beginning every time, or going on with one stream whose prime is computed in the first call."""

    def sampler() -> Sampler:
        return Sampler(model, num_lanes=num_lanes, seed=0, start_code=0, prime=prime)

    if prime is None:  # each call starts anew, so that it is always the first codes
        return lambda: num_lanes * len(list(sampler().run(SAMPLED_CODES)))
    stream = sampler().run(SAMPLED_CODES * (num_rounds + 1))
    return lambda: num_lanes * len(list(islice(stream, SAMPLED_CODES)))


def _random_codes(num_lanes: int, length: int, vocab_size: int) -> Int[Tensor, "B T"]:
    return torch.randint(vocab_size, (num_lanes, length), generator=torch.Generator().manual_seed(0))


def markdown_report(command: str, report: dict[str, Any]) -> str:
    """BENCHMARKS.md: the command and what `measure_speed` returned."""
    rows = [
        (row["measurement"], row["case"], f"{row['codes_per_second']:,.0f}", f"{row['ratio']:.2f}")
        for row in report["rows"]
    ]
    lines = [
        "# Benchmarks",
        "",
        f"    {command}",
        "",
        f"torch {report['torch']}, {report['machine']}, {report['cores']} cores, {report['threads']} threads, lanes "
        f"{report['lanes']}, float32; codes/s: medians of {report['rounds']} interleaved rounds; ratio: median over "
        "the rounds of the ratio within a round, to the nearest row above with 1.00.",
        "",
        markdown_table([("measurement", "case", "codes/s", "ratio"), *rows]),
    ]
    return "\n".join(lines) + "\n"


APPLIES: dict[str, Callable[[RunConfig], bool]] = {
    "chunk": lambda config: 0 < getattr(config.model, "window_length", 0) < config.data.chunk_length,
    "attention": lambda config: hasattr(config.model, "attention_backend"),
}
"""Whether a recipe has anything to compare in a measurement; those that are not here are of any recipe."""
MEASUREMENTS = {
    "train": measure_train,
    "chunk": measure_chunk,
    "attention": measure_attention,
    "sample": measure_sample,
}
