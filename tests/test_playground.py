"""ct-audio play: pieces of sound while it is sampled, the sound card, and the page in a headless browser."""

import base64
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from browser import open_browser
from handmade_runs import RATE, ROOT, Output, Patch, make_run, refusal, speech_like, text_run, tool, write_corpus

from ct_audio.apps import playground
from ct_audio.apps.playground import Piece, Speaker, Wish, _messages, _wish, in_words, pcm16, play
from ct_audio.common.errors import UserError
from ct_audio.data.audio_files import write_wav
from ct_audio.data.codecs import Byte, MuLaw
from ct_audio.runs.open_run import LoadedRun, load_run_model, run_codec
from ct_audio.sampling.sample_set import Request, SampleSet

SECONDS = 0.05


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    documents = [("train", speech_like(3000, 1)), ("valid", speech_like(3000, 2))]
    return make_run(write_corpus(tmp_path / "corpus", MuLaw(), documents), tmp_path)


@pytest.fixture
def run(run_dir: Path) -> LoadedRun:
    return load_run_model(run_dir)


def test_pieces_are_the_sample_that_files_would_hold(run: LoadedRun, tmp_path: Path) -> None:
    write_wav(tmp_path / "prime.wav", speech_like(2000, 3), RATE)
    wish = Wish(SECONDS, 0.9, top_k=50, top_p=0.95, seed=3, prime=tmp_path / "prime.wav", prime_seconds=0.02)
    first, *pieces = play(run, MuLaw(), wish, piece_seconds=0.0)
    assert (len(first.waveform), first.made) == (480, 0)
    codes = MuLaw().encode(first.waveform)
    request = Request(1200, 1, 3, 0.9, 50, 0.95, prime=codes)
    one = SampleSet(run, MuLaw(), request, None)
    one.sample(signals=[])
    np.testing.assert_array_equal(np.concatenate([piece.waveform for piece in pieces]), one.decoded()[0])
    assert [piece.made for piece in pieces] == sorted({piece.made for piece in pieces})
    assert pieces[-1].nll_nats == pytest.approx([-float(one.log_probabilities.double().mean())])
    (whole,) = play(run, MuLaw(), Wish(SECONDS), piece_seconds=1e9)
    assert (len(whole.waveform), whole.made, whole.total) == (1200, 1200, 1200)


def test_nll_is_that_of_each_second() -> None:
    piece = Piece(np.zeros(3), 36_000, 48_000, 12_000.0, (2.0, 3.0))
    assert in_words(piece, RATE) == (
        "1.50 of 2 s, 12,000 samples/s = 0.50 x real time; NLL (nats per sample) of each second: 2.00 3.00"
    )


@pytest.mark.parametrize("speed", [0.1, 0.5, 0.9, 1.0, 3.0])
def test_playing_begins_when_it_never_has_to_wait(speed: float) -> None:
    """Sampled at a constant speed: when playing starts, each later sample is there before its turn."""
    rate, total = 200, 1000
    made = np.arange(1, total + 1)
    start = next(n for n in made if Piece(np.zeros(0), int(n), total, speed * rate).may_play(rate))
    played = np.minimum(total, (made - start) / speed)  # samples that have been played when so many are made
    assert (played[start:] <= made[start:]).all()
    assert start <= 1.2 * max(0.0, 1 - speed) * total + 0.25 * rate


def test_messages_repeat_what_a_page_may_have_missed(run: LoadedRun) -> None:
    messages = list(_messages(run, MuLaw(), RATE, Wish(SECONDS)))
    heard = np.zeros(0, np.int16)
    for text, _, whole, figure in messages:
        content = json.loads(text)
        pcm = np.frombuffer(base64.b64decode(content["pcm"]), "<i2")
        assert content["first"] <= len(heard)
        heard = np.concatenate([heard, pcm[len(heard) - content["first"] :]])
        assert (whole is None) == (figure is None) == (text is not messages[-1][0])
    np.testing.assert_array_equal(heard, messages[-1][2][1])
    assert content["may_play"]


def test_controls_at_their_ends_are_no_limits() -> None:
    assert _wish(None, 1, 5, 1, 0, 1, None) == Wish()
    assert _wish("a.wav", 2, 3, 0.5, 7, 0.9, 4) == Wish(3.0, 0.5, 7, 0.9, 4, Path("a.wav"), 2.0)


def test_what_cannot_be_played_is_refused(
    run: LoadedRun, run_dir: Path, tmp_path: Path, monkeypatch: Patch, capsys: Output
) -> None:
    for wish in (Wish(0.0), Wish(float("nan")), Wish(1e9), Wish(prime_seconds=-1.0), Wish(SECONDS, seed=-1)):
        with pytest.raises(UserError):
            list(play(run, MuLaw(), wish))
    command = tool("play", monkeypatch)
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert "needs gradio" in refusal(capsys, command, run_dir)
    assert "needs sounddevice" in refusal(capsys, command, run_dir, "--speaker")
    monkeypatch.setitem(sys.modules, "sounddevice", SimpleNamespace(PortAudioError=OSError))
    text = text_run(tmp_path / "text", Byte(), b"some text " * 40)
    assert "expected a model of audio" in refusal(capsys, command, text, "--speaker")


