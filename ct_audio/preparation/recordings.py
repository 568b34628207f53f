"""Preparation of recordings: any audio -> 24 kHz mono -> mu-law codes -> corpus, parallel over files.

Results lie file by file in OUT.partial until all are there; then the corpus is put together and renamed to OUT. So an
interrupted run leaves nothing that looks whole, and the same command goes on from what was done.
Shape letters: N samples or codes.
"""

import hashlib
import importlib
import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import librosa
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json, write_file
from ct_audio.common.text import printable
from ct_audio.data.audio_files import read_wav, require_finite, resample, write_wav
from ct_audio.data.codecs import MuLaw
from ct_audio.data.corpus import Corpus, CorpusWriter
from ct_audio.preparation.audio_report import FileResult, count_reasons, make_report, write_report
from ct_audio.preparation.listing import same_name
from ct_audio.preparation.workers import CONTENT_KEY, existing_corpus, join_hashes, prepare_once, run_tasks

PREPARATION_VERSION = 1
MAX_DROPPED_PERCENT = 5.0
SILENCE = 2.0**-15  # -90 dBFS, one step of 16 bits
FULL_SCALE = 32767 / 32768
OUT_OF_RANGE = 16.0  # 24 dB over full scale: no loud recording, but a file of another scale, or damaged
EXAMPLE_SECONDS = 10.0
GAP_SECONDS = 0.5
_RANKS = {"test": 0, "valid": 1, "train": 3}
"""Of splits: what two of them have goes to the first."""


@dataclass(frozen=True)
class Recording:
    """One source file.

    Attributes:
        path: of the audio file.
        split: where it goes, as "train".
        name: unique in the corpus, printable (`common.text.printable` makes it so); recordings of a split are put in
            the order of their names.
        part: begin and end of the part that is taken, as shares of the whole; a part that does not begin at 0 begins
            `GAP_SECONDS` later, so that it does not continue what another split ends with.
        reason: why it cannot be used, to be named in the report; None: reading it tells.
    """

    path: Path
    split: str
    name: str
    part: tuple[float, float] = (0.0, 1.0)
    reason: str | None = None


