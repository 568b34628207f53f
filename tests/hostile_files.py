"""Hostile checkpoints and corpora, each made from a good one by a change; every one of them must be refused.

Where a hash stands in the way of a change, state.json is made to fit, so that what lies behind the hash is reached.
"""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ct_audio.models import build_model
from ct_audio.runs.checkpoint_files import digest, find_checkpoint
from ct_audio.runs.config import RunConfig
from ct_audio.runs.open_run import load_run_model
from ct_audio.training.checkpoint import load_checkpoint
from ct_audio.training.parallel import World
from ct_audio.training.schedules import make_optimizer

BAIT: list[str] = []
"""What was run: by the bait that hostile files hold, or noted by an audit hook of the tests."""


class Bait:
    """Its pickle runs code when it is loaded."""

    def __reduce__(self):
        return (BAIT.append, ("a pickle was run",))


class Run(NamedTuple):
    """A finished tiny run; `checkpoint` is the directory that `last` and `best` lead to."""

    config: RunConfig
    checkpoint: Path

    def load(self) -> None:
        """As evaluation and sampling do, and then as a resumed training does."""
        load_run_model(self.config.run_dir)
        model = build_model(self.config)
        model.double()
        optimizer = make_optimizer(model, self.config.optim)
        path = find_checkpoint(self.config.run_dir, "last")
        assert path is not None
        settings = {"num_lanes": 2, "num_micro_batches": 1, "world": World()}
        load_checkpoint(path, model=model, optimizer=optimizer, **settings)

    def rehash(self, file: str) -> None:
        """Let state.json say what a file is now."""
        state = json.loads((self.checkpoint / "state.json").read_text())
        state["files"][file] = digest(self.checkpoint / file)
        (self.checkpoint / "state.json").write_text(json.dumps(state))


def change_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Run], None]:
    """Edit state.json."""

    def apply(run: Run) -> None:
        state = json.loads((run.checkpoint / "state.json").read_text())
        change(state)
        (run.checkpoint / "state.json").write_text(json.dumps(state))

    return apply


def state_text(old: str, new: str) -> Callable[[Run], None]:
    """Replace text of state.json."""

    def apply(run: Run) -> None:
        file = run.checkpoint / "state.json"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))

    return apply


def put(file: str, content: bytes) -> Callable[[Run], None]:
    """Another file in the place of one, with the right hash."""

    def apply(run: Run) -> None:
        (run.checkpoint / file).write_bytes(content)
        run.rehash(file)

    return apply


def edit_text(file: str, old: str, new: str) -> Callable[[Run], None]:
    """Replace text of a file, with the right hash."""

    def apply(run: Run) -> None:
        text = (run.checkpoint / file).read_text()
        assert old in text
        put(file, text.replace(old, new, 1).encode())(run)

    return apply


def edit_header(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Run], None]:
    """Edit the JSON header of a safetensors file, with the right hash."""

    def apply(run: Run) -> None:
        content = (run.checkpoint / file).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        put(file, struct.pack("<Q", len(text)) + text + content[8 + length :])(run)

    return apply


def first(header: dict[str, Any]) -> dict[str, Any]:
    """The first tensor of a header."""
    return next(entry for name, entry in header.items() if name != "__metadata__")


def edit_tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Run], None]:
    """Edit the tensors of a file, with the right hash."""

    def apply(run: Run) -> None:
        tensors = load_file(run.checkpoint / file)
        change(tensors)
        save_file(tensors, run.checkpoint / file)
        run.rehash(file)

    return apply


