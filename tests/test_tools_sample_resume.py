"""tools/sample.py stopped and resumed, extended, and streamed: always the bytes of a sampling that never stopped."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from handmade_runs import RATE, ROOT, Output, Patch, Tool, make_run, refusal, speech_like, without_speed, write_corpus

from ct_audio.common.files import read_json
from ct_audio.data.audio_files import write_wav
from ct_audio.data.codecs import MuLaw
from ct_audio.sampling import sample_set, session
from ct_audio.sampling.resume import directory_lock
from ct_audio.sampling.sample_set import SampleStream
from ct_audio.sampling.sampler import Sampler

SETTINGS = ("--num", 2, "--seed", 3, "--top-p", 0.95, "--threads", 1)
OK = (0, 4)  # 4: so short a sample of a made-up model may well be faulty audio


@pytest.fixture(scope="session")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each of two kinds."""
    names = ("wavenet", "compressive_transformer")
    return {name: make_run(corpus, tmp_path_factory.mktemp("runs"), name) for name in names}


@pytest.fixture
def stop_after(monkeypatch: Patch) -> Callable[[int], None]:
    """Send this process a SIGTERM once a sampler has so many codes."""
    blocks = Sampler.blocks

    def set_stop(num_codes: int) -> None:
        def stopping(self: Sampler, count: int, *, seconds: float) -> Iterator[Any]:
            for pair in blocks(self, count, seconds=0.0):
                if self.num_codes == num_codes:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield pair

        monkeypatch.setattr(Sampler, "blocks", stopping)
        monkeypatch.setattr(session, "estimate_code_seconds", lambda *_, **__: (0.0, None))  # its sampler is another

    return set_stop


def files(directory: Path) -> dict[str, bytes]:
    """What was made, but for the speed; without the state, which a longer way may have left in another form."""
    return {path.name: without_speed(path) for path in directory.glob("sample_*")}


@pytest.mark.parametrize("name", ["wavenet", pytest.param("compressive_transformer", marks=pytest.mark.slow)])
def test_stopped_and_finished_samplings_go_on_bit_for_bit(
    name: str,
    runs: dict[str, Path],
    tmp_path: Path,
    sample: Tool,
    stop_after: Callable[[int], None],
    capsys: Output,
) -> None:
    run, out = runs[name], tmp_path / "out"
    write_wav(tmp_path / "prime.wav", speech_like(40, 5), RATE)
    settings = (*SETTINGS, "--prime", tmp_path / "prime.wav", "--include-prime")
    assert sample(run, "--seconds", 0.005, *settings, "--out", tmp_path / "whole") in OK
    whole = files(tmp_path / "whole")
    stop_after(37)
    assert sample(run, "--seconds", 0.002, *settings, "--out", out) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at 0.00154167 s; saved in" in capsys.readouterr().err
    assert files(out) == {}
    assert sample(run, "--seconds", 0.002, *settings, "--out", out) == 2
    assert "unfinished sampling of 37 codes a lane; add --resume" in capsys.readouterr().err
    assert sample(run, "--seconds", 0.002, *settings, "--out", out, "--resume") in OK
    assert soundfile.info(out / "sample_0.wav").frames == 40 + 48
    finished = files(out)
    assert sample(run, "--seconds", 0.002, *settings, "--out", out, "--resume") in OK  # nothing is left to sample
    assert files(out) == finished
    assert sample(run, "--seconds", 0.005, *settings, "--out", out, "--resume", "--verify") in OK
    found = files(out)
    assert found["sample_0.wav"] == whole["sample_0.wav"]
    assert found["sample_1.wav"] == whole["sample_1.wav"]
    assert read_json(out / "sample_0.json")["verify_max_abs_difference"] < 1e-4
    assert sample(run, "--seconds", 0.005, *settings, "--out", out, "--resume") in OK
    assert files(out) == whole
    assert sample(run, "--seconds", 0.002, *settings, "--out", out, "--resume") == 2
    assert "holds 0.005 s already" in capsys.readouterr().err
    stop_after(0)  # never
    assert sample(run, "--seconds", 0.002, *settings, "--out", out) in OK  # a finished one may be made anew
    assert files(out) == finished


