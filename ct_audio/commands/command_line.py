"""What every command-line tool shares: help that shows defaults, one-line errors, exit statuses.

A tool ends with `sys.exit(run_tool(main))`. Exit statuses: 0 success, 1 the machine failed (disk full, out of memory),
2 the user's input does not fit, 130 interrupted; a tool may return others of its own.
"""

import argparse
import errno
import io
import os
import re
import shutil
import sys
from collections.abc import Callable

from ct_audio.common.errors import UserError

_FULL = "; make room there, then run the same command again"
_ADVICE = {errno.ENOSPC: _FULL, errno.EFBIG: "; raise the limit (ulimit -f), then run it again"}
_ADVICE |= {getattr(errno, "EDQUOT", errno.ENOSPC): _FULL}  # Windows has no quotas
_SHARED_MEMORY = "/dev/shm"  # where processes lock and share on Linux; its errors name no file
_NO_SHARED_MEMORY = f"{{}}; {_SHARED_MEMORY} is full or missing: empty it or enlarge it (in Docker --shm-size=1g)"
_CAUSES = {  # what errors of the environment do not say, by a pattern of what they say
    r"can't allocate memory|out of memory": "out of memory: {}; use less at a time",
    r"shared memory|</torch_": _NO_SHARED_MEMORY,
    r"AF_UNIX path too long": "{}; the path of the folder for temporary files is too long: set TMPDIR=/tmp",
    r"no locator available": "{}; numba cannot write its cache: set NUMBA_CACHE_DIR=/tmp/numba, or another such folder",
}


def build_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows the defaults; abbreviations of options are not accepted."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )


def run_tool(main: Callable[[], int | None]) -> int:
    """Run a tool's main function and turn what a user or the machine can cause into one line on stderr.

    What the terminal's encoding has no character for is printed as in a Python string.

    Returns:
        the exit status for `sys.exit`: what `main` returned (None is 0), or the status of the error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # whoever read our output has gone: quiet, and no second error when Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except MemoryError as error:
        return _fail(f"out of memory: {error}; use less at a time", 1)
    except (OSError, RuntimeError) as error:
        message = _with_cause(error)
        if message is None:
            raise
        return _fail(message, 1)


def _with_cause(error: OSError | RuntimeError) -> str | None:
    """What the machine says, and what is behind it; None for a RuntimeError of the program's own."""
    for pattern, text in _CAUSES.items():
        if re.search(pattern, str(error)):
            return text.format(str(error).splitlines()[0])
    if isinstance(error, RuntimeError):
        return None
    if error.filename is None and error.errno in (errno.ENOSPC, errno.ENOENT, errno.ENOSYS) and _lacks_shared_memory():
        return _NO_SHARED_MEMORY.format(error)
    return f"{error}{_ADVICE.get(error.errno or 0, '')}"


def _lacks_shared_memory() -> bool:
    try:
        return sys.platform == "linux" and shutil.disk_usage(_SHARED_MEMORY).free < 2**16
    except OSError:
        return True


def _fail(message: str, status: int) -> int:
    line = " ".join(message.split())  # and nothing that a terminal obeys: it may quote a hostile file
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    print(f"error: {line}", file=sys.stderr)
    return status
