"""Streaming evaluation: every code once, lanes and chunks of any size, against code-by-code oracles."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from tiny import TINY_MODELS, tiny_model
from tiny_runs import write_corpus
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.data.corpus import open_corpus
from ct_audio.evaluation.nll import Stretch, concatenate_lanes, cut_lanes, evaluate_nll, stretch_of
from ct_audio.models.compressive.memory import Memory
from ct_audio.models.state import detach_memory, named_tensors
from ct_audio.runs.config import DataConfig

VOCAB_SIZE = 32
START_CODE = 16


def random_codes(num_codes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, num_codes).astype(np.uint8)


def float64_model(name: str, **changes: Any) -> Any:
    model = tiny_model(name, **changes).double()
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros and ones, so that every path matters
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def one_pass_nll(model: Any, codes: np.ndarray, offsets: np.ndarray | None = None) -> Float[Tensor, " N"]:
    """Oracle: one lane, one window (or the whole stream of a model without windows) after the other, no cleverness."""
    targets = torch.from_numpy(codes.astype(np.int64))[None]
    inputs = torch.cat([torch.tensor([[START_CODE]]), targets[:, :-1]], dim=1)
    starts = None
    if offsets is not None:
        starts = torch.zeros_like(inputs, dtype=torch.bool)
        starts[0, offsets] = True
        inputs[0, offsets] = START_CODE
    step = model.window_length if model.window_length > 1 else len(codes)
    memory, parts = model.zero_memory(1), []
    with torch.no_grad():
        for begin in range(0, len(codes), step):
            piece = slice(begin, begin + step)
            piece_starts = None if starts is None else starts[:, piece]
            features, memory, _ = model(inputs[:, piece], memory, document_starts=piece_starts)
            memory = detach_memory(memory)
            parts.append(model.nll(features, targets[:, piece])[0])
    return torch.cat(parts)


class Collector:
    """Gathers what `on_nll` reports by position."""

    def __init__(self) -> None:
        self.by_position: dict[int, float] = {}
        self.counts: Counter[int] = Counter()

    def __call__(self, positions: Int[Tensor, " B"], nll: Float[Tensor, "B T"]) -> None:
        for first, row in zip(positions.tolist(), nll.tolist(), strict=True):
            for offset, value in enumerate(row):
                self.by_position[first + offset] = value
                self.counts[first + offset] += 1

    def in_order(self) -> Float[Tensor, " N"]:
        return torch.tensor([self.by_position[i] for i in sorted(self.by_position)], dtype=torch.float64)


@pytest.mark.parametrize("num_codes", [1, 7, 16, 95, 96, 97, 200])
@pytest.mark.parametrize("num_lanes", [1, 2, 5, 12, 50])
@pytest.mark.parametrize("warmup_length", [0, 3, 24, 1000])
def test_lanes_cover_the_stretch_once(num_codes: int, num_lanes: int, warmup_length: int) -> None:
    lanes = cut_lanes(num_codes, chunk_length=8, num_lanes=num_lanes, warmup_length=warmup_length)
    assert len(lanes) <= num_lanes
    assert [i for lane in lanes for i in range(lane.start, lane.stop)] == list(range(num_codes))
    assert all(lane.start % 8 == 0 and lane.warmup == min(warmup_length, lane.start) for lane in lanes)
    whole_chunks = [(lane.stop - lane.start) // 8 for lane in lanes]
    assert max(whole_chunks) - min(whole_chunks) <= 1


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("num_windows", [1, 3])
def test_one_lane_equals_window_by_window(name: str, num_windows: int) -> None:
    model = float64_model(name)
    codes = random_codes(16 * 3 + 5)
    chunk_length = 16 * num_windows if model.window_length > 1 else 11 * num_windows
    seen = Collector()
    result = evaluate_nll(model, Stretch(codes, START_CODE, chunk_length), on_nll=seen)
    expected = one_pass_nll(model.eval(), codes)
    assert set(seen.counts.values()) == {1}
    torch.testing.assert_close(seen.in_order(), expected, rtol=0, atol=1e-12)
    assert result.nll_nats == pytest.approx(expected.mean().item(), abs=1e-12)
    assert result.nll_bits == pytest.approx(result.nll_nats / math.log(2), abs=1e-12)
    assert result.num_units == len(codes) == result.protocol["num_units"]


@pytest.mark.parametrize("name", ["compressive_transformer", "wavenet"])
@pytest.mark.parametrize("num_codes", [16 * 5, 16 * 7 + 3, 9])
def test_lanes_with_full_warmup_equal_one_lane(name: str, num_codes: int) -> None:
    model = float64_model(name)
    codes = random_codes(num_codes)
    seen = Collector()
    stretch = Stretch(codes, START_CODE, chunk_length=16, num_lanes=5, warmup_length=16 * 20)
    many = evaluate_nll(model, stretch, on_nll=seen)
    expected = one_pass_nll(model.eval(), codes)
    assert set(seen.counts.values()) == {1}
    torch.testing.assert_close(seen.in_order(), expected, rtol=0, atol=1e-12)
    assert many.protocol["num_lanes"] == (5 if num_codes >= 80 else 1)


def test_warmup_of_the_temporal_range_is_enough_and_none_is_not() -> None:
    model = float64_model("transformer_xl")
    codes = random_codes(8 * 24)
    reach = math.ceil((model.temporal_range + model.window_length) / 8) * 8
    assert reach < len(codes) // 3 * 2
    stretch = Stretch(codes, START_CODE, chunk_length=8, num_lanes=3)
    expected = one_pass_nll(model.eval(), codes).mean().item()
    warm = evaluate_nll(model, dataclasses.replace(stretch, warmup_length=reach))
    cold = evaluate_nll(model, stretch)
    assert warm.nll_nats == pytest.approx(expected, abs=1e-12)
    assert abs(cold.nll_nats - expected) > 1e-6


@pytest.mark.parametrize("name", ["compressive_transformer", "wavenet"])
@pytest.mark.parametrize("num_lanes", [1, 3])
def test_reset_at_documents_equals_documents_one_by_one(name: str, num_lanes: int) -> None:
    model = float64_model(name)
    codes = random_codes(16 * 4 + 7)
    offsets = np.array([0, 5, 33, 34, 60, len(codes) + 40])
    seen = Collector()
    documents: dict[str, Any] = {"document_offsets": offsets, "reset_memory_at_document": True}
    stretch = Stretch(codes, START_CODE, chunk_length=16, num_lanes=num_lanes, warmup_length=32, **documents)
    evaluate_nll(model, stretch, on_nll=seen)
    torch.testing.assert_close(seen.in_order(), one_pass_nll(model.eval(), codes, offsets[:-1]), rtol=0, atol=1e-12)
    # a document's NLL is that of a stream of its own only as far as windows allow: its first codes say so
    for begin, end in zip(offsets, [*offsets[1:-1], len(codes)], strict=False):
        first = one_pass_nll(model, codes[begin:end])[0].item()
        assert seen.by_position[int(begin)] == pytest.approx(first, abs=1e-12)


def test_continuous_stream_ignores_documents() -> None:
    model = float64_model("wavenet")
    codes = random_codes(100)
    stretch = Stretch(codes, START_CODE, chunk_length=16)
    with_offsets = evaluate_nll(model, dataclasses.replace(stretch, document_offsets=np.array([0, 50])))
    assert with_offsets.nll_nats == evaluate_nll(model, stretch).nll_nats
    assert with_offsets.protocol["reset_memory_at_document"] is False


@pytest.mark.parametrize("name", ["compressive_transformer", "transformer_xl"])
def test_memory_lengths_are_settable(name: str) -> None:
    model = float64_model(name)
    codes = random_codes(8 * 8)
    stretch = Stretch(codes, START_CODE, chunk_length=16)
    default = evaluate_nll(model, stretch)
    explicit = evaluate_nll(model, dataclasses.replace(stretch, memory_length=model.config.memory_length))
    shorter = evaluate_nll(model, dataclasses.replace(stretch, memory_length=4, compressed_memory_length=0))
    assert default.nll_nats == explicit.nll_nats
    assert default.protocol == explicit.protocol
    assert abs(shorter.nll_nats - default.nll_nats) > 1e-9
    assert (shorter.protocol["memory_length"], shorter.protocol["compressed_memory_length"]) == (4, 0)


def test_mode_and_protocol() -> None:
    model = float64_model("compressive_transformer", dropout=0.5)
    codes = random_codes(120)
    model.train()
    stretch = Stretch(codes[:70], START_CODE, chunk_length=16, num_lanes=2, warmup_length=8)
    first = evaluate_nll(model, stretch)
    assert model.training
    assert first.nll_nats == evaluate_nll(model, stretch).nll_nats  # deterministic, dropout off
    model.eval()
    evaluate_nll(model, stretch)
    assert not model.training
    assert json.loads(json.dumps(first.protocol)) == {
        "split": None,
        "num_units": 70,
        "seconds": None,
        "num_lanes": 2,
        "warmup_length": 8,
        "memory_length": 8,
        "compressed_memory_length": 4,
        "chunk_length": 16,
        "reset_memory_at_document": False,
        "dtype": "float64",
        "precision": "float64",
    }
    assert all(parameter.grad is None for parameter in model.parameters())


def test_equal_odds_are_log_of_the_vocabulary() -> None:
    model = tiny_model("wavenet")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    result = evaluate_nll(model, Stretch(random_codes(20_000), START_CODE, 5_000))
    assert result.nll_nats == pytest.approx(math.log(VOCAB_SIZE), abs=1e-6)
    assert result.nll_bits == pytest.approx(5.0, abs=1e-6)
    assert result.protocol["dtype"] == "float32"
    assert result.units_per_second > 0


def test_lanes_of_memories_join_in_order() -> None:
    counts = torch.zeros(1).long(), torch.ones(2).long()
    first = Memory((torch.zeros(1, 2, 3),), (torch.zeros(1, 0, 3),), (counts[0],), (counts[0],), (16,))
    second = Memory((torch.ones(2, 2, 3),), (torch.ones(2, 0, 3),), (counts[1],), (counts[1],), (0,))
    joined = concatenate_lanes(first, second)
    assert isinstance(joined, Memory)
    assert joined.final is False
    assert joined.codes_until_full == (16,)  # that of the lane which is behind
    assert {name: len(tensor) for name, tensor in named_tensors(joined)} == {
        "memory/0": 3,
        "compressed_memory/0": 3,
        "memory_valid/0": 3,
        "compressed_memory_valid/0": 3,
    }
    assert joined.memory_valid[0].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_length": 12}, "chunk_length: expected whole windows of 8"),
        ({"chunk_length": 0}, "chunk_length"),
        ({"num_lanes": 0}, "num_lanes"),
        ({"warmup_length": 3}, "warmup_length: expected whole windows of 8"),
        ({"warmup_length": -8}, "warmup_length"),
        ({"codes": np.zeros(0, dtype=np.uint8)}, "expected at least one"),
        ({"start_code": 32}, "start_code"),
        ({"reset_memory_at_document": True}, "expected document_offsets"),
        ({"memory_length": -1}, "memory length"),
    ],
)
def test_arguments_are_checked(changes: dict[str, Any], message: str) -> None:
    model = tiny_model("compressive_transformer")
    stretch = dataclasses.replace(Stretch(random_codes(64), START_CODE, 16), **changes)
    with pytest.raises(UserError, match=message):
        evaluate_nll(model, stretch)


def test_codes_outside_the_vocabulary_are_named() -> None:
    codes = random_codes(64)
    codes[50] = 99
    with pytest.raises(UserError, match=r"expected all in \[0, 32\).*99"):
        evaluate_nll(tiny_model("wavenet"), Stretch(codes, START_CODE, 16))


def test_a_model_without_memory_lengths_refuses_them() -> None:
    with pytest.raises(UserError):
        evaluate_nll(tiny_model("wavenet"), Stretch(random_codes(64), START_CODE, 16, memory_length=8))


@pytest.mark.parametrize("num_codes", [None, 50, 0])
def test_a_stretch_of_a_split_is_run_as_in_training(tmp_path: Path, num_codes: int | None) -> None:
    corpus = open_corpus(write_corpus(tmp_path / "corpus"))
    data = DataConfig(str(corpus.path), chunk_length=48, reset_memory_at_document=True)
    stretch = stretch_of(corpus, "valid", data, num_codes=num_codes, num_lanes=2)
    split = corpus.split("valid")
    assert stretch.codes.tolist() == split.codes[:num_codes].tolist()
    assert stretch.document_offsets is split.document_offsets
    found = (stretch.start_code, stretch.chunk_length, stretch.reset_memory_at_document, stretch.num_lanes)
    assert found == (128, 48, True, 2)
    assert stretch_of(corpus, "valid", data, chunk_length=16).chunk_length == 16
