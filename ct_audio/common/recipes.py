"""Where the recipes are, and which one a name means: in a copy of the project or in an installed package alike."""

import difflib
from pathlib import Path

from ct_audio.common.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
PROGRAM = PACKAGE / "__main__.py"
"""What `ct-audio` runs: a script that needs no installation, as in [sys.executable, PROGRAM, "train", ...]."""
RECIPES = next((folder for folder in (PACKAGE.parent / "recipes", PACKAGE / "recipes") if folder.is_dir()), None)
"""Beside the package in a copy of the project, in the package where a wheel was installed; None: there are none."""


def recipe_names() -> list[str]:
    """Names of the recipes' folders, as "kathleen"."""
    return sorted(file.parent.name for file in RECIPES.glob("*/prepare.py")) if RECIPES else []


def config_names(recipe: str = "*") -> list[str]:
    """Names of the recipes' YAMLs, as "kathleen/wavenet_small"."""
    files = RECIPES.glob(f"{recipe}/*.yaml") if RECIPES else []
    return sorted(f"{file.parent.name}/{file.stem}" for file in files)


def recipe_folder(name: str | Path) -> Path:
    """The folder of a recipe.

    Args:
        name: a folder with prepare.py, or the name of a recipe, as "kathleen" or "recipes/kathleen".
    Raises:
        UserError: there is no such folder or recipe.
    """
    path = Path(name)
    if (path / "prepare.py").is_file():
        return path
    parts = path.parts[1:] if path.parts[:1] == ("recipes",) else path.parts
    if RECIPES and len(parts) == 1 and parts[0] in recipe_names():
        return RECIPES / parts[0]
    raise UserError(
        f"{name} is no recipe: there is no prepare.py in it; expected a folder, or one of {', '.join(recipe_names())}"
    )


def model_names() -> list[str]:
    """Names of the models that the recipes ship, as "kathleen/wavenet"."""
    files = RECIPES.glob("*/pretrained/*/config.json") if RECIPES else []
    return sorted(f"{file.parents[2].name}/{file.parent.name}" for file in files)


def model_folder(name: str | Path) -> Path:
    """The folder of a model.

    Args:
        name: a folder, or the name of a model that a recipe ships, as "kathleen/wavenet" or
            "recipes/kathleen/pretrained/wavenet". A folder that exists comes first.
    Returns:
        the name as a path where there is neither.
    """
    path = Path(name)
    parts = [part for part in path.parts if part not in ("recipes", "pretrained")]
    if path.exists() or RECIPES is None or "/".join(parts) not in model_names():
        return path
    return RECIPES / parts[0] / "pretrained" / parts[1]


def model_name(folder: Path) -> str:
    """What commands call the model in a folder: "kathleen/wavenet" where a recipe ships it, else the folder's name."""
    *_, recipe, _, name = ("", "", *folder.absolute().parts)
    is_shipped = RECIPES is not None and folder.absolute() == RECIPES / recipe / "pretrained" / name
    return f"{recipe}/{name}" if is_shipped else name


def config_file(name: str | Path) -> Path:
    """The YAML of a run.

    Args:
        name: a file, or the name of a recipe's YAML, as "kathleen/wavenet_small"; recipes/ before it and .yaml behind
            it make no difference. A file that exists comes first.
    Raises:
        UserError: neither is there.
    """
    path = Path(name)
    if path.exists():
        return path
    parts = path.parts[1:] if path.parts[:1] == ("recipes",) else path.parts
    known, wanted = config_names(), "/".join(parts).removesuffix(".yaml")
    if RECIPES and wanted in known:
        return RECIPES / f"{wanted}.yaml"
    of_recipe = config_names(parts[0]) if len(parts) <= 2 and parts and parts[0] in recipe_names() else []
    near = difflib.get_close_matches(wanted, known, n=3) or of_recipe
    advice = f"did you mean {', '.join(near)}?" if near else "expected a file, or a recipe's, as kathleen/wavenet_small"
    raise UserError(f"cannot read the configuration {name}: there is no such file; {advice}")
