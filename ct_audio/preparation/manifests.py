"""Manifests of lhotse: recordings or cuts, a JSON object on each line; lhotse itself is not needed to read them.

What a manifest can say and this preparation does not do (mixtures, changed speed, one of several channels, audio that
is no file) makes a line unusable, with a reason; supervisions within cuts are not read.
"""

import gzip
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from ct_audio.common.errors import UserError
from ct_audio.common.text import printable

_HARMLESS = {"Resample"}
"""Transforms of lhotse that change nothing here: every recording is resampled anyway."""


class Cut(NamedTuple):
    """A line of a manifest.

    Attributes:
        name: its id.
        path: of the audio file.
        seconds: begin and end of what is taken of it; None: all.
        reason: why it cannot be used; None: reading it tells.
    """

    name: str
    path: Path
    seconds: tuple[float, float] | None
    reason: str | None = None


def read_manifest(file: Path, source: Path) -> list[Cut]:
    """The recordings or cuts of a manifest, in its order.

    Args:
        file: `recordings` or `cuts` as lhotse writes them, .jsonl or .jsonl.gz.
        source: folder that relative paths in the manifest begin from.
    Raises:
        UserError: the file cannot be read or is no such manifest, has no lines, or none of its audio files is there.
    """
    cuts = []
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            cuts.append(_cut(fields, source))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{file}, line {number}: expected a recording or a cut of lhotse as a JSON object, got "
                f"{printable(line[:60])!r} ({type(error).__name__}: {printable(str(error))[:80]}); {_advice(line)}"
            ) from error
    if not cuts:
        raise UserError(f"{file}: the manifest is empty; expected a recording or a cut on each line")
    usable = [cut for cut in cuts if cut.reason is None]
    if usable and not any(cut.path.exists() for cut in usable):
        raise UserError(
            f"{file}: none of its {len(usable)} audio files is there, as {usable[0].path}; relative paths begin at "
            "--source"
        )
    return cuts


def _lines(file: Path) -> list[str]:
    try:
        raw = file.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: expected JSON lines in UTF-8, perhaps gzipped (.jsonl.gz)") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file}: damaged: {error}; copy it again") from error
    except OSError as error:
        raise UserError(f"cannot read {file.absolute()}: {error.strerror}") from error


def _advice(line: str) -> str:
    if '"recording_id"' in line:
        return "supervisions name no audio: `lhotse cut simple -r RECORDINGS -s SUPERVISIONS cuts.jsonl.gz` makes cuts"
    return "manifests of lhotse are .jsonl or .jsonl.gz"


def _cut(fields: dict[str, Any], source: Path) -> Cut:
    """One line; raises `KeyError` and the like where it is something else."""
    if "sources" in fields:
        path, reason = _audio(fields, source, None)
        return Cut(str(fields["id"]), path, None, reason)
    name = str(fields["id"])
    if fields["type"] in ("MixedCut", "PaddingCut"):
        return Cut(
            name, source / name, None, f"not read ({fields['type']}): save the cuts before they are mixed or padded"
        )
    start, duration = float(fields["start"]), float(fields["duration"])
    if not (math.isfinite(start + duration) and start >= 0 and duration > 0):
        raise ValueError(f"start {start}, duration {duration}")
    if fields.get("recording") is None:
        return Cut(name, source / name, None, "not read: the cut has no recording, only features")
    path, reason = _audio(fields["recording"], source, fields["channel"])
    whole = start == 0 and abs(duration - float(fields["recording"]["duration"])) < 1e-6
    return Cut(name, path, None if whole else (start, start + duration), reason)


def _audio(recording: dict[str, Any], source: Path, channels: int | list[int] | None) -> tuple[Path, str | None]:
    """File of a recording, and what keeps it from being used."""
    sources = recording["sources"]
    (path, kind) = (str(sources[0]["source"]), sources[0]["type"])
    there = sorted(channel for each in sources for channel in each["channels"])
    wanted = there if channels is None else sorted([channels] if isinstance(channels, int) else channels)
    transforms = [_transform(each) for each in recording.get("transforms") or []]
    changed = [name for name in transforms if name not in _HARMLESS]
    reason = None
    if kind != "file" or len(sources) != 1:
        reason = f"not read ({kind}, {len(sources)} sources): only single files are"
    elif wanted != there:
        reason = f"not read (channels {wanted} of {there}): all channels are averaged; save the wanted ones as files"
    elif changed:
        reason = f"not read ({', '.join(changed)}): save the changed audio, as with lhotse's save_audios"
    return source / os.path.expanduser(path) if kind == "file" else source / str(recording["id"]), reason


def _transform(fields: Any) -> str:
    return str(fields["name"] if isinstance(fields, dict) else fields)
