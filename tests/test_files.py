"""Locks, links and the sync of directories, also where a file system or the system itself has none (emulated)."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ct_audio.common.errors import UserError
from ct_audio.common.files import follow_link, hold_alone, switch_link, sync_directory, write_file


@pytest.mark.parametrize("name", ["lock", ""])
def test_a_file_or_a_directory_is_held_by_one(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    with hold_alone(place, "busy"):
        with pytest.raises(UserError, match="busy"), hold_alone(place, "busy"):
            pass
        assert os.listdir(tmp_path) == [name or ".lock"]
    assert os.listdir(tmp_path) == [name][: bool(name)]
    with hold_alone(place, "busy"):
        pass


def test_a_lock_that_is_deleted_while_it_is_held_may_be_made_again(tmp_path: Path) -> None:
    with hold_alone(tmp_path / "lock", "busy"):
        (tmp_path / "lock").unlink()
        with hold_alone(tmp_path / "lock", "busy"):
            pass


def refuse(number: int) -> Any:
    """A function of the file system that answers with an error."""

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("name", ["lock", ""])
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, None])
def test_without_locks_a_warning_of_one_line_and_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, number: int | None
) -> None:
    """A network drive, and Windows, where there is no fcntl at all."""
    if number is None:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", refuse(number))
    with hold_alone(tmp_path / name, "busy"):
        pass
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert warning.startswith(f"warning: cannot lock {tmp_path / (name or '.lock')}: ")


@pytest.mark.parametrize("name", ["lock", ""])
def test_only_what_may_be_written_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """NFS answers EBADF to a lock of a descriptor that is open for reading."""
    import fcntl

    def flock(handle: int, _operation: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr("fcntl.flock", flock)
    with hold_alone(tmp_path / name, "busy"):
        pass


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_other_errors_of_a_lock_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr("fcntl.flock", refuse(number))
    with pytest.raises(OSError, match=os.strerror(number)), hold_alone(tmp_path / "lock", "busy"):
        pass


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_directory_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr("os.fsync", refuse(number))
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            sync_directory(tmp_path)
    else:
        sync_directory(tmp_path)
    monkeypatch.setattr("os.open", refuse(errno.EACCES))  # Windows opens no directory
    sync_directory(tmp_path)


@pytest.mark.parametrize("number", [None, errno.EPERM, errno.ENOTSUP, errno.EACCES])
def test_a_link_or_a_file_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    """Also over a link that is there already: another file system, other rights."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    switch_link(tmp_path / "last", "a")
    if number is not None:
        monkeypatch.setattr("os.symlink", refuse(number))
    switch_link(tmp_path / "last", "b")
    assert (tmp_path / "last").is_symlink() == (number is None)
    assert follow_link(tmp_path / "last").resolve() == tmp_path / "b"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "last"]
    monkeypatch.undo()
    switch_link(tmp_path / "last", "a")
    assert (tmp_path / "last").resolve() == tmp_path / "a"


def test_a_full_disk_keeps_the_link_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch_link(tmp_path / "last", "a")
    monkeypatch.setattr("os.symlink", refuse(errno.ENOSPC))
    monkeypatch.setattr("os.fsync", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        switch_link(tmp_path / "last", "b")
    assert os.listdir(tmp_path) == ["last"]
    assert os.readlink(tmp_path / "last") == "a"


def test_content_may_come_in_parts(tmp_path: Path) -> None:
    write_file(tmp_path / "x", (bytes([value]) * 3 for value in b"abc"))
    assert (tmp_path / "x").read_bytes() == b"aaabbbccc"