@dataclass(frozen=True)
class AudioSettings:
    """What is done to each recording, in this order.

    Attributes:
        sample_rate_hz: after the channel mean, resampled to this.
        gain_db: the same fixed gain for every file; there is no per-file rescaling.
        trim_db: start and end are cut where frames (2048 samples, hop 512) are quieter than the file's loudest one by
            more than this; None: kept as they are.
        min_seconds: what is shorter after that is dropped.
    """

    sample_rate_hz: int = 24_000
    gain_db: float = 0.0
    trim_db: float | None = None
    min_seconds: float = 0.1

    def __post_init__(self) -> None:
        if not -120 <= self.gain_db <= 120:
            raise UserError(f"gain: expected -120..120 dB, got {self.gain_db}")
        if self.trim_db is not None and not 0 < self.trim_db <= 200:
            raise UserError(f"trimming: expected a threshold in (0, 200] dB below the file's peak, got {self.trim_db}")
        if not 0 <= self.min_seconds < math.inf:
            raise UserError(f"shortest recording: expected at least 0 seconds, got {self.min_seconds}")

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the codes of a file."""
        fixed = {
            "preparation_version": PREPARATION_VERSION,
            "channels": "mean",
            "resampler": "soxr HQ",
            "codec": "mu_law",
            "beyond_full_scale": "clipped",
            "document_order": "by name, within a split",
        }
        return asdict(self) | fixed


def hash_place(group: str) -> float:
    """Where a group of recordings that must stay together lies in 0..100, from the group's name alone.

    The first 8 bytes of SHA-256 of the name, in NFC and as UTF-8, as a big-endian fraction of 2^64, times 100.
    """
    digest = hashlib.sha256(same_name(group).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 * 100


def split_by_hash(group: str, *, valid_percent: float, test_percent: float) -> str:
    """The split of a group: `hash_place` below `valid_percent` is valid, below the sum of both test, else train."""
    if min(valid_percent, test_percent) < 0 or not valid_percent + test_percent < 100:
        raise UserError(
            f"expected valid and test percentages that sum to less than 100, got {valid_percent}, {test_percent}"
        )
    place = hash_place(group)
    if place < valid_percent:
        return "valid"
    return "test" if place < valid_percent + test_percent else "train"


def prepare_waveform(
    waveform: Float[np.ndarray, "N"], sample_rate_hz: int, settings: AudioSettings
) -> Float[np.ndarray, "M"]:
    """Resample, gain, trim.

    Raises:
        UserError: the recording is empty, not finite, beyond 16 times full scale after gain, silent or too short.
    """
    if not len(waveform):
        raise UserError("empty: no samples")
    require_finite(waveform, "not finite")
    gain = 10 ** (settings.gain_db / 20)
    peak = float(np.abs(waveform).max()) * gain
    if peak > OUT_OF_RANGE:
        raise UserError(f"out of range: the peak is {peak:.3g}, full scale is 1; scale the file, or use a lower gain")
    deviation = float(np.abs(waveform - waveform.mean(dtype=np.float64).astype(np.float32)).max())
    if deviation < SILENCE:
        raise UserError(f"silent: no sample is farther than {deviation:.1e} from the mean")
    waveform = resample(waveform, sample_rate_hz, settings.sample_rate_hz)
    if settings.gain_db:
        waveform = waveform * np.float32(gain)
    if settings.trim_db is not None:
        waveform = librosa.effects.trim(waveform, top_db=settings.trim_db)[0]
    _require_length(waveform, settings)
    return waveform


def take_part(
    waveform: Float[np.ndarray, "N"], part: tuple[float, float], settings: AudioSettings
) -> Float[np.ndarray, "M"]:
    """The part of a prepared waveform that `Recording.part` says.

    Raises:
        UserError: it is too short.
    """
    begin, end = (round(share * len(waveform)) for share in part)
    gap = min(round(GAP_SECONDS * settings.sample_rate_hz), (end - begin) // 2) if begin else 0
    _require_length(waveform[begin + gap : end], settings)
    return waveform[begin + gap : end]


def _require_length(waveform: Float[np.ndarray, "N"], settings: AudioSettings) -> None:
    seconds = len(waveform) / settings.sample_rate_hz
    if seconds < settings.min_seconds:
        raise UserError(f"too short: {seconds:.3f} s, expected at least {settings.min_seconds} s")


def prepare_audio(
    recordings: Sequence[Recording],
    out: str | Path,
    *,
    settings: AudioSettings,
    source: dict[str, Any],
    num_processes: int = 1,
    allow_dropped: bool = False,
    overwrite: bool = False,
) -> tuple[Corpus, dict[str, Any] | None]:
    """Prepare recordings into a corpus at `out`, with report.json, report.md, histogram.png and example.wav.

    The same recordings and settings give the same bytes, whatever the number of processes.

    Args:
        source: where the recordings come from, for corpus.json; `path` in it may differ between runs.
        num_processes: each of them uses one thread.
        allow_dropped: go on when over 5% of the files had to be dropped.
        overwrite: replace the corpus that stands at `out`.
    Returns:
        corpus: opened.
        report: what report.json says; None if the same corpus was there already.
    Raises:
        UserError: nothing to prepare, too many dropped, a split that would be empty, or `out` is taken.
    """
    if settings.trim_db is not None:
        _require_trimming()
    out, recordings = Path(out), sorted(recordings, key=lambda recording: (recording.split, recording.name))
    _require_names(recordings)
    source = source | {"num_files": len(recordings), "listing_sha256": _hash_listing(recordings)}
    report: dict[str, Any] = {}

    def make(partial: Path) -> None:
        (partial / "files").mkdir(exist_ok=True)
        results = _prepare_files(recordings, partial / "files", settings, num_processes)
        content = join_hashes([result.source_sha256 for result in results])
        results = _leave_out_copies(recordings, results)
        named = [(r.name, r.split, result) for r, result in zip(recordings, results, strict=True)]
        report.update(make_report(named, settings.sample_rate_hz))
        _check_dropped(report, partial, allow_dropped=allow_dropped)
        _assemble(recordings, results, report, partial, out, settings, source | {CONTENT_KEY: content})

    content_hash = cache(lambda: _hash_contents(recordings))
    corpus, was_there = prepare_once(
        out,
        lambda: existing_corpus(out, source, settings.to_json(), content_hash=content_hash, overwrite=overwrite),
        make,
    )
    return corpus, None if was_there else report


def _require_trimming() -> None:
    """Import what cuts silence, which compiles itself and needs a place for that."""
    try:
        importlib.import_module("librosa.effects")
        importlib.import_module("librosa.feature")
    except RuntimeError as error:
        raise UserError(
            f"--trim-db: librosa cannot be loaded: {error}; where home cannot be written, choose a folder that can: "
            f"export NUMBA_CACHE_DIR={gettempdir()}/numba"
        ) from error


@dataclass(frozen=True)
class _Task:
    recording: Recording
    target: Path
    settings: AudioSettings


def _prepare_files(
    recordings: list[Recording], files: Path, settings: AudioSettings, num_processes: int
) -> list[FileResult]:
    tasks = {index: _Task(r, _target(files, r.name), settings) for index, r in enumerate(recordings)}
    done: dict[int, FileResult] = {}
    preload = [
        "ct_audio.preparation.recordings",
        *(["librosa.effects", "librosa.feature"] if settings.trim_db is not None else []),
    ]  # it takes seconds
    with tqdm(total=len(tasks), unit="file", desc="prepare", disable=None) as progress:
        for index, result in run_tasks(_prepare_file, tasks, num_processes, preload=preload):
            done[index] = result
            progress.update()
    return [done[index] for index in tasks]


def _prepare_file(task: _Task) -> FileResult:
    """Codes and result of a recording lie in `task.target`.* afterwards, unless it is dropped.

    What an interrupted run left there is taken where the file's bytes and the settings are still the same.
    """
    recording = task.recording
    if recording.reason is not None:
        return FileResult(reason=printable(recording.reason))
    source_sha256 = _hash_file(recording.path)
    key = {"source_sha256": source_sha256, "part": list(recording.part), "settings": task.settings.to_json()}
    result = _reusable(task, key) if source_sha256 else None
    if result is None:
        result = _encode_file(task)
        result = replace(result, source_sha256=source_sha256)
        if result.reason is None:  # without fsync: sizes and checksums are compared when the corpus is put together
            record = json.dumps({"key": key, "result": asdict(result)})
            write_file(task.target.with_suffix(".json"), record.encode(), sync=False)
    return result


def _encode_file(task: _Task) -> FileResult:
    """Read and encode one recording; its codes lie in `task.target`.codes afterwards, unless it is dropped."""
    path, settings = task.recording.path, task.settings
    try:
        waveform, sample_rate_hz = read_wav(path)
        prepared = take_part(prepare_waveform(waveform, sample_rate_hz, settings), task.recording.part, settings)
        codes = MuLaw(settings.sample_rate_hz).encode(prepared)
    except UserError as error:
        reason = str(error).removeprefix(f"cannot read {path}: ")
        known = ("truncated", "empty", "not finite", "out of range", "silent", "too short")
        return FileResult(reason=printable(reason if reason.startswith(known) else f"unreadable: {reason}"))
    except MemoryError:
        return FileResult(reason="unreadable: too long for the memory of this machine")
    raw, magnitude, (begin, end) = codes.tobytes(), np.abs(prepared), task.recording.part
    write_file(task.target.with_suffix(".codes"), raw, sync=False)
    return FileResult(
        codes_sha256=hashlib.sha256(raw).hexdigest(),
        num_codes=len(codes),
        crc32=zlib.crc32(raw),
        sample_rate_hz=sample_rate_hz,
        source_seconds=len(waveform) / sample_rate_hz * (end - begin),
        peak=float(magnitude.max()),
        sum_of_squares=float(np.square(prepared, dtype=np.float64).sum()),
        num_clipped=int((magnitude >= FULL_SCALE).sum()),
        histogram=tuple(np.bincount(codes, minlength=256).tolist()),
    )


def _reusable(task: _Task, key: dict[str, Any]) -> FileResult | None:
    """What an interrupted run left of this file, if the file's bytes and the settings are still the same."""
    try:
        record = read_json(task.target.with_suffix(".json"))
        if record["key"] != json.loads(json.dumps(key)):
            return None
        fields = record["result"]
        result = FileResult(**(fields | {"histogram": tuple(fields["histogram"])}))
        size = task.target.with_suffix(".codes").stat().st_size
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    return result if size == result.num_codes else None


