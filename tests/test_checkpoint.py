"""Checkpoints: exact, atomic at every instant, and one clear error for everything that does not fit."""

import errno
import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_MODELS
from tiny_runs import checkpoint_tensors, tiny_run

from ct_audio.common.errors import UserError
from ct_audio.models import SequenceModel, build_model
from ct_audio.models.state import detach_memory, named_tensors
from ct_audio.runs.checkpoint_files import digest, find_checkpoint, read_state
from ct_audio.runs.config import RunConfig
from ct_audio.runs.open_run import load_run_model
from ct_audio.training import checkpoint as checkpoint_module
from ct_audio.training.checkpoint import drop_previous, go_back, load_checkpoint, save_checkpoint, split_memory
from ct_audio.training.parallel import World
from ct_audio.training.schedules import make_optimizer


class Trained:
    """A model after two updates, with optimizer state and memory of two lanes."""

    def __init__(self, config: RunConfig, num_updates: int = 2) -> None:
        self.config = config
        self.model: SequenceModel = build_model(config)
        self.model.double()
        self.optimizer = make_optimizer(self.model, config.optim)
        self.memory: Any = self.model.zero_memory(2)
        for _ in range(num_updates):
            codes = torch.randint(256, (2, 16))
            output = self.model(codes, self.memory)
            loss = self.model.nll(output.features, codes).mean() + sum(output.auxiliary_losses.values())
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.memory = detach_memory(output.memory)

    def save(self, step: int, *, is_best: bool = False, keep_previous: bool = False) -> None:
        save_checkpoint(
            self.config.run_dir,
            config=self.config,
            model=self.model,
            optimizer=self.optimizer,
            memories=split_memory(self.memory, 2, 2),
            state={"step": step},
            world=World(),
            is_best=is_best,
            keep_previous=keep_previous,
        )

    def load(self, which: str = "last", *, num_micro_batches: int = 1) -> dict[str, Any]:
        path = find_checkpoint(self.config.run_dir, which)
        assert path is not None
        memories, state = load_checkpoint(
            path,
            model=self.model,
            optimizer=self.optimizer,
            num_lanes=2,
            num_micro_batches=num_micro_batches,
            world=World(),
        )
        assert len(memories) == num_micro_batches
        self.memory = memories[0]
        return state

    def tensors(self) -> dict[str, torch.Tensor]:
        found = dict(self.model.state_dict()) | {f"memory/{n}": t for n, t in named_tensors(self.memory)}
        for name, parameter in self.model.named_parameters():
            found |= {f"{name}/{key}": value for key, value in self.optimizer.state[parameter].items()}
        return found


@pytest.mark.parametrize("model", ["compressive_transformer", "transformer_xl", "wavenet"])
def test_everything_comes_back_bit_for_bit(tmp_path: Path, model: str):
    trained = Trained(tiny_run(tmp_path, model))
    trained.save(7)
    expected_draw = torch.rand(3)
    other = Trained(trained.config, num_updates=1)
    assert other.load()["step"] == 7
    assert torch.equal(torch.rand(3), expected_draw)
    expected, found = trained.tensors(), other.tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_lanes_may_be_split_otherwise_on_resume(tmp_path: Path):
    trained = Trained(tiny_run(tmp_path))
    trained.save(7)
    other = Trained(trained.config, num_updates=1)
    other.load(num_micro_batches=2)
    first_lane = dict(named_tensors(split_memory(trained.memory, 2, 2)[0]))
    assert all(torch.equal(tensor, first_lane[name]) for name, tensor in named_tensors(other.memory))


def test_optimizer_tensors_carry_the_names_of_parameters(tmp_path: Path):
    trained = Trained(tiny_run(tmp_path))
    trained.save(7)
    names = {name for name, _ in trained.model.named_parameters()}
    stored = load_file(trained.config.run_dir / "checkpoints/last/training.safetensors")
    assert stored.keys() == {f"{name}/{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert (
        load_file(trained.config.run_dir / "checkpoints/last/memory-rank0.safetensors")["rng/cpu"].dtype == torch.uint8
    )


