"""The playground: a model is played with in a browser, or through the sound card, while it samples.

Sound reaches the browser as 16-bit samples in text that a script of the page plays piece by piece: no encoder (ffmpeg)
is needed. Where sampling is slower than real time, playing begins so late that it never waits.

Shape letters: N samples.
"""

import base64
import contextlib
import importlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int16

from ct_audio.common.errors import UserError
from ct_audio.common.figures import spectrogram_figure
from ct_audio.data.codecs import Codec, read_codes
from ct_audio.runs.open_run import LoadedRun
from ct_audio.sampling.sampler import Sampler

MAX_SECONDS = 120.0
PIECE_SECONDS = 0.25
"""Wall time between two pieces."""
_KEPT_PIECES = 4  # a message repeats the pieces before, should the page have missed them
_LATENCY_SECONDS = 0.5  # of sound that lies before the card: pieces may be late by so much
_SPARE = 1.1  # how much earlier than needed enough is there to play without waiting


@dataclass(frozen=True)
class Wish:
    """What is to be sampled, as in `Sampler`.

    Attributes:
        seconds: of the sample, a prime not counted; at most MAX_SECONDS.
        prime: recording that is continued, in any format and rate; prime_seconds: how much of its beginning.
    """

    seconds: float = 5.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    prime: Path | None = None
    prime_seconds: float = 1.0


@dataclass(frozen=True)
class Piece:
    """What has been sampled since the piece before.

    Attributes:
        waveform: [N] in [-1, 1]; the first piece is the prime where there is one.
        made, total: samples so far and in the end, without the prime.
        samples_per_second: wall time, since the sampling began.
        nll_nats: mean NLL of each whole second so far, and of what follows the last one; at temperature 1.
    """

    waveform: Float[np.ndarray, " N"]
    made: int
    total: int
    samples_per_second: float
    nll_nats: tuple[float, ...] = ()

    def may_play(self, rate: int) -> bool:
        """Whether, at this speed and sample rate, playing from now on never waits for sampling."""
        return _may_play(self.made, self.total, self.samples_per_second, rate)


def _may_play(made: int, total: int, samples_per_second: float, rate: int) -> bool:
    slowness = max(0.0, 1.0 - samples_per_second / rate)
    return made >= min(total, _SPARE * slowness * total + 0.2 * rate)


def play(run: LoadedRun, codec: Codec, wish: Wish, *, piece_seconds: float = PIECE_SECONDS) -> Iterator[Piece]:
    """Sample; a piece about every `piece_seconds` of wall time.

    Raises:
        UserError: the model is one of text, or something that is wished for is out of its range.
    """
    rate = _rate_of(codec)
    for name, seconds in (("seconds", wish.seconds), ("prime seconds", wish.prime_seconds)):
        if not (math.isfinite(seconds) and 1 <= round(seconds * rate) <= MAX_SECONDS * rate):
            raise UserError(f"{name}: expected more than 0 and at most {MAX_SECONDS:g}, got {seconds}")
    total, prime = round(wish.seconds * rate), None
    if wish.prime is not None:
        codes = read_codes(wish.prime, codec, num_codes=None)[: round(wish.prime_seconds * rate)]
        prime = torch.from_numpy(codes.astype(np.int64))[None].to(run.model.device)
    settings = {"temperature": wish.temperature, "top_k": wish.top_k, "top_p": wish.top_p, "seed": wish.seed}
    sampler = Sampler(run.model, num_lanes=1, start_code=codec.start_code, prime=prime, **settings)
    if prime is not None:
        yield Piece(codec.decode(prime[0].cpu().numpy()), 0, total, 0.0)
    yield from _pieces(sampler, codec, rate, total, piece_seconds)


def _rate_of(codec: Codec) -> int:
    if codec.sample_rate_hz is None:
        raise UserError("expected a model of audio; for a text, sample with ct-audio sample")
    return codec.sample_rate_hz


