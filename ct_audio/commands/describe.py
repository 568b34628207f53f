"""Statistics of prepared corpora of text: documents, words and mean length of each split, as Markdown.

The columns are those of the paper's Tables 1 and 2.
"""

from pathlib import Path

from ct_audio.commands.command_line import build_parser


def main() -> None:
    """Parse, open the corpora, print."""
    parser = build_parser("Statistics of prepared corpora of text (the paper's Tables 1 and 2), as Markdown.")
    parser.add_argument("corpora", type=Path, nargs="+", metavar="CORPUS", help="folder of a prepared corpus")
    parser.add_argument("--verify", action="store_true", help="read all codes and compare their sha256 first")
    arguments = parser.parse_args()
    from ct_audio.data.corpus import open_corpus
    from ct_audio.preparation.text_tables import statistics_table, vocabulary_table

    corpora = [open_corpus(path, verify=arguments.verify) for path in arguments.corpora]
    print(vocabulary_table(corpora), statistics_table(corpora), sep="\n\n")
