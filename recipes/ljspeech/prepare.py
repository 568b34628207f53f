"""LJ Speech: one voice, 13,100 sentences of seven books; the public counterpart of the paper's 24.6 hours of one voice.

The split is by chapter (the first word of a name, as LJ001): a chapter is one text, read at one time.
"""

import argparse
from pathlib import Path

from ct_audio.preparation.recordings import Recording, split_groups
from ct_audio.preparation.torchaudio_sets import add_download_argument, fetch, find_set, recordings_below

FOLDER = "LJSpeech-1.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that stand after -- on the command line."""
    add_download_argument(parser, "an archive of 2.6 GB")


def download(folder: Path, options: argparse.Namespace) -> None:
    """Fetch and unpack the set into a folder, unless it is there."""
    from torchaudio.datasets import LJSPEECH

    fetch(folder, lambda root: LJSPEECH(root, download=True), FOLDER)


def list_recordings(source: Path, options: argparse.Namespace) -> list[Recording]:
    """Every recording with its split.

    Args:
        source: folder that holds LJSpeech-1.1, or that folder itself: wavs/LJ001-0001.wav and so on.
    Raises:
        UserError: there are no recordings.
    """
    return recordings_below(
        find_set(source, FOLDER) / "wavs",
        "LJSpeech-1.1/wavs/LJ001-0001.wav and so on",
        lambda names: split_groups({name: chapter(name) for name in names}, valid_percent=5.0, test_percent=5.0),
        skip=lambda name: False,
    )


def chapter(name: str) -> str:
    """LJ001 of LJ001-0001.wav."""
    return name.partition("-")[0]
