"""Samples of several models, made alike, judged beside recordings and shown in one picture.

    OUT/report.json, report.md, spectrograms.png, of a sweep temperatures.png
    OUT/NAME/spectrograms.png                   all samples of the first temperature
    OUT/NAME/free_1/sample_0.wav, .json, ...    unconditional samples, here at temperature 1
    OUT/NAME/primed_1/sample_0.wav, ...         continuations of recordings, behind the recording's beginning
    OUT/NAME/free_1_count/, primed_1_count/     lanes that are only counted: their state, no files

Everything is resumed from the state beside the samples.
Shape letters: N samples, B lanes, P codes of a prime.
"""

import math
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer
from matplotlib.figure import Figure

from ct_audio.common.errors import UserError
from ct_audio.common.figures import Sound, spectrograms_figure, write_figure
from ct_audio.common.files import number_in_name, write_file, write_json
from ct_audio.common.progress import Progress
from ct_audio.common.text import markdown_table
from ct_audio.data.acoustics import level_dbfs, mel_frame_length
from ct_audio.data.codecs import Codec
from ct_audio.data.corpus import Corpus, Split
from ct_audio.evaluation.nll import Stretch, evaluate_nll
from ct_audio.runs.open_run import LoadedRun
from ct_audio.sampling.audio_checks import FAULTS, RARE_NATS
from ct_audio.sampling.output import measure_lane
from ct_audio.sampling.sample_set import Request, SampleSet
from ct_audio.sampling.session import sample_sets
from ct_audio.sampling.temperature_report import (
    MEASURES,
    Reference,
    draw_measures,
    make_reference,
    measure_row,
    white_noise,
)

MAX_PITCH_SECONDS = 60.0
"""Of a set of samples and of the recordings; finding the pitch takes a fifth of it."""
MAX_RECORDED_STRETCHES = 8
"""As long as the samples: the row of recordings, and the beginning of each model's judgement on them."""
FREE, PRIMED = "free", "primed"
Sets = dict[tuple[str, str], SampleSet]
"""By the names of model and folder."""
_MAX_ROWS = 8  # of a picture of one model's samples


@dataclass(frozen=True)
class Plan:
    """What is sampled from each model.

    Attributes:
        num_codes: of each sample, a prime not counted.
        temperatures: of which pictures show the first; the lanes to count are of the first, too.
        num_free, num_primed: samples at each temperature, unconditional ones and continuations.
        num_counted: further lanes of both kinds whose faults are counted, without files.
        prime_length: P.
        split: name of the split whose recordings are continued and compared with.
    """

    num_codes: int
    temperatures: tuple[float, ...] = (1.0,)
    num_free: int = 8
    num_primed: int = 4
    num_counted: int = 0
    prime_length: int = 24_000
    seed: int = 0
    split: str = "valid"

    @property
    def num_stretches(self) -> int:
        """Of recordings that are set beside the samples."""
        return min(MAX_RECORDED_STRETCHES, max(self.num_free, self.num_primed))


@dataclass(frozen=True)
class Candidate:
    """One of the models: its name in tables and its folder, the run, and the codec of all of them."""

    name: str
    run: LoadedRun
    codec: Codec


def require_judgeable(candidates: list[Candidate], corpus: Corpus, plan: Plan) -> None:
    """Check before anything is sampled that there will be a report.

    Raises:
        UserError: two models have one name, their codes differ, they are of text, or samples or recordings are too
            short.
    """
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        raise UserError(f"expected models in folders of different names, got {', '.join(names)}; rename one")
    rate = corpus.codec.sample_rate_hz
    if rate is None:
        raise UserError("expected models of audio; for a text, sample with ct-audio sample")
    for candidate in candidates:
        if candidate.codec != corpus.codec:
            raise UserError(
                f"{candidate.name} has the codec {candidate.codec.to_json()}, {corpus.path} has "
                f"{corpus.codec.to_json()}; compare models of the same codes"
            )
    least, split = 2 * mel_frame_length(rate), corpus.split(plan.split)
    if plan.num_codes < least:
        raise UserError(f"--seconds: expected at least {least / rate:.3f}, got {plan.num_codes / rate:g}")
    if split.num_codes < 2 * least * plan.num_stretches:
        raise UserError(
            f"the {plan.split} split of {corpus.path} is too short to compare with: {split.num_codes / rate:.3f} s; "
            "ask for fewer samples, or prepare a longer one"
        )
    if plan.num_primed:
        choose_primes(split, plan.num_primed, plan.prime_length)


