"""Score a split with a trained model: mean NLL in nats and bits per code, every code once, memory carried."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ct_audio.commands.command_line import (
    add_corpus_options,
    add_run_options,
    build_parser,
    open_corpus,
    open_run,
    output_directory,
    parse,
    refuse,
)


def main() -> int:
    """Parse, evaluate, keep the result in the run, print, and return the exit status."""
    arguments = _parse()
    run = open_run(arguments)
    corpus = open_corpus(arguments, run)
    if arguments.sweep_memory is not None or arguments.sweep_compressed is not None:
        return _sweep(arguments, run, corpus)
    return _evaluate(arguments, run, corpus)


def _evaluate(arguments: argparse.Namespace, run: Any, corpus: Any) -> int:
    """Score the split once; with --by also by kind of code."""
    from ct_audio.evaluation.groups import GroupSums, make_groupings
    from ct_audio.evaluation.output import evaluation_text, write_groups
    from ct_audio.evaluation.stored import evaluate_run, store_evaluation

    settings, split = _settings(arguments), corpus.split(arguments.split)
    groupings = make_groupings(arguments.by, run.model, corpus, split, num_codes=settings.num_codes(split))
    groups = [GroupSums(grouping) for grouping in groupings]
    results = run.run_dir or arguments.out
    directory = output_directory(arguments, run, "evaluations") if groups else None
    report, blocks = evaluate_run(run, corpus, settings, on_nll=groups)
    tables = {each.grouping.name: each.rows() for each in groups}
    try:
        if results is None:
            stored = f"not stored: {arguments.run} is a model without a run; --out DIR keeps the result there"
        else:
            path = store_evaluation(results, run, settings, report, blocks)
            stored = f"stored in {path}"
            if directory is not None:
                place = directory / f"{path.stem}-by"
                write_groups(groupings, tables, report, place)
                stored += f"; tables and picture in {place}.png, .json and -*.csv"
    except OSError as error:
        print(f"warning: the result is not kept in {results}: {error}", file=sys.stderr)
        stored = "not stored"
    if tables:
        report["groups"] = tables
    print(json.dumps(report, allow_nan=False) if arguments.json else f"{evaluation_text(report)}\n{stored}")
    return 0


def _sweep(arguments: argparse.Namespace, run: Any, corpus: Any) -> int:
    """Score the split at every pair of lengths, then the test split at the best of them."""
    from ct_audio.evaluation.memory_sweep import sweep_memory
    from ct_audio.evaluation.output import sweep_text, write_sweep

    directory = output_directory(arguments, run, "evaluations")
    report = sweep_memory(
        run.run_dir or directory,
        run,
        corpus,
        memory_lengths=arguments.sweep_memory,
        compressed_memory_lengths=arguments.sweep_compressed,
        split=arguments.split,
        test_split=None if arguments.no_test else arguments.test_split,
        max_codes=arguments.max_codes,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    limit = f"-max_codes_{arguments.max_codes}" if arguments.max_codes else ""
    place = directory / f"sweep-{arguments.split}-step_{run.step:08d}{limit}"
    write_sweep(report, place)
    wrote = f"wrote {place}.json, .csv and .png"
    print(json.dumps(report, allow_nan=False) if arguments.json else f"{sweep_text(report)}\n{wrote}")
    return 0


def _settings(arguments: argparse.Namespace) -> Any:
    """The `EvaluationSettings` of the command line."""
    from ct_audio.evaluation.dynamic import LEARNING_RATES, DynamicSettings
    from ct_audio.evaluation.stored import EvaluationSettings

    dynamic, rate = None, arguments.dynamic_learning_rate
    if arguments.dynamic:
        dynamic = DynamicSettings(
            optimizer=arguments.dynamic,
            learning_rate=LEARNING_RATES[arguments.dynamic] if rate is None else rate,
            max_gradient_norm=arguments.dynamic_max_gradient_norm,
            decay=arguments.dynamic_decay,
            chunk_length=arguments.dynamic_chunk_length,
        )
    return EvaluationSettings(
        split=arguments.split,
        memory_length=arguments.memory_length,
        compressed_memory_length=arguments.compressed_memory_length,
        num_lanes=arguments.lanes,
        warmup_seconds=arguments.warmup_seconds,
        max_seconds=arguments.max_seconds,
        max_codes=arguments.max_codes,
        dynamic=dynamic,
        precision=arguments.precision,
    )


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Score a split with a trained model: mean negative log-likelihood of a code, every code once, memory carried. "
        "Use the validation split while choosing models; keep the test split for the final number. The result is kept "
        "in RUN/evaluations, with the NLL of every 0.1 s, for `ct-audio compare`; that of an exported model in "
        "DIR/evaluations with --out DIR."
    )
    add_run_options(parser)
    add_corpus_options(parser)
    parser.add_argument("--split", default="valid", help="split of the corpus; keep test for the final number")
    parser.add_argument("--memory-length", type=int, metavar="N", help="in place of the configuration's")
    parser.add_argument("--compressed-memory-length", type=int, metavar="M", help="in place of the configuration's")
    parser.add_argument("--lanes", type=int, default=1, metavar="K", help="parts of the split that run side by side")
    parser.add_argument(
        "--warmup-seconds",
        type=float,
        metavar="S",
        help="audio that a later lane is run over before its part, unscored; default: all that its memory can hold",
    )
    parser.add_argument("--max-seconds", type=float, metavar="S", help="score only the beginning of the split")
    parser.add_argument("--max-codes", type=int, metavar="N", help="the same in codes, for text too")
    parser.add_argument(
        "--precision", choices=["bfloat16"], help="of the forward pass, as in training; default: that of the weights"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_kinds(parser)
    _add_sweep(parser)
    _add_dynamic(parser)
    arguments = parse(parser)
    _refuse_useless(arguments)
    return arguments


def _refuse_useless(arguments: argparse.Namespace) -> None:
    """Options that would do nothing beside the others."""
    given, sweeps = arguments.given, ("--sweep-memory", "--sweep-compressed")
    is_sweep = not given.isdisjoint(sweeps)
    dynamic = [f"--dynamic-{name}" for name in ("learning-rate", "max-gradient-norm", "decay", "chunk-length")]
    lengths = ("--memory-length", "--compressed-memory-length")
    alone = (*lengths, "--lanes", "--warmup-seconds", "--max-seconds", "--dynamic", "--by", "--precision", *dynamic)
    refuse(arguments, *alone, unless=not is_sweep, why="not in a sweep over memory lengths; leave it out")
    refuse(arguments, "--test-split", "--no-test", unless=is_sweep, why=f"only with {' or '.join(sweeps)}")
    refuse(arguments, "--test-split", unless="--no-test" not in given, why="not with --no-test")
    useful = is_sweep or "--by" in given or ("--out" in given and _is_without_run(arguments.run))
    refuse(arguments, "--out", unless=useful, why=f"only with --by, {' or '.join(sweeps)}, or of an exported model")
    refuse(arguments, *dynamic, unless="--dynamic" in given, why="only with --dynamic")
    refuse(arguments, "--precision", unless="--dynamic" not in given, why="not with --dynamic")
    refuse(arguments, "--warmup-seconds", unless=arguments.lanes != 1, why="only with --lanes above 1")


def _is_without_run(path: Path) -> bool:
    """Whether a result cannot be kept in a run."""
    from ct_audio.runs.open_run import run_directory

    return run_directory(path) is None


_OUT = "for tables and pictures, of an exported model for the result too; default: RUN/evaluations"


def _add_kinds(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("NLL by kind of code", "tables (CSV, JSON) and a picture beside the result")
    group.add_argument(
        "--by",
        type=_words,
        default=[],
        metavar="LIST",
        help="of count (times in training: > 10K, 1K-10K, ...), share (of training), window (place in it, and what its "
        "recent part alone would give), and for audio level and voicing; comma-separated, or all",
    )
    group.add_argument("--out", type=Path, metavar="DIR", help=_OUT)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sweep over memory lengths", "then --test-split, whole, at the best of them")
    group.add_argument("--sweep-memory", type=_lengths, metavar="LIST", help="as 0,128,256; default: the trained one")
    group.add_argument("--sweep-compressed", type=_lengths, metavar="LIST", help="of compressed memory, likewise")
    group.add_argument("--test-split", default="test", metavar="NAME", help="scored once, at the best lengths")
    group.add_argument("--no-test", action="store_true", help="leave that out")


def _add_dynamic(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("dynamic evaluation", "one pass; each chunk is scored, then learnt from")
    group.add_argument("--dynamic", choices=["sgd", "adam"], help="let a copy of the model learn so")
    group.add_argument(
        "--dynamic-learning-rate", type=float, metavar="R", help="constant; default: 0.03 for sgd, 3e-5 for adam"
    )
    group.add_argument("--dynamic-max-gradient-norm", type=float, default=1.0, metavar="G", help="of each group")
    group.add_argument(
        "--dynamic-decay", type=float, default=0.0, metavar="D", help="share of the way back to the weights, an update"
    )
    group.add_argument(
        "--dynamic-chunk-length", type=int, metavar="N", help="codes an update, whole windows; default: in training"
    )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _lengths(text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers, as 0,128,256, got {text!r}") from None
