"""Samples at several temperatures beside recordings and noise: a table and a picture of what temperature does.

    DIR/temperatures.json, temperatures.md, temperatures.png

Every row is measured alike: NLL under the model, level, share of voiced frames, range of pitch, and the Frechet
distance between log-mel statistics of the row and of the validation split. The row of recordings is made of stretches
as long as the samples, from places that the statistics leave out: it says what distance recordings themselves have at
that length.
Shape letters: N samples, F frames, D mel bands.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Integer
from matplotlib.figure import Figure

from ct_audio.common.errors import UserError
from ct_audio.common.figures import plain_text, write_figure
from ct_audio.common.files import number_in_name, write_file, write_json
from ct_audio.common.progress import Progress
from ct_audio.common.text import markdown_table
from ct_audio.data.acoustics import find_pitch, frechet_distance, level_dbfs, log_mel_frames, mel_frame_length
from ct_audio.data.codecs import Codec
from ct_audio.data.corpus import Corpus
from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.runs.open_run import LoadedRun
from ct_audio.sampling.sample_set import SampleSet

MAX_REFERENCE_SECONDS = 600.0
MAX_PITCH_SECONDS = 10.0
"""Of a row; finding the pitch takes a fifth of the duration."""
MEASURES = {  # key of a row: title of the column, decimals
    "nll_nats": ("NLL (nats)", 3),
    "rms_dbfs": ("RMS (dBFS)", 1),
    "voiced_share": ("voiced", 2),
    "pitch_low_hz": ("pitch 5% (Hz)", 0),
    "pitch_median_hz": ("median", 0),
    "pitch_high_hz": ("pitch 95% (Hz)", 0),
    "frechet_distance": ("Frechet distance", 1),
}


@dataclass(frozen=True)
class Reference:
    """The validation split, cut in two.

    Attributes:
        frames, seconds: log-mel frames and length of the part that rows are compared with.
        stretches: codes of the part that makes the row of recordings.
    """

    frames: Float64[np.ndarray, "F D"]
    seconds: float
    stretches: list[Integer[np.ndarray, " N"]]


def require_comparable(sets: list[SampleSet], corpus: Corpus) -> None:
    """Check before the sampling that there will be a report.

    Raises:
        UserError: the samples or the validation split are too short, or the split is missing.
    """
    rate, num_codes = sets[0].codec.sample_rate_hz, sets[0].request.num_codes
    if rate is None:
        raise UserError("--temperatures: its report measures audio; for a text, sample at one --temperature at a time")
    least = 2 * mel_frame_length(rate)
    if num_codes < least:
        raise UserError(f"--temperatures: expected at least {least / rate:.3f} --seconds, got {num_codes / rate:g}")
    split = corpus.split("valid")
    if split.num_codes < 2 * least * sets[0].request.num_lanes:
        raise UserError(
            f"--temperatures: the validation split of {corpus.path} is too short to compare with: "
            f"{split.num_codes / rate:.3f} s; lower --num, or prepare a longer one"
        )


def make_reference(codes: Integer[np.ndarray, " N"], codec: Codec, *, num_stretches: int, length: int) -> Reference:
    """Cut stretches of `length` codes, or shorter ones of half the split, out of it; the rest is compared with."""
    rate = codec.sample_rate_hz
    assert rate is not None
    codes = np.asarray(codes[: round(MAX_REFERENCE_SECONDS * rate)])
    length = min(length, len(codes) // (2 * num_stretches))
    begins = [(2 * index + 1) * len(codes) // (2 * num_stretches) - length // 2 for index in range(num_stretches)]
    edges = [0, *(edge for begin in begins for edge in (begin, begin + length)), len(codes)]
    parts = [codes[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    frames = np.concatenate([log_mel_frames(codec.decode(part), rate) for part in parts])
    stretches = [codes[begin : begin + length] for begin in begins]
    return Reference(frames, sum(map(len, parts)) / rate, stretches)


def measure_row(
    waveforms: list[Float[np.ndarray, " N"]],
    reference: Reference,
    *,
    nll_nats: float | None,
    sample_rate_hz: int,
    max_pitch_seconds: float = MAX_PITCH_SECONDS,
) -> dict[str, Any]:
    """The numbers of one row, of samples of one length; those of pitch are None where nothing is voiced."""
    num_heard = round(max_pitch_seconds / len(waveforms) * sample_rate_hz)
    pitch = np.concatenate([find_pitch(waveform[:num_heard], sample_rate_hz) for waveform in waveforms])
    voiced = pitch[np.isfinite(pitch)]
    low, median, high = np.percentile(voiced, [5, 50, 95]).tolist() if len(voiced) else (None, None, None)
    frames = np.concatenate([log_mel_frames(waveform, sample_rate_hz) for waveform in waveforms])
    return {
        "seconds": sum(map(len, waveforms)) / sample_rate_hz,
        "nll_nats": nll_nats,
        "rms_dbfs": level_dbfs(np.concatenate(waveforms)),
        "voiced_share": len(voiced) / len(pitch),
        "pitch_low_hz": low,
        "pitch_median_hz": median,
        "pitch_high_hz": high,
        "frechet_distance": frechet_distance(frames, reference.frames),
    }


def write_report(directory: Path, sets: list[SampleSet], corpus: Corpus) -> None:
    """Measure finished sets, then recordings, then white noise of their level; write and print a report of the rows."""
    first, codec, request = sets[0], sets[0].codec, sets[0].request
    rate = codec.sample_rate_hz
    assert rate is not None
    split = corpus.split("valid")
    reference = make_reference(split.codes, codec, num_stretches=request.num_lanes, length=first.num_codes)
    recordings = [codec.decode(codes) for codes in reference.stretches]
    noise = white_noise([len(codes) for codes in recordings], level_dbfs(np.concatenate(recordings)))
    noise_codes = [codec.encode(waveform) for waveform in noise]
    jobs: list[tuple[str, float | None, list[np.ndarray], list[np.ndarray] | SampleSet]] = [
        (number_in_name(one.request.temperature), one.request.temperature, one.decoded(), one) for one in sets
    ]
    jobs += [("validation", None, recordings, reference.stretches)]
    jobs += [("white noise", None, [codec.decode(codes) for codes in noise_codes], noise_codes)]
    rows = []
    for name, temperature, waveforms, source in Progress(jobs, desc="report", unit="row"):
        if isinstance(source, SampleSet):
            nll = -float(source.log_probabilities.double().mean())
        else:
            nll = nll_of(first.run, codec, source)
        numbers = measure_row(waveforms, reference, nll_nats=nll, sample_rate_hz=rate)
        rows.append({"row": name, "temperature": temperature} | numbers)
    left_out = ("temperature", "prime_included", "version")
    about = {key: value for key, value in first.settings().items() if key not in left_out}
    about |= {"reference_seconds": reference.seconds, "split_sha256": split.sha256}
    write_json(directory / "temperatures.json", about | {"rows": rows})
    table = markdown_report(about, rows)
    write_file(directory / "temperatures.md", table.encode())
    write_figure(draw_report(rows, [job[2][0] for job in jobs], rate), directory / "temperatures.png", dpi=120)
    print(table, end="")


def white_noise(lengths: list[int], level: float) -> list[Float[np.ndarray, " N"]]:
    """Gaussian noise of a level in dBFS, the same every time."""
    numbers = np.random.default_rng(0)
    return [numbers.normal(0, 10 ** (level / 20), length).clip(-1, 1).astype(np.float32) for length in lengths]


def nll_of(run: LoadedRun, codec: Codec, stretches: list[Integer[np.ndarray, " N"]]) -> float:
    """Mean NLL in nats of stretches of one length, each a stream of its own, as each sample is."""
    streams = [Stretch(codes, codec.start_code, run.config.data.chunk_length) for codes in stretches]
    return float(np.mean([evaluate_nll(run.model, stream, progress=None).nll_nats for stream in streams]))


def markdown_report(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The table, and below it how to read it."""
    cells = [["temperature", *(title for title, _ in MEASURES.values())]]
    for row in rows:
        numbers = [(row[key], decimals) for key, (_, decimals) in MEASURES.items()]
        cells.append([row["row"], *("-" if value is None else f"{value:.{decimals}f}" for value, decimals in numbers)])
    samples = f"{about['num_lanes']} samples of {rows[0]['seconds'] / about['num_lanes']:g} s a temperature"
    return (
        f"# {about['name']} by temperature\n\n{markdown_table(cells)}\n\n"
        f"{samples}, seed {about['seed']}, checkpoint {about['checkpoint']}. NLL is under the model at temperature 1, "
        "each sample or stretch a stream of its own. Pitch by probabilistic YIN, 5% and 95% of the voiced frames. The "
        f"Frechet distance is between log-mel frames of the row and of {about['reference_seconds']:.1f} s of the "
        "validation split; the row `validation` is other stretches of that split, as many and as long as the samples "
        "(at most half of the split): what is like the recordings has a distance like theirs. `white noise` has their "
        "level. A distance that shrinks with more --seconds was too short a sample's.\n"
    )


