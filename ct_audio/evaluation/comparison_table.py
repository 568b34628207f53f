"""Runs side by side: their NLL curves, and a table of their evaluations with the difference of each from the first."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ct_audio.common.errors import UserError
from ct_audio.common.files import write_csv, write_file
from ct_audio.common.text import markdown_table
from ct_audio.data.corpus import Corpus
from ct_audio.evaluation import comparison
from ct_audio.evaluation.curves import Curves, draw_curves, read_curves
from ct_audio.evaluation.stored import EvaluationSettings, evaluate_run, find_evaluation, store_evaluation
from ct_audio.runs.open_run import LoadedRun, load_run_model, run_corpus, run_directory

MEMORY_LENGTHS = ("memory_length", "compressed_memory_length")


@dataclass
class Run:
    """What is known of a run: `valid_codes` is the length of its validation curve's stretch, 0 the whole split;
    `precision` is that of the forward pass it was measured with. A model without a run has no curves."""

    path: Path
    curves: Curves | None
    valid_codes: int = 0
    precision: str = "float32"
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # by split, as they are stored

    @property
    def any_evaluation(self) -> dict[str, Any]:
        """For what all of them say: parameters, step, memory lengths."""
        return next(iter(self.evaluations.values()))


def open_runs(paths: Sequence[Path]) -> dict[str, Run]:
    """Runs with their curves, by the last part of their path, or by the whole of it where last parts are equal.

    A path may also be that of a checkpoint, or of an exported folder, which has no curves.

    Raises:
        UserError: one is given twice, is not there, or has logged no NLL.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"expected each run once, got {' '.join(map(str, paths))}")
    names = [path.name for path in paths]
    labels = [str(path) if names.count(path.name) > 1 else path.name for path in paths]
    run_dirs = [run_directory(path) for path in paths]
    curves = [None if run_dir is None else read_curves(run_dir) for run_dir in run_dirs]
    return {label: Run(path, drawn) for label, path, drawn in zip(labels, paths, curves, strict=True)}


def score_runs(
    runs: dict[str, Run],
    splits: Sequence[str],
    *,
    max_seconds: float | None,
    device: torch.device | str,
    corpus: str | None = None,
    out: Path,
) -> None:
    """Give each run its evaluations: those that are stored for its best checkpoint, else measured and stored now.

    Args:
        corpus: where the corpus of all runs is now; None: where it was in training.
        out: evaluations of a model that has no run are kept here, in a directory with the model's name.
    Raises:
        UserError: a checkpoint or split is missing, or the runs were not scored alike.
    """
    for label, run in runs.items():
        loaded = load_run_model(run.path, device=device)
        run.valid_codes, run.precision = loaded.config.train.valid_codes, loaded.config.train.precision
        opened = run_corpus(loaded, corpus) if corpus else None
        place = loaded.run_dir or out / loaded.config.name
        for split in splits:
            settings = EvaluationSettings(split=split, max_seconds=max_seconds)
            found = find_evaluation(place, loaded, settings, opened)
            run.evaluations[split] = found or _measure(label, place, loaded, settings, opened)
    for split in splits:
        comparison.require_alike({label: run.evaluations[split] for label, run in runs.items()})
    if len({run.valid_codes for run in runs.values()}) > 1:
        lengths = ", ".join(f"{label} {run.valid_codes}" for label, run in runs.items())
        print(f"warning: the validation curves are of stretches of different length ({lengths} codes)", file=sys.stderr)
    if len(precisions := {run.precision for run in runs.values()}) > 1 and "bfloat16" in precisions:
        kinds = ", ".join(f"{label} {run.precision}" for label, run in runs.items())
        print(f"warning: the validation curves were measured in different precision ({kinds})", file=sys.stderr)


def _measure(
    label: str, path: Path, loaded: LoadedRun, settings: EvaluationSettings, corpus: Corpus | None
) -> dict[str, Any]:
    """Score a run, keep the result in it (a warning where that cannot be), and say so."""
    what = f"{label}, {settings.split}, {loaded.checkpoint_path.name}"
    print(f"{what}: no stored evaluation fits, scoring now", file=sys.stderr, flush=True)
    report, blocks = evaluate_run(loaded, corpus or run_corpus(loaded), settings, progress=f"{label} {settings.split}")
    try:
        print(f"{what}: stored in {store_evaluation(path, loaded, settings, report, blocks)}", file=sys.stderr)
    except OSError as error:
        print(f"warning: {what}: the result is not kept in the run: {error}", file=sys.stderr)
    return report | {"blocks": blocks}


