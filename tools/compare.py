"""Put runs side by side: NLL curves over steps, audio seen and wall time (PNG), and a result table (Markdown, CSV)."""

import argparse
import csv
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.command_line import build_parser, run_tool
from ct_audio.common.errors import UserError

if TYPE_CHECKING:
    from ct_audio.evaluation.stored import EvaluationSettings
    from ct_audio.runs.open_run import LoadedRun

MEMORY_LENGTHS = ("memory_length", "compressed_memory_length")


@dataclass
class Run:
    """What is known of a run.

    Attributes:
        curves: see `ct_audio.evaluation.curves.Curves`.
        valid_codes: length of the stretch that the validation curve is of; 0: the whole split.
        precision: of the forward pass that the validation curve is of.
        evaluations: by split, as they are stored.
    """

    path: Path
    curves: Any
    valid_codes: int = 0
    precision: str = "float32"
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def any_evaluation(self) -> dict[str, Any]:
        """For what all of them say: parameters, step, memory lengths."""
        return next(iter(self.evaluations.values()))


def main() -> int:
    """Parse, read the runs, score what is not scored yet, write DIR/curves.png, DIR/table.md and DIR/table.csv."""
    arguments = _parse()
    from ct_audio.evaluation.curves import draw_curves, read_curves  # after --help: it takes seconds

    runs = {label: Run(path, read_curves(path)) for label, path in label_paths(arguments.runs).items()}
    score_runs(runs, arguments)
    rows = result_rows(runs)
    table = markdown_table(rows, runs)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    levels = {label for label, run in runs.items() if not run.any_evaluation["num_parameters"]}
    draw_curves({label: run.curves for label, run in runs.items()}, out / "curves.png", levels=levels)
    _write(out / "table.md", table)
    _write(out / "table.csv", csv_table(rows, runs))
    print(table, end="")
    print(f"wrote curves.png, table.md and table.csv to {out}", file=sys.stderr)
    return 0


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Compare runs: NLL curves from their event files, and a result table with the difference of each run from the "
        "first one and its 95% interval. Results of tools/evaluate.py are taken from RUN/evaluations; what is missing, "
        "or of an older checkpoint, is measured and kept there."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs; all are set against the first")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write; made if it is missing")
    parser.add_argument("--splits", nargs="+", default=["valid"], metavar="SPLIT", help="splits in the table")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="score only the beginning of each split")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to score")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: torch's default")
    return parser.parse_args()


def label_paths(paths: list[str]) -> dict[str, Path]:
    """Directories by the last part of their path, or by the whole of it where last parts are equal."""
    names = [Path(path).name for path in paths]
    labels = {path if names.count(name) > 1 else name: Path(path) for path, name in zip(paths, names, strict=True)}
    if len({path.resolve() for path in labels.values()}) < len(paths):
        raise UserError(f"expected each run once, got {' '.join(paths)}")
    return labels


def score_runs(runs: dict[str, Run], arguments: argparse.Namespace) -> None:
    """Give each run its evaluations: those that are stored for its best checkpoint, else measured and stored now.

    Raises:
        UserError: a checkpoint or split is missing, or the runs were not scored alike.
    """
    from ct_audio.evaluation.comparison import require_alike
    from ct_audio.evaluation.stored import EvaluationSettings, find_evaluation
    from ct_audio.runs.device import set_up_device
    from ct_audio.runs.open_run import load_run_model

    device = set_up_device(arguments.device, num_threads=arguments.threads)
    for label, run in runs.items():
        loaded = load_run_model(run.path, device=device)
        run.valid_codes, run.precision = loaded.config.train.valid_codes, loaded.config.train.precision
        for split in arguments.splits:
            settings = EvaluationSettings(split=split, max_seconds=arguments.max_seconds)
            run.evaluations[split] = find_evaluation(run.path, loaded, settings) or measure(
                label, run.path, loaded, settings
            )
    for split in arguments.splits:
        require_alike({label: run.evaluations[split] for label, run in runs.items()})
    if len({run.valid_codes for run in runs.values()}) > 1:
        lengths = ", ".join(f"{label} {run.valid_codes}" for label, run in runs.items())
        print(f"warning: the validation curves are of stretches of different length ({lengths} codes)", file=sys.stderr)
    if len(precisions := {run.precision for run in runs.values()}) > 1 and "bfloat16" in precisions:
        kinds = ", ".join(f"{label} {run.precision}" for label, run in runs.items())
        print(f"warning: the validation curves were measured in different precision ({kinds})", file=sys.stderr)


