"""Text for people, and text files of theirs."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ct_audio.common.errors import UserError


def printable(text: str) -> str:
    """On one line, without anything that a terminal obeys; different texts stay different.

    Backslashes, control characters, invisible ones and bytes that are no UTF-8 (as `os.fsdecode` gives them) are
    written as in a Python string.
    """
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode() for char in text
    )


def markdown_table(rows: Iterable[Sequence[object]]) -> str:
    """Rows of cells, the first of them the header, as a table in Markdown; bars in cells are escaped.

    Returns:
        lines without a line feed at the end of the last.
    """
    header, *rest = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rest))


def markdown_text(text: str) -> str:
    """Text of others, as names, within a line of Markdown: shown as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|$~!])", r"\\\1", text)


def markdown_code(text: str) -> str:
    """Text of others as code within a line of Markdown: shown as it is."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def read_text(path: Path) -> str:
    """A text file in UTF-8, from any system: without byte order mark, with line feeds.

    Raises:
        UserError: it cannot be read, or is no UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path.absolute()}: {error.strerror}") from error
    require_utf8(raw, path)
    return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def require_utf8(raw: bytes, path: Path, begin: int = 0) -> None:
    """Check a part of a file that begins and ends between characters.

    Args:
        path: of the file.
        begin: where in the file the part begins, in bytes.
    Raises:
        UserError: it is no UTF-8; the message has file, line and byte.
    """
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        around = raw[max(0, error.start - 10) : error.end + 10]
        with path.open("rb") as handle:
            source = "utf-16" if handle.read(2) in (b"\xff\xfe", b"\xfe\xff") else "latin1"
            handle.seek(0)
            line = 1 + sum(block.count(b"\n") for block in _blocks(handle, begin + error.start))
        where = f"{path.absolute()}, line {line}, byte {begin + error.start}"
        raise UserError(
            f"{where}: expected UTF-8, got {around!r}; convert the file, as with: "
            f"iconv -f {source} -t utf-8 FILE > NEW_FILE"
        ) from error


def _blocks(handle: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes and (block := handle.read(min(num_bytes, 1 << 20))):
        num_bytes -= len(block)
        yield block
