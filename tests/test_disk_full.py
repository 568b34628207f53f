"""A disk that is full: nothing half-written is taken for whole, the message says what to do, and then it goes on.

The disk is a small tmpfs, grown when the tool has failed; mounting it takes root, and without root tests are skipped.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile_report import Row, write_section
from recordings import ROOT, voice, write
from tiny_runs import assert_same_checkpoint, tiny_run, write_corpus

from ct_audio.commands import prepare, sample
from ct_audio.commands.command_line import run_tool
from ct_audio.common.errors import UserError
from ct_audio.data.corpus import open_corpus
from ct_audio.runs.open_run import load_run_model
from ct_audio.training.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ADVICE = "; make room there, then run the same command again"
ROWS: list[Row] = []


class SmallDisk:
    """A tmpfs whose size can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def resize(self, kilobytes: int, *, first: bool = False) -> None:
        options = f"{'' if first else 'remount,'}size={kilobytes}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.path], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    try:
        disk.resize(64, first=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a tmpfs here: {error}")
    yield disk
    subprocess.run(["umount", "--lazy", disk.path], check=True)


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    yield
    if ROWS:
        write_section("disk full (tmpfs)", ROWS)


def the_only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error, which is one line that ends with advice."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line
    assert line.endswith(ADVICE)
    return line.replace(str(ROOT), "")


@pytest.mark.parametrize("kilobytes", [8, 40, 100, 180])
def test_prepare(
    kilobytes: int, disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(40):
        write(tmp_path / "source" / f"speaker{index}" / "take.wav", voice(index, 0.2))
    out = disk.path / "corpus"
    arguments = ["recipes/folder", "--source", tmp_path / "source", "--out", out, "--num-processes", 1]
    arguments[0] = ROOT / "recipes/folder"
    monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, arguments)])
    disk.resize(kilobytes)
    assert run_tool(prepare.main) == 1
    line = the_only_line(capsys)
    with pytest.raises(UserError, match="no prepared corpus"):
        open_corpus(out)
    disk.resize(8192)
    assert run_tool(prepare.main) == 0
    found = open_corpus(out, verify=True)
    monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, [*arguments[:4], tmp_path / "other"])])
    assert run_tool(prepare.main) == 0
    assert found.fingerprint == open_corpus(tmp_path / "other").fingerprint
    ROWS.append(Row(f"prepare, {kilobytes} KiB", "status 1, then goes on", "status 1, then goes on", line))


def test_checkpoints_of_training(disk: SmallDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "corpus")
    straight = tiny_run(tmp_path, name="straight", runs_dir=str(tmp_path / "runs"))
    assert train(straight) == 0
    size = sum(file.stat().st_size for file in straight.run_dir.rglob("*") if file.is_file() and not file.is_symlink())
    config = tiny_run(tmp_path, name="straight", runs_dir=str(disk.path))
    steps = set()
    for kilobytes in range(8, 4 * size // 1024, 32):
        disk.resize(kilobytes)
        if run_tool(lambda: train(config)) == 0:
            break
        line = the_only_line(capsys)
        begun = (config.run_dir / "checkpoints" / "last").exists()
        step = load_run_model(config.run_dir, which="last").step if begun else None
        steps.add(step)
        ROWS.append(Row(f"training, {kilobytes} KiB", "status 1", f"status 1: step {step} is whole", line))
    else:
        pytest.fail("the run never ended")
    assert len(steps) >= 2  # it failed before there was any checkpoint, and after
    assert_same_checkpoint(straight, config)


def test_samples(
    disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(tmp_path, train__num_steps=2)
    assert train(config) == 0
    common = ["sample.py", str(config.run_dir), "--seconds", "0.01", "--num", "2", "--threads", "1", "--out"]
    monkeypatch.setattr("sys.argv", [*common, str(tmp_path / "other")])
    assert run_tool(sample.main) in (0, 4)
    failures = 0
    for kilobytes in (8, 24, 40, 56, 72, 4096):
        disk.resize(kilobytes)
        monkeypatch.setattr("sys.argv", [*common, str(disk.path / "out"), "--resume"])
        capsys.readouterr()
        status = run_tool(sample.main)
        wavs = sorted((disk.path / "out").glob("*.wav"))
        for wav in wavs:
            assert wav.read_bytes() == (tmp_path / "other" / wav.name).read_bytes()
        if status != 1:
            break
        failures += 1
        outcome = f"status 1: {len(wavs)} wavs are whole"
        ROWS.append(Row(f"sample, {kilobytes} KiB", "status 1", outcome, the_only_line(capsys)))
    assert status in (0, 4)
    assert failures >= 2
    assert len(wavs) == 2
    assert not list((disk.path / "out").glob("*.tmp*"))
