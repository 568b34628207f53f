"""Preparation of recordings: any audio -> 24 kHz mono -> mu-law codes -> corpus, parallel over files.

Results lie file by file in OUT.partial until all are there; then the corpus is put together and renamed to OUT. So an
interrupted run leaves nothing that looks whole, and the same command goes on from what was done.
Shape letters: N samples or codes.
"""

import hashlib
import itertools
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json, write_file
from ct_audio.common.progress import Progress
from ct_audio.common.text import printable
from ct_audio.data.audio_files import CheckedRecording, write_wav
from ct_audio.data.av_files import INSTALL
from ct_audio.data.codecs import MuLaw, require_signal
from ct_audio.data.corpus import Corpus, CorpusWriter
from ct_audio.preparation.audio_report import FileResult, count_reasons, make_report, write_report
from ct_audio.preparation.listing import same_name, warn
from ct_audio.preparation.workers import CONTENT_KEY, existing_corpus, join_hashes, prepare_once, run_tasks

PREPARATION_VERSION = 1
MAX_DROPPED_PERCENT = 5.0
FULL_SCALE = 32767 / 32768
TRIM_FRAME, TRIM_HOP = 2048, 512
EXAMPLE_SECONDS = 10.0
REASONS = (
    *("truncated", "damaged", "empty", "not finite", "out of range", "silent", "channels cancel out", "offset"),
    *("hardly any different codes", "too short"),
)
"""What the reason to drop a file begins with; all others are "unreadable"."""
COPY_BYTES = 1 << 20
GAP_SECONDS = 0.5
CUT_TOLERANCE_SECONDS = 0.01
"""By which a file may be shorter than a manifest says."""
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
        seconds: begin and end of what is taken, exactly; None: as `part` says. Not with `AudioSettings.trim_db`.
        reason: why it cannot be used, to be named in the report; None: reading it tells.
    """

    path: Path
    split: str
    name: str
    part: tuple[float, float] = (0.0, 1.0)
    seconds: tuple[float, float] | None = None
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


def split_groups(groups: Mapping[str, str], *, valid_percent: float, test_percent: float) -> dict[str, str]:
    """Each name's split by its group's hash; a split that would stay empty takes a group from the one that has most.

    It takes the one with the fewest names (train: with the most), of equal ones the one whose hash is lowest, and a
    warning says so.

    Args:
        groups: the group of each name; at least as many groups as splits.
        valid_percent, test_percent: of the groups; at 0 there is no such split.
    """
    sizes = Counter(groups.values())
    shares = {"train": 100 - valid_percent - test_percent, "valid": valid_percent, "test": test_percent}
    percent = {"valid_percent": valid_percent, "test_percent": test_percent}
    of_group = {group: split_by_hash(group, **percent) for group in sorted(sizes)}
    for split in (split for split, share in shares.items() if share):
        if split not in of_group.values():
            donor, _ = Counter(of_group.values()).most_common(1)[0]
            sign = -1 if split == "train" else 1
            candidates = [group for group in of_group if of_group[group] == donor]
            chosen = min(candidates, key=lambda group: (sign * sizes[group], hash_place(group)))
            warn(f"no group falls into {split} by its hash: it takes {chosen or '.'!r}, {sizes[chosen]} files")
            of_group[chosen] = split
    return {name: of_group[group] for name, group in groups.items()}


def prepared_blocks(recording: CheckedRecording, trim_db: float | None) -> Iterator[Float[np.ndarray, " N"]]:
    """Blocks of a recording, trimmed; where it is trimmed, it is read twice.

    Args:
        trim_db: see `AudioSettings`.
    Raises:
        UserError: see `CheckedRecording.blocks`.
    """
    if trim_db is None:
        yield from recording.blocks()
        return
    start, end = sounding_range(recording.blocks(), trim_db)
    yield from _stretch(recording.blocks(), start, end)


def _stretch(blocks: Iterable[Float[np.ndarray, " _"]], start: int, end: int) -> Iterator[Float[np.ndarray, " _"]]:
    place = 0
    for block in blocks:
        kept = block[max(0, start - place) : max(0, end - place)]
        place += len(block)
        if len(kept):
            yield kept


def take_part(
    read: Callable[[], Iterator[Float[np.ndarray, " _"]]], part: tuple[float, float], sample_rate_hz: int
) -> Iterator[Float[np.ndarray, " _"]]:
    """Blocks of the part of a recording that `Recording.part` says.

    Args:
        read: begins to read the recording; where a part is wanted, it is read twice.
    """
    if part == (0.0, 1.0):
        yield from read()
        return
    num_samples = sum(map(len, read()))
    start, end = (round(share * num_samples) for share in part)
    gap = min(round(GAP_SECONDS * sample_rate_hz), (end - start) // 2) if start else 0
    yield from _stretch(read(), start + gap, end)


def sounding_range(blocks: Iterable[Float[np.ndarray, " _"]], trim_db: float) -> tuple[int, int]:
    """First sample of the first and last sample of the last frame of a recording that is not quiet, as (start, end).

    Computes what `librosa.effects.trim` does, without holding the recording: a frame is centred on every 512th sample,
    and it is quiet if its RMS is more than `trim_db` below the loudest one's.
    """
    silence = np.zeros(TRIM_FRAME // 2, np.float32)  # before the start and after the end
    pending, num_samples, levels = silence, 0, []
    for block in itertools.chain(blocks, [silence]):
        num_samples += len(block)
        pending = np.concatenate([pending, block])
        if len(pending) >= TRIM_FRAME:
            frames = np.lib.stride_tricks.sliding_window_view(pending, TRIM_FRAME)[::TRIM_HOP]
            levels.append(np.sqrt(np.square(frames).mean(axis=1)))
            pending = pending[len(frames) * TRIM_HOP :]
    power = np.maximum(np.square(np.concatenate(levels)), 1e-10)
    loud = np.flatnonzero(10 * np.log10(power) - 10 * np.log10(power.max()) > -trim_db)
    return int(loud[0]) * TRIM_HOP, min(num_samples - len(silence), (int(loud[-1]) + 1) * TRIM_HOP)


def prepare_recording(
    path: Path,
    settings: AudioSettings,
    write: Callable[[bytes], Any],
    *,
    part: tuple[float, float] = (0.0, 1.0),
    seconds: tuple[float, float] | None = None,
) -> FileResult:
    """Prepare one recording in blocks: the same memory whatever its length.

    Args:
        write: is given the codes, one byte each.
        part, seconds: see `Recording`.
    Raises:
        UserError: the recording cannot be read, fails a check of `CheckedRecording` or `require_signal`, is too short,
            or ends before `seconds` do; codes may have been written by then.
    """
    recording = CheckedRecording(path, settings.sample_rate_hz, gain_db=settings.gain_db)
    codec = MuLaw(settings.sample_rate_hz)
    histogram = np.zeros(codec.vocab_size, np.int64)
    crc32, sha256, peak, sum_of_squares, num_clipped = 0, hashlib.sha256(), 0.0, 0.0, 0
    if seconds is None:
        blocks = take_part(lambda: prepared_blocks(recording, settings.trim_db), part, settings.sample_rate_hz)
    else:
        start, end = (round(time * settings.sample_rate_hz) for time in seconds)
        blocks = _stretch(recording.blocks(), start, end)
    for waveform in blocks:
        codes, magnitude = codec.encode(waveform), np.abs(waveform)
        raw = codes.tobytes()
        write(raw)
        crc32 = zlib.crc32(raw, crc32)
        sha256.update(raw)
        histogram += np.bincount(codes, minlength=codec.vocab_size)
        peak = max(peak, float(magnitude.max(initial=0.0)))
        sum_of_squares += float(np.square(waveform, dtype=np.float64).sum())
        num_clipped += int((magnitude >= FULL_SCALE).sum())
    num_codes = int(histogram.sum())
    found = num_codes / settings.sample_rate_hz
    if found < settings.min_seconds or not num_codes:
        raise UserError(f"cannot use {path}: too short: {found:.3f} s, expected at least {settings.min_seconds} s")
    if seconds is not None and found < seconds[1] - seconds[0] - CUT_TOLERANCE_SECONDS:
        raise UserError(
            f"cannot use {path}: too short: it ends at {seconds[0] + found:.3f} s, its cut at {seconds[1]:.3f} s"
        )
    require_signal(histogram, path)
    return FileResult(
        codes_sha256=sha256.hexdigest(),
        num_codes=num_codes,
        crc32=crc32,
        sample_rate_hz=recording.source_rate_hz,
        source_seconds=found
        if seconds is not None
        else recording.num_source_samples / recording.source_rate_hz * (part[1] - part[0]),
        peak=peak,
        sum_of_squares=sum_of_squares,
        num_clipped=num_clipped,
        histogram=tuple(histogram.tolist()),
    )


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
    out, recordings = Path(out), sorted(recordings, key=lambda recording: (recording.split, recording.name))
    _require_names(recordings)
    if settings.trim_db is not None and any(recording.seconds for recording in recordings):
        raise UserError("--trim-db: the cuts of a manifest have their own begin and end; leave it out")
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
    preload = ["ct_audio.preparation.recordings"]  # it takes seconds
    with Progress(total=len(tasks), unit="file", desc="prepare") as progress:
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
    taken = list(recording.seconds or recording.part)
    key = {"source_sha256": source_sha256, "part": taken, "settings": task.settings.to_json()}
    result = _reusable(task, key) if source_sha256 else None
    if result is None:
        result = replace(_encode_file(task), source_sha256=source_sha256)
        if result.reason is None:  # without fsync: sizes and checksums are compared when the corpus is put together
            record = json.dumps({"key": key, "result": asdict(result)})
            write_file(task.target.with_suffix(".json"), record.encode(), sync=False)
    return result


def _encode_file(task: _Task) -> FileResult:
    """Read and encode one recording; its codes lie in `task.target`.codes afterwards, unless it is dropped."""
    path, target = task.recording.path, task.target.with_suffix(".codes")
    try:
        with target.open("wb") as file:  # without fsync, likewise
            taken = {"part": task.recording.part, "seconds": task.recording.seconds}
            return prepare_recording(path, task.settings, file.write, **taken)
    except UserError as error:
        target.unlink(missing_ok=True)
        reason = str(error).removeprefix(f"cannot read {path}: ").removeprefix(f"cannot use {path}: ")
        return FileResult(reason=printable(reason if reason.startswith(REASONS) else f"unreadable: {reason}"))
    except OSError as error:
        target.unlink(missing_ok=True)  # it may be what fills the disk
        error.filename = str(target)
        raise


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
    for recording in Progress(recordings, unit="file", desc="hash"):
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
    for recording, result in Progress(tasks, unit="file", desc="write"):
        blocks = _read_codes(_target(partial / "files", recording.name), result)
        writer.add_document(recording.split, recording.name, next(blocks))
        for codes in blocks:
            writer.extend_document(recording.split, codes)
    example = next((task for task in tasks if task[0].split == "valid"), tasks[0])
    codes = next(_read_codes(_target(partial / "files", example[0].name), example[1]))
    waveform = codec.decode(codes[: int(EXAMPLE_SECONDS * codec.sample_rate_hz)])
    write_wav(writer.work_dir / "example.wav", waveform, codec.sample_rate_hz)
    report |= {"example": example[0].name}
    write_report(writer.work_dir, report, f"Preparation of {out.name}")
    writer.finish(overwrite=True)  # `existing_corpus` has seen what is there


def _target(files: Path, name: str) -> Path:
    """Where a recording's result lies, without suffix: names may hold slashes and be long."""
    return files / hashlib.sha256(name.encode()).hexdigest()[:32]


