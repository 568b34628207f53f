"""Text for people."""


def printable(text: str) -> str:
    """On one line, without anything that a terminal obeys; different texts stay different.

    Backslashes, control characters, invisible ones and bytes that are no UTF-8 (as `os.fsdecode` gives them) are
    written as in a Python string.
    """
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode() for char in text
    )
