"""Statistics of prepared corpora of text, and what is known of trained models, as Markdown.

The columns of the corpora are those of the paper's Tables 1 and 2: documents, words and mean length of each split.
"""

from ct_audio.commands.command_line import build_parser
from ct_audio.common.recipes import model_folder


def main() -> None:
    """Parse, open the corpora and the models, print."""
    parser = build_parser(
        "Statistics of prepared corpora of text (the paper's Tables 1 and 2), and of models what they are, their "
        "training and their NLL, as Markdown."
    )
    parser.add_argument(
        "paths",
        type=model_folder,
        nargs="+",
        metavar="PATH",
        help="a prepared corpus, a run, a checkpoint, an exported model",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all codes and compare their sha256 first; of models that is always done",
    )
    arguments = parser.parse_args()
    from ct_audio.data.corpus import open_corpus
    from ct_audio.export.model_folder import describe_model
    from ct_audio.preparation.text_tables import statistics_table, vocabulary_table
    from ct_audio.runs.open_run import is_model

    models = [path for path in arguments.paths if is_model(path)]
    corpora = [open_corpus(path, verify=arguments.verify) for path in arguments.paths if path not in models]
    parts = [vocabulary_table(corpora), statistics_table(corpora)] if corpora else []
    print(*parts, *(describe_model(path) for path in models), sep="\n\n")
