"""tools/compare.py on runs that are made by hand: files, table, stored evaluations, what is refused."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from handmade_runs import Output, Patch, Tool, make_run, noise_corpus, refusal, save, speech_like, tool, write_corpus
from test_curves import write_curves

from ct_audio.data.codecs import MuLaw
from ct_audio.evaluation import comparison
from ct_audio.evaluation import stored as stored_evaluations
from ct_audio.runs.open_run import load_run_model


@pytest.fixture
def compare_and_draw(monkeypatch: Patch) -> Tool:
    """The tool, with blocks so short that the 621 codes of the validation split have an interval."""
    monkeypatch.setattr(stored_evaluations, "BLOCK_LENGTH", 8)
    monkeypatch.setattr(comparison, "BOOTSTRAP_SECONDS", 16 / 24_000)
    monkeypatch.setattr(comparison, "NUM_RESAMPLES", 1_000)
    return tool("compare", monkeypatch)


@pytest.fixture
def compare(compare_and_draw: Tool, monkeypatch: Patch) -> Tool:
    """The tool without its picture, which takes most of its time."""
    monkeypatch.setattr("ct_audio.evaluation.curves.draw_curves", lambda *_, **__: None)
    return compare_and_draw


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return noise_corpus(tmp_path / "corpus")


def run_of(corpus: Path, folder: Path, name: str, model: str = "wavenet", width: float = 20.0) -> Path:
    """A run with a checkpoint and curves."""
    made = make_run(corpus, folder / "made", model, width)
    return write_curves(made.rename(folder / name))


def table(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def stored(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "evaluations").glob("*")}


def test_table_and_curves(corpus: Path, tmp_path: Path, compare_and_draw: Tool, capsys: Output) -> None:
    runs = [
        run_of(corpus, tmp_path, "first"),
        run_of(corpus, tmp_path, "same"),
        run_of(corpus, tmp_path, "wide", width=60.0),
        run_of(corpus, tmp_path, "compressive", "compressive_transformer"),
    ]
    out = tmp_path / "deep" / "out"
    assert compare_and_draw(*runs, "--splits", "valid", "test", "--out", out) == 0
    output, error = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "table.csv", "table.md"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "table.md").read_text(encoding="utf-8") == output
    assert error.count("no stored evaluation fits") == error.count("stored in") == 8
    first, same, wide, compressive = table(out)
    assert [row["run"] for row in (first, same, wide, compressive)] == ["first", "same", "wide", "compressive"]
    for row, run in zip((first, same, wide, compressive), runs, strict=True):
        for split in ("valid", "test"):
            kept = json.loads((run / "evaluations" / f"{split}-step_00000007.json").read_text())
            assert row["parameters"] == str(kept["num_parameters"])
            assert float(row[f"{split} (nats)"]) == kept["nll_nats"]
            assert float(row[f"{split} (bits)"]) == kept["nll_bits"]
            assert row[f"{split} codes/s"] == str(round(kept["units_per_second"]))
            assert f"split {split}" in row[f"{split} protocol"]
        assert (row["steps"], row["scored at step"], row["audio seen (s)"]) == ("10", "7", "160")
        assert row["training codes/s"] == "550"
    difference = ["valid difference (nats)", "valid low", "valid high"]
    assert [first[key] for key in difference] == ["", "", ""]
    assert [float(same[key]) for key in difference] == [0.0, 0.0, 0.0]
    mean, low, high = (float(wide[key]) for key in difference)
    assert low < mean < high < 0  # the noise is wide, too
    assert mean == pytest.approx(float(wide["valid (nats)"]) - float(first["valid (nats)"]))
    assert int(compressive["without f_c"]) < int(compressive["parameters"])
    assert first["without f_c"] == first["parameters"]
    assert f"| wide | {int(wide['parameters']):,} |" in output
    assert f"| {mean:+.4f} [{low:+.4f}, {high:+.4f}] |" in output
    assert "- compressive: memory_length 8, compressed_memory_length 4\n" in output
    assert "- test: split test, num_units 321, " in output


def test_stored_evaluations_are_used(
    corpus: Path, tmp_path: Path, compare: Tool, capsys: Output, monkeypatch: Patch
) -> None:
    """What tools/evaluate.py has kept is taken, without the corpus."""
    run, out = run_of(corpus, tmp_path, "run"), tmp_path / "out"
    assert tool("evaluate", monkeypatch)(run) == 0
    kept = stored(run)
    assert list(kept) == ["valid-step_00000007.json"]
    shutil.rmtree(corpus)
    assert compare(run, "--out", out) == 0
    assert "scoring now" not in capsys.readouterr().err
    assert stored(run) == kept


def test_a_run_that_has_gone_on_is_scored_again(corpus: Path, tmp_path: Path, compare: Tool, capsys: Output) -> None:
    run, out = run_of(corpus, tmp_path, "run"), tmp_path / "out"
    assert compare(run, "--out", out) == 0
    before = float(table(out)[0]["valid (nats)"])
    loaded = load_run_model(run)
    for _, parameter in loaded.model.named_parameters():
        parameter.data.mul_(0.0)
    save(run, loaded.config, loaded.model, step=9, fingerprint=loaded.state["corpus_fingerprint"], is_best=True)
    capsys.readouterr()
    assert compare(run, "--out", out) == 0
    assert "step_00000009: no stored evaluation fits" in capsys.readouterr().err
    (row,) = table(out)
    assert row["scored at step"] == "9"
    assert float(row["valid (nats)"]) == pytest.approx(5.545, abs=1e-3)  # ln 256: all weights are 0
    assert before > 6


def test_the_beginning_of_a_split_is_kept_apart(corpus: Path, tmp_path: Path, compare: Tool) -> None:
    run, out = run_of(corpus, tmp_path, "run"), tmp_path / "out"
    assert compare(run, "--max-seconds", 0.01, "--out", out) == 0
    assert "num_units 240," in table(out)[0]["valid protocol"]
    assert compare(run, "--out", out) == 0
    assert "num_units 621," in table(out)[0]["valid protocol"]
    assert sorted(stored(run)) == ["valid-step_00000007-max_seconds_0.01.json", "valid-step_00000007.json"]


def test_a_read_only_run_is_warned_of(
    corpus: Path, tmp_path: Path, compare: Tool, capsys: Output, monkeypatch: Patch
) -> None:
    def refuse(path: Path, _value: Any) -> None:
        raise PermissionError(30, "Read-only file system", str(path))

    monkeypatch.setattr(stored_evaluations, "write_json", refuse)
    run = run_of(corpus, tmp_path, "run")
    assert compare(run, "--out", tmp_path / "out") == 0
    assert "warning: run, valid, step_00000007: the result is not kept" in capsys.readouterr().err
    assert table(tmp_path / "out")[0]["valid (nats)"]
    assert tool("evaluate", monkeypatch)(run, "--json") == 0
    output, error = capsys.readouterr()
    assert "Read-only file system" in error
    assert json.loads(output)["split"] == "valid"


def test_a_model_without_parameters_is_a_level(corpus: Path, tmp_path: Path, compare_and_draw: Tool) -> None:
    run = run_of(corpus, tmp_path, "run")
    assert compare_and_draw(run, "--out", tmp_path / "out") == 0
    file = run / "evaluations" / "valid-step_00000007.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_parameters": 0}), encoding="utf-8")
    before = (tmp_path / "out" / "curves.png").read_bytes()
    assert compare_and_draw(run, "--out", tmp_path / "out") == 0
    (row,) = table(tmp_path / "out")
    assert (row["parameters"], row["steps"], row["scored at step"], row["audio seen (s)"]) == ("0", "", "", "")
    assert (tmp_path / "out" / "curves.png").read_bytes() != before


def test_another_protocol_is_refused(corpus: Path, tmp_path: Path, compare: Tool, capsys: Output) -> None:
    runs = [run_of(corpus, tmp_path, name) for name in ("a", "b")]
    assert compare(*runs, "--out", tmp_path / "out") == 0
    file = runs[1] / "evaluations" / "valid-step_00000007.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"protocol": found["protocol"] | {"num_lanes": 4}}), encoding="utf-8")
    error = refusal(capsys, compare, *runs, "--out", tmp_path / "refused")
    assert error.startswith("error: a and b were not scored alike on valid: num_lanes is 1 against 4")
    assert not (tmp_path / "refused").exists()


def test_other_codes_are_refused(tmp_path: Path, compare: Tool, capsys: Output) -> None:
    """Other validation codes of the same length; another training split alone does no harm."""
    runs = []
    for name, train, valid in (("base", 1, 2), ("other_valid", 1, 3), ("other_train", 4, 2)):
        documents = [("train", speech_like(100, train)), ("valid", speech_like(300, valid))]
        write_corpus(tmp_path / name, MuLaw(), documents)
        runs.append(run_of(tmp_path / name, tmp_path, f"run_on_{name}"))
    assert compare(*runs[:2], "--out", tmp_path / "out") == 2
    assert "run_on_base and run_on_other_valid were not scored alike on valid: split_sha256" in capsys.readouterr().err
    assert compare(runs[0], runs[2], "--out", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no_run", "no such run"),
        ("no_curve", "no NLL curve"),
        ("no_checkpoint", "no checkpoint"),
        ("no_split", "no split 'dev'"),
        ("twice", "each run once"),
        ("no_corpus", "which is not there"),
    ],
)
def test_what_is_missing_is_named(
    corpus: Path, tmp_path: Path, compare: Tool, capsys: Output, what: str, message: str
) -> None:
    run, arguments = run_of(corpus, tmp_path, "run"), []
    if what == "no_run":
        run = tmp_path / "nowhere"
    elif what == "no_curve":
        (run / "metrics.jsonl").unlink()
    elif what == "no_checkpoint":
        shutil.rmtree(run / "checkpoints")
    elif what == "no_split":
        arguments = ["--splits", "dev"]
    elif what == "twice":
        arguments = [run]
    else:
        shutil.rmtree(corpus)
    assert compare(run, *arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_runs_of_one_name_are_told_apart(corpus: Path, tmp_path: Path, compare: Tool) -> None:
    runs = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        runs.append(run_of(corpus, tmp_path / folder, "run"))
    assert compare(*runs, "--out", tmp_path / "out") == 0
    assert [row["run"] for row in table(tmp_path / "out")] == [str(run) for run in runs]


def test_a_corpus_that_has_moved_is_passed(corpus: Path, tmp_path: Path, compare: Tool) -> None:
    """Names with a bar and dollars too: the table stays a table."""
    run = run_of(corpus, tmp_path, "a|b$x_{y$")
    corpus.rename(tmp_path / "moved")
    assert compare(run, "--out", tmp_path / "out") == 2
    assert compare(run, "--corpus", tmp_path / "moved", "--out", tmp_path / "out") == 0
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[2].startswith(r"| a\|b$x_{y$ |")


def test_curves_of_different_precision_are_said(corpus: Path, tmp_path: Path, compare: Tool, capsys: Output) -> None:
    """A run in bfloat16 validates under autocast."""
    run = run_of(corpus, tmp_path, "run")
    loaded = load_run_model(run)
    settings = dataclasses.replace(loaded.config.train, precision="bfloat16")
    config = dataclasses.replace(loaded.config, name="mixed", runs_dir=str(tmp_path), train=settings)
    save(config.run_dir, config, loaded.model, step=7, fingerprint=loaded.state["corpus_fingerprint"])
    assert compare(run, write_curves(config.run_dir), "--out", tmp_path / "out") == 0
    assert "in different precision (run float32, mixed bfloat16)" in capsys.readouterr().err
