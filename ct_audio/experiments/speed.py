"""Speed: of training, of the layer-parallel chunk and the fused attention, of sampling with both steppers.

Whatever is compared runs interleaved, round after round, and the ratio is the median over rounds of the ratio within a
round: a machine that slows down for a while slows both sides. Times are CPU time of the process, divided by the number
of threads: other work on the machine disturbs them less than wall time.
"""

import dataclasses
import importlib
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.common.machine import MEMORY, in_own_process, peak_memory
from ct_audio.common.progress import Progress
from ct_audio.common.text import markdown_table
from ct_audio.models import SequenceModel, build_model
from ct_audio.models.compressive.attention import ATTENTION_BACKENDS
from ct_audio.models.interface import clip_gradients
from ct_audio.models.state import detach_memory
from ct_audio.runs.config import RunConfig, load_config
from ct_audio.sampling.sampler import Sampler, Stepper
from ct_audio.training.schedules import make_optimizer
from ct_audio.training.session import ChunkLoss

SAMPLED_CODES = 512
"""Codes that the eager stepper makes a round with a model of at most a million parameters; the compiled one 8 times."""
STEP_PERIODS = 15
"""Repetitions of each step whose time is taken, for such a model."""
_LATE_WINDOWS = 50
_WAYS = ((4, 1, 1), (4, 4, 1), (16, 1, 1), (16, 8, 1), (4, 2, 2), (16, 8, 2))
"""Lanes, how many of them side by side, threads."""
_PYPI_PACKAGE = "compressive_transformer_pytorch"
_PYPI_NAMES = {True: "PyPI compressive-transformer-pytorch", False: "the same without GRU gates"}
"""With its gates, as it comes, and without."""


class Case(NamedTuple):
    """Something to measure.

    Attributes:
        run: does a fixed amount of work and returns how many codes it was.
        num_threads: that share the work; None: as many as the measurement has.
    """

    run: Callable[[], int]
    num_threads: int | None = None


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
    rows = [
        row
        for name in what
        for cases in MEASUREMENTS[name](configs, num_lanes, num_rounds)
        for row in compare(name, cases, num_rounds, num_threads)
    ]
    facts: list[dict[str, Any]] = []
    if "train" in what and MEMORY.exists():
        trained = [row["case"] for row in rows if row["measurement"] == "train"]
        facts += training_facts(trained, configs, num_lanes, num_threads)
    if "sample" in what:
        facts += sampling_facts(dict(zip(configs, recipes, strict=True)), configs, overrides)
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": num_threads,
        "lanes": num_lanes,
        "rounds": num_rounds,
        "rows": rows,
        "facts": facts,
    }


def quick_rate(recipe: str, what: Literal["train", "sample"]) -> float:
    """Codes a second of one CPU thread, by two rounds after one that warms up: of a training step of one lane, or of
    one sample by the fastest stepper, with memories that are full."""
    torch.set_num_threads(1)
    config = load_config(recipe)
    if what == "train":
        run = training_step(config, 1)
    else:
        model = build_model(config)
        run = _sampling(model, 1, _steppers(model)[-1])
    (row,) = compare(f"measuring the speed: {what}", {recipe: Case(run)}, num_rounds=2, num_threads=1)
    return row["codes_per_second"]


def compare(what: str, cases: dict[str, Case], num_rounds: int, num_threads: int) -> list[dict[str, Any]]:
    """Codes a second of each case, and the median ratio to the first case; all run once a round, in turn."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for index in Progress(range(num_rounds + 1), desc=what, unit="round"):
        for name, case in cases.items():
            began = time.process_time()
            num_codes = case.run()
            if index:  # the first round warms up
                seconds = (time.process_time() - began) / (case.num_threads or num_threads)
                rates[name].append(num_codes / seconds)
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
    """A training step of each recipe: forward, backward, clipping, Adam; and of PyPI's package where it is there."""
    cases = {name: Case(training_step(config, num_lanes)) for name, config in configs.items()}
    first = next(iter(configs.values()))
    for gated, name in _PYPI_NAMES.items():
        step = _training_of_others(first, num_lanes, gated=gated)
        if step is not None:
            cases[name] = Case(step)
    yield cases


