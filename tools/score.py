"""Bits a unit over time of any recordings or texts under a trained model: a CSV and a picture for each file."""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.command_line import build_parser, run_tool
from ct_audio.common.errors import UserError

if TYPE_CHECKING:
    from ct_audio.data.codecs import Codec
    from ct_audio.runs.open_run import LoadedRun

TEXT_BIN_UNITS = 100
AUDIO_BIN_SECONDS = 0.1


def main() -> int:
    """Parse, score each file, write, print, and return the exit status."""
    arguments = _parse()
    # After --help: they take seconds.
    from ct_audio.runs.device import set_up_device
    from ct_audio.runs.open_run import load_run_model, run_codec

    device = set_up_device(arguments.device, num_threads=arguments.threads)
    run = load_run_model(arguments.run, which=arguments.checkpoint, device=device)
    codec = run_codec(run, Path(arguments.run))
    bin_length = _bin_length(arguments, codec)
    out = Path(arguments.out or Path(arguments.run) / "scores")
    out.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for file in map(Path, arguments.files):
        names = itertools.chain([file.stem], (f"{file.stem}_{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        report = _score(run, codec, file, out / name, bin_length)
        print(json.dumps(report, allow_nan=False) if arguments.json else _line(report), flush=True)
    return 0


def _score(run: "LoadedRun", codec: "Codec", file: Path, target: Path, bin_length: int) -> dict[str, Any]:
    """Score one file; write its CSV, picture and JSON beside each other, and return what the JSON says."""
    from ct_audio.common.figures import write_figure
    from ct_audio.common.files import write_csv, write_json
    from ct_audio.data.codecs import read_codes
    from ct_audio.evaluation.figures import score_figure
    from ct_audio.evaluation.over_time import bins_over_time, most_surprising, score_codes

    rate = codec.sample_rate_hz
    score = score_codes(run, codec, read_codes(file, codec), progress=file.name)
    rows = bins_over_time(score, codec, bin_length)
    evaluation = score.evaluation
    report = {
        "file": file.name,
        "run": run.config.name,
        "checkpoint": run.checkpoint_path.name,
        "unit": codec.unit,
        "num_units": evaluation.num_units,
        "seconds": evaluation.num_units / rate if rate else None,
        "nll_nats": evaluation.nll_nats,
        "nll_bits": evaluation.nll_bits,
        "total_bytes": evaluation.nll_bits * evaluation.num_units / 8,
        "bin_length": bin_length,
        "most_surprising": most_surprising(rows),
        "protocol": evaluation.protocol | {"split": None},
    }
    title = f"{file.name} under {run.config.name}, step {run.step}: {evaluation.nll_bits:.3f} bits"
    waveform = codec.decode(score.codes) if rate else None
    figure = score_figure(
        rows, title=f"{title} a {codec.unit}", unit=codec.unit, waveform=waveform, sample_rate_hz=rate
    )
    write_csv(target.with_name(f"{target.name}.csv"), rows)
    write_figure(figure, target.with_name(f"{target.name}.png"))
    write_json(target.with_name(f"{target.name}.json"), report)
    return report | {"written": str(target.with_name(f"{target.name}.csv"))}


def _bin_length(arguments: argparse.Namespace, codec: "Codec") -> int:
    rate, seconds = codec.sample_rate_hz, arguments.bin_seconds
    if arguments.bin_units is not None:
        return arguments.bin_units
    if rate is None:
        if seconds is not None:
            raise UserError(f"--bin-seconds: {codec.unit}s of a text have no seconds; pass --bin-units")
        return TEXT_BIN_UNITS
    seconds = AUDIO_BIN_SECONDS if seconds is None else seconds
    if not 1 / rate <= seconds < 1e6:
        raise UserError(f"--bin-seconds: expected at least a sample of {1 / rate:.2g} s, got {seconds}")
    return round(seconds * rate)


def _parse() -> argparse.Namespace:
    parser = build_parser(
        "Score recordings or texts with a trained model: bits a unit over time. Each file is a stream of its own, from "
        "its first code on. Writes NAME.csv, NAME.png and NAME.json for each FILE."
    )
    parser.add_argument("run", help="directory of the run, as runs/NAME")
    parser.add_argument("files", nargs="+", metavar="FILE", help="a recording of any format, or a text")
    parser.add_argument("--out", metavar="DIR", help="where to write; default: RUN/scores")
    parser.add_argument(
        "--bin-seconds", type=float, metavar="S", help=f"length of a bin, {AUDIO_BIN_SECONDS} for audio"
    )
    parser.add_argument("--bin-units", type=int, metavar="N", help=f"the same in units, {TEXT_BIN_UNITS} for text")
    parser.add_argument(
        "--checkpoint", choices=["best", "last"], default="best", help="best by validation NLL, or last"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: torch's default")
    parser.add_argument("--json", action="store_true", help="print one JSON object a file")
    return parser.parse_args()


def _line(report: dict[str, Any]) -> str:
    extent = f"{report['num_units']:,} {report['unit']}s"
    extent += "" if report["seconds"] is None else f" ({report['seconds']:.1f} s)"
    highest = report["most_surprising"][0]
    where = (
        f"{highest['start_seconds']:.1f} s" if "start_seconds" in highest else f"{report['unit']} {highest['start']}"
    )
    mean = f"{report['nll_bits']:.4f} bits a {report['unit']}"
    return f"{report['file']}: {mean}, {extent}; highest {highest['nll_bits']:.2f} at {where}; {report['written']}"


if __name__ == "__main__":
    sys.exit(run_tool(main))
