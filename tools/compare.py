"""Put runs side by side: NLL curves over steps, audio seen and wall time (PNG), and a result table (Markdown, CSV)."""

import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.cli import build_parser, run_tool
from ct_audio.errors import UserError

# The x axes of the curves: key of metrics.jsonl, label, and what one unit of it is divided by.
AXES = {
    "step": ("step", 1.0),
    "audio_seconds": ("audio seen (minutes)", 60.0),
    "wall_seconds": ("wall time (minutes)", 60.0),
}
CURVES = {"nll/train_nats": {"alpha": 0.35, "linewidth": 1.0}, "nll/valid_nats": {"marker": "o", "markersize": 3.0}}


def main() -> int:
    """Parse, read the runs, write DIR/curves.png, DIR/table.md and DIR/table.csv."""
    parser = build_parser(
        "Compare runs: NLL curves from their metrics.jsonl and a result table from the objects that "
        "`tools/evaluate.py --json` printed."
    )
    parser.add_argument("runs", nargs="+", help="run directories, as runs/NAME")
    parser.add_argument(
        "--evaluations", nargs="*", default=[], metavar="FILE", help="files with one object of evaluate --json a line"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write; made if it is missing")
    arguments = parser.parse_args()
    runs = {Path(run).name: read_run(Path(run)) for run in arguments.runs}
    evaluations = [item for path in arguments.evaluations for item in read_evaluations(Path(path))]
    rows = result_rows(runs, evaluations)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(runs, out / "curves.png")
    (out / "table.md").write_text(markdown_table(rows, evaluations), encoding="utf-8")
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print((out / "table.md").read_text(encoding="utf-8"), end="")
    print(f"wrote curves.png, table.md and table.csv to {out}", file=sys.stderr)
    return 0


def read_run(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, oldest first.

    Raises:
        UserError: there is none, or a line is no JSON.
    """
    from ct_audio.metrics import read_metrics  # after --help: it takes seconds

    try:
        records = read_metrics(run)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the metrics.jsonl of {run}: {error}") from error
    if not records:
        raise UserError(f"{run} has no metrics.jsonl with a record; train the run first")
    return records


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Objects that evaluate --json printed, one a line."""
    try:
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"cannot read {path}: {error}; write it with: python tools/evaluate.py RUN --json >> FILE"
        ) from error
    for item in items:
        missing = {"name", "split", "nll_nats", "nll_bits", "protocol", "num_parameters"} - item.keys()
        if missing:
            raise UserError(f"{path}: an object lacks {sorted(missing)}; expected what evaluate --json prints")
    return items


def result_rows(runs: dict[str, list[dict[str, Any]]], evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a run: size, steps, NLL a split, throughput.

    Raises:
        UserError: two runs of one column were scored under different protocols, or a run was scored twice.
    """
    by_split: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for item in evaluations:
        if item["name"] in by_split[item["split"]]:
            raise UserError(f"{item['name']} was scored twice on {item['split']}; leave one of the two out")
        by_split[item["split"]][item["name"]] = item
    for split, items in by_split.items():
        protocols = {json.dumps(_comparable(item["protocol"]), sort_keys=True): name for name, item in items.items()}
        if len(protocols) > 1:
            raise UserError(
                f"{split}: scored under different protocols, so not comparable: {' against '.join(protocols)}"
            )
    rows = []
    for name, records in runs.items():
        last = records[-1]
        scored = next((items[name] for items in by_split.values() if name in items), {})
        compression = scored.get("num_parameters_compression")
        throughput = [
            record["throughput/codes_per_second"] for record in records if "throughput/codes_per_second" in record
        ]
        row: dict[str, Any] = {
            "run": name,
            "parameters": scored.get("num_parameters", ""),
            "without f_c": scored["num_parameters"] - compression if compression is not None else "",
            "steps": last["step"],
            "audio seen (s)": round(last["audio_seconds"], 1),
            "training codes/s (median)": round(statistics.median(throughput)) if throughput else "",
        }
        whole = next((record for record in reversed(records) if "nll/valid_full_nats" in record), {})
        for unit in ("nats", "bits"):
            value = whole.get(f"nll/valid_full_{unit}")
            row[f"whole valid ({unit})"] = "" if value is None else f"{value:.4f}"
        for split in sorted(by_split, reverse=True):
            for unit in ("nats", "bits"):
                value = by_split[split].get(name, {}).get(f"nll_{unit}")
                row[f"{split} ({unit})"] = "" if value is None else f"{value:.4f}"
        rows.append(row)
    return rows


def markdown_table(rows: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> str:
    """The rows as Markdown, and below it the protocol of each split."""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()) for row in rows]
    protocols = {item["split"]: _comparable(item["protocol"]) for item in evaluations}
    notes = [
        f"{split}: {', '.join(f'{key} {value}' for key, value in sorted(protocol.items()))}"
        for split, protocol in sorted(protocols.items())
    ]
    return "\n".join(f"| {line} |" for line in lines) + "\n\n" + "".join(f"- {note}\n" for note in notes)


def draw_curves(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One panel an axis: validation NLL with markers, training NLL faint behind it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(5.2 * len(AXES), 4.4), sharey=True)
    for panel, (key, (label, unit)) in zip(panels, AXES.items(), strict=True):
        for index, (name, records) in enumerate(runs.items()):
            for tag, style in CURVES.items():
                points = [(record[key] / unit, record[tag]) for record in records if tag in record and key in record]
                if points:
                    shown = name if tag == "nll/valid_nats" else None
                    panel.plot(*zip(*points, strict=True), color=f"C{index}", label=shown, **style)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("NLL (nats a code); markers: validation")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _comparable(protocol: dict[str, Any]) -> dict[str, Any]:
    """The protocol less the memory lengths, which belong to the model."""
    return {key: value for key, value in protocol.items() if not key.endswith("memory_length")}


if __name__ == "__main__":
    sys.exit(run_tool(main))
