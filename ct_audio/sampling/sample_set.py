"""A set of samples: begun or taken up, sampled side by side, saved while it grows.

Shape letters: B lanes, P codes of a prime, T sampled codes, N samples.
"""

import hashlib
import os
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float, Int, Integer
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.common.progress import Progress
from ct_audio.data.codecs import Codec
from ct_audio.runs.open_run import LoadedRun
from ct_audio.sampling.resume import (
    SavedSampling,
    load_sampling,
    require_no_unfinished,
    require_same_settings,
    save_sampling,
)
from ct_audio.sampling.sampler import Sampler, Stepper, verify_steps

SAVE_EVERY_SECONDS = 60.0
_SAVING_SHARE = 0.1  # of the time at most goes into saving, however large a state is
_BLOCK_SECONDS = 0.05  # wall time between two looks at signals, and two pieces of a stream
STREAM_CODES = 60 * 24_000
"""Codes that stay in memory of a stream that is kept nowhere else: it may go on for hours."""


@dataclass(frozen=True)
class Request:
    """What is to be sampled; the arguments of `Sampler` are explained there.

    Attributes:
        num_codes: of each lane.
        prime: [P] codes that all lanes continue, or [B, P], what each lane continues.
        prime_name: for the sidecars: its file's name, or the name of each lane's prime.
        include_prime: the wav files begin with the prime.
        stepper: "auto" goes on with the stepper that a sampling began with.
    """

    num_codes: int
    num_lanes: int = 1
    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    prime: Integer[np.ndarray, " P"] | Integer[np.ndarray, "B P"] | None = None
    prime_name: str | tuple[str, ...] | None = None
    include_prime: bool = False
    stepper: Stepper = "auto"

    @property
    def drawing(self) -> dict[str, Any]:
        """What decides the codes beside model and prime: arguments of `Sampler` and keys of the sidecars."""
        return {name: getattr(self, name) for name in ("num_lanes", "seed", "temperature", "top_k", "top_p")}

    @property
    def prime_length(self) -> int:
        """Codes of the prime."""
        return 0 if self.prime is None else self.prime.shape[-1]

    def prime_of(self, lane: int) -> Integer[np.ndarray, " P"]:
        """What a lane continues; no codes where there is no prime."""
        if self.prime is None:
            return np.zeros(0, np.int64)
        return self.prime if self.prime.ndim == 1 else self.prime[lane]


@runtime_checkable
class Sink(Protocol):
    """What a stream writes to: a pipe or a sound card."""

    def write(self, content: bytes, /) -> Any: ...

    def flush(self) -> Any: ...


class SampleStream:
    """What is sampled, to a pipe: raw mono PCM16, little-endian, or text; not `is_open` once the reader has gone."""

    def __init__(self, handle: Sink) -> None:
        self._handle, self.is_open = handle, True

    def write(self, piece: Float[np.ndarray, " N"] | bytes) -> None:
        """Write text or samples in [-1, 1], rounded as in a wav file, at once; nothing where the reader has gone."""
        if isinstance(piece, np.ndarray):
            levels = np.clip(np.rint(piece.astype(np.float64) * 32768.0), -32768, 32767)
            piece = levels.astype("<i2").tobytes()
        try:
            if self.is_open:
                self._handle.write(piece)
                self._handle.flush()
        except BrokenPipeError:
            self.is_open = False
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._handle.fileno())  # type: ignore[attr-defined] (a pipe)  # or the flush at the end would fail again
            os.close(nowhere)


