"""tools/listen.py: samples of several models, judged beside recordings; what is counted, resumed and refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade_runs import Output, Patch, Tool, make_run, page_data, refusal, text_run, tool, untrained_run, write_corpus
from test_sample_report import CODEC, RATE, speech_like

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json
from ct_audio.data.audio_files import read_wav
from ct_audio.data.codecs import Byte
from ct_audio.data.corpus import open_corpus
from ct_audio.runs.open_run import load_run_model
from ct_audio.sampling.listening import FREE, PRIMED, Plan, choose_primes, judge, planned_sets
from ct_audio.sampling.sample_set import SampleSet
from ct_audio.sampling.temperature_report import make_reference

WORDS = ("--seconds", 0.07, "--prime-seconds", 0.05, "--threads", 1)


@pytest.fixture
def listen(monkeypatch: Patch) -> Tool:
    return tool("listen", monkeypatch)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Seven recordings for validation, of which every second one is shorter than a prime."""
    valid = [("valid", speech_like(0.1 if number % 2 else 0.5, number)) for number in range(7)]
    return write_corpus(tmp_path / "corpus", CODEC, [("train", speech_like(0.2, 99)), *valid])


def test_primes_are_beginnings_of_recordings_from_all_over_the_split(corpus: Path) -> None:
    split = open_corpus(corpus).split("valid")
    codes, names, starts = choose_primes(split, 2, 1000)
    assert codes.shape == (2, 1000)
    assert starts == [split.document_offsets[0], split.document_offsets[4]]
    assert names == (split.document_names[0], split.document_names[4])
    assert [row.tolist() for row in codes] == [split.codes[start : start + 1000].tolist() for start in starts]
    assert [split.document_names.index(name) for name in choose_primes(split, 6, 1000)[1]] == [0, 0, 2, 4, 4, 6]
    with pytest.raises(UserError, match=r"no recording of the valid split has the 5000 codes .* the longest has 4000"):
        choose_primes(split, 1, 5000)


def test_a_lane_continues_its_recording_at_every_temperature(corpus: Path) -> None:
    split = open_corpus(corpus).split("valid")
    plan = Plan(600, (1.0, 0.5), num_free=3, num_primed=2, num_counted=5, prime_length=400)
    planned = planned_sets(plan, split)
    assert [(each.folder, each.kind, each.request.num_lanes, each.is_count) for each in planned] == [
        ("free_1", FREE, 3, False),
        ("free_0.5", FREE, 3, False),
        ("primed_1", PRIMED, 2, False),
        ("primed_0.5", PRIMED, 2, False),
        ("free_1_count", FREE, 5, True),
        ("primed_1_count", PRIMED, 5, True),
    ]
    first, second = planned[2].request, planned[3].request
    assert first.prime_name == second.prime_name == choose_primes(split, 2, 400)[1]
    np.testing.assert_array_equal(first.prime_of(1), second.prime_of(1))
    only = planned_sets(Plan(600, num_free=0, num_primed=1, num_counted=4, prime_length=400), split)
    assert [each.folder for each in only] == ["primed_1", "primed_1_count"]


def test_faults_are_counted_once_a_lane(corpus: Path, tmp_path: Path) -> None:
    """Lanes put in by hand: sound, silence, a hanging code, full scale."""
    opened = open_corpus(corpus)
    run = load_run_model(make_run(corpus, tmp_path))
    plan = Plan(4000, num_free=4, num_primed=0)
    (planned,) = planned_sets(plan, opened.split("valid"))
    one = SampleSet(run, CODEC, planned.request, None)
    speech = CODEC.encode(speech_like(0.5, 3))
    hanging = np.where(np.arange(4000) < 2000, speech, 140)
    loud = np.where(np.arange(4000) % 2, 255, 0)
    one._codes = [torch.from_numpy(np.stack([speech, np.full(4000, 128), hanging, loud]).astype(np.int64))]
    one._log_probabilities = [torch.full((4, 4000), -2.0)]
    one._log_probabilities[0][0, 5] = -11.0
    one._sampler.num_codes = 4000
    split = opened.split("valid")
    reference = make_reference(split.codes, CODEC, num_stretches=2, length=2000)
    row = judge("x", planned, one, reference)
    assert (row["num"], row["num_faulty"]) == (4, 3)
    assert row["faults"] == {"silent": 1, "clipped": 1, "stuck": 3, "runaway": 1}
    assert sorted(row["warnings"]) == [1, 2, 3]
    assert row["rare_codes_per_second"] == pytest.approx(1 / 2)
    assert row["nll_nats"] == pytest.approx(2.0 + 9.0 / 16_000)