def choose_primes(split: Split, num: int, length: int) -> tuple[Integer[np.ndarray, "B P"], tuple[str, ...], list[int]]:
    """Beginnings of recordings from all over a split, in their order; some come again where there are too few.

    Returns:
        the codes of `num` primes; the names of their recordings; where they start in the split.
    Raises:
        UserError: no recording is so long.
    """
    edges = np.append(split.document_offsets, split.num_codes)
    long_enough = np.flatnonzero(np.diff(edges) >= length)
    if not len(long_enough):
        raise UserError(
            f"no recording of the {split.name} split has the {length} codes of a prime, the longest has "
            f"{np.diff(edges).max()}; lower --prime-seconds"
        )
    chosen = long_enough[np.arange(num) * len(long_enough) // num]
    starts = split.document_offsets[chosen].tolist()
    codes = np.stack([np.asarray(split.codes[start : start + length]) for start in starts])
    return codes, tuple(split.document_names[index] for index in chosen), starts


@dataclass(frozen=True)
class PlannedSet:
    """A set of samples: FREE or PRIMED, and whether its lanes are only counted."""

    kind: str
    is_count: bool
    request: Request

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.kind}_{number_in_name(self.request.temperature)}" + ("_count" if self.is_count else "")


def planned_sets(plan: Plan, split: Split) -> list[PlannedSet]:
    """The sets of one model; lane k of a kind continues the same recording at every temperature."""
    sizes = [(FREE, plan.num_free, False, plan.temperatures), (PRIMED, plan.num_primed, False, plan.temperatures)]
    sizes += [(kind, plan.num_counted, True, plan.temperatures[:1]) for kind, num, *_ in sizes[:2] if num]
    planned = []
    for kind, num, is_count, temperatures in sizes:
        for temperature in temperatures if num else ():
            prime: dict[str, Any] = {}
            if kind == PRIMED:
                codes, names, _ = choose_primes(split, num, plan.prime_length)
                prime = {"prime": codes, "prime_name": names, "include_prime": True}
            request = Request(plan.num_codes, num, plan.seed, temperature, **prime)
            planned.append(PlannedSet(kind, is_count, request))
    return planned


def listen(
    candidates: list[Candidate],
    corpus: Corpus,
    plan: Plan,
    out: Path,
    *,
    signals: list[int],
    save_every_seconds: float,
) -> int:
    """Sample what is not sampled yet, judge all of it, write report and pictures, print the table.

    Args:
        out: a directory that is there.
        signals: a list to which signals are appended (see `caught_signals`).
    Returns:
        0, or the number of the signal that ended the sampling early.
    """
    split = corpus.split(plan.split)
    planned, sets = planned_sets(plan, split), Sets()
    for candidate in candidates:
        (out / candidate.name).mkdir(exist_ok=True)
        for each in planned:
            place = out / candidate.name / each.folder
            one = SampleSet(candidate.run, candidate.codec, each.request, place, resume=place.is_dir())
            sets[candidate.name, each.folder] = one
    for (name, folder), one in sets.items():
        print(f"{name}, {folder}:", flush=True)
        if folder.endswith("_count"):
            one.sample(signals=signals, save_every_seconds=save_every_seconds, label=folder)
            stopped_by = one.stopped_by
        else:
            stopped_by = sample_sets([one], signals=signals, save_every_seconds=save_every_seconds).stopped_by
        if stopped_by:
            print(f"stopped by {signal.Signals(stopped_by).name}; the same command goes on", file=sys.stderr)
            return stopped_by
    _write(candidates, corpus, plan, out, planned, sets)
    return 0


