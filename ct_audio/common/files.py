"""Small files: written whole or not at all, read with suspicion; locks."""

import contextlib
import csv
import fcntl
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ct_audio.common.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
"""The copy of the project that this package is in, with tools/ and recipes/."""


def write_file(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write beside, fsync, rename: what is at `path` is whole, whatever happens.

    Args:
        sync: False where a later check finds what a power failure has lost.
    Raises:
        OSError: it cannot be written; it names `path`, what was there is untouched and nothing lies beside.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as handle:
            handle.write(content)
            handle.flush()
            if sync:
                os.fsync(handle.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)  # it may be what fills the disk
        error.filename, error.filename2 = str(path), None
        raise


def number_in_name(value: int | float) -> str:
    """A number as a part of a file's name: short, and never that of another number of its type."""
    short = f"{value:g}"
    return short if isinstance(value, float) and float(short) == value else str(value)


def write_json(path: Path, value: Any) -> None:
    """Write JSON (UTF-8) as `write_file` does."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1)
    write_file(path, f"{text}\n".encode())


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of one set of keys, with a line of names, as `write_file` does; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def read_json(path: Path) -> Any:
    """Read JSON (UTF-8) that anybody may have written.

    Raises:
        ValueError: it is no JSON, or says NaN, infinity, a number beyond float64, or lone surrogates.
        OSError: it cannot be read, or is no plain file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no plain file {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # lone surrogates would fail where they are printed
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


@contextlib.contextmanager
def hold_alone(place: Path, busy: str) -> Iterator[None]:
    """Hold a directory, or a lock file, for this process alone; the kernel lets go of it even after kill -9.

    Args:
        place: a directory that is there, or a file, which is made where it is missing; it may be deleted while held.
    Raises:
        UserError: with the text `busy`, if another process holds it or has just deleted it.
    """
    with contextlib.ExitStack() as stack:
        try:
            handle = os.open(place, os.O_RDONLY if place.is_dir() else os.O_WRONLY | os.O_CREAT, 0o666)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(handle), place.stat())
        except (BlockingIOError, FileNotFoundError):
            is_there = False
        if not is_there:
            raise UserError(busy)
        yield


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is beyond float64")
    return float(text)
