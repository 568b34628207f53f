"""The packages: imports go to packages further left only, no package has a circle, some libraries have one importer.

`python tests/test_architecture.py` prints the picture as numbers.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ct_audio"

LEVELS = [
    {"common"},
    {"data", "models"},
    {"runs", "preparation"},
    {"evaluation"},
    {"sampling"},
    {"training"},
    {"experiments", "export", "apps", "agents"},
    {"commands"},
]
"""A module may import from its own package and from packages of levels above; ARCHITECTURE.md says what each holds."""
ONLY_IMPORTER = {
    "soundfile": "data.audio_files",
    "av": "data.av_files",
    "wandb": "runs.weights_and_biases",
    "ray": "agents.rllib",
    "torch.distributed": "training.parallel",
    "torch.utils.tensorboard": "runs.metrics",
    "tensorboard": "runs.metrics",
    "tensorboardX": None,
    "yaml": "runs.config",
    "omegaconf": None,
    "pickle": None,
    "torchaudio.load": None,
}


def module_name(file: Path) -> str:
    """As "models.state"; a package is named like its folder, ct_audio itself is ""."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py")) if file.name != "__main__.py"}
PACKAGES = sorted({name.split(".")[0] for name in FILES if name})


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


def modules_imported(source: str) -> set[str]:
    """Modules of ct_audio that a source imports from; `from package import module` is an import of the module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ct_audio":
            module = (node.module or "").partition(".")[2]
            inside = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            found |= {name if name in FILES else module for name in inside}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("ct_audio.")}
    return found


ARROWS = {
    (name, other)
    for name, file in FILES.items()
    for other in modules_imported(file.read_text(encoding="utf-8"))
    if other and other != name
}


def level(name: str) -> int:
    """Number of the level that a module's package stands on; ct_audio itself, with its lazy names, is above all."""
    if not name:
        return len(LEVELS)
    return next(number for number, packages in enumerate(LEVELS) if name.split(".")[0] in packages)


def arrows_back() -> list[tuple[str, str]]:
    """Imports between packages that do not go to a level above."""
    return [
        (name, other)
        for name, other in sorted(ARROWS)
        if name.split(".")[0] != other.split(".")[0] and level(other) >= level(name)
    ]


def picture() -> dict[str, int]:
    """The picture of imports as numbers."""
    between = {(a.split(".")[0], b.split(".")[0]) for a, b in ARROWS if a.split(".")[0] != b.split(".")[0]}
    subpackages = {name for name, file in FILES.items() if file.name == "__init__.py" and name.count(".") == 1}
    return {
        "boxes on the top two levels": len(PACKAGES) + len(subpackages),
        "levels": len({level(name) for name in PACKAGES}),
        "modules": sum(file.name != "__init__.py" for file in FILES.values()),
        "arrows between packages": len(between),
        "arrows between modules": len(ARROWS),
        "arrows back": len(arrows_back()),
    }


def test_imports_are_found():
    source = (
        "import torch.distributed as d\nfrom ct_audio.models import state\nimport torch\ntorch.distributed.barrier()"
    )
    assert {"torch.distributed", "torch.distributed.barrier"} <= imports(source)
    assert modules_imported(source) == {"models.state"}
    assert modules_imported("from ct_audio.models import build_model") == {"models"}
    assert modules_imported("from ct_audio.common.errors import UserError") == {"common.errors"}


def test_every_module_stands_in_a_package_with_a_level():
    assert set(PACKAGES) <= set().union(*LEVELS)
    assert [name for name, file in FILES.items() if "." not in name and file.name != "__init__.py"] == []


def test_no_import_goes_back():
    assert arrows_back() == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_no_circle(package):
    inside: dict[str, set[str]] = {name: set() for name in FILES if name.split(".")[0] == package}
    for name, other in ARROWS:
        if name in inside and other in inside:
            inside[name].add(other)
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        raise AssertionError(f"{package}: {' <- '.join(error.args[1])}") from None


def test_the_picture_stays_small():
    numbers = picture()
    print(", ".join(f"{name}: {number}" for name, number in numbers.items()))
    assert numbers["boxes on the top two levels"] <= 16
    assert numbers["levels"] <= 8
    assert numbers["arrows back"] == 0


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
        assert modules_imported(source), f"{file.name} calls the package"
        assert "run_tool(" in source, f"{file.name} ends with sys.exit(run_tool(main))"


if __name__ == "__main__":
    for name, number in picture().items():
        print(f"{name}: {number}")
