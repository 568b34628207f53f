"""Streaming: a player at the other end of a pipe never waits, hears soon what is sampled, and memory stays flat.

The player is simulated: its clock is this process's CPU time, and stands still for nobody else on the machine.
"""

import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
from handmade_runs import RATE, Patch, make_run, speech_like, write_corpus

from ct_audio.data.codecs import MuLaw
from ct_audio.runs.open_run import load_run_model
from ct_audio.sampling import sample_set
from ct_audio.sampling.sample_set import Request, SampleSet, SampleStream

PIPE_BYTES = 65_536  # what Linux keeps of a pipe
SPARE_BYTES = RATE // 5  # with so much the player begins: a tenth of a second


class Player:
    """A pipe with a player at its end that reads PCM16 at the sample rate.

    Attributes:
        num_gaps: how often it had nothing to play.
        latency: longest time in seconds from when a sample was written to when it is heard.
        memory: resident bytes at each second that was written.
    """

    def __init__(self) -> None:
        self.num_gaps, self.latency, self.written, self.memory = 0, 0.0, 0, list[int]()
        self._waited, self._held, self._last, self._plays = 0.0, 0.0, 0.0, False

    def write(self, content: bytes) -> None:
        now = time.process_time() + self._waited
        if self._plays:
            self._held -= 2 * RATE * (now - self._last)
            self.num_gaps += self._held < 0
            self._held = max(self._held, 0.0)
        if (beyond := self._held + len(content) - PIPE_BYTES) > 0:  # the writer waits until it has all been taken
            self._waited += beyond / (2 * RATE)
            self._held -= beyond
        self._last = time.process_time() + self._waited
        self._held += len(content)
        self.written += len(content)
        self._plays = self._plays or self._held >= SPARE_BYTES
        self.latency = max(self.latency, self._held / (2 * RATE))
        if self.written // (2 * RATE) > len(self.memory):
            self.memory.append(resident_bytes())

    def flush(self) -> None:
        pass


def resident_bytes() -> int:
    """Of this process (Linux), 0 elsewhere."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def streamed(tmp_path: Path, seconds: int) -> tuple[Player, Any]:
    documents = [("train", speech_like(3000, 1)), ("valid", speech_like(3000, 2))]
    run = load_run_model(make_run(write_corpus(tmp_path / "corpus", MuLaw(), documents), tmp_path))
    list(SampleSet(run, MuLaw(), Request(100), None)._sampler.blocks(100))  # compiled, or read from disk
    one = SampleSet(run, MuLaw(), Request(seconds * RATE, seed=3), None)
    assert one.stepper == "compiled"
    gc.collect()
    player = Player()
    one.sample(signals=[], stream=SampleStream(player), keep=sample_set.STREAM_CODES)
    return player, one


def check(player: Player, one: Any, seconds: int) -> None:
    assert player.written == 2 * seconds * RATE
    assert player.num_gaps == 0
    assert player.latency <= PIPE_BYTES / (2 * RATE) + 1e-9
    kept = one.codes.shape[1]
    assert kept == one.log_probabilities.shape[1] == one.num_codes - one.num_forgotten


def test_a_stream_has_no_gap_and_forgets_what_was_heard(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sample_set, "STREAM_CODES", RATE)
    player, one = streamed(tmp_path, 10)
    check(player, one, 10)
    assert RATE <= one.codes.shape[1] < RATE + 2 * 4096
    assert one.num_forgotten > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_an_hour_of_stream_in_flat_memory(tmp_path: Path) -> None:
    player, one = streamed(tmp_path, 3600)
    check(player, one, 3600)
    after_two_minutes = player.memory[120]
    assert max(player.memory[120:]) - after_two_minutes < 16 * 2**20, "as much as 60 s of codes, and no more"


def test_the_simulated_player_notices_gaps(monkeypatch: Patch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "process_time", lambda: now)
    slow, fast = Player(), Player()
    for _ in range(20):
        now += 0.05
        slow.write(bytes(2 * 1000))  # 1,000 samples in the time of 1,200
        fast.write(bytes(2 * 1300))
    assert slow.num_gaps > 3
    assert fast.num_gaps == 0
    assert fast.latency > slow.latency
