"""A sampling on disk: what is damaged gives one clear line, what is killed between two files leaves a whole state."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from handmade_runs import Patch

from ct_audio.common.errors import UserError
from ct_audio.sampling import resume
from ct_audio.sampling.resume import (
    SavedSampling,
    directory_lock,
    load_sampling,
    mark_complete,
    read_header,
    require_no_unfinished,
    require_same_settings,
    save_sampling,
)

SETTINGS = {"seed": 3, "temperature": 0.9, "top_k": None}


def saved_sampling(num_codes: int = 5) -> SavedSampling:
    generator = torch.Generator().manual_seed(num_codes)
    codes = torch.randint(256, (2, num_codes), generator=generator)
    leaves = {"num_codes": num_codes, "step/rows": torch.rand(2, 3, generator=generator), "step/none": None}
    return SavedSampling(SETTINGS, False, codes, torch.rand(2, num_codes, generator=generator), leaves)


def assert_same(found: SavedSampling | None, expected: SavedSampling) -> None:
    assert found is not None
    assert found.settings == expected.settings
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.log_probabilities, expected.log_probabilities)
    assert found.leaves.keys() == expected.leaves.keys()
    for name, leaf in expected.leaves.items():
        assert torch.equal(found.leaves[name], leaf) if isinstance(leaf, torch.Tensor) else found.leaves[name] == leaf


def tensors_file(directory: Path) -> Path:
    (file,) = directory.glob("sampling-*.safetensors")
    return file


def change_header(directory: Path, *, sign: bool, **changes: Any) -> None:
    """Other values in sampling.json, with a digest that fits or not; None deletes a key."""
    header = json.loads((directory / "sampling.json").read_text()) | changes
    header = {key: value for key, value in header.items() if value is not None and key != "digest"}
    text = json.dumps(header, sort_keys=True) if sign else "other"
    digest = hashlib.sha256(text.encode()).hexdigest()
    (directory / "sampling.json").write_text(json.dumps(header | {"digest": digest}))


def test_what_is_saved_comes_back_and_the_state_before_goes(tmp_path: Path) -> None:
    assert load_sampling(tmp_path) is None
    require_no_unfinished(tmp_path)
    for num_codes in (5, 9):
        save_sampling(tmp_path, saved_sampling(num_codes))
        assert_same(load_sampling(tmp_path), saved_sampling(num_codes))
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match="unfinished sampling of 9 codes a lane; add --resume"):
        require_no_unfinished(tmp_path)
    mark_complete(tmp_path)
    require_no_unfinished(tmp_path)
    found = load_sampling(tmp_path)
    assert found is not None
    assert found.complete
    assert_same(found, saved_sampling(9))


@pytest.mark.parametrize("num_writes", [0, 1])
def test_a_save_that_is_cut_off_leaves_the_one_before(num_writes: int, tmp_path: Path, monkeypatch: Patch) -> None:
    save_sampling(tmp_path, saved_sampling(5))
    write, written = resume.write_file, []

    def full_disk(path: Path, content: bytes) -> None:
        if len(written) == num_writes:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        write(path, content)

    monkeypatch.setattr(resume, "write_file", full_disk)
    monkeypatch.setattr(resume, "write_json", lambda path, value: full_disk(path, json.dumps(value).encode()))
    with pytest.raises(OSError, match="No space"):
        save_sampling(tmp_path, saved_sampling(9))
    assert_same(load_sampling(tmp_path), saved_sampling(5))
    monkeypatch.undo()
    save_sampling(tmp_path, saved_sampling(9))
    assert_same(load_sampling(tmp_path), saved_sampling(9))
    assert len(list(tmp_path.iterdir())) == 2  # what the broken one left is cleared away


def test_truncation_anywhere_and_any_other_byte_is_found(tmp_path: Path) -> None:
    save_sampling(tmp_path, saved_sampling())
    for file in (tensors_file(tmp_path), tmp_path / "sampling.json"):
        whole = file.read_bytes().rstrip(b"\n")
        cuts = [whole[:length] for length in range(0, len(whole), 7)]
        other = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(0, len(whole), 11)]
        for content in (*cuts, whole + b"\0", *other):
            file.write_bytes(content)
            with pytest.raises(UserError, match="state of its sampling is damaged") as caught:
                load_sampling(tmp_path)
            assert "\n" not in str(caught.value)
        file.unlink()
        if file.name == "sampling.json":
            assert load_sampling(tmp_path) is None
        else:
            with pytest.raises(UserError, match=r"cannot be read: .*bring it back, or delete"):
                load_sampling(tmp_path)
        file.write_bytes(whole)
    assert_same(load_sampling(tmp_path), saved_sampling())


@pytest.mark.parametrize(
    ("changes", "sign", "message"),
    [
        ({"num_codes": 6}, False, "digest"),
        ({"format": "other"}, True, "expected ct_audio sampling, version 1"),
        ({"format_version": 2}, True, "expected ct_audio sampling, version 1"),
        ({"file": "../sampling-0123456789abcdef.safetensors"}, True, "name of the tensors"),
        ({"file": None}, True, "file"),
        ({"values": [1]}, True, "values"),
        ({"complete": "yes"}, True, "complete"),
        ({"values": {"num_codes": 6}}, True, "do not fit"),
    ],
)
def test_a_header_that_was_tampered_with(changes: dict[str, Any], sign: bool, message: str, tmp_path: Path) -> None:
    save_sampling(tmp_path, saved_sampling())
    change_header(tmp_path, sign=sign, **changes)
    with pytest.raises(UserError, match=message):
        load_sampling(tmp_path)


def test_tensors_that_are_others_with_a_hash_that_fits(tmp_path: Path) -> None:
    save_sampling(tmp_path, saved_sampling())
    file = tensors_file(tmp_path)
    tensors = safetensors.torch.load(file.read_bytes())
    fewer = {name: tensor for name, tensor in tensors.items() if name != "codes"}
    for content in (b"no safetensors", safetensors.torch.save(fewer)):
        file.write_bytes(content)
        change_header(tmp_path, sign=True, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        with pytest.raises(UserError, match="damaged"):
            load_sampling(tmp_path)


def test_settings_that_differ_are_all_named(tmp_path: Path) -> None:
    saved = saved_sampling()
    require_same_settings(tmp_path, saved, dict(SETTINGS))
    with pytest.raises(UserError, match=r"seed \(was 3, now 4\), top_p \(was None, now 0.5\); resume with those"):
        require_same_settings(tmp_path, saved, SETTINGS | {"seed": 4, "top_p": 0.5})


def test_a_directory_is_held_by_one(tmp_path: Path) -> None:
    with (
        directory_lock(tmp_path),
        pytest.raises(UserError, match="another process samples to"),
        directory_lock(tmp_path),
    ):
        pass
    with directory_lock(tmp_path):
        assert read_header(tmp_path) is None
    assert not list(tmp_path.iterdir())
