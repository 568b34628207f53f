"""Speed: of training, of the layer-parallel chunk and the fused attention, of sampling early and late in a stream.

Whatever is compared runs interleaved, round after round, and the ratio is the median over rounds of the ratio within a
round: a machine that slows down for a while slows both sides. Times are of the process's wall clock.
"""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.common.progress import Progress
from ct_audio.common.text import markdown_table
from ct_audio.models import SequenceModel, build_model
from ct_audio.models.compressive.attention import ATTENTION_BACKENDS
from ct_audio.models.interface import clip_gradients
from ct_audio.models.state import detach_memory
from ct_audio.runs.config import RunConfig, load_config
from ct_audio.sampling.sampler import Sampler, Stepper
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
    """Measure recipes on the CPU; returns the rows, and on what they were measured, as plain values.

    Args:
        recipes: YAML files; the first is the base of ratios.
        what: keys of MEASUREMENTS.
        num_rounds: at least 1; one more warms up.
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
        "rows": [
            row
            for name in what
            for cases in MEASUREMENTS[name](configs, num_lanes, num_rounds)
            for row in compare(name, cases, num_rounds)
        ],
    }


def compare(what: str, cases: dict[str, Case], num_rounds: int) -> list[dict[str, Any]]:
    """Codes a second of each case, and the median ratio to the first case; all run once a round, in turn."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for index in Progress(range(num_rounds + 1), desc=what, unit="round"):
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


def train_cases(configs: dict[str, RunConfig], num_lanes: int, _num_rounds: int) -> Iterator[dict[str, Case]]:
    """A training step of each recipe: forward, backward, clipping, Adam."""
    yield {name: training_step(config, num_lanes) for name, config in configs.items()}


def chunk_cases(configs: dict[str, RunConfig], num_lanes: int, _num_rounds: int) -> Iterator[dict[str, Case]]:
    """The windows of a chunk in one forward pass, layer by layer, against one forward pass a window."""
    for name, config in filter(lambda item: APPLIES["chunk"](item[1]), configs.items()):
        yield {
            f"{name}, window after window": training_step(config, num_lanes, piece_length=config.model.window_length),
            f"{name}, chunk at once": training_step(config, num_lanes),
        }


def attention_cases(configs: dict[str, RunConfig], num_lanes: int, _num_rounds: int) -> Iterator[dict[str, Case]]:
    """A training step with each attention backend."""
    for name, config in filter(lambda item: APPLIES["attention"](item[1]), configs.items()):
        cases = {}
        for backend in sorted(ATTENTION_BACKENDS, reverse=True):
            model = dataclasses.replace(config.model, attention_backend=backend)
            cases[f"{name}, {backend}"] = training_step(dataclasses.replace(config, model=model), num_lanes)
        yield cases


def sample_cases(configs: dict[str, RunConfig], num_lanes: int, _num_rounds: int) -> Iterator[dict[str, Case]]:
    """Each stepper over the first codes of a stream, over as many after all memory is full, and many windows later;
    the compiled one with other numbers of lanes, and with a lane for each of two threads."""
    for name, config in configs.items():
        model = build_model(config)
        late = model.temporal_range + config.data.chunk_length  # all memory is full
        later = late + 50 * max(model.window_length, 128)
        cases = {}
        for stepper in _steppers(model):
            label = f"{name}, {stepper}"
            cases[f"{label}, first codes"] = _sampling(model, num_lanes, None, stepper)
            prime = _random_codes(num_lanes, late, model.vocab_size)
            cases[f"{label}, after {late:,} codes"] = _sampling(model, num_lanes, prime, stepper)
        if "compiled" in _steppers(model):
            label, prime = f"{name}, compiled", _random_codes(num_lanes, later, model.vocab_size)
            cases[f"{label}, after {later:,} codes"] = _sampling(model, num_lanes, prime, "compiled")
            for lanes, together in ((4, 1), (4, 4), (16, 1), (16, 8)):
                prime = _random_codes(lanes, late, model.vocab_size)
                how = f"{lanes} lanes, {'one after another' if together == 1 else f'{together} side by side'}"
                cases[f"{label}, {how}"] = _sampling(model, lanes, prime, "compiled", together=together)
            prime = _random_codes(2, late, model.vocab_size)
            cases[f"{label}, 2 lanes in 2 threads"] = _sampling(model, 2, prime, "compiled", threads=2)
        yield cases


def _steppers(model: SequenceModel) -> tuple[Stepper, ...]:
    sampler = Sampler(model, num_lanes=1, seed=0, start_code=0)
    return ("eager", "compiled") if sampler.stepper == "compiled" else ("eager",)


def training_step(config: RunConfig, num_lanes: int, *, piece_length: int | None = None) -> Case:
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


def _sampling(
    model: SequenceModel,
    num_lanes: int,
    prime: Int[Tensor, "B P"] | None,
    stepper: Stepper,
    *,
    together: int | None = None,
    threads: int | None = None,
) -> Case:
    """From the beginning every time, or going on with one stream whose prime is computed in the first call."""
    num_codes = SAMPLED_CODES if stepper == "eager" else 8 * SAMPLED_CODES

    def sampler() -> Sampler:
        made = Sampler(model, num_lanes=num_lanes, seed=0, start_code=0, prime=prime, stepper=stepper)
        made.lanes_together = together
        return made

    def drain(sampler: Sampler) -> int:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        count = sum(codes.numel() for codes, _ in sampler.blocks(num_codes))
        torch.set_num_threads(before)
        return count

    if prime is None:  # each call starts anew, so that it is always the first codes
        return lambda: drain(sampler())
    stream = sampler()
    return lambda: drain(stream)


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
    "train": train_cases,
    "chunk": chunk_cases,
    "attention": attention_cases,
    "sample": sample_cases,
}
"""Cases by measurement, those together that are compared with each other."""
