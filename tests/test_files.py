"""Holding a directory or a lock file alone."""

import os
from pathlib import Path

import pytest

from ct_audio.common.errors import UserError
from ct_audio.common.files import hold_alone


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
