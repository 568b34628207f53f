"""Sample audio or text from a trained model: wav (PCM16) or text files, each with a JSON sidecar: how it was made."""

import argparse
import contextlib
import math
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.command_line import build_parser, run_tool
from ct_audio.common.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from ct_audio.data.codecs import Codec
    from ct_audio.runs.open_run import LoadedRun
    from ct_audio.sampling.sample_set import SampleSet, SampleStream

STATUS_VERIFICATION_FAILED = 3
STATUS_FAULTY_SAMPLE = 4
DEFAULT_SECONDS, DEFAULT_LENGTH = 5.0, 1000
VERIFY_LIMIT = 1e-3
"""Nats; float32 steps and float32 forward passes of a sound implementation differ by about 1e-5."""


def main() -> int:
    """Parse, sample, write, and return the exit status."""
    arguments = _parse()
    with contextlib.ExitStack() as stack:
        stdout = sys.stdout
        if arguments.stdout:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        from ct_audio.common.signals import caught_signals
        from ct_audio.runs.device import set_up_device
        from ct_audio.runs.open_run import (
            load_run_model,  # after --help: it takes seconds
            run_codec,
        )
        from ct_audio.sampling.resume import directory_lock
        from ct_audio.sampling.sample_set import SampleStream

        device = set_up_device(arguments.device, num_threads=arguments.threads)
        run = load_run_model(arguments.run, which=arguments.checkpoint, device=device)
        codec = run_codec(run, Path(arguments.run))
        _require_options_fit(arguments, codec, to_terminal=arguments.stdout and stdout.isatty())
        if arguments.out is not None:
            _make_directory(arguments.out)
            stack.enter_context(directory_lock(arguments.out))
        sets = _open_sets(run, codec, arguments)
        signals = stack.enter_context(caught_signals())
        return _run(sets, arguments, signals, SampleStream(stdout.buffer) if arguments.stdout else None)


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Sample audio or text from a trained model, several samples side by side. Exit status: 0 success, 2 the input "
        "does not fit, 3 --verify found a difference above 0.001 nats, 4 a sample is silent, clipped, stuck, runaway "
        "or undecodable (all files are written nevertheless), 128 + number after SIGINT, SIGTERM or SIGUSR1, which "
        "save first: the same command with --resume goes on, as it does after kill -9."
    )
    parser.add_argument("run", help="directory of the run, as runs/NAME")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", type=float, metavar="S", help=f"length of each sample; for audio, else {DEFAULT_SECONDS:g}"
    )
    length.add_argument("--length", type=int, metavar="N", help=f"in units; for text, else {DEFAULT_LENGTH}")
    parser.add_argument("--num", type=int, default=4, help="number of samples")
    parser.add_argument("--seed", type=int, default=0, help="the same seed and --num give the same samples")
    temperature = parser.add_mutually_exclusive_group()
    temperature.add_argument("--temperature", type=float, default=1.0, help="below 1: safer; 0: the most probable code")
    temperature.add_argument(
        "--temperatures", metavar="T,T,...", help="one set of samples each, in DIR/temperature_T, and a report on them"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable codes only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest codes of total probability P")
    parser.add_argument("--prime", type=Path, metavar="FILE", help="recording or text that all samples continue")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--prime-seconds", type=float, metavar="S", help="only the first seconds of --prime")
    part.add_argument("--prime-length", type=int, metavar="N", help="only the first units of --prime")
    parser.add_argument("--include-prime", action="store_true", help="let the files begin with the prime")
    parser.add_argument("--verify", action="store_true", help="prove that stepping equals the forward pass")
    parser.add_argument("--plots", action="store_true", help="also write waveform and spectrogram as PNG")
    parser.add_argument(
        "--checkpoint", choices=["best", "last"], default="best", help="best by validation NLL, or last"
    )
    parser.add_argument("--corpus", metavar="DIR", help="where the run's corpus is now (for --temperatures)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: torch's default")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for sample_0.wav (.txt), sample_0.json, ...")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the samples in DIR, unfinished ones or to a greater length"
    )
    parser.add_argument(
        "--save-every", type=float, default=60.0, metavar="S", help="seconds between saves for --resume"
    )
    parser.add_argument(
        "--stdout",
        action="store_true",
        help="raw PCM16 (S16_LE, mono), or text, as it is sampled, with --num 1; --out may be left out",
    )
    arguments = parser.parse_args()
    if arguments.out is None and not arguments.stdout:
        parser.error("the following arguments are required: --out (or --stdout)")
    for option in ("resume", "plots", "temperatures"):
        if arguments.out is None and getattr(arguments, option):
            parser.error(f"--{option} needs --out")
    if arguments.stdout and (arguments.num != 1 or arguments.temperatures):
        parser.error("--stdout is for one sample: pass --num 1 and one --temperature")
    if not arguments.save_every >= 0:
        parser.error(f"--save-every: expected seconds of at least 0, got {arguments.save_every}")
    return arguments


