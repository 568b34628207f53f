"""Ablations: their arithmetic by hand, and tiny ones from the command line, twice."""

import csv
import json
import math
from pathlib import Path

import pytest
from handmade_runs import Patch, tool
from tiny_runs import tiny_run

from ct_audio.commands.ablate import OTHER_ROWS, PAPER_ROWS
from ct_audio.experiments import ablation, grid
from ct_audio.experiments.trials import result_of
from ct_audio.runs.config import config_to_yaml, load_config

ROOT = Path(__file__).parents[1]


def test_the_best_rate_counts_and_differences_are_paired_by_seed() -> None:
    bits = {("conv_attention", 2): (1.0, 2.0, 3.0), ("conv_attention", 4): (2.0, 3.0, 4.0), ("max", 4): (1.5, 2.5, 4.5)}
    results = {
        ablation.Trial(row, rate, seed): value
        for (row, rate), values in bits.items()
        for seed, value in enumerate(values)
    }
    worst, best = ablation.summarise(results)
    assert (worst["row"], best["row"]) == ("max", "conv_attention")
    assert (best["best rate"], best["bits"], best["seeds"]) == (2, 2.0, 3)
    assert best["standard error"] == pytest.approx(1 / math.sqrt(3))
    assert best["minus conv_attention"] == 0
    assert worst["minus conv_attention"] == pytest.approx((0.5 + 0.5 + 1.5) / 3)
    assert worst["its standard error"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert (best["paper (bits)"], worst["paper (bits)"]) == (0.973, 0.986)


def test_the_command_knows_the_rows() -> None:
    assert [*PAPER_ROWS, *OTHER_ROWS] == list(ablation.ROWS)
    assert list(PAPER_ROWS) == [name for name, row in ablation.ROWS.items() if row.paper_bits is not None]


def test_a_result_that_was_cut_off_is_none(tmp_path: Path) -> None:
    """As after kill -9 in the middle of a line of metrics.jsonl: the run goes on, and has no result yet."""
    base, trial = tiny_run(tmp_path, train__num_steps=2), ablation.Trial("max", 2, 0)
    run_dir = tmp_path / "runs" / trial.name
    assert result_of(run_dir, base, "bits") is None
    lines = run_dir / "metrics.jsonl"
    lines.parent.mkdir(parents=True)
    whole = [json.dumps({"step": step, "nll/valid_full_bits": 8.0 - step}) for step in (1, 2)]
    lines.write_text("\n".join(whole)[:-3])
    assert result_of(run_dir, base, "bits") is None
    lines.write_text("\n".join([*whole, "{"]))
    assert result_of(run_dir, base, "bits") == 6.0


@pytest.mark.parametrize("recipe", ["enwik8/compressive_transformer", "enwik8/ablation", "kathleen/ablation"])
def test_every_row_is_a_run_with_as_many_codes_a_step(recipe: str) -> None:
    path = ROOT / "recipes" / f"{recipe}.yaml"
    base = load_config(path)
    for row in ablation.ROWS:
        run = load_config(path, ablation.settings_of(ablation.Trial(row, 3, 0), base))
        assert run.data.num_lanes * run.data.chunk_length == base.data.num_lanes * base.data.chunk_length
        if row == "conv_bptt":
            assert run.data.chunk_length >= 2 * base.data.chunk_length


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_ablation_and_the_same_command_again(tmp_path: Path, monkeypatch: Patch) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(config_to_yaml(tiny_run(tmp_path, train__num_steps=2, data__chunk_length=32)), encoding="utf-8")
    ablate, rows = tool("ablate", monkeypatch), ["conv_bptt", "most_used", "conv_attention"]
    arguments = [base, "--out", tmp_path / "out", "--rates", 2, "--seeds", 0, 1, "--num-processes", 2, "--rows", *rows]
    assert ablate(*arguments) == 0
    runs = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(runs) == 6
    assert all(4 < run["bits"] < 9 for run in runs)
    assert len({run["bits"] for run in runs}) == 6
    with (tmp_path / "out" / "table.csv").open() as file:
        assert {row["row"] for row in csv.DictReader(file)} == set(rows)
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    first = {path: path.read_bytes() for path in (tmp_path / "out" / "runs").glob("*/metrics.jsonl")}
    assert ablate(*arguments) == 0
    assert {path: path.read_bytes() for path in first} == first


def test_a_grid_is_all_combinations_of_its_values() -> None:
    assert grid.combinations(["a.b=1,2", "c.d=x"]) == [["a.b=1", "c.d=x"], ["a.b=2", "c.d=x"]]
    names = [grid.name_of(row) for row in ([], ["model.head=categorical", "data.num_lanes=5"])]
    assert names == ["unchanged", "head=categorical, num_lanes=5"]
    assert grid.trial_name(names[1], 2) == "head_categorical__num_lanes_5_seed2"


def test_differences_of_a_grid_are_paired_by_seed() -> None:
    """Seed 3 has no partner; the quantile of Student's t with two degrees of freedom is 4.3027."""
    interval = grid.paired({0: 1.5, 1: 2.1, 2: 2.4, 3: 9.0}, {0: 1.0, 1: 2.0, 2: 2.1})
    assert interval.mean == pytest.approx(0.3)
    assert interval.half_width == pytest.approx(4.302653 * 0.2 / math.sqrt(3), rel=1e-6)
    assert math.isnan(grid.paired({0: 1.0}, {1: 1.0}).mean)
    single = grid.paired({0: 1.0}, {0: 0.5})
    assert single.mean == 0.5
    assert math.isnan(single.half_width)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_grid_leaves_out_what_is_refused_and_the_same_command_again(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(config_to_yaml(tiny_run(tmp_path, train__num_steps=2)), encoding="utf-8")
    ablate, out = tool("ablate", monkeypatch), tmp_path / "out"
    axes = ["model.front_end=codes,waveform", "model.head=categorical,logistic_mixture"]
    arguments = [base, "--out", out, "--seeds", 0, 1, "--num-processes", 2, "--grid", *axes]
    assert ablate(*arguments) == 0
    printed = capsys.readouterr().out
    assert "- front_end=codes, head=logistic_mixture: model.head = logistic_mixture needs the waveform" in printed
    with (out / "table.csv").open() as file:
        rows = {row["settings"]: row for row in csv.DictReader(file)}
    assert set(rows) == {
        "front_end=codes, head=categorical",
        "front_end=waveform, head=categorical",
        "front_end=waveform, head=logistic_mixture",
    }
    results = {row["settings"]: row["nats"] for row in json.loads((out / "results.json").read_text())}
    for name, row in rows.items():
        assert float(row["nats"]) == pytest.approx(sum(results[name].values()) / 2)
    assert (out / "grid.png").read_bytes().startswith(b"\x89PNG")
    first = {path: path.read_bytes() for path in (out / "runs").glob("*/metrics.jsonl")}
    assert len(first) == 6
    assert ablate(*arguments) == 0
    assert {path: path.read_bytes() for path in first} == first
