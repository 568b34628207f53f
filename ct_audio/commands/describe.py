"""Show what is known of a corpus of text or a trained model, and the memory that a training needs, as Markdown.

The columns of the corpora are those of the paper's Tables 1 and 2: documents, words and mean length of each split.
"""

from pathlib import Path

from ct_audio.commands.command_line import build_parser, parse, refuse
from ct_audio.common.errors import UserError
from ct_audio.common.recipes import config_names, model_folder


def main() -> None:
    """Parse, open the corpora and the models, print."""
    parser = build_parser(
        "Statistics of prepared corpora of text (the paper's Tables 1 and 2), and of models what they are, their "
        "training and their NLL; of configurations the memory that training needs. As Markdown."
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a prepared corpus, a run, a checkpoint, an exported model, a YAML of a run or a recipe's; key=value "
        "changes a key of all YAMLs",
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that train together, of a YAML")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all codes and compare their sha256 first; of models that is always done",
    )
    arguments = parse(parser)
    names = [name for name in arguments.paths if _is_config(name)]
    overrides = [name for name in arguments.paths if "=" in name and not Path(name).exists()]
    refuse(arguments, "--processes", unless=bool(names), why="only with a YAML of a run")
    if overrides and not names:
        raise UserError(f"{overrides[0]}: a key is changed only with a YAML of a run")
    paths = [model_folder(name) for name in arguments.paths if name not in [*names, *overrides]]
    from ct_audio.data.corpus import open_corpus
    from ct_audio.export.model_folder import describe_model
    from ct_audio.preparation.text_tables import statistics_table, vocabulary_table
    from ct_audio.runs.config import load_config
    from ct_audio.runs.open_run import is_model
    from ct_audio.training.footprint import footprint_table

    models = [path for path in paths if is_model(path)]
    corpora = [open_corpus(path, verify=arguments.verify) for path in paths if path not in models]
    parts = [vocabulary_table(corpora), statistics_table(corpora)] if corpora else []
    if names:
        configs = [load_config(name, overrides) for name in names]
        parts.append(footprint_table(configs, num_processes=arguments.processes))
    print(*parts, *(describe_model(path) for path in models), sep="\n\n")


def _is_config(name: str) -> bool:
    """Whether it is a YAML, or the name of a recipe's where no model is shipped under that name."""
    path = Path(name)
    if path.suffix == ".yaml":
        return True
    return not path.exists() and model_folder(name) == path and name.removeprefix("recipes/") in config_names()
