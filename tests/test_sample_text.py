"""Sampling of text: measures against oracles, and tools/sample.py on runs of bytes, words and subwords."""

import io
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade_runs import Output, Patch, Tool, refusal, text_run
from hypothesis import given
from hypothesis import strategies as st

from ct_audio.common.files import read_json
from ct_audio.data.codecs import Byte, Codec
from ct_audio.data.vocabulary_codecs import Subword, Word
from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.runs.open_run import load_run_model, run_codec
from ct_audio.sampling.text_checks import find_text_faults, longest_repeat, measure_text, undecodable_bytes

TEXT = b" = Title = \n \n The cat sat on the mat , the dog sat on the cat . \n" * 5
CODECS: dict[str, Codec] = {
    "byte": Byte(),
    "word": Word.from_counts(Counter(TEXT.replace(b"\n", b" <eos> ").split())),
    "subword": Subword.train([TEXT], 280),
}
OK = (0, 4)  # 4: a model that was never trained says what is no text


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: text_run(tmp_path_factory.mktemp(name), codec, TEXT) for name, codec in CODECS.items()}


@pytest.mark.parametrize(
    "name", ["word", *(pytest.param(name, marks=pytest.mark.slow) for name in ("byte", "subword"))]
)
def test_sample_writes_texts_and_sidecars(
    name: str, runs: dict[str, Path], tmp_path: Path, sample: Tool, capsys: Output
) -> None:
    run, codec, prime = runs[name], CODECS[name], tmp_path / "prime.txt"
    prime.write_bytes(TEXT[:100])
    common = ("--num", 2, "--seed", 3, "--prime", prime, "--prime-length", 11, "--threads", 1)
    assert sample(run, *common, "--length", 30, "--verify", "--out", tmp_path / "out") in OK
    unit = codec.unit
    printed = capsys.readouterr().out
    assert f"for 60 {unit}s (2 x 30); stepper: compiled" in printed
    assert f"\n60 {unit}s in " in printed
    assert "real time" not in printed
    model, start = load_run_model(run).model, codec.encode(TEXT[:100])[:11]
    for lane in range(2):
        text = (tmp_path / "out" / f"sample_{lane}.txt").read_bytes()
        sidecar = read_json(tmp_path / "out" / f"sample_{lane}.json")
        expected = {"seed": 3, "lane": lane, "num_lanes": 2, "unit": unit, "num_units": 30, "num_bytes": len(text)}
        assert expected.items() <= sidecar.items()
        assert (sidecar["prime"], sidecar["prime_units"], sidecar["prime_included"]) == ("prime.txt", 11, False)
        assert not {"seconds", "sample_rate_hz", "rms_dbfs", "peak", "prime_seconds"} & sidecar.keys()
        assert sidecar["nll_bits"] == pytest.approx(sidecar["nll_nats"] / math.log(2))
        assert sidecar["verify_max_abs_difference"] < 1e-4
        if name == "subword":
            continue  # other subwords may say the same
        codes = codec.encode(text)
        assert sidecar["distinct_codes"] == len(set(codes.tolist()))
        whole = evaluate_nll(model, Stretch(np.r_[start, codes], codec.start_code, 64)).nll_nats * 41
        begin = evaluate_nll(model, Stretch(start, codec.start_code, 64)).nll_nats * 11
        assert sidecar["nll_nats"] == pytest.approx((whole - begin) / 30, abs=1e-4)  # equality 8, through a file
    # the same again, in two goes, with the prime before it
    arguments = (*common, "--include-prime", "--resume", "--out", tmp_path / "again", "--length")
    assert sample(run, *arguments, 13) in OK
    assert sample(run, *arguments, 30, "--verify") in OK
    for lane in range(2):
        both = (tmp_path / "again" / f"sample_{lane}.txt").read_bytes()
        assert both == codec.decode(start) + (tmp_path / "out" / f"sample_{lane}.txt").read_bytes()
        assert read_json(tmp_path / "again" / f"sample_{lane}.json")["prime_included"]
    assert sample(run, *arguments, 12) == 2
    assert f"holds 30 {unit}s already, got 12 {unit}s to resume to" in capsys.readouterr().err


