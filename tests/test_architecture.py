"""The rooms: a module imports only modules listed above it, and some libraries have one importer only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ct_audio"

ROOMS = [
    "errors",
    "files",
    "text_codec",
    "codec",
    "wav",
    "corpus",
    "report",
    "preparation",
    "prepare",
    "text",
    "prepare_text",
    "text_statistics",
    "download",
    "window_stream",
    "losses",
    "models.interface",
    "models.memory",
    "models.compression",
    "models.attention",
    "models.windows",
    "models.layers",
    "models.compressive_config",
    "models.compressive_layer",
    "models.compressive_transformer",
    "models.wavenet",
    "models.linear_prediction",
    "models",
    "config",
    "optim",
    "distributed",
    "checkpoint_files",
    "checkpoint",
    "metrics",
    "evaluate",
    "dynamic_evaluation",
    "run_evaluation",
    "memory_sweep",
    "comparison",
    "curves",
    "sample",
    "sample_measures",
    "nll_groups",
    "score",
    "evaluation_figures",
    "sample_text",
    "sample_state",
    "analysis",
    "analysis_figures",
    "session",
    "train",
    "branch",
    "sample_session",
    "sample_files",
    "sample_report",
    "cli",
]
ONLY_IMPORTER = {
    "soundfile": "wav",
    "omegaconf": "config",
    "torch.distributed": "distributed",
    "torch.utils.tensorboard": "metrics",
    "tensorboard": "metrics",
    "tensorboardX": "metrics",
    "pickle": None,
    "torchaudio.load": None,
}
ONLY_IMPORTS = {"cli": {"errors"}, "errors": set()}


def module_name(file: Path) -> str:
    """As "models.memory"; the package itself is ""."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str) -> set[str]:
    """Dotted names that a source imports or, for `import a.b` and attributes of it, mentions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def rooms_imported(source: str) -> set[str]:
    """Rooms of ct_audio that a source imports."""
    inside = {name.removeprefix("ct_audio.") for name in imports(source) if name.startswith("ct_audio.")}
    return {max((room for room in FILES if f"{name}.".startswith(f"{room}.")), key=len) for name in inside if name}


def test_imports_are_found():
    source = (
        "import torch.distributed as d\nfrom ct_audio.models import memory\nimport torch\ntorch.distributed.barrier()"
    )
    assert {"torch.distributed", "torch.distributed.barrier"} <= imports(source)
    assert "models.memory" in rooms_imported(source)
    assert rooms_imported("from ct_audio.wav import read_wav") == {"wav"}


def test_every_module_has_its_place():
    missing = set(FILES) - {""} - set(ROOMS)
    models = {name for name in missing if name.startswith("models.")}
    assert not missing - models, f"give {missing} a place in ROOMS"


def place(room: str) -> float:
    """Its number in ROOMS; a model that is not listed stands among the models."""
    return ROOMS.index(room) if room in ROOMS else ROOMS.index("models") - 0.5


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_a_module_imports_only_modules_above_it(name):
    for room in rooms_imported(FILES[name].read_text(encoding="utf-8")) - {name}:
        beside = name == "models" or (name.startswith("models.") and room == "models")
        assert beside or place(room) < place(name), f"{name} imports {room}, which does not stand above it"
        assert room in ONLY_IMPORTS.get(name, {room}), f"{name} may import {ONLY_IMPORTS.get(name)} only, not {room}"


def used(library: str, source: str) -> bool:
    """Whether a source imports a library or a part of it."""
    return any(f"{name}.".startswith(f"{library}.") for name in imports(source))


@pytest.mark.parametrize("library", sorted(ONLY_IMPORTER))
def test_libraries_with_one_importer(library):
    users = {name for name, file in FILES.items() if used(library, file.read_text(encoding="utf-8"))}
    for folder in ("tools", "recipes"):
        files = sorted((PACKAGE.parent / folder).rglob("*.py"))
        users |= {file.name for file in files if used(library, file.read_text(encoding="utf-8"))}
    assert users <= {ONLY_IMPORTER[library]}


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_file_says_what_it_is_for(name):
    assert ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))


def test_tools_import_the_package_alone():
    for file in sorted((PACKAGE.parent / "tools").glob("*.py")):
        source = file.read_text(encoding="utf-8")
        assert rooms_imported(source), f"{file.name} calls the package"
        assert "run_tool(" in source, f"{file.name} ends with sys.exit(run_tool(main))"
