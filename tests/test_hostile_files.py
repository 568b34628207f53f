"""Damaged or hostile checkpoints, corpora and configurations: one clear error each, and nothing of them is run."""

import ast
import contextlib
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_files import BAIT, CHECKPOINTS, CORPORA, MEMORY, MODEL, TRAINING, Run, change_state, edit_tensors, put
from hostile_report import Row, write_section
from recordings import ROOT
from tiny_runs import tiny_run, write_corpus

from ct_audio.common.errors import UserError
from ct_audio.data.codecs import codec_from_json
from ct_audio.data.corpus import open_corpus
from ct_audio.runs.checkpoint_files import find_checkpoint
from ct_audio.runs.config import load_config
from ct_audio.training.loop import train

WATCHED = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"}
_watching = False


def _watch(event: str, _arguments: Any) -> None:
    if _watching and event in WATCHED:
        BAIT.append(event)


sys.addaudithook(_watch)


@contextlib.contextmanager
def nothing_is_run() -> Iterator[None]:
    """Fails if code of a file was run, or another program, or a pickle read."""
    global _watching
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert BAIT == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run for all tests, which must put back what they change."""
    config = tiny_run(tmp_path_factory.mktemp("run"), train__num_steps=2, train__valid_every_steps=2)
    assert train(config) == 0
    path = find_checkpoint(config.run_dir, "last")
    assert path is not None
    run = Run(config, path)
    run.load()
    return run


@contextlib.contextmanager
def put_back(folder: Path) -> Iterator[None]:
    """Whatever happens to a folder inside it is undone."""
    safe = folder.with_name(folder.name + ".safe")
    shutil.copytree(folder, safe, symlinks=True)
    try:
        yield
    finally:
        shutil.rmtree(folder)
        safe.rename(folder)


def outcome(load: Callable[[], Any]) -> tuple[str, str]:
    """What comes of it, and the message, which must be one clear line; any other exception is the test's failure."""
    with nothing_is_run():
        try:
            load()
        except UserError as error:
            message = " ".join(str(error).split())  # as run_tool prints it
            clear = 20 < len(message) < 1000 and message.isprintable()
            return ("refused" if clear else f"unclear message {message!r}"), message
    return "loads", ""


def shorten(message: str, *places: Path) -> str:
    """Without the folders of this test run."""
    for place in places:
        message = message.replace(str(place), place.name)
    return message


def sweep(files: list[Path], load: Callable[[], Any], change: Callable[[bytes, int], bytes], step: int) -> Counter[str]:
    """Change each file at every `step`-th place; counts of (file, outcome)."""
    counts: Counter[str] = Counter()
    for file in files:
        whole = file.read_bytes()
        try:
            for place in range(0, len(whole), step):
                changed = change(whole, place)
                if changed != whole:
                    file.write_bytes(changed)
                    counts[f"{file.name} {outcome(load)[0]}"] += 1
        finally:
            file.write_bytes(whole)
    return counts


def cut(whole: bytes, place: int) -> bytes:
    """The first bytes; but only a line feed less is no damage."""
    return whole if whole[place:].strip() == b"" else whole[:place]


def flip(whole: bytes, place: int) -> bytes:
    """One bit changed, another one at each place."""
    return whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]


def as_rows(counts: Counter[str], what: str, expected: str) -> list[Row]:
    """For the report, a line for each file and outcome."""
    return [
        Row(f"{name.rsplit(' ', 1)[0]} {what}, {count} places", expected, name.rsplit(" ", 1)[1])
        for name, count in sorted(counts.items())
    ]


ANYWHERE = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(("step", "long_step"), [(29, 1999), pytest.param(1, 13, marks=ANYWHERE)])
def test_checkpoints_cut_anywhere_are_refused(trained: Run, step: int, long_step: int):
    counts = sweep([trained.checkpoint / file for file in ("state.json", "config.yaml")], trained.load, cut, step)
    counts += sweep([trained.checkpoint / file for file in (MODEL, TRAINING, MEMORY)], trained.load, cut, long_step)
    title = f"checkpoint cut, one byte in {step} (tensors: in {long_step})"
    write_section(title, as_rows(counts, "cut", "refused"))
    assert {name.rsplit(" ", 1)[1] for name in counts} == {"refused"}
    trained.load()


