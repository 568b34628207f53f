"""What every tool shares: exit statuses and one-line errors."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from ct_audio.commands.command_line import build_parser, run_tool
from ct_audio.common.errors import UserError


def fails_with(error):
    """A main function that raises."""

    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("expected a,\n got b"), 2, "error: expected a, got b\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (UserError("got a\x1b[2J\udcff é"), 2, "error: got a\\x1b[2J\\udcff é\n"),
        (MemoryError("8 GiB"), 1, "error: out of memory: 8 GiB; use less at a time\n"),
        (OSError(errno.ENOENT, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'\n"),
        (
            *(OSError(errno.ENOSPC, "No space left on device", "x"), 1),
            "error: [Errno 28] No space left on device: 'x'; make room there, then run the same command again\n",
        ),
        (
            *(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 1),
            "error: out of memory: DefaultCPUAllocator: can't allocate memory: you tried 9 bytes; use less at a time\n",
        ),
    ],
)
def test_errors_are_one_line(capsys, error, status, message):
    assert run_tool(fails_with(error)) == status
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "/dev/shm is full or missing"),
        (OSError(errno.ENOENT, "No such file or directory"), "/dev/shm is full or missing"),
        (OSError(errno.ENOSYS, "Function not implemented"), "/dev/shm is full or missing"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: Success (0)"), "/dev/shm is"),
        (RuntimeError("unable to write to file </torch_77_1>"), "/dev/shm is full or missing"),
        (OSError("AF_UNIX path too long"), "set TMPDIR=/tmp"),
        (RuntimeError("cannot cache function '__o_fold': no locator available for file 'x.py'"), "NUMBA_CACHE_DIR="),
    ],
)
@pytest.mark.parametrize("free", [0, None])
def test_what_the_environment_lacks_is_named(monkeypatch, capsys, error, names, free):
    """The errors are those of Python's locks and torch's tensors with a /dev/shm that is full, and of numba."""

    def usage(_path):
        if free is None:
            raise FileNotFoundError
        return shutil._ntuple_diskusage(10, 10 - free, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert run_tool(fails_with(error)) == 1
    message = capsys.readouterr().err
    assert names in message
    assert message.count("\n") == 1


def test_a_full_disk_is_not_blamed_on_shared_memory(monkeypatch, capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "x")
    for free, error in ((0, full), (2**30, OSError(errno.ENOSPC, "No space left on device"))):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(2**30, 0, free))
        assert run_tool(fails_with(error)) == 1
        assert "shm" not in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_without_the_characters_gets_escapes(environment):
    """The work is done by then; what is printed must not fail."""
    code = textwrap.dedent(
        r"""
        import sys
        from ct_audio.commands.command_line import run_tool
        from ct_audio.common.errors import UserError

        def main():
            print("caf\u00e9 \udcff")
            print("\u266b", file=sys.stderr)
            raise UserError("no \u00e9")

        sys.exit(run_tool(main))
        """
    )
    environment = {"PYTHONCOERCECLOCALE": "0"} | environment
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | environment)
    assert result.returncode == 2
    assert result.stdout == b"caf\\xe9 \\udcff\n"
    assert result.stderr == b"\\u266b\nerror: no \\xe9\n"


@pytest.mark.distributed
def test_every_module_can_be_imported_without_what_linux_alone_has():
    """macOS has no sched_getaffinity, Windows no fcntl, resource and SIGUSR1."""
    code = textwrap.dedent(
        """
        import importlib, os, pkgutil, signal, sys

        sys.modules["fcntl"] = sys.modules["resource"] = None
        del os.sched_getaffinity, signal.SIGUSR1
        import ct_audio

        for module in pkgutil.walk_packages(ct_audio.__path__, "ct_audio."):
            if module.name != "ct_audio.agents.rllib":  # its classes are those of ray, an extra
                importlib.import_module(module.name)
        from ct_audio.common.machine import usable_cpus
        from ct_audio.common.signals import SIGNALS
        from ct_audio.runs.metrics import memory_use_mib

        print(len(SIGNALS), memory_use_mib(), usable_cpus() > 0)
        """
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "2 {} True\n"


def test_success_and_own_statuses():
    assert run_tool(lambda: None) == 0
    assert run_tool(lambda: 4) == 4


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_tool(fails_with(ZeroDivisionError()))


@pytest.mark.distributed
def test_a_closed_pipe_is_quiet():
    code = (
        "import sys; from ct_audio.commands.command_line import run_tool; "
        "sys.exit(run_tool(lambda: print('x' * 10**6)))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""


def test_help_shows_defaults():
    parser = build_parser("What it does.")
    parser.add_argument("--rate", type=int, default=24_000, help="a rate")
    parser.add_argument("--rates", type=int, nargs="+", default=[2, 3], help="some of them")
    parser.add_argument("--out", help="default: RUN/scores")
    parser.add_argument("--json", action="store_true", help="print JSON")
    shown = parser.format_help()
    assert "a rate (default: 24000)" in shown
    assert "(default: 2 3)" in shown
    assert shown.count("(default") == 2  # nothing of None and False
    with pytest.raises(SystemExit):
        parser.parse_args(["--ra", "3"])
