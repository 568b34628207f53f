"""A run's evaluations: score a split with a run's checkpoint, keep the result in the run, find it again.

    runs/<name>/evaluations/valid-step_00002000.json    the report, its protocol, and the NLL of every block of codes

The name holds the split, the step of the checkpoint and whatever setting is not the default. A result is used again
only for the same weights, configuration and codes, and as many of them.

Shape letters: B lanes, T codes of a piece, K blocks.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.common.files import number_in_name, read_json, write_json
from ct_audio.common.units import perplexity
from ct_audio.data.corpus import Corpus, Split
from ct_audio.evaluation.dynamic import DynamicSettings, learning_copy
from ct_audio.evaluation.nll import Evaluation, evaluate_nll, stretch_of
from ct_audio.runs.open_run import LoadedRun, run_corpus

FORMAT = "ct_audio evaluation"
FORMAT_VERSION = 1
BLOCK_LENGTH = 2400
"""Codes of a block whose NLL is kept: 0.1 s at 24 kHz."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What may be chosen when a run is scored; the defaults are the protocol of every table.

    Attributes:
        split: of the corpus.
        memory_length, compressed_memory_length: in place of the configuration's.
        num_lanes: parts of the split that run side by side.
        warmup_seconds: audio before a later lane's part that is run, unscored; None: all that its memory can hold.
        max_seconds: score only the beginning of the split.
        max_codes: the same in codes, for text too.
        dynamic: let a copy of the model learn from each chunk after it has been scored.
        precision: "bfloat16" runs the forward pass under autocast, as in training; None: in the type of the weights.
    """

    split: str = "valid"
    memory_length: int | None = None
    compressed_memory_length: int | None = None
    num_lanes: int = 1
    warmup_seconds: float | None = None
    max_seconds: float | None = None
    max_codes: int | None = None
    dynamic: DynamicSettings | None = None
    precision: Literal["bfloat16"] | None = None

    def num_codes(self, split: Split) -> int:
        """Codes to score.

        Raises:
            UserError: a limit does not fit the split.
        """
        return min([split.num_codes, *self.limits(split.sample_rate_hz)])

    def limits(self, sample_rate_hz: int | None) -> list[int]:
        """The most codes to score, by each limit that is set.

        Raises:
            UserError: a limit is below one code, or in seconds and of text (None).
        """
        if self.max_codes is not None and self.max_codes < 1:
            raise UserError(f"--max-codes: expected at least 1, got {self.max_codes}")
        limits = (_seconds_to_codes("--max-seconds", self.max_seconds, sample_rate_hz), self.max_codes)
        return [limit for limit in limits if limit is not None]


class BlockSums:
    """NLL summed over consecutive blocks of `BLOCK_LENGTH` codes: an `on_nll` of `evaluate_nll`.

    Attributes:
        nll_sums_nats: [K] sum of each block, the last one of what is left.
    """

    def __init__(self, num_codes: int) -> None:
        self._num_codes = num_codes
        self.nll_sums_nats: Float64[np.ndarray, " K"] = np.zeros(math.ceil(num_codes / BLOCK_LENGTH))

    def __call__(self, positions: Int[Tensor, " B"], nll: Float[Tensor, "B T"]) -> None:
        places = positions.numpy()[:, None] + np.arange(nll.shape[1])
        values = nll.double().cpu().numpy()
        num_blocks = len(self.nll_sums_nats)
        self.nll_sums_nats += np.bincount((places // BLOCK_LENGTH).ravel(), values.ravel(), minlength=num_blocks)

    def to_json(self) -> dict[str, Any]:
        """Length of a block, and the sum and the number of codes of each."""
        num_whole = len(self.nll_sums_nats) - 1
        counts = [BLOCK_LENGTH] * num_whole + [self._num_codes - BLOCK_LENGTH * num_whole]
        return {"length": BLOCK_LENGTH, "nll_sums_nats": self.nll_sums_nats.tolist(), "counts": counts}


def evaluate_run(
    run: LoadedRun,
    corpus: Corpus,
    settings: EvaluationSettings,
    *,
    on_nll: Sequence[Callable[[Int[Tensor, " B"], Float[Tensor, "B T"]], None]] = (),
    progress: str | None = "evaluate",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score a split with a run's checkpoint.

    Args:
        corpus: as `run_corpus` opens it.
        on_nll: called with the NLL of each piece, as `evaluate_nll` does.
        progress: label of the progress bar; None: no bar.
    Returns:
        the report that `ct-audio evaluate --json` prints, and the NLL by blocks (see `BlockSums.to_json`).
    Raises:
        UserError: a setting does not fit, or the NLL is not finite.
    """
    split, codec, dynamic = corpus.split(settings.split), corpus.codec, settings.dynamic
    rate, num_codes = codec.sample_rate_hz, settings.num_codes(split)
    model, update = learning_copy(run.model, dynamic) if dynamic is not None else (run.model, None)
    changes = {"chunk_length": dynamic.chunk_length} if dynamic and dynamic.chunk_length is not None else {}
    stretch = stretch_of(
        corpus,
        settings.split,
        run.config.data,
        num_codes=num_codes,
        num_lanes=settings.num_lanes,
        warmup_length=_warmup_length(run, settings, rate) if settings.num_lanes > 1 else 0,
        memory_length=settings.memory_length,
        compressed_memory_length=settings.compressed_memory_length,
        **changes,
    )
    blocks = BlockSums(num_codes)

    def collect(positions: Int[Tensor, " B"], nll: Float[Tensor, "B T"]) -> None:
        for collector in (blocks, *on_nll):
            collector(positions, nll)

    if settings.precision and run.config.train.precision == "float64":
        raise UserError(f"--precision {settings.precision}: the weights are float64, which autocast leaves alone")
    autocast = torch.autocast(model.device.type, torch.bfloat16) if settings.precision else contextlib.nullcontext()
    with autocast:
        evaluation = evaluate_nll(model, stretch, on_nll=collect, update=update, progress=progress)
    if not math.isfinite(evaluation.nll_nats):
        advice = "use another checkpoint" if dynamic is None else "lower the learning rate of dynamic evaluation"
        raise UserError(f"the NLL is {evaluation.nll_nats}: the model has diverged; {advice}")
    seconds = evaluation.num_units / rate if rate else None
    where = {"split": settings.split, "seconds": seconds, "unit": codec.unit}
    which = {"split_sha256": split.sha256, "corpus_fingerprint": corpus.fingerprint}
    if dynamic is not None:
        where["dynamic"] = dataclasses.asdict(dynamic)
    report = {
        "split": settings.split,
        "nll_nats": evaluation.nll_nats,
        "nll_bits": evaluation.nll_bits,
        "num_units": evaluation.num_units,
        "seconds": seconds,
        "protocol": evaluation.protocol | where | which,
        "name": run.config.name,
        "model": run.config.model.name,
        "num_parameters": sum(p.numel() for _, p in run.model.named_parameters()),
        "num_parameters_compression": sum(p.numel() for p in run.model.gradient_groups().get("compression", [])),
        "checkpoint": run.checkpoint_path.name,
        "step": run.step,
        "wall_seconds": evaluation.wall_seconds,
        "units_per_second": evaluation.units_per_second,
    }
    return report | _text_measures(evaluation, split, codec.unit), blocks.to_json()


