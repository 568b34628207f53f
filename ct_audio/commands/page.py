"""Put samples that are there on one page to listen on: players, spectrograms, sorting, a blind test."""

from pathlib import Path

from ct_audio.commands.command_line import build_parser, parse, refuse
from ct_audio.common.errors import UserError


def main() -> int:
    """Parse, read, write, and return the exit status."""
    parser = build_parser(
        "Put samples that `ct-audio sample` or `ct-audio listen` has made on one page, a single HTML file that needs "
        "no network: players, waveforms, spectrograms, NLL and settings, beside recordings and curves; to be sorted "
        "and filtered, with a blind test."
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="samples are in them or below them")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, as samples/index.html")
    parser.add_argument("--title", default="Samples", help="title of the page")
    parser.add_argument("--text", default="", help="what stands below the title")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="prepared corpus whose recordings stand beside them")
    parser.add_argument("--split", default="valid", help="split of --corpus")
    parser.add_argument("--curves", type=Path, nargs="+", default=[], metavar="RUN", help="runs whose NLL is drawn")
    arguments = parse(parser)
    refuse(arguments, "--split", unless=arguments.corpus is not None, why="only with --corpus")
    from ct_audio.apps.listening_page import read_clips, recordings_beside, told_apart, write_page
    from ct_audio.data.corpus import open_corpus
    from ct_audio.evaluation.curves import read_curves

    clips = told_apart([clip for folder in arguments.folders for clip in read_clips(folder)])
    rates = {clip.about["sample_rate_hz"] for clip in clips}
    if len(rates) > 1:
        raise UserError(f"expected samples of one rate, got {', '.join(f'{rate} Hz' for rate in sorted(rates))}")
    if arguments.corpus is not None:
        corpus = open_corpus(arguments.corpus)
        if rates != {corpus.codec.sample_rate_hz}:
            raise UserError(f"{arguments.corpus} is no corpus of recordings of {rates.pop()} Hz")
        clips = recordings_beside(clips, corpus.split(arguments.split)) + clips
    curves = {path.resolve().name: read_curves(path) for path in arguments.curves}
    details = {"title": arguments.title, "text": arguments.text, "curves": curves}
    write_page(arguments.out, clips=clips, sample_rate_hz=rates.pop(), **details)
    print(f"wrote {arguments.out}: {len(clips)} clips, {arguments.out.stat().st_size / 2**20:.1f} MiB")
    return 0
