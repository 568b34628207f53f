"""WikiText-103 as words: wiki.{train,valid,test}.tokens, one document an article. WikiText-2 has the same layout."""

import argparse
import re
from pathlib import Path

from ct_audio.errors import UserError
from ct_audio.prepare_text import TextSettings
from ct_audio.report import printable
from ct_audio.text import Text

SPLITS = ("train", "valid", "test")
_TITLE = re.compile(rb" = ([^=\s](?:.*[^=\s])?) = \n")
_EMPTY = b" \n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that stand after -- on the command line."""


def settings(options: argparse.Namespace) -> TextSettings:
    """All words of the training split."""
    return TextSettings(codec="word")


def list_texts(source: Path, options: argparse.Namespace) -> list[Text]:
    """The articles of all three files.

    Args:
        source: folder that holds the files.
    Raises:
        UserError: a file is missing.
    """
    texts = []
    for split in SPLITS:
        file = source / f"wiki.{split}.tokens"
        if not file.is_file():
            raise UserError(f"{source}: expected wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens in it")
        texts += find_articles(file, split)
    return texts


def find_articles(file: Path, split: str) -> list[Text]:
    """An article begins with the empty line before its title, a line ` = Title = ` between two empty ones.

    What comes before the first title goes to the first article.
    """
    starts: list[tuple[int, str]] = []
    before, title, begin, offset = _EMPTY, b"", 0, 0
    with file.open("rb") as handle:
        for line in handle:
            if title and line == _EMPTY:
                starts.append((begin, printable(title.decode("utf-8", "replace"))))
            match = _TITLE.fullmatch(line) if before == _EMPTY else None
            title = match[1] if match else b""
            begin = max(0, offset - len(_EMPTY))
            before, offset = line, offset + len(line)
    starts = starts or [(0, file.name)]
    begins = [0, *(begin for begin, _ in starts[1:]), offset]
    return [Text(file, split, name, begins[i], begins[i + 1]) for i, (_, name) in enumerate(starts)]
