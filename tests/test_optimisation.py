"""Branches of a run, and the optimisation experiment: against a run that never branched, and by hand."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from handmade_runs import Patch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import assert_same_checkpoint, checkpoint_state, checkpoint_tensors, logged_values, tiny_run

from ct_audio.commands import optimisation
from ct_audio.commands import train as train_command
from ct_audio.common.errors import UserError
from ct_audio.experiments import update_frequency
from ct_audio.runs.config import RunConfig, config_to_yaml
from ct_audio.runs.metrics import read_metrics
from ct_audio.training.branch import branch_run, require_branch_point
from ct_audio.training.loop import train
from ct_audio.training.schedules import learning_rate, update_period


@pytest.fixture
def source(tmp_path: Path) -> RunConfig:
    config = tiny_run(tmp_path, name="source", train__num_steps=4, train__validate_whole_split=False)
    assert train(config) == 0
    return config


def branch(directory: Path, name: str, **changes: Any) -> RunConfig:
    return tiny_run(directory, name=name, train__num_steps=8, train__validate_whole_split=False, **changes)


def weights(config: RunConfig) -> dict[str, list]:
    tensors = checkpoint_tensors(config)
    return {name: t.tolist() for name, t in tensors.items() if name.startswith("model.safetensors")}


def test_a_branch_that_changes_nothing_is_the_run_itself(source: RunConfig, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in source.run_dir.rglob("*") if path.is_file()}
    same = branch(tmp_path, "same")
    branch_run(source.run_dir, same)
    assert train(same) == 0
    assert {path: path.read_bytes() for path in before} == before
    unbranched = branch(tmp_path, "unbranched")
    assert train(unbranched) == 0
    assert_same_checkpoint(same, unbranched)
    end_of_source = [line for line in logged_values(same) if line["step"] == 4 and "nll/valid_nats" in line]
    assert [line for line in logged_values(same) if line not in end_of_source] == logged_values(unbranched)
    shown = [EventAccumulator(str(config.run_dir)).Reload() for config in (same, unbranched)]
    points = [[(event.step, event.value) for event in found.Scalars("nll/train_nats")] for found in shown]
    assert points[0] == points[1]
    assert [step for step, _ in points[0]] == list(range(1, 9))
    assert set(shown[0].summary_metadata) == set(shown[1].summary_metadata)  # the row of the table of runs too
    branch_run(source.run_dir, same)  # it has begun already: nothing happens
    assert checkpoint_state(same)["step"] == 8


def test_a_branch_begins_with_the_curves_of_its_source_up_to_the_checkpoint(source: RunConfig, tmp_path: Path) -> None:
    """Lines that the source has logged after its checkpoint are not the branch's."""
    lines = read_metrics(source.run_dir)
    with (source.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "nll/train_nats": 1.0}\n')
    branch_run(source.run_dir, branch(tmp_path, "other"))
    assert read_metrics(tmp_path / "runs" / "other") == lines
    with (source.run_dir / "metrics.jsonl").open("a") as file:
        file.write("no JSON\n")
    with pytest.raises(UserError, match=r"cannot read the metrics\.jsonl of .*source"):
        branch_run(source.run_dir, branch(tmp_path, "third"))
    assert not (tmp_path / "runs" / "third").exists()