def write_comparison(runs: dict[str, Run], out: Path) -> str:
    """Write curves.png (where there are curves), table.md, table.csv (with the protocols); returns the Markdown."""
    rows = result_rows(runs)
    table = comparison_text(rows, runs)
    out.mkdir(parents=True, exist_ok=True)
    levels = {label for label, run in runs.items() if not run.any_evaluation["num_parameters"]}
    curves = {label: run.curves for label, run in runs.items() if run.curves is not None}
    if curves:
        draw_curves(curves, out / "curves.png", levels=levels & curves.keys())
    protocols = [{f"{s} protocol": _plain(e["protocol"]) for s, e in run.evaluations.items()} for run in runs.values()]
    write_file(out / "table.md", table.encode())
    write_csv(out / "table.csv", [row | protocol for row, protocol in zip(rows, protocols, strict=True)])
    return table


def result_rows(runs: dict[str, Run]) -> list[dict[str, Any]]:
    """A row a run: size, steps, speed, and for each split NLL, difference from the first run, interval and speed."""
    rows, first = [], next(iter(runs.values()))
    for label, run in runs.items():
        about, curves = run.any_evaluation, run.curves
        is_trained = about["num_parameters"] > 0
        row: dict[str, Any] = {
            "run": label,
            "parameters": about["num_parameters"],
            "without f_c": about["num_parameters"] - about["num_parameters_compression"],
            "steps": _whole(curves.last("steps")) if is_trained and curves else None,
            "scored at step": about["step"] if is_trained else None,
            "audio seen (s)": _whole(curves.last("audio seen")) if is_trained and curves else None,
            "training codes/s": _whole(curves.median_throughput) if curves else None,
        }
        for split, evaluation in run.evaluations.items():
            row |= {f"{split} (nats)": evaluation["nll_nats"], f"{split} (bits)": evaluation["nll_bits"]}
            names = (f"{split} difference (nats)", f"{split} low", f"{split} high")
            row |= dict.fromkeys(names)
            if run is not first:
                row |= zip(names, comparison.paired_difference(first.evaluations[split], evaluation)[:3], strict=True)
            row[f"{split} codes/s"] = _whole(evaluation["units_per_second"])
        rows.append(row)
    return rows


def comparison_text(rows: list[dict[str, Any]], runs: dict[str, Run]) -> str:
    """The table, and below it protocol and method."""
    notes = "".join(f"- {note}\n" for note in comparison_notes(runs))
    return f"{markdown_table(comparison_cells(rows, runs))}\n\n{notes}"


def comparison_cells(rows: list[dict[str, Any]], runs: dict[str, Run]) -> list[list[str]]:
    """Titles, then the rows, the interval in one column with the difference."""
    table = []
    for row in rows:
        cells = {key: _cell(value) for key, value in row.items()}
        for split in next(iter(runs.values())).evaluations:
            difference, low, high = (row[f"{split} {name}"] for name in ("difference (nats)", "low", "high"))
            interval = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
            cells[f"{split} difference (nats)"] = "" if difference is None else f"{difference:+.4f}{interval}"
            del cells[f"{split} low"], cells[f"{split} high"]
        table.append(cells)
    return [list(table[0]), *(list(cells.values()) for cells in table)]


def comparison_notes(runs: dict[str, Run]) -> list[str]:
    """Protocols, memory lengths and method, a sentence each."""
    first_label, first = next(iter(runs.items()))
    notes = []
    for split, evaluation in first.evaluations.items():
        protocol = comparison.comparable_protocol(evaluation["protocol"])
        notes.append(f"{split}: {_plain(protocol | {'split_sha256': protocol['split_sha256'][:12]})}")
    for label, run in runs.items():
        protocol = run.any_evaluation["protocol"]
        lengths = {key: protocol[key] for key in MEMORY_LENGTHS if protocol.get(key) is not None}
        notes += [f"{label}: {_plain(lengths)}"] if lengths else []
    if len(runs) > 1:
        is_text = first.any_evaluation["seconds"] is None
        block = f"{comparison.BOOTSTRAP_CODES:,} codes" if is_text else f"{comparison.BOOTSTRAP_SECONDS:g} s"
        notes.append(
            f"difference: from {first_label} on the same codes; in brackets the 95% interval of a paired bootstrap "
            f"over blocks of {block} ({comparison.NUM_RESAMPLES:,} resamples). It is about the codes that were "
            "scored; what another seed of the training would change is not in it."
        )
    return [*notes, "codes/s: as measured, with whatever else the machine did; in training the median of the logs."]


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _plain(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())
