"""Options of the commands: one that would do nothing is an error, for every command; help comes at once, anywhere."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from handmade_runs import ROOT, Output, Patch, Tool, make_run, noise_corpus, options_of, refusal, text_run, tool
from tiny_runs import tiny_run

from ct_audio.commands.command_line import build_parser, parse, refuse
from ct_audio.common.errors import UserError
from ct_audio.data.codecs import Byte
from ct_audio.runs.config import config_to_yaml

TOOLS = sorted((ROOT / "tools").glob("*.py"))
SWEEP = "--sweep-memory 0 --sweep-compressed 0,4"
IN_A_SWEEP = ": not in a sweep over memory lengths; leave it out"
NEEDS_SWEEP = ": only with --sweep-memory or --sweep-compressed"
OUT = "--out OUT"
WITHOUT_RUN = {
    "evaluate": [
        (f"{SWEEP} --memory-length 0", "--memory-length" + IN_A_SWEEP),
        (f"{SWEEP} --compressed-memory-length 0", "--compressed-memory-length" + IN_A_SWEEP),
        (f"{SWEEP} --lanes 1", "--lanes" + IN_A_SWEEP),
        (f"{SWEEP} --warmup-seconds 0", "--warmup-seconds" + IN_A_SWEEP),
        (f"{SWEEP} --max-seconds 0", "--max-seconds" + IN_A_SWEEP),
        ("--sweep-memory 0 --by count", "--by" + IN_A_SWEEP),
        ("--sweep-compressed 0 --dynamic sgd --dynamic-decay 0", "--dynamic, --dynamic-decay" + IN_A_SWEEP),
        ("--test-split test", "--test-split" + NEEDS_SWEEP),
        ("--no-test", "--no-test" + NEEDS_SWEEP),
        (f"{SWEEP} --no-test --test-split test", "--test-split: not with --no-test"),
        (OUT, "--out: only with --by, --sweep-memory or --sweep-compressed"),
        ("--dynamic-learning-rate 0.1", "--dynamic-learning-rate: only with --dynamic"),
        ("--dynamic-max-gradient-norm 1", "--dynamic-max-gradient-norm: only with --dynamic"),
        ("--dynamic-decay 0.0", "--dynamic-decay: only with --dynamic"),
        ("--dynamic-chunk-length 8", "--dynamic-chunk-length: only with --dynamic"),
        ("--dynamic sgd --precision bfloat16", "--precision: not with --dynamic"),
        (f"{SWEEP} --precision bfloat16", "--precision" + IN_A_SWEEP),
        ("--warmup-seconds 0", "--warmup-seconds: only with --lanes above 1"),
        ("--threads -1", "--threads: expected at least 0, got -1"),
    ],
    "sample": [
        ("", "expected --out, --stdout or --play"),
        ("--stdout --play --num 1", "--stdout and --play: expected one of them"),
        ("--play", "--play is for one sample: pass --num 1 and one --temperature"),
        ("--play --num 1 --plots", "--plots: only with --out"),
        (f"{OUT} --save-every -1", "--save-every: expected seconds of at least 0, got -1.0"),
        (f"{OUT} --num 0", "--num: expected at least 1, got 0"),
        ("--stdout --num 1 --resume", "--resume: only with --out"),
        ("--stdout --num 1 --save-every 60", "--save-every: only with --out"),
        ("--stdout --num 1 --plots", "--plots: only with --out"),
        ("--stdout --num 1 --temperatures 1,2", "--temperatures: only with --out"),
        (
            f"{OUT} --stdout --num 1 --temperatures 1,2",
            "--stdout is for one sample: pass --num 1 and one --temperature",
        ),
        (f"{OUT} --stdout", "--stdout is for one sample"),
        (f"{OUT} --corpus x", "--corpus: only with --temperatures"),
        (f"{OUT} --prime-seconds 1", "--prime-seconds: only with --prime, an audio or text file"),
        (f"{OUT} --prime-length 1", "--prime-length: only with --prime"),
        (f"{OUT} --include-prime", "--include-prime: only with --prime"),
        (f"{OUT} --temperature 0 --seed 0", "--seed: nothing is drawn at --temperature 0"),
        (f"{OUT} --temperatures 0 --top-k 5 --top-p 0.5", "--top-k, --top-p: nothing is drawn at --temperature 0"),
    ],
    "prepare": [
        *(
            (f"{ROOT}/recipes/enwik8 {OUT} {option}", f"{option.split()[0]}: only for recordings; ")
            for option in ("--gain-db 0", "--trim-db 40", "--min-seconds 0.1", "--allow-dropped")
        ),
        (f"{ROOT}/recipes/folder {OUT} --verify", "--verify: only for texts; "),
        *(
            (f"{ROOT}/recipes/folder {OUT} -- {useless} {other} x", f"{useless.split()[0]}: not with {others}")
            for useless, other, others in (
                ("--group folder", "--group-regex", "--group-regex"),
                ("--valid-percent 5", "--test-list", "--valid-list or --test-list"),
                ("--test-percent 5", "--valid-list", "--valid-list or --test-list"),
            )
        ),
        (f"{ROOT}/recipes/enwik8 {OUT} -- --download-mirror x", "--download-mirror: only with -- --download"),
        (f"{ROOT}/recipes/pg19 {OUT} -- --download-connections 16", "--download-connections: only with -- --download"),
    ],
    "bench": [("a.yaml --what train train", "--what: ['train', 'train'] has a value twice")],
    "scaling": [
        (f"BASE {OUT} --steps 0", "--steps: expected at least 1, got 0"),
        (f"BASE {OUT} --sample-seconds 1 1", "--sample-seconds: expected numbers above 0 and below 1e6, each once"),
        (f"BASE {OUT} --corpus-hours 0", "--corpus-hours: expected numbers above 0 and below 1e6, each once"),
        (f"BASE {OUT} --vary model.width=8", "--vary: expected KEY=A,B,... with two numbers above 0 or more"),
        (f"BASE {OUT} --vary model.breadth=8,16", "override 'model.breadth=8': unknown key model.breadth"),
    ],
    "export": [
        ("", "expected --out (or --check): the folder to write"),
        (f"--check {OUT}", "--out: not with --check, which writes nothing"),
        ("--check --licence cc0-1.0 --data x", "--licence, --data: not with --check"),
    ],
    "play": [
        ("RUN --speaker --port 1", "--port: not with --speaker"),
        ("RUN --speaker --prime-seconds 1", "--prime-seconds: only with --prime"),
        ("RUN --port 70000", "--port: expected 0 to 65535, got 70000"),
    ],
    "describe": [
        ("a --processes 2", "--processes: only with a YAML of a run"),
        ("a b=c", "b=c: a key is changed only with a YAML"),
    ],
    "page": [("a --out x.html --split test", "--split: only with --corpus")],
    "compare": [(f"a {OUT} --splits valid valid", "--splits: ['valid', 'valid'] has a value twice")],
    "gpu_check": [("--out OUT --minutes 0", "--minutes: expected a number above 0, got 0.0")],
    "kill_test": [
        ("--kills 0", "--kills: expected at least 1, got 0"),
        ("--processes 3", "--processes: expected 1, 2 or 4"),
        ("--steps 9", "--steps: expected an even number of at least 2, got 9"),
    ],
    "listen": [
        (f"{OUT} --num -1", "--num: expected at least 0, got -1"),
        (f"{OUT} --count -1", "--count: expected at least 0, got -1"),
        (f"{OUT} --save-every nan", "--save-every: expected at least 0, got nan"),
        (f"{OUT} --num 0 --num-primed 0", "--num 0 --num-primed 0: expected at least one sample"),
        (f"{OUT} --num-primed 0 --prime-seconds 1", "--prime-seconds: nothing is continued"),
        (f"{OUT} --temperatures 1,x", "--temperatures: expected numbers as 1,0.9,0.8, got '1,x'"),
        (f"{OUT} --temperatures 1,1.0", "--temperatures: expected each one once"),
        (f"{OUT} --temperatures=-1", "--temperatures: expected finite numbers of at least 0"),
        (f"{OUT} --temperatures 0 --seed 0", "--seed: nothing is drawn at temperature 0"),
    ],
    "ablate": [
        *(
            (f"BASE {OUT} --{name} {value} {value}", f"--{name}: [")
            for name, value in (("rows", "max"), ("rates", "2"), ("seeds", "1"))
        ),
        *(
            (f"BASE {OUT} --set {key}=x", f"{key}=x: the command sets it itself in every run")
            for key in ("name", "runs_dir", "train.seed", "model.compression_rate", "model.compression_function")
        ),
        (f"BASE {OUT} --grid train.seed=1,2", "train.seed=1: the command sets it itself in every run"),
        (f"BASE {OUT} --changes name=x", "name=x: the command sets it itself in every run"),
        (f"BASE {OUT} --grid model.width=8,16 --rates 2", "--rates: only for Table 5, without --grid and --changes"),
        (f"BASE {OUT} --changes model.width=8 --rows max", "--rows: only for Table 5, without --grid and --changes"),
        (f"BASE {OUT} --grid model.width", "--grid: expected KEY=VALUE,VALUE,... as model.head=categorical,"),
        (f"BASE {OUT} --grid model.width=8,", "--grid: expected KEY=VALUE,VALUE,... as model.head=categorical,"),
        (f"BASE {OUT} --grid model.width=8 model.width=16", "--grid: expected each key once, got model.width"),
        (f"BASE {OUT} --changes model.width=8 model.width=8", "the same settings twice: model.width=8"),
        (f"BASE {OUT} --changes model.breadth=8", "override 'model.breadth=8': unknown key model.breadth"),
    ],
    "optimisation": [
        (f"BASE {OUT} --base-steps 1 --branch-steps 1 --branches rate_0 rate_0", "--branches: ["),
        *(
            (f"BASE {OUT} --base-steps 1 --branch-steps 1 --set {key}=3", f"{key}=3: the command sets it itself")
            for key in ("name", "runs_dir", "train.num_steps")
        ),
    ],
}
"""By command, words that are refused before any run is opened, and what is said. The run itself is "RUN"."""
EXCLUSIVE = {
    "sample": ["--temperature 1 --temperatures 1,2", "--seconds 1 --length 2", "--prime-seconds 1 --prime-length 2"],
    "score": ["--bin-seconds 1 --bin-units 2"],
}
NOTHING_TO_REFUSE = {"agent", "agent_sweep", "analyse", "demo", "doctor", "train"}
"""Every option of these does something whatever the others are."""


def check(command: Tool, words: list[Any], message: str, capsys: Output) -> None:
    assert refusal(capsys, command, *words).startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [(name, words, message) for name, cases in WITHOUT_RUN.items() for words, message in cases],
)
def test_options_that_would_do_nothing_are_refused(
    name: str, words: str, message: str, tmp_path: Path, monkeypatch: Patch, capsys: Any
) -> None:
    base = tmp_path / "base.yaml"
    if "BASE" in words:
        base.write_text(config_to_yaml(tiny_run(tmp_path)), encoding="utf-8")
    places = {"OUT": str(tmp_path / "out"), "BASE": str(base)}
    run = ["RUN"] if name in ("evaluate", "export", "listen", "sample") else []
    check(tool(name, monkeypatch), run + [places.get(word, word) for word in words.split()], message, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "words"), [(name, words) for name in EXCLUSIVE for words in EXCLUSIVE[name]])
def test_options_of_which_one_would_win_are_refused(name: str, words: str, monkeypatch: Patch, capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        tool(name, monkeypatch)("RUN", *(["FILE"] if name == "score" else []), *words.split())
    assert caught.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_seconds_are_refused_for_a_text(tmp_path: Path, monkeypatch: Patch, capsys: Output) -> None:
    run = text_run(tmp_path, Byte(), "text")
    (tmp_path / "some.txt").write_text("text")
    score = [run, tmp_path / "some.txt", "--bin-seconds", 1]
    check(tool("score", monkeypatch), score, "--bin-seconds: bytes of a text have no seconds", capsys)
    for words in (["--max-seconds", 1], ["--lanes", 2, "--warmup-seconds", 1]):
        check(tool("evaluate", monkeypatch), [run, *words], f"{words[-2]}: the corpus is text", capsys)


def test_dynamic_evaluation_learns_in_one_lane(tmp_path: Path, monkeypatch: Patch, capsys: Output) -> None:
    run = make_run(noise_corpus(tmp_path / "corpus"), tmp_path)
    words = [run, "--dynamic", "sgd", "--lanes", 2]
    check(tool("evaluate", monkeypatch), words, "dynamic evaluation: expected num_lanes = 1", capsys)


def test_every_command_is_in_a_table() -> None:
    assert {file.stem for file in TOOLS} == WITHOUT_RUN.keys() | EXCLUSIVE.keys() | NOTHING_TO_REFUSE
    for name, cases in WITHOUT_RUN.items():
        named = {option for _, message in cases for option in message.split(":")[0].split(", ")}
        known = options_of(name) if name != "prepare" else named
        assert {option for option in named if option.startswith("--") and " " not in option} <= known


def test_what_is_given_is_known_though_it_is_the_default() -> None:
    parser = build_parser("x")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--other-number", type=int, default=3)
    parser.add_argument("--list", action="append", default=["a"])
    parser.add_argument("--flag", action="store_true")
    arguments = parse(parser, ["--number", "0", "--list", "b"])
    assert arguments.given == {"--number", "--list"}
    assert (arguments.number, arguments.other_number, arguments.list) == (0, 3, ["a", "b"])
    assert (arguments.flag, arguments.words) == (False, [])
    refuse(arguments, "--other-number", "--flag", why="never")
    refuse(arguments, "--number", unless=True, why="never")
    with pytest.raises(UserError, match=r"^--number, --list: only with --flag$"):
        refuse(arguments, "--number", "--flag", "--list", why="only with --flag")


@pytest.mark.parametrize("file", TOOLS, ids=lambda file: file.stem)
def test_tools_give_help_without_installation_and_without_loading_torch(file: Path) -> None:
    """-S: there are no installed packages, neither this one nor torch; -I: nor is the current directory searched."""
    command = [sys.executable, "-I", "-S", str(file), "--help"]
    found = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith(f"usage: {file.name} ")
    assert "--checkpoint" not in found.stdout or "(default: best)" in found.stdout


@pytest.mark.parametrize("file", TOOLS, ids=lambda file: file.stem)
def test_tools_are_alike(file: Path) -> None:
    docstring, _, rest = file.read_text(encoding="utf-8").partition('"""\n\n')
    assert docstring.count("\n") == 0
    first = TOOLS[0].read_text(encoding="utf-8").partition('"""\n\n')[2]
    assert sorted(rest.splitlines()) == sorted(first.replace(f".{TOOLS[0].stem} ", f".{file.stem} ").splitlines())


def test_experiments_know_no_command_line() -> None:
    for file in (ROOT / "ct_audio" / "experiments").glob("*.py"):
        assert "argparse" not in file.read_text(encoding="utf-8")