def chunk_cases(configs: dict[str, RunConfig], num_lanes: int, _num_rounds: int) -> Iterator[dict[str, Case]]:
    """The windows of a chunk in one forward pass, layer by layer, against one forward pass a window."""
    for name, config in filter(lambda item: APPLIES["chunk"](item[1]), configs.items()):
        yield {
            f"{name}, window after window": Case(
                training_step(config, num_lanes, piece_length=config.model.window_length)
            ),
            f"{name}, chunk at once": Case(training_step(config, num_lanes)),
        }


def attention_cases(configs: dict[str, RunConfig], num_lanes: int, _num_rounds: int) -> Iterator[dict[str, Case]]:
    """A training step with each attention backend."""
    for name, config in filter(lambda item: APPLIES["attention"](item[1]), configs.items()):
        cases = {}
        for backend in sorted(ATTENTION_BACKENDS, reverse=True):
            model = dataclasses.replace(config.model, attention_backend=backend)
            cases[f"{name}, {backend}"] = Case(training_step(dataclasses.replace(config, model=model), num_lanes))
        yield cases


def sample_cases(configs: dict[str, RunConfig], num_lanes: int, _num_rounds: int) -> Iterator[dict[str, Case]]:
    """Both steppers with other numbers of lanes and threads, the installed package of others beside; then the compiled
    one many windows later."""
    for name, config in configs.items():
        model = build_model(config)
        steppers, window = _steppers(model), max(model.window_length, 128)
        cases = {}
        for stepper in steppers:
            label = f"{name}, {stepper}"
            cases[f"{label}, first codes"] = Case(_sampling(model, num_lanes, stepper, anew=True))
            cases[f"{label}, memories full"] = Case(_sampling(model, num_lanes, stepper))
        is_large = _scale(model) < 0.1  # the states of many lanes would fill the machine
        for lanes in (4,) if is_large else (4, 16):
            cases[f"{name}, eager, {lanes} lanes"] = Case(_sampling(model, lanes, "eager"))
        if "compiled" in steppers:
            ways = ((4, 4, 1), (4, 2, 2)) if is_large else _WAYS
            for lanes, together, threads in ways:
                how = "one after another" if together == 1 else f"{together} side by side"
                label = f"{name}, compiled, {lanes} lanes, {how}" + (f", {threads} threads" if threads > 1 else "")
                run = _sampling(model, lanes, "compiled", together=together, threads=threads)
                cases[label] = Case(run, threads)
        if (others := _generate_of_others(config)) is not None:
            cases[f"{name}'s sizes, compressive-transformer-pytorch (PyPI), generate, 1 lane"] = Case(others)
        yield cases
        if "compiled" in steppers and not is_large:
            prime = _random_codes(num_lanes, _LATE_WINDOWS * window, model.vocab_size)
            late = _sampling(model, num_lanes, "compiled", prime=prime)
            first = Case(_sampling(model, num_lanes, "compiled"))
            yield {
                f"{name}, compiled, window 1 of full memories": first,
                f"{name}, compiled, window {_LATE_WINDOWS}": Case(late),
            }


def _steppers(model: SequenceModel) -> tuple[Stepper, ...]:
    sampler = Sampler(model, num_lanes=1, seed=0, start_code=0)
    return ("eager", "compiled") if sampler.stepper == "compiled" else ("eager",)


