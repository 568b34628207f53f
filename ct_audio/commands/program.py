"""The program `ct-audio COMMAND ...`: a command is a module of this package, but for this one and `command_line`."""

import argparse
import ast
import difflib
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ct_audio import __version__, commands
from ct_audio.commands.command_line import ParserOnly, build_parser, parsers_only, run_tool
from ct_audio.common.errors import UserError
from ct_audio.common.recipes import RECIPES, config_names, model_names, recipe_names

NAME = "ct-audio"
_NO_COMMANDS = {"command_line", "program"}
SHELLS = ("bash", "zsh", "tcsh")


def command_modules() -> dict[str, str]:
    """Module of each command by its name, as "kill-test"."""
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__) if module.name not in _NO_COMMANDS)
    return {name.replace("_", "-"): f"{commands.__name__}.{name}" for name in names}


def main(words: list[str] | None = None) -> int:
    """Run the command that the first word names on the others; returns the exit status.

    Args:
        words: of the command line; None: this process's.
    """
    words = sys.argv[1:] if words is None else words
    return run_tool(lambda: _run(words))


def _run(words: list[str]) -> int:
    modules = command_modules()
    if words and not words[0].startswith("-"):
        if words[0] not in modules:
            near = difflib.get_close_matches(words[0], modules, n=1)
            advice = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{NAME} {words[0]}: no such command; {advice}Commands: {', '.join(modules)}")
        return _main_of(modules[words[0]], words)() or 0
    parser = _parser(modules)
    arguments = parser.parse_args(words)
    if arguments.print_completion:
        print(_completion(arguments.print_completion, modules))
        return 0
    parser.print_help(sys.stderr)
    return 2


def _main_of(module: str, words: list[str]) -> Callable[[], int | None]:
    sys.argv = [f"{NAME} {words[0]}", *words[1:]]
    return importlib.import_module(module).main


def _parser(modules: dict[str, str]) -> argparse.ArgumentParser:
    parser = build_parser("Compressive Transformers, Transformer-XL and WaveNet for raw audio and text.")
    parser.prog, parser.usage = NAME, f"{NAME} COMMAND ...   ({NAME} COMMAND --help shows its options)"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    width = max(map(len, modules))
    lines = [f"  {name:{width}}  {_summary(module)}" for name, module in modules.items()]
    recipes = f"recipes, as in `{NAME} prepare NAME` and `{NAME} train NAME/FILE`: {', '.join(recipe_names())}"
    shipped = f"shipped models, as in `{NAME} sample NAME --out DIR`: {', '.join(model_names())}"
    parser.epilog = "\n".join(["commands:", *lines, "", recipes, shipped, f"  in {RECIPES}"])
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        metavar="SHELL",
        help=f"print a script for {', '.join(SHELLS)}; see docs/install.md",
    )
    return parser


def _summary(module: str) -> str:
    """The beginning of the first line of a module's docstring; the module is not imported."""
    file = Path(commands.__path__[0]) / f"{module.rpartition('.')[2]}.py"
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.split(r"[:;,.]", docstring, maxsplit=1)[0]


def _completion(shell: str, modules: dict[str, str]) -> str:
    """A script for a shell, made by shtab from the parsers of all commands."""
    try:
        import shtab
    except ImportError:
        raise UserError("--print-completion needs shtab; run: python -m pip install shtab") from None
    program = argparse.ArgumentParser(NAME)
    program.add_argument("--version", action="store_true", help="show the version")
    subparsers = program.add_subparsers()
    with parsers_only():
        for name, module in modules.items():
            parser = _parser_of(_main_of(module, [name]))
            for action in parser._actions:
                if action.type is Path:
                    action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
                if action.dest in ("config", "base", "recipes"):
                    action.choices = [*config_names()]
                if action.dest == "recipe":
                    action.choices = recipe_names()
                if action.dest in ("run", "runs") and not action.option_strings:
                    if shell == "bash":  # which offers folders, too, where no name matches
                        action.choices = model_names()
                    else:
                        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            subparsers.add_parser(name, parents=[parser], add_help=False, help=_summary(module))
    return shtab.complete(program, shell)


def _parser_of(main: Callable[[], int | None]) -> argparse.ArgumentParser:
    try:
        main()
    except ParserOnly as found:
        return found.parser
    raise AssertionError("a command parses its words by command_line.build_parser before all else")