def _write(
    candidates: list[Candidate], corpus: Corpus, plan: Plan, out: Path, planned: list[PlannedSet], sets: Sets
) -> None:
    """Judge finished sets and write what comes of it."""
    rate, codec, split = corpus.codec.sample_rate_hz, corpus.codec, corpus.split(plan.split)
    assert rate is not None
    reference = make_reference(split.codes, codec, num_stretches=plan.num_stretches, length=plan.num_codes)
    rows = list(_rows_of_references(reference, codec, rate))
    jobs = [(candidate, each) for candidate in candidates for each in planned]
    for candidate, each in Progress(jobs, desc="judge", unit="set"):
        rows.append(judge(candidate.name, each, sets[candidate.name, each.folder], reference))
    for candidate in Progress(candidates, desc="recordings", unit="model"):
        found = judge_recordings(candidate, reference.stretches)
        rows.append({"row": f"{candidate.name}, recordings", "model": candidate.name, "kind": "recordings"} | found)
    about = {
        "split": plan.split,
        "split_sha256": split.sha256,
        "corpus_fingerprint": corpus.fingerprint,
        "reference_seconds": reference.seconds,
        "seed": plan.seed,
        "seconds": plan.num_codes / rate,
        "prime_seconds": plan.prime_length / rate if plan.num_primed else None,
        "models": {each.name: _about_model(sets[each.name, planned[0].folder]) for each in candidates},
        "best_temperatures": best_temperatures(rows),
    }
    write_json(out / "report.json", about | {"rows": rows})
    text = markdown(about, rows)
    write_file(out / "report.md", text.encode())
    by_name = {candidate.name: _sounds(candidate.name, planned, sets, plan) for candidate in candidates}
    recorded = _recorded_sounds(reference, split, codec, plan)
    write_figure(draw_models(recorded, by_name, plan, rate), out / "spectrograms.png")
    for name, sounds in by_name.items():
        write_figure(
            draw_samples(recorded, sounds, rate, f"{name}, temperature {plan.temperatures[0]:g}"),
            out / name / "spectrograms.png",
        )
    if len(plan.temperatures) > 1:
        write_figure(draw_temperatures(rows), out / "temperatures.png", dpi=120)
    print(text, end="")


def _about_model(one: SampleSet) -> dict[str, Any]:
    """Which model it was."""
    return {key: one.settings()[key] for key in ("name", "model", "checkpoint", "step", "device", "version")}


def _rows_of_references(reference: Reference, codec: Codec, rate: int) -> Iterator[dict[str, Any]]:
    """The rows of recordings and of white noise of their level."""
    recordings = [codec.decode(codes) for codes in reference.stretches]
    level = level_dbfs(np.concatenate(recordings))
    noise = [codec.decode(codec.encode(each)) for each in white_noise([len(each) for each in recordings], level)]
    for row, waveforms in (("recordings", recordings), ("white noise", noise)):
        measures = measure_row(
            waveforms, reference, nll_nats=None, sample_rate_hz=rate, max_pitch_seconds=MAX_PITCH_SECONDS
        )
        yield {"row": row, "model": None, "kind": row, "temperature": None, "num": len(waveforms)} | measures


