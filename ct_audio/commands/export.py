"""Write a trained model as a folder to hand on: weights, configuration, codec, model card; or check such a folder."""

import argparse
import sys
from pathlib import Path

from ct_audio.commands.command_line import add_run_argument, build_parser, parse, refuse
from ct_audio.common.errors import UserError

STATUS_OTHER_NLL = 3


def main() -> int:
    """Parse, export or check, print, and return the exit status."""
    arguments = _parse()
    return _check(arguments.run) if arguments.check else _export(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from ct_audio.export.model_card import CardText
    from ct_audio.export.model_folder import export_model

    folder = export_model(
        arguments.run,
        arguments.out,
        which=arguments.checkpoint,
        nll_files=arguments.nll_file,
        clip=arguments.clip,
        samples=arguments.samples,
        text=CardText(arguments.licence, arguments.data, arguments.language, arguments.use),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote {folder}, {size / 2**20:.2f} MiB; read its README.md before you hand it on")
    return 0


def _check(folder: Path) -> int:
    from ct_audio.export.model_folder import CLIP_TOLERANCE_NATS, check_clip
    from ct_audio.runs.exported import is_exported

    if not is_exported(folder):
        raise UserError(f"--check: {folder} is no exported model; expected a folder with config.json")
    stated, found = check_clip(folder)
    same = abs(stated - found) <= CLIP_TOLERANCE_NATS
    print(f"{folder}: NLL of its clip {found:.6f} nats, stated {stated:.6f}: {'as stated' if same else 'ANOTHER'}")
    return 0 if same else STATUS_OTHER_NLL


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Write a trained model as a folder to hand on, in the layout of model hubs: config.json, model.safetensors, "
        "the files of the codec, a clip with its NLL, README.md (a model card). Where a command takes a run, it takes "
        "such a folder too. Exit status: 0 success, 2 the input does not fit, 3 --check found another NLL."
    )
    add_run_argument(parser)
    parser.add_argument(
        "--checkpoint", choices=["best", "last"], default="best", help="best by validation NLL, or last"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder; it must not exist yet")
    parser.add_argument(
        "--check", action="store_true", help="write nothing: score the clip of an exported folder, and compare"
    )
    parser.add_argument(
        "--nll-file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="JSON of evaluate --json for the card, beside what the run has stored; may be given several times",
    )
    parser.add_argument(
        "--clip", type=Path, metavar="FILE", help="a recording (its first second) or text; default: a synthetic one"
    )
    parser.add_argument("--samples", type=Path, metavar="DIR", help="samples of ct-audio sample to put in")
    group = parser.add_argument_group("for the card", "default: what is known of the recipe that prepared the data")
    group.add_argument("--licence", metavar="ID", help="of the weights, as cc0-1.0")
    group.add_argument("--data", metavar="TEXT", help="what the model was trained on")
    group.add_argument("--language", metavar="CODE", help="as en")
    group.add_argument("--use", metavar="TEXT", help="what the model is for")
    arguments = parse(parser)
    written = (
        "--out",
        "--checkpoint",
        "--nll-file",
        "--clip",
        "--samples",
        "--licence",
        "--data",
        "--language",
        "--use",
    )
    refuse(arguments, *written, unless=not arguments.check, why="not with --check, which writes nothing")
    if arguments.out is None and not arguments.check:
        raise UserError("expected --out (or --check): the folder to write")
    return arguments
