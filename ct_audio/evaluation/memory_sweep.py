"""Evaluation at other lengths of memory than in training: all of them on one split, the best of them on the test split.

What has been scored is kept in the run as any evaluation is, and found again: a sweep that was stopped goes on.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json
from ct_audio.data.corpus import Corpus
from ct_audio.evaluation.stored import (
    EvaluationSettings,
    changed_config,
    evaluate_run,
    find_evaluation,
    store_evaluation,
)
from ct_audio.runs.open_run import LoadedRun

LENGTHS = ("memory_length", "compressed_memory_length")


def sweep_memory(
    run_dir: Path,
    run: LoadedRun,
    corpus: Corpus,
    *,
    memory_lengths: Sequence[int] | None,
    compressed_memory_lengths: Sequence[int] | None,
    split: str = "valid",
    test_split: str | None = "test",
    max_codes: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Score a split at every pair of lengths, then the test split, all of it, at the best pair.

    Args:
        run_dir: where results are kept and found; made if it is missing.
        memory_lengths, compressed_memory_lengths: at least one each, in rows; None: the one of training.
        test_split: None: leave that out.
        max_codes: score only the beginning of `split`.
    Returns:
        "rows", one for each pair: memory_length, compressed_memory_length, temporal_range in codes, attention_cost in
        rows a code and layer summed, nll_nats, nll_bits, as_trained, is_best; "best", the best row; "test", the report
        at the best (None if left out), and what was scored. All plain values.
    Raises:
        UserError: a pair does not fit the model (before anything is scored), or a split is missing.
    Source: Rae et al. 2019, supplementary tables 8 and 9.
    """
    trained = tuple(getattr(run.config.model, name, None) for name in LENGTHS)
    if None in trained:
        raise UserError(f"a sweep over memory: {run.config.model.name} has no memory whose length can be set")
    lengths = [
        list(dict.fromkeys([given] if chosen is None else chosen))
        for given, chosen in zip(trained, (memory_lengths, compressed_memory_lengths), strict=True)
    ]
    pairs = list(itertools.product(*lengths))
    for pair in pairs:
        run.model.zero_memory(1, **dict(zip(LENGTHS, pair, strict=True)))
    for name in (split, test_split):
        if name is not None:
            corpus.split(name)
    rows, reports = [], []
    for pair in pairs:
        row: dict[str, Any] = dict(zip(LENGTHS, pair, strict=True))
        settings = EvaluationSettings(split=split, max_codes=max_codes, **row)
        report = _score(run_dir, run, corpus, settings)
        config = changed_config(run, settings)
        row |= {"temporal_range": config.paper_temporal_range, "attention_cost": config.attention_cost}
        row |= {name: report[name] for name in ("nll_nats", "nll_bits", "num_units")}
        rows.append(row | {"as_trained": pair == trained})
        reports.append(report)
        say(f"memory {pair[0]}, compressed memory {pair[1]}: {report['nll_nats']:.4f} nats on {split}")
    best = min(rows, key=lambda row: row["nll_nats"])
    for row in rows:
        row["is_best"] = row is best
    test = None
    if test_split is not None:
        chosen = {name: best[name] for name in LENGTHS}
        test = _score(run_dir, run, corpus, EvaluationSettings(split=test_split, **chosen))
        say(f"the best of them on {test_split}: {test['nll_nats']:.4f} nats")
    about = {name: reports[0][name] for name in ("name", "model", "num_parameters", "checkpoint", "step")}
    shared = {name: value for name, value in reports[0]["protocol"].items() if name not in LENGTHS}
    return about | {"split": split, "protocol": shared, "rows": rows, "best": best, "test": test}


def _score(run_dir: Path, run: LoadedRun, corpus: Corpus, settings: EvaluationSettings) -> dict[str, Any]:
    """The report of an evaluation, from the run if it is there; it is kept there otherwise."""
    trained_on = corpus.fingerprint == run.state.get("corpus_fingerprint")
    found = find_evaluation(run_dir, run, settings, corpus) if trained_on else None
    if found is None:
        report, blocks = evaluate_run(run, corpus, settings)
        found = read_json(store_evaluation(run_dir, run, settings, report, blocks))
    return {name: value for name, value in found.items() if name != "blocks"}
