"""What all commands share: a parser whose help shows defaults, common options, one-line errors, exit statuses.

The program `ct-audio` and the scripts of tools/ end with `sys.exit(run_tool(main))`. Exit statuses: 0 success, 1 the
machine failed (disk full, out of memory), 2 the user's input does not fit, 130 interrupted; a command may return others
of its own.
Modules of this package import torch and the like inside of functions, so that --help is there at once.
"""

import argparse
import contextlib
import errno
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ct_audio.common.errors import UserError
from ct_audio.common.recipes import model_folder

_FULL = "; make room there, then run the same command again"
_ADVICE = {errno.ENOSPC: _FULL, errno.EFBIG: "; raise the limit (ulimit -f), then run it again"}
_ADVICE |= {getattr(errno, "EDQUOT", errno.ENOSPC): _FULL}  # Windows has no quotas
_SHARED_MEMORY = "/dev/shm"  # where processes lock and share on Linux; its errors name no file
_NO_SHARED_MEMORY = f"{{}}; {_SHARED_MEMORY} is full or missing: empty it or enlarge it (in Docker --shm-size=1g)"
_CAUSES = {  # what errors of the environment do not say, by a pattern of what they say
    r"can't allocate memory|out of memory": "out of memory: {}; use less at a time",
    r"shared memory|</torch_": _NO_SHARED_MEMORY,
    r"AF_UNIX path too long": "{}; the path of the folder for temporary files is too long: set TMPDIR=/tmp",
    r"no locator available": "{}; numba cannot write its cache: set NUMBA_CACHE_DIR=FOLDER, one that you can write to",
}


class ParserOnly(Exception):  # noqa: N818 (it says what was asked for)
    """Raised in place of parsing under `parsers_only`; `parser` has all options."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: none of flags and of what is left out, lists as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default in ([], ""):
            return action.help
        if isinstance(default, list):
            return f"{action.help} (default: {' '.join(map(str, default)).replace('%', '%%')})"
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    is_wanted = False

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        if _Parser.is_wanted:
            raise ParserOnly(self)
        return super().parse_known_args(*arguments, **options)


@contextlib.contextmanager
def parsers_only() -> Iterator[None]:
    """Commands raise `ParserOnly` with their parser in place of parsing: for a shell's completion."""
    _Parser.is_wanted = True
    try:
        yield
    finally:
        _Parser.is_wanted = False


def build_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows the defaults; abbreviations of options are not accepted."""
    return _Parser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)


def parse(parser: argparse.ArgumentParser, words: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line (None: this process's); `given` of the result holds the options on it, as "--out"."""
    arguments = parser.parse_args(words)
    missing: list[Any] = []  # a list, so that what appends to its default appends to a copy
    parser.set_defaults(**dict.fromkeys(vars(arguments), missing))
    found = vars(parser.parse_args(words)).items()
    arguments.given = {f"--{name.replace('_', '-')}" for name, value in found if value is not missing}
    return arguments


def refuse(arguments: argparse.Namespace, *options: str, why: str, unless: bool = False) -> None:
    """An option that would do nothing is an error.

    Args:
        arguments: of `parse`.
        options: as "--out".
        why: what they need, or what makes them useless.
        unless: True where they do something.
    Raises:
        UserError: one of them was given.
    """
    found = [option for option in options if option in arguments.given]
    if found and not unless:
        raise UserError(f"{', '.join(found)}: {why}")


def refuse_twice(arguments: argparse.Namespace, *names: str) -> None:
    """Raise `UserError` where a list of values, by its name in `arguments`, has one twice."""
    for name in names:
        values = getattr(arguments, name)
        if len(set(values)) < len(values):
            raise UserError(f"--{name}: {values} has a value twice")


def refuse_overrides(overrides: list[str], own_keys: Iterable[str]) -> None:
    """Raise `UserError` where overrides name a key that the command sets in every run itself."""
    for override in overrides:
        if override.split("=")[0].strip() in own_keys:
            raise UserError(f"{override}: the command sets it itself in every run; leave it out")


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """The model that a command opens: a run, one of its checkpoints, an exported folder, or a model that is shipped."""
    which = "directory of a run, as runs/NAME, of a checkpoint, or exported; or a shipped model, as kathleen/wavenet"
    parser.add_argument("run", type=model_folder, help=which)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of a command that opens one run, see `open_run`."""
    add_run_argument(parser)
    parser.add_argument(
        "--checkpoint", choices=["best", "last"], default="best", help="best by validation NLL, or last"
    )
    add_device_options(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Where to compute, see `open_device`."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: torch's default")


def add_corpus_options(parser: argparse.ArgumentParser) -> None:
    """The options of a command that reads a run's corpus, see `open_corpus`."""
    parser.add_argument("--corpus", metavar="DIR", help="prepared corpus; default: the one that the run was trained on")
    parser.add_argument("--allow-other-corpus", action="store_true", help="go on if the corpus holds other codes")


def open_device(arguments: argparse.Namespace) -> Any:
    """The torch.device of `add_device_options`."""
    from ct_audio.runs.device import set_up_device

    if arguments.threads < 0:
        raise UserError(f"--threads: expected at least 0, got {arguments.threads}")
    return set_up_device(arguments.device, num_threads=arguments.threads)


def open_run(arguments: argparse.Namespace) -> Any:
    """The `LoadedRun` of `add_run_options`."""
    from ct_audio.runs.open_run import load_run_model

    return load_run_model(arguments.run, which=arguments.checkpoint, device=open_device(arguments))


def output_directory(arguments: argparse.Namespace, run: Any, name: str) -> Path:
    """Where a command writes: --out, else the folder `name` of the run.

    Raises:
        UserError: --out was not given, and the model is one that was handed on: its folder stays as it is.
    """
    if arguments.out is not None:
        return arguments.out
    if run.run_dir is None:
        raise UserError(f"--out: expected a directory for what is written; {arguments.run} is a model without a run")
    return run.run_dir / name


def open_corpus(arguments: argparse.Namespace, run: Any) -> Any:
    """The `Corpus` of `add_corpus_options`."""
    from ct_audio.runs.open_run import run_corpus

    return run_corpus(run, arguments.corpus, allow_other=arguments.allow_other_corpus)


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


def _as_called(text: str) -> str:
    """Advice that can be pasted: where a script of tools/ runs, `ct-audio COMMAND` becomes the script beside it."""
    called = Path(sys.argv[0])

    def script(match: re.Match[str]) -> str:
        file = called.with_name(f"{match[1].replace('-', '_')}.py")
        return shlex.join(["python", str(file)]) if file.is_file() else match[0]

    return re.sub(r"\bct-audio ([a-z]+(?:-[a-z]+)*)", script, text) if called.suffix == ".py" else text


def _fail(message: str, status: int) -> int:
    line = " ".join(_as_called(message).split())  # and nothing that a terminal obeys: it may quote a hostile file
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    print(f"error: {line}", file=sys.stderr)
    return status
