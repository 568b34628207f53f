"""Put runs side by side: NLL curves over steps, audio seen and time (PNG), and a result table (Markdown, CSV)."""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any

from ct_audio.commands.command_line import add_device_options, build_parser, open_device, parse, refuse, refuse_twice
from ct_audio.common.errors import UserError
from ct_audio.common.recipes import model_folder
from ct_audio.common.signals import caught_signals


def main() -> int:
    """Parse, score what is not scored yet, write, print, and return the exit status."""
    parser = build_parser(
        "Compare runs: NLL curves of metrics.jsonl, and a result table with the difference of each run from the first "
        "one and its 95% interval. Results of `ct-audio evaluate` are taken from RUN/evaluations; what is missing, "
        "or of an older checkpoint, is measured and kept there."
    )
    parser.add_argument(
        "runs",
        type=model_folder,
        nargs="+",
        metavar="RUN",
        help="directories of runs, checkpoints or exported models; all are set against the first",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write; made if it is missing")
    parser.add_argument("--splits", nargs="+", default=["valid"], metavar="SPLIT", help="splits in the table")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="score only the beginning of each split")
    parser.add_argument("--corpus", metavar="DIR", help="prepared corpus; default: that of each run's training")
    parser.add_argument(
        "--page",
        action="store_true",
        help="also sample every model, as ct-audio listen does, and write DIR/index.html, a page to listen on",
    )
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="length of each sample on --page")
    parser.add_argument(
        "--num", type=int, default=2, metavar="N", help="unconditional samples on --page, and as many continuations"
    )
    add_device_options(parser)
    arguments = parse(parser)
    refuse_twice(arguments, "splits")
    refuse(arguments, "--seconds", "--num", unless=arguments.page, why="only with --page")
    if not arguments.num >= 1:
        raise UserError(f"--num: expected at least 1, got {arguments.num}")
    from ct_audio.evaluation.comparison_table import open_runs, score_runs, write_comparison

    runs = open_runs(arguments.runs)
    device = open_device(arguments)
    sampling = _plan_samples(arguments, device) if arguments.page else None
    score_runs(
        runs,
        arguments.splits,
        max_seconds=arguments.max_seconds,
        device=device,
        corpus=arguments.corpus,
        out=arguments.out,
    )
    print(write_comparison(runs, arguments.out), end="")
    curves = "curves.png, " if any(run.curves for run in runs.values()) else ""
    print(f"wrote {curves}table.md and table.csv to {arguments.out}", file=sys.stderr)
    return _write_page(runs, sampling, arguments.out) if sampling is not None else 0


def _plan_samples(arguments: argparse.Namespace, device: Any) -> tuple[list[Any], Any, Any]:
    """The models as candidates, their corpus and the plan; what cannot be sampled is found before anything is scored.

    Raises:
        UserError: they are models of text, of different codes, or the corpus is not there or too short.
    """
    from ct_audio.runs.open_run import load_run_model, run_codec, run_corpus
    from ct_audio.sampling.listening import Candidate, Plan, require_judgeable

    loaded = [load_run_model(path, device=device) for path in arguments.runs]
    candidates = [
        Candidate(path.resolve().name, run, run_codec(run)) for path, run in zip(arguments.runs, loaded, strict=True)
    ]
    corpus = run_corpus(loaded[0], arguments.corpus)
    rate = corpus.codec.sample_rate_hz or 1
    split = corpus.split("valid")
    edges = [*split.document_offsets.tolist(), split.num_codes]
    prime_length = min(rate, max(end - begin for begin, end in itertools.pairwise(edges)))
    if not (math.isfinite(arguments.seconds) and round(arguments.seconds * rate) >= 1):
        raise UserError(f"--seconds: expected seconds of at least one sample, got {arguments.seconds}")
    plan = Plan(
        round(arguments.seconds * rate), num_free=arguments.num, num_primed=arguments.num, prime_length=prime_length
    )
    require_judgeable(candidates, corpus, plan)
    return candidates, corpus, plan


def _write_page(runs: dict[str, Any], sampling: tuple[list[Any], Any, Any], out: Path) -> int:
    """Sample, write the page, and return the exit status."""
    from ct_audio.apps.listening_page import Table, listened, write_page
    from ct_audio.evaluation.comparison_table import comparison_cells, comparison_notes, result_rows
    from ct_audio.sampling.listening import listen
    from ct_audio.sampling.resume import directory_lock

    candidates, corpus, plan = sampling
    (out / "samples").mkdir(exist_ok=True)
    with directory_lock(out / "samples"), caught_signals() as signals:
        stopped_by = listen(candidates, corpus, plan, out / "samples", signals=signals, save_every_seconds=60.0)
    if stopped_by:
        return 128 + stopped_by
    clips, report = listened(out / "samples", [each.name for each in candidates], corpus.split(plan.split))
    results = Table("NLL", comparison_cells(result_rows(runs), runs), "\n".join(comparison_notes(runs)))
    write_page(
        out / "index.html",
        title=", ".join(runs),
        clips=clips,
        curves={label: run.curves for label, run in runs.items() if run.curves is not None},
        tables=[results, report],
        sample_rate_hz=corpus.codec.sample_rate_hz,
    )
    print(f"open {out / 'index.html'} in a browser to listen")
    return 0
