"""LibriTTS: audio books of many readers at 24 kHz; the splits are those of the set, which share no reader.

Names are subset/reader/chapter/sentence, so that the corpus reads a chapter from its beginning to its end.
"""

import argparse
from pathlib import Path

from ct_audio.common.errors import UserError
from ct_audio.preparation.listing import warn
from ct_audio.preparation.recordings import Recording, split_groups
from ct_audio.preparation.torchaudio_sets import add_download_argument, fetch, find_set, recordings_below

FOLDER = "LibriTTS"
TRAIN = ("train-clean-100", "train-clean-360", "train-other-500")
SPLITS = {**dict.fromkeys(TRAIN, "train"), "dev-clean": "valid", "dev-other": "valid"}
SPLITS |= {"test-clean": "test", "test-other": "test"}
"""The split of each subset."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that stand after -- on the command line."""
    add_download_argument(parser, "by default archives of 7.7, 1.3 and 1.2 GB")
    parser.add_argument(
        "--subsets",
        nargs="+",
        choices=sorted(SPLITS),
        default=["train-clean-100", "dev-clean", "test-clean"],
        metavar="NAME",
        help=f"which parts of the set to take, of {', '.join(sorted(SPLITS))}",
    )


def download(folder: Path, options: argparse.Namespace) -> None:
    """Fetch and unpack the subsets into a folder, unless they are there."""
    from torchaudio.datasets import LIBRITTS

    for name in options.subsets:
        fetch(folder, lambda root, name=name: LIBRITTS(root, url=name, download=True), f"{FOLDER}/{name}")


def list_recordings(source: Path, options: argparse.Namespace) -> list[Recording]:
    """Every recording of the subsets with its split.

    Args:
        source: folder that holds LibriTTS, or that folder itself: dev-clean/READER/CHAPTER/NAME.wav and so on.
    Raises:
        UserError: a subset is missing.
    """
    folder, wanted = find_set(source, FOLDER), set(options.subsets)
    missing = sorted(name for name in wanted if not (folder / name).is_dir())
    if missing:
        raise UserError(
            f"{folder.absolute()}: expected the folders {', '.join(sorted(wanted))}; missing: {', '.join(missing)}; "
            "pass -- --download to fetch them, or --subsets with those that are there"
        )
    expected = "dev-clean/READER/CHAPTER/NAME.wav and so on"
    return recordings_below(folder, expected, splits_of, skip=lambda name: subset(name) not in wanted)


def splits_of(names: list[str]) -> dict[str, str]:
    """The splits of the set; where a subset for one of them is not taken, 5% of the readers each, by their hashes."""
    found = {SPLITS[subset(name)] for name in names}
    if found == {"train", "valid", "test"}:
        return {name: SPLITS[subset(name)] for name in names}
    warn(f"no subset of {', '.join(sorted({'train', 'valid', 'test'} - found))} is taken: the split is by reader")
    return split_groups({name: reader(name) for name in names}, valid_percent=5.0, test_percent=5.0)


def subset(name: str) -> str:
    """dev-clean of dev-clean/84/121123/84_121123_000007_000001.wav."""
    return name.partition("/")[0]


def reader(name: str) -> str:
    """84 of dev-clean/84/121123/84_121123_000007_000001.wav."""
    return name.split("/")[1] if name.count("/") else name
