"""What every command-line tool shares: help that shows defaults, one-line errors, exit statuses.

A tool ends with `sys.exit(run_tool(main))`. Exit statuses: 0 success, 1 the machine failed (disk full, out of memory),
2 the user's input does not fit, 130 interrupted; a tool may return others of its own.
"""

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable

from ct_audio.common.errors import UserError

_FULL = "; make room there, then run the same command again"
_ADVICE = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: "; raise the limit (ulimit -f), then run it again"}


def build_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows the defaults; abbreviations of options are not accepted."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )


def run_tool(main: Callable[[], int | None]) -> int:
    """Run a tool's main function and turn what a user or the machine can cause into one line on stderr.

    Returns:
        the exit status for `sys.exit`: what `main` returned (None is 0), or the status of the error.
    """
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
    except OSError as error:
        return _fail(f"{error}{_ADVICE.get(error.errno or 0, '')}", 1)
    except RuntimeError as error:  # torch's own words for it
        if not re.search("can't allocate memory|out of memory", str(error)):
            raise
        return _fail(f"out of memory: {str(error).splitlines()[0]}; use less at a time", 1)


def _fail(message: str, status: int) -> int:
    line = " ".join(message.split())  # and nothing that a terminal obeys: it may quote a hostile file
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    print(f"error: {line}", file=sys.stderr)
    return status
