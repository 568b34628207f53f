"""How time and memory grow: every point is measured; growth by hand; a corpus of any size opens in the same memory."""

import csv
from pathlib import Path

import numpy as np
import pytest
from handmade_runs import Output, Patch, tool
from tiny_runs import tiny_run

from ct_audio.data.corpus import open_corpus
from ct_audio.experiments.scaling import CORPUS, SAMPLE, Point, growth, scaling_table, write_sparse_corpus
from ct_audio.runs.config import config_to_yaml


def test_growth_by_hand() -> None:
    points = [Point("x", 1, 9.0, 0.0), Point("x", 2, 10.0, 0.0), Point("x", 4, 40.0, 0.0)]
    assert growth(points, "cpu_seconds") == pytest.approx(2)
    assert growth(points, "mebibytes") == 0
    assert growth(points[:2], "cpu_seconds") == pytest.approx(np.log2(10 / 9))
    assert np.isnan(growth(points[:1], "cpu_seconds"))
    assert "| `x` | 4 | 40,000.0 | 0.0 | 2.00 | 0.00 |" in scaling_table(points)


def test_a_sparse_corpus_is_one_that_opens(tmp_path: Path) -> None:
    write_sparse_corpus(tmp_path / "corpus", 1000.0)
    split = open_corpus(tmp_path / "corpus").split("train")
    assert split.num_codes == 1000 * 3600 * 24_000
    assert len(split.document_offsets) == 360_000
    assert (tmp_path / "corpus" / "train.codes").stat().st_blocks * 512 < 1 << 20


def test_all_points_of_a_tiny_run(tmp_path: Path, monkeypatch: Patch, capsys: Output) -> None:
    base, out = tmp_path / "base.yaml", tmp_path / "out"
    base.write_text(config_to_yaml(tiny_run(tmp_path)), encoding="utf-8")
    words = [base, "--out", out, "--vary", "data.num_lanes=2,1", "--steps", 1]
    assert tool("scaling", monkeypatch)(*words, "--sample-seconds", 0.01, "--corpus-hours", 1, 0.1) == 0
    rows = list(csv.DictReader((out / "scaling.csv").read_text(encoding="utf-8").splitlines()))
    sizes = [("data.num_lanes", 1), ("data.num_lanes", 2), (SAMPLE, 0.01), (CORPUS, 0.1), (CORPUS, 1)]
    assert [(row["curve"], float(row["value"])) for row in rows] == sizes
    assert all(float(row["cpu_seconds"]) > 0 for row in rows)
    assert float(rows[0]["mebibytes"]) > 0
    assert capsys.readouterr().out.strip() in (out / "scaling.md").read_text(encoding="utf-8")
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
