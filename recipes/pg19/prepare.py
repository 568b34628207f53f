"""PG-19: books of Project Gutenberg from before 1919, one document a book, as subwords."""

import argparse
import csv
from pathlib import Path

from ct_audio.errors import UserError
from ct_audio.prepare_text import TextSettings
from ct_audio.report import printable
from ct_audio.text import Text, whole_file

FOLDERS = {"train": "train", "validation": "valid", "test": "test"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that stand after -- on the command line."""
    parser.add_argument("--vocab-size", type=int, default=32_000, help="subwords, at most")


def settings(options: argparse.Namespace) -> TextSettings:
    """Subwords of the training split."""
    return TextSettings(codec="subword", vocab_size=options.vocab_size)


def list_texts(source: Path, options: argparse.Namespace) -> list[Text]:
    """Every book, in the order of their numbers.

    Args:
        source: folder of train/, validation/ and test/ with NUMBER.txt, and metadata.csv (number, title, year, URL).
    Raises:
        UserError: a folder is missing or has no books, or metadata.csv is not as expected.
    """
    titles, texts = read_titles(source / "metadata.csv"), []
    for folder, split in FOLDERS.items():
        files = sorted((source / folder).glob("*.txt"), key=lambda file: (len(file.stem), file.stem))
        if not files:
            raise UserError(
                f"{source}: expected books as train/*.txt, validation/*.txt and test/*.txt, none in {folder}"
            )
        texts += [
            whole_file(file, split, printable(f"{file.stem} {titles.get(file.stem, '')}".strip())) for file in files
        ]
    return texts


def read_titles(file: Path) -> dict[str, str]:
    """Title of each book by its number; none where there is no metadata.csv."""
    if not file.is_file():
        return {}
    try:
        with file.open(encoding="utf-8", newline="") as handle:
            rows = list(csv.reader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as comma-separated text: {error}") from error
    for number, row in enumerate(rows, start=1):
        if len(row) != 4:
            raise UserError(f"{file}, line {number}: expected number, title, year and URL, got {row}")
    return {row[0]: row[1] for row in rows}
