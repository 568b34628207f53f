"""Make samples of several models, judge them beside recordings, and show them in one picture."""

import argparse
import math
from pathlib import Path
from typing import Any

from ct_audio.commands.command_line import (
    add_corpus_options,
    add_device_options,
    build_parser,
    open_corpus,
    open_device,
    parse,
    refuse,
)
from ct_audio.common.errors import UserError
from ct_audio.common.recipes import model_folder
from ct_audio.common.signals import caught_signals


def main() -> int:
    """Parse, sample, judge, write, print, and return the exit status."""
    arguments = _parse()
    from ct_audio.runs.open_run import load_run_model, run_codec
    from ct_audio.sampling.listening import Candidate, listen, require_judgeable
    from ct_audio.sampling.resume import directory_lock

    device, candidates = open_device(arguments), []
    for path in arguments.runs:
        run = load_run_model(path, which=arguments.checkpoint, device=device)
        corpus = open_corpus(arguments, run)
        candidates.append(Candidate(path.resolve().name, run, run_codec(run)))
    plan = _plan(arguments, corpus.codec.sample_rate_hz)
    require_judgeable(candidates, corpus, plan)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the directory {arguments.out}: {error}") from error
    with directory_lock(arguments.out), caught_signals() as signals:
        stopped_by = listen(
            candidates, corpus, plan, arguments.out, signals=signals, save_every_seconds=arguments.save_every
        )
        if not stopped_by:
            _write_page(candidates, corpus.split(plan.split), arguments.out)
    return 128 + stopped_by if stopped_by else 0


def _write_page(candidates: list[Any], split: Any, out: Path) -> None:
    from ct_audio.apps.listening_page import listened, write_page
    from ct_audio.evaluation.curves import known_curves

    names = [candidate.name for candidate in candidates]
    clips, table = listened(out, names, split)
    curves = known_curves({candidate.name: candidate.run.run_dir for candidate in candidates})
    rate = candidates[0].codec.sample_rate_hz
    write_page(
        out / "index.html",
        title=", ".join(names),
        text="The reference is what the models were trained to sound like: recordings they have not heard.",
        clips=clips,
        curves=curves,
        tables=[table],
        sample_rate_hz=rate,
    )
    print(f"open {out / 'index.html'} in a browser to listen")


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Make samples of one or several models, unconditional ones and continuations of recordings, and judge them "
        "beside recordings: warnings, level, voicing, pitch and Frechet distance in report.md and report.json, "
        "spectrograms.png, and with several --temperatures temperatures.png; index.html is a page to listen on, with a "
        "blind test. The same command goes on after an "
        "interruption. The exit status is 0 whatever the samples are like."
    )
    parser.add_argument(
        "runs",
        type=model_folder,
        nargs="+",
        metavar="RUN",
        help="directories of runs, checkpoints or exported models, or names of shipped ones",
    )
    parser.add_argument(
        "--checkpoint", choices=["best", "last"], default="best", help="best by validation NLL, or last"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for samples, report and pictures")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="length of each sample")
    parser.add_argument("--num", type=int, default=8, metavar="N", help="unconditional samples at each temperature")
    parser.add_argument("--num-primed", type=int, default=4, metavar="N", help="continuations at each temperature")
    parser.add_argument("--prime-seconds", type=float, default=1.0, metavar="S", help="beginning that is continued")
    parser.add_argument(
        "--count",
        type=int,
        default=0,
        metavar="N",
        help="further lanes, unconditional and continuations, at the first temperature, of which only the faults are "
        "counted",
    )
    parser.add_argument(
        "--temperatures", type=_temperatures, default="1", metavar="T,T,...", help="pictured: the first"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed and numbers give the same samples")
    parser.add_argument("--split", default="valid", help="split whose recordings are continued and compared with")
    parser.add_argument(
        "--save-every", type=float, default=60.0, metavar="S", help="seconds between saves of a sampling"
    )
    add_corpus_options(parser)
    add_device_options(parser)
    arguments = parse(parser)
    for name, least in (("num", 0), ("num_primed", 0), ("count", 0), ("seed", 0), ("save_every", 0)):
        if not getattr(arguments, name) >= least:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: expected at least {least}, got {getattr(arguments, name)}")
    if not arguments.num and not arguments.num_primed:
        raise UserError("--num 0 --num-primed 0: expected at least one sample")
    refuse(arguments, "--prime-seconds", unless=arguments.num_primed > 0, why="nothing is continued; --num-primed is 0")
    refuse(arguments, "--seed", unless=any(arguments.temperatures), why="nothing is drawn at temperature 0")
    return arguments


def _temperatures(text: str) -> tuple[float, ...]:
    """Values of --temperatures; `UserError` where something in it is no number, is negative, or comes twice."""
    try:
        temperatures = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--temperatures: expected numbers as 1,0.9,0.8, got {text!r}") from None
    if not all(math.isfinite(temperature) and temperature >= 0 for temperature in temperatures):
        raise UserError(f"--temperatures: expected finite numbers of at least 0, got {text}")
    if len(set(temperatures)) < len(temperatures):
        raise UserError(f"--temperatures: expected each one once, got {text}")
    return temperatures


def _plan(arguments: argparse.Namespace, rate: int | None) -> Any:
    """The `Plan` of the command line."""
    from ct_audio.sampling.listening import Plan

    lengths = {}
    for option in ("seconds", "prime_seconds"):
        seconds = getattr(arguments, option)
        if not (math.isfinite(seconds) and round(seconds * (rate or 1)) >= 1):
            raise UserError(f"--{option.replace('_', '-')}: expected seconds of at least one sample, got {seconds}")
        lengths[option] = round(seconds * (rate or 1))
    return Plan(
        num_codes=lengths["seconds"],
        temperatures=arguments.temperatures,
        num_free=arguments.num,
        num_primed=arguments.num_primed,
        num_counted=arguments.count,
        prime_length=lengths["prime_seconds"],
        seed=arguments.seed,
        split=arguments.split,
    )
