"""What a GPU is asked first: is everything right on it, which kernels run, how fast is it, does it train.

One stage after another, each a table of the report. What has been found is kept after every stage, so that the same
command goes on with the stages that are missing. The equalities are those of the list of contracts in ARCHITECTURE.md,
by number, on small models in float64; the speed is that of the paper's models.

Shape letters: B lanes, T codes.
"""

import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ct_audio.common.files import read_json, write_file, write_json
from ct_audio.common.text import markdown_table
from ct_audio.data.codecs import MuLaw, read_codes
from ct_audio.data.corpus import CorpusWriter
from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.models import SequenceModel, build_model, model_config_class
from ct_audio.models.compressive.attention import ATTENTION_BACKENDS
from ct_audio.models.interface import clip_gradients
from ct_audio.models.state import detach_memory, named_tensors
from ct_audio.runs.checkpoint_files import find_checkpoint, read_tensors
from ct_audio.runs.config import RunConfig, config_from_dict
from ct_audio.runs.metrics import read_metrics
from ct_audio.runs.open_run import load_run_model, run_codec
from ct_audio.sampling.estimate import estimate_code_seconds
from ct_audio.sampling.sampler import Sampler, verify_steps
from ct_audio.training.loop import train
from ct_audio.training.schedules import learning_rate, make_optimizer, set_learning_rate
from ct_audio.training.session import ChunkLoss

Rows = list[dict[str, Any]]
NOT_YET = "not yet run on a GPU"

_TRANSFORMER = {
    "name": "compressive_transformer",
    "vocab_size": 256,
    "num_layers": 2,
    "width": 32,
    "num_heads": 2,
    "feedforward_width": 48,
    "position_width": 8,
    "window_length": 16,
    "memory_length": 16,
    "compressed_memory_length": 8,
    "compression_rate": 2,
}
_PREDICTION = {"front_end": "linear_prediction", "prediction_window_length": 64, "head": "logistic_mixture"}
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "compressive_transformer": _TRANSFORMER,
    "most_used": _TRANSFORMER | {"compression_function": "most_used"},
    "adaptive_span": _TRANSFORMER | {"adaptive_span": True, "attention_backend": "reference"},
    "transformer_xl": _TRANSFORMER | {"memory_length": 32, "compressed_memory_length": 0},
    "prediction": _TRANSFORMER | _PREDICTION,
    "wavenet": {"name": "wavenet", "num_layers": 6, "layers_per_cycle": 3, "width": 16, "skip_width": 16},
}
"""Of the equalities."""


@dataclass(frozen=True)
class Plan:
    """What is checked.

    Attributes:
        device: where.
        recipes: of the paper's size, by label; the first one is trained.
        shipped: folders of models with a recording (clip.wav), to compare bfloat16 with float32.
        case_seconds: time that a measurement of speed takes, about.
        training_seconds: of the training at the end.
        peak_size: rows of the square matrices whose product measures the peak.
        out: directory of the report.
    """

    device: torch.device
    recipes: dict[str, RunConfig]
    shipped: list[Path]
    out: Path
    case_seconds: float = 5.0
    training_seconds: float = 300.0
    peak_size: int = 8192