def test_tensors_cut_with_the_right_hash_are_refused(trained: Run):
    rows = []
    for file in (MODEL, TRAINING, MEMORY):
        whole = (trained.checkpoint / file).read_bytes()
        for place in (0, 7, 9, len(whole) // 2, len(whole) - 1):
            with put_back(trained.checkpoint):
                put(file, whole[:place])(trained)
                rows.append(Row(f"{file} cut at {place}, hash made right", "refused", *outcome(trained.load)))
    write_section("checkpoint cut, with the right hash", [row._replace(message="") for row in rows])
    assert [row for row in rows if row.outcome != "refused"] == []


@pytest.mark.parametrize(("step", "long_step"), [(37, 1999), pytest.param(1, 31, marks=ANYWHERE)])
def test_checkpoints_with_a_flipped_bit_are_refused_or_still_one(trained: Run, step: int, long_step: int):
    """Every file but state.json is hashed; there a flipped digit may pass, but nothing else than UserError comes."""
    hashed = sweep([trained.checkpoint / file for file in ("config.yaml", MODEL)], trained.load, flip, long_step)
    stated = sweep([trained.checkpoint / "state.json"], trained.load, flip, step)
    rows = as_rows(hashed, "a bit flipped", "refused") + as_rows(stated, "a bit flipped", "refused or loads")
    write_section(f"checkpoint with a flipped bit, one byte in {step} (hashed: in {long_step})", rows)
    assert {name.rsplit(" ", 1)[1] for name in hashed} == {"refused"}
    assert {name.rsplit(" ", 1)[1] for name in stated} <= {"refused", "loads"}
    assert stated["state.json refused"] > stated["state.json loads"]


def test_hostile_checkpoints_are_refused(trained: Run):
    rows = []
    for what, change in CHECKPOINTS.items():
        with put_back(trained.config.run_dir):
            change(trained)
            found, message = outcome(trained.load)
        rows.append(Row(what, "refused", found, shorten(message, trained.config.run_dir, trained.checkpoint)))
    write_section("hostile checkpoints", rows)
    assert [row for row in rows if row.outcome != "refused"] == []
    assert len(rows) > 100
    trained.load()


def test_weights_of_nan_are_data(trained: Run):
    """No damage of the file: it loads, and the sampler names it."""
    with put_back(trained.config.run_dir):
        edit_tensors(MODEL, lambda t: [tensor.fill_(np.nan) for tensor in t.values()])(trained)
        assert outcome(trained.load)[0] == "loads"


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {"bogus": 1}},
        {"progress": {"step": 1}},
        {"progress": {"step": 2, "last": {"log": 3}}},
        {"progress": {"step": 2, "last": []}},
        {"progress": {"step": 2, "sums": {"steps": "1"}}},
        {"progress": {"step": 2, "wall_seconds": None}},
        {"stream": {"codes_per_lane": -1, "num_lanes": 2, "num_codes": 1000}},
        {"stream": {"codes_per_lane": True, "num_lanes": 2, "num_codes": 1000}},
        {"stream": {}},
        {"corpus_fingerprint": "0"},
    ],
    ids=str,
)
def test_training_does_not_go_on_from_a_hostile_state(trained: Run, change: dict[str, Any]):
    longer = tiny_run(trained.config.run_dir.parents[1], train__num_steps=4, train__valid_every_steps=2)
    with put_back(trained.config.run_dir):
        change_state(lambda state: state.update(change))(trained)
        assert outcome(lambda: train(longer))[0] == "refused"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A tiny corpus."""
    return write_corpus(tmp_path / "corpus")


def test_hostile_corpora_are_refused(corpus: Path):
    rows = []
    for what, change in CORPORA.items():
        with put_back(corpus):
            change(corpus)
            found, message = outcome(lambda: open_corpus(corpus, verify=True))
        rows.append(Row(what, "refused", found, shorten(message, corpus)))
    write_section("hostile corpora", rows)
    assert [row for row in rows if row.outcome != "refused"] == []
    assert len(rows) > 70
    open_corpus(corpus, verify=True)


@pytest.mark.parametrize("step", [23, pytest.param(1, marks=ANYWHERE)])
def test_corpora_cut_or_flipped_anywhere(corpus: Path, step: int):
    """A flipped bit of the codes is found by `verify`, one of a name or an offset need not be."""
    files = [corpus / name for name in ("corpus.json", "train.codes", "valid.codes")]
    cuts = sweep(files, lambda: open_corpus(corpus), cut, step)
    codes = sweep(files[1:], lambda: open_corpus(corpus, verify=True), flip, step)
    stated = sweep(files[:1], lambda: open_corpus(corpus, verify=True), flip, step)
    rows = as_rows(cuts, "cut", "refused") + as_rows(codes, "a bit flipped, verified", "refused")
    write_section(
        f"corpus cut or flipped, one byte in {step}", rows + as_rows(stated, "a bit flipped", "refused or loads")
    )
    assert {name.rsplit(" ", 1)[1] for name in cuts + codes} == {"refused"}
    assert sum(cuts.values()) > 2000 / step
    assert {name.rsplit(" ", 1)[1] for name in stated} <= {"refused", "loads"}
    assert stated["corpus.json refused"] > stated["corpus.json loads"]


def test_a_codec_named_by_a_list_is_refused():
    for name in ([], {}, None, 3, "../codec"):
        with pytest.raises(UserError, match="expected a name out of"):
            codec_from_json({"name": name})


@pytest.mark.parametrize("step", [89, pytest.param(1, marks=ANYWHERE)])
def test_configurations_cut_or_flipped_anywhere(tmp_path: Path, step: int):
    """A YAML cut at a line's end is another YAML: it loads, or is refused; never anything else."""
    file = tmp_path / "run.yaml"
    shutil.copy(ROOT / "recipes" / "folder" / "compressive_transformer_small.yaml", file)
    counts = sweep([file], lambda: load_config(file), cut, step)
    flips = sweep([file], lambda: load_config(file), flip, step)
    rows = as_rows(counts, "cut", "refused or loads") + as_rows(flips, "a bit flipped", "refused or loads")
    write_section(f"configurations cut or flipped, one byte in {step}", rows)
    assert {name.rsplit(" ", 1)[1] for name in counts + flips} == {"refused", "loads"}


def test_nothing_that_runs_code_is_called():
    forbidden = {
        "torch.load",
        "yaml.load",
        "yaml.unsafe_load",
        "pickle.load",
        "pickle.loads",
        "eval",
        "exec",
        "os.system",
    }
    for file in sorted([*(ROOT / "ct_audio").rglob("*.py"), *(ROOT / "tools").glob("*.py")]):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not forbidden & {ast.unparse(call.func) for call in calls}, file.name
        options = {keyword.arg for call in calls for keyword in call.keywords}
        assert "allow_pickle" not in options, file.name
