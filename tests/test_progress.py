"""Lines of long stages where stderr is no terminal."""

import io
import time

import pytest
from handmade_runs import Output, Patch

from ct_audio.common import progress
from ct_audio.common.progress import Progress


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self, patch: Patch) -> None:
        self.now = 100.0
        patch.setattr(progress.time, "monotonic", lambda: self.now)


def test_a_short_stage_writes_nothing(monkeypatch: Patch, capsys: Output) -> None:
    clock = Clock(monkeypatch)
    for _ in Progress(range(10), desc="validate", unit="code"):
        clock.now += 0.9
    assert capsys.readouterr().err == ""


def test_a_long_stage_says_so_with_an_estimate_and_then_once_a_minute(monkeypatch: Patch, capsys: Output) -> None:
    clock = Clock(monkeypatch)
    assert len(list(_slowly(Progress(range(100), total=100, desc="validating 9.5 s of audio"), clock))) == 100
    assert capsys.readouterr().err.splitlines() == [
        "validating 9.5 s of audio: 5%, about 190 s left".replace("190 s", "3 min"),
        "validating 9.5 s of audio: 35%, about 2 min left",
        "validating 9.5 s of audio: 65%, about 70 s left",
        "validating 9.5 s of audio: 95%, about 10 s left",
    ]


def _slowly(items: Progress, clock: Clock):
    for item in items:
        clock.now += 2.0
        yield item


def test_what_was_there_before_is_not_counted_as_speed(monkeypatch: Patch, capsys: Output) -> None:
    clock = Clock(monkeypatch)
    with Progress(total=100, initial=50, desc="prepare", unit="file") as bar:
        clock.now += 10
        bar.update(5)
    assert capsys.readouterr().err == "prepare: 55%, about 90 s left\n"


def test_the_very_first_of_it_gives_no_estimate(monkeypatch: Patch, capsys: Output) -> None:
    """It may have waited for a compiler: 10 s for a millionth are not 100 days."""
    clock = Clock(monkeypatch)
    with Progress(total=1_000_000, desc="sample", unit="code") as bar:
        clock.now += 10
        bar.update(1)
        clock.now += 60
        bar.update(99_999)
    assert capsys.readouterr().err == "sample: 0%\nsample: 10%, about 10 min left\n"


def test_without_a_total_it_counts(monkeypatch: Patch, capsys: Output) -> None:
    clock = Clock(monkeypatch)
    with Progress(desc="hash", unit="file") as bar:
        clock.now += 11
        bar.update(1234)
    assert capsys.readouterr().err == "hash: 1,234 so far\n"


def test_quiet_is_quiet(monkeypatch: Patch, capsys: Output) -> None:
    clock = Clock(monkeypatch)
    with Progress(total=2, desc="x", quiet=True) as bar:
        clock.now += 1000
        bar.update(1)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: Patch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    for _ in Progress(range(3), desc="validate", file=terminal, mininterval=0):
        time.sleep(0.001)
    assert "validate: 100%" in terminal.getvalue()
    assert "left" not in terminal.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (119, "119 s"), (900, "15 min"), (7200, "2.0 h")])
def test_times_are_readable(seconds: float, text: str) -> None:
    assert progress._time(seconds) == text