def test_two_models_are_sampled_judged_drawn_and_not_sampled_again(
    corpus: Path, tmp_path: Path, listen: Tool, capsys: Output
) -> None:
    runs = [make_run(corpus, tmp_path / "runs"), make_run(corpus, tmp_path / "runs", "transformer_xl")]
    out = tmp_path / "out"
    words = (*runs, *WORDS, "--num", 3, "--num-primed", 2, "--count", 2, "--temperatures", "1,0.5", "--out", out)
    assert listen(*words) == 0
    table = (out / "report.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.endswith(f"{table}open {out / 'index.html'} in a browser to listen\n")
    clips = page_data(out / "index.html")["clips"]
    assert {clip["source"] for clip in clips} == {"recording", *(run.name for run in runs)}
    assert len([clip for clip in clips if clip["is_recording"] and clip["prime_length"] == 400]) == 2
    report = read_json(out / "report.json")
    kinds = ("free_1", "free_0.5", "primed_1", "primed_0.5", "free_1_count", "primed_1_count")
    names = [run.name for run in runs]
    expected = ["recordings", "white noise", *(f"{name}, {kind}" for name in names for kind in kinds)]
    assert [row["row"] for row in report["rows"]] == [*expected, *(f"{name}, recordings" for name in names)]
    assert all(f"| {row} | " in table for row in expected)
    assert report["best_temperatures"].keys() == set(names)
    pictures = [out, *(out / name for name in names)]
    assert all((place / "spectrograms.png").read_bytes().startswith(b"\x89PNG") for place in pictures)
    assert (out / "temperatures.png").is_file()

    split = open_corpus(corpus).split("valid")
    primes, recordings, _ = choose_primes(split, 2, 400)
    row = next(row for row in report["rows"] if row["row"] == f"{names[0]}, primed_1")
    nlls = []
    for lane in range(2):
        sidecar = read_json(out / names[0] / "primed_1" / f"sample_{lane}.json")
        assert sidecar["prime"] == recordings[lane]
        nlls.append(sidecar["nll_nats"])
        waveform, rate = read_wav(out / names[0] / "primed_1" / f"sample_{lane}.wav")
        assert (len(waveform), rate) == (960, RATE)
        assert CODEC.encode(waveform[:400]).tolist() == primes[lane].tolist()
    assert row["nll_nats"] == pytest.approx(np.mean(nlls))
    assert not list((out / names[0] / "free_1_count").glob("*.wav"))

    states = {path: path.read_bytes() for path in out.rglob("sampling-*")}
    assert listen(*words) == 0
    assert {path: path.read_bytes() for path in out.rglob("sampling-*")} == states
    assert (out / "report.md").read_text(encoding="utf-8") == table


def test_the_prime_of_a_lane_decides_it(corpus: Path, tmp_path: Path) -> None:
    """A set with a prime for each lane is the sets with one prime, lane by lane."""
    run = load_run_model(untrained_run(corpus, tmp_path, "transformer_xl", lambda _: None))
    (planned,) = planned_sets(Plan(12, num_free=0, num_primed=2, prime_length=100), open_corpus(corpus).split("valid"))

    def sampled(request: Any) -> torch.Tensor:
        one = SampleSet(run, CODEC, request, None)
        one.sample(signals=[])
        return one.log_probabilities

    both = sampled(planned.request)
    for lane in range(2):
        alone = {**vars(planned.request), "prime": planned.request.prime_of(lane), "prime_name": "one"}
        torch.testing.assert_close(sampled(type(planned.request)(**alone))[lane], both[lane], atol=1e-4, rtol=0)


def test_what_cannot_be_judged_is_refused_before_sampling(
    corpus: Path, tmp_path: Path, listen: Tool, capsys: Output
) -> None:
    run, other = make_run(corpus, tmp_path / "a"), make_run(corpus, tmp_path / "b")
    out = ("--out", tmp_path / "out")
    assert "folders of different names" in refusal(capsys, listen, run, other, *out)
    assert "expected at least 0.064, got 0.05" in refusal(capsys, listen, run, "--seconds", 0.05, *out)
    assert "--seconds: expected seconds of at least one sample" in refusal(capsys, listen, run, "--seconds", 0, *out)
    assert "no recording of the valid split" in refusal(capsys, listen, run, "--seconds", 0.07, *out)
    error = refusal(capsys, listen, run, *WORDS, "--split", "test", *out)
    assert "has no split 'test'" in error
    short = write_corpus(tmp_path / "short", CODEC, [("train", speech_like(0.2, 1)), ("valid", speech_like(0.1, 2))])
    run = make_run(short, tmp_path / "c")
    assert "is too short to compare with: 0.100 s" in refusal(capsys, listen, run, *WORDS, *out)
    assert not (tmp_path / "out").exists()


def test_a_text_model_is_refused(tmp_path: Path, listen: Tool, capsys: Output) -> None:
    run = text_run(tmp_path, Byte(), b"some text " * 40)
    assert "expected models of audio" in refusal(capsys, listen, run, "--out", tmp_path / "out")