def _hash_file(path: Path) -> str:
    """SHA-256 of a file; "" where there is no plain file that can be read."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return ""


def _hash_contents(recordings: list[Recording]) -> str:
    """What `join_hashes` says of the files as they are now: all of them are read."""
    known: dict[Path, str] = {}
    for recording in tqdm(recordings, unit="file", desc="hash", disable=None):
        if recording.path not in known:
            known[recording.path] = _hash_file(recording.path)
    return join_hashes([known[r.path] if r.reason is None else "" for r in recordings])


def _leave_out_copies(recordings: list[Recording], results: list[FileResult]) -> list[FileResult]:
    """Codes that several splits have stay in test, else in valid: what is held out must not be trained on."""
    owners: dict[str, Recording] = {}
    for recording, result in sorted(zip(recordings, results, strict=True), key=lambda pair: _rank(pair[0])):
        if result.reason is None:
            owners.setdefault(result.codes_sha256, recording)
    found = list(results)
    for index, (recording, result) in enumerate(zip(recordings, results, strict=True)):
        owner = owners.get(result.codes_sha256)
        if owner is not None and owner.split != recording.split:
            found[index] = replace(result, reason=f"the same audio as {owner.name} in {owner.split}", is_copy=True)
    return found


def _rank(recording: Recording) -> int:
    return _RANKS.get(recording.split, 2)


def _assemble(
    recordings: list[Recording],
    results: list[FileResult],
    report: dict[str, Any],
    partial: Path,
    out: Path,
    settings: AudioSettings,
    source: dict[str, Any],
) -> None:
    codec = MuLaw(settings.sample_rate_hz)
    writer = CorpusWriter(out, codec, source=source, preparation=settings.to_json(), work_dir=partial / "corpus")
    tasks = [(r, result) for r, result in zip(recordings, results, strict=True) if result.reason is None]
    for recording, result in tqdm(tasks, unit="file", desc="write", disable=None):
        codes = _read_codes(_target(partial / "files", recording.name), result)
        writer.add_document(recording.split, recording.name, codes)
    example = next((task for task in tasks if task[0].split == "valid"), tasks[0])
    codes = _read_codes(_target(partial / "files", example[0].name), example[1])
    waveform = codec.decode(codes[: int(EXAMPLE_SECONDS * codec.sample_rate_hz)])
    write_wav(writer.work_dir / "example.wav", waveform, codec.sample_rate_hz)
    report |= {"example": example[0].name}
    write_report(writer.work_dir, report, f"Preparation of {out.name}")
    writer.finish(overwrite=True)  # `existing_corpus` has seen what is there


def _target(files: Path, name: str) -> Path:
    """Where a recording's result lies, without suffix: names may hold slashes and be long."""
    return files / hashlib.sha256(name.encode()).hexdigest()[:32]


