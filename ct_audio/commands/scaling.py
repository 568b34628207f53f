"""How time and memory grow with sizes and lengths, see `experiments.scaling`."""

from pathlib import Path

from ct_audio.commands.command_line import build_parser
from ct_audio.common.errors import UserError


def main() -> int:
    """Parse, measure, draw, print, and return the exit status."""
    parser = build_parser(
        "Measure how CPU time and memory grow: of a training step with sizes of the model and the batch, of a sample "
        "with its length, of the start of a run with the corpus (made up, without codes on disk). One size changes at "
        "a time; every point has a process and one thread of its own. Writes scaling.csv, scaling.md and scaling.png."
    )
    parser.add_argument(
        "recipe", help="YAML of a run, or a recipe's, as kathleen/wavenet_small; its corpus is not read"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the table and the picture")
    parser.add_argument(
        "--vary",
        nargs="*",
        default=[],
        metavar="A.B=C,D",
        help="sizes and their values; by default chunk, lanes, layers and memories times 1, 2, 4, 8",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="A.B=C", help="overrides for all points")
    parser.add_argument(
        "--sample-seconds", nargs="*", type=float, metavar="S", help="lengths of a sample; none: left out"
    )
    parser.add_argument("--corpus-hours", nargs="*", type=float, metavar="H", help="sizes of a corpus; none: left out")
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="training steps of a point, after two to warm up"
    )
    arguments = parser.parse_args()
    if arguments.steps < 1:
        raise UserError(f"--steps: expected at least 1, got {arguments.steps}")
    from ct_audio.experiments.scaling import CORPUS_HOURS, SAMPLE_SECONDS, measure_scaling

    lengths = {"sample_seconds": SAMPLE_SECONDS, "corpus_hours": CORPUS_HOURS}
    for name, usual in lengths.items():
        given = getattr(arguments, name)
        lengths[name] = usual if given is None else tuple(sorted(given))
        if any(not 0 < length < 1e6 for length in lengths[name]) or len(set(lengths[name])) < len(lengths[name]):
            option = name.replace("_", "-")
            raise UserError(f"--{option}: expected numbers above 0 and below 1e6, each once, got {given}")
    print(
        measure_scaling(
            arguments.recipe,
            arguments.out,
            vary=arguments.vary,
            overrides=arguments.set,
            num_steps=arguments.steps,
            **lengths,
        )
    )
    return 0
