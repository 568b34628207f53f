"""Sample audio from a trained model: wav files (PCM16), each with a JSON sidecar that says how it was made."""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.cli import build_parser, run_tool
from ct_audio.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ct_audio.checkpoint import LoadedRun
    from ct_audio.codec import Codec

STATUS_VERIFICATION_FAILED = 3
STATUS_FAULTY_SAMPLE = 4
VERIFY_LIMIT = 1e-3
"""Nats; float32 steps and float32 forward passes of a sound implementation differ by about 1e-5."""


def main() -> int:
    """Parse, sample, write, and return the exit status."""
    arguments = _parse()
    import torch  # after --help: it takes seconds

    from ct_audio.checkpoint import load_run_model
    from ct_audio.distributed import choose_device
    from ct_audio.sample import verify_steps

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    run = load_run_model(arguments.run, which=arguments.checkpoint, device=choose_device(arguments.device))
    codec = _codec(run)
    if codec.sample_rate_hz is None:
        raise UserError(f"{arguments.run} is a model of text ({codec.name}); this tool writes audio only")
    if arguments.num < 1:
        raise UserError(f"--num: expected at least 1, got {arguments.num}")
    num_codes = _num_codes("--seconds", arguments.seconds, codec.sample_rate_hz)
    prime = _read_prime(arguments, codec)
    _make_directory(arguments.out)
    codes, log_probabilities = _sample(run, codec, arguments, num_codes, prime)
    difference = None
    if arguments.verify:
        lanes = None if prime is None else _lanes_of(prime, codes)
        difference = verify_steps(run.model, codes, log_probabilities, start_code=codec.start_code, prime=lanes)
        print(f"largest difference of log-probabilities between steps and forward: {difference:.3g} nats")
    faulty = _write(run, codec, arguments, codes, log_probabilities, prime, difference)
    if difference is not None and not difference <= VERIFY_LIMIT:
        print(f"error: verification failed: {difference:.3g} nats, expected at most {VERIFY_LIMIT}", file=sys.stderr)
        return STATUS_VERIFICATION_FAILED
    return STATUS_FAULTY_SAMPLE if faulty else 0


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Sample audio from a trained model, several samples side by side. Exit status: 0 success, 2 the input does not "
        "fit, 3 --verify found a difference above 0.001 nats, 4 a sample is silent, clipped, stuck or runaway (all "
        "files are written nevertheless)."
    )
    parser.add_argument("run", help="directory of the run, as runs/NAME")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each sample")
    parser.add_argument("--num", type=int, default=4, help="number of samples")
    parser.add_argument("--seed", type=int, default=0, help="the same seed and --num give the same samples")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1: safer; 0: the most probable code")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable codes only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest codes of total probability P")
    parser.add_argument("--prime", type=Path, metavar="WAV", help="audio file that all samples continue")
    parser.add_argument("--prime-seconds", type=float, metavar="S", help="only the first seconds of --prime")
    parser.add_argument("--include-prime", action="store_true", help="let the wav files begin with the prime")
    parser.add_argument("--verify", action="store_true", help="prove that stepping equals the forward pass")
    parser.add_argument("--plots", action="store_true", help="also write waveform and spectrogram as PNG")
    parser.add_argument(
        "--checkpoint", choices=["best", "last"], default="best", help="best by validation NLL, or last"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: torch's default")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for sample_0.wav, sample_0.json, ...")
    return parser.parse_args()


def _codec(run: "LoadedRun") -> "Codec":
    """The codec that the checkpoint names, else that of the corpus of the run."""
    from ct_audio.codec import codec_from_json
    from ct_audio.corpus import open_corpus

    known = run.state.get("codec")
    codec = codec_from_json(known) if known is not None else open_corpus(run.config.data.corpus).codec
    if codec.vocab_size != run.model.vocab_size:
        raise UserError(f"the codec {codec.name} has {codec.vocab_size} codes, the model {run.model.vocab_size}")
    return codec


def _num_codes(option: str, seconds: float, sample_rate_hz: int) -> int:
    if not (math.isfinite(seconds) and round(seconds * sample_rate_hz) >= 1):
        raise UserError(f"{option}: expected seconds of at least one sample, got {seconds}")
    return round(seconds * sample_rate_hz)


def _read_prime(arguments: argparse.Namespace, codec: "Codec") -> "np.ndarray | None":
    """Codes of the prime."""
    if arguments.prime is None:
        if arguments.prime_seconds is not None or arguments.include_prime:
            raise UserError("--prime-seconds and --include-prime need --prime, an audio file")
        return None
    from ct_audio.wav import read_wav, require_finite, resample

    assert codec.sample_rate_hz is not None
    waveform, sample_rate_hz = read_wav(arguments.prime)
    require_finite(waveform, str(arguments.prime))
    codes = codec.encode(resample(waveform, sample_rate_hz, codec.sample_rate_hz))
    if arguments.prime_seconds is not None:
        codes = codes[: _num_codes("--prime-seconds", arguments.prime_seconds, codec.sample_rate_hz)]
    if not len(codes):
        raise UserError(f"{arguments.prime} is empty; choose another --prime")
    return codes


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the directory {path}: {error}") from error


def _lanes_of(prime: "np.ndarray", like: "Tensor") -> "Tensor":
    """The prime for each lane, [B, P]."""
    import torch
    from einops import repeat

    return repeat(torch.from_numpy(prime.astype("int64")).to(like.device), "p -> b p", b=len(like))


def _sample(
    run: "LoadedRun", codec: "Codec", arguments: argparse.Namespace, num_codes: int, prime: "np.ndarray | None"
) -> "tuple[Tensor, Tensor]":
    """Codes [B, T] and their log-probabilities [B, T], with an estimate before, a bar, and the speed after."""
    import torch
    from tqdm import tqdm

    from ct_audio.evaluate import model_device
    from ct_audio.sample import estimate_code_seconds, sample_codes

    lanes = torch.empty(arguments.num, 0, device=model_device(run.model))
    steps = sample_codes(
        run.model,
        num_lanes=arguments.num,
        num_codes=num_codes,
        seed=arguments.seed,
        start_code=codec.start_code,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        prime=None if prime is None else _lanes_of(prime, lanes),
    )
    max_codes = 16 + num_codes // 50
    code_seconds = estimate_code_seconds(
        run.model, num_lanes=arguments.num, start_code=codec.start_code, max_codes=max_codes
    )
    total = num_codes * arguments.num
    print(f"about {code_seconds * num_codes:.0f} s for {total} samples ({arguments.num} x {num_codes})", flush=True)
    began = time.perf_counter()
    pairs = list(tqdm(steps, total=num_codes, desc="sample", unit="code", leave=False, disable=None))
    codes = torch.stack([code for code, _ in pairs], dim=1)
    log_probabilities = torch.stack([log_probability for _, log_probability in pairs], dim=1)
    codes[0, 0].item()  # waits for the device
    seconds = max(time.perf_counter() - began, 1e-9)
    assert codec.sample_rate_hz is not None
    times_real_time = total / seconds / codec.sample_rate_hz
    print(f"{total} samples in {seconds:.1f} s: {total / seconds:.0f} samples/s, {times_real_time:.4f} x real time")
    return codes, log_probabilities


def _write(
    run: "LoadedRun",
    codec: "Codec",
    arguments: argparse.Namespace,
    codes: "Tensor",
    log_probabilities: "Tensor",
    prime: "np.ndarray | None",
    difference: float | None,
) -> bool:
    """Write wav, sidecar and picture of each lane; returns whether a sample is faulty."""
    import numpy as np

    from ct_audio.corpus import write_json
    from ct_audio.sample_measures import find_faults, measure_sample
    from ct_audio.wav import write_wav

    rate = codec.sample_rate_hz
    assert rate is not None
    valid_nll_nats = run.state.get("progress", {}).get("best_valid_nll_nats")
    any_faulty = False
    for lane, (row, logs) in enumerate(zip(codes.cpu().numpy(), log_probabilities.cpu().numpy(), strict=True)):
        waveform = codec.decode(row)
        measures = measure_sample(row, logs, waveform, vocab_size=codec.vocab_size, sample_rate_hz=rate)
        faults = find_faults(measures, vocab_size=codec.vocab_size, valid_nll_nats=valid_nll_nats)
        sidecar = _settings(run, codec, arguments, prime) | measures | {"lane": lane, "warnings": faults}
        if difference is not None:
            sidecar["verify_max_abs_difference"] = difference if math.isfinite(difference) else None
        path = arguments.out / f"sample_{lane}.wav"
        heard = waveform if not arguments.include_prime or prime is None else np.r_[codec.decode(prime), waveform]
        write_wav(path, heard, rate)
        write_json(path.with_suffix(".json"), dict(sorted(sidecar.items())))
        if arguments.plots:
            _write_picture(path.with_suffix(".png"), heard, rate)
        level = f"RMS {measures['rms_dbfs']:.1f} dBFS, peak {measures['peak']:.3f}"
        print(f"{path}: {measures['nll_nats']:.4f} nats a sample, {level}, {measures['distinct_codes']} distinct codes")
        for fault in faults:
            print(f"warning: {path}: {fault}", file=sys.stderr)
        any_faulty |= bool(faults)
    return any_faulty


def _settings(
    run: "LoadedRun", codec: "Codec", arguments: argparse.Namespace, prime: "np.ndarray | None"
) -> dict[str, Any]:
    """The part of a sidecar that all lanes share: enough to make the sample again."""
    from ct_audio.evaluate import model_device

    assert codec.sample_rate_hz is not None
    return {
        "name": run.config.name,
        "model": run.config.model.name,
        "checkpoint": run.checkpoint_path.name,
        "step": run.step,
        "codec": codec.to_json(),
        "sample_rate_hz": codec.sample_rate_hz,
        "seed": arguments.seed,
        "num_lanes": arguments.num,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "prime": None if prime is None else arguments.prime.name,
        "prime_seconds": 0.0 if prime is None else len(prime) / codec.sample_rate_hz,
        "prime_included": bool(arguments.include_prime),
        "device": model_device(run.model).type,
        "version": _version(),
    }


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ct_audio")
    except PackageNotFoundError:
        return "not installed"


def _write_picture(path: Path, waveform: "np.ndarray", sample_rate_hz: int) -> None:
    from ct_audio.metrics import spectrogram_figure

    beside = path.with_name(path.name + ".tmp")
    spectrogram_figure(waveform, sample_rate_hz).savefig(beside, format="png", dpi=120)
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(run_tool(main))
