"""Bits per unit over time of any recordings or texts under a trained model: a CSV, a picture and a JSON for each."""

import itertools
import json
from pathlib import Path

from ct_audio.commands.command_line import add_run_options, build_parser, open_run, output_directory
from ct_audio.common.errors import UserError

TEXT_BIN_UNITS = 100
AUDIO_BIN_SECONDS = 0.1


def main() -> int:
    """Parse, score each file, write, print, and return the exit status."""
    parser = build_parser(
        "Score recordings or texts with a trained model: bits per unit over time. Each file is a stream of its own, "
        "from its first code on. Writes NAME.csv, NAME.png and NAME.json for each FILE."
    )
    add_run_options(parser)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a recording of any format, or a text")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: RUN/scores")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--bin-seconds", type=float, metavar="S", help=f"of a bin, {AUDIO_BIN_SECONDS} for audio")
    length.add_argument("--bin-units", type=int, metavar="N", help=f"the same in units, {TEXT_BIN_UNITS} for text")
    parser.add_argument("--json", action="store_true", help="print one JSON object a file")
    arguments = parser.parse_args()
    from ct_audio.data.codecs import read_codes
    from ct_audio.evaluation.output import score_line, write_score
    from ct_audio.evaluation.over_time import score_codes
    from ct_audio.runs.open_run import run_codec

    run = open_run(arguments)
    codec = run_codec(run)
    bin_length = _bin_length(arguments.bin_seconds, arguments.bin_units, codec.sample_rate_hz, codec.unit)
    out = output_directory(arguments, run, "scores")
    out.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for file in arguments.files:
        names = itertools.chain([file.stem], (f"{file.stem}_{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        score = score_codes(run, codec, read_codes(file, codec), progress=file.name)
        report = write_score(score, run, codec, file.name, out / name, bin_length=bin_length)
        print(json.dumps(report, allow_nan=False) if arguments.json else score_line(report), flush=True)
    return 0


def _bin_length(seconds: float | None, units: int | None, rate: int | None, unit: str) -> int:
    """Codes of a bin, of the two options."""
    if units is not None:
        return units
    if rate is None:
        if seconds is not None:
            raise UserError(f"--bin-seconds: {unit}s of a text have no seconds; pass --bin-units")
        return TEXT_BIN_UNITS
    seconds = AUDIO_BIN_SECONDS if seconds is None else seconds
    if not 1 / rate <= seconds < 1e6:
        raise UserError(f"--bin-seconds: expected at least a sample of {1 / rate:.2g} s, got {seconds}")
    return round(seconds * rate)