def _require_options_fit(arguments: argparse.Namespace, codec: "Codec", *, to_terminal: bool) -> None:
    """Check that options of audio are not given for a text."""
    if codec.sample_rate_hz is not None:
        if to_terminal:
            raise UserError("--stdout: raw audio is no text; pipe it, as in | aplay -f S16_LE -r 24000")
        return
    for option in ("seconds", "prime_seconds", "plots", "temperatures"):
        value = getattr(arguments, option)
        if value is not None and value is not False:
            name = f"--{option.replace('_', '-')}"
            raise UserError(f"{name} is for audio, this is a model of {codec.unit}s; see --length and --prime-length")


def _open_sets(run: "LoadedRun", codec: "Codec", arguments: argparse.Namespace) -> "list[SampleSet]":
    """The sets of samples to be made, one a temperature; what does not fit is found before any is begun."""
    from ct_audio.sampling.sample_set import Request, SampleSet

    if arguments.num < 1:
        raise UserError(f"--num: expected at least 1, got {arguments.num}")
    prime = _read_prime(arguments, codec)
    sets = []
    for name, temperature in _temperatures(arguments):
        request = Request(
            num_codes=_num_codes("", arguments.length, arguments.seconds, codec),
            num_lanes=arguments.num,
            seed=arguments.seed,
            temperature=temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            prime=prime,
            prime_name=None if prime is None else arguments.prime.name,
            include_prime=arguments.include_prime,
        )
        directory = None if arguments.out is None else arguments.out / name
        sets.append(SampleSet(run, codec, request, directory, resume=arguments.resume))
    return sets


def _temperatures(arguments: argparse.Namespace) -> list[tuple[str, float]]:
    """Folder below --out and temperature of each set."""
    if arguments.temperatures is None:
        return [("", arguments.temperature)]
    try:
        temperatures = [float(part) for part in arguments.temperatures.split(",")]
    except ValueError:
        raise UserError(f"--temperatures: expected numbers as 0.8,0.9,1, got {arguments.temperatures!r}") from None
    if len(set(temperatures)) < len(temperatures):
        raise UserError(f"--temperatures: expected each one once, got {arguments.temperatures}")
    return [(f"temperature_{temperature:g}", temperature) for temperature in temperatures]


def _num_codes(prefix: str, length: int | None, seconds: float | None, codec: "Codec") -> int:
    """Codes of --length, of --seconds, or of the default."""
    rate = codec.sample_rate_hz
    if length is None and rate is not None:
        seconds = DEFAULT_SECONDS if seconds is None else seconds
        if not (math.isfinite(seconds) and round(seconds * rate) >= 1):
            raise UserError(f"--{prefix}seconds: expected seconds of at least one sample, got {seconds}")
        return round(seconds * rate)
    length = DEFAULT_LENGTH if length is None else length
    if length < 1:
        raise UserError(f"--{prefix}length: expected at least one {codec.unit}, got {length}")
    return length


