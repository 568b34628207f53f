"""The files of evaluations, tables with a picture and JSON beside them, and what is said of them on the terminal."""

from pathlib import Path
from typing import Any

from ct_audio.common.figures import write_figure
from ct_audio.common.files import write_csv, write_json
from ct_audio.data.codecs import Codec
from ct_audio.evaluation.figures import groups_figure, score_figure, sweep_figure
from ct_audio.evaluation.groups import Grouping
from ct_audio.evaluation.over_time import Score, bins_over_time, most_surprising
from ct_audio.runs.open_run import LoadedRun


def write_groups(groupings: list[Grouping], tables: dict[str, Any], report: dict[str, Any], place: Path) -> None:
    """Write NLL by kind of code: PLACE-NAME.csv for each grouping, PLACE.json, PLACE.png.

    Args:
        tables: rows of `GroupSums.rows` by name of the grouping.
        report: of `evaluate_run`.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    title = f"{report['name']}, step {report['step']}, {report['split']}: {report['nll_bits']:.3f} bits per code"
    for name, rows in tables.items():
        write_csv(_file(place, f"-{name}.csv"), rows)
    write_json(_file(place, ".json"), report | {"groups": tables})
    write_figure(groups_figure([(each, tables[each.name]) for each in groupings], title), _file(place, ".png"))


def write_sweep(report: dict[str, Any], place: Path) -> None:
    """Write what `sweep_memory` returned: PLACE.json, PLACE.csv, PLACE.png."""
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(_file(place, ".json"), report)
    write_csv(_file(place, ".csv"), report["rows"])
    write_figure(sweep_figure(report), _file(place, ".png"))


def write_score(
    score: Score, run: LoadedRun, codec: Codec, file_name: str, place: Path, *, bin_length: int
) -> dict[str, Any]:
    """Write bits per unit over time of a file: PLACE.csv, PLACE.png, PLACE.json; see `bins_over_time`.

    Returns:
        what the JSON says, and as "written" where the table is.
    """
    rate, evaluation = codec.sample_rate_hz, score.evaluation
    rows = bins_over_time(score, codec, bin_length)
    report = {
        "file": file_name,
        "run": run.config.name,
        "checkpoint": run.checkpoint_path.name,
        "unit": codec.unit,
        "num_units": evaluation.num_units,
        "seconds": evaluation.num_units / rate if rate else None,
        "nll_nats": evaluation.nll_nats,
        "nll_bits": evaluation.nll_bits,
        "total_bytes": evaluation.nll_bits * evaluation.num_units / 8,
        "bin_length": bin_length,
        "most_surprising": most_surprising(rows),
        "protocol": evaluation.protocol | {"split": None},
    }
    figure = score_figure(
        rows,
        title=f"{file_name} under {run.config.name}, step {run.step}: {evaluation.nll_bits:.3f} bits per {codec.unit}",
        unit=codec.unit,
        waveform=codec.decode(score.codes) if rate else None,
        sample_rate_hz=rate,
    )
    write_csv(_file(place, ".csv"), rows)
    write_figure(figure, _file(place, ".png"))
    write_json(_file(place, ".json"), report)
    return report | {"written": str(_file(place, ".csv"))}


def evaluation_text(report: dict[str, Any]) -> str:
    """Lines that say what `evaluate_run` found; with "groups", tables by kind of code."""
    audio = "" if report["seconds"] is None else f" ({report['seconds']:.1f} s of audio)"
    protocol = ", ".join(f"{key} {value}" for key, value in report["protocol"].items())
    names = {"perplexity": "perplexity", "perplexity_a_word": "perplexity per word", "nll_bits_a_byte": "bits per byte"}
    text = "".join(f", {label} {report[key]:.4g}" for key, label in names.items() if report.get(key) is not None)
    lines = [
        f"{report['name']}: {report['model']}, {report['num_parameters']:,} parameters, step {report['step']}",
        f"nll of {report['split']}: {report['nll_nats']:.4f} nats, {report['nll_bits']:.4f} bits per code{text}",
        f"{report['num_units']:,} codes{audio} in {report['wall_seconds']:.1f} s: {report['units_per_second']:.0f}/s",
        f"protocol: {protocol}",
    ]
    for name, rows in report.get("groups", {}).items():
        lines.append(f"by {name}: {'share':>23} {'nats':>8} {'bits':>8}")
        for row in rows:
            numbers = "" if row["nll_nats"] is None else f" {row['nll_nats']:8.4f} {row['nll_bits']:8.4f}"
            lines.append(f"  {row['group']:<27}{row['share']:7.2%}{numbers}")
    return "\n".join(lines)


def sweep_text(report: dict[str, Any]) -> str:
    """A table of what `sweep_memory` returned."""
    lines = [f"{'memory':>8} {'compressed':>10} {'range':>9} {'nats':>8} {'bits':>8}"]
    for row in report["rows"]:
        marks = " best" * row["is_best"] + " as trained" * row["as_trained"]
        lengths = f"{row['memory_length']:8d} {row['compressed_memory_length']:10d} {row['temporal_range']:9,d}"
        lines.append(f"{lengths} {row['nll_nats']:8.4f} {row['nll_bits']:8.4f}{marks}")
    if test := report["test"]:
        lines.append(f"{test['split']} at the best: {test['nll_nats']:.4f} nats, {test['nll_bits']:.4f} bits per code")
    return "\n".join(lines)


def score_line(report: dict[str, Any]) -> str:
    """What `write_score` returned, on one line."""
    extent = f"{report['num_units']:,} {report['unit']}s"
    extent += "" if report["seconds"] is None else f" ({report['seconds']:.1f} s)"
    highest = report["most_surprising"][0]
    seconds = highest.get("start_seconds")
    where = f"{report['unit']} {highest['start']}" if seconds is None else f"{seconds:.1f} s"
    mean = f"{report['nll_bits']:.4f} bits per {report['unit']}"
    return f"{report['file']}: {mean}, {extent}; highest {highest['nll_bits']:.2f} at {where}; {report['written']}"


def _file(place: Path, ending: str) -> Path:
    return place.with_name(f"{place.name}{ending}")  # a name may have dots of its own
