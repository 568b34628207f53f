"""enwik8: the first 10^8 bytes of an English Wikipedia dump, as bytes; split 90/5/5 in the order of the file."""

import argparse
from pathlib import Path

from ct_audio.common.errors import UserError
from ct_audio.preparation.download import (
    RemoteFile,
    add_download_arguments,
    download_files,
    mirror_urls,
    require_checksum,
    unpack,
)
from ct_audio.preparation.text_blocks import Text
from ct_audio.preparation.texts import TextSettings

MIRRORS = (
    "https://mattmahoney.net/dc",
    "http://mattmahoney.net/dc",
    "https://data.deepai.org",
    "https://cs.fit.edu/~mmahoney/compression",
)
ARCHIVE_CHECKSUM = "sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
CHECKSUM = "md5:a1fa5ffddb56f4953e226637dabbb36a"
SPLITS = {"train": 90, "valid": 5, "test": 5}
"""Percent of the bytes, from the beginning of the file on; of the whole file 90, 5 and 5 million, as usual."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that stand after -- on the command line."""
    add_download_arguments(parser)


def download(folder: Path, options: argparse.Namespace) -> None:
    """Fetch and unpack enwik8 (36 MB) into a folder, unless it is there."""
    urls = mirror_urls("enwik8.zip", [*options.download_mirror, *MIRRORS])
    if not (folder / "enwik8").is_file():
        download_files([RemoteFile("enwik8.zip", urls, ARCHIVE_CHECKSUM)], folder)
        unpack(folder / "enwik8.zip", {"enwik8": folder / "enwik8"})
    require_checksum(folder / "enwik8", CHECKSUM)


def settings(options: argparse.Namespace) -> TextSettings:
    """Codes are the bytes themselves."""
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
