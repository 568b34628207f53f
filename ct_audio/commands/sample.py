"""Sample audio or text from a trained model: wav (PCM16) or text files, each with a JSON sidecar: how it was made."""

import argparse
import contextlib
import math
import sys
from pathlib import Path
from typing import Any

from ct_audio.commands.command_line import add_run_options, build_parser, open_run, parse, refuse
from ct_audio.common.errors import UserError
from ct_audio.common.files import number_in_name
from ct_audio.common.signals import caught_signals

STATUS_VERIFICATION_FAILED = 3
STATUS_FAULTY_SAMPLE = 4
DEFAULT_SECONDS, DEFAULT_LENGTH = 5.0, 1000


def main() -> int:
    """Parse, sample, write, and return the exit status."""
    arguments = _parse()
    with contextlib.ExitStack() as stack:
        stdout = sys.stdout
        if arguments.stdout:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        from ct_audio.runs.open_run import run_codec, run_corpus
        from ct_audio.sampling.resume import directory_lock
        from ct_audio.sampling.sample_set import SampleSet, SampleStream
        from ct_audio.sampling.session import sample_sets

        run = open_run(arguments)
        codec = run_codec(run)
        _require_codec_fits(arguments, codec, to_terminal=arguments.stdout and stdout.isatty())
        if arguments.out is not None:
            try:
                arguments.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--out: cannot make the directory {arguments.out}: {error}") from error
            stack.enter_context(directory_lock(arguments.out))
        requests = _requests(arguments, codec)  # what does not fit is found before any set is begun
        sets = [SampleSet(run, codec, each, place, resume=arguments.resume) for place, each in requests]
        stream = SampleStream(stdout.buffer) if arguments.stdout else None
        if arguments.play:
            from ct_audio.apps.playground import Speaker

            speaker = Speaker(codec.sample_rate_hz or 0, requests[0][1].num_codes)
            stream = SampleStream(stack.enter_context(contextlib.closing(speaker)))
        outcome = sample_sets(
            sets,
            signals=stack.enter_context(caught_signals()),
            save_every_seconds=arguments.save_every,
            stream=stream,
            corpus=run_corpus(run, arguments.corpus) if arguments.temperatures else None,
            verify=arguments.verify,
            plots=arguments.plots,
        )
        if arguments.page and not outcome.stopped_by:
            _write_page(arguments, run, codec, requests[0][1])
    if outcome.stopped_by:
        return 128 + outcome.stopped_by
    return STATUS_FAULTY_SAMPLE * outcome.is_faulty if outcome.is_verified else STATUS_VERIFICATION_FAILED


