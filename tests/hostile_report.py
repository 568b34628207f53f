"""The report of what hostile input and faults came to: reports/hostile_input.md, in sections, each from one test.

Tests write their sections, in several processes; when all have ended, `conftest.py` writes the report.
"""

import json
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from recordings import ROOT

from ct_audio.common.text import markdown_table

FOLDER = ROOT / "reports" / "hostile_input"


class Row(NamedTuple):
    """One kind of hostile input, or one fault: what it must come to, what it came to, and what was said."""

    kind: str
    expected: str
    outcome: str
    message: str = ""


def write_section(title: str, rows: Iterable[Row]) -> None:
    """Put a section into the report, in place of the one of that title from an earlier test run."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{title}.json").write_text(json.dumps(list(rows)), encoding="utf-8")


def write_report() -> None:
    """Write the report of all sections that there are."""
    sections = {
        file.stem: [Row(*row) for row in json.loads(file.read_text())] for file in sorted(FOLDER.glob("*.json"))
    }
    lines = ["# Hostile input and faults: what each came to", "", "Written by the tests; do not edit.", ""]
    summary = [("section", "inputs or faults", "outcomes")]
    for name, section in sections.items():
        counts = Counter(row.outcome.partition(":")[0] for row in section)
        summary.append((name, str(len(section)), ", ".join(f"{n} {what}" for what, n in counts.most_common())))
    lines.append(markdown_table(summary))
    for name, section in sections.items():
        table = markdown_table([Row._fields, *([_cell(text) for text in row] for row in section)])
        lines += ["", f"## {name}", "", table]
    (ROOT / "reports" / "hostile_input.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)[:200]