def _read_prime(arguments: argparse.Namespace, codec: "Codec") -> "np.ndarray | None":
    """Codes of the prime."""
    given = [value is not None for value in (arguments.prime_seconds, arguments.prime_length)]
    if arguments.prime is None:
        if any(given) or arguments.include_prime:
            raise UserError("--prime-seconds, --prime-length and --include-prime need --prime, an audio or text file")
        return None
    from ct_audio.data.codecs import read_codes

    num_codes = _num_codes("prime-", arguments.prime_length, arguments.prime_seconds, codec) if any(given) else None
    return read_codes(arguments.prime, codec, num_codes=num_codes)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the directory {path}: {error}") from error


def _run(
    sets: "list[SampleSet]", arguments: argparse.Namespace, signals: list[int], stream: "SampleStream | None"
) -> int:
    """Sample and write all sets and the report on them."""
    corpus = None
    if arguments.temperatures is not None:
        from ct_audio.runs.open_run import run_corpus
        from ct_audio.sampling.temperature_report import require_comparable

        corpus = run_corpus(sets[0].run, arguments.corpus)
        require_comparable(sets, corpus)
    _print_estimate(sets)
    statuses = []
    for one in sets:
        if stream is not None and not one.num_resumed:
            stream.write(one.decoded_prime())
        _sample(one, arguments, signals, stream)
        if one.stopped_by:
            where = (
                "nothing is saved without --out"
                if one.directory is None
                else f"saved in {one.directory}; go on with --resume"
            )
            name = signal.Signals(one.stopped_by).name
            print(f"stopped by {name} at {one.in_words(one.num_codes)}; {where}", file=sys.stderr)
            return 128 + one.stopped_by
        if one.num_codes:  # else the reader of --stdout has gone at once
            statuses.append(_write(one, arguments))
    if corpus is not None:
        from ct_audio.sampling.temperature_report import write_report

        write_report(arguments.out, sets, corpus)
    return STATUS_VERIFICATION_FAILED if STATUS_VERIFICATION_FAILED in statuses else max(statuses, default=0)


def _print_estimate(sets: "list[SampleSet]") -> None:
    from ct_audio.sampling.sampler import estimate_code_seconds

    num_codes = sum(one.num_left for one in sets)
    if not num_codes:
        return
    first, num_lanes = sets[0], sets[0].request.num_lanes
    code_seconds = estimate_code_seconds(
        first.run.model, num_lanes=num_lanes, start_code=first.codec.start_code, max_codes=16 + num_codes // 50
    )
    total = f"{num_codes * num_lanes} {first.codec.unit}s ({num_lanes} x {num_codes})"
    print(f"about {code_seconds * num_codes:.0f} s for {total}", flush=True)


def _sample(one: "SampleSet", arguments: argparse.Namespace, signals: list[int], stream: "SampleStream | None") -> None:
    """Sample what is left of a set, with a bar, and print the speed."""
    began, num_before = time.perf_counter(), one.num_codes
    label = f"temperature {one.request.temperature:g}" if arguments.temperatures else "sample"
    one.sample(signals=signals, stream=stream, save_every_seconds=arguments.save_every, label=label)
    seconds = max(time.perf_counter() - began, 1e-9)
    total = (one.num_codes - num_before) * one.request.num_lanes
    if total and not one.stopped_by:
        unit, rate = one.codec.unit, one.codec.sample_rate_hz
        times = f", {total / seconds / rate:.4f} x real time" if rate else ""
        print(f"{total} {unit}s in {seconds:.1f} s: {total / seconds:.0f} {unit}s/s{times}")


def _write(one: "SampleSet", arguments: argparse.Namespace) -> int:
    """Verify a set if asked to, write its files, and return its exit status."""
    from ct_audio.sampling.output import write_samples

    difference = None
    if arguments.verify:
        difference = one.verify()
        print(f"largest difference of log-probabilities between steps and forward: {difference:.3g} nats")
    faults = write_samples(one, verify_difference=difference, plots=arguments.plots)
    if difference is not None and not difference <= VERIFY_LIMIT:
        print(f"error: verification failed: {difference:.3g} nats, expected at most {VERIFY_LIMIT}", file=sys.stderr)
        return STATUS_VERIFICATION_FAILED
    return STATUS_FAULTY_SAMPLE if any(faults) else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