def reshape(suffix: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    """Change the first tensor whose name ends so."""

    def apply(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith(suffix))
        tensors[name] = function(tensors[name]).contiguous()

    return apply


def instead(file: str, make: Callable[[Path], Any]) -> Callable[[Run], None]:
    """Something else in the place of a file."""

    def apply(run: Run) -> None:
        (run.checkpoint / file).unlink()
        make(run.checkpoint / file)

    return apply


def move_out(file: str) -> Callable[[Run], None]:
    """A file moved elsewhere, and a link to it."""

    def apply(run: Run) -> None:
        place = run.config.run_dir / file
        (run.checkpoint / file).rename(place)
        (run.checkpoint / file).symlink_to(place)

    return apply


def link_last(target: str) -> Callable[[Run], None]:
    """Let both links lead elsewhere."""

    def apply(run: Run) -> None:
        for name in ("last", "best"):
            (run.checkpoint.parent / name).unlink(missing_ok=True)
            (run.checkpoint.parent / name).symlink_to(target)

    return apply


def file_last(content: bytes) -> Callable[[Run], None]:
    """A file in the place of both links, as where there are no symbolic links; it should hold a checkpoint's name."""

    def apply(run: Run) -> None:
        for name in ("last", "best"):
            (run.checkpoint.parent / name).unlink(missing_ok=True)
            (run.checkpoint.parent / name).write_bytes(content)

    return apply


def checkpoint_elsewhere(run: Run) -> None:
    """The whole checkpoint outside of the run's directory."""
    elsewhere = run.config.run_dir / "elsewhere"
    run.checkpoint.rename(elsewhere)
    link_last(str(elsewhere))(run)


MODEL, TRAINING, MEMORY = "model.safetensors", "training.safetensors", "memory-rank0.safetensors"
NESTED = '{"a":' * 50_000
BILLION = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 1}]\n" for i in range(12))
CHECKPOINTS: dict[str, Callable[[Run], object]] = {
    "state.json: a list": lambda run: (run.checkpoint / "state.json").write_text("[]") and None,
    "state.json: no UTF-8": lambda run: (run.checkpoint / "state.json").write_bytes(b'{"\xff": 1}') and None,
    "state.json: nested 50,000 deep": lambda run: (run.checkpoint / "state.json").write_text(NESTED) and None,
    "state.json: NaN": state_text('"step": 2', '"step": NaN'),
    "state.json: -Infinity": state_text('"step": 2', '"step": -Infinity'),
    "state.json: 1e999": state_text('"step": 2', '"step": 1e999'),
    "state.json: a number of 5000 digits": state_text('"step": 2', '"step": ' + "9" * 5000),
    "state.json: a number of 100 digits": state_text('"step": 2', '"step": ' + "9" * 100),
    "state.json: half a surrogate pair": state_text('"step": 2', '"x": "\\ud800", "step": 2'),
    "state.json: another format": change_state(lambda s: s.update(format="zip")),
    "state.json: a later version": change_state(lambda s: s.update(format_version=2)),
    **{
        f"state.json: {key} = {value!r}": change_state(lambda s, key=key, value=value: s.update({key: value}))
        for key, values in {
            "step": [None, -1, "2", 2.0, True, [2]],
            "world_size": [None, 0, -1, "1", 1.0, 10**12, {}],
            "files": [None, [], "model.safetensors", {}, {"model.safetensors": {}}],
            "progress": [None, [], "x", {"best_valid_nll_nats": "low"}],
            "stream": [None, [], 3],
            "codec": [None, [], "mu_law"],
            "corpus_fingerprint": [None, 3, []],
        }.items()
        for value in values
    },
    **{
        f"state.json: no {key}": change_state(lambda s, key=key: s.pop(key))
        for key in ("format", "format_version", "step", "world_size", "files")
    },
    **{
        f"state.json: a file named {name}": change_state(
            lambda s, name=name: s["files"].update({name: s["files"][MODEL]})
        )
        for name in ("../../../corpus/corpus.json", "/etc/passwd", "", ".", "last/model.safetensors", "a\0b")
    },
    "state.json: the model named by a path": change_state(
        lambda s: s["files"].update({f"../{2 * '../'}{MODEL}": s["files"].pop(MODEL)})
    ),
    **{
        f"state.json: no entry of {file}": change_state(lambda s, file=file: s["files"].pop(file))
        for file in ("config.yaml", MODEL, TRAINING, MEMORY)
    },
    "state.json: wrong size": change_state(lambda s: s["files"][MODEL].update(bytes=1)),
    "state.json: size as text": change_state(lambda s: s["files"][MODEL].update(bytes="1")),
    "state.json: huge size": change_state(lambda s: s["files"][MODEL].update(bytes=10**300)),
    "state.json: wrong hash": change_state(lambda s: s["files"][MODEL].update(sha256="0" * 64)),
    "state.json: hash as number": change_state(lambda s: s["files"][MODEL].update(sha256=0)),
    **{
        f"{file}: {what}": instead(file, make)
        for file in ("state.json", "config.yaml", MODEL, MEMORY)
        for what, make in {
            "missing": lambda path: None,
            "empty": Path.touch,
            "a folder": Path.mkdir,
            "a FIFO": os.mkfifo,
            "a link to itself": lambda path: path.symlink_to(path.name),
            "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        }.items()
    },
    **{f"{file}: moved out, and a link": move_out(file) for file in ("config.yaml", MODEL, TRAINING, MEMORY)},
    "last: a link out of the run": checkpoint_elsewhere,
    "last: a link to itself": link_last("last"),
    "last: a link to nothing": link_last("step_99999999"),
    "last: a link to /": link_last("/"),
    "last: a file with a path out of the run": lambda run: (
        (run.checkpoint.parent / run.checkpoint.name).rename(run.config.run_dir / "elsewhere"),
        file_last(b"../elsewhere\n")(run),
    )[1],
    **{
        f"last: a file with {what}": file_last(content)
        for what, content in {
            "nothing": b"",
            "a name that is not there": b"step_99999999",
            "its own name": b"last",
            "/": b"/",
            "..": b"..",
            "a NUL": b"step\0_00000002",
            "no text": b"\xff\xfe" * 50,
            "two lines": b"step_00000002\nstep_00000002",
            "a million characters": b"a" * 10**6,
        }.items()
    },
    "model: a pickle": put(MODEL, pickle.dumps(Bait())),
    "model: a checkpoint of torch.save": lambda run: (
        torch.save(Bait(), run.checkpoint / MODEL),
        run.rehash(MODEL),
    )[1],
    "model: random bytes": put(MODEL, np.random.default_rng(0).bytes(999)),
    "model: a header of 2^63 bytes": put(MODEL, struct.pack("<Q", 2**63) + b"{}"),
    "model: a header longer than the file": put(MODEL, struct.pack("<Q", 999) + b"{}"),
    "model: a header that is no JSON": put(MODEL, struct.pack("<Q", 2) + b"[]"),
    "model: a header nested deeply": put(MODEL, struct.pack("<Q", len(NESTED)) + NESTED.encode()),
    "model: no tensors": put(MODEL, struct.pack("<Q", 2) + b"{}"),
    "model: a tensor beyond the end": edit_header(MODEL, lambda h: first(h).update(data_offsets=[0, 2**60])),
    "model: offsets reversed": edit_header(MODEL, lambda h: first(h).update(data_offsets=[8, 0])),
    "model: negative offsets": edit_header(MODEL, lambda h: first(h).update(data_offsets=[-8, 0])),
    "model: unknown dtype": edit_header(MODEL, lambda h: first(h).update(dtype="F33")),
    "model: an object as dtype": edit_header(MODEL, lambda h: first(h).update(dtype={"a": 1})),
    "model: a negative extent": edit_header(MODEL, lambda h: first(h).update(shape=[-1])),
    "model: an extent of 2^62": edit_header(MODEL, lambda h: first(h).update(shape=[2**62, 4])),
    "model: another name": edit_header(MODEL, lambda h: h.update({"../x": h.pop(next(iter(h)))})),
    "model: a tensor more": edit_tensors(MODEL, lambda t: t.update({"more": torch.zeros(3)})),
    "model: a tensor less": edit_tensors(MODEL, lambda t: t.pop(min(t))),
    "model: another shape": edit_tensors(MODEL, reshape("", lambda tensor: torch.cat([tensor, tensor]))),
    "model: one extent more": edit_tensors(MODEL, reshape("", lambda tensor: tensor[None])),
    "model: float32 instead of float64": edit_tensors(MODEL, reshape("", torch.Tensor.float)),
    "model: complex numbers": edit_tensors(MODEL, reshape("", lambda tensor: tensor.to(torch.complex64))),
    "training: a pickle": put(TRAINING, pickle.dumps(Bait())),
    "training: no step": edit_tensors(TRAINING, lambda t: t.pop(min(name for name in t if name.endswith("/step")))),
    "training: a step of three": edit_tensors(TRAINING, reshape("/step", lambda tensor: torch.zeros(3))),
    "training: a moment of another shape": edit_tensors(TRAINING, reshape("/exp_avg", lambda tensor: tensor[:1])),
    "memory: a pickle": put(MEMORY, pickle.dumps(Bait())),
    "memory: a lane more": edit_tensors(MEMORY, reshape("memory/0", lambda tensor: torch.cat([tensor, tensor]))),
    "memory: no generator": edit_tensors(MEMORY, lambda t: t.pop("rng/cpu")),
    "memory: a generator cut off": edit_tensors(MEMORY, reshape("rng/cpu", lambda tensor: tensor[:99])),
    "memory: a generator of ones": edit_tensors(
        MEMORY, reshape("rng/cpu", lambda tensor: torch.full_like(tensor, 255))
    ),
    "memory: a generator of floats": edit_tensors(MEMORY, reshape("rng/cpu", torch.Tensor.float)),
    "config: empty": put("config.yaml", b""),
    "config: no text": put("config.yaml", b"\xff\xfe\0"),
    "config: a pickle": put("config.yaml", pickle.dumps(Bait())),
    "config: a tag that runs a program": edit_text(
        "config.yaml", "name: run", "name: !!python/object/apply:os.system ['true']"
    ),
    "config: a tag that makes an object": edit_text("config.yaml", "name: run", "name: !!python/object:os.Popen {}"),
    "config: a billion laughs": put("config.yaml", BILLION.encode()),
    "config: interpolation": edit_text("config.yaml", "name: run", "name: ${oc.env:HOME}"),
    "config: 10^9 layers": edit_text("config.yaml", "num_layers: 2", "num_layers: 1000000000"),
    "config: a width of 10^12": edit_text("config.yaml", "width: 16", "width: 1000000000000"),
    "config: a width of 2^62": edit_text("config.yaml", "width: 16", f"width: {2**62}"),
    "config: a vocabulary of 10^15": edit_text("config.yaml", "vocab_size: 256", f"vocab_size: {10**15}"),
    "config: another width": edit_text("config.yaml", "width: 16", "width: 32"),
    "config: another model": edit_text("config.yaml", "name: compressive_transformer", "name: wavenet"),
    "config: a model named by a path": edit_text("config.yaml", "name: compressive_transformer", "name: ../../x"),
}


def edit_corpus(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Edit corpus.json."""

    def apply(path: Path) -> None:
        description = json.loads((path / "corpus.json").read_text())
        change(description)
        (path / "corpus.json").write_text(json.dumps(description))

    return apply


def train_split(**values: Any) -> Callable[[Path], None]:
    """Edit the train split's entry."""
    return edit_corpus(lambda description: description["splits"]["train"].update(values))


def other(file: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something else in the place of a file of the corpus."""

    def apply(path: Path) -> None:
        (path / file).unlink()
        make(path / file)

    return apply


def named(name: str) -> Callable[[Path], None]:
    """Another name for the train split."""
    return edit_corpus(
        lambda d: d["splits"].update({name: d["splits"].pop("train") | {"file": f"{name}.codes"}}),
    )


CORPORA: dict[str, Callable[[Path], None]] = {
    **{
        f"corpus.json: {text[:20]!r}": other("corpus.json", lambda path, text=text: path.write_text(text))
        for text in ("", "[]", "null", "3", NESTED, "[" * 50_000, '{"a": NaN}', "9" * 5000, "\0", "{'a': 1}")
    },
    "corpus.json: a pickle": other("corpus.json", lambda path: path.write_bytes(pickle.dumps(Bait()))),
    **{
        f"{file}: {what}": other(file, make)
        for file in ("corpus.json", "train.codes")
        for what, make in {
            "missing": lambda path: None,
            "a folder": Path.mkdir,
            "a FIFO": os.mkfifo,
            "a link to itself": lambda path: path.symlink_to(path.name),
            "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        }.items()
    },
    "train.codes: a link out": lambda path: (
        (path / "train.codes").rename(path.parent / "out.codes"),
        (path / "train.codes").symlink_to(path.parent / "out.codes"),
    )[1],
    "a file of codes more": lambda path: (path / "more.codes").touch(),
    **{
        f"codec: {value!r}": edit_corpus(lambda d, value=value: d.update(codec=value))
        for value in (
            *(None, [], "mu_law", {}, {"name": []}, {"name": {}}, {"name": None}, {"name": "__class__"}),
            *({"name": "mu_law", "vocab_size": 3}, {"name": "mu_law", "sample_rate_hz": 10**30}),
            *({"name": "mu_law", "sample_rate_hz": 0.5}, {"name": "mu_law", "__init__": 1}, {"name": "byte", "": 1}),
        )
    },
    **{f"source: {value!r}": edit_corpus(lambda d, v=value: d.update(source=v)) for value in (None, [], "x", 3)},
    **{f"preparation: {value!r}": edit_corpus(lambda d, v=value: d.update(preparation=v)) for value in (None, [], 3)},
    **{
        f"a split named {name!r}": named(name)
        for name in ("../train", "/etc/passwd", "", ".", "a b", "a\0", "é", "a" * 99)
    },
    **{
        f"num_codes: {str(value)[:12]}": train_split(num_codes=value)
        for value in (None, 0, -1, 999, 1001, 1000.0, True, "1000", [], 2**63, 2**64, 10**300)
    },
    **{f"sha256: {value!r}": train_split(sha256=value) for value in (None, 3, "", "0" * 63, "g" * 64, [], "0" * 64)},
    **{
        f"document_offsets: {str(value)[:20]}": train_split(document_offsets=value)
        for value in (None, 3, [], [0], ["0"] * 10, [0] * 10, [0, 2**63, *range(2**63 + 1, 2**63 + 9)])
    },
    "document_offsets: negative": train_split(document_offsets=list(range(-1, 9))),
    "document_offsets: nested": train_split(document_offsets=[[0]] * 10),
    **{
        f"document_names: {str(value)[:20]}": train_split(document_names=value)
        for value in (None, 3, [], ["a"], [None] * 10, [["a"]] * 10, ["\ud800"] * 10)
    },
    "dtype: object": train_split(dtype="object"),
    "file: a path": train_split(file="../corpus/train.codes"),
}
