"""Score a split with a trained model: mean NLL in nats and bits a code, every code once, memory carried."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.command_line import build_parser, run_tool
from ct_audio.common.errors import UserError

if TYPE_CHECKING:
    from ct_audio.data.corpus import Corpus
    from ct_audio.evaluation.groups import GroupSums
    from ct_audio.evaluation.stored import EvaluationSettings
    from ct_audio.runs.open_run import LoadedRun


def main() -> int:
    """Parse, evaluate, keep the result in the run, print, and return the exit status."""
    arguments = _parse()
    # After --help: they take seconds.
    from ct_audio.runs.device import set_up_device
    from ct_audio.runs.open_run import load_run_model, run_corpus

    device = set_up_device(arguments.device, num_threads=arguments.threads)
    run = load_run_model(arguments.run, which=arguments.checkpoint, device=device)
    corpus = run_corpus(run, arguments.corpus, allow_other=arguments.allow_other_corpus)
    if arguments.sweep_memory is not None or arguments.sweep_compressed is not None:
        return _sweep(arguments, run, corpus)
    return _evaluate(arguments, run, corpus)


def _evaluate(arguments: argparse.Namespace, run: "LoadedRun", corpus: "Corpus") -> int:
    """Score the split once; with --by also by kind of code."""
    from ct_audio.evaluation.groups import GroupSums, make_groupings
    from ct_audio.evaluation.stored import evaluate_run, store_evaluation

    settings, split = _settings(arguments), corpus.split(arguments.split)
    groups = [
        GroupSums(grouping)
        for grouping in make_groupings(arguments.by, run.model, corpus, split, num_codes=settings.num_codes(split))
    ]
    report, blocks = evaluate_run(run, corpus, settings, on_nll=groups)
    tables = {each.grouping.name: each.rows() for each in groups}
    try:
        path = store_evaluation(Path(arguments.run), run, settings, report, blocks)
        stored = f"stored in {path}"
        if groups:
            place = _directory(arguments) / f"{path.stem}-by"
            _write_groups(groups, tables, report, place)
            stored += f"; tables and picture in {place}.png, .json and -*.csv"
    except OSError as error:
        print(f"warning: the result is not kept in {arguments.run}: {error}", file=sys.stderr)
        stored = "not stored"
    if tables:
        report["groups"] = tables
    _print(report, stored, as_json=arguments.json)
    return 0


def _sweep(arguments: argparse.Namespace, run: "LoadedRun", corpus: "Corpus") -> int:
    """Score the split at every pair of lengths, then the test split at the best of them."""
    from ct_audio.common.figures import write_figure
    from ct_audio.common.files import write_csv, write_json
    from ct_audio.evaluation.figures import sweep_figure
    from ct_audio.evaluation.memory_sweep import sweep_memory

    alone = ("memory_length", "compressed_memory_length", "dynamic", "by", "warmup_seconds", "max_seconds")
    wrong = [f"--{name.replace('_', '-')}" for name in alone if getattr(arguments, name)]
    if wrong or arguments.lanes != 1:
        raise UserError(f"{', '.join(wrong) or '--lanes'}: not in a sweep over memory lengths; leave it out")
    report = sweep_memory(
        Path(arguments.run),
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
    place = _directory(arguments) / f"sweep-{arguments.split}-step_{run.step:08d}{limit}"
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place.with_name(f"{place.name}.json"), report)
    write_csv(place.with_name(f"{place.name}.csv"), report["rows"])
    write_figure(sweep_figure(report), place.with_name(f"{place.name}.png"))
    if arguments.json:
        print(json.dumps(report, allow_nan=False))
        return 0
    print(f"{'memory':>8} {'compressed':>10} {'range':>9} {'nats':>8} {'bits':>8}")
    for row in report["rows"]:
        marks = " best" * row["is_best"] + " as trained" * row["as_trained"]
        lengths = f"{row['memory_length']:8d} {row['compressed_memory_length']:10d} {row['temporal_range']:9,d}"
        print(f"{lengths} {row['nll_nats']:8.4f} {row['nll_bits']:8.4f}{marks}")
    if report["test"]:
        test = report["test"]
        print(f"{test['split']} at the best: {test['nll_nats']:.4f} nats, {test['nll_bits']:.4f} bits a code")
    print(f"wrote {place}.json, .csv and .png")
    return 0


def _settings(arguments: argparse.Namespace) -> "EvaluationSettings":
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
    )


def _directory(arguments: argparse.Namespace) -> Path:
    return Path(arguments.out or Path(arguments.run) / "evaluations")


def _write_groups(groups: "list[GroupSums]", tables: dict[str, Any], report: dict[str, Any], place: Path) -> None:
    from ct_audio.common.figures import write_figure
    from ct_audio.common.files import write_csv, write_json
    from ct_audio.evaluation.figures import groups_figure

    place.parent.mkdir(parents=True, exist_ok=True)
    title = f"{report['name']}, step {report['step']}, {report['split']}: {report['nll_bits']:.3f} bits a code"
    figure = groups_figure([(each.grouping, tables[each.grouping.name]) for each in groups], title)
    for name, rows in tables.items():
        write_csv(place.with_name(f"{place.name}-{name}.csv"), rows)
    write_json(place.with_name(f"{place.name}.json"), report | {"groups": tables})
    write_figure(figure, place.with_name(f"{place.name}.png"))


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Score a split with a trained model: mean negative log-likelihood of a code, every code once, memory carried. "
        "Use the validation split while choosing models; keep the test split for the final number. The result is kept "
        "in RUN/evaluations, with the NLL of every 0.1 s, for tools/compare.py."
    )
    parser.add_argument("run", help="directory of the run, as runs/NAME")
    parser.add_argument(
        "--checkpoint", choices=["best", "last"], default="best", help="best by validation NLL, or last"
    )
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
    parser.add_argument("--corpus", metavar="DIR", help="prepared corpus; default: the one that the run was trained on")
    parser.add_argument("--allow-other-corpus", action="store_true", help="go on if the corpus holds other codes")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: torch's default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_kinds(parser)
    _add_sweep(parser)
    _add_dynamic(parser)
    return parser.parse_args()


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
    group.add_argument("--out", metavar="DIR", help="where tables and pictures go; default: RUN/evaluations")


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
    return [int(word) for word in _words(text)]


def _print(report: dict[str, Any], stored: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, allow_nan=False))
        return
    audio = "" if report["seconds"] is None else f" ({report['seconds']:.1f} s of audio)"
    protocol = ", ".join(f"{key} {value}" for key, value in report["protocol"].items())
    names = {"perplexity": "perplexity", "perplexity_a_word": "perplexity a word", "nll_bits_a_byte": "bits a byte"}
    text = "".join(f", {label} {report[key]:.4g}" for key, label in names.items() if report.get(key) is not None)
    lines = [
        f"{report['name']}: {report['model']}, {report['num_parameters']:,} parameters, step {report['step']}",
        f"nll of {report['split']}: {report['nll_nats']:.4f} nats, {report['nll_bits']:.4f} bits a code{text}",
        f"{report['num_units']:,} codes{audio} in {report['wall_seconds']:.1f} s: {report['units_per_second']:.0f}/s",
        f"protocol: {protocol}",
    ]
    for name, rows in report.get("groups", {}).items():
        lines.append(f"by {name}: {'share':>23} {'nats':>8} {'bits':>8}")
        for row in rows:
            numbers = "" if row["nll_nats"] is None else f" {row['nll_nats']:8.4f} {row['nll_bits']:8.4f}"
            lines.append(f"  {row['group']:<27}{row['share']:7.2%}{numbers}")
    print("\n".join([*lines, stored]))


if __name__ == "__main__":
    sys.exit(run_tool(main))
