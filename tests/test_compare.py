"""tools/compare.py: curves and a table from runs; different protocols are never put into one column."""

import csv
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "compare.py"


def write_run(folder: Path, name: str, best: float) -> Path:
    run = folder / name
    run.mkdir()
    records: list[dict[str, Any]] = [
        {"step": s, "wall_seconds": 2.0 * s, "audio_seconds": 0.16 * s, "nll/train_nats": 5 - s / 10}
        | {"throughput/codes_per_second": 1000.0 * s}
        for s in (1, 2, 3)
    ]
    records[1] |= {"nll/valid_nats": best + 1}
    last = {key: records[-1][key] for key in ("step", "wall_seconds", "audio_seconds")}
    records.append(last | {"nll/valid_full_nats": best, "nll/valid_full_bits": best / 0.6931471805599453})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return run


def write_evaluation(path: Path, name: str, **protocol: Any) -> None:
    item = {
        "name": name,
        "split": "test",
        "nll_nats": 2.5,
        "nll_bits": 3.6067,
        "num_parameters": 1_000,
        "num_parameters_compression": 100,
        "protocol": {"num_lanes": 1, "memory_length": len(name), "split": "test"} | protocol,
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(item) + "\n")


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the tool in this process: exit status, standard output, standard error."""
    spec = importlib.util.spec_from_file_location("compare_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["compare.py", *map(str, arguments)])
        status = tool.run_tool(tool.main)
        output, error = capsys.readouterr()
        return status, output, error

    return run


def test_table_and_curves(tmp_path: Path, compare: Callable[..., tuple[int, str, str]]) -> None:
    runs = [write_run(tmp_path, name, best) for name, best in (("a", 2.25), ("bb", 2.75))]
    evaluations = tmp_path / "test.jsonl"
    for run in runs:
        write_evaluation(evaluations, run.name)
    status, output, error = compare(*runs, "--evaluations", evaluations, "--out", tmp_path / "out")
    assert status == 0, error
    with (tmp_path / "out" / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["a", "bb"]
    assert rows[0]["parameters"] == "1000"
    assert rows[0]["without f_c"] == "900"
    assert rows[0]["training codes/s (median)"] == "2000"
    assert [row["whole valid (nats)"] for row in rows] == ["2.2500", "2.7500"]
    assert rows[1]["test (nats)"] == "2.5000"
    assert "| a | 1,000 | 900 | 3 |" in output
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_different_protocols_are_refused(tmp_path: Path, compare: Callable[..., tuple[int, str, str]]) -> None:
    runs = [write_run(tmp_path, name, 2.5) for name in ("a", "b")]
    evaluations = tmp_path / "test.jsonl"
    write_evaluation(evaluations, "a")
    write_evaluation(evaluations, "b", num_lanes=4)
    status, _, error = compare(*runs, "--evaluations", evaluations, "--out", tmp_path / "out")
    assert status == 2
    assert "different protocols" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["no_run", "no_evaluations", "not_an_evaluation"])
def test_what_is_missing_is_named(tmp_path: Path, compare: Callable[..., tuple[int, str, str]], what: str) -> None:
    run, evaluations = write_run(tmp_path, "a", 2.5), tmp_path / "test.jsonl"
    if what == "not_an_evaluation":
        evaluations.write_text('{"split": "test"}\n', encoding="utf-8")
    status, _, error = compare(
        tmp_path / "other" if what == "no_run" else run, "--evaluations", evaluations, "--out", tmp_path / "out"
    )
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
