"""Recordings of the Kathleen voice: one speaker reading CMU ARCTIC sentences, in either of its two layouts.

Prompts were recorded several times; the split is by prompt, so that takes of one never straddle splits.
"""

import argparse
import csv
from pathlib import Path

from ct_audio.common.errors import UserError
from ct_audio.common.text import printable, read_text
from ct_audio.preparation.listing import Audio, find_audio, same_name
from ct_audio.preparation.recordings import Recording

HELD_OUT_PROMPTS = Path(__file__).with_name("held_out_prompts.tsv")
SPLITS = ("train", "valid", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This recipe has no options of its own."""


def list_recordings(source: Path, options: argparse.Namespace) -> list[Recording]:
    """Every recording with its split, and what else looks like audio there, which is dropped by name.

    Args:
        source: the set with metadata.tsv (id, split, text) and wavs/ID.flac, or the public repository with data/ID.wav
            (its prompt's split comes from held_out_prompts.tsv).
    Raises:
        UserError: the folder has neither layout, or metadata.tsv is not as expected.
    """
    if (source / "metadata.tsv").is_file():
        return _from_metadata(source)
    audio = find_audio(source / "data") if (source / "data").is_dir() else Audio({}, {})
    files = {name: path for name, path in audio.files.items() if name.endswith(".wav") and "/" not in name}
    if not files:
        layouts = "metadata.tsv and wavs/*.flac, or data/*.wav as in the public repository"
        raise UserError(f"{source.absolute()}: expected {layouts}")
    splits = held_out_prompts()
    stems = {name.removesuffix(".wav"): path for name, path in files.items()}
    found = [Recording(path, splits.get(prompt_of(stem), "train"), printable(stem)) for stem, path in stems.items()]
    return found + _left_out(audio, set(files), "not of the layout: expected data/ID.wav")


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
        rows = list(csv.DictReader(read_text(file).split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE))
    except csv.Error as error:
        raise UserError(f"{file.absolute()}: cannot be read as tab-separated text: {error}") from error
    audio = find_audio(source / "wavs") if (source / "wavs").is_dir() else Audio({}, {})
    recordings, listed = [], set()
    for number, row in enumerate(rows, start=2):
        name, split = same_name(row.get("id") or ""), row.get("split")
        if not name or "/" in name or split not in SPLITS:
            raise UserError(
                f"{file.absolute()}, line {number}: expected id, split ({', '.join(SPLITS)}) and text, got {row}"
            )
        path = audio.files.get(f"{name}.flac", source / "wavs" / f"{name}.flac")
        recordings.append(Recording(path, split, printable(name)))
        listed.add(f"{name}.flac")
    return recordings + _left_out(audio, listed, "not listed: metadata.tsv does not name it")


def _left_out(audio: Audio, taken: set[str], why: str) -> list[Recording]:
    """What looks like audio and is not taken."""
    others = {name: (path, why) for name, path in audio.files.items() if name not in taken} | audio.unusable
    return [Recording(path, "train", printable(name), reason=reason) for name, (path, reason) in others.items()]