def _pieces(sampler: Sampler, codec: Codec, rate: int, total: int, piece_seconds: float) -> Iterator[Piece]:
    began = last = time.perf_counter()
    codes: list[torch.Tensor] = []
    logs: list[torch.Tensor] = []
    nll, num_taken = np.zeros(math.ceil(total / rate)), 0
    made = 0
    for block, log_probabilities in sampler.blocks(total):
        codes.append(block[0])
        logs.append(log_probabilities[0])
        made, now = made + block.shape[1], time.perf_counter()
        if now - last < piece_seconds and made < total:
            continue
        values = -torch.cat(logs).double().cpu().numpy()
        np.add.at(nll, np.arange(num_taken, made) // rate, values)
        waveform = codec.decode(torch.cat(codes).cpu().numpy())
        lengths = [min(rate, made - second * rate) for second in range(math.ceil(made / rate))]
        means = tuple(float(nll[second] / length) for second, length in enumerate(lengths))
        yield Piece(waveform, made, total, made / (now - began), means)
        num_taken, last = made, now
        codes, logs = [], []


def pcm16(waveform: Float[np.ndarray, " N"]) -> Int16[np.ndarray, " N"]:
    """As in a wav file."""
    return np.clip(np.rint(waveform.astype(np.float64) * 32768.0), -32768, 32767).astype(np.int16)


# ---- the sound card


class Speaker:
    """The sound card (sounddevice), written to as to a file of PCM16: what comes is played from when on playing never
    waits for it.

    Args:
        total: samples that will come, about.
    Raises:
        UserError: sounddevice is not installed, or (in `write`) there is no sound card.
    """

    def __init__(self, rate: int, total: int) -> None:
        try:
            self._sounddevice = importlib.import_module("sounddevice")
        except (ImportError, OSError) as error:  # OSError: without the library PortAudio
            raise UserError(_needs("sounddevice", error)) from error
        self._rate, self._total, self._made = rate, total, 0
        self._began: float | None = None
        self._waiting, self._stream = bytearray(), None

    def write(self, content: bytes) -> None:
        """Play, or keep until there is enough; waits while enough lies before the card."""
        now = time.perf_counter()
        self._began = now if self._began is None else self._began
        self._made += len(content) // 2
        self._waiting += content
        if self._stream is not None or _may_play(
            self._made, self._total, self._made / max(now - self._began, 1e-9), self._rate
        ):
            self._play()

    def flush(self) -> None:
        """Nothing: it is played in its time."""

    def close(self) -> None:
        """Play what is left, to its end."""
        if self._waiting:
            self._play()
        if self._stream is not None:
            self._stream.stop()
            self._stream.close()

    def _play(self) -> None:
        try:
            if self._stream is None:
                self._stream = self._sounddevice.RawOutputStream(
                    samplerate=self._rate, channels=1, dtype="int16", latency=_LATENCY_SECONDS
                )
                self._stream.start()
            self._stream.write(bytes(self._waiting))
            self._waiting.clear()
        except self._sounddevice.PortAudioError as error:
            self._waiting.clear()
            raise UserError(f"sound card: {error}; play in a browser (ct-audio play), or write files") from error


def play_to_speaker(run: LoadedRun, codec: Codec, wish: Wish) -> None:
    """Sample to the sound card, and print rate and NLL when it is done.

    Raises:
        UserError: as `Speaker` and `play`.
    """
    rate, piece = _rate_of(codec), None
    with contextlib.closing(Speaker(rate, round(wish.seconds * rate))) as speaker:
        speaker.write(b"")  # the sampling begins
        for piece in play(run, codec, wish):
            speaker.write(pcm16(piece.waveform).tobytes())
    if piece is not None:
        print(in_words(piece, rate))


def _needs(package: str, error: Exception) -> str:
    return f"this needs {package} ({error}); run: python -m pip install 'ct_audio[play]'"


def in_words(piece: Piece, rate: int) -> str:
    """How far it is, how fast, and the NLL of each second."""
    speed = f"{piece.samples_per_second:,.0f} samples/s = {piece.samples_per_second / rate:.2f} x real time"
    nll = " ".join(f"{value:.2f}" for value in piece.nll_nats)
    return f"{piece.made / rate:.2f} of {piece.total / rate:g} s, {speed}; NLL (nats per sample) of each second: {nll}"


# ---- the browser

_HEAD = """<script>
{
  const player = { id: null, context: null, pieces: [], received: 0, next: 0 };
  window.ctAudio = player;
  window.ctAudioPlay = (text) => {
    if (!text) return;
    const message = JSON.parse(text);
    if (message.id !== player.id) {
      player.context?.close();
      const context = new AudioContext({ sampleRate: message.rate });
      Object.assign(player, { id: message.id, context, pieces: [], received: 0, next: 0 });
    }
    const bytes = Uint8Array.from(atob(message.pcm), (letter) => letter.charCodeAt(0));
    const all = Float32Array.from(new Int16Array(bytes.buffer), (value) => value / 32768);
    const samples = all.subarray(player.received - message.first);
    if (samples.length) player.pieces.push(samples);
    player.received += samples.length;
    if (!player.next && !message.may_play) return;
    for (const piece of player.pieces.splice(0)) {
      const buffer = player.context.createBuffer(1, piece.length, message.rate);
      buffer.copyToChannel(piece, 0);
      const node = player.context.createBufferSource();
      node.buffer = buffer;
      node.connect(player.context.destination);
      player.next = Math.max(player.next, player.context.currentTime + 0.05);
      node.start(player.next);
      player.next += piece.length / message.rate;
    }
  };
  window.ctAudioStop = () => { player.context?.close(); player.context = null; player.id = null; };
}
</script>"""


def playground(run: LoadedRun, codec: Codec, wish: Wish, *, title: str) -> tuple[Any, dict[str, Any]]:
    """The page, which begins with a wish: an app of gradio, and what its `launch` is to be given.

    Raises:
        UserError: gradio is not installed, or the model is one of text.
    """
    try:
        gradio = importlib.import_module("gradio")
    except ImportError as error:
        raise UserError(_needs("gradio", error)) from error
    rate = codec.sample_rate_hz
    if rate is None:
        raise UserError("expected a model of audio; for a text, sample with ct-audio sample")

    def sample(prime: str | None, *numbers: Any) -> Iterator[tuple[Any, ...]]:
        try:
            yield from _messages(run, codec, rate, _wish(prime, *numbers))
        except UserError as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title=title, analytics_enabled=False) as app:
        gradio.Markdown(f"## {title}\nStep {run.step:,}, {rate} Hz, on {run.model.device.type}.")
        with gradio.Row():
            with gradio.Column():
                prime = gradio.Audio(
                    None if wish.prime is None else str(wish.prime),
                    label="prime: record or upload",
                    sources=["microphone", "upload"],
                    type="filepath",
                )
                numbers = [
                    gradio.Slider(
                        0.1, 10, wish.prime_seconds, step=0.1, label="seconds of the prime that are continued"
                    ),
                    gradio.Slider(0.1, 30, wish.seconds, step=0.1, label="seconds to sample"),
                    gradio.Slider(
                        0, 1.5, wish.temperature, step=0.01, label="temperature", info="0: the most probable code"
                    ),
                    gradio.Slider(0, codec.vocab_size, wish.top_k or 0, step=1, label="top-k", info="0: all codes"),
                    gradio.Slider(0.01, 1, wish.top_p or 1, step=0.01, label="top-p", info="1: all codes"),
                    gradio.Number(wish.seed, precision=0, minimum=0, label="seed"),
                ]
                with gradio.Row():
                    start = gradio.Button("Sample", variant="primary", elem_id="sample")
                    stop = gradio.Button("Stop", elem_id="stop")
            with gradio.Column():
                progress = gradio.Markdown("Sound is played while it is sampled.", elem_id="progress")
                whole = gradio.Audio(label="the sample", interactive=False, elem_id="whole")
                picture = gradio.Plot(show_label=False)  # a label lies upon the picture
                message = gradio.Textbox(visible="hidden")
        outputs = [message, progress, whole, picture]
        event = start.click(sample, [prime, *numbers], outputs, show_progress="hidden")
        message.change(None, [message], None, js="(text) => window.ctAudioPlay(text)")
        stop.click(None, None, None, cancels=[event], js="() => window.ctAudioStop()")
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts from a network
    return app, {"head": _HEAD, "theme": theme, "ssr_mode": False, "footer_links": []}


