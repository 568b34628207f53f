"""Export of a model: what a run knows, written as a folder to hand on; its layout is that of `runs/exported.py`.

Shape letters: N codes.
"""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from jaxtyping import Float, Integer

from ct_audio import __version__
from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json, sync_directory, write_file, write_json
from ct_audio.common.recipes import model_name
from ct_audio.data.audio_files import write_wav
from ct_audio.data.codecs import Codec, read_codes, write_codec_files
from ct_audio.data.corpus import open_corpus
from ct_audio.evaluation.over_time import score_codes
from ct_audio.evaluation.stored import stored_evaluations
from ct_audio.export.model_card import CardText, card, facts
from ct_audio.runs.checkpoint_files import digest, model_tensors
from ct_audio.runs.config import config_to_dict
from ct_audio.runs.exported import (
    CARD_FILE,
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    MODEL_FILE,
    SECTIONS,
    is_exported,
    read_exported,
)
from ct_audio.runs.open_run import LoadedRun, load_run_model, run_codec
from ct_audio.training.branch import branch_points

CLIP_SECONDS = 1.0
CLIP_BYTES = 1 << 16
CLIP_TOLERANCE_NATS = 1e-4
"""Nats per code between two machines; float32 sums in another order differ by about 1e-6."""
_CLIP_TEXT = """\
The memory of a model is what it keeps of what it has read. Old memories are not thrown away at once: they are
compressed, many into one, and kept a while longer. What is older than that is forgotten. How much of a text of 400
words (or of a recording of 20 s) that is depends on 3 numbers: window, memory and compressed memory.
"""
_REPORT_KEYS = ("split", "nll_nats", "nll_bits", "num_units", "seconds", "protocol")
_TEXT_KEYS = ("perplexity", "perplexity_a_word", "nll_bits_a_byte")


def export_model(
    path: Path,
    out: Path,
    *,
    which: str = "best",
    nll_files: Sequence[Path] = (),
    clip: Path | None = None,
    samples: Path | None = None,
    text: CardText,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write a model as a folder to hand on; the folder appears whole or not at all, readable by everybody.

    Args:
        path: a run, one of its checkpoints, or a folder that was exported before (with a new card).
        out: the folder; there must be nothing of that name, or an empty one.
        which: of a run, "best" or "last".
        nll_files: JSON of ct-audio evaluate, beside what the run has stored for these weights.
        clip: recording (its first second) or text whose NLL is kept as proof; None: one that is made here.
        samples: folder whose sample_*.wav (.txt) and .json are copied.
        text: what the card says that no run knows.
        say: is told what was found.
    Returns:
        `out`.
    Raises:
        UserError: there is something at `out`, a file does not fit the model, or the model is not finite.
        OSError: it cannot be written; nothing is left then.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out} exists; an exported model is never overwritten: choose another --out, or delete it")
    run = load_run_model(path, which=which)
    codec = run_codec(run)
    evaluations = _evaluations(run, nll_files)
    say(
        f"{run.checkpoint_path.name}: {len(evaluations)} evaluations"
        + ("" if evaluations else " of it are stored; ct-audio evaluate makes them")
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in model_tensors(run.model).items()}
        write_file(beside / MODEL_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
        write_codec_files(codec, beside)
        clip_file = _write_clip(codec, clip, beside)
        names = [MODEL_FILE, *codec.files(), clip_file]
        sounds = _copy_samples(samples, beside) if samples is not None else []
        plain = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "ct_audio_version": __version__,
            **_about(run, codec, evaluations),
            "clip": {"file": clip_file, **_score_clip(run, codec, beside / clip_file)},
            "files": {name: digest(beside / name) for name in names},
        }
        write_json(beside / CONFIG_FILE, plain)
        write_file(
            beside / CARD_FILE, card(run, codec, plain, text=text, folder=model_name(out), samples=sounds).encode()
        )
        stated, found = check_clip(beside)
        if stated != found:
            raise UserError(f"{path}: read back, the model says {found} nats about its clip, before {stated}; not kept")
        _make_readable(beside)
        sync_directory(beside)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    sync_directory(out.parent)
    return out


def check_clip(folder: Path) -> tuple[float, float]:
    """NLL of the clip of an exported folder in nats per code: as config.json states it, and as it is found now.

    Raises:
        UserError: the folder is not whole.
    """
    run = load_run_model(folder)
    clip = read_exported(folder).plain["clip"]
    return clip["nll_nats"], _score_clip(run, run_codec(run), folder / clip["file"])["nll_nats"]


def describe_model(path: Path) -> str:
    """What a model is, what it was trained on and what is known of its NLL, as Markdown.

    Args:
        path: a run, a checkpoint, or an exported folder.
    Raises:
        UserError: there is no such model, or it is damaged.
    """
    run = load_run_model(path)
    codec = run_codec(run)
    return facts(run, codec, _about(run, codec, _evaluations(run, ())))