def test_only_the_optimizer_may_change(source: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.seed"):
        branch_run(source.run_dir, branch(tmp_path, "other", train__seed=1))
    with pytest.raises(UserError, match="no checkpoint to branch off"):
        branch_run(tmp_path / "nowhere", branch(tmp_path, "other"))
    assert not (tmp_path / "runs" / "other").exists()


def test_what_cannot_be_written_leaves_no_run(source: RunConfig, tmp_path: Path, monkeypatch: Patch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        branch_run(source.run_dir, branch(tmp_path, "other"))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["source"]


def test_a_branch_by_the_command(source: RunConfig, tmp_path: Path, monkeypatch: Patch) -> None:
    longer = branch(tmp_path, "longer", optim__peak_learning_rate=1e-4)
    base = tmp_path / "longer.yaml"
    base.write_text(config_to_yaml(longer), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["train", str(base), "--branch", str(source.run_dir)])
    assert train_command.main() == 0
    assert checkpoint_state(longer)["step"] == 8
    assert checkpoint_state(source)["step"] == 4
    before = weights(longer)
    assert train_command.main() == 0  # it is complete: nothing happens
    assert weights(longer) == before
    monkeypatch.setattr("sys.argv", ["train", str(base), "--branch", str(source.run_dir), "name=source"])
    with pytest.raises(UserError, match=r"there is no branch\.json .*choose another name"):
        train_command.main()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--branch: not under torchrun"):
        train_command.main()


def test_where_a_branch_began_is_recorded_and_checked(source: RunConfig, tmp_path: Path) -> None:
    config, state = branch(tmp_path, "other"), checkpoint_state(source)
    assert not require_branch_point(config.run_dir, source="source", step=4)
    branch_run(source.run_dir, config)
    point = {"source": "source", "step": 4, "weights_sha256": state["files"]["model.safetensors"]["sha256"]}
    record, found = config.run_dir / "branch.json", json.loads((config.run_dir / "branch.json").read_text())
    assert found == {"format": "ct_audio branch", "format_version": 1} | point
    assert require_branch_point(config.run_dir, **point)
    assert require_branch_point(config.run_dir, source="source", step=4)
    where = (
        "expected a branch of source at step 6, got one of source at step 4 .*; choose another name or --out, or delete"
    )
    with pytest.raises(UserError, match=where):
        require_branch_point(config.run_dir, source="source", step=6)
    with pytest.raises(UserError, match=r"expected a branch of base at step 4, got one of source at step 4"):
        require_branch_point(config.run_dir, source="base", step=4)
    for content, message in (
        (json.dumps(found | {"weights_sha256": "f" * 64}), "with weights ffffffffffff"),
        ("[]", "is not of ct_audio branch, version 1"),
        ("{", "cannot be read"),
        (None, "there is no branch.json that says where it began"),
    ):
        record.unlink() if content is None else record.write_text(content)
        with pytest.raises(
            UserError, match=rf"expected a branch of source at step 4.*{message}.*choose another name or --out"
        ):
            branch_run(source.run_dir, config)


def test_settings_of_branches(tmp_path: Path) -> None:
    base = tiny_run(tmp_path, optim__update_period={0: 1, 4: 2})
    rates = {}
    for name in ("kept", "rate_0", "rate_0.1", "period_4"):
        changes = dict(override.split("=") for override in update_frequency.settings_of(name, base, 8))
        if name.startswith("period"):
            assert changes == {"optim.update_period": "{0: 1, 4: 2, 8: 4}"}
        optim: dict[str, Any] = {
            key.replace(".", "__"): yaml.safe_load(value) for key, value in changes.items() if "rate" in name
        }
        optim["optim__update_period"] = {0: 1, 4: 2}
        config = tiny_run(tmp_path, **optim)
        rates[name] = [learning_rate(step, config.optim) for step in (8, 15)]
        assert update_period(8, config.optim) == 2
    now = learning_rate(7, base.optim)
    assert rates["rate_0"] == [0, 0]
    assert rates["rate_0.1"] == pytest.approx([0.1 * now, 0.1 * now])
    assert rates["kept"] == rates["period_4"] == [learning_rate(step, base.optim) for step in (8, 15)]
    for name in ("rate", "rate_x", "period_0", "period_1.5", "other_2", "rate_-1"):
        with pytest.raises(UserError, match=f"got '{name}'"):
            update_frequency.settings_of(name, base, 8)


def test_the_summary_by_hand() -> None:
    kept = {"train": [(1, 9.0), (2, 9.0), (3, 2.0), (4, 3.0)], "valid": [(2, 5.0), (4, 4.0)]}
    other = {"train": [(1, 0.0), (2, 1.0), (3, 2.5), (4, 4.0)], "valid": [(4, 4.5)]}
    text, rows = update_frequency.summary({"kept": kept, "rate_0": other}, 0, 4)
    assert list(rows[0].values()) == ["kept", 9.0, 0.0, 0.0, 2.5, 0.0, 0.0, 4.0]
    # The standard error of 0.5 and 1: their standard deviation, 0.25 sqrt(2), over sqrt(2).
    assert list(rows[1].values()) == ["rate_0", 0.5, -8.5, 0.5, 3.25, 0.75, pytest.approx(0.25), 4.5]
    assert "| rate_0 | 0.5000 | -8.5000 | 0.5000 | 3.2500 | 0.7500 | 0.2500 | 4.5000 |" in text


def optimise(directory: Path, monkeypatch: Patch, *options: Any) -> int:
    base = directory / "base.yaml"
    base.write_text(config_to_yaml(tiny_run(directory)), encoding="utf-8")
    arguments = [base, "--out", directory / "out", "--base-steps", 4, "--branch-steps", 4]
    settings = ["--set", "train.validate_whole_split=false", "optim.decay_steps=0"]
    monkeypatch.setattr("sys.argv", ["optimisation.py", *map(str, [*arguments, *options]), *settings])
    return optimisation.main()


@pytest.mark.parametrize("is_branch", [True, False])
def test_branches_of_another_point_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: Patch, is_branch: bool
) -> None:
    runs = {"runs_dir": str(tmp_path / "out" / "runs"), "train__validate_whole_split": False, "optim__decay_steps": 0}
    base = tiny_run(tmp_path, name="base", train__num_steps=2, **runs)
    assert train(base) == 0
    branch_run(base.run_dir, tiny_run(tmp_path, name="kept", train__num_steps=6, **runs))
    if not is_branch:
        (tmp_path / "out" / "runs" / "kept" / "branch.json").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    trained: list[RunConfig] = []
    monkeypatch.setattr("ct_audio.experiments.update_frequency.train", trained.append)
    found = r"got one of base at step 2" if is_branch else r"there is no branch\.json .*it is no branch"
    with pytest.raises(
        UserError, match=rf"kept: expected a branch of base at step 4, .*{found}.*choose another name or --out"
    ):
        optimise(tmp_path, monkeypatch, "--branches", "rate_0")
    assert not trained
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_the_experiment_and_the_same_command_again(tmp_path: Path, monkeypatch: Patch) -> None:
    assert optimise(tmp_path, monkeypatch, "--branches", "rate_0", "period_4") == 0
    out = tmp_path / "out"
    runs = {name: tiny_run(tmp_path, name=name, runs_dir=str(out / "runs")) for name in ("base", "rate_0", "period_4")}
    assert weights(runs["rate_0"]) == weights(runs["base"])  # a rate of zero changes nothing
    assert weights(runs["period_4"]) != weights(runs["base"])
    updates = {name: checkpoint_tensors(run) for name, run in runs.items()}
    counts = {name: next(t for key, t in found.items() if key.endswith("/step")) for name, found in updates.items()}
    assert {name: int(count) for name, count in counts.items()} == {"base": 4, "rate_0": 8, "period_4": 5}
    with (out / "curves.csv").open() as file:
        points = list(csv.DictReader(file))
    steps = [int(point["step"]) for point in points if (point["run"], point["split"]) == ("kept", "train")]
    assert steps == list(range(5, 9))
    with (out / "table.csv").open() as file:
        rows = {row["branch"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["kept", "rate_0", "period_4"]
    assert float(rows["kept"]["minus kept"]) == float(rows["kept"]["minus kept (second)"]) == 0
    assert all(math.isfinite(float(row["valid at the end"])) for row in rows.values())
    lines = [line for line in read_metrics(runs["rate_0"].run_dir) if "nll/train_nats" in line]
    late = [line["nll/train_nats"] for line in lines if line["step"] > 6]
    assert float(rows["rate_0"]["train, second half"]) == pytest.approx(sum(late) / 2)
    assert (out / "optimisation.png").read_bytes().startswith(b"\x89PNG")
    logged = {path: path.read_bytes() for path in (out / "runs").glob("*/metrics.jsonl")}
    assert len(logged) == 4
    assert optimise(tmp_path, monkeypatch, "--branches", "rate_0", "period_4") == 0
    assert {path: path.read_bytes() for path in logged} == logged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--branches", "period_3"], "period_3 ends within an update of 3 steps"),
        (["--branches", "faster"], "expected names as rate_0"),
        (["--branch-steps", 0], "--branch-steps: expected at least 1"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(
    options: list[Any], message: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    with pytest.raises(UserError, match=message):
        optimise(tmp_path, monkeypatch, *options)
    assert not (tmp_path / "out").exists()
