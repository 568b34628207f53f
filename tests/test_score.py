"""Scores of single files: every code once, bins that add up, and what the tool writes."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade_runs import RATE, Output, Patch, Tool, make_run, noise_corpus, refusal, speech_like, text_run, tool
from recordings import write

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json
from ct_audio.data.codecs import Byte, MuLaw, read_codes
from ct_audio.evaluation.over_time import bins_over_time, most_surprising, score_codes
from ct_audio.runs.open_run import load_run_model, run_codec


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(noise_corpus(tmp_path / "corpus"), tmp_path / "runs", "compressive_transformer")


def test_every_code_is_scored_given_all_before_it(run_dir: Path) -> None:
    run, codes = load_run_model(run_dir), MuLaw().encode(speech_like(150, 3))
    score = score_codes(run, run_codec(run), codes)
    inputs = torch.from_numpy(np.concatenate([[128], codes[:-1]]).astype(np.int64))[None]
    memory, expected, targets = run.model.zero_memory(1), [], torch.from_numpy(codes.astype(np.int64))[None]
    with torch.no_grad():
        for begin in range(0, 150, 8):
            features, memory, _ = run.model(inputs[:, begin : begin + 8], memory)
            expected += run.model.nll(features, targets[:, begin : begin + 8])[0].tolist()
    np.testing.assert_allclose(score.nll_nats, expected, atol=1e-5)
    assert score.evaluation.nll_nats == pytest.approx(score.nll_nats.mean())


@pytest.mark.parametrize("bin_length", [1, 40, 50, 1000])
def test_bins_are_means_of_their_codes(run_dir: Path, bin_length: int) -> None:
    run, codec = load_run_model(run_dir), MuLaw()
    codes = codec.encode(speech_like(150, 3))
    score = score_codes(run, codec, codes)
    rows = bins_over_time(score, codec, bin_length)
    assert [row["start"] for row in rows] == list(range(0, 150, bin_length))
    assert sum(row["num_units"] for row in rows) == 150
    for row in rows:
        part = slice(row["start"], row["start"] + row["num_units"])
        assert row["nll_nats"] == pytest.approx(math.fsum(score.nll_nats[part]) / row["num_units"])
        assert row["nll_bits"] == pytest.approx(row["nll_nats"] / math.log(2))
        assert row["start_seconds"] == pytest.approx(row["start"] / RATE)
        rms = math.sqrt((codec.decode(codes[part]).astype(np.float64) ** 2).mean())
        assert row["level_dbfs"] == pytest.approx(20 * math.log10(rms))
    surprising = most_surprising(rows, 2)
    assert [row["nll_nats"] for row in surprising] == sorted((row["nll_nats"] for row in rows), reverse=True)[:2]
    with pytest.raises(UserError, match="at least 1 sample each"):
        bins_over_time(score, codec, 0)


def test_text_of_even_odds_has_eight_bits_a_byte(tmp_path: Path) -> None:
    run_dir = text_run(tmp_path, Byte(), "the quick brown fox\n", is_even=True)
    run = load_run_model(run_dir)
    codec = run_codec(run)
    file = tmp_path / "some.txt"
    file.write_bytes("häuser\n".encode() * 10)
    rows = bins_over_time(score_codes(run, codec, read_codes(file, codec)), codec, 8)
    assert len(rows) == 10
    assert [row["nll_bits"] for row in rows] == pytest.approx([8.0] * 10, abs=1e-5)
    assert {row["text"] for row in rows} == {"häuser\n"}


def test_the_tool_writes_a_table_and_a_picture_for_each_file(
    run_dir: Path, tmp_path: Path, monkeypatch: Patch, capsys: Output
) -> None:
    score: Tool = tool("score", monkeypatch)
    for folder, seed in (("a", 1), ("b", 2)):
        write(tmp_path / folder / "x$1$.wav", speech_like(2000, seed), rate=48_000)
    files = [tmp_path / "a" / "x$1$.wav", tmp_path / "b" / "x$1$.wav"]
    assert score(run_dir, *files, "--bin-seconds", 0.01) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("x$1$.wav: ")
    assert "bits per sample, 1,000 samples (0.0 s)" in lines[0]
    out = run_dir / "scores"
    assert {file.name for file in out.iterdir()} == {
        f"x$1${k}.{end}" for k in ("", "_2") for end in ("csv", "png", "json")
    }
    report = read_json(out / "x$1$_2.json")
    with (out / "x$1$_2.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["num_units"]) for row in rows] == [240, 240, 240, 240, 40]
    mean = sum(float(row["nll_bits"]) * int(row["num_units"]) for row in rows) / 1000
    assert report["nll_bits"] == pytest.approx(mean)
    assert report["total_bytes"] == pytest.approx(mean * 1000 / 8)


@pytest.mark.slow
def test_the_tool_scores_texts_and_says_what_is_wrong(tmp_path: Path, monkeypatch: Patch, capsys: Output) -> None:
    score, run_dir = tool("score", monkeypatch), text_run(tmp_path, Byte(), "the quick brown fox\n", is_even=True)
    file, empty = tmp_path / "some.txt", tmp_path / "empty.txt"
    file.write_text("a" * 250)
    empty.write_text("")
    assert score(run_dir, file, "--out", tmp_path / "out") == 0
    assert "8.0000 bits per byte, 250 bytes" in capsys.readouterr().out
    assert len((tmp_path / "out" / "some.csv").read_text().splitlines()) == 1 + 3
    for arguments, message in (
        ([empty], "is empty"),
        ([tmp_path / "missing.txt"], "cannot read"),
        ([file, "--bin-seconds", 1], "have no seconds"),
        ([file, "--bin-units", 0], "at least 1 byte each"),
    ):
        assert message in refusal(capsys, score, run_dir, *arguments)
