"""The listening page: samples of models beside recordings as one HTML file that needs no network and no other file.

A clip is in the page as its mu-law codes, one byte a sample. The page (listening_page.html, in which the data are put)
makes players out of them and draws waveforms, spectrograms and curves; it sorts, filters, and holds a blind test.

Shape letters: N codes of a clip, P codes of a prime.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import UInt8

from ct_audio.common.errors import UserError
from ct_audio.common.figures import decibel_range, spectrogram_decibels
from ct_audio.common.files import read_json, write_file
from ct_audio.data.audio_files import read_wav
from ct_audio.data.codecs import MuLaw
from ct_audio.data.corpus import Split
from ct_audio.evaluation.curves import Curves, curve_unit, nll_range, running_mean
from ct_audio.sampling.listening import report_cells

RECORDING = "recording"
UNCONDITIONAL, CONTINUATION = "unconditional", "continuation"
MAX_RECORDINGS = 8
"""Of those beside unconditional samples; each continuation has its own."""
_TEMPLATE = Path(__file__).with_suffix(".html")
_MAX_CURVE_POINTS = 200
_ABOUT_REPORT = "How to read it, and the pictures: report.md, in the folder of the samples."


@dataclass(frozen=True)
class Clip:
    """A sample or a recording.

    Attributes:
        source: name of the model, or of the recordings.
        settings: what the sample was drawn with, as "temperature 1"; "" for a recording.
        kind: UNCONDITIONAL or CONTINUATION.
        number: of the lane; clips of one kind and number stand beside each other.
        codes: [N] mu-law codes, behind those of the prime.
        prime_length: P, how many of the codes were given.
        about: measures and settings, as in a sidecar; shown, sorted by and searched.
        warnings: what is wrong with it.
    """

    source: str
    settings: str
    kind: str
    number: int
    codes: UInt8[np.ndarray, " N"]
    prime_length: int = 0
    is_recording: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of results; the first row of cells holds the titles of the columns."""

    title: str
    cells: list[list[str]]
    note: str = ""


def read_clips(folder: Path, *, source: str | None = None) -> list[Clip]:
    """The samples in a folder and below it (the files sample_K.wav with their sidecars sample_K.json).

    Args:
        source: name in place of the one in the sidecars, that of the run.
    Raises:
        UserError: there is none, a sidecar is missing or damaged, or a sample is not of mu-law codes.
    """
    wavs = [path for path in folder.rglob("sample_*.wav") if path.stem.removeprefix("sample_").isdecimal()]
    wavs.sort(key=lambda path: (path.parent, len(path.name), path.name))
    if not wavs:
        raise UserError(f"{folder}: expected samples (sample_0.wav, sample_0.json) in it or below it, found none")
    return [_read_clip(wav, source) for wav in wavs]


def _read_clip(wav: Path, source: str | None) -> Clip:
    path = wav.with_suffix(".json")
    sidecar = read_json(path)
    try:
        rate, lane = int(sidecar["sample_rate_hz"]), int(sidecar["lane"])
        warnings = tuple(map(str, sidecar["warnings"]))
        name, prime_seconds = str(sidecar["name"]), float(sidecar["prime_seconds"])
        prime_length = round(prime_seconds * rate) if sidecar["prime_included"] else 0
        kind = CONTINUATION if prime_seconds else UNCONDITIONAL
        settings = _settings_in_words(sidecar)
        is_mu_law = sidecar["codec"]["name"] == "mu_law"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not the sidecar of a sample ({type(error).__name__}: {error})") from error
    waveform, found_rate = read_wav(wav)
    if not is_mu_law or found_rate != rate or not 0 <= prime_length <= len(waveform):
        raise UserError(f"{wav} does not fit {path}: expected {rate} Hz of mu-law codes, got {found_rate} Hz")
    about = {key: value for key, value in sidecar.items() if key != "warnings"}
    codes = MuLaw(rate).encode(waveform)
    return Clip(source or name, settings, kind, lane, codes, prime_length, about=about, warnings=warnings)


def _settings_in_words(sidecar: dict[str, Any]) -> str:
    words = [f"temperature {float(sidecar['temperature']):g}"]
    for key in ("top_k", "top_p"):
        if sidecar[key] is not None:
            words.append(f"{key.replace('_', '-')} {float(sidecar[key]):g}")
    return ", ".join(words)


def told_apart(clips: Sequence[Clip]) -> list[Clip]:
    """The same clips; where models of one name were sampled at different steps, the step becomes part of the name."""
    steps: dict[str, set[Any]] = {}
    for clip in clips:
        steps.setdefault(clip.source, set()).add(clip.about.get("step"))
    return [
        replace(clip, source=f"{clip.source}, step {clip.about.get('step')}") if len(steps[clip.source]) > 1 else clip
        for clip in clips
    ]