def test_resume_refuses_what_does_not_fit(
    runs: dict[str, Path], corpus: Path, tmp_path: Path, sample: Tool, capsys: Output
) -> None:
    run, out = runs["wavenet"], tmp_path / "out"
    common = ("--seconds", 0.002, "--out", out, "--resume", "--threads", 1)
    assert sample(run, *common, "--num", 2) in OK
    assert "it begins at the beginning" in capsys.readouterr().out
    before = files(out)
    other_weights = make_run(corpus, tmp_path / "other", width_of_codes=19.0)
    for arguments, message in (
        ((run, *common, "--num", 3), "num_lanes (was 2, now 3)"),
        ((run, *common, "--num", 2, "--seed", 1), "seed (was 0, now 1)"),
        ((run, *common, "--num", 2, "--temperature", 0.5, "--top-k", 9), "temperature (was 1.0, now 0.5), top_k (was"),
        ((run, *common, "--num", 2, "--stepper", "eager"), "stepper (was compiled, now eager), threads (was None"),
        ((other_weights, *common, "--num", 2), "weights (was "),
    ):
        error = refusal(capsys, sample, *arguments)
        assert message in error
        assert "resume with those of before, or choose another --out" in error
    torch.set_num_threads(1)
    (state,) = out.glob("sampling-*.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    assert "state of its sampling is damaged" in refusal(capsys, sample, run, *common, "--num", 2)
    with directory_lock(out):
        assert "another process samples to" in refusal(capsys, sample, run, *common, "--num", 2)
    assert files(out) == before


class Pipe(io.BytesIO):
    """A standard output that remembers how much of the sample there was at each write."""

    mode = "wb"  # type: ignore[assignment]
    name = "stdout"

    def __init__(self, samplers: list[Sampler]) -> None:
        super().__init__()
        self.samplers, self.seen = samplers, []

    def write(self, content: Any) -> int:
        self.seen.append((self.tell() + len(content), self.samplers[-1].num_codes))
        return super().write(content)


def test_stdout_gets_the_samples_of_the_wav_while_they_are_made(
    runs: dict[str, Path], tmp_path: Path, sample: Tool, monkeypatch: Patch
) -> None:
    samplers: list[Sampler] = []
    remember = Sampler.__init__

    def remembering(self: Sampler, *arguments: Any, **settings: Any) -> None:
        remember(self, *arguments, **settings)
        samplers.append(self)

    monkeypatch.setattr(Sampler, "__init__", remembering)
    monkeypatch.setattr(sample_set, "_BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(session, "estimate_code_seconds", lambda *_, **__: (0.0, None))  # it has a sampler of its own
    prime = tmp_path / "prime.wav"
    write_wav(prime, speech_like(40, 5), RATE)
    arguments = ("--prime", prime, "--include-prime", "--stdout", "--num", 1, "--threads", 1, "--out", tmp_path / "out")
    streamed, pipes = b"", []
    for seconds in (0.004, 0.006):
        pipe = Pipe(samplers)
        pipes.append(stdout := io.TextIOWrapper(pipe))  # kept: it would close the pipe
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            assert sample(runs["wavenet"], "--seconds", seconds, *arguments, "--resume") in OK
        streamed += pipe.getvalue()
        data, rate = soundfile.read(tmp_path / "out" / "sample_0.wav", dtype="int16")
        assert (len(data), rate) == (40 + round(seconds * RATE), RATE)
        assert streamed == data.astype("<i2").tobytes()  # the second run streams what it adds
        num_before = -40 if len(samplers) == 1 else round(0.004 * RATE)
        assert [num_codes - num_bytes // 2 for num_bytes, num_codes in pipe.seen] == [num_before] * len(pipe.seen)
        assert len(pipe.seen) >= 48  # nothing is held back


def test_a_reader_that_has_gone_is_no_error() -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as handle:
        stream = SampleStream(handle)
        stream.write(np.array([0.0, 1.0, -1.0, 0.5 / 32768, 1.5 / 32768]))
        assert np.frombuffer(os.read(read_end, 100), "<i2").tolist() == [0, 32767, -32768, 0, 2]
        os.close(read_end)
        stream.write(np.zeros(1))
        assert not stream.is_open
        stream.write(np.zeros(1))


def patient(test: Callable[..., None]) -> Callable[..., None]:
    """A slow test that may take several minutes on a busy machine."""
    return pytest.mark.slow(pytest.mark.timeout(600)(test))


def start(*arguments: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "tools" / "sample.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(*arguments: Any) -> int:
    process = start(*arguments)
    process.communicate()
    return process.returncode


def wait_for_codes(out: Path, process: subprocess.Popen[bytes], num_codes: int) -> None:
    """Until a save with that many codes is there."""
    while process.poll() is None:
        if (out / "sampling.json").exists() and read_json(out / "sampling.json")["num_codes"] >= num_codes:
            return
        time.sleep(0.02)
    raise AssertionError(f"it ended too early: {process.communicate()}")


@patient
@pytest.mark.parametrize("name", ["wavenet", "compressive_transformer"])
def test_killed_anywhere_it_resumes_bit_for_bit(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    """kill -9 twice and SIGTERM once, in a process of its own, saving as often as it can."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = (runs[name], *SETTINGS, "--seconds", 0.2, "--save-every")
    assert finish(*arguments, 60, "--out", whole) in OK
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        reached = read_json(out / "sampling.json")["num_codes"] if out.exists() else 0
        process = start(*arguments, 0, "--out", out, "--resume")
        wait_for_codes(out, process, reached + 100)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert files(out) == {}
    assert finish(*arguments, 60, "--out", out, "--resume") in OK
    assert files(out) == files(whole)
    assert len(list(out.glob("sampling*"))) == 2  # what kills left behind is cleared away


@patient
def test_a_second_sampler_refuses_while_the_first_one_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    arguments = (runs["wavenet"], *SETTINGS, "--seconds", 20, "--save-every", 0, "--out", tmp_path / "out")
    first = start(*arguments)
    wait_for_codes(tmp_path / "out", first, 1)
    second = start(*arguments, "--resume")
    _, error = second.communicate()
    assert first.poll() is None
    assert (second.returncode, error.count(b"\n")) == (2, 1)
    assert b"another process samples to" in error
    first.kill()
    first.communicate()


@patient
def test_bytes_arrive_before_the_end_and_a_reader_may_go(runs: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("--num", 1, "--seconds", 600, "--stdout", "--threads", 1, "--out", tmp_path / "out")
    process = start(runs["wavenet"], *arguments)
    assert process.stdout is not None
    assert process.stderr is not None
    heard = process.stdout.read(2000)
    assert len(heard) == 2000
    assert process.poll() is None  # 600 s of audio are far from done
    process.stdout.close()
    assert process.wait() in OK
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    data, _ = soundfile.read(tmp_path / "out" / "sample_0.wav", dtype="int16")
    assert data.astype("<i2").tobytes().startswith(heard)
    assert len(data) < 600 * RATE


@patient
def test_a_sweep_that_was_stopped_goes_on(
    runs: dict[str, Path], tmp_path: Path, sample: Tool, stop_after: Callable[[int], None]
) -> None:
    """Broken off in the middle of each set in turn."""
    codec = MuLaw(sample_rate_hz=8000)
    documents = [(split, speech_like(5000, seed)) for seed, split in enumerate(("train", "valid"))]
    run = make_run(write_corpus(tmp_path / "corpus", codec, documents), tmp_path)
    arguments = (run, *SETTINGS, "--seconds", 0.07, "--temperatures", "0.5,1", "--out")
    assert sample(*arguments, tmp_path / "whole") in OK
    stop_after(300)
    for _ in range(2):
        assert sample(*arguments, tmp_path / "out", "--resume") == 128 + signal.SIGTERM
        assert not (tmp_path / "out" / "temperatures.md").exists()
    assert sample(*arguments, tmp_path / "out", "--resume") in OK
    made = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    made = [path for path in made if not path.name.startswith("sampling")]
    assert len(made) == 3 + 2 * 4
    for path in made:
        assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