def test_text_goes_to_stdout_as_it_is_sampled(
    runs: dict[str, Path], tmp_path: Path, sample: Tool, monkeypatch: Patch
) -> None:
    class Pipe(io.BytesIO):
        mode = "wb"  # type: ignore[assignment]
        name = "stdout"

    for name in ("byte", "word"):
        monkeypatch.setattr("ct_audio.sampling.sample_set._BLOCK_SECONDS", 0.0)
        pipe = Pipe()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout := io.TextIOWrapper(pipe))
            arguments = ("--num", 1, "--length", 20, "--stdout", "--threads", 1, "--out", tmp_path / name)
            assert sample(runs[name], *arguments) in OK
        assert pipe.getvalue() == (tmp_path / name / "sample_0.txt").read_bytes()
        stdout.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seconds", 1), "--seconds: for audio, this is a model of bytes; see --length"),
        (("--seconds", 0), "--seconds: for audio"),
        (("--plots",), "--plots: for audio"),
        (("--temperatures", "1,2", "--corpus", "x"), "--temperatures, --corpus: for audio"),
        (("--prime", "a.txt", "--prime-seconds", 1), "--prime-seconds: for audio"),
        (("--length", 0), "--length: expected at least one byte, got 0"),
        (("--prime", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_options_of_audio_are_refused(
    arguments: tuple[Any, ...],
    message: str,
    runs: dict[str, Path],
    tmp_path: Path,
    sample: Tool,
    capsys: Output,
) -> None:
    assert message in refusal(capsys, sample, runs["byte"], *arguments, "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_the_vocabulary_comes_from_the_run_or_the_corpus(runs: dict[str, Path]) -> None:
    for name, run in runs.items():
        assert run_codec(load_run_model(run)) == CODECS[name]


def reference_repeat(text: bytes) -> tuple[int, int]:
    """Oracle: every period, every place, step by step."""
    found = (0, 0)
    for period in range(1, len(text) // 2 + 1):
        for begin in range(len(text)):
            end = begin + period
            while end < len(text) and text[end] == text[end - period]:
                end += 1
            if end - begin >= 2 * period and end - begin > found[0]:
                found = (end - begin, period)
    return found


@given(st.lists(st.sampled_from(b"aab\n"), max_size=30).map(bytes))
def test_the_longest_repeat_equals_the_oracle(text: bytes) -> None:
    assert longest_repeat(text) == reference_repeat(text)


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        (b"", 0),
        ("Ärger 猫 \U0001f408".encode(), 0),
        ("猫".encode()[:2], 0),  # cut off by the end
        ("猫".encode()[:2] + b"x", 2),
        ("猫".encode()[1:], 2),
        (b"\xff\xfeab\xc0", 3),
        (b"\xed\xa0\x80", 3),  # half of a pair
    ],
)
def test_bytes_that_are_no_characters_are_counted(text: bytes, bad: int) -> None:
    assert undecodable_bytes(text) == bad


def faults_of(text: bytes, nll: float = 1.0) -> set[str]:
    codes = Byte().encode(text)
    measures = measure_text(codes, np.full(len(codes), -nll, np.float32), text, vocab_size=256)
    return {fault.split(":")[0] for fault in find_text_faults(measures, vocab_size=256)}


def test_faults_of_texts_are_named() -> None:
    numbers = np.random.default_rng(0)
    prose = bytes(numbers.choice(list(b"etaoin shrdlu\n"), 2000).tolist())
    assert faults_of(prose) == set()
    assert faults_of(prose + b"-" * 300) == set()  # a line of a table
    assert faults_of(prose + b"-" * 500) == {"stuck"}
    assert faults_of(prose + b"and the cat " * 50) == {"stuck"}
    assert faults_of(b"no " * 5) == {"stuck"}
    assert faults_of(prose + prose) == set()  # said twice, but not again and again
    assert faults_of(prose + b"\xff" * 15) == set()
    assert faults_of(prose + bytes(numbers.integers(128, 256, 60).tolist())) == {"undecodable"}
    assert faults_of(prose, nll=5.4) == {"runaway"}