def test_best_and_last_are_kept_and_nothing_else(tmp_path: Path):
    trained = Trained(tiny_run(tmp_path))
    for step in range(1, 5):
        trained.save(step, is_best=step == 2)
    root = trained.config.run_dir / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["best", "last", "step_00000002", "step_00000004"]
    assert [read_state(root / which)["step"] for which in ("best", "last")] == [2, 4]
    assert load_run_model(trained.config.run_dir).step == 2
    assert load_run_model(trained.config.run_dir, which="last").step == 4


def test_a_step_saved_twice_replaces_itself(tmp_path: Path):
    trained = Trained(tiny_run(tmp_path))
    trained.save(3)
    trained.save(3, is_best=True)
    names = sorted(p.name for p in (trained.config.run_dir / "checkpoints").iterdir())
    assert names == ["best", "last", "step_00000003-2"]


def test_the_one_before_stays_until_the_last_has_held(tmp_path: Path):
    trained = Trained(tiny_run(tmp_path))
    run_dir = trained.config.run_dir

    def kept() -> dict[str, int]:
        found = {which: find_checkpoint(run_dir, which) for which in ("last", "best", "previous")}
        steps = {which: read_state(path)["step"] for which, path in found.items() if path}
        assert len(list((run_dir / "checkpoints").glob("step_*"))) == len(set(steps.values()))
        return steps

    trained.save(1)
    trained.save(2, keep_previous=True)
    assert kept() == {"last": 2, "previous": 1}
    trained.save(3, is_best=True)  # no step between the two: what was before stays
    assert kept() == {"last": 3, "best": 3, "previous": 1}
    assert go_back(run_dir) == "step_00000003"
    assert kept() == {"last": 1, "best": 3}
    trained.save(4, keep_previous=True)
    drop_previous(run_dir)
    drop_previous(run_dir)
    assert kept() == {"last": 4, "best": 3}
    assert go_back(run_dir) is None
    trained.save(5, keep_previous=True)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000004")
    assert go_back(run_dir) is None
    drop_previous(run_dir)
    assert kept() == {"last": 5, "best": 3}


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_without_symbolic_links_files_name_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    """A mounted cloud drive that cannot sync directories either; the run goes on where there are links."""

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise OSError(number, os.strerror(number))

    sync = os.fsync
    monkeypatch.setattr("os.symlink", refuse)
    monkeypatch.setattr(
        "os.fsync", lambda handle: refuse_sync() if stat.S_ISDIR(os.fstat(handle).st_mode) else sync(handle)
    )

    def refuse_sync() -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    trained = Trained(tiny_run(tmp_path))
    root = trained.config.run_dir / "checkpoints"
    for step in range(1, 5):
        trained.save(step, is_best=step == 2, keep_previous=step == 4)
    assert sorted(p.name for p in root.iterdir()) == [
        *("best", "last", "previous", "step_00000002", "step_00000003", "step_00000004")
    ]
    assert (root / "last").read_text() == "step_00000004\n"
    assert load_run_model(trained.config.run_dir).step == 2
    assert trained.load()["step"] == 4
    assert go_back(trained.config.run_dir) == "step_00000004"
    assert trained.load()["step"] == 3
    monkeypatch.undo()
    trained.save(5)
    assert (root / "last").is_symlink()
    assert trained.load()["step"] == 5


def test_a_checkpoint_that_cannot_be_deleted_yet_is_deleted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """NFS keeps a file that another process reads, and refuses to delete its folder."""
    trained = Trained(tiny_run(tmp_path))
    root = trained.config.run_dir / "checkpoints"
    trained.save(1)
    with monkeypatch.context() as patch:
        patch.setattr(
            "os.rmdir", lambda *_a, **_k: (_ for _ in ()).throw(OSError(errno.ENOTEMPTY, "Directory not empty"))
        )
        trained.save(2)
    assert trained.load()["step"] == 2
    assert sorted(path.name for path in root.glob("step_*")) == ["step_00000001", "step_00000002"]
    trained.save(3)
    assert [path.name for path in root.glob("step_*")] == ["step_00000003"]


def test_nothing_of_a_loaded_checkpoint_stays_open(tmp_path: Path):
    """A file that is mapped cannot be deleted on NFS and on Windows."""
    trained = Trained(tiny_run(tmp_path))
    trained.save(1)
    trained.load()
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(trained.config.run_dir) not in maps.read_text()


