"""Prepare a data set: recordings or texts, as the recipe has it, into one corpus.

A recipe that makes its own recordings, as recipes/espeak, needs no --source.
"""

import argparse
import importlib.util
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from ct_audio.commands.command_line import build_parser, parse, refuse
from ct_audio.common.errors import UserError
from ct_audio.common.machine import usable_cpus
from ct_audio.common.recipes import recipe_folder


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and what stands after `--` for the recipe."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = build_parser(
        "Prepare recordings (any format of libsndfile, channel mean, 24 kHz, mu-law codes) or texts (bytes, words or "
        "subwords, as the recipe has it) into one corpus. An interrupted run goes on with the same command."
    )
    parser.epilog = "The recipe's own options stand after --; `-- --help` shows them."
    parser.add_argument("recipe", type=Path, help="name or folder of the recipe, as kathleen or recipes/folder")
    parser.add_argument(
        "--source",
        type=Path,
        default=None,
        help="folder of the recordings or texts; where a recipe makes its own, they are kept there (else in "
        "OUT_recordings)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus to make")
    parser.add_argument("--gain-db", type=float, default=0.0, help="one fixed gain for all recordings, in dB")
    parser.add_argument(
        "--trim-db",
        type=float,
        default=None,
        help="cut start and end of a recording where it is quieter than its loudest frame by more than this, in dB",
    )
    parser.add_argument("--min-seconds", type=float, default=0.1, help="drop recordings shorter than this")
    parser.add_argument("--num-processes", type=int, default=usable_cpus(), help="worker processes of one thread each")
    parser.add_argument("--allow-dropped", action="store_true", help="go on though over 5%% of the files are unusable")
    parser.add_argument("--overwrite", action="store_true", help="prepare again and replace the corpus that is there")
    parser.add_argument("--verify", action="store_true", help="texts: decode the corpus back and compare it with them")
    _, others = parser.parse_known_args(arguments[:cut])
    if others:
        line = shlex.join(["--", *others, *arguments[cut + 1 :]])
        raise UserError(f"{others[0]}: not known here; options of the recipe stand at the end, after --: {line}")
    return parse(parser, arguments[:cut]), arguments[cut + 1 :]


def load_recipe(folder: Path) -> ModuleType:
    """Import the prepare.py of a recipe.

    It defines `add_arguments(parser)` and `list_recordings(source: Path, options: Namespace) -> list[Recording]`, and
    `MAKES_RECORDINGS = True` if it fills `source` itself. A recipe of text defines `list_texts(source, options) ->
    list[Text]` and `settings(options) -> TextSettings` in place of `list_recordings`. One with an option --download
    (see `ct_audio.preparation.download`) defines `download(folder: Path, options)`, which fetches what is missing.
    `USELESS_WITH`, where there is one, names for an option, as "--group", those beside which it would do nothing.
    """
    spec = importlib.util.spec_from_file_location(f"recipe_{folder.name}", folder / "prepare.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_source(options: argparse.Namespace, recipe: ModuleType, recipe_options: argparse.Namespace) -> Path:
    """The folder of the data, which exists unless the recipe makes or downloads it."""
    if getattr(recipe, "MAKES_RECORDINGS", False):
        return options.source or options.out.with_name(options.out.name + "_recordings")
    if getattr(recipe_options, "download", False):
        folder = options.source or options.out.with_name(options.out.name + "_source")
        folder.mkdir(parents=True, exist_ok=True)
        recipe.download(folder, recipe_options)
        return folder
    if options.source is None:
        advice = "pass it, or -- --download" if hasattr(recipe, "download") else "pass it"
        raise UserError(f"--source: expected the folder of the data; {options.recipe} makes none of its own: {advice}")
    if not options.source.is_dir():
        raise UserError(f"--source {options.source.absolute()}: expected a folder of the data; it does not exist")
    return options.source


def main() -> int:
    """Parse, prepare, print, and return the exit status."""
    options, rest = parse_arguments(sys.argv[1:])
    options.recipe = recipe_folder(options.recipe)
    recipe = load_recipe(options.recipe)
    recipe_parser = build_parser(f"Options of {options.recipe}, which stand after -- on the command line.")
    recipe_parser.prog = f"{recipe_parser.prog} {options.recipe} --source DIR --out DIR --"
    recipe.add_arguments(recipe_parser)
    recipe_options = parse(recipe_parser, rest)
    if options.num_processes < 1:
        raise UserError(f"--num-processes: expected at least 1, got {options.num_processes}")
    is_text = hasattr(recipe, "list_texts")
    for_recordings = ("--gain-db", "--trim-db", "--min-seconds", "--allow-dropped")
    refuse(options, *for_recordings, unless=not is_text, why=f"only for recordings; {options.recipe} is of text")
    refuse(options, "--verify", unless=is_text, why=f"only for texts; {options.recipe} is of recordings")
    downloads = sorted(option for option in recipe_options.given if option.startswith("--download-"))
    refuse(recipe_options, *downloads, unless="--download" in recipe_options.given, why="only with -- --download")
    for option, others in getattr(recipe, "USELESS_WITH", {}).items():
        without = recipe_options.given.isdisjoint(others)
        refuse(recipe_options, option, unless=without, why=f"not with {' or '.join(others)}")
    folder = find_source(options, recipe, recipe_options)
    own = {name: str(value) if isinstance(value, Path) else value for name, value in vars(recipe_options).items()}
    own = {name: value for name, value in own.items() if name != "given" and not name.startswith("download")}
    source = {"recipe": options.recipe.resolve().name, "path": str(folder), "options": own}
    common = {"source": source, "num_processes": options.num_processes, "overwrite": options.overwrite}
    start = time.monotonic()
    if is_text:
        is_new = prepare_texts(
            recipe.list_texts(folder, recipe_options), recipe.settings(recipe_options), options, common
        )
    else:
        is_new = prepare_recordings(recipe.list_recordings(folder, recipe_options), options, common)
    if is_new:
        print(f"{options.out}: done in {time.monotonic() - start:.1f} s")
    return 0


def prepare_recordings(recordings: list[Any], options: argparse.Namespace, common: dict[str, Any]) -> bool:
    """Recordings -> corpus; False if it was there already."""
    from ct_audio.preparation.audio_report import summary_lines
    from ct_audio.preparation.recordings import AudioSettings, prepare_audio

    settings = AudioSettings(gain_db=options.gain_db, trim_db=options.trim_db, min_seconds=options.min_seconds)
    corpus, report = prepare_audio(
        recordings, options.out, settings=settings, allow_dropped=options.allow_dropped, **common
    )
    if report is None:
        print(f"{options.out} is complete already: the same recordings and settings ({corpus.fingerprint[:16]})")
        return False
    print("\n".join(summary_lines(report)))
    return True


def prepare_texts(texts: list[Any], settings: Any, options: argparse.Namespace, common: dict[str, Any]) -> bool:
    """Texts -> corpus; False if it was there already."""
    from ct_audio.preparation.text_blocks import require_decodes_back
    from ct_audio.preparation.text_tables import statistics_table
    from ct_audio.preparation.texts import prepare_text

    corpus, was_there = prepare_text(texts, options.out, settings=settings, **common)
    if was_there:
        print(f"{options.out} is complete already: the same texts and settings ({corpus.fingerprint[:16]})")
    if options.verify:
        print(f"{options.out} decodes back to its {require_decodes_back(corpus, texts)} bytes of text")
    if not was_there:
        print(statistics_table([corpus]))
    return not was_there
