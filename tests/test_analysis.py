"""Analyses of memory: against loops over the weights that the reference backend used, and the tool that writes them."""

import csv
import dataclasses
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade_runs import Output, Patch, make_run, noise_corpus, refusal, tool
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import TINY_MODELS, tiny_model

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json
from ct_audio.evaluation.figures import MEMORY_FIGURES, attention_by_layer_figure, attention_figure, context_figure
from ct_audio.evaluation.memory_analysis import (
    PARTS,
    Observations,
    analyse_run,
    attention_table,
    bucket_extents,
    compression_table,
    context_lengths,
    context_tables,
    mean_and_error,
    observe_memory,
    part_table,
)
from ct_audio.evaluation.memory_output import analysis_text, log_to_tensorboard
from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.models.compressive import attention as attention_module
from ct_audio.models.compressive.transformer import CompressiveTransformer
from ct_audio.models.compressive.windows import Geometry
from ct_audio.models.state import detach_memory
from ct_audio.runs.open_run import load_run_model, run_corpus

QUICK = ("compressive_transformer_bptt", "compressive_transformer_most_used", "transformer_xl")
REMEMBERING = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in TINY_MODELS
    if name.startswith(("compressive_transformer", "transformer_xl"))
]


def remembering_model(name: str, **changes: Any) -> CompressiveTransformer:
    torch.manual_seed(3)
    model = tiny_model(name, **changes)
    assert isinstance(model, CompressiveTransformer)
    for layer in model.stack.layers:  # what begins at zero would hide a term
        for parameter in (layer.content_bias, layer.position_bias):
            torch.nn.init.normal_(parameter)  # type: ignore[arg-type]
    return model.double()


def some_codes(num_codes: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 32, num_codes).astype(np.uint8)


def stretch_for(model: CompressiveTransformer, num_codes: int = 50, **settings: Any) -> Stretch:
    return Stretch(some_codes(num_codes), start_code=16, chunk_length=2 * model.window_length, **settings)


def first_full_window(model: CompressiveTransformer) -> int:
    """Rows that have left the memory of a stream fill the compressed memory."""
    config = model.config
    needed = max(
        config.memory_length + rate * config.compressed_memory_length
        for layer, rate in enumerate(config.compression_rates)
        if config.keeps_memory(layer)
    )
    return math.ceil(needed / config.window_length)


def slow_buckets(weights: list[list[list[float]]], lengths: list[int]) -> list[float]:
    """Attention in 18 buckets of one window: heads, queries and rows one after the other."""
    buckets = [0.0] * 18
    for queries in weights:
        for row in queries:
            first = 0
            for part, length in enumerate(lengths):
                for index in range(length):
                    bucket = next(b for b in range(6) if b * length <= index * 6 < (b + 1) * length)
                    buckets[6 * part + bucket] += row[first + index]
                first += length
    return [value / len(weights) / len(weights[0]) for value in buckets]


