"""VCTK 0.92: 110 readers of English with many accents, about 400 sentences each, with two microphones.

The split is by reader. Many sentences were read by all of them, so a text of the test split may stand in train.
"""

import argparse
from pathlib import Path

from ct_audio.preparation.recordings import Recording, split_groups
from ct_audio.preparation.torchaudio_sets import add_download_argument, fetch, find_set, recordings_below

FOLDER = "VCTK-Corpus-0.92"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that stand after -- on the command line."""
    add_download_argument(parser, "an archive of 11 GB")
    parser.add_argument(
        "--microphone", choices=["mic1", "mic2"], default="mic2", help="which of the two recordings of each sentence"
    )


def download(folder: Path, options: argparse.Namespace) -> None:
    """Fetch and unpack the set into a folder, unless it is there."""
    from torchaudio.datasets import VCTK_092

    fetch(folder, lambda root: VCTK_092(str(root), mic_id=options.microphone, download=True), FOLDER)


def list_recordings(source: Path, options: argparse.Namespace) -> list[Recording]:
    """Every recording of a microphone with its split.

    Args:
        source: folder that holds VCTK-Corpus-0.92, or that folder itself: wav48_silence_trimmed/p225/p225_001_mic1.flac
            and so on.
    Raises:
        UserError: there are no recordings of that microphone.
    """
    return recordings_below(
        find_set(source, FOLDER) / "wav48_silence_trimmed",
        f"VCTK-Corpus-0.92/wav48_silence_trimmed/p225/p225_001_{options.microphone}.flac and so on",
        lambda names: split_groups({name: reader(name) for name in names}, valid_percent=5.0, test_percent=5.0),
        skip=lambda name: f"_{options.microphone}." not in name,
    )


def reader(name: str) -> str:
    """p225 of p225/p225_001_mic2.flac."""
    return name.partition("/")[0]
