"""PG-19: books of Project Gutenberg from before 1919, one document a book, as subwords."""

import argparse
import base64
import csv
import io
import json
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ct_audio.common.errors import UserError
from ct_audio.common.text import printable, read_text
from ct_audio.preparation.download import RemoteFile, add_download_arguments, download_files, mirror_urls, read_url
from ct_audio.preparation.listing import count_suffixes, find_files, warn
from ct_audio.preparation.text_blocks import Text, whole_file
from ct_audio.preparation.texts import TextSettings

MIRRORS = (
    "https://storage.googleapis.com/deepmind-gutenberg",
    "https://deepmind-gutenberg.storage.googleapis.com",
    "https://commondatastorage.googleapis.com/deepmind-gutenberg",
)
BUCKET_LISTINGS = ("https://storage.googleapis.com/storage/v1/b/deepmind-gutenberg/o",)
"""Of the public bucket, with checksums, page by page."""
PLAIN_LISTINGS = ("https://huggingface.co/datasets/deepmind/pg19/resolve/main/data",)
"""Names alone, in train_files.txt, validation_files.txt and test_files.txt."""
FOLDERS = {"train": "train", "validation": "valid", "test": "test"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that stand after -- on the command line."""
    add_download_arguments(parser)
    parser.add_argument(
        "--download-connections", type=int, default=16, metavar="N", help="books fetched at the same time"
    )
    parser.add_argument("--vocab-size", type=int, default=32_000, metavar="V", help="subwords, at most")


def settings(options: argparse.Namespace) -> TextSettings:
    """Subwords of the training split."""
    return TextSettings(codec="subword", vocab_size=options.vocab_size)


def download(folder: Path, options: argparse.Namespace) -> None:
    """Fetch every book (28,752 of them, 11 GB) and metadata.csv that is not in a folder yet.

    A book without a checksum cannot be told from a damaged one: where there are such, a warning says so.
    """
    if options.download_connections < 1:
        raise UserError(f"--download-connections: expected at least 1, got {options.download_connections}")
    mirrors, books = [*options.download_mirror, *MIRRORS], {}
    for name in FOLDERS:
        books |= list_plainly(name, options.download_mirror) if options.download_mirror else list_bucket(name)
    num_unchecked = sum(checksum is None for checksum in books.values())
    if num_unchecked:
        warn(
            f"{num_unchecked} of {len(books)} books have no checksum: one that is damaged on a mirror or in {folder} "
            "goes into the corpus unnoticed; to have them compared, run the command again when the bucket's listing "
            "can be had, without --download-mirror"
        )
    files = [RemoteFile(name, mirror_urls(name, mirrors), checksum) for name, checksum in books.items()]
    metadata = RemoteFile("metadata.csv", mirror_urls("metadata.csv", mirrors))
    download_files([metadata, *files], folder, num_threads=options.download_connections)


def list_bucket(folder: str) -> dict[str, str | None]:
    """Name and MD5 of every book of a folder, from the bucket; without MD5 from a plain listing if it has none."""
    found: dict[str, str | None] = {}
    query = {"prefix": f"{folder}/", "maxResults": "1000", "fields": "items(name,md5Hash),nextPageToken"}
    try:
        while True:
            page = json.loads(read_url([f"{url}?{urllib.parse.urlencode(query)}" for url in BUCKET_LISTINGS]))
            found |= {item["name"]: _md5(item.get("md5Hash")) for item in page.get("items", [])}
            if not page.get("nextPageToken"):
                return _require_books(found, folder)
            query["pageToken"] = str(page["nextPageToken"])
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn(f"the bucket's listing of {folder}/, which has the checksums, cannot be used: {printable(str(error))}")
        return list_plainly(folder, ())


def list_plainly(folder: str, mirrors: Sequence[str]) -> dict[str, str | None]:
    """Name of every book of a folder, from FOLDER_files.txt of a mirror."""
    lines = read_url(mirror_urls(f"{folder}_files.txt", [*mirrors, *PLAIN_LISTINGS])).decode("utf-8", "replace")
    return _require_books(dict.fromkeys(lines.split()), folder)


def _require_books(names: dict[str, str | None], folder: str) -> dict[str, str | None]:
    """Names are paths on this machine soon: nothing but NUMBER.txt in the folder."""
    names = {name: checksum for name, checksum in names.items() if not name.endswith("/")}
    for name in names:
        if not re.fullmatch(rf"{folder}/[0-9]{{1,9}}\.txt", name):
            raise UserError(f"listing of {folder}: expected names as {folder}/123.txt, got {name[:80]!r}")
    if not names:
        raise UserError(f"listing of {folder}: expected names as {folder}/123.txt, got none")
    return names


def _md5(encoded: Any) -> str | None:
    return f"md5:{base64.b64decode(encoded, validate=True).hex()}" if isinstance(encoded, str) else None


def list_texts(source: Path, options: argparse.Namespace) -> list[Text]:
    """Every book, in the order of their numbers.

    Args:
        source: folder of train/, validation/ and test/ with NUMBER.txt, and metadata.csv (number, title, year, URL).
    Raises:
        UserError: a folder is missing or has no books, or metadata.csv is not as expected.
    """
    titles, texts = read_titles(source / "metadata.csv"), []
    for folder, split in FOLDERS.items():
        found = find_files(source / folder).files if (source / folder).is_dir() else {}
        books = {name.removesuffix(".txt"): path for name, path in found.items() if _is_book(name)}
        others = [name for name in found if not _is_book(name)]
        if not books:
            raise UserError(
                f"{source.absolute()}: expected books as train/*.txt, validation/*.txt and test/*.txt, none in {folder}"
                + (f" (there are {count_suffixes(others)})" if others else "")
            )
        if others:
            warn(f"{source.absolute() / folder}: left out what is no book (NAME.txt): {count_suffixes(others)}")
        texts += [
            whole_file(books[stem], split, printable(f"{stem} {titles.get(stem, '')}".strip()))
            for stem in sorted(books, key=lambda stem: (len(stem), stem))
        ]
    return texts


def _is_book(name: str) -> bool:
    return name.endswith(".txt") and "/" not in name


def read_titles(file: Path) -> dict[str, str]:
    """Title of each book by its number; none where there is no metadata.csv."""
    if not file.is_file():
        return {}
    try:
        rows = list(csv.reader(io.StringIO(read_text(file))))
    except csv.Error as error:
        raise UserError(f"{file.absolute()}: cannot be read as comma-separated text: {error}") from error
    for number, row in enumerate(rows, start=1):
        if len(row) < 2:
            raise UserError(f"{file}, line {number}: expected number, title, year and URL, got {row}")
    return {row[0]: row[1] for row in rows}
