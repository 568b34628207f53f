"""Small files: written whole or not at all, read with suspicion; links and locks, also where a file system has none."""

import contextlib
import csv
import errno
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ct_audio.common.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
"""The copy of the project that this package is in, with tools/ and recipes/."""

_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
"""What network and cloud file systems answer to a lock, or to fsync of a directory, that they do not have."""


def write_file(path: Path, content: bytes | Iterable[bytes], *, sync: bool = True) -> None:
    """Write beside, fsync, rename: what is at `path` is whole, whatever happens.

    Args:
        content: all of it, or its parts in order.
        sync: False where a later check finds what a power failure has lost.
    Raises:
        OSError: it cannot be written; it names `path`, what was there is untouched and nothing lies beside.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as handle:
            handle.writelines([content] if isinstance(content, bytes) else content)
            handle.flush()
            if sync:
                os.fsync(handle.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)  # it may be what fills the disk
        error.filename, error.filename2 = str(path), None
        raise


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to disk; nothing is done where the system cannot (network drives, Windows)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no directory
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(handle)


def switch_link(link: Path, target: str) -> None:
    """Let `link` lead to its sibling `target` from one instant on.

    It is a symbolic link, or a file that holds the name where there are none (mounted cloud drives, Windows).
    """
    beside = link.with_name(f"{link.name}.tmp")
    beside.unlink(missing_ok=True)
    try:
        beside.symlink_to(target, target_is_directory=True)
    except (OSError, NotImplementedError):  # a full disk refuses the file too
        write_file(beside, f"{target}\n".encode())
    beside.replace(link)
    sync_directory(link.parent)


def follow_link(link: Path) -> Path:
    """Where a link of `switch_link` leads; anything else is returned as it is. What it says is not checked."""
    if link.is_symlink() or not link.is_file():
        return link
    with link.open("rb") as handle:
        return link.parent / os.fsdecode(handle.read(64).strip())


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

    Where the system or the file system has no locks, a warning on stderr says so, and nothing is held.

    Args:
        place: a directory that is there (the file .lock in it is locked), or a file, which is made where it is missing;
            it may be deleted while held.
    Raises:
        UserError: with the text `busy`, if another process holds it or has just deleted it.
    """
    is_directory = place.is_dir()
    file = place / ".lock" if is_directory else place
    with contextlib.ExitStack() as stack:
        try:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)  # NFS locks only what may be written
            stack.callback(os.close, handle)
            _lock(handle, file)
            is_there = os.path.samestat(os.fstat(handle), file.stat())
        except (BlockingIOError, FileNotFoundError):
            is_there = False
        if not is_there:
            raise UserError(busy)
        if is_directory and os.name != "nt":
            stack.callback(file.unlink, missing_ok=True)
        yield


def _lock(handle: int, file: Path) -> None:
    """Lock an open file or raise `BlockingIOError`; where that cannot be done, warn."""
    try:
        import fcntl  # missing on Windows

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NOT_SUPPORTED:
            raise
        why = f"cannot lock {file}: {getattr(error, 'strerror', None) or 'this system has no flock'}"
        print(f"warning: {why}; see to it that no other process works in that folder", file=sys.stderr, flush=True)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is beyond float64")
    return float(text)