def _read_codes(target: Path, result: FileResult) -> UInt8[np.ndarray, "N"]:
    raw = target.with_suffix(".codes").read_bytes()
    if len(raw) != result.num_codes or zlib.crc32(raw) != result.crc32:
        target.with_suffix(".json").unlink()
        raise UserError(f"{target}.codes was damaged since it was written; run the same command again")
    return np.frombuffer(raw, dtype=np.uint8)


def _check_dropped(report: dict[str, Any], partial: Path, *, allow_dropped: bool) -> None:
    dropped, num_kept = report["dropped"], report["total"]["num_files"]
    listing = partial / "dropped.txt"
    left_out = [*dropped, *report["copies"]]
    write_file(listing, "".join(f"{entry['name']}: {entry['reason']}\n" for entry in left_out).encode())
    what = f"{len(dropped)} of {len(dropped) + num_kept} files had to be dropped ({count_reasons(dropped)})"
    if not num_kept:
        raise UserError(f"{what}: nothing is left; see {listing}")
    if report["dropped_percent"] > MAX_DROPPED_PERCENT and not allow_dropped:
        raise UserError(f"{what}, over {MAX_DROPPED_PERCENT:g}%; see {listing}; repair them, or pass --allow-dropped")
    for name, split in report["splits"].items():
        if not split["num_files"]:
            num_dropped, num_copies = (
                sum(entry["split"] == name for entry in report[key]) for key in ("dropped", "copies")
            )
            raise UserError(
                f"nothing is left of split {name}: {num_dropped} recordings had to be dropped, {num_copies} are copies "
                f"of recordings in other splits; see {listing}; repair the former, keep the latter in one group"
            )


def _require_names(recordings: list[Recording]) -> None:
    if not recordings:
        raise UserError("there is nothing to prepare: the recipe found no recordings")
    seen: set[str] = set()
    for recording in recordings:
        if recording.name in seen:
            raise UserError(f"two recordings are named {recording.name!r}; names must be unique")
        if not recording.name.isprintable():
            raise UserError(f"a recording is named {recording.name!r}; a recipe must make names printable")
        seen.add(recording.name)


def _hash_listing(recordings: list[Recording]) -> str:
    """Hash over names, splits and sizes: tells quickly that files were added or moved to another split."""
    digest = hashlib.sha256()
    for recording in recordings:
        size = os.path.getsize(recording.path) if os.path.isfile(recording.path) else -1
        digest.update(f"{recording.split}\t{recording.name}\t{size}\n".encode())
    return digest.hexdigest()
