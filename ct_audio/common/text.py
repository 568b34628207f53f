"""Text for people."""

from collections.abc import Iterable, Sequence


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
