"""Every command in README.md and in the recipes' README files is one that works.

The slow test runs each document's commands in order in a copy of the project, on tiny recordings, with what takes long
made short (`SHORTER`). What a scheduler would run (sbatch) is run here without it.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from handmade_runs import options_of
from recordings import ROOT, load_script, voice, write

PROGRAMS = ("python", "make", "torchrun", "tensorboard", "sbatch", ".")
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("recipes/*/README.md"), ROOT / "samples" / "README.md"])
SHORTER = {
    "--seconds": "0.02",
    "--num": "2",
    "--length": "40",
    "--rounds": "1",
    "--nproc-per-node": "2",
    "--temperatures": "0.8,1.0",
}
"""Options whose values are replaced where they stand."""
FEW_STEPS = [
    "train.num_steps=4",
    "train.log_every_steps=1",
    "train.valid_every_steps=2",
    "train.sample_every_steps=4",
    "train.sample_seconds=0.01",
]
SMALL_AUDIO_MODEL = ["optim.decay_steps=3", "optim.warmup_steps=1"]
PLACES = {
    "PATH/TO/dataset-voice-kathleen": "kathleen",
    "PATH/TO/RECORDINGS": "recordings",
    **{f"PATH/TO/{name}": name for name in ("enwik8", "wikitext-2", "pg19")},
}
MAY_BE_FAULTY = 4
"""Exit status of tools/sample.py for noise, which is all that models of four steps can make."""


def code_blocks(document: Path) -> list[str]:
    """Indented and fenced blocks of code, without their indentation."""
    text = document.read_text(encoding="utf-8")
    fenced = re.findall(r"^```[a-z]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(
        r"(?:(?:^|(?<=\n))(?:    .*\n|\n(?=    )))+", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    )
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip("\n") for block in [*fenced, *indented]]


def commands(document: Path) -> list[list[str]]:
    """Command lines as words, comments and continuations resolved, in the order of the document."""
    found = []
    for block in code_blocks(document):
        for line in block.replace("\\\n", " ").splitlines():
            if line.split(" ")[0] in PROGRAMS:
                found.append(shlex.split(line, comments=True))
    return found


def test_the_documents_have_commands() -> None:
    counts = {str(document.relative_to(ROOT)): len(commands(document)) for document in DOCUMENTS}
    assert all(counts.values()), counts
    assert counts["README.md"] >= 8


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tools_files_and_options_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands(document):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        for word in words:
            if word.endswith(".yaml") or (word.endswith(".py") and "/" in word):
                assert (ROOT / word).is_file(), f"{word} in {shlex.join(words)}"
        if words[0] == "python" and words[1].startswith("tools/"):
            known = options_of(Path(words[1]).stem)
            files = [*ROOT.glob("recipes/*/prepare.py"), ROOT / "ct_audio" / "preparation" / "download.py"]
            recipe = "".join(path.read_text(encoding="utf-8") for path in files)
            for option in (word for word in words[2:] if re.match(r"--[a-z]", word)):
                assert option in known or f'"{option}"' in recipe, f"{words[1]} has no {option}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_the_library_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (block,) = [block for block in code_blocks(ROOT / "README.md") if "import" in block]
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["loss"].item() > 0


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kinds of recordings that the documents name, a few seconds each."""
    path = tmp_path_factory.mktemp("recordings")
    held_out = load_script("recipes/kathleen/prepare.py", "recipe_kathleen").held_out_prompts()
    prompts = [f"arctic_a{index:04d}" for index in range(12)]
    for split in ("valid", "test"):
        prompts += [next(prompt for prompt, found in held_out.items() if found == split)]
    for index, prompt in enumerate(prompts):
        write(path / "kathleen" / "data" / f"{prompt}_1592748574.wav", voice(index, 0.6))
    for index in range(80):  # enough folders for all three splits
        write(path / "recordings" / f"session{index}" / "take.wav", voice(index, 0.3))
    write_texts(path)
    return path


def write_texts(path: Path) -> None:
    """Texts of nonsense with as many words and subwords as the recipes' small models have codes."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghijklmnoprstu"), size=8)) for _ in range(60_000)]
    words = list(dict.fromkeys(words))[:33_276]  # and <eos> and <unk>
    texts = {"enwik8/enwik8": " ".join(words)}
    for split, chosen in (("train", words), ("valid", words[:9000]), ("test", words[:9000])):
        lines = [" " + " ".join(chosen[index : index + 20]) + " \n" for index in range(0, len(chosen), 20)]
        texts[f"wikitext-2/wiki.{split}.tokens"] = "".join(lines)
    for folder, chosen in (("train", words), ("validation", words[:9000]), ("test", words[:9000])):
        texts[f"pg19/{folder}/1.txt"] = "\n".join(chosen)
    for name, text in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project as it is in version control, with this machine's Python for its .venv."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in files.split("\0")[:-1]:
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    return tmp_path


def shortened(words: list[str], recordings: Path) -> list[str]:
    """The same command with less to do, and with this Python."""
    words = [str(recordings / PLACES[word]) if word in PLACES else word for word in words]
    for index, word in enumerate(words[:-1]):
        if word in SHORTER:
            words[index + 1] = SHORTER[word]
    scripts = Path(sys.executable).parent
    if words[0] == "sbatch":
        return shortened(shlex.split(words[words.index("--wrap") + 1]), recordings)
    if "tools/train.py" in words:
        kept = [word for word in words if not word.startswith(("train.num_steps=", "train.log_every"))]
        words = kept + FEW_STEPS + SMALL_AUDIO_MODEL
    if "tools/ablate.py" in words:
        few = ["--rows", "conv_bptt", "conv_attention", "--rates", "2", "--seeds", "0", "--set", *FEW_STEPS]
        words = [*words, *few, *SMALL_AUDIO_MODEL]
    return [str(scripts / words[0]), *words[1:]]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_run(document: Path, project: Path, recordings: Path) -> None:
    for words in commands(document):
        if words[0] in ("make", ".") or "--download" in words:
            continue  # what runs this test, or what needs a network; a demonstration or a mirror has a test of its own
        command = shortened(words, recordings)
        if words[0] == "tensorboard":
            assert_serves(command, project)
            continue
        command = [part for word in command for part in (sorted(expand(word, project)) if "*" in word else [word])]
        if ">>" in command:
            target = project / command[command.index(">>") + 1]
            command = command[: command.index(">>")]
            with target.open("a", encoding="utf-8") as file:
                file.write(run(command, project))
        else:
            run(command, project)


def expand(word: str, project: Path) -> list[str]:
    """What a shell makes of a pattern; the pattern itself where nothing fits."""
    return [str(path.relative_to(project)) for path in project.glob(word)] or [word]


def run(command: list[str], project: Path) -> str:
    """Run a command to its end; returns what it printed."""
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=900, check=False)
    good = (0, MAY_BE_FAULTY) if "tools/sample.py" in command else (0,)
    assert done.returncode in good, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def assert_serves(command: list[str], project: Path) -> None:
    """TensorBoard comes up over the runs that the commands before it have made."""
    server = subprocess.Popen([*command, "--port", "16006"], cwd=project, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen("http://localhost:16006/data/runs", timeout=5) as answer:
                    if b"small" in (found := answer.read()):
                        return
            except OSError:
                found = b""
            time.sleep(1)
        raise AssertionError(f"no runs at {shlex.join(command)}: {found!r}")
    finally:
        server.terminate()
        server.wait()