def judge(name: str, planned: PlannedSet, one: SampleSet, reference: Reference) -> dict[str, Any]:
    """The row of a finished set: counts of its faults, and the measures of `measure_row` of what was sampled."""
    rate, waveforms = one.codec.sample_rate_hz, one.decoded()
    assert rate is not None
    logs = one.log_probabilities.cpu().numpy()
    lanes = zip(one.codes.cpu().numpy(), logs, waveforms, strict=True)
    measures_and_faults = [measure_lane(one, *lane) for lane in lanes]
    kinds = [{fault.split(":")[0] for fault in faults} for _, faults in measures_and_faults]
    counts = Counter(kind for lane in kinds for kind in lane)
    seconds = one.num_codes * len(waveforms) / rate
    measures = measure_row(
        waveforms,
        reference,
        nll_nats=-float(logs.astype(np.float64).mean()),
        sample_rate_hz=rate,
        max_pitch_seconds=MAX_PITCH_SECONDS,
    )
    return {
        "row": f"{name}, {planned.folder}",
        "model": name,
        "kind": planned.kind,
        "is_count": planned.is_count,
        "temperature": planned.request.temperature,
        "num": len(waveforms),
        "num_faulty": sum(map(bool, kinds)),
        "faults": {fault: counts[fault] for fault in FAULTS},
        "warnings": {lane: faults for lane, (_, faults) in enumerate(measures_and_faults) if faults},
        "rare_codes_per_second": sum(measures["rare_codes"] for measures, _ in measures_and_faults) / seconds,
        **measures,
    }


def judge_recordings(candidate: Candidate, stretches: list[Integer[np.ndarray, " N"]]) -> dict[str, Any]:
    """NLL of recordings under a model, each a stream of its own, and how often a second a code is rare."""
    num_rare, nlls = 0, []

    def count(_: Any, nll: Any) -> None:
        nonlocal num_rare
        num_rare += int((nll > RARE_NATS).sum())

    for codes in stretches:
        stream = Stretch(codes, candidate.codec.start_code, candidate.run.config.data.chunk_length)
        nlls.append(evaluate_nll(candidate.run.model, stream, on_nll=count, progress=None).nll_nats)
    seconds = sum(map(len, stretches)) / (candidate.codec.sample_rate_hz or 1)
    return {"nll_nats": float(np.mean(nlls)), "rare_codes_per_second": num_rare / seconds}


def best_temperatures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of each model, that whose unconditional samples (continuations, where there are no others) are nearest."""
    best: dict[str, float] = {}
    for name in dict.fromkeys(row["model"] for row in rows if row["model"] is not None):
        sets = [row for row in rows if row["model"] == name and not row.get("is_count", True)]
        sets = [row for row in sets if row["kind"] == FREE] or sets
        best[name] = min(sets, key=lambda row: row["frechet_distance"])["temperature"]
    return best


def report_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table of rows, of which the first is that of recordings; its own first row holds the titles."""
    titles = ["", "samples", "with warnings", *FAULTS, "rare codes/s", *(title for title, _ in MEASURES.values())]
    recordings = rows[0]
    low, high = recordings["pitch_low_hz"], recordings["pitch_high_hz"]
    cells = [titles]
    for row in rows:
        counts = row.get("faults", {})
        line = [row["row"], _cell(row.get("num")), _cell(row.get("num_faulty"))]
        line += [_cell(counts.get(fault)) for fault in FAULTS]
        line += [_cell(row.get("rare_codes_per_second"), 2)]
        for key, (_, decimals) in MEASURES.items():
            line.append(_cell(row.get(key), decimals))
            if key == "pitch_median_hz" and row.get(key) and low and not low <= row[key] <= high:
                line[-1] += " (outside)"
        cells.append(line)
    return cells


def markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The table, and below it how to read it."""
    cells = report_cells(rows)
    best = ", ".join(f"{name} {temperature:g}" for name, temperature in about["best_temperatures"].items())
    prime = f", continuations of {about['prime_seconds']:g} s of recordings" if about["prime_seconds"] else ""
    return (
        f"# Samples beside recordings\n\n{markdown_table(cells)}\n\n"
        f"Samples of {about['seconds']:g} s{prime}, seed {about['seed']}; the number behind `{FREE}` and `{PRIMED}` is "
        f"the temperature, `count` are lanes without files. A sample counts once for each kind of warning, also where "
        f"only one second of it deserves it. A code is rare above {RARE_NATS:g} nats. NLL is under the model at "
        "temperature 1. Pitch by probabilistic YIN of the voiced frames; a median is outside where it is not between "
        "5% and 95% of the recordings. The Frechet distance is between log-mel frames of the row and of "
        f"{about['reference_seconds']:.1f} s of the {about['split']} split; the row `recordings` is other stretches of "
        "that split, as long as the samples (at most half of the split). `white noise` has their level. "
        f"Nearest to the recordings by this distance: temperature {best}.\n"
    )


def _cell(value: int | float | None, decimals: int = 0) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def _sounds(name: str, planned: list[PlannedSet], sets: Sets, plan: Plan) -> dict[str, list[Sound]]:
    """A model's samples at the first temperature by kind, continuations behind their primes."""
    found: dict[str, list[Sound]] = {}
    for each in planned:
        if each.request.temperature != plan.temperatures[0] or each.is_count:
            continue
        one = sets[name, each.folder]
        waveforms = [np.concatenate([one.decoded_prime(lane), own]) for lane, own in enumerate(one.decoded())]
        found[each.kind] = [Sound(waveform, each.request.prime_length) for waveform in waveforms]
    return found


def _recorded_sounds(reference: Reference, split: Split, codec: Codec, plan: Plan) -> dict[str, list[Sound]]:
    """Recordings to set beside the samples: any stretches, and for each prime what it was in truth followed by."""
    sounds: dict[str, list[Sound]] = {}
    if plan.num_free:
        sounds[FREE] = [Sound(codec.decode(codes)) for codes in reference.stretches]
    if plan.num_primed:
        starts, length = choose_primes(split, plan.num_primed, plan.prime_length)[2], plan.prime_length + plan.num_codes
        stretches = [np.asarray(split.codes[start : start + length]) for start in starts]
        sounds[PRIMED] = [Sound(codec.decode(codes), plan.prime_length) for codes in stretches]
    return sounds


def draw_models(
    recorded: dict[str, list[Sound]], sounds: dict[str, dict[str, list[Sound]]], plan: Plan, sample_rate_hz: int
) -> Figure:
    """The first sample of each kind of each model, under recordings."""
    rows: dict[str, list[Sound | None]] = {"recordings": [recorded[kind][0] for kind in recorded]}
    rows |= {name: [of_model[kind][0] for kind in recorded] for name, of_model in sounds.items()}
    titles = {FREE: "unconditional", PRIMED: "continuation of the same recording, from the dashed line on"}
    title = f"The first sample of each model at temperature {plan.temperatures[0]:g}, seed {plan.seed}"
    return spectrograms_figure(rows, sample_rate_hz, columns=[titles[kind] for kind in recorded], title=title)


def draw_samples(
    recorded: dict[str, list[Sound]], sounds: dict[str, list[Sound]], sample_rate_hz: int, title: str
) -> Figure:
    """Samples of one model under recordings, two columns of unconditional ones and one of continuations."""
    shares = {kind: (2 if kind == FREE and len(sounds[kind]) > 1 else 1) for kind in sounds}
    num_rows = min(_MAX_ROWS, max(math.ceil(len(sounds[kind]) / shares[kind]) for kind in sounds))
    rows: dict[str, list[Sound | None]] = {"recordings": []}
    rows |= {f"samples, row {row}": [] for row in range(1, num_rows + 1)}
    for kind, share in shares.items():
        for column in range(share):
            lines = [
                recorded[kind][column : column + 1],
                *(sounds[kind][share * row + column :][:1] for row in range(num_rows)),
            ]
            for line, found in zip(rows.values(), lines, strict=True):
                line.append(found[0] if found else None)
    columns = [kind for kind, share in shares.items() for _ in range(share)]
    return spectrograms_figure(rows, sample_rate_hz, columns=columns, title=title)


def draw_temperatures(rows: list[dict[str, Any]]) -> Figure:
    """The measures over temperature, a line for each model and kind."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted((row for row in rows if not row.get("is_count", True)), key=lambda row: row["temperature"]):
        lines.setdefault(f"{row['model']}, {row['kind']}", []).append(row)
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    draw_measures(figure, lines, rows[:2])
    return figure
