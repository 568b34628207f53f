"""What every package may use: holding a place alone, the number of CPUs."""

import os
from pathlib import Path

import pytest

from ct_audio.common.errors import UserError
from ct_audio.common.files import hold_alone
from ct_audio.common.machine import usable_cpus


@pytest.mark.parametrize("name", ["lock", ""])
def test_a_file_or_a_directory_is_held_by_one(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    with hold_alone(place, "busy"):
        with pytest.raises(UserError, match="busy"), hold_alone(place, "busy"):
            pass
        assert os.listdir(tmp_path) == [name][: bool(name)]
    with hold_alone(place, "busy"):
        pass


def test_a_lock_that_is_deleted_while_it_is_held_may_be_made_again(tmp_path: Path) -> None:
    with hold_alone(tmp_path / "lock", "busy"):
        (tmp_path / "lock").unlink()
        with hold_alone(tmp_path / "lock", "busy"):
            pass


def test_cpus_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    assert usable_cpus() == 2


def test_without_affinity_all_cpus_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cpus() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1
