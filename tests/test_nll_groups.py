"""NLL by kind of code, against loops over single codes; labels of codes against what they should be."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade_runs import RATE, Patch, make_run, write_corpus
from tiny import tiny_model

from ct_audio.common.errors import UserError
from ct_audio.data.codecs import Byte, MuLaw
from ct_audio.data.corpus import Corpus, open_corpus
from ct_audio.evaluation import groups
from ct_audio.evaluation.groups import Grouping, GroupSums, count_codes, make_groupings, surrounding_level_dbfs
from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.evaluation.stored import EvaluationSettings, evaluate_run
from ct_audio.runs.open_run import load_run_model, run_corpus


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_sums_equal_a_loop_over_codes(num_lanes: int) -> None:
    numbers = np.random.default_rng(0)
    codes, group_of = numbers.integers(0, 32, 150).astype(np.uint8), numbers.integers(-1, 3, 150).astype(np.int8)
    sums = GroupSums(Grouping("test", "", ("a", "b", "c", "none"), group_of, {"a or b": (0, 1)}))
    by_code = np.full(150, np.nan)

    def collect(positions: torch.Tensor, nll: torch.Tensor) -> None:
        sums(positions, nll)
        for first, row in zip(positions.tolist(), nll.tolist(), strict=True):
            by_code[first : first + len(row)] = row

    stretch = Stretch(codes, start_code=16, chunk_length=16, num_lanes=num_lanes)
    evaluate_nll(tiny_model("compressive_transformer"), stretch, on_nll=collect)
    rows = {row["group"]: row for row in sums.rows()}
    for label, members in {"a": [0], "b": [1], "c": [2], "a or b": [0, 1], "all": [0, 1, 2]}.items():
        chosen = [nll for nll, group in zip(by_code.tolist(), group_of.tolist(), strict=True) if group in members]
        assert rows[label]["num_units"] == len(chosen)
        assert rows[label]["nll_nats"] == pytest.approx(math.fsum(chosen) / len(chosen), abs=1e-9)
        assert rows[label]["perplexity"] == pytest.approx(math.exp(math.fsum(chosen) / len(chosen)))
        assert rows[label]["share"] == pytest.approx(len(chosen) / int((group_of >= 0).sum()))
    assert rows["none"] == {"group": "none", "num_units": 0, "share": 0.0} | dict.fromkeys(
        ("nll_nats", "nll_bits", "perplexity")
    )


def text_corpus(path: Path) -> Corpus:
    """In training `a` comes 10,001 times, `b` 10,000, `c` 1,000, `d` 999, `e` 100, `f` 99 times, `g` never."""
    counts = {"a": 10_001, "b": 10_000, "c": 1000, "d": 999, "e": 100, "f": 99}
    text = "".join(letter * count for letter, count in counts.items())
    return open_corpus(write_corpus(path, Byte(), [("train", text), ("valid", "abcdefgfedcba")]))


def grouping(name: str, corpus: Corpus, split: str, model: Any = None, num_codes: int | None = None) -> Grouping:
    chosen = corpus.split(split)
    model = model or tiny_model("compressive_transformer")
    return make_groupings([name], model, corpus, chosen, num_codes=num_codes or chosen.num_codes)[0]


def test_codes_by_how_often_they_occur_in_training(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(groups, "_COUNT_CODES", 1000)
    corpus = text_corpus(tmp_path / "corpus")
    found = grouping("count", corpus, "valid")
    assert found.labels == ("> 10K", "1K-10K", "100-1K", "< 100")
    assert found.group_of.tolist() == [0, 1, 1, 2, 2, 3, 3, 3, 2, 2, 1, 1, 0]
    assert grouping("count", corpus, "valid", num_codes=3).group_of.tolist() == [0, 1, 1]
    share = grouping("share", corpus, "valid")
    assert share.labels == (">= 0.01", "0.001-0.01", "0.0001-0.001", "< 0.0001")
    total = 10_001 + 10_000 + 1000 + 999 + 100 + 99
    shares = [n / total for n in (10_001, 10_000, 1000, 999, 100, 99, 0)]
    assert share.group_of[:7].tolist() == [(s < 0.01) + (s < 0.001) + (s < 0.0001) for s in shares]
    counts = count_codes(corpus.split("train").codes, 256)
    assert (counts[ord("a")], counts[ord("f")], counts.sum()) == (10_001, 99, total)


def test_codes_by_their_place_in_the_window(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path / "corpus")
    found = grouping("window", corpus, "train", tiny_model("transformer_xl", window_length=12), num_codes=30)
    assert found.labels == tuple(f"{2 * part}-{2 * part + 1}" for part in range(6))
    assert found.group_of.tolist() == [place % 12 // 2 for place in range(30)]
    assert found.unions == {"last half": (3, 4, 5)}
    eight = grouping("window", corpus, "train", tiny_model("transformer_xl"), num_codes=9)
    assert eight.group_of.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert eight.unions == {"last half": (4, 5, 6, 7), "last quarter": (6, 7), "last eighth": (7,)}


def test_what_does_not_apply_is_refused(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path / "corpus")
    for name in ("level", "voicing", "loudness"):
        with pytest.raises(UserError, match=f"--by {name}: expected out of count, share, window or all"):
            grouping(name, corpus, "valid")
    with pytest.raises(UserError, match="expected out of count, share or all"):
        grouping("window", corpus, "valid", tiny_model("wavenet"))
    split = corpus.split("valid")
    every = make_groupings(["all"], tiny_model("wavenet"), corpus, split, num_codes=13)
    assert [each.name for each in every] == ["count", "share"]


@pytest.mark.parametrize("frame_length", [1, 4, 5, 1000])
def test_level_equals_a_loop(frame_length: int) -> None:
    waveform = np.random.default_rng(0).normal(0, 0.1, 40)
    waveform[10:20] = 0
    expected = []
    for place in range(40):
        first = max(0, place - frame_length // 2)
        around = waveform[first : place + (frame_length + 1) // 2]
        expected.append(max(-200.0, 10 * math.log10(max(1e-20, float((around**2).mean())))))
    np.testing.assert_allclose(surrounding_level_dbfs(waveform, frame_length), expected, atol=1e-6)


def tones_corpus(path: Path) -> Corpus:
    """Documents of half a second: a loud voice-like tone of 150 Hz, quiet noise, silence."""
    time = np.arange(RATE // 2) / RATE
    tone = sum(0.1 * np.sin(2 * np.pi * 150 * k * time) for k in (1, 2, 3))
    noise = np.random.default_rng(0).normal(0, 0.004, len(time))
    waveforms = [np.asarray(waveform, dtype=np.float32) for waveform in (tone, noise, 0 * time)]
    documents = [(split, waveform) for split in ("train", "valid") for waveform in waveforms]
    return open_corpus(write_corpus(path, MuLaw(), documents))


def test_audio_by_level(tmp_path: Path) -> None:
    level, half = grouping("level", tones_corpus(tmp_path / "corpus"), "valid"), RATE // 2
    labels = [level.labels[group] for group in level.group_of]
    # Of a tone whose level is 20 log10(0.1 sqrt(3 / 2)) = -18 dBFS; the noise has -48. Documents are kept apart.
    assert set(labels[:half]) == {"above -20"}
    assert set(labels[half : 2 * half]) == {"-50 to -40"}
    assert set(labels[2 * half :]) == {"below -60"}


def test_voicing_is_that_of_the_nearest_frame(tmp_path: Path, monkeypatch: Patch) -> None:
    """Documents of 12,000 codes go through in pieces of 7,200; a frame of 480 codes is voiced by a known rule."""
    seen: list[int] = []

    def pitch(waveform: np.ndarray, sample_rate_hz: int) -> np.ndarray:
        frames = np.arange(1 + len(waveform) // (sample_rate_hz // 50)) + len(seen)
        seen.append(len(waveform))
        return np.where(frames % 3 == 0, 100.0, np.nan)

    monkeypatch.setattr(groups, "_PIECE_SECONDS", 0.3)
    monkeypatch.setattr(groups, "find_pitch", pitch)
    found = grouping("voicing", tones_corpus(tmp_path / "corpus"), "valid", num_codes=20_000)
    assert seen == [7200, 4800, 7200, 800]
    expected = []
    for piece, length in enumerate(seen):
        last = length // 480
        expected += [0 if (min(last, round(code / 480)) + piece) % 3 == 0 else 1 for code in range(length)]
    assert found.group_of.tolist() == expected


@pytest.mark.slow
def test_a_tone_is_voiced_and_silence_is_not(tmp_path: Path) -> None:
    found, half = grouping("voicing", tones_corpus(tmp_path / "corpus"), "valid"), RATE // 2
    voiced = found.group_of == 0
    assert voiced[:half].mean() > 0.9
    assert voiced[2 * half :].mean() < 0.1


def test_a_runs_groups_add_up_to_its_nll(tmp_path: Path) -> None:
    corpus = tones_corpus(tmp_path / "corpus")
    run = load_run_model(make_run(corpus.path, tmp_path / "runs"))
    split, settings = corpus.split("valid"), EvaluationSettings(max_codes=2000)
    every = make_groupings(["count", "level", "share"], run.model, corpus, split, num_codes=settings.num_codes(split))
    groups = [GroupSums(each) for each in every]
    report, _ = evaluate_run(run, run_corpus(run), settings, on_nll=groups, progress=None)
    assert report["num_units"] == 2000
    for each in groups:
        assert each.counts.sum() == 2000
        assert each.rows()[-1]["nll_nats"] == pytest.approx(report["nll_nats"], abs=1e-9)
