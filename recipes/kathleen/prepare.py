"""Recordings of the Kathleen voice: one speaker reading CMU ARCTIC sentences, in either of its two layouts.

Prompts were recorded several times; the split is by prompt, so that takes of one never straddle splits.
"""

import argparse
import csv
from pathlib import Path

from ct_audio.common.errors import UserError
from ct_audio.preparation.recordings import Recording

HELD_OUT_PROMPTS = Path(__file__).with_name("held_out_prompts.tsv")
SPLITS = ("train", "valid", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This recipe has no options of its own."""


def list_recordings(source: Path, options: argparse.Namespace) -> list[Recording]:
    """Every recording with its split.

    Args:
        source: the set with metadata.tsv (id, split, text) and wavs/ID.flac, or the public repository with data/ID.wav
            (its prompt's split comes from held_out_prompts.tsv).
    Raises:
        UserError: the folder has neither layout, or metadata.tsv is not as expected.
    """
    if (source / "metadata.tsv").is_file():
        return _from_metadata(source)
    files = sorted((source / "data").glob("*.wav"))
    if not files:
        raise UserError(f"{source}: expected metadata.tsv and wavs/*.flac, or data/*.wav as in the public repository")
    splits = held_out_prompts()
    return [Recording(file, splits.get(prompt_of(file.stem), "train"), file.stem) for file in files]


def prompt_of(name: str) -> str:
    """The prompt that a take repeats: arctic_a0001_1592748574 is one of arctic_a0001."""
    return name.rpartition("_")[0]


def held_out_prompts() -> dict[str, str]:
    """Split of each prompt that is not in train."""
    rows = HELD_OUT_PROMPTS.read_text(encoding="utf-8").splitlines()[1:]
    return dict(row.split("\t") for row in rows)


def _from_metadata(source: Path) -> list[Recording]:
    file = source / "metadata.tsv"
    try:
        with file.open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as tab-separated text: {error}") from error
    recordings = []
    for number, row in enumerate(rows, start=2):
        name, split = row.get("id"), row.get("split")
        if not name or "/" in name or split not in SPLITS:
            raise UserError(f"{file}, line {number}: expected id, split ({', '.join(SPLITS)}) and text, got {row}")
        recordings.append(Recording(source / "wavs" / f"{name}.flac", split, name))
    return recordings