def _wish(prime: str | None, prime_seconds: Any, seconds: Any, temperature: Any, k: Any, p: Any, seed: Any) -> Wish:
    """What the controls say; 0 codes and a share of 1 are no limits."""
    return Wish(
        seconds=float(seconds),
        temperature=float(temperature),
        top_k=int(k) or None,
        top_p=None if float(p) >= 1 else float(p),
        seed=int(seed or 0),
        prime=None if prime is None else Path(prime),
        prime_seconds=float(prime_seconds),
    )


def _messages(run: LoadedRun, codec: Codec, rate: int, wish: Wish) -> Iterator[tuple[Any, ...]]:
    """For each piece the new values of message, progress, whole sample and picture."""
    played: list[np.ndarray] = []
    identity = time.time_ns()
    for piece in play(run, codec, wish):
        played.append(pcm16(piece.waveform))
        first = sum(map(len, played[:-_KEPT_PIECES]))
        content = {
            "id": identity,
            "rate": rate,
            "first": first,
            "may_play": piece.may_play(rate),
            "pcm": base64.b64encode(np.concatenate(played[-_KEPT_PIECES:]).astype("<i2").tobytes()).decode(),
        }
        is_done = piece.made == piece.total
        waveform = np.concatenate(played)
        whole = (rate, waveform) if is_done else None
        figure = spectrogram_figure(waveform.astype(np.float32) / 32768, rate) if is_done else None
        yield json.dumps(content), in_words(piece, rate), whole, figure
