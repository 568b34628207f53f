"""Text for people."""

import subprocess
from pathlib import Path

import pytest

from ct_audio.common.errors import UserError
from ct_audio.common.figures import plain_text
from ct_audio.common.text import markdown_code, markdown_table, markdown_text, printable, read_text


def test_what_a_terminal_obeys_is_shown_and_different_texts_stay_different() -> None:
    texts = ["Bücher\x1b[2J", "Bücher\\x1b[2J", "a\nb", "a\u200bb", "a\udcffb"]
    shown = [printable(text) for text in texts]
    assert shown == ["Bücher\\x1b[2J", "Bücher\\\\x1b[2J", "a\\nb", "a\\u200bb", "a\\udcffb"]


def test_bars_in_cells_do_not_end_them() -> None:
    table = markdown_table([("name", "codes"), ("a|b", 12), ("c", 0.5)])
    assert table == "| name | codes |\n| --- | --- |\n| a\\|b | 12 |\n| c | 0.5 |"


def test_text_of_others_is_no_markup() -> None:
    assert markdown_text("a_b*c|$x$ [y](z) `d` <e>") == r"a\_b\*c\|\$x\$ \[y\](z) \`d\` \<e\>"
    assert [markdown_code(text) for text in ("a_b", "a`b", "``")] == ["`a_b`", "`` a`b ``", "``` `` ```"]
    assert plain_text("$a$ b") == r"\$a\$ b"


def test_text_files_of_any_system(tmp_path: Path) -> None:
    for raw in (b"a\nb\n", b"\xef\xbb\xbfa\r\nb\r\n", b"a\rb\r"):
        (tmp_path / "x").write_bytes(raw)
        assert read_text(tmp_path / "x") == "a\nb\n"


@pytest.mark.parametrize("encoding", ["latin1", "utf-16"])
def test_what_is_no_utf8_is_named_with_advice_that_works(tmp_path: Path, encoding: str) -> None:
    text = "one\nzwei\nfünf\n"
    (tmp_path / "my file").write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=r"my file, line \d, byte \d+: expected UTF-8, got b") as caught:
        read_text(tmp_path / "my file")
    line = str(caught.value).partition("as with: ")[2].replace("NEW_FILE", "new").replace("FILE", "'my file'")
    subprocess.run(line, shell=True, check=True, cwd=tmp_path)
    assert read_text(tmp_path / "new") == text