def check_gpu(plan: Plan, *, command: str, seconds: float, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the stages that OUT/gpu_check.json has no result of, in order, until the time is used up.

    Args:
        command: for the report.
        seconds: no stage begins that, by its estimate, would end later; the same command then goes on.
    Returns:
        what stands in OUT/gpu_check.json: {"stages": {name: {"rows", "seconds"}}, "left_out": [name], ...}.
    """
    began, path = time.monotonic(), plan.out / "gpu_check.json"
    plan.out.mkdir(parents=True, exist_ok=True)
    before = read_json(path) if path.exists() else {}
    same = before.get("device") == _device_name(plan.device) and before.get("torch") == torch.__version__
    report = {"command": command, "device": _device_name(plan.device), "torch": torch.__version__, "stages": {}}
    report["stages"] = before["stages"] if same else {}
    stages = dict(_stages(plan))
    for name, (stage, estimate) in stages.items():
        if name in report["stages"] or time.monotonic() - began + estimate > seconds:
            continue
        say(f"{name} (about {estimate:.0f} s)")
        stage_began = time.monotonic()
        try:
            rows = stage(plan, report["stages"])
        except Exception as error:  # the next stage may tell more
            rows = [{"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}]
        report["stages"][name] = {"rows": rows, "seconds": round(time.monotonic() - stage_began, 1)}
        report["left_out"] = [other for other in stages if other not in report["stages"]]
        write_json(path, report)
        write_file(plan.out / "gpu_check.md", markdown_report(report).encode())
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    report["left_out"] = [other for other in stages if other not in report["stages"]]
    return report


def failures(report: dict[str, Any]) -> list[str]:
    """What is wrong: stages that failed, equalities that do not hold."""
    rows = [(name, row) for name, stage in report["stages"].items() for row in stage["rows"]]
    broken = [f"{name}: {row['failed']}" for name, row in rows if "failed" in row]
    return broken + [f"{name}: {row['equality']}, {row['model']}" for name, row in rows if row.get("holds") is False]


def markdown_report(report: dict[str, Any]) -> str:
    """What was found, a table for each stage."""
    lines = ["# GPU check", "", f"    {report['command']}", "", f"{report['device']}, torch {report['torch']}."]
    if report["device"].startswith("CPU"):
        lines += ["", f"The stages themselves were tried out on a CPU: {NOT_YET}."]
    for name, stage in report["stages"].items():
        keys = list(dict.fromkeys(key for row in stage["rows"] for key in row))
        cells = [[_cell(row.get(key, "")) for key in keys] for row in stage["rows"]]
        table = markdown_table([[key.replace("_", " ") for key in keys], *cells])
        lines += ["", f"## {name} ({stage['seconds']} s)", "", table]
    if report.get("left_out"):
        lines += [
            "",
            f"Left out, for lack of time: {', '.join(report['left_out'])}. The same command goes on with them.",
        ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _stages(plan: Plan) -> Iterator[tuple[str, tuple[Callable[[Plan, dict[str, Any]], Rows], float]]]:
    """Name, function and estimate in seconds of each stage; what costs most for what it tells comes last."""
    yield "machine", (_machine, 5)
    yield "equalities", (_equalities, 45)
    yield "attention", (_attention_kernels, 10)
    for label in plan.recipes:
        yield f"speed of {label}", (_speed(label, compile=False), 2 * plan.case_seconds)
    yield "sampling", (_sampling, 2 * plan.case_seconds * len(plan.recipes))
    yield "bfloat16", (_bfloat16, 10 * len(plan.shipped))
    yield "training", (_training, plan.training_seconds)
    for label in plan.recipes:
        yield f"speed of {label}, compiled", (_speed(label, compile=True), 120 + plan.case_seconds)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _repeat(function: Callable[[], Any], seconds: float, device: torch.device) -> tuple[int, float]:
    """How often it was called, and the time that it took, after one call to warm up."""
    function()
    _wait(device)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        function()
        count += 1
        if count % 8 == 0:
            _wait(device)
    _wait(device)
    return count, time.perf_counter() - began


def _machine(plan: Plan, _: dict[str, Any]) -> Rows:
    """What it is, and the most that its matrix products reach."""
    facts: dict[str, Any] = {"device": _device_name(plan.device)}
    if plan.device.type == "cuda":
        properties = torch.cuda.get_device_properties(plan.device)
        facts |= {"memory_gib": properties.total_memory / 2**30, "processors": properties.multi_processor_count}
        facts |= {"cuda": torch.version.cuda, "capability": f"{properties.major}.{properties.minor}"}
    for dtype in (torch.bfloat16, torch.float32):
        square = torch.randn(plan.peak_size, plan.peak_size, device=plan.device).to(dtype)
        count, seconds = _repeat(lambda square=square: square @ square, plan.case_seconds / 5, plan.device)
        name = f"teraflops_{str(dtype).removeprefix('torch.')}"
        facts[name] = count * 2 * plan.peak_size**3 / seconds / 1e12
    return [facts]


def small_model(name: str, device: torch.device) -> SequenceModel:
    """One of SMALL_MODELS in float64, away from zeros and ones, the same on every device."""
    plain = SMALL_MODELS[name]
    torch.manual_seed(0)
    model = build_model(model_config_class(plain["name"])(**plain)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(device)


def _codes(length: int, device: torch.device, *, lanes: int = 2, vocab_size: int = 256) -> Int[Tensor, "B T"]:
    numbers = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (lanes, length), generator=numbers).to(device)


def _equalities(plan: Plan, _: dict[str, Any]) -> Rows:
    """The contracts, and that the device says what the CPU says."""
    rows: Rows = []

    def add(equality: str, name: str, difference: float, bound: float) -> None:
        rows.append({"equality": equality, "model": name, "largest_difference": difference, "bound": bound})
        rows[-1]["holds"] = difference <= bound

    for name in SMALL_MODELS:
        model = small_model(name, plan.device)
        one, many = _run_pieces(model, 48), _run_pieces(model, 16)
        if name == "wavenet":  # whose gradients end where a piece begins
            one, many = ({key: part[key] for key in part if not key.startswith("gradient")} for part in (one, many))
        add("1. chunk = windows", name, _largest(one, many), 1e-10)
        add("2. steps = forward", name, _steps_difference(model), 1e-10)
        on_cpu = _run_pieces(small_model(name, torch.device("cpu")), 48)
        add("device = CPU", name, _largest(on_cpu, _run_pieces(model, 48)), 1e-9)
        add("7. causality", name, _causality_difference(model), 0.0)
        sampler = Sampler(model, num_lanes=2, seed=0, start_code=128, stepper="eager")
        parts = list(sampler.blocks(40, seconds=1.0))
        codes, said = (torch.cat([part[index] for part in parts], dim=1) for index in (0, 1))
        add("8. sampler = evaluator", name, verify_steps(model, codes, said, start_code=128), 1e-10)
    add("2b. steps that begin anew = forward", "compressive_transformer", _fresh_steps_difference(plan.device), 1e-10)
    add("3. fused = reference attention", "float64", _attention_difference(plan.device), 1e-10)
    add("4. resumed = uninterrupted", "compressive_transformer", _resume_difference(plan.device), 1e-10)
    every, codec = np.arange(256, dtype=np.uint8), MuLaw()
    add(
        "5. encode(decode(c)) = c", "mu-law, on the CPU", float((codec.encode(codec.decode(every)) != every).sum()), 0.0
    )
    rows.append({"equality": "6. two processes = one", "model": "needs two devices", "holds": "not run"})
    return rows


def _run_pieces(model: SequenceModel, piece_length: int) -> dict[str, Tensor]:
    """NLL, memory and gradients of 48 codes after 48 others, so many a forward pass, memories cut from the graph."""
    codes = _codes(97, model.device)
    model.zero_grad()
    memory = detach_memory(model(codes[:, :48], model.zero_memory(2)).memory)
    found, nlls = {}, []
    for begin in range(48, 96, piece_length):
        features, memory, losses = model(codes[:, begin : begin + piece_length], memory)
        nlls.append(model.nll(features, codes[:, begin + 1 : begin + piece_length + 1]))
        (nlls[-1].sum() / 96 + sum(losses.values(), nlls[-1].new_zeros(())) * piece_length / 48).backward()
        memory = detach_memory(memory)
    found["nll"] = torch.cat(nlls, dim=1).detach()
    found |= {f"memory/{name}": tensor for name, tensor in named_tensors(memory)}
    gradients = ((name, part.grad) for name, part in model.named_parameters())
    return found | {f"gradient/{name}": gradient.clone() for name, gradient in gradients if gradient is not None}


def _largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all differences; infinite where something is missing."""
    if found.keys() != expected.keys():
        return math.inf
    pairs = [(found[name].cpu().double(), expected[name].cpu().double()) for name in found if found[name].numel()]
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


@torch.no_grad()
def _steps_difference(model: SequenceModel) -> float:
    """Of 40 steps after 3 codes, over two ends of windows, and a forward pass."""
    codes = _codes(43, model.device)
    state = model.begin_steps(model.zero_memory(2), codes[:, :3])
    said = []
    for column in codes[:, 3:].unbind(1):
        features, state = model.step(column, state)
        said.append(model.log_probabilities(features))
    expected = model.log_probabilities(model(codes, model.zero_memory(2)).features)[:, 3:]
    return (torch.stack(said, dim=1) - expected).abs().max().item()


@torch.no_grad()
def _fresh_steps_difference(device: torch.device) -> float:
    """Of steps of lanes that begin anew anywhere, and a forward pass that is told where."""
    stack: Any = small_model("compressive_transformer", device).stack
    rows = torch.randn(2, 32, stack.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    starts = torch.zeros(2, 32, dtype=torch.bool, device=device)
    starts[0, 5] = starts[1, 19] = True
    state, found = stack.begin_steps(stack.zero_memory(2), rows[:, :0]), []
    for t in range(32):
        output, state = stack.step(rows[:, t], state, document_starts=starts[:, t])
        found.append(output)
    expected = stack(rows, stack.zero_memory(2), document_starts=starts).rows
    return (torch.stack(found, dim=1) - expected).abs().max().item()


@torch.no_grad()
def _causality_difference(model: SequenceModel) -> float:
    """What another code at 20 of lane 0 changes before it, and in lane 1."""
    codes, other = _codes(48, model.device), _codes(48, model.device)
    other[0, 20] = (other[0, 20] + 1) % 256
    ours, theirs = (model(part, model.zero_memory(2)).features for part in (codes, other))
    return max((ours[0, :20] - theirs[0, :20]).abs().max().item(), (ours[1] - theirs[1]).abs().max().item())


def _attention_case(device: torch.device, dtype: torch.dtype, *, heads: int, width: int, length: int) -> dict[str, Any]:
    numbers, num_keys = torch.Generator().manual_seed(0), 3 * length
    shapes = {"content_query": (length, width), "position_query": (length, 64)}
    shapes |= {"keys": (num_keys, width), "values": (num_keys, width)}
    case: dict[str, Any] = {
        name: torch.randn(2, heads, *shape, generator=numbers, dtype=torch.float64).to(device, dtype)
        for name, shape in shapes.items()
    }
    positions = torch.arange(num_keys, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    visible = torch.ones(length, num_keys, dtype=torch.bool, device=device).tril(num_keys - length)
    mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, -torch.inf)
    return case | {"query_positions": positions[:length], "key_positions": positions - 2 * length, "mask": mask}


def _attention_difference(device: torch.device) -> float:
    """Of the fused kernel on the device and the formula on the CPU."""
    settings: dict[str, Any] = {"heads": 2, "width": 64, "length": 48}
    found = ATTENTION_BACKENDS["fused"](**_attention_case(device, torch.float64, **settings))
    expected = ATTENTION_BACKENDS["reference"](**_attention_case(torch.device("cpu"), torch.float64, **settings))
    return (found.cpu() - expected).abs().max().item()


def _resume_difference(device: torch.device) -> float:
    """Of the weights after 6 steps, and after 3 and 3 more of a resumed run."""
    with tempfile.TemporaryDirectory() as place:
        corpus = write_speechlike_corpus(Path(place) / "corpus", num_seconds=1.0)
        for name, steps in (("straight", (6,)), ("resumed", (3, 6))):
            for num_steps in steps:
                train(_small_run(Path(place), corpus, name, num_steps, device))
        found = [find_checkpoint(Path(place) / "runs" / name, "last") for name in ("straight", "resumed")]
        assert found[0] is not None
        assert found[1] is not None
        return _largest(*(read_tensors(each / "model.safetensors") for each in found if each is not None))


def _small_run(place: Path, corpus: Path, name: str, num_steps: int, device: torch.device) -> RunConfig:
    return config_from_dict(
        {
            "name": name,
            "runs_dir": str(place / "runs"),
            "data": {"corpus": str(corpus), "chunk_length": 32, "num_lanes": 2},
            "model": SMALL_MODELS["compressive_transformer"],
            "optim": {"warmup_steps": 2, "decay_steps": 20},
            "train": {
                "num_steps": num_steps,
                "device": device.type,
                "precision": "float64",
                "valid_every_steps": 0,
                "checkpoint_every_steps": 3,
            },
        }
    )


def write_speechlike_corpus(path: Path, *, num_seconds: float, seed: int = 0) -> Path:
    """Harmonics of a pitch that glides, with pauses and some noise: structure that a model can learn in minutes."""
    numbers, writer = np.random.default_rng(seed), CorpusWriter(path, MuLaw(), source={}, preparation={})
    for split, share in (("train", 1.0), ("valid", 0.05)):
        length = max(4800, int(24_000 * num_seconds * share))
        time_s = np.arange(length) / 24_000
        pitch = 140 + 40 * np.sin(2 * np.pi * 0.7 * time_s) + 15 * np.sin(2 * np.pi * 3.1 * time_s)
        phase = 2 * np.pi * np.cumsum(pitch) / 24_000
        voice = sum(np.sin(k * phase) / k for k in range(1, 12)) * (np.sin(2 * np.pi * 1.3 * time_s) > -0.5)
        waveform = 0.15 * voice + numbers.normal(scale=0.003, size=length)
        writer.add_document(split, f"{split}0", MuLaw().encode(waveform.astype(np.float32)))
    writer.finish()
    return path


def _attention_kernels(plan: Plan, _: dict[str, Any]) -> Rows:
    """Which kernel a window of the first recipe's attention runs in, forward and backward, and how far it is off."""
    rows: Rows = []
    model: Any = next(iter(plan.recipes.values())).model
    shape: dict[str, Any] = {"heads": model.num_heads, "width": model.width // model.num_heads}
    shape["length"] = model.window_length
    exact = ATTENTION_BACKENDS["fused"](**_attention_case(plan.device, torch.float64, **shape))
    for dtype in (torch.bfloat16, torch.float32):
        case = _attention_case(plan.device, dtype, **shape)
        for tensor in (case["content_query"], case["position_query"], case["keys"], case["values"]):
            tensor.requires_grad_()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if plan.device.type == "cuda" else [])
        with profile(activities=activities, acc_events=True) as profiler:
            output = ATTENTION_BACKENDS["fused"](**case)
            output.sum().backward()
            _wait(plan.device)
        names = [event.key for event in profiler.key_averages() if "_scaled_dot_product" in event.key]
        error = (output.detach().double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        found = ", ".join(sorted({name.removeprefix("aten::") for name in names}))
        rows.append({"type": str(dtype), "kernels": found, "relative_rms_error": error.item()})
    return rows


def _speed(label: str, *, compile: bool) -> Callable[[Plan, dict[str, Any]], Rows]:
    def measure(plan: Plan, stages: dict[str, Any]) -> Rows:
        """Codes a second of training, share of the peak, peak memory; with as many lanes as fit."""
        config, lanes = plan.recipes[label], plan.recipes[label].data.num_lanes
        while True:
            try:
                return [_training_speed(plan, stages, config, lanes, compile=compile)]
            except torch.OutOfMemoryError:
                if lanes == 1:
                    raise
                lanes //= 2
                torch.cuda.empty_cache()

    return measure


def _training_speed(
    plan: Plan, stages: dict[str, Any], config: RunConfig, lanes: int, *, compile: bool
) -> dict[str, Any]:
    device, precision, length = plan.device, config.train.precision, config.data.chunk_length
    torch.manual_seed(0)
    model = build_model(config).to(device)
    optimizer = make_optimizer(model, config.optim)
    set_learning_rate(optimizer, learning_rate(0, config.optim))
    loss = ChunkLoss(model, device_type=device.type, precision=precision, compile=compile)
    plain = ChunkLoss(model, device_type=device.type, precision=precision)
    codes, memory = _codes(length + 1, device, lanes=lanes, vocab_size=model.vocab_size), model.full_memory(lanes)

    def step(module: ChunkLoss = loss) -> None:
        nonlocal memory
        nll, memory, losses = module(codes[:, :-1], codes[:, 1:], memory, None)
        torch.stack([nll.mean(), *losses.values()]).sum().backward()
        memory = detach_memory(memory)
        clip_gradients(model.gradient_groups(), config.optim.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step(plain)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    step()
    _wait(device)
    first_seconds = time.perf_counter() - began
    count, seconds = _repeat(step, plan.case_seconds, device)
    teraflops = counter.get_total_flops() * count / seconds / 1e12
    peak = stages["machine"]["rows"][0].get(f"teraflops_{'bfloat16' if precision == 'bfloat16' else 'float32'}")
    row = {
        "lanes": lanes,
        "precision": precision,
        "compiled": compile,
        "codes_per_second": count * lanes * length / seconds,
        "seconds_a_step": seconds / count,
        "teraflops": teraflops,
        "share_of_measured_peak": teraflops / peak if peak else None,
        "seconds_of_the_first_step": first_seconds,
    }
    if device.type == "cuda":
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


def _sampling(plan: Plan, _: dict[str, Any]) -> Rows:
    """Codes a second of all lanes, by the eager stepper, memory full."""
    rows: Rows = []
    for label, config in plan.recipes.items():
        model = build_model(config).to(plan.device)
        for lanes in (1, 64):
            how: dict[str, Any] = {"budget_seconds": plan.case_seconds / 2, "stepper": "eager"}
            seconds = estimate_code_seconds(model, num_lanes=lanes, **how)[0]
            rows.append({"model": label, "lanes": lanes, "codes_per_second": lanes / seconds})
    return rows


def _bfloat16(plan: Plan, _: dict[str, Any]) -> Rows:
    """The NLL of the recording that comes with each shipped model, with and without autocast."""
    rows: Rows = []
    for folder in plan.shipped:
        run = load_run_model(folder, device=plan.device)
        codec = run_codec(run)
        codes = read_codes(folder / "clip.wav", codec)
        stretch = Stretch(codes, codec.start_code, run.config.data.chunk_length)
        found = []
        for autocast in (False, True):
            with torch.autocast(plan.device.type, torch.bfloat16, enabled=autocast):
                found.append(evaluate_nll(run.model, stretch, progress=None).nll_nats)
        rows.append({"model": folder.name, "codes": len(codes), "float32_nats": found[0], "bfloat16_nats": found[1]})
        rows[-1]["difference_nats"] = found[1] - found[0]
    return rows


def _training(plan: Plan, stages: dict[str, Any]) -> Rows:
    """The first recipe's training loop on synthetic speech, for as long as its measured speed says."""
    label, config = next(iter(plan.recipes.items()))
    speed = stages[f"speed of {label}"]["rows"][0]
    corpus = plan.out / "corpus"
    if not corpus.exists():
        lane_seconds = 20 * config.data.chunk_length / 24_000
        write_speechlike_corpus(corpus, num_seconds=lane_seconds * config.data.num_lanes)
    num_steps = max(2, int(plan.training_seconds / speed["seconds_a_step"]))
    settings = replace(
        config.train,
        num_steps=num_steps,
        num_micro_batches=max(1, config.data.num_lanes // speed["lanes"]),
        device=plan.device.type,
        log_every_steps=max(1, num_steps // 20),
        valid_every_steps=max(1, num_steps // 3),
        valid_codes=0,
        checkpoint_every_steps=num_steps,
        sample_every_steps=0,
    )
    optim = replace(config.optim, warmup_steps=max(1, num_steps // 10), decay_steps=num_steps, update_period={0: 1})
    data = replace(config.data, corpus=str(corpus))
    run = replace(config, name="training", runs_dir=str(plan.out / "runs"), data=data, optim=optim, train=settings)
    began = time.perf_counter()
    train(run)
    seconds = time.perf_counter() - began
    lines = read_metrics(run.run_dir)
    keys = ("step", "nll/train_nats", "nll/valid_nats", "throughput/codes_per_second", "memory_use/cuda_max_mib")
    rows = [{key: line[key] for key in keys if key in line} for line in lines]
    return [*rows, {"step": f"{num_steps} steps in {seconds:.0f} s"}]
