"""What every tool shares: exit statuses and one-line errors."""

import errno
import subprocess
import sys

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
    assert "(default: 24000)" in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["--ra", "3"])