class SoundCard:
    """What sounddevice.RawOutputStream is used for."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.heard, self.calls = settings, b"", []

    def start(self) -> None:
        self.calls.append("start")

    def write(self, content: bytes) -> None:
        assert self.calls == ["start"]
        self.heard += content

    def stop(self) -> None:
        self.calls.append("stop")

    def close(self) -> None:
        self.calls.append("close")


def test_the_speaker_gets_all_of_it(run_dir: Path, monkeypatch: Patch, capsys: Output) -> None:
    cards: list[SoundCard] = []

    def open_card(**settings: Any) -> SoundCard:
        cards.append(SoundCard(**settings))
        return cards[-1]

    monkeypatch.setitem(sys.modules, "sounddevice", SimpleNamespace(RawOutputStream=open_card, PortAudioError=OSError))
    assert tool("play", monkeypatch)(run_dir, "--speaker", "--seconds", SECONDS, "--seed", 5, "--threads", 1) == 0
    (card,) = cards
    assert card.settings == {"samplerate": RATE, "channels": 1, "dtype": "int16", "latency": 0.5}
    assert card.calls == ["start", "stop", "close"]
    run = load_run_model(run_dir)
    pieces = play(run, run_codec(run), Wish(SECONDS, seed=5))
    assert card.heard == b"".join(pcm16(piece.waveform).tobytes() for piece in pieces)
    assert "0.05 of 0.05 s" in capsys.readouterr().out


def test_sample_plays_what_it_would_write(run_dir: Path, tmp_path: Path, monkeypatch: Patch, capsys: Output) -> None:
    card = SoundCard()
    fake = SimpleNamespace(RawOutputStream=lambda **_: card, PortAudioError=OSError)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    arguments = (run_dir, "--num", 1, "--seconds", SECONDS, "--threads", 1)
    sample = tool("sample", monkeypatch)
    assert sample(*arguments, "--play", "--out", tmp_path / "out") in (0, 4)
    assert card.calls == ["start", "stop", "close"]
    waveform, _ = soundfile.read(tmp_path / "out" / "sample_0.wav", dtype="int16")
    assert card.heard == waveform.tobytes()
    card.calls.clear()
    assert sample(*arguments, "--play") in (0, 4)
    assert "stream: " in capsys.readouterr().out
    card.calls.clear()
    monkeypatch.setattr(card, "start", lambda: (_ for _ in ()).throw(OSError("no card")))
    assert sample(*arguments, "--play") == 2
    assert "sound card: no card; play in a browser" in capsys.readouterr().err


@pytest.mark.parametrize("speed", [0.3, 0.9, 3.0])
def test_the_speaker_waits_for_as_much_as_it_needs(speed: float, monkeypatch: Patch) -> None:
    """Simulated: pieces come at a constant speed; once it plays, the next sample is always there."""
    card, now, num, total = SoundCard(), 0.0, 1200, 240_000
    fake = SimpleNamespace(RawOutputStream=lambda **_: card, PortAudioError=OSError)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    monkeypatch.setattr(playground, "time", SimpleNamespace(perf_counter=lambda: now))
    speaker, began = Speaker(RATE, total), None
    speaker.write(b"")
    for made in range(num, total + 1, num):
        now = made / (speed * RATE)
        if began is not None:
            assert len(card.heard) // 2 >= min(total, (now - began) * RATE)
        speaker.write(bytes(2 * num))
        began = now if began is None and card.calls else began
    speaker.close()
    assert len(card.heard) == 2 * total
    assert card.calls == ["start", "stop", "close"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio, the extra play")
def test_in_a_browser_sound_is_played_while_it_is_sampled(run_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/play.py"), str(run_dir), "--port", "0", "--threads", "1"]
    command += ["--seconds", "0.4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, open_browser() as browser:
        try:
            assert server.stdout is not None
            url = next(match[0] for line in server.stdout if (match := re.search(r"http://\S+", line)))
            browser.open(url)
            browser.wait("document.querySelector('#sample') && !!window.ctAudioPlay", seconds=120)
            browser.click("#sample")
            browser.wait("window.ctAudio.next > 0", seconds=200)
            browser.wait("window.ctAudio.received == 0.4 * 24000", seconds=400)
            progress = browser.wait("document.querySelector('#progress').innerText")
            assert re.search(r"0\.40 of 0\.4 s, .* x real time; NLL .* second: \d\.\d+", progress)
            browser.wait("document.querySelector('#whole audio, #whole .waveform-container, #whole canvas')")
            browser.screenshot(tmp_path / "playground.png")
            severe = [line for line in browser.complaints() if "favicon" not in line and "ERR_" not in line]
            assert severe == []
        finally:
            server.terminate()