def _read_codes(target: Path, result: FileResult) -> Iterator[UInt8[np.ndarray, " N"]]:
    """Blocks of the codes of a recording; that they are damaged is found after the last one."""
    num_codes = crc32 = 0
    with target.with_suffix(".codes").open("rb") as file:
        while raw := file.read(COPY_BYTES):
            num_codes, crc32 = num_codes + len(raw), zlib.crc32(raw, crc32)
            yield np.frombuffer(raw, dtype=np.uint8)
    if num_codes != result.num_codes or crc32 != result.crc32:
        target.with_suffix(".json").unlink()
        raise UserError(f"{target}.codes was damaged since it was written; run the same command again")


def _check_dropped(report: dict[str, Any], partial: Path, *, allow_dropped: bool) -> None:
    dropped, num_kept = report["dropped"], report["total"]["num_files"]
    listing = partial / "dropped.txt"
    left_out = [*dropped, *report["copies"]]
    write_file(listing, "".join(f"{entry['name']}: {entry['reason']}\n" for entry in left_out).encode())
    what = f"{len(dropped)} of {len(dropped) + num_kept} files had to be dropped ({count_reasons(dropped)})"
    if not num_kept:
        raise UserError(f"{what}: nothing is left; see {listing}")
    if report["dropped_percent"] > MAX_DROPPED_PERCENT and not allow_dropped:
        advice = f"run: {INSTALL}" if any(INSTALL in entry["reason"] for entry in dropped) else "repair them"
        raise UserError(f"{what}, over {MAX_DROPPED_PERCENT:g}%; see {listing}; {advice}, or pass --allow-dropped")
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
        taken = f"\t{recording.seconds}" if recording.seconds else ""
        digest.update(f"{recording.split}\t{recording.name}\t{size}{taken}\n".encode())
    return digest.hexdigest()
