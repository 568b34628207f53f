"""ct-audio doctor: what it finds in a healthy place, and each known breakage with its cure."""

import builtins
import importlib
import importlib.metadata
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import pytest
import soundfile
import torch
import torchaudio
from handmade_runs import tool

from ct_audio.commands import doctor
from ct_audio.commands.doctor import checks, run_check

Patch = pytest.MonkeyPatch
QUICK = checks(Path("runs"), quick=True)
GIB = 2**30


def finding(name: str, runs_dir: Path | None = None) -> dict[str, str]:
    check = QUICK[name] if runs_dir is None else checks(runs_dir, quick=True)[name]
    return vars(run_check(name, check))


def usage(free: int) -> Callable[[Any], Any]:
    return lambda _: SimpleNamespace(total=GIB, used=GIB - free, free=free)


def refuse_import(patch: Patch, name: str, message: str) -> None:
    """Importing a module fails as it would where it is broken."""
    real = builtins.__import__

    def fails(wanted: str, *others: Any) -> Any:
        if wanted == name:
            raise ImportError(message)
        return real(wanted, *others)

    patch.setattr(builtins, "__import__", fails)


def python(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(sys, "version_info", (3, 10, 2))


def old_package(patch: Patch, tmp_path: Path) -> None:
    real = importlib.metadata.version
    patch.setattr(doctor, "distribution", lambda _: SimpleNamespace(requires=["numpy<3", 'pytest>9; extra == "test"']))
    patch.setattr(doctor, "version", lambda name: "1.26.0" if name == "pytest" else real(name))
    assert finding("packages")["found"] == f"1 requirements of ct_audio {doctor.__version__}"
    patch.setattr(doctor, "distribution", lambda _: SimpleNamespace(requires=["einops>=0.8", "numpy>=2.2,<3"]))
    patch.setattr(doctor, "version", lambda name: "1.26.0" if name == "numpy" else real(name))


def missing_package(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(doctor, "distribution", lambda _: SimpleNamespace(requires=["no-such-package>=1"]))


def not_installed(patch: Patch, tmp_path: Path) -> None:
    def distribution(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    patch.setattr(doctor, "distribution", distribution)


def no_pair(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(torchaudio, "__version__", "2.9.1+cpu")
    patch.setattr(torch, "__version__", "2.11.0")


def broken_torchaudio(patch: Patch, tmp_path: Path) -> None:
    refuse_import(patch, "torchaudio", "libtorchaudio.so: undefined symbol: _ZN3c10")


def no_pkg_resources(patch: Patch, tmp_path: Path) -> None:
    real = importlib.import_module

    def fails(name: str) -> Any:
        if name == "tensorboard.default":
            raise ImportError("No module named 'pkg_resources'")
        return real(name)

    patch.setattr(importlib, "import_module", fails)


def old_libsndfile(patch: Patch, tmp_path: Path) -> None:
    real = soundfile.write

    def write(file: Any, *others: Any, **options: Any) -> None:
        if options["subtype"] == "MPEG_LAYER_III":
            raise ValueError("Unknown subtype")
        real(file, *others, **options)

    patch.setattr(soundfile, "write", write)


def no_numba_cache(patch: Patch, tmp_path: Path) -> None:
    def njit(**_: Any) -> None:
        raise RuntimeError("cannot cache function '_add': no locator available for file 'x.py'")

    patch.setattr(numba, "njit", njit)


def no_recipes(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(doctor, "RECIPES", None)


def driver_without_cuda(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(doctor, "_driver", lambda: "470.1")
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setattr(torch.version, "cuda", "13.0")


def cpu_build(patch: Patch, tmp_path: Path) -> None:
    driver_without_cuda(patch, tmp_path)
    patch.setattr(torch.version, "cuda", None)


def old_gpu(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)


def many_threads(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(torch, "get_num_threads", lambda: 64)
    patch.setattr(doctor, "usable_cpus", lambda: 2)


def little_memory(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(Path, "read_text", lambda _: "MemTotal:  9 kB\nMemAvailable:  1048576 kB\n")


def full_disk(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(shutil, "disk_usage", usage(2**20))


def nearly_full_disk(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(shutil, "disk_usage", usage(GIB))


def no_links_and_locks(patch: Patch, tmp_path: Path) -> None:
    def fails(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    patch.setattr(Path, "symlink_to", fails)
    patch.setattr("fcntl.flock", fails)


def read_only(patch: Patch, tmp_path: Path) -> None:
    def fails(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    patch.setattr(tempfile, "TemporaryDirectory", fails)


def no_shared_memory(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(shutil, "disk_usage", usage(2**20))


def long_temporary_folder(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(tempfile, "gettempdir", lambda: "/" + "long" * 20)


def ascii_terminal(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(sys, "stdout", SimpleNamespace(encoding="ANSI_X3.4-1968"))


def a_bug(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(doctor, "usable_cpus", lambda: 1 / 0)


@pytest.mark.parametrize(
    ("name", "breaks", "status", "found", "cure"),
    [
        ("python", python, "failed", "expected 3.11 to 3.13", "make a new environment"),
        ("packages", old_package, "failed", "numpy 1.26.0, expected <3,>=2.2", 'pip install "numpy<3,>=2.2"'),
        ("packages", missing_package, "failed", "no-such-package none", '"no-such-package>=1"'),
        ("packages", not_installed, "warning", "not installed", "pip install --editable ."),
        ("torch", no_pair, "failed", "torch 2.11.0, torchaudio 2.9.1+cpu: not a pair", '"torchaudio>=2.11,<2.12"'),
        ("torch", broken_torchaudio, "failed", "undefined symbol", "pip install --force-reinstall"),
        ("tensorboard", no_pkg_resources, "failed", "pkg_resources", '"setuptools<81" "tensorboard>=2.21"'),
        ("audio formats", old_libsndfile, "warning", "cannot read mp3", "pip install --force-reinstall soundfile"),
        ("numba", no_numba_cache, "failed", "cannot write its cache", "NUMBA_CACHE_DIR=FOLDER"),
        ("recipes", no_recipes, "failed", "no recipes", "install the wheel again"),
        ("gpu", driver_without_cuda, "warning", "driver 470.1, but torch finds no device", "update the driver"),
        ("gpu", cpu_build, "warning", "built for CPUs only", "take torch from PyPI"),
        ("bfloat16", old_gpu, "warning", "no bfloat16", "train.precision=float32"),
        ("processors", many_threads, "warning", "64 threads on 2 usable cores", "OMP_NUM_THREADS=2"),
        ("memory", little_memory, "warning", "1.0 GiB free", "end other programs"),
        ("disk", full_disk, "failed", "0.0 GiB free", "make room"),
        ("disk", nearly_full_disk, "warning", "1.0 GiB free", "make room"),
        ("writing", no_links_and_locks, "warning", "can be written", "no locks: let only one process"),
        ("writing", read_only, "failed", "Read-only file system", "runs_dir=FOLDER"),
        ("temporary files", no_shared_memory, "warning", "in /dev/shm", "--shm-size=1g"),
        ("temporary files", long_temporary_folder, "warning", "too long for the sockets", "set TMPDIR=/tmp"),
        ("locale", ascii_terminal, "warning", "terminal ANSI_X3.4-1968", "set LC_ALL=C.UTF-8"),
        ("processors", a_bug, "failed", "ZeroDivisionError: division by zero", "report it"),
    ],
)
def test_a_breakage_is_named_with_its_cure(
    name: str, breaks: Callable[[Patch, Path], None], status: str, found: str, cure: str, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        breaks(patch, tmp_path)
        result = finding(name, tmp_path)
    assert result["status"] == status
    assert found in result["found"]
    assert cure in result["cure"]


def test_a_healthy_place_has_no_faults_and_a_broken_one_hides_nothing(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: "")
    call = tool("doctor", monkeypatch)
    assert call("--quick", "--json", "--runs-dir", tmp_path / "not" / "yet") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is_well"]
    assert [entry["name"] for entry in report["checks"]] == list(QUICK)
    assert {entry["status"] for entry in report["checks"]} <= {"ok", "warning"}
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(doctor, "RECIPES", None)
    assert call("--quick") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "1 failed, " in lines[-1]
    assert lines[-1].endswith("; first repair recipes")
    assert [line[:8] for line in lines if "recipes" in line] == ["failed  ", "1 failed"]
    assert sum(line.startswith(("ok", "warning", "failed")) for line in lines) == len(QUICK)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_speeds_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    for name, check in checks(Path("runs"), quick=False).items():
        if name not in QUICK:
            result = run_check(name, check)
            assert result.status in ("ok", "warning"), result
            assert float(result.found.split()[0].replace(",", "")) > 1
    assert capsys.readouterr().err == ""  # nothing of what a benchmark of all steppers would say
