"""Curves of runs: what is read from metrics.jsonl, and the picture."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY_MODELS

from ct_audio.common.errors import UserError
from ct_audio.evaluation.curves import Curves, draw_curves, nll_range, read_curves, running_mean
from ct_audio.runs.config import config_from_dict, config_to_yaml
from ct_audio.runs.metrics import MetricsWriter


def write_curves(run_dir: Path, *, audio: bool = True, level: float | None = None) -> Path:
    """Ten steps of 16 s of audio and 3 s of wall time; validated at every second one."""
    run_dir.mkdir(parents=True, exist_ok=True)
    writer = MetricsWriter(run_dir)
    for step in range(1, 11):
        where: dict[str, Any] = {"wall_seconds": 3.0 * step, "audio_seconds": 16.0 * step if audio else None}
        if level is None:
            values = {"nll/train_nats": 6 - step / 8, "throughput/codes_per_second": 100.0 * step}
            writer.scalars(values, step=step, **where)
        if step % 2 == 0:
            writer.scalars({"nll/valid_nats": 6 - step / 4 if level is None else level}, step=step, **where)
    writer.close()
    return run_dir


def test_curves_are_those_that_were_logged(tmp_path: Path) -> None:
    curves = read_curves(write_curves(tmp_path / "run"))
    steps = [2, 4, 6, 8, 10]
    assert curves.nll["steps"]["valid"] == [(step, 6 - step / 4) for step in steps]
    assert curves.nll["audio seen"]["valid"] == [(16 * step, 6 - step / 4) for step in steps]
    assert curves.nll["wall time"]["valid"] == [(3 * step, 6 - step / 4) for step in steps]
    assert curves.nll["steps"]["train"] == [(step, 6 - step / 8) for step in range(1, 11)]
    assert [curves.last(axis) for axis in ("steps", "audio seen", "wall time")] == [10, 160, 30]
    assert curves.median_throughput == 550


def test_core_time_is_training_seconds_times_threads(tmp_path: Path) -> None:
    """Validations stand where the steps before them ended; a run with an unknown number of cores has no such curve."""
    run = tmp_path / "run"
    run.mkdir()
    writer = MetricsWriter(run)
    writer.scalars({"nll/valid_nats": 6.0}, step=0, wall_seconds=1.0)
    for step, seconds in ((10, 5.0), (20, 9.0)):
        writer.scalars({"nll/train_nats": 5.0, "throughput/training_seconds": seconds}, step=step, wall_seconds=1.0)
        writer.scalars({"nll/valid_nats": 4.0}, step=step, wall_seconds=1.0)
    writer.close()
    assert read_curves(run).last("core time of training") is None  # no configuration
    config = config_from_dict({"name": "run", "model": TINY_MODELS["wavenet"], "data": {"corpus": "x"}})
    for threads, device, cores in ((3, "cpu", 3), (0, "cpu", None), (3, "cuda", None)):
        train = dataclasses.replace(config.train, num_threads=threads, device=device)
        text = config_to_yaml(dataclasses.replace(config, train=train))
        (run / "config.yaml").write_text(text, encoding="utf-8")
        found = read_curves(run).nll["core time of training"]
        assert found["valid"] == ([] if cores is None else [(5.0 * cores, 4.0), (9.0 * cores, 4.0)])
        assert found["train"] == ([] if cores is None else [(5.0 * cores, 5.0), (9.0 * cores, 5.0)])
    (run / "checkpoints" / "step_00000020").mkdir(parents=True)
    for rank in range(2):
        (run / "checkpoints" / "step_00000020" / f"memory-rank{rank}.safetensors").touch()
    (run / "checkpoints" / "last").write_text("step_00000020", encoding="utf-8")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, num_threads=3, device="cpu"))
    (run / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert read_curves(run).last("core time of training") == 2 * 3 * 9.0
    draw_curves({"run": read_curves(run)}, tmp_path / "curves.png")


def test_text_has_no_audio(tmp_path: Path) -> None:
    curves = read_curves(write_curves(tmp_path / "run", audio=False))
    assert curves.last("audio seen") is None
    draw_curves({"text": curves}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Markers for what is trained, a level line for what is not; nothing half-written is left beside."""
    drawn: list[Any] = []
    monkeypatch.setattr(
        "ct_audio.evaluation.curves.Figure.savefig",
        lambda self, file, **_: drawn.append(self) or file.write(b"x"),
    )
    runs = {"_trained": write_curves(tmp_path / "a"), "$x_{y$": write_curves(tmp_path / "b", level=2.5)}
    curves = {label: read_curves(path) for label, path in runs.items()}
    level = curves["$x_{y$"]
    level.nll["audio seen"]["valid"] = []  # the level holds there too
    draw_curves(curves, tmp_path / "curves.png", levels={"$x_{y$"})
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["_trained: 3.500", r"\$x_{y\$: 2.500"]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["curves.png"]
    panels = drawn[0].axes
    assert [panel.get_xlabel() for panel in panels] == ["steps", "audio seen (minutes)", "wall time (seconds)"]
    for panel, divisor in zip(panels, (1, 60 / 16, 1 / 3), strict=True):
        assert panel.get_ylim() == nll_range(curves)
        train, valid, level = panel.lines
        assert list(train.get_xdata()) == pytest.approx([step / divisor for step in range(1, 11)])
        assert list(valid.get_xdata()) == pytest.approx([step / divisor for step in (2, 4, 6, 8, 10)])
        assert list(level.get_ydata()) == [2.5, 2.5]
        assert list(level.get_xdata()) == [0, 1]  # the whole width of the panel


def test_the_range_leaves_out_the_fall_from_the_start() -> None:
    def curves(*valid: float) -> Curves:
        points = [(float(step), value) for step, value in enumerate(valid)]
        return Curves({axis: {"train": [(0.0, 9.0)], "valid": points} for axis in ("steps", "audio seen")}, [])

    low, high = nll_range({"a": curves(5.5, 3.0, 2.9, 2.8, 2.7)})
    assert (low, high) == pytest.approx((2.7 - 0.06 * 0.3, 3.0 + 0.06 * 0.3))
    low, high = nll_range({"a": curves(5.5, 3.0, 2.9, 2.8, 2.7), "level": curves(2.4, 2.4)})
    assert (low, high) == pytest.approx((2.4 - 0.06 * 0.6, 3.0 + 0.06 * 0.6))
    assert nll_range({"level": curves(2.5, 2.5)}) == pytest.approx((2.4, 2.6))
    assert nll_range({"train only": curves()}) == pytest.approx((8.9, 9.1))


@pytest.mark.parametrize("length", [1, 3, 4])
def test_a_running_mean_stands_at_its_last_point(length: int) -> None:
    points = [(10.0, 1.0), (20.0, 3.0), (30.0, 8.0), (40.0, 0.0)]
    expected = [
        (points[last][0], sum(y for _, y in points[last - length + 1 : last + 1]) / length)
        for last in range(length - 1, 4)
    ]
    assert running_mean(points, length) == pytest.approx(expected)
    assert running_mean([], 0) == []


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        read_curves(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no NLL curve"):
        read_curves(tmp_path)
    write_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("no JSON\n", encoding="utf-8")
    with pytest.raises(UserError, match="cannot read the metrics"):
        read_curves(tmp_path)