def _text_measures(evaluation: Evaluation, split: Split, unit: str) -> dict[str, Any]:
    """Perplexity of words; of other text that was scored as a whole also what it is a word and a byte, by exact counts.

    Words have no bits per byte: the bytes of what has become `<unk>` are in the text, but not in the NLL.
    """
    measures: dict[str, Any] = {"perplexity": perplexity(evaluation.nll_nats)} if unit == "word" else {}
    if evaluation.num_units == split.num_codes and unit != "word" and split.num_words:
        total = evaluation.nll_nats * evaluation.num_units
        measures |= {"num_words": split.num_words, "perplexity_a_word": perplexity(total / split.num_words)}
    if evaluation.num_units == split.num_codes and unit not in ("byte", "word") and split.num_bytes:
        total = evaluation.nll_bits * evaluation.num_units
        measures |= {"num_bytes": split.num_bytes, "nll_bits_a_byte": total / split.num_bytes}
    return measures


def store_evaluation(
    run_dir: Path, run: LoadedRun, settings: EvaluationSettings, report: dict[str, Any], blocks: dict[str, Any]
) -> Path:
    """Keep a result of `evaluate_run` in the run, in place of an earlier one of the same step and settings.

    Args:
        run_dir: the run's directory; of a model without one any directory, made if it is missing.
    Returns:
        the file.
    Raises:
        OSError: it cannot be written; nothing half-written is left.
    """
    other = report["protocol"]["corpus_fingerprint"] != run.state.get("corpus_fingerprint")
    path = _path(run_dir, run, settings, corpus=report["protocol"]["corpus_fingerprint"] if other else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_json(
            path, {"format": FORMAT, "format_version": FORMAT_VERSION} | report | _origin(run) | {"blocks": blocks}
        )
    except OSError:
        path.with_name(path.name + ".tmp").unlink(missing_ok=True)
        raise
    return path


def find_evaluation(
    run_dir: Path, run: LoadedRun, settings: EvaluationSettings, corpus: Corpus | None = None
) -> dict[str, Any] | None:
    """What `store_evaluation` kept for this checkpoint on the corpus that it was trained on; None where nothing fits.

    What cannot be read, is not whole, or is of another number of codes, counts as not there: it can be measured again.

    Args:
        run_dir: as for `store_evaluation`.
        corpus: the one that the run was trained on; None: it is opened, if it is still there.
    Raises:
        UserError: a limit of the settings does not fit.
    """
    try:
        found = json.loads(_path(run_dir, run, settings).read_text(encoding="utf-8"))
        sums, counts = found["blocks"]["nll_sums_nats"], found["blocks"]["counts"]
        fits = (
            (found["format"], found["format_version"]) == (FORMAT, FORMAT_VERSION)
            and all(found[key] == value for key, value in _origin(run).items())
            and found["protocol"]["corpus_fingerprint"] == run.state.get("corpus_fingerprint")
            and len(sums) == len(counts)
            and sum(counts) == found["num_units"]
            and math.isclose(math.fsum(sums), found["nll_nats"] * found["num_units"], rel_tol=1e-6)
            and _is_as_long(found, run, settings, corpus)
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if fits else None


def stored_evaluations(run_dir: Path, run: LoadedRun) -> list[dict[str, Any]]:
    """All reports that the run has kept of these weights and this configuration, without the blocks, by file name."""
    reports = []
    for path in sorted((run_dir / "evaluations").glob("*-step_*.json")):
        try:
            found = read_json(path)
        except (OSError, ValueError):
            continue
        is_one = isinstance(found, dict) and (found.get("format"), found.get("format_version")) == (
            FORMAT,
            FORMAT_VERSION,
        )
        if is_one and all(found.get(key) == value for key, value in _origin(run).items()):
            reports.append({key: value for key, value in found.items() if key != "blocks"})
    return reports


def _is_as_long(found: dict[str, Any], run: LoadedRun, settings: EvaluationSettings, corpus: Corpus | None) -> bool:
    """Whether a stored result is of as many codes as the settings ask for."""
    try:
        split = (corpus or run_corpus(run)).split(settings.split)
    except UserError:  # it is gone, so that nothing can be measured again: only too many codes can be told
        rate = round(found["num_units"] / found["seconds"]) if found["seconds"] else None
        return all(found["num_units"] <= limit for limit in settings.limits(rate))
    return found["num_units"] == settings.num_codes(split)


def _origin(run: LoadedRun) -> dict[str, Any]:
    """What a result is of: with these and the codes equal, the result is."""
    return {
        "weights_sha256": run.state["files"]["model.safetensors"]["sha256"],
        "config_sha256": hashlib.sha256(run.config_path.read_bytes()).hexdigest(),
    }


def _path(run_dir: Path, run: LoadedRun, settings: EvaluationSettings, *, corpus: str | None = None) -> Path:
    parts = [settings.split, f"step_{run.step:08d}"]
    for field in dataclasses.fields(settings)[1:]:
        value = getattr(settings, field.name)
        if value not in (field.default, getattr(run.model.config, field.name, field.default)):
            text = number_in_name(value) if isinstance(value, int | float) else str(value)
            parts.append(f"{field.name}_{text}")
    return run_dir / "evaluations" / ("-".join(parts + ([f"corpus_{corpus[:12]}"] if corpus else [])) + ".json")


def _warmup_length(run: LoadedRun, settings: EvaluationSettings, sample_rate_hz: int | None) -> int:
    """Codes of warm-up in whole chunks: as asked for, else as far as the model can look back."""
    chunk_length = run.config.data.chunk_length
    wanted = _seconds_to_codes("--warmup-seconds", settings.warmup_seconds, sample_rate_hz, at_least=0)
    if wanted is None:
        wanted = changed_config(run, settings).temporal_range + run.model.window_length
    return math.ceil(wanted / chunk_length) * chunk_length


def changed_config(run: LoadedRun, settings: EvaluationSettings) -> Any:
    """The model's configuration with the memory lengths of the settings."""
    names = ("memory_length", "compressed_memory_length")
    changes = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    config = run.model.config
    return dataclasses.replace(config, **changes) if all(hasattr(config, name) for name in changes) else config


def _seconds_to_codes(option: str, seconds: float | None, rate: int | None, *, at_least: int = 1) -> int | None:
    if seconds is None:
        return None
    if rate is None:
        raise UserError(f"{option}: the corpus is text and has no seconds; leave it out")
    if not math.isfinite(seconds) or round(seconds * rate) < at_least:
        raise UserError(f"{option}: expected seconds of at least {at_least} samples, got {seconds}")
    return round(seconds * rate)
