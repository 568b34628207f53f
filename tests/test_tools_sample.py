"""tools/sample.py on a run that is made by hand: files, numbers, exit statuses, errors."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade_runs import RATE, Output, Patch, Tool, make_run, refusal, speech_like, without_speed
from tiny_runs import tiny_run

from ct_audio.common.files import read_json
from ct_audio.data.audio_files import read_wav, write_wav
from ct_audio.data.codecs import MuLaw
from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.models.wavenet import WaveNet
from ct_audio.runs.open_run import load_run_model
from ct_audio.training.loop import train


def test_sample_writes_wavs_and_sidecars(corpus: Path, tmp_path: Path, sample: Tool, capsys: Output) -> None:
    run, out = make_run(corpus, tmp_path), tmp_path / "deep" / "out"
    arguments = ["--seconds", 0.01, "--num", 2, "--seed", 3, "--temperature", 0.9, "--top-p", 0.95, "--verify"]
    assert sample(run, *arguments, "--plots", "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("about ")
    assert "x real time" in printed
    assert "largest difference of log-probabilities" in printed
    samples = [f"sample_{lane}.{suffix}" for lane in range(2) for suffix in ("json", "png", "wav")]
    state = [read_json(out / "sampling.json")["file"], "sampling.json"]  # what --resume goes on from
    assert sorted(path.name for path in out.iterdir()) == samples + state
    for lane in range(2):
        waveform, rate = read_wav(out / f"sample_{lane}.wav")
        assert (len(waveform), rate) == (240, RATE)
        codes = MuLaw().encode(waveform)
        sidecar = read_json(out / f"sample_{lane}.json")
        assert list(sidecar) == sorted(sidecar)
        expected = {"seed": 3, "lane": lane, "num_lanes": 2, "step": 7, "model": "wavenet", "temperature": 0.9}
        assert expected.items() <= sidecar.items()
        assert sidecar["top_k"] is None
        assert sidecar["stepper"] == "compiled"
        assert sidecar["codes_per_second"] > 0
        assert sidecar["warnings"] == []
        assert sidecar["seconds"] == 0.01
        assert sidecar["distinct_codes_share"] == len(np.unique(codes)) / 256
        assert sidecar["rms_dbfs"] == pytest.approx(20 * np.log10(np.sqrt(np.mean(waveform**2))), abs=0.1)
        assert 0 <= sidecar["verify_max_abs_difference"] < 1e-4
        assert (out / f"sample_{lane}.png").read_bytes().startswith(b"\x89PNG")
        assert nll_of(run, codes) == pytest.approx(sidecar["nll_nats"], abs=1e-4)  # equality 8, through a wav
    assert not np.array_equal(read_wav(out / "sample_0.wav")[0], read_wav(out / "sample_1.wav")[0])
    assert sample(run, *arguments, "--out", tmp_path / "again") == 0
    for name in ("sample_0.wav", "sample_1.wav", "sample_0.json"):
        assert without_speed(out / name) == without_speed(tmp_path / "again" / name)


def nll_of(run: Path, codes: np.ndarray) -> float:
    return evaluate_nll(load_run_model(run).model, Stretch(codes, 128, 64)).nll_nats


@pytest.mark.parametrize("name", ["wavenet", "compressive_transformer"])
def test_sample_continues_a_prime_of_another_rate(name: str, corpus: Path, tmp_path: Path, sample: Tool) -> None:
    run, prime = make_run(corpus, tmp_path, name), tmp_path / "prime.wav"
    write_wav(prime, speech_like(4800, 5), 2 * RATE)
    arguments = ["--seconds", 0.003, "--num", 1, "--prime", prime, "--prime-seconds", 0.005, "--verify"]
    assert sample(run, *arguments, "--out", tmp_path / "a") in (0, 4)
    assert sample(run, *arguments, "--include-prime", "--out", tmp_path / "b") in (0, 4)
    alone, _ = read_wav(tmp_path / "a" / "sample_0.wav")
    both, _ = read_wav(tmp_path / "b" / "sample_0.wav")
    assert (len(alone), len(both)) == (72, 120 + 72)
    assert np.array_equal(both[120:], alone)
    sidecar = read_json(tmp_path / "b" / "sample_0.json")
    assert (sidecar["prime"], sidecar["prime_seconds"], sidecar["prime_included"]) == ("prime.wav", 0.005, True)
    assert sidecar["num_samples"] == 72
    assert sidecar["verify_max_abs_difference"] < 1e-4
    whole = nll_of(run, MuLaw().encode(both)) * 192
    start = nll_of(run, MuLaw().encode(both[:120])) * 120
    assert sidecar["nll_nats"] == pytest.approx((whole - start) / 72, abs=1e-3)


def test_sample_needs_no_corpus_after_training(tmp_path: Path, sample: Tool) -> None:
    """Training writes the codec into the checkpoint, so a run alone is enough."""
    config = tiny_run(tmp_path, "wavenet", train__num_steps=1, train__valid_every_steps=0)
    assert train(config) == 0
    shutil.rmtree(config.data.corpus)
    assert sample(config.run_dir, "--seconds", 0.002, "--num", 1, "--out", tmp_path / "out") in (0, 4)
    assert read_wav(tmp_path / "out" / "sample_0.wav")[1] == RATE


@pytest.mark.parametrize(("width_of_codes", "fault"), [(0.2, "silent"), (1000.0, "runaway")])
def test_sample_warns_of_faults(
    width_of_codes: float, fault: str, corpus: Path, tmp_path: Path, sample: Tool, capsys: Output
) -> None:
    run = make_run(corpus, tmp_path, width_of_codes=width_of_codes)
    assert sample(run, "--seconds", 0.02, "--num", 1, "--out", tmp_path / "out") == 4
    warnings = read_json(tmp_path / "out" / "sample_0.json")["warnings"]
    assert any(warning.startswith(fault) for warning in warnings)
    assert f"sample_0.wav: {fault}" in capsys.readouterr().err
    assert (tmp_path / "out" / "sample_0.wav").exists()


def test_sample_fails_verification_of_a_wrong_step(
    corpus: Path, tmp_path: Path, sample: Tool, monkeypatch: Patch, capsys: Output
) -> None:
    right = WaveNet.step
    monkeypatch.setattr(WaveNet, "step", lambda self, codes, state: right(self, (codes + 1) % 256, state))
    run = make_run(corpus, tmp_path)
    with torch.no_grad():
        arguments = ("--seconds", 0.01, "--num", 1, "--stepper", "eager", "--verify", "--out", tmp_path / "out")
        assert sample(run, *arguments) == 3
    assert "verification failed" in capsys.readouterr().err
    assert read_json(tmp_path / "out" / "sample_0.json")["verify_max_abs_difference"] > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "inf"], "--seconds"),
        (["--seed", "-1"], "seed"),
        (["--temperature", "-1"], "temperature"),
        (["--top-k", "257"], "top-k: expected 1 to 256"),
        (["--top-p", "0"], "top-p"),
        (["--prime", "nowhere.wav"], "nowhere.wav"),
    ],
)
def test_sample_errors_are_one_line(
    arguments: list[str], message: str, corpus: Path, tmp_path: Path, sample: Tool, capsys: Output
) -> None:
    assert message in refusal(capsys, sample, make_run(corpus, tmp_path), *arguments, "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("level", "options", "message"),
    [
        (1.0, ["--prime-seconds", 60], "prime.wav is too short: it holds 1000 samples (0.042 s), 1440000 (60.000 s)"),
        (1.0, ["--prime-length", 1001], "too short: it holds 1000 samples (0.042 s), 1001 (0.042 s) asked for"),
        (1e-4, [], "prime.wav: hardly any different codes"),
        (0.0, [], "prime.wav: silent"),
    ],
)
def test_a_prime_must_be_a_recording_that_could_be_trained_on(
    level: float,
    options: list,
    message: str,
    corpus: Path,
    tmp_path: Path,
    sample: Tool,
    capsys: Output,
) -> None:
    write_wav(tmp_path / "prime.wav", speech_like(1000, 1) * np.float32(level), RATE)
    run, out = make_run(corpus, tmp_path), tmp_path / "out"
    assert sample(run, "--prime", tmp_path / "prime.wav", *options, "--seconds", 0.01, "--out", out) == 2
    assert message in capsys.readouterr().err
    assert not list(out.glob("*"))


def test_a_folder_holds_the_samples_of_one_call(corpus: Path, tmp_path: Path, sample: Tool, capsys: Output) -> None:
    run, out = make_run(corpus, tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "sample_notes.txt").write_text("mine")
    sample(run, "--num", 3, "--seconds", 0.01, "--plots", "--out", out)
    sample(run, "--num", 1, "--seed", 7, "--seconds", 0.01, "--out", out)
    assert "of an earlier call: sample_1, sample_2" in capsys.readouterr().err
    found = {path.name for path in out.glob("sample_*")}
    assert found == {"sample_0.wav", "sample_0.json", "sample_notes.txt"}
    assert read_json(out / "sample_0.json")["seed"] == 7


def test_sample_needs_a_checkpoint_and_a_place(tmp_path: Path, corpus: Path, sample: Tool, capsys: Output) -> None:
    assert "no such folder; models that are shipped: kathleen/" in refusal(
        capsys, sample, tmp_path / "no_run", "--out", tmp_path / "out"
    )
    (tmp_path / "file").write_text("")
    words = [make_run(corpus, tmp_path / "b"), "--seconds", 0.01, "--out", tmp_path / "file"]
    assert "--out" in refusal(capsys, sample, *words)