def _write_page(arguments: argparse.Namespace, run: Any, codec: Any, request: Any) -> None:
    """DIR/index.html: the samples beside what the prime went on with, and beside recordings where the corpus is."""
    from ct_audio.apps.listening_page import CONTINUATION, Clip, read_clips, recording, recordings_beside, write_page
    from ct_audio.data.codecs import read_codes
    from ct_audio.evaluation.curves import known_curves
    from ct_audio.runs.open_run import run_corpus

    clips, recordings = read_clips(arguments.out), []
    if arguments.prime is not None:
        first = 0 if request.include_prime else request.prime_length
        codes = read_codes(arguments.prime, codec)[first : request.prime_length + request.num_codes]
        beside = Clip("", "", CONTINUATION, 0, codes, request.prime_length - first)
        recordings = [recording(codes, beside, {"file": arguments.prime.name})] if len(codes) else []
    try:
        recordings += recordings_beside(clips, run_corpus(run, arguments.corpus).split("valid"))
    except UserError as error:
        if arguments.corpus is not None:
            raise
        print(f"no recordings of the corpus on the page: {error}", file=sys.stderr)
    page = arguments.out / "index.html"
    write_page(
        page,
        title=run.config.name,
        clips=recordings + clips,
        curves=known_curves({run.config.name: run.run_dir}),
        sample_rate_hz=codec.sample_rate_hz,
    )
    print(f"open {page} in a browser to listen")


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Sample audio or text from a trained model, several samples side by side. Exit status: 0 success, 2 the input "
        "does not fit, 3 --verify found a difference above 0.001 nats, 4 a sample is silent, clipped, stuck, runaway "
        "or undecodable (all files are written nevertheless), 128 + number after SIGINT, SIGTERM or SIGUSR1, which "
        "save first: the same command with --resume goes on, as it does after kill -9."
    )
    add_run_options(parser)
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
        "--temperatures",
        type=_temperatures,
        metavar="T,T,...",
        help="one set of samples each, in DIR/temperature_T, and a report on them",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable codes only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest codes of total probability P")
    parser.add_argument(
        "--stepper",
        choices=("auto", "compiled", "eager"),
        default="auto",
        help="compiled: machine code, for float32 on the CPU; auto: that where the model offers it",
    )
    parser.add_argument("--prime", type=Path, metavar="FILE", help="recording or text that all samples continue")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--prime-seconds", type=float, metavar="S", help="only the first seconds of --prime")
    part.add_argument("--prime-length", type=int, metavar="N", help="only the first units of --prime")
    parser.add_argument("--include-prime", action="store_true", help="let the files begin with the prime")
    parser.add_argument("--verify", action="store_true", help="prove that stepping equals the forward pass")
    parser.add_argument("--plots", action="store_true", help="also write waveform and spectrogram as PNG")
    parser.add_argument("--page", action="store_true", help="also write DIR/index.html, a page to listen on")
    parser.add_argument(
        "--corpus", metavar="DIR", help="where the run's corpus is now (for --temperatures, and recordings on --page)"
    )
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
    parser.add_argument(
        "--play",
        action="store_true",
        help="to the sound card as it is sampled, with --num 1; --out may be left out; needs the extra play",
    )
    arguments = parse(parser)
    if arguments.out is None and not arguments.stdout and not arguments.play:
        raise UserError("expected --out, --stdout or --play: where the samples go")
    if arguments.stdout and arguments.play:
        raise UserError("--stdout and --play: expected one of them")
    needs_out = ("--resume", "--save-every", "--plots", "--temperatures", "--page")
    refuse(arguments, *needs_out, unless=arguments.out is not None, why="only with --out")
    uses_corpus = arguments.temperatures is not None or arguments.page
    refuse(arguments, "--corpus", unless=uses_corpus, why="only with --temperatures or --page")
    of_prime = ("--prime-seconds", "--prime-length", "--include-prime")
    refuse(arguments, *of_prime, unless=arguments.prime is not None, why="only with --prime, an audio or text file")
    is_drawn = any(arguments.temperatures or [arguments.temperature])
    refuse(arguments, "--seed", "--top-k", "--top-p", unless=is_drawn, why="nothing is drawn at --temperature 0")
    if (arguments.stdout or arguments.play) and (arguments.num != 1 or arguments.temperatures):
        option = "--stdout" if arguments.stdout else "--play"
        raise UserError(f"{option} is for one sample: pass --num 1 and one --temperature")
    if arguments.num < 1:
        raise UserError(f"--num: expected at least 1, got {arguments.num}")
    if not arguments.save_every >= 0:
        raise UserError(f"--save-every: expected seconds of at least 0, got {arguments.save_every}")
    return arguments


def _temperatures(text: str) -> list[float]:
    """Values of --temperatures; `UserError` where something in it is no number, or comes twice."""
    try:
        temperatures = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--temperatures: expected numbers as 0.8,0.9,1, got {text!r}") from None
    if len(set(temperatures)) < len(temperatures):
        raise UserError(f"--temperatures: expected each one once, got {text}")
    return temperatures


def _require_codec_fits(arguments: argparse.Namespace, codec: Any, *, to_terminal: bool) -> None:
    """Check that raw audio does not go to a terminal, and that options of audio are not given for a text."""
    is_audio = codec.sample_rate_hz is not None
    if is_audio and to_terminal:
        raise UserError("--stdout: raw audio is no text; pipe it, as in | aplay -f S16_LE -r 24000")
    of_audio = ("--seconds", "--prime-seconds", "--plots", "--temperatures", "--corpus", "--page", "--play")
    why = f"for audio, this is a model of {codec.unit}s; see --length and --prime-length"
    refuse(arguments, *of_audio, unless=is_audio, why=why)


def _requests(arguments: argparse.Namespace, codec: Any) -> list[tuple[Path | None, Any]]:
    """Directory and `Request` of each set of samples, one a temperature."""
    from ct_audio.data.codecs import read_codes
    from ct_audio.sampling.sample_set import Request

    prime = prime_name = None
    if arguments.prime is not None:
        prime_name = arguments.prime.name
        is_cut = not arguments.given.isdisjoint({"--prime-seconds", "--prime-length"})
        length, seconds = arguments.prime_length, arguments.prime_seconds
        num_codes = _num_codes("prime-", length, seconds, codec) if is_cut else None
        prime = read_codes(arguments.prime, codec, num_codes=num_codes)
    settings: dict[str, Any] = {
        "num_codes": _num_codes("", arguments.length, arguments.seconds, codec),
        "num_lanes": arguments.num,
        "seed": arguments.seed,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "prime": prime,
        "prime_name": prime_name,
        "include_prime": arguments.include_prime,
        "stepper": arguments.stepper,
    }
    if arguments.temperatures is None:
        return [(arguments.out, Request(temperature=arguments.temperature, **settings))]
    requests = [Request(temperature=temperature, **settings) for temperature in arguments.temperatures]
    return [(arguments.out / f"temperature_{number_in_name(each.temperature)}", each) for each in requests]


def _num_codes(prefix: str, length: int | None, seconds: float | None, codec: Any) -> int:
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