def test_a_lost_link_can_be_written_by_hand(tmp_path: Path):
    trained = Trained(tiny_run(tmp_path))
    trained.save(3)
    (trained.config.run_dir / "checkpoints" / "last").unlink()
    with pytest.raises(UserError, match="no link named last") as caught:
        trained.load()
    [command] = re.findall("(echo .*?);", str(caught.value))
    subprocess.run(command, shell=True, check=True)
    assert trained.load()["step"] == 3


def test_links_that_became_directories_in_a_copy(tmp_path: Path):
    trained = Trained(tiny_run(tmp_path))
    trained.save(2)
    trained.save(3, keep_previous=True)
    root = trained.config.run_dir / "checkpoints"
    copy = root.with_name("copy")
    shutil.copytree(root, copy)
    shutil.rmtree(root)
    copy.rename(root)
    assert load_run_model(trained.config.run_dir, which="last").step == 3
    trained.save(4, keep_previous=True)
    drop_previous(trained.config.run_dir)
    assert load_run_model(trained.config.run_dir, which="last").step == 4
    assert sorted(path.name for path in root.iterdir()) == ["last", "step_00000004"]


class Killed(BaseException):
    """Stands for a process that ends here."""


def test_a_kill_at_any_instant_leaves_a_loadable_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every operation on the file system is once the last one that happens."""
    trained = Trained(tiny_run(tmp_path), num_updates=1)
    root = trained.config.run_dir / "checkpoints"
    trained.save(1, is_best=True)
    remaining = 0

    def counted(function):
        def operation(*args, **kwargs):
            nonlocal remaining
            if remaining == 0:
                raise Killed
            remaining -= 1
            return function(*args, **kwargs)

        return operation

    patches = [
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "symlink_to"),
        (Path, "unlink"),
        (Path, "open"),
        (shutil, "rmtree"),
        (checkpoint_module.os, "fsync"),
        (checkpoint_module, "save_file"),
    ]
    outcomes, operations = [], 0
    while True:
        with monkeypatch.context() as patch:
            for owner, name in patches:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            remaining = operations
            try:
                trained.save(operations + 2, keep_previous=True)
                finished = True
            except Killed:
                finished = False
        state = read_state(root / "last")
        assert state["step"] in {operations + 2, *outcomes[-1:], 1}
        assert read_state(root / "best")["step"] == 1
        outcomes.append(state["step"])
        if finished:
            break
        operations += 1
    assert operations > 20
    assert outcomes[-1] == operations + 2
    assert len(set(outcomes)) > 2  # some kills came after the switch
    assert len(list(root.glob("step_*"))) == 3  # last, best and previous
    assert not list(root.glob("writing-*"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "memory-rank0.safetensors"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_damaged_files_are_named(tmp_path: Path, file: str, damage):
    trained = Trained(tiny_run(tmp_path), num_updates=1)
    trained.save(3)
    damage(trained.config.run_dir / "checkpoints" / "last" / file)
    with pytest.raises(UserError, match=file):
        trained.load()
    if damage is Path.unlink and file != "model.safetensors":  # of a copy: evaluation needs no more than the model
        assert load_run_model(trained.config.run_dir).step == 3
        return
    with pytest.raises(UserError, match=file):
        load_run_model(trained.config.run_dir)


def rewrite(checkpoint: Path, file: str, **changes: torch.Tensor | None) -> None:
    """Change tensors of a file, and its entry in state.json."""
    tensors = load_file(checkpoint / file)
    for name, tensor in changes.items():
        assert name in tensors
        tensors[name] = tensor if tensor is not None else tensors.pop(name)
        if tensor is None:
            del tensors[name]
    save_file(tensors, checkpoint / file)
    state = json.loads((checkpoint / "state.json").read_text())
    path = checkpoint / file
    state["files"][file] = digest(path)
    (checkpoint / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "memory-rank0.safetensors"])
@pytest.mark.parametrize("how", ["shape", "dtype", "missing"])
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, file: str, how: str):
    trained = Trained(tiny_run(tmp_path), num_updates=1)
    trained.save(3)
    checkpoint = trained.config.run_dir / "checkpoints" / "last"
    names = [
        name for name in load_file(checkpoint / file) if not name.startswith("rng/") and not name.endswith("/step")
    ]
    tensor = load_file(checkpoint / file)[names[0]]
    changed = {"shape": torch.cat([tensor, tensor]), "dtype": tensor.half(), "missing": None}[how]
    rewrite(checkpoint, file, **{names[0]: changed})
    with pytest.raises(UserError, match=names[0].removeprefix("memory/")):
        trained.load()


def test_state_that_is_no_state(tmp_path: Path):
    trained = Trained(tiny_run(tmp_path), num_updates=1)
    trained.save(3)
    (trained.config.run_dir / "checkpoints/last/state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json"):
        trained.load()
    (trained.config.run_dir / "checkpoints/last/state.json").write_text("{}")
    with pytest.raises(UserError, match=r"expected state\.json of ct_audio checkpoint, version 1"):
        trained.load()


def test_a_damaged_run_is_never_taken_for_a_new_one(tmp_path: Path):
    trained = Trained(tiny_run(tmp_path), num_updates=1)
    root = trained.config.run_dir / "checkpoints"
    assert find_checkpoint(trained.config.run_dir, "last") is None
    trained.save(3)
    (root / "last").unlink()
    with pytest.raises(UserError, match="holds step_00000003, but no link named last"):
        find_checkpoint(trained.config.run_dir, "last")
    (root / "last").symlink_to("step_00000003")
    (root / "last" / "state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json is missing"):
        find_checkpoint(trained.config.run_dir, "last")


@pytest.mark.parametrize("rank", [0, 1])
def test_another_number_of_processes(tmp_path: Path, rank: int):
    """Each gets its lane, and draws numbers of its own."""
    trained = Trained(tiny_run(tmp_path), num_updates=2)
    trained.save(3)
    path = find_checkpoint(trained.config.run_dir, "last")
    assert path is not None
    where: dict[str, Any] = {"model": trained.model, "optimizer": trained.optimizer, "num_micro_batches": 1}
    (memory,), _ = load_checkpoint(path, **where, num_lanes=1, world=World(rank, 2, rank))
    draws = torch.rand(3)
    for (name, whole), (_, own) in zip(named_tensors(trained.memory), named_tensors(memory), strict=True):
        assert torch.equal(own, whole[rank : rank + 1]), name
    load_checkpoint(path, **where, num_lanes=1, world=World(1 - rank, 2, 1 - rank))
    assert not torch.equal(draws, torch.rand(3))
    with pytest.raises(UserError, match="expected 6 lanes in 1 files, got"):
        load_checkpoint(path, **where, num_lanes=3, world=World(rank, 2, rank))


def test_a_full_disk_keeps_the_checkpoint_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained = Trained(tiny_run(tmp_path), num_updates=1)
    trained.save(3)

    def fail(*_args: Any) -> None:
        raise checkpoint_module.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        trained.save(4)
    assert trained.load()["step"] == 3
    assert not list((trained.config.run_dir / "checkpoints").glob("writing-*"))


def test_loaded_model_is_the_saved_one(tmp_path: Path):
    trained = Trained(tiny_run(tmp_path, model__dropout=0.1))
    trained.save(5)
    loaded = load_run_model(trained.config.run_dir)
    assert loaded.config == trained.config
    assert not loaded.model.training
    expected = trained.model.state_dict()
    found = loaded.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert expected.keys() == found.keys()
    with pytest.raises(UserError, match="no checkpoint: there is no such folder"):
        load_run_model(tmp_path / "nothing", which="last")


def test_tied_parameters_are_stored_once(tmp_path: Path):
    trained = Trained(tiny_run(tmp_path), num_updates=1)
    module = trained.model
    name, parameter = next(iter(module.named_parameters()))
    module.register_parameter("tied", parameter)
    trained.save(3)
    tensors = checkpoint_tensors(trained.config)
    assert len({f"model.safetensors:{one}" for one in (name, "tied")} & tensors.keys()) == 1
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.zero_()
    trained.load()
    assert torch.equal(parameter, before)


def test_tiny_models_cover_what_is_tested_here():
    assert {"compressive_transformer", "transformer_xl", "wavenet"} <= TINY_MODELS.keys()
