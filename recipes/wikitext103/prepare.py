"""WikiText-103 as words: wiki.{train,valid,test}.tokens, one document an article. WikiText-2 has the same layout."""

import argparse
import codecs
import re
from pathlib import Path

from ct_audio.common.errors import UserError
from ct_audio.common.text import printable
from ct_audio.preparation.download import RemoteFile, add_download_arguments, download_files, mirror_urls, unpack
from ct_audio.preparation.listing import warn
from ct_audio.preparation.text_blocks import Text
from ct_audio.preparation.texts import TextSettings

MIRRORS = (
    "https://wikitext.smerity.com",
    "https://s3.amazonaws.com/research.metamind.io/wikitext",
    "https://web.archive.org/web/2020id_/https://s3.amazonaws.com/research.metamind.io/wikitext",
)
"""The second is where it was published; it has answered 403 since 2024, and the third is the Wayback Machine's copy."""
ARCHIVE_CHECKSUMS = {
    "wikitext-103": "sha256:242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
    "wikitext-2": "sha256:92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
}
SPLITS = ("train", "valid", "test")
_TITLE = re.compile(rb"= ([^=\s](?:.*[^=\s])?) =")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that stand after -- on the command line."""
    add_download_arguments(parser)
    parser.add_argument(
        "--download-set", choices=sorted(ARCHIVE_CHECKSUMS), default="wikitext-103", help="which one to fetch"
    )


def download(folder: Path, options: argparse.Namespace) -> None:
    """Fetch and unpack the files (190 MB, or 4.5 MB for WikiText-2) into a folder, unless they are there."""
    name = options.download_set
    files = {f"{name}/wiki.{split}.tokens": folder / f"wiki.{split}.tokens" for split in SPLITS}
    if all(file.is_file() for file in files.values()):
        return
    archive = f"{name}-v1.zip"
    urls = mirror_urls(archive, [*options.download_mirror, *MIRRORS])
    download_files([RemoteFile(archive, urls, ARCHIVE_CHECKSUMS[name])], folder)
    unpack(folder / archive, files)


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

    Lines may end as on any system, with white space or without. What comes before the first title goes to the first
    article; a byte order mark is left out.
    """
    starts: list[tuple[int, str]] = []
    title, before, num_before, begin, offset, first = b"", b"", 0, 0, 0, 0
    with file.open("rb") as handle:
        for line in handle:
            if not offset and line.startswith(codecs.BOM_UTF8):
                first = offset = len(codecs.BOM_UTF8)
                line = line.removeprefix(codecs.BOM_UTF8)
            words = line.strip()
            if title and not words:
                starts.append((begin, printable(title.decode("utf-8", "replace"))))
            match = None if before else _TITLE.fullmatch(words)
            title = match[1] if match else b""
            begin = offset - num_before
            before, num_before, offset = words, len(line), offset + len(line)
    if not starts:
        warn(f"{file.absolute()}: found no title of an article, a line ` = Title = ` between empty ones: taken as one")
    starts = starts or [(0, file.name)]
    begins = [first, *(begin for begin, _ in starts[1:]), offset]
    return [Text(file, split, name, begins[i], begins[i + 1]) for i, (_, name) in enumerate(starts)]
