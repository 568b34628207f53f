"""Statistics of prepared corpora of text: `python tools/describe.py data/pg19 data/wikitext103`.

Documents, words and mean length of each split, as the paper's Tables 1 and 2 have them; as Markdown.
"""

import sys
from pathlib import Path

from ct_audio.commands.command_line import build_parser, run_tool
from ct_audio.data.corpus import open_corpus
from ct_audio.preparation.text_tables import statistics_table, vocabulary_table


def main() -> None:
    """Run the tool."""
    parser = build_parser("Statistics of prepared corpora of text (the paper's Tables 1 and 2), as Markdown.")
    parser.add_argument("corpora", type=Path, nargs="+", metavar="CORPUS", help="folder of a prepared corpus")
    parser.add_argument("--verify", action="store_true", help="read all codes and compare their sha256 first")
    options = parser.parse_args()
    corpora = [open_corpus(path, verify=options.verify) for path in options.corpora]
    print(vocabulary_table(corpora), statistics_table(corpora), sep="\n\n")


if __name__ == "__main__":
    sys.exit(run_tool(main))
