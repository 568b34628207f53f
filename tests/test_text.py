"""Text for people."""

from ct_audio.common.text import markdown_table, printable


def test_what_a_terminal_obeys_is_shown_and_different_texts_stay_different() -> None:
    texts = ["Bücher\x1b[2J", "Bücher\\x1b[2J", "a\nb", "a\u200bb", "a\udcffb"]
    shown = [printable(text) for text in texts]
    assert shown == ["Bücher\\x1b[2J", "Bücher\\\\x1b[2J", "a\\nb", "a\\u200bb", "a\\udcffb"]


def test_bars_in_cells_do_not_end_them() -> None:
    table = markdown_table([("name", "codes"), ("a|b", 12), ("c", 0.5)])
    assert table == "| name | codes |\n| --- | --- |\n| a\\|b | 12 |\n| c | 0.5 |"