def recordings_beside(clips: Sequence[Clip], split: Split) -> list[Clip]:
    """Recordings of a split to set beside samples.

    Beside continuations that begin with a document of the split: the document, as long as they are. Beside
    unconditional samples: stretches from all over the split, as long as the longest.
    """
    found: dict[tuple[str, int], Clip] = {}
    ends = np.append(split.document_offsets[1:], split.num_codes)
    for clip in clips:
        name = clip.about.get("prime")
        if clip.kind != CONTINUATION or not clip.prime_length or name not in split.document_names:
            continue
        index = split.document_names.index(name)
        begin, end = int(split.document_offsets[index]), int(ends[index])
        codes = np.asarray(split.codes[begin : min(begin + len(clip.codes), end)], np.uint8)
        if np.array_equal(codes[: clip.prime_length], clip.codes[: clip.prime_length]):
            found.setdefault((clip.kind, clip.number), recording(codes, clip, {"document": name}))
    free = [clip for clip in clips if clip.kind == UNCONDITIONAL]
    if free:
        num = min(MAX_RECORDINGS, max(clip.number for clip in free) + 1)
        length = min(max(len(clip.codes) for clip in free), split.num_codes // num)
        for number in range(num):
            begin = (2 * number + 1) * split.num_codes // (2 * num) - length // 2
            codes = np.asarray(split.codes[begin : begin + length], np.uint8)
            beside = Clip("", "", UNCONDITIONAL, number, codes)
            found[UNCONDITIONAL, number] = recording(codes, beside, {"split": split.name, "first_code": begin})
    return list(found.values())


def listened(out: Path, names: Sequence[str], split: Split) -> tuple[list[Clip], Table]:
    """What `sampling.listening.listen` has left for models of these names: clips, recordings first, and the report."""
    clips = [clip for name in names for clip in read_clips(out / name, source=name)]
    table = Table("Samples beside recordings", report_cells(read_json(out / "report.json")["rows"]), _ABOUT_REPORT)
    return recordings_beside(clips, split) + clips, table


def recording(codes: UInt8[np.ndarray, " N"], beside: Clip, about: dict[str, Any]) -> Clip:
    """A recording as the clip that stands beside a sample."""
    return Clip(RECORDING, "", beside.kind, beside.number, codes, beside.prime_length, True, about)


def write_page(
    path: Path,
    *,
    title: str,
    text: str = "",
    clips: Sequence[Clip] = (),
    curves: Mapping[str, Curves] | None = None,
    tables: Sequence[Table] = (),
    sample_rate_hz: int = 24_000,
) -> None:
    """Write the page, whole or not at all.

    Args:
        text: what it is about, in plain text.
        clips: in the order in which they are shown where nothing else decides; recordings first.
        curves: of NLL, by the name of the run; one without a training curve becomes a level line.
        sample_rate_hz: of all clips.
    """
    codec = MuLaw(sample_rate_hz)
    waveforms = codec.decode(np.arange(codec.vocab_size))
    recorded = [clip for clip in clips if clip.is_recording] or list(clips)
    decibels = [spectrogram_decibels(codec.decode(clip.codes)).ravel() for clip in recorded]
    colours = (matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    data = {
        "title": title,
        "text": text,
        "rate": sample_rate_hz,
        "levels": np.clip(np.rint(waveforms.astype(np.float64) * 32768), -32768, 32767).astype(int).tolist(),
        "colours": _base64(colours),
        "limits": decibel_range(np.concatenate(decibels)) if decibels else (-90.0, 0.0),
        "clips": [asdict(clip) | {"codes": _base64(clip.codes)} for clip in clips],
        "curves": _curves(curves) if curves else None,
        "tables": [asdict(table) for table in tables],
    }
    content = json.dumps(_finite(data), separators=(",", ":")).replace("<", "\\u003c")  # it stands inside of a script
    before, after = _TEMPLATE.read_text(encoding="utf-8").split("/*DATA*/")
    write_file(path, (before + content + after).encode())


def _curves(curves: Mapping[str, Curves]) -> dict[str, Any]:
    """By axis the points of every run, training as means over a tenth of the run, of those at most 200."""
    names = dict.fromkeys(axis for each in curves.values() for axis in each.nll if each.last(axis) is not None)
    axes = {}
    for axis in names:
        unit, divisor = curve_unit(axis, max(each.last(axis) or 0.0 for each in curves.values()))
        runs = []
        for label, each in curves.items():
            train, valid = each.nll[axis]["train"], each.nll[axis]["valid"]
            smooth = running_mean(train, math.ceil(len(train) / 10))
            smooth = smooth[:: max(1, math.ceil(len(smooth) / _MAX_CURVE_POINTS))]
            points = {name: [[x / divisor, y] for x, y in line] for name, line in (("train", smooth), ("valid", valid))}
            runs.append({"label": label, "is_level": bool(valid) and not train, **points})
        axes[axis] = {"title": axis + unit, "runs": runs}
    return {"axes": axes, "range": nll_range(dict(curves))}


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, np.uint8).tobytes()).decode("ascii")


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON has not."""
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
