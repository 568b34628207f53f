"""The documents: every command works, every link leads somewhere, ARCHITECTURE.md names what is there, plain English.

The slow test runs each document's commands in order in a copy of the project, on tiny recordings, with what takes long
made short (`SHORTER`). What a scheduler would run (sbatch) is run here without it.
"""

import functools
import math
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recordings import ROOT, load_script, voice, write

PROGRAMS = ("ct-audio", "python", "make", "torchrun", "tensorboard", "sbatch", ".")
RUN_IN_ORDER = sorted(
    [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md"), ROOT / "samples" / "README.md"]
)
"""Documents whose commands, one after another, work in a fresh copy of the project."""
DOCUMENTS = sorted({*RUN_IN_ORDER, ROOT / "ARCHITECTURE.md", *ROOT.glob("recipes/*/*.md")})
ASSUMED_RUNS = {"samples/README.md": ["kathleen/wavenet_small.yaml", "enwik8/compressive_transformer_small.yaml"]}
"""Runs that a document uses and another one, the README of the recipe, prepares and trains."""
WITHOUT_COMMANDS = {"docs/api.md", "docs/results.md", "docs/stack.md", "docs/troubleshooting.md"}
SHORTER = {
    "--seconds": "0.02",
    "--num": "2",
    "--length": "40",
    "--rounds": "1",
    "--nproc-per-node": "2",
    "--temperatures": "0.8,1.0",
    "--num-primed": "1",
    "--prime-seconds": "0.1",
}
"""Options whose values are replaced where they stand."""
FEW_STEPS = [
    "train.num_steps=4",
    "train.log_every_steps=1",
    "train.valid_every_steps=2",
    "train.sample_every_steps=4",
    "train.sample_seconds=0.01",
]
FEW_STEPS_OF_AGENTS = ["environment.num_environments=16", "train.num_steps=4096", "train.log_every_steps=2048"]
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
    """Command lines as words, comments and continuations resolved, in the order of the document.

    `ct-audio COMMAND` is shown as the script that does the same: it needs no installation.
    """
    found = []
    for block in code_blocks(document):
        for line in block.replace("\\\n", " ").splitlines():
            if line.split(" ")[0] in PROGRAMS:
                found.append(as_script(shlex.split(line, comments=True)))
    return found


def as_script(words: list[str]) -> list[str]:
    """`ct-audio train x` as `python tools/train.py x`; `torchrun -m ct_audio train x` likewise."""
    if words[0] == "torchrun" and "ct_audio" in words:
        at = words.index("ct_audio")
        return [*words[: at - 1], f"tools/{words[at + 1]}.py", *words[at + 2 :]]
    if words[0] != "ct-audio":
        return words
    is_command = not words[1].startswith("-")
    return [
        "python",
        *([f"tools/{words[1].replace('-', '_')}.py", *words[2:]] if is_command else ["-m", "ct_audio", *words[1:]]),
    ]


def name_of(document: Path) -> str:
    """As "docs/text.md"."""
    return document.relative_to(ROOT).as_posix()


every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


def test_the_documents_have_commands() -> None:
    counts = {name_of(document): len(commands(document)) for document in DOCUMENTS}
    assert {name for name, count in counts.items() if not count} <= WITHOUT_COMMANDS, counts
    assert sum(counts.values()) >= 80, counts
    shown = {words[1] for document in DOCUMENTS for words in commands(document) if words[0] == "python"}
    shown |= {words[1] for words in commands(ROOT / "BENCHMARKS.md")} | {"tools/demo.py"}  # make demo
    assert shown >= {f"tools/{file.name}" for file in ROOT.glob("tools/*.py")}


@functools.cache
def help_of(*words: str) -> str:
    """What a tool or a recipe prints for --help."""
    command = [sys.executable, *words, "--help"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout


@every_document
def test_tools_files_and_options_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands(document):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        for word in words:
            if word.endswith(".yaml") or (word.endswith(".py") and "/" in word):
                assert (ROOT / word).is_file(), f"{word} in {shlex.join(words)}"
        if words[0] == "python" and words[1].startswith("tools/"):
            cut = words.index("--") if "--" in words else len(words)
            require_options(words[2:cut], words[1])
            if words[cut + 1 :]:
                require_options(words[cut + 1 :], words[1], words[2], "--source", ".", "--out", ".", "--")


def require_options(words: list[str], *command: str) -> None:
    """Every option among the words is one that the command's own help names."""
    for option in (word for word in words if re.match(r"--[a-z]", word) and word != "--help"):
        assert re.search(rf"(^|[ \[]){option}\b(?!-)", help_of(*command), re.MULTILINE), f"{command} has no {option}"


@functools.cache
def all_options() -> set[str]:
    """Options of all tools and recipes."""
    tools = [("-m", "ct_audio"), *((f"tools/{file.name}",) for file in ROOT.glob("tools/*.py"))]
    recipes = [
        ("tools/prepare.py", name_of(file.parent), "--source", ".", "--out", ".", "--")
        for file in ROOT.glob("recipes/*/prepare.py")
    ]
    return {option for words in [*tools, *recipes] for option in re.findall(r"--[a-z][a-z-]*", help_of(*words))}


@every_document
def test_options_named_in_sentences_exist(document: Path) -> None:
    quoted = " ".join(re.findall(r"`([^`\n]+)`", document.read_text(encoding="utf-8")))
    assert set(re.findall(r"--[a-z][a-z-]*", quoted)) - all_options() <= {
        "--requeue",
        "--constraint",
    }  # sbatch's, pip's


def anchors(document: Path) -> set[str]:
    """What a link to a heading of a document may say after #."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        assert target.startswith("https://") or (document.parent / path).exists(), target
        assert not anchor or anchor in anchors(document.parent / path if path else document), target


@every_document
def test_pages_have_what_they_link_to(document: Path) -> None:
    """`make docs` copies files of some kinds, and a link to any other is a warning there, which is an error."""
    (kinds,) = re.findall(r"git ls-files -z (.+) \|", (ROOT / "Makefile").read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        file = document.parent / target.partition("#")[0]
        if not target.startswith("https://") and file.is_file():
            assert any(fnmatch(file.name, kind) for kind in shlex.split(kinds)), target


@pytest.mark.parametrize("document", ["README.md", "docs/stack.md"])
def test_the_library_examples_run(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = [block for block in code_blocks(ROOT / document) if "import" in block and "ct_audio.sample" not in block]
    found: list[dict] = [{} for _ in blocks]
    for block, names in zip(blocks, found, strict=True):
        exec(compile(block, document, "exec"), names)
        assert math.isfinite(names["loss"].item())
    if document == "docs/stack.md":
        network, core = found
        memory = network["memory"]  # lane 1 remembers the 24 rows of its new episode only: 16, and 8 as 2
        assert [memory.memory_valid[0].tolist(), memory.compressed_memory_valid[0].tolist()] == [[16, 16], [12, 2]]
        assert network["norms"].keys() == {"model", "compression"}
        assert len(core["memory"].rows[0]) == 200 % 32


def test_the_three_lines_from_nothing_to_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in code_blocks(ROOT / "README.md") if "ct_audio.sample" in block]
    assert len([line for line in block.splitlines() if line and not line.startswith("import")]) == 2
    exec(compile(block.replace("seconds=5", "seconds=0.1"), "README.md", "exec"), {})
    waveform, rate = soundfile.read("speech.wav")
    assert (len(waveform), rate) == (2400, 24_000)
    assert 0 < np.abs(waveform).max() < 1


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


def modules_named() -> list[str]:
    """Modules in the layout block of ARCHITECTURE.md, as "models/compressive/stack"."""
    (block,) = [block for block in code_blocks(ROOT / "ARCHITECTURE.md") if "\ncommon/" in block]
    found, folders = [], []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names, _, purpose = re.sub(r"  +", "  ", line.strip()).partition("  ")
        if names.endswith("/"):
            folders = [*folders[:depth], names]
        else:
            assert purpose, f"{names}: what is it for?"
            found += ["".join(folders[:depth]) + name for name in names.split(", ")]
    return found


def test_architecture_names_every_module_and_no_other() -> None:
    named = modules_named()
    package = ROOT / "ct_audio"
    files = {file.relative_to(package).with_suffix("").as_posix() for file in package.rglob("*.py")}
    there = {name for name in files if not name.endswith("__init__")}
    assert len(named) == len(set(named))
    assert sorted(set(named) - there) == [], "ARCHITECTURE.md names what does not exist"
    assert sorted(there - set(named)) == [], "ARCHITECTURE.md does not name these"


def test_architecture_names_files_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:tests/|tools/|test_)\w+\.py)`", text):
        assert (ROOT / name).is_file() or (ROOT / "tests" / name).is_file(), name
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
        assert (ROOT / name).is_file() or (ROOT / "ct_audio" / name).is_file(), name


NOT_PLAIN = ("nats a ", "bits a ", "codes a second", "goes on where", "rooms", "the house", "every model has to beat")


def prose(text: str) -> str:
    """Words on one line, without blocks of code: what programs print is quoted there as it is."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return " ".join(re.sub(r"^    .*$", "", text, flags=re.MULTILINE).split())


@every_document
def test_documents_are_in_plain_english(document: Path) -> None:
    words = prose(document.read_text(encoding="utf-8"))
    assert [phrase for phrase in NOT_PLAIN if re.search(rf"\b{phrase}", words)] == []


def test_what_is_not_plain_is_found() -> None:
    quoted = "text\n\n    2.4 nats a sample\n"
    assert "nats a " not in prose(quoted)
    assert "bits a " in prose("2 bits\na byte")


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
    if "--temperatures" in words:
        words[words.index("--seconds") + 1] = "0.1"  # a report measures spectra and pitch
    if "--corpus" in words and words[1] == "tools/evaluate.py":  # shipped models, a corpus made here
        words = [*words, "--allow-other-corpus"]
    scripts = Path(sys.executable).parent
    if words[0] == "sbatch":
        return shortened(as_script(shlex.split(words[words.index("--wrap") + 1])), recordings)
    if "tools/train.py" in words:
        kept = [word for word in words if not word.startswith(("train.num_steps=", "train.log_every"))]
        words = kept + FEW_STEPS + SMALL_AUDIO_MODEL
    if "tools/ablate.py" in words:
        few = ["--rows", "conv_bptt", "conv_attention", "--rates", "2", "--seeds", "0", "--set", *FEW_STEPS]
        words = [*words, *few, *SMALL_AUDIO_MODEL]
    if "tools/scaling.py" in words:
        words += ["--vary", "data.num_lanes=1,2", "--sample-seconds", "0.01", "--corpus-hours", "1", "--steps", "1"]
    if "tools/agent.py" in words and "--watch" not in words:
        words = [*words, *FEW_STEPS_OF_AGENTS]
    if "tools/agent_sweep.py" in words:
        words = [*words, "--set", *FEW_STEPS_OF_AGENTS]
    return [str(scripts / words[0]), *words[1:]]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("document", RUN_IN_ORDER, ids=name_of)
def test_commands_run(document: Path, project: Path, recordings: Path) -> None:
    for words in [*commands_before(document), *commands(document)]:
        if words[0] in ("make", ".") or words[1:3] == ["-m", "pip"] or {"--download", "--manifest"} & {*words}:
            continue  # what runs this test, or what needs a network or others' manifests; all have tests of their own
        if "--nnodes" in shlex.join(words):
            continue  # of several machines; tested in test_distributed.py
        if any(word.startswith("recipes/popgym/") for word in words) and find_spec("popgym") is None:
            continue  # it is no dependency
        if "tools/listen.py" in words or {"--grid", "--changes"} & {*words}:
            continue  # more speech, or time, than there is here; tested in test_listen.py and test_ablate.py
        if "tools/play.py" in words:
            continue  # it serves a browser until it is ended, or needs a sound card; tested in test_playground.py
        if "tools/gpu_check.py" in words:
            continue  # it is for a GPU; tested with small sizes in test_gpu_check.py
        command = shortened(words, recordings)
        if words[0] == "tensorboard":
            assert_serves(command, project)
            continue
        command = [part for word in command for part in (sorted(expand(word, project)) if "*" in word else [word])]
        into = next((word for word in command if word in (">", ">>")), None)
        if into is not None:
            target = project / command[command.index(into) + 1]
            command = command[: command.index(into)]
            with target.open("a" if into == ">>" else "w", encoding="utf-8") as file:
                file.write(run(command, project))
        else:
            run(command, project)


def commands_before(document: Path) -> list[list[str]]:
    """Commands that prepare and train the runs that a document assumes."""
    found = []
    for config in ASSUMED_RUNS.get(name_of(document), []):
        recipe = (ROOT / "recipes" / config).parent
        makers = ("tools/prepare.py", f"recipes/{config}")
        found += [words for words in commands(recipe / "README.md") if words[1] in makers or words[-1] in makers]
    return found


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
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([*command, "--port", str(port)], cwd=project, stderr=subprocess.DEVNULL)
    runs = [path.name.encode() for path in (project / command[command.index("--logdir") + 1]).iterdir()]
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(f"http://localhost:{port}/data/runs", timeout=5) as answer:
                    found = answer.read()
                    if any(run in found for run in runs):
                        return
            except OSError:
                found = b""
            time.sleep(1)
        raise AssertionError(f"no runs at {shlex.join(command)}: {found!r}")
    finally:
        server.terminate()
        server.wait()