class SampleSet:
    """Samples of one run side by side, and where they are written.

    Args:
        directory: for the files; None: nothing is written.
        resume: go on with what is saved there, where there is something; else anything unfinished is refused.
    Attributes:
        num_resumed: codes of each lane that were there already.
        num_forgotten: codes at the beginning of each lane that `codes` and `log_probabilities` do not hold any more.
        stopped_by: number of the signal that ended `sample`, else 0.
    Raises:
        UserError: an argument is out of its range, or what is saved does not fit the request or is damaged.
    """

    def __init__(
        self, run: LoadedRun, codec: Codec, request: Request, directory: Path | None, *, resume: bool = False
    ) -> None:
        self.run, self.codec, self.request, self.directory = run, codec, request, directory
        device = run.model.device
        self._prime: Tensor | None = None
        if request.prime is not None:
            prime = torch.from_numpy(request.prime.astype(np.int64)).to(device)
            self._prime = prime if prime.ndim == 2 else repeat(prime, "p -> b p", b=request.num_lanes)
        saved = load_sampling(directory) if directory is not None and resume else None
        stepper = request.stepper
        if saved is not None:
            saved.settings.setdefault("stepper", "eager")  # states from before there was another
            stepper = saved.settings["stepper"] if stepper == "auto" else stepper
        place = {"start_code": codec.start_code, "prime": self._prime}
        self._sampler = Sampler(run.model, stepper=stepper, **place, **request.drawing)
        self._codes: list[Tensor] = []  # each [B, T]
        self._log_probabilities: list[Tensor] = []
        self._seconds, self._num_saved, self.num_resumed, self.stopped_by = 0.0, 0, 0, 0
        self.num_forgotten = 0
        if directory is not None and not resume:
            require_no_unfinished(directory)  # also where there is no such directory yet
        elif directory is not None and saved is None:
            print(f"{directory} holds no sampling to go on with: it begins at the beginning")
        elif directory is not None and saved is not None:
            self._resume(directory, saved)

    @property
    def num_codes(self) -> int:
        """Codes of each lane so far."""
        return self._sampler.num_codes

    @property
    def stepper(self) -> Stepper:
        """Which one samples, "compiled" or "eager"."""
        return self._sampler.stepper

    def spread(self, num_threads: int, lanes_together: int) -> None:
        """How lanes are spread, as by the sampler; it changes nothing but the speed."""
        self._sampler.num_threads, self._sampler.lanes_together = num_threads, lanes_together

    @property
    def codes_per_second(self) -> float | None:
        """Codes of all lanes in a second of sampling (without saving and writing); None before there are any."""
        return self.num_codes * self.request.num_lanes / self._seconds if self._seconds else None

    @property
    def num_left(self) -> int:
        """Codes of each lane that are still to be sampled."""
        return self.request.num_codes - self.num_codes

    @property
    def codes(self) -> Int[Tensor, "B T"]:
        """What was sampled so far."""
        return self._joined(self._codes)

    @property
    def log_probabilities(self) -> Float[Tensor, "B T"]:
        """Of the codes, in nats."""
        return self._joined(self._log_probabilities)

    def sample(
        self,
        *,
        signals: list[int],
        stream: SampleStream | None = None,
        save_every_seconds: float = SAVE_EVERY_SECONDS,
        label: str = "sampling",
        keep: int | None = None,
    ) -> None:
        """Sample what is left and save it, in between too; a signal or the end of the stream's reader ends it early.

        Args:
            signals: a list to which signals are appended (see `caught_signals`).
            stream: gets lane 0 as it is sampled.
            save_every_seconds: wall time between two saves (longer where saving itself takes long).
            label: of the progress bar.
            keep: how many of the last codes stay in memory, about, without a directory; None: all.
        """
        saved, pause = time.perf_counter(), save_every_seconds
        blocks = self._sampler.blocks(self.num_left, seconds=_BLOCK_SECONDS)
        with Progress(total=self.num_left, desc=label, unit="code") as bar:
            began = time.perf_counter()
            for codes, log_probabilities in blocks:
                self._codes.append(codes)
                self._log_probabilities.append(log_probabilities)
                if keep is not None and self.directory is None:
                    self._forget(keep)
                self._seconds += time.perf_counter() - began
                bar.update(codes.shape[1])
                if stream is not None:
                    stream.write(self.codec.decode(codes[0].cpu().numpy()))
                    if not stream.is_open:
                        break
                now = time.perf_counter()
                if now - saved >= pause and self.directory is not None:
                    self._save(self.directory)
                    saved = time.perf_counter()
                    pause = max(save_every_seconds, (saved - now) / _SAVING_SHARE)
                if signals:
                    self.stopped_by = signals[0]
                    break
                began = time.perf_counter()
        blocks.close()
        if self.directory is not None:
            self._save(self.directory)

    def _forget(self, keep: int) -> None:
        """Drop the oldest blocks that are not among the last `keep` codes."""
        while self.num_codes - self.num_forgotten - self._codes[0].shape[1] >= keep:
            self.num_forgotten += self._codes.pop(0).shape[1]
            del self._log_probabilities[0]

    def verify(self) -> float:
        """Largest difference of the log-probabilities from those of forward passes, in nats."""
        given = {"start_code": self.codec.start_code, "prime": self._prime}
        return verify_steps(self.run.model, self.codes, self.log_probabilities, **given)

    def decoded(self) -> list[Any]:
        """The sampled part of each lane, waveforms or texts."""
        return [self.codec.decode(row) for row in self.codes.cpu().numpy()]

    def decoded_prime(self, lane: int = 0) -> Any:
        """What a lane's file begins with: the prime where it is to be included, else nothing."""
        return self.codec.decode(self.request.prime_of(lane)[: None if self.request.include_prime else 0])

    def in_words(self, num_codes: int) -> str:
        """A length for a message, as "0.5 s" or "500 bytes"."""
        rate = self.codec.sample_rate_hz
        return f"{num_codes / rate:g} s" if rate else f"{num_codes} {self.codec.unit}s"

    def settings(self) -> dict[str, Any]:
        """The part of a sidecar that all lanes share: enough to make the samples again."""
        run, request = self.run, self.request
        rate, prime_length = self.codec.sample_rate_hz, request.prime_length
        of_audio = {"sample_rate_hz": rate, "prime_seconds": prime_length / (rate or 1)}
        return {
            "name": run.config.name,
            "model": run.config.model.name,
            "checkpoint": run.checkpoint_path.name,
            "step": run.step,
            "codec": self.codec.to_json(),
            "prime": request.prime_name,
            "prime_included": request.include_prime,
            "device": run.model.device.type,
            "stepper": self.stepper,
            "version": _version(),
            **request.drawing,
            **(of_audio if rate else {"prime_units": prime_length}),
        }

    def _resume_settings(self) -> dict[str, Any]:
        """What must be the same for the sampling to go on bit for bit."""
        settings = self.settings()
        del settings["prime_included"], settings["version"], settings["prime"]  # its codes decide, not its name
        raw = b"" if self.request.prime is None else self.request.prime.astype("<i4").tobytes()
        of_stepper: dict[str, Any] = {"threads": torch.get_num_threads()}
        if self.stepper == "compiled":  # lanes do not meet: threads change nothing
            from ct_audio.models.kernels import STATE_VERSION  # imports numba

            of_stepper = {"numba": version("numba"), "state_version": STATE_VERSION}
        return settings | {
            "weights": self.run.state["files"]["model.safetensors"]["sha256"],
            "prime_codes": hashlib.sha256(raw).hexdigest(),
            "torch": str(torch.__version__),
            **of_stepper,
        }

    def _resume(self, directory: Path, saved: SavedSampling) -> None:
        require_same_settings(directory, saved, self._resume_settings())
        num_codes = saved.codes.shape[1]
        if num_codes > self.request.num_codes:
            raise UserError(
                f"{directory} holds {self.in_words(num_codes)} already, got {self.in_words(self.request.num_codes)} to "
                "resume to; ask for at least as much"
            )
        device = self.run.model.device
        leaves = dict(saved.leaves)
        self._seconds = leaves.pop("seconds", 0.0)
        self._sampler.restore(leaves)
        self._codes, self._log_probabilities = [saved.codes.to(device)], [saved.log_probabilities.to(device)]
        self._num_saved = self.num_resumed = num_codes

    def _save(self, directory: Path) -> None:
        if self.num_codes == self._num_saved:
            return
        directory.mkdir(exist_ok=True)
        settings, leaves = self._resume_settings(), self._sampler.leaves() | {"seconds": self._seconds}
        save_sampling(directory, SavedSampling(settings, False, self.codes, self.log_probabilities, leaves))
        self._num_saved = self.num_codes

    def _joined(self, parts: list[Tensor]) -> Tensor:
        if len(parts) != 1:
            parts[:] = [torch.cat(parts, dim=1) if parts else torch.zeros(self.request.num_lanes, 0)]
        return parts[0]


def _version() -> str:
    try:
        return version("ct_audio")
    except PackageNotFoundError:
        return "not installed"