def measure(label: str, path: Path, loaded: "LoadedRun", settings: "EvaluationSettings") -> dict[str, Any]:
    """Score a run, keep the result in it (a warning where that cannot be), and say so."""
    from ct_audio.evaluation.stored import evaluate_run, store_evaluation
    from ct_audio.runs.open_run import run_corpus

    what = f"{label}, {settings.split}, {loaded.checkpoint_path.name}"
    print(f"{what}: no stored evaluation fits, scoring now", file=sys.stderr, flush=True)
    report, blocks = evaluate_run(loaded, run_corpus(loaded), settings, progress=f"{label} {settings.split}")
    try:
        print(f"{what}: stored in {store_evaluation(path, loaded, settings, report, blocks)}", file=sys.stderr)
    except OSError as error:
        print(f"warning: {what}: the result is not kept in the run: {error}", file=sys.stderr)
    return report | {"blocks": blocks}


def result_rows(runs: dict[str, Run]) -> list[dict[str, Any]]:
    """A row a run: size, steps, speed, and for each split NLL, difference from the first run, interval and speed."""
    from ct_audio.evaluation.comparison import paired_difference

    rows, first = [], next(iter(runs.values()))
    for label, run in runs.items():
        about, curves = run.any_evaluation, run.curves
        is_trained = about["num_parameters"] > 0
        row: dict[str, Any] = {
            "run": label,
            "parameters": about["num_parameters"],
            "without f_c": about["num_parameters"] - about["num_parameters_compression"],
            "steps": _whole(curves.last("steps")) if is_trained else None,
            "scored at step": about["step"] if is_trained else None,
            "audio seen (s)": _whole(curves.last("audio seen")) if is_trained else None,
            "training codes/s": _whole(curves.median_throughput),
        }
        for split, evaluation in run.evaluations.items():
            row |= {f"{split} (nats)": evaluation["nll_nats"], f"{split} (bits)": evaluation["nll_bits"]}
            difference = (None,) * 3 if run is first else paired_difference(first.evaluations[split], evaluation)[:3]
            names = (f"{split} difference (nats)", f"{split} low", f"{split} high")
            row |= dict(zip(names, difference, strict=True))
            row[f"{split} codes/s"] = _whole(evaluation["units_per_second"])
        rows.append(row)
    return rows


def csv_table(rows: list[dict[str, Any]], runs: dict[str, Run]) -> str:
    """The rows, and behind them the protocol of each split."""
    table = io.StringIO()
    protocols = [{f"{s} protocol": _plain(e["protocol"]) for s, e in run.evaluations.items()} for run in runs.values()]
    writer = csv.DictWriter(table, fieldnames=[*rows[0], *protocols[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | protocol for row, protocol in zip(rows, protocols, strict=True))
    return table.getvalue()


def markdown_table(rows: list[dict[str, Any]], runs: dict[str, Run]) -> str:
    """The rows, the interval in one column with the difference, and below them protocol and method."""
    table = []
    for row in rows:
        cells = {key: _cell(value) for key, value in row.items()}
        for split in next(iter(runs.values())).evaluations:
            difference, low, high = (row[f"{split} {name}"] for name in ("difference (nats)", "low", "high"))
            interval = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
            cells[f"{split} difference (nats)"] = "" if difference is None else f"{difference:+.4f}{interval}"
            del cells[f"{split} low"], cells[f"{split} high"]
        table.append(cells)
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(cells.values()) for cells in table)]
    notes = "".join(f"- {note}\n" for note in _notes(runs))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n" + notes


def _notes(runs: dict[str, Run]) -> list[str]:
    from ct_audio.evaluation.comparison import BOOTSTRAP_CODES, BOOTSTRAP_SECONDS, NUM_RESAMPLES, comparable_protocol

    first_label, first = next(iter(runs.items()))
    notes = []
    for split, evaluation in first.evaluations.items():
        protocol = comparable_protocol(evaluation["protocol"])
        notes.append(f"{split}: {_plain(protocol | {'split_sha256': protocol['split_sha256'][:12]})}")
    for label, run in runs.items():
        protocol = run.any_evaluation["protocol"]
        lengths = {key: protocol[key] for key in MEMORY_LENGTHS if protocol.get(key) is not None}
        notes += [f"{label}: {_plain(lengths)}"] if lengths else []
    if len(runs) > 1:
        is_text = first.any_evaluation["seconds"] is None
        block = f"{BOOTSTRAP_CODES:,} codes" if is_text else f"{BOOTSTRAP_SECONDS:g} s"
        notes.append(
            f"difference: from {first_label} on the same codes; in brackets the 95% interval of a paired bootstrap "
            f"over blocks of {block} ({NUM_RESAMPLES:,} resamples). It is about the codes that were "
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


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(run_tool(main))