def training_step(config: RunConfig, num_lanes: int, *, piece_length: int | None = None) -> Callable[[], int]:
    """A step on random codes with memory carried from call to call; `piece_length` codes a forward pass at a time.

    In float32, whatever the recipe's precision; compiled where its `train.compile` is set.
    """
    torch.manual_seed(0)
    length = config.data.chunk_length
    piece_length = piece_length or length
    model = build_model(config)
    optimizer = make_optimizer(model, config.optim)
    chunk_loss = ChunkLoss(model, device_type="cpu", precision="float32", compile=config.train.compile)
    codes = _random_codes(num_lanes, length + 1, model.vocab_size)
    memory = model.zero_memory(num_lanes)

    def step() -> int:
        nonlocal memory
        for begin in range(0, length, piece_length):
            piece = codes[:, begin : begin + piece_length + 1]
            nll, memory, auxiliary_losses = chunk_loss(piece[:, :-1], piece[:, 1:], memory, None)
            loss = nll.sum() / (num_lanes * length)
            (loss + sum(auxiliary_losses.values()) * piece_length / length).backward()
            memory = detach_memory(memory)
        clip_gradients(model.gradient_groups(), config.optim.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        return num_lanes * length

    return step


def _scale(model: SequenceModel) -> float:
    """How much less is measured of a large model: its codes cost as much more."""
    return min(1.0, 1e6 / max(1, sum(parameter.numel() for parameter in model.parameters())))


def _sampling(
    model: SequenceModel,
    num_lanes: int,
    stepper: Stepper,
    *,
    anew: bool = False,
    prime: Int[Tensor, "B P"] | None = None,
    together: int | None = None,
    threads: int | None = None,
) -> Callable[[], int]:
    """From the beginning every time, or going on with one stream: after a prime, else with memories that are full."""
    num_codes = SAMPLED_CODES * _scale(model) * (1 if stepper == "eager" else 8)
    num_codes = max(4, round(num_codes / num_lanes))

    def sampler() -> Sampler:
        made = Sampler(model, num_lanes=num_lanes, seed=0, start_code=0, prime=prime, stepper=stepper)
        made.lanes_together, made.num_threads = together, threads
        return made

    stream: Sampler | None = None

    def run() -> int:
        nonlocal stream
        if anew:
            stream = sampler()
        elif stream is None:  # in the round that warms up
            stream = sampler()
            if prime is None:
                stream.begin_full()
        return sum(codes.numel() for codes, _ in stream.blocks(num_codes))

    return run


def _model_of_others(config: RunConfig, *, gated: bool) -> Any:
    """The model of PyPI's compressive-transformer-pytorch with the sizes of a recipe (its feed-forward block is always
    4 times as wide); None where it is not installed, and for recipes that are not of such a model or large.

    Args:
        gated: with GRU gates in place of residuals, its default.
    """
    model = config.model
    if not getattr(model, "compressed_memory_length", 0) or model.width > 256:
        return None
    try:
        package = importlib.import_module(_PYPI_PACKAGE)
    except ImportError:
        print("compressive-transformer-pytorch (PyPI) is not installed: it is left out", file=sys.stderr)
        return None
    window, memory, compressed = _lengths_of_others(config)
    torch.manual_seed(0)
    return package.CompressiveTransformer(
        num_tokens=model.vocab_size,
        dim=model.width,
        depth=model.num_layers,
        heads=model.num_heads,
        seq_len=window,
        mem_len=memory,
        cmem_len=compressed,
        cmem_ratio=4,
        gru_gated_residual=gated,
    )


def _lengths_of_others(config: RunConfig) -> tuple[int, int, int]:
    """Of window, memory and compressed memory: a recipe's, or the least that the package takes."""
    model = config.model
    memory = max(model.memory_length, model.window_length)
    return model.window_length, memory, max(model.compressed_memory_length, memory // 4)


def _generate_of_others(config: RunConfig) -> Callable[[], int] | None:
    """A window by the `generate` of the package of `_model_of_others` after as much as fills its memories."""
    net = _model_of_others(config, gated=False)
    if net is None:
        return None
    wrapper = importlib.import_module(_PYPI_PACKAGE).AutoregressiveWrapper(net).eval()
    window, memory, compressed = _lengths_of_others(config)
    start = _random_codes(1, memory + 4 * compressed + window, config.model.vocab_size)

    def run() -> int:
        wrapper.generate(start, window)  # returns less than it has made where it was primed with several windows
        return window

    return run


def _training_of_others(config: RunConfig, num_lanes: int, *, gated: bool) -> Callable[[], int] | None:
    """A training step of the model of `_model_of_others`, window after window, with its memories carried."""
    net = _model_of_others(config, gated=gated)
    if net is None:
        return None
    length, window, memories = config.data.chunk_length, config.model.window_length, None
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    codes = _random_codes(num_lanes, length + 1, config.model.vocab_size)

    def step() -> int:
        nonlocal memories
        for begin in range(0, length, window):
            piece = codes[:, begin : begin + window + 1]
            logits, memories, auxiliary_loss = net(piece[:, :-1], memories)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())
            ((loss + auxiliary_loss.sum()) * window / length).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.optim.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        return num_lanes * length

    return step


def training_facts(
    cases: Sequence[str], configs: dict[str, RunConfig], num_lanes: int, num_threads: int
) -> Iterator[dict[str, Any]]:
    """The most memory of three training steps of each case of `train_cases`, weights and Adam's moments included."""
    makers: dict[str, Callable[[], Any]] = {
        name: partial(training_step, config, num_lanes) for name, config in configs.items()
    }
    first = next(iter(configs.values()))
    makers |= {name: partial(_training_of_others, first, num_lanes, gated=g) for g, name in _PYPI_NAMES.items()}
    for name in cases:
        value = in_own_process(_peak_of_training, makers[name], num_threads)
        yield {"case": name, "quantity": "most memory of training steps", "value": value, "unit": "MiB"}


def _peak_of_training(maker: Callable[[], Callable[[], int]], num_threads: int) -> float:
    torch.set_num_threads(num_threads)
    with peak_memory() as mebibytes:
        step = maker()
        for _ in range(3):
            step()
    return mebibytes()


def sampling_facts(
    recipes: dict[str, str], configs: dict[str, RunConfig], overrides: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """What is not a number of codes a second: first calls, steps over a window, shares of the machine."""

    def fact(what: str, value: float, unit: str) -> dict[str, Any]:
        return {"case": name, "quantity": what, "value": value, "unit": unit}

    multiplied, called = _multiplications_per_second(), set[str]()
    for name, config in configs.items():
        model = build_model(config)
        for stepper in _steppers(model):
            if stepper == "eager" and _scale(model) < 0.1:
                continue  # minutes
            steps = _step_seconds(model, stepper)
            median, window = float(np.median(steps)), model.window_length
            yield fact(f"{stepper}, median step", 1e6 * median, "us")
            yield fact(f"{stepper}, longest step : median step", float(steps.max()) / median, "x")
            if window >= 4:
                of_window = steps.reshape(-1, window).mean(0)
                quarter = window // 4
                ratio = of_window[-quarter:].mean() / of_window[:quarter].mean()
                yield fact(f"{stepper}, last quarter of a window : first quarter", float(ratio), "x")
                yield fact(f"{stepper}, last step of a window : first step", float(of_window[-1] / of_window[0]), "x")
            if stepper == "compiled":
                num_bytes, num_products = work_of_a_code(model)
                rate = _bytes_per_second(num_bytes)
                seconds = float(steps.mean())
                yield fact("compiled, read for a code", num_bytes / 1e6, "MB")
                yield fact("machine, reads of a buffer of that size", rate / 1e9, "GB/s")
                yield fact("compiled, share of the machine's bandwidth", 100 * num_bytes / seconds / rate, "%")
                yield fact("compiled, multiply-adds of a code", num_products / 1e6, "million")
                yield fact("machine, multiply-adds of a product of matrices", multiplied / 1e9, "billion/s")
                yield fact(
                    "compiled, share of the machine's arithmetic", 100 * num_products / seconds / multiplied, "%"
                )
        if "compiled" in _steppers(model) and config.model.name not in called:  # the others' kernels are the same
            called.add(config.model.name)
            without, cached = _first_calls(recipes[name], overrides)
            yield fact("compiled, first call of a process, without a cache", without, "s")
            yield fact("compiled, first call of a process, with the cache", cached, "s")


def work_of_a_code(model: SequenceModel) -> tuple[float, float]:
    """Bytes that sampling a code reads in float32, about, and multiply-adds: every weight once, of tables a row, f_c
    once in as many codes as it compresses; keys, values and positions of the rows that are attended to."""
    groups, config = model.gradient_groups(), model.config
    rate = min(getattr(config, "compression_rates", (1,)))
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    weights = sum(parameter.numel() for parameter in groups["model"] if id(parameter) not in tables)
    weights += sum(parameter.numel() for parameter in groups.get("compression", [])) / rate
    rows, products = model.attention_cost, float(weights)
    numbers = float(weights)
    if rows:
        products += rows * (2 * config.width + config.num_heads * config.position_width)
        numbers += rows * (2 * config.key_width + config.position_width)
    return 4 * numbers, products


def _step_seconds(model: SequenceModel, stepper: Stepper) -> Any:
    """CPU time of single steps with full memories, from the first step of a window on: of each step of a period (whole
    windows, whole hops of the predictor) the median over periods; of the compiled ones, without what a call costs."""
    hop = getattr(model.config, "prediction_hop_length", 1) if model.config.front_end == "linear_prediction" else 1
    window = model.window_length if model.window_length > 1 else 16
    period, num_periods = math.lcm(window, hop), max(2, round(STEP_PERIODS * _scale(model)))
    start = torch.zeros(1, dtype=torch.int64)
    times = np.empty((num_periods, period))
    with model.evaluation_mode(), torch.inference_mode():
        state = model.begin_steps(model.full_memory(1), start[:, None][:, :0])
        if stepper == "eager":
            sampler = Sampler(model, num_lanes=1, seed=0, start_code=0, stepper="eager")
            sampler.begin_full()
            for _ in sampler.run(model.window_length - model.window_length // 2):  # to the end of the window
                pass
            codes = sampler.run(times.size)
            for index in Progress(range(times.size), desc="eager steps", unit="step"):
                began = time.process_time()
                next(codes)
                times.flat[index] = time.process_time() - began
            codes.close()
            return np.median(times, axis=0)
        block = model.block_sampler()
        uniforms = torch.rand(1, times.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        drawing: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None}
        state, last, calls = block.begin(state), start, []
        for index in Progress(range(times.size), desc="compiled steps", unit="step"):
            began = time.process_time()
            block.sample_block(last, state, uniforms[:, :0], **drawing)
            between = time.process_time()
            codes, _, state = block.sample_block(last, state, uniforms[:, index : index + 1], **drawing)
            times.flat[index] = time.process_time() - between
            calls.append(between - began)
            last = codes[:, 0]
    return np.maximum(np.median(times, axis=0) - statistics.median(calls), 1e-9)


def _bytes_per_second(num_bytes: float) -> float:
    """At which one thread reads a buffer of that size again and again: from whichever cache it fits."""
    from ct_audio.models import kernels  # imports numba

    buffer, seconds = np.ones(max(1024, int(num_bytes) // 4), np.float32), []
    repeats = max(1, 10**7 // len(buffer))
    for _ in range(16):
        began = time.process_time()
        for _ in range(repeats):
            kernels.total(buffer)
        seconds.append((time.process_time() - began) / repeats)
    return buffer.nbytes / statistics.median(seconds[1:])


def _multiplications_per_second() -> float:
    """Multiply-adds of one thread in a product of large matrices in float32."""
    before, size, seconds = torch.get_num_threads(), 1024, []
    torch.set_num_threads(1)
    a, b = torch.ones(size, size), torch.ones(size, size)
    for _ in range(8):
        began = time.process_time()
        torch.mm(a, b)
        seconds.append(time.process_time() - began)
    torch.set_num_threads(before)
    return size**3 / statistics.median(seconds[1:])


_FIRST_CALL = """
import sys, time
from ct_audio.models import build_model
from ct_audio.runs.config import load_config
from ct_audio.sampling.sampler import Sampler
model = build_model(load_config(sys.argv[1], sys.argv[2:]))
began = time.process_time()
list(Sampler(model, num_lanes=1, seed=0, start_code=0, stepper="compiled").run(1))
print(time.process_time() - began)
"""


def _first_calls(recipe: str, overrides: Sequence[str]) -> tuple[float, float]:
    """CPU time of a new process, from a model to its first code: with an empty folder for numba's cache, and again."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        for _ in range(2):
            command = [sys.executable, "-c", _FIRST_CALL, recipe, *overrides]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            seconds.append(float(done.stdout))
    return seconds[0], seconds[1]


def _random_codes(num_lanes: int, length: int, vocab_size: int) -> Int[Tensor, "B T"]:
    return torch.randint(vocab_size, (num_lanes, length), generator=torch.Generator().manual_seed(0))


def markdown_report(command: str, report: dict[str, Any]) -> str:
    """BENCHMARKS.md: the command and what `measure_speed` returned."""
    rows = [
        (row["measurement"], row["case"], _rounded(row["codes_per_second"]), f"{row['ratio']:.2f}")
        for row in report["rows"]
    ]
    lines = [
        "# Benchmarks",
        "",
        f"    {command}",
        "",
        f"torch {report['torch']}, {report['machine']}, {report['cores']} cores, {report['threads']} threads, lanes "
        f"{report['lanes']}, float32; codes/s (of all lanes, in CPU time divided by the number of threads): medians of "
        f"{report['rounds']} interleaved rounds; ratio: median over the rounds of the ratio within a round, to the "
        "nearest row above with 1.00.",
        "",
        markdown_table([("measurement", "case", "codes/s", "ratio"), *rows]),
    ]
    if report["facts"]:
        facts = [(row["case"], row["quantity"], f"{_rounded(row['value'])} {row['unit']}") for row in report["facts"]]
        lines += [
            "",
            "Memory: above what was held before the model was built, each case in a process of its own. Sampling: one "
            "lane, one thread, CPU time; steps: median over repetitions of each step of a period.",
            "",
            markdown_table([("model", "quantity", "value"), *facts]),
        ]
    return "\n".join(lines) + "\n"


def _rounded(value: float) -> str:
    """To three digits, whole from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


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