def draw_report(rows: list[dict[str, Any]], waveforms: list[Float[np.ndarray, " N"]], sample_rate_hz: int) -> Figure:
    """The numbers over temperature, lines for recordings and noise; below, a log-mel spectrogram of each row."""
    figure = Figure(figsize=(max(12.0, 2.1 * len(rows)), 6.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    of_samples = sorted((row for row in rows if row["temperature"] is not None), key=lambda row: row["temperature"])
    draw_measures(above, {"samples": of_samples}, rows[-2:])
    _draw_spectrograms(below, rows, waveforms, sample_rate_hz)
    return figure


def draw_measures(figure: Any, lines: dict[str, list[dict[str, Any]]], references: list[dict[str, Any]]) -> None:
    """A panel for each measure over temperature.

    Args:
        lines: rows of samples in the order of their temperatures, by label.
        references: the rows of recordings and of white noise, level lines.
    """
    panels = figure.subplots(1, 5)
    shown = (["nll_nats"], ["rms_dbfs"], ["voiced_share"], ["pitch_low_hz", "pitch_high_hz"], ["frechet_distance"])
    for panel, keys in zip(panels, shown, strict=True):
        for key in keys:
            for number, (label, rows) in enumerate(lines.items()):
                values = [math.nan if row[key] is None else row[key] for row in rows]
                style = {"color": f"C{(0, 1, 4, 5, 6, 8, 9)[number % 7]}", "marker": "o^sDv<>"[number // 7 % 7]}
                label = plain_text(label) if key == keys[0] else None
                panel.plot([row["temperature"] for row in rows], values, label=label, **style)
            for row, color in zip(references, ("C2", "C3"), strict=True):
                if row[key] is not None:
                    label = row["row"] if key == keys[0] else None
                    panel.axhline(row[key], color=color, linestyle="--", linewidth=1, label=label)
        title = MEASURES[keys[0]][0] if len(keys) == 1 else "pitch, 5% and 95% (Hz)"
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("temperature", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    panels[2].set_ylim(-0.05, 1.05)
    panels[4].set_yscale("log")
    panels[1].legend(fontsize=7)  # the levels of recordings and of noise are one: there is room


def _draw_spectrograms(
    figure: Any, rows: list[dict[str, Any]], waveforms: list[np.ndarray], sample_rate_hz: int
) -> None:
    panels = figure.subplots(1, len(rows), sharey=True)
    for panel, row, waveform in zip(panels, rows, waveforms, strict=True):
        frames = log_mel_frames(waveform, sample_rate_hz)
        extent = (0.0, len(waveform) / sample_rate_hz, 0, frames.shape[1])
        image = panel.imshow(frames.T, origin="lower", aspect="auto", extent=extent, vmin=-23, vmax=0)
        panel.set_title(row["row"], fontsize=9)
        panel.tick_params(labelsize=7)
        panel.set_xlabel("seconds", fontsize=8)
    panels[0].set_ylabel("mel band", fontsize=8)
    figure.colorbar(image, ax=panels, fraction=0.02).set_label("ln power", fontsize=8)
