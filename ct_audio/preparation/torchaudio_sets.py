"""Public data sets of speech that torchaudio.datasets fetches and checks; their files are listed and read by us.

(torchaudio's own loading of audio needs TorchCodec.) A set is fetched into a folder beside its place and moved there
when it is whole, so an interrupted download or unpacking leaves nothing that looks whole.
"""

import argparse
import shutil
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ct_audio.common.errors import UserError
from ct_audio.common.text import printable
from ct_audio.preparation.listing import find_audio, same_name
from ct_audio.preparation.recordings import Recording


def add_download_argument(parser: argparse.ArgumentParser, size: str) -> None:
    """The option --download of a recipe."""
    text = f"fetch what is missing into --source (default OUT_source) with torchaudio.datasets: {size}"
    parser.add_argument("--download", action="store_true", help=text)


def fetch(place: Path, dataset: Callable[[Path], Any], folder: str) -> None:
    """Let a class of torchaudio.datasets download, check and unpack a set, unless it is there.

    Args:
        place: where the set's folder goes.
        dataset: makes the object of torchaudio.datasets in a given root; it downloads on the way.
        folder: what it makes in its root, as "LJSpeech-1.1" or "LibriTTS/dev-clean".
    Raises:
        UserError: it cannot be downloaded, or its checksum is another.
    """
    target = place / folder
    if target.is_dir():
        return
    root = place / "download.partial"
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(root / folder, ignore_errors=True)  # of an unpacking that was interrupted
    try:
        dataset(root)
    except (urllib.error.URLError, ConnectionError, TimeoutError, EOFError, RuntimeError) as error:
        for archive in root.glob("*.*"):
            archive.unlink()  # of another checksum, or cut off
        raise UserError(
            f"cannot download {folder}: {error}; run the same command again, or fetch and unpack it by hand, pass its "
            "folder as --source and leave out --download"
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    (root / folder).rename(target)
    shutil.rmtree(root)


def find_set(source: Path, folder: str) -> Path:
    """The set's folder: `source` itself, or `folder` in it."""
    return source / folder if (source / folder).is_dir() else source


def recordings_below(
    folder: Path, expected: str, split_names: Callable[[list[str]], dict[str, str]], *, skip: Callable[[str], bool]
) -> list[Recording]:
    """Every recording below a folder with its split, and what else looks like audio there, which is dropped by name.

    Args:
        expected: the layout, for the message where there is none.
        split_names: the split of each name (a path below the folder), of all of them.
        skip: names that belong to the set and are not taken.
    Raises:
        UserError: there are no recordings.
    """
    found = find_audio(folder) if folder.is_dir() else None
    files = {name: path for name, path in found.files.items() if not skip(name)} if found else {}
    if not found or not files:
        raise UserError(
            f"{folder.absolute()}: expected {expected}; found no recordings; pass -- --download to fetch it"
        )
    splits = split_names(list(files))
    taken = [Recording(path, splits[name], printable(same_name(name))) for name, path in files.items()]
    others = [Recording(path, "train", printable(name), reason=why) for name, (path, why) in found.unusable.items()]
    return taken + others
