"""tools/ablate.py: its arithmetic by hand, and a tiny ablation from the command line, twice."""

import argparse
import csv
import json
import math
from pathlib import Path

import pytest
from recordings import load_script
from tiny_runs import tiny_run

from ct_audio.runs.config import config_to_yaml, load_config

ROOT = Path(__file__).parents[1]
ablate = load_script("tools/ablate.py", "ablate_tool")


def test_the_best_rate_counts_and_differences_are_paired_by_seed() -> None:
    bits = {("conv_attention", 2): (1.0, 2.0, 3.0), ("conv_attention", 4): (2.0, 3.0, 4.0), ("max", 4): (1.5, 2.5, 4.5)}
    results = {
        ablate.Trial(row, rate, seed): value
        for (row, rate), values in bits.items()
        for seed, value in enumerate(values)
    }
    worst, best = ablate.summarise(results)
    assert (worst["row"], best["row"]) == ("max", "conv_attention")
    assert (best["best rate"], best["bits"], best["seeds"]) == (2, 2.0, 3)
    assert best["standard error"] == pytest.approx(1 / math.sqrt(3))
    assert best["minus conv_attention"] == 0
    assert worst["minus conv_attention"] == pytest.approx((0.5 + 0.5 + 1.5) / 3)
    assert worst["its standard error"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert (best["paper (bits)"], worst["paper (bits)"]) == (0.973, 0.986)


@pytest.mark.parametrize("recipe", ["enwik8/compressive_transformer", "enwik8/ablation", "kathleen/ablation"])
def test_every_row_is_a_run_with_as_many_codes_a_step(recipe: str) -> None:
    path = ROOT / "recipes" / f"{recipe}.yaml"
    base = load_config(path)
    arguments = argparse.Namespace(base=path, out=Path("out"), set=[])
    for row in ablate.ROWS:
        command = ablate.command_of(ablate.Trial(row, 3, 0), base, arguments)
        run = load_config(path, command[command.index(str(path)) + 1 :])
        assert run.data.num_lanes * run.data.chunk_length == base.data.num_lanes * base.data.chunk_length
        if row == "conv_bptt":
            assert run.data.chunk_length >= 2 * base.data.chunk_length


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_ablation_and_the_same_command_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(config_to_yaml(tiny_run(tmp_path, train__num_steps=2, data__chunk_length=32)), encoding="utf-8")
    arguments = ["ablate.py", base, "--out", tmp_path / "out", "--rates", 2, "--seeds", 0, 1, "--num-processes", 2]
    monkeypatch.setattr("sys.argv", [*map(str, arguments), "--rows", "conv_bptt", "most_used", "conv_attention"])
    assert ablate.main() == 0
    runs = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(runs) == 6
    assert all(4 < run["bits"] < 9 for run in runs)
    assert len({run["bits"] for run in runs}) == 6
    with (tmp_path / "out" / "table.csv").open() as file:
        assert {row["row"] for row in csv.DictReader(file)} == {"conv_bptt", "most_used", "conv_attention"}
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    first = {path: path.read_bytes() for path in (tmp_path / "out" / "runs").glob("*/metrics.jsonl")}
    assert ablate.main() == 0
    assert {path: path.read_bytes() for path in first} == first