def _about(run: LoadedRun, codec: Codec, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """What config.json says, but for its files; nothing in it is a place of this machine."""
    plain = config_to_dict(run.config)
    del plain["data"]["corpus"]
    about = {"codec": codec.to_json(), "training": _training(run, codec), "evaluations": evaluations}
    return {key: plain[key] for key in SECTIONS} | about


def _training(run: LoadedRun, codec: Codec) -> dict[str, Any]:
    """What the weights have seen: steps, codes, seconds of audio and of work, and the corpus, by its name."""
    if is_exported(run.checkpoint_path):
        return read_exported(run.checkpoint_path).plain["training"]
    data, train, state = run.config.data, run.config.train, run.state
    progress, rate = state.get("progress", {}), codec.sample_rate_hz
    num_codes = run.step * data.chunk_length * data.num_lanes if run.model.has_parameters else 0
    seconds, num_cores = progress.get("training_seconds"), train.num_threads * state["world_size"]
    is_best = run.run_dir is None or (run.run_dir / "checkpoints" / "best").resolve() == run.checkpoint_path
    training: dict[str, Any] = {
        "step": run.step,
        "num_codes": num_codes,
        "audio_seconds": num_codes / rate if rate else None,
        "training_seconds": seconds,
        "num_processes": state["world_size"],
        "core_seconds": seconds * num_cores if seconds and num_cores and train.device == "cpu" else None,
        "best_valid_nll_nats": progress.get("best_valid_nll_nats") if is_best else None,
        "corpus": Path(data.corpus).name,
        "corpus_fingerprint": state.get("corpus_fingerprint"),
        "recipe": None,
        "branches": branch_points(run.run_dir) if run.run_dir else [],
    }
    try:
        corpus = open_corpus(data.corpus)
    except UserError:  # it need not be here any more
        return training
    if corpus.fingerprint != training["corpus_fingerprint"]:
        return training
    splits = {
        name: {"seconds": split.num_codes / rate if rate else None, "num_codes": split.num_codes}
        | {"num_documents": len(split.document_offsets)}
        for name, split in corpus.splits.items()
    }
    return training | {"recipe": corpus.description.get("source", {}).get("recipe"), "splits": splits}


def _evaluations(run: LoadedRun, nll_files: Sequence[Path]) -> list[dict[str, Any]]:
    """What is known of the model's NLL: stored in the run or the folder, and of files of ct-audio evaluate."""
    reports = [] if run.run_dir is None else stored_evaluations(run.run_dir, run)
    if is_exported(run.checkpoint_path):
        reports += read_exported(run.checkpoint_path).plain["evaluations"]
    for file in nll_files:
        try:
            report = read_json(file)
        except (OSError, ValueError) as error:
            raise UserError(f"--nll-file: cannot read {file}: {error}") from error
        if not isinstance(report, dict) or not all(key in report for key in _REPORT_KEYS):
            raise UserError(f"--nll-file {file}: expected what ct-audio evaluate --json prints")
        own = {"model": run.config.model.name, "step": run.step, "name": run.config.name}
        other = [key for key, value in own.items() if report.get(key) != value]
        if other:
            key = other[0]
            raise UserError(f"--nll-file {file} is of another model: {key} {report.get(key)!r}, expected {own[key]!r}")
        reports.append(report)
    kept = []
    for report in reports:
        entry = {key: report[key] for key in _REPORT_KEYS}
        entry |= {key: report[key] for key in _TEXT_KEYS if report.get(key) is not None}
        if not isinstance(entry["nll_nats"], float) or not math.isfinite(entry["nll_nats"]):
            raise UserError(f"an evaluation of {entry['split']} has the NLL {entry['nll_nats']}; expected a number")
        if entry not in kept:
            kept.append(entry)
    return sorted(kept, key=lambda entry: (entry["split"], -entry["num_units"]))


def _write_clip(codec: Codec, source: Path | None, folder: Path) -> str:
    """Write the clip, and return its name."""
    if codec.sample_rate_hz:
        codes = codec.encode(_voice(codec.sample_rate_hz)) if source is None else read_codes(source, codec)
        codes = codes[: round(CLIP_SECONDS * codec.sample_rate_hz)]
        write_wav(folder / "clip.wav", codec.decode(codes), codec.sample_rate_hz)
        return "clip.wav"
    raw = _CLIP_TEXT.encode() if source is None else source.read_bytes()
    if len(raw) > CLIP_BYTES:
        raise UserError(f"--clip {source}: expected a text of at most {CLIP_BYTES} bytes, got {len(raw)}")
    write_file(folder / "clip.txt", raw)
    return "clip.txt"


def _voice(rate: int) -> Float[np.ndarray, " N"]:
    """A voiced sound whose pitch and loudness glide, with noise: what a model of waveforms is asked about."""
    time = np.arange(round(CLIP_SECONDS / 2 * rate)) / rate
    phase = 2 * np.pi * (110 * time + 60 * time**2)
    harmonics = [np.sin(k * phase) / k for k in range(1, 20) if k * 170 < rate / 2]
    noise = np.random.default_rng(0).normal(size=len(time))
    loudness = np.sin(np.pi * time / time[-1]) ** 2
    return (loudness * (0.1 * np.sum(harmonics, axis=0) + 0.003 * noise)).astype(np.float32)


def _score_clip(run: LoadedRun, codec: Codec, file: Path) -> dict[str, Any]:
    codes: Integer[np.ndarray, " N"] = read_codes(file, codec)
    evaluation = score_codes(run, codec, codes).evaluation
    return {"num_units": evaluation.num_units, "nll_nats": evaluation.nll_nats}


def _copy_samples(source: Path, folder: Path) -> list[str]:
    """Copy samples with their sidecars; returns the names of the sounds or texts, in their folder."""
    found = sorted(path for path in source.glob("sample_*") if path.suffix in (".wav", ".txt", ".json"))
    sounds = [path.name for path in found if path.suffix != ".json"]
    if not sounds:
        raise UserError(f"--samples {source}: expected sample_0.wav (or .txt), ..., as ct-audio sample writes them")
    (folder / "samples").mkdir()
    for path in found:
        write_file(folder / "samples" / path.name, path.read_bytes())
    return [f"samples/{name}" for name in sounds]


def _make_readable(folder: Path) -> None:
    """0644 for files and 0755 for folders, whatever the umask is; nothing where the file system has no modes."""
    for path in (folder, *folder.rglob("*")):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
