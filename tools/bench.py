"""Measure speed: training, what the layer-parallel chunk and the fused attention gain, sampling early and late.

Whatever is compared runs interleaved, round after round, and the ratio is the median over rounds of the ratio within a
round: a machine that slows down for a while slows both sides. Times are of the process's wall clock.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.command_line import build_parser, run_tool
from ct_audio.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ct_audio.runs.config import RunConfig

Case = Callable[[], int]
"""Does a fixed amount of work and returns how many codes it was."""
SAMPLED_CODES = 500
MAX_ROUNDS = 1000


def main() -> int:
    """Parse, measure, print a Markdown table (or JSON)."""
    arguments = _parse()
    import torch  # after --help: it takes seconds

    from ct_audio.runs.config import load_config

    torch.set_num_threads(arguments.threads)
    configs = {Path(path).stem: load_config(path, arguments.set) for path in arguments.recipes}
    if len(configs) < len(arguments.recipes):
        raise UserError("recipes: two files have the same name; measure them in two calls")
    rows = [row for what in arguments.what for row in MEASUREMENTS[what](configs, arguments)]
    report = {
        "command": shlex.join(["python", "tools/bench.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "lanes": arguments.lanes,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(_markdown(report), encoding="utf-8")
    print(json.dumps(report) if arguments.json else _markdown(report), end="\n" if arguments.json else "")
    return 0


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Measure speed on the CPU. train: forward, backward and update of each recipe. chunk: a chunk in one forward "
        "pass against window after window. attention: the fused backend against the reference. sample: the cost of a "
        "code early and late in a stream."
    )
    parser.add_argument("recipes", nargs="+", help="YAML files of recipes; the first is the base of ratios")
    parser.add_argument("--what", nargs="+", choices=list(MEASUREMENTS), default=["train"], help="what to measure")
    parser.add_argument("--set", nargs="*", default=[], metavar="A.B=C", help="overrides for all recipes")
    parser.add_argument("--lanes", type=int, default=1, metavar="B", help="streams side by side")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds after one to warm up")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the Markdown here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    for name in ("lanes", "threads", "rounds"):
        if not 1 <= getattr(arguments, name) <= MAX_ROUNDS:
            raise UserError(f"--{name}: expected 1 to {MAX_ROUNDS}, got {getattr(arguments, name)}")
    return arguments


def compare(what: str, cases: dict[str, Case], num_rounds: int) -> list[dict[str, Any]]:
    """Codes a second of each case, and the median ratio to the first case; all run once a round, in turn."""
    from tqdm import tqdm

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


def measure_train(configs: "dict[str, RunConfig]", arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A training step of each recipe: forward, backward, clipping, Adam."""
    cases = {name: _training_step(config, arguments.lanes) for name, config in configs.items()}
    return compare("train", cases, arguments.rounds)


def measure_chunk(configs: "dict[str, RunConfig]", arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The windows of a chunk in one forward pass, layer by layer, against one forward pass a window."""
    rows: list[dict[str, Any]] = []
    for name, config in configs.items():
        window_length = _window_length(config)
        if window_length and window_length < config.data.chunk_length:
            cases = {
                f"{name}, window after window": _training_step(config, arguments.lanes, piece_length=window_length),
                f"{name}, chunk at once": _training_step(config, arguments.lanes),
            }
            rows += compare("chunk", cases, arguments.rounds)
    return rows


def measure_attention(configs: "dict[str, RunConfig]", arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A training step with each attention backend."""
    import dataclasses

    from ct_audio.models.compressive.attention import ATTENTION_BACKENDS

    rows: list[dict[str, Any]] = []
    for name, config in configs.items():
        if hasattr(config.model, "attention_backend"):
            cases = {
                f"{name}, {backend}": _training_step(
                    dataclasses.replace(config, model=dataclasses.replace(config.model, attention_backend=backend)),
                    arguments.lanes,
                )
                for backend in sorted(ATTENTION_BACKENDS, reverse=True)
            }
            rows += compare("attention", cases, arguments.rounds)
    return rows


def measure_sample(configs: "dict[str, RunConfig]", arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Sampling over the first codes of a stream, and over as many after all memory is full."""
    from ct_audio.models import build_model

    rows: list[dict[str, Any]] = []
    for name, config in configs.items():
        model = build_model(config)
        late = model.temporal_range + config.data.chunk_length  # all memory is full
        prime = _random_codes(arguments.lanes, late, model.vocab_size)
        cases = {
            f"{name}, {when}": _sampling(model, arguments.lanes, codes)
            for when, codes in (("first codes", None), (f"after {late:,} codes", prime))
        }
        rows += compare("sample", cases, arguments.rounds)
    return rows


def _training_step(config: "RunConfig", num_lanes: int, *, piece_length: int | None = None) -> Case:
    """A step on random codes with memory carried from call to call; `piece_length` codes a forward pass at a time."""
    import torch

    from ct_audio.models import build_model
    from ct_audio.models.interface import clip_gradients
    from ct_audio.models.state import detach_memory
    from ct_audio.training.schedules import make_optimizer

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


def _sampling(model: Any, num_lanes: int, prime: "Tensor | None") -> Case:
    """From the beginning every time, or going on with one stream whose prime is computed in the first call."""
    from ct_audio.sampling.sampler import sample_codes

    settings: dict[str, Any] = {"num_lanes": num_lanes, "seed": 0, "start_code": 0}
    if prime is None:  # each call starts anew, so that it is always the first codes
        return lambda: num_lanes * len(list(sample_codes(model, num_codes=SAMPLED_CODES, **settings)))
    stream = sample_codes(model, num_codes=SAMPLED_CODES * (MAX_ROUNDS + 1), prime=prime, **settings)
    return lambda: num_lanes * len(list(islice(stream, SAMPLED_CODES)))


def _random_codes(num_lanes: int, length: int, vocab_size: int) -> "Tensor":
    import torch

    return torch.randint(vocab_size, (num_lanes, length), generator=torch.Generator().manual_seed(0))


def _window_length(config: "RunConfig") -> int | None:
    return getattr(config.model, "window_length", None)


def _markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Benchmarks",
        "",
        f"    {report['command']}",
        "",
        f"torch {report['torch']}, {report['machine']}, {report['cores']} cores, {report['threads']} threads, lanes "
        f"{report['lanes']}, float32; codes/s: medians of {report['rounds']} interleaved rounds; ratio: median over "
        "the rounds of the ratio within a round, to the nearest row above with 1.00.",
        "",
        "| measurement | case | codes/s | ratio |",
        "|---|---|---|---|",
    ]
    for row in report["rows"]:
        rate, ratio = f"{row['codes_per_second']:,.0f}", f"{row['ratio']:.2f}"
        lines.append(f"| {row['measurement']} | {row['case']} | {rate} | {ratio} |")
    return "\n".join(lines) + "\n"


MEASUREMENTS = {
    "train": measure_train,
    "chunk": measure_chunk,
    "attention": measure_attention,
    "sample": measure_sample,
}

if __name__ == "__main__":
    sys.exit(run_tool(main))