@pytest.mark.parametrize("name", REMEMBERING)
def test_buckets_are_sums_over_the_weights_that_the_reference_backend_used(name: str, monkeypatch: Patch) -> None:
    model = remembering_model(name, attention_backend="reference")
    config, length, stretch = model.config, model.window_length, stretch_for(model)
    seen: list[torch.Tensor] = []
    weights_of = attention_module.attention_weights

    def record(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(weights_of(*arguments, **options))
        return seen[-1]

    with monkeypatch.context() as patched:
        patched.setattr(attention_module, "attention_weights", record)  # what reference_attention calls in a forward
        evaluate_nll(model, stretch, progress=None)
    expected = []
    for layer in range(config.num_layers):
        lengths = [config.compressed_memory_length, config.memory_length, length]
        if not config.keeps_memory(layer):
            lengths[:2] = [0, 0]
        windows = [window.tolist() for call in seen[layer :: config.num_layers] for window in call]
        whole = len(stretch.codes) // length
        expected.append([slow_buckets(window, lengths) for window in windows[first_full_window(model) : whole]])
    found = observe_memory(model, stretch).attention
    assert found.shape == np.array(expected).shape
    assert found.shape[1] >= 2
    assert np.abs(found - np.array(expected)).max() < 1e-12
    assert np.abs(found.sum(axis=2) - 1).max() < 1e-12


@pytest.mark.parametrize("name", ["_pre_norm", "_most_used", "_long_window"])
def test_the_loss_is_the_one_that_training_uses(name: str) -> None:
    model = remembering_model("compressive_transformer" + name)
    stretch = stretch_for(model)
    inputs = torch.from_numpy(np.concatenate([[stretch.start_code], stretch.codes[:-1]]).astype(np.int64))[None]
    memory, expected = model.zero_memory(1), []
    for begin in range(0, len(stretch.codes) // model.window_length * model.window_length, model.window_length):
        output = model(inputs[:, begin : begin + model.window_length], memory)
        memory = detach_memory(output.memory)
        expected.append([loss.item() for loss in output.auxiliary_losses.values()])
    found = observe_memory(model, stretch)
    of_full_windows = np.array(expected)[first_full_window(model) :]
    assert np.abs(found.loss.T - of_full_windows).max() < 1e-12
    for row, loss, power in zip(compression_table(found, model), found.loss, found.power, strict=True):
        assert row["loss"] == pytest.approx(statistics.fmean(loss))
        assert row["relative_loss"] == pytest.approx(statistics.fmean(loss) / statistics.fmean(power))
        assert 0 < row["relative_loss"] < 5


def test_a_layer_that_keeps_nothing_has_no_loss() -> None:
    model = remembering_model("compressive_transformer_bptt")
    observations = observe_memory(model, stretch_for(model))
    assert [row["layer"] for row in compression_table(observations, model)] == [0, 1]
    model = remembering_model("transformer_xl")
    assert compression_table(observe_memory(model, stretch_for(model)), model) == []


def test_windows_after_a_document_start_do_not_count_until_memory_is_full_again() -> None:
    model = remembering_model("compressive_transformer")  # memory 8, compressed memory 4 at rate 2, windows of 8
    offsets = np.array([0, 28])
    stretch = stretch_for(model, 80, document_offsets=offsets, reset_memory_at_document=True)
    # Full from code 16 on: window 2. The document at 28 begins within window 3; rows 28 to 31 and windows 4 and 5 fill
    # the memories before window 6 (16 codes are needed, in whole groups).
    assert observe_memory(model, stretch).attention.shape[1] == 1 + (10 - 6)
    assert observe_memory(model, stretch_for(model, 80, document_offsets=offsets)).attention.shape[1] == 10 - 2


def test_too_short_a_stretch_is_refused() -> None:
    model = remembering_model("compressive_transformer")
    with pytest.raises(UserError, match="got 1 in 25 codes; memory is full after 16 codes"):
        observe_memory(model, stretch_for(model, 25))


def test_hooks_are_taken_away() -> None:
    model = remembering_model("compressive_transformer")
    observe_memory(model, stretch_for(model))
    assert not any(layer._forward_hooks for layer in model.stack.layers)


def test_extents_by_hand() -> None:
    """Rate 2: compressed rows 0 to 3 stand for codes -16 to -9, memory rows for -8 to -1."""
    extents = bucket_extents(Geometry(12, 8, 4, 2))
    assert extents[:6] == [(-16, -15), (-14, -13), (None, None), (-12, -11), (-10, -9), (None, None)]
    assert extents[6:12] == [(-8, -7), (-6, -6), (-5, -5), (-4, -3), (-2, -2), (-1, -1)]
    assert extents[12:] == [(first, first + 1) for first in range(0, 12, 2)]


@pytest.mark.parametrize("num_values", [2, 7, 100])
def test_mean_and_error_are_of_runs_of_neighbours(num_values: int) -> None:
    values = np.random.default_rng(1).normal(size=(num_values, 2))
    counts = np.random.default_rng(2).integers(1, 5, num_values)
    mean, error = mean_and_error(values, counts)
    num_groups = min(30, num_values)
    longer = num_values % num_groups
    sizes = [num_values // num_groups + (group < longer) for group in range(num_groups)]
    ends = list(itertools.accumulate(sizes))
    for column in range(2):
        means = [
            math.fsum(values[end - size : end, column]) / sum(counts[end - size : end])
            for size, end in zip(sizes, ends, strict=True)
        ]
        assert mean[column] == pytest.approx(math.fsum(values[:, column]) / sum(counts))
        assert error[column] == pytest.approx(statistics.stdev(means) / math.sqrt(num_groups))


def test_tables_of_attention() -> None:
    model = remembering_model("compressive_transformer")
    attention = np.random.default_rng(0).dirichlet(np.ones(18), size=(3, 5))
    observations = Observations(attention, np.ones((3, 5)), np.ones((3, 5)))
    table, parts = attention_table(observations, model), part_table(observations)
    assert len(table) == 4 * 18
    for layer in (None, 0, 1, 2):
        rows = [row for row in table if row["layer"] == layer]
        assert sum(row["attention"] for row in rows) == pytest.approx(1)
        for part in PARTS:
            (whole,) = [row["attention"] for row in parts if (row["layer"], row["part"]) == (layer, part)]
            assert whole == pytest.approx(sum(row["attention"] for row in rows if row["part"] == part))
    assert table[20]["attention"] == pytest.approx(attention[0, :, 2].mean())
    assert table[20]["standard_error"] == pytest.approx(attention[0, :, 2].std(ddof=1) / math.sqrt(5))
    assert table[2]["attention"] == pytest.approx(attention[:, :, 2].mean())
    report = {"attention": table, "attention_by_part": parts, "num_windows_with_full_memory": 5, "name": "x"}
    figure = attention_figure(report | {"step": 1, "split": "valid", "num_codes": 40})
    panels = attention_by_layer_figure(report | {"step": 1, "split": "valid", "num_codes": 40}).axes
    assert [len(panel.containers) for panel in panels] == [3, 3, 3]
    points = panels[2].containers[1].lines[0].get_ydata()  # type: ignore[attr-defined]
    assert list(points) == pytest.approx(list(attention[2, :, 6:12].mean(axis=0)))
    bars = [patch.get_height() for patch in figure.axes[0].patches]  # type: ignore[attr-defined]
    assert bars == pytest.approx([row["attention"] for row in table[:18]])


def test_context_is_what_evaluation_with_other_lengths_says() -> None:
    model = remembering_model("compressive_transformer")
    assert [tuple(lengths.values()) for lengths in context_lengths(model, (0.5, 2.0))] == [
        (0, 0), (4, 0), (8, 0), (16, 0), (8, 2), (8, 4), (8, 8)
    ]  # fmt: skip
    stretch = stretch_for(model, 59)
    by_code: dict[tuple[int, int], np.ndarray] = {}
    for lengths in context_lengths(model, (0.5,)):
        nll = by_code[lengths["memory_length"], lengths["compressed_memory_length"]] = np.zeros(59)

        def collect(positions: torch.Tensor, values: torch.Tensor, nll: np.ndarray = nll) -> None:
            nll[positions[0] : positions[0] + values.shape[1]] = values[0]

        changed = dataclasses.replace(stretch, chunk_length=8, **lengths)
        evaluate_nll(model, changed, on_nll=collect, progress=None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ct_audio.evaluation.stored.BLOCK_LENGTH", 10)
        tables = context_tables(model, stretch, (0.5,))
    assert [row["temporal_range_codes"] for row in tables["context"]] == [0, 12, 24, 36, 48]
    for row in tables["context"]:
        lengths = (row["memory_length"], row["compressed_memory_length"])
        assert row["nll_nats"] == pytest.approx(by_code[lengths].mean(), abs=1e-12)
        gains = by_code[0, 0] - by_code[lengths]
        assert row["gain_nats"] == pytest.approx(gains.mean(), abs=1e-12)
        blocks = [gains[begin : begin + 10].mean() for begin in range(0, 59, 10)]
        assert row["gain_standard_error"] == pytest.approx(statistics.stdev(blocks) / math.sqrt(6), abs=1e-12)
        over = (by_code[8, 0] - by_code[lengths]).mean() if lengths[1] else None
        assert row["gain_over_memory_nats"] == pytest.approx(over, abs=1e-12)
        means = [by_code[lengths][position::8].mean() for position in range(8)]
        found = [p for p in tables["position"] if (p["memory_length"], p["compressed_memory_length"]) == lengths]
        assert [(p["first_code"], p["last_code"]) for p in found] == [(p, p) for p in range(8)]
        assert [p["nll_nats"] for p in found] == pytest.approx(means, abs=1e-12)
    assert len({row["nll_nats"] for row in tables["context"]}) == 5


@pytest.mark.slow
def test_the_tool_writes_tables_pictures_and_tensorboard(tmp_path: Path, monkeypatch: Patch, capsys: Output) -> None:
    run = make_run(noise_corpus(tmp_path / "corpus"), tmp_path / "runs", "compressive_transformer")
    for name in ("attention_by_layer", "context"):  # slow to save; drawn in other tests
        monkeypatch.delitem(MEMORY_FIGURES, name)
    options = ["--num-codes", 100, "--shares", 0.5, "--threads", 1, "--tensorboard", "--json"]
    assert tool("analyse", monkeypatch)(run, *options) == 0
    report = read_json(run / "analysis" / "analysis.json")
    assert json.loads(capsys.readouterr().out) == report
    assert report["num_codes"] == 100
    assert report["num_windows_with_full_memory"] == 100 // 8 - 2
    names = ("attention", "attention_by_part", "compression_loss", "context", "position")
    for name in names:
        with (run / "analysis" / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [list(row) for row in rows] == [list(row) for row in report[name]]
        assert list(rows[-1].values()) == ["" if v is None else str(v) for v in report[name][-1].values()]
    pictures = sorted(path.name for path in (run / "analysis").glob("*.png"))
    assert pictures == ["attention.png", "compression_loss.png"]
    assert all((run / "analysis" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    log_to_tensorboard(report, {}, run / "analysis")  # in its place
    events = EventAccumulator(str(run / "analysis")).Reload()
    [loss] = events.Scalars("compression_loss/layer_01")
    assert (loss.step, loss.value) == (7, pytest.approx(report["compression_loss"][1]["loss"], rel=1e-5))
    assert len(events.Scalars("attention_memory/all")) == 1


def test_transformer_xl_has_no_tables_of_compression(tmp_path: Path) -> None:
    run = load_run_model(make_run(noise_corpus(tmp_path / "corpus"), tmp_path / "runs", "transformer_xl"))
    report = analyse_run(run, run_corpus(run), num_codes=60, shares=())
    assert report["compression_loss"] == []
    assert [row["memory_length"] for row in report["context"]] == [0, 16]
    assert {row["compressed_memory_length"] for row in report["context"]} == {0}
    assert sum(row["attention"] for row in report["attention"][:6]) == 0
    gains = np.asarray(context_figure(report).axes[0].lines[0].get_ydata())
    assert list(gains) == [row["gain_nats"] for row in report["context"]]
    lines = analysis_text(report).splitlines()
    assert lines[-1].startswith("memory 16, compressed memory 0 (range 48 codes): ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is a wavenet; expected a compressive_transformer"),
        (["--shares", "-1"], "--shares: expected numbers of at least 0"),
        (["--num-codes", "-1"], "--num-codes: expected at least 0"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: Patch, capsys: Any
) -> None:
    run = make_run(noise_corpus(tmp_path / "corpus"), tmp_path / "runs")
    assert message in refusal(capsys, tool("analyse", monkeypatch), run, "--threads", 1, *arguments)
