"""enwik8: the first 10^8 bytes of an English Wikipedia dump, as bytes; split 90/5/5 in the order of the file."""

import argparse
from pathlib import Path

from ct_audio.errors import UserError
from ct_audio.prepare_text import TextSettings
from ct_audio.text import Text

SPLITS = {"train": 90, "valid": 5, "test": 5}
"""Percent of the bytes, from the beginning of the file on; of the whole file 90, 5 and 5 million, as usual."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This recipe has no options of its own."""


def settings(options: argparse.Namespace) -> TextSettings:
    """Bytes."""
    return TextSettings(codec="byte")


def list_texts(source: Path, options: argparse.Namespace) -> list[Text]:
    """Three texts, one a split.

    Args:
        source: folder of the file enwik8, or the file; the beginning of it will do.
    Raises:
        UserError: it is not there, or shorter than 100 bytes.
    """
    file = source / "enwik8" if source.is_dir() else source
    if not file.is_file():
        raise UserError(f"{source}: expected the file enwik8 in it (unpacked)")
    num_bytes, begin, percent, texts = file.stat().st_size, 0, 0, []
    if num_bytes < 100:
        raise UserError(f"{file}: expected at least 100 bytes, got {num_bytes}")
    for split, share in SPLITS.items():
        percent += share
        end = num_bytes * percent // 100
        texts.append(Text(file, split, f"enwik8, bytes {begin} to {end}", begin, end))
        begin = end
    return texts
