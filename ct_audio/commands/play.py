"""Play with a model: in a browser, or through the sound card, while it samples."""

from pathlib import Path

from ct_audio.commands.command_line import add_run_options, build_parser, open_run, parse, refuse
from ct_audio.common.errors import UserError


def main() -> int:
    """Parse, serve or play until it is ended, and return the exit status."""
    parser = build_parser(
        "Play with a model in a browser: record or upload a prime, choose length, temperature, top-k, top-p and seed; "
        "sound is played while it is sampled, with speed and NLL; the options are what the page begins with. With "
        "--speaker one sample goes to the sound card. "
        "Needs the extra play (python -m pip install 'ct_audio[play]')."
    )
    add_run_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0: for others, too")
    parser.add_argument("--port", type=int, default=7860, help="port to serve at; 0: any that is free")
    parser.add_argument("--speaker", action="store_true", help="play one sample to the sound card, without a browser")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="length of the sample")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1: safer; 0: the most probable code")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable codes only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest codes of total probability P")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same sample")
    parser.add_argument("--prime", type=Path, metavar="FILE", help="recording that the sample continues")
    parser.add_argument("--prime-seconds", type=float, default=1.0, metavar="S", help="only the first seconds of it")
    arguments = parse(parser)
    refuse(arguments, "--host", "--port", unless=not arguments.speaker, why="not with --speaker, which serves nothing")
    refuse(arguments, "--prime-seconds", unless=arguments.prime is not None, why="only with --prime")
    if not 0 <= arguments.port < 2**16:
        raise UserError(f"--port: expected 0 to {2**16 - 1}, got {arguments.port}")
    from ct_audio.apps.playground import Wish, play_to_speaker, playground
    from ct_audio.runs.open_run import run_codec

    run = open_run(arguments)
    codec = run_codec(run)
    drawn = {name: getattr(arguments, name) for name in ("seconds", "temperature", "top_k", "top_p", "seed")}
    wish = Wish(**drawn, prime=arguments.prime, prime_seconds=arguments.prime_seconds)
    if arguments.speaker:
        play_to_speaker(run, codec, wish)
        return 0
    app, options = playground(run, codec, wish, title=run.config.name)
    port = arguments.port or None
    _, url, _ = app.launch(
        server_name=arguments.host, server_port=port, quiet=True, prevent_thread_lock=True, **options
    )
    print(f"open {url} in a browser; Ctrl-C ends", flush=True)
    app.block_thread()
    return 0
