"""What a trained Compressive Transformer (or Transformer-XL) does with its memory, measured on a stretch of codes.

- attention by distance: its share in 18 buckets, 6 each for compressed memory, memory and window (paper, Figure 2);
- the loss of compression, layer by layer (Figure 6);
- NLL by available context: what memory and compressed memory are worth, as a function of how far back they reach.

Every table is a list of rows of plain values, ready for JSON and CSV. Standard errors are of the means of NUM_GROUPS
runs of consecutive windows (or blocks): neighbours on speech are alike, and an error that took them for independent
would be too small.

Shape letters: L layers, N windows or blocks, B lanes, H heads, T codes of a window, S keys of a window.
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from ct_audio.common.errors import UserError
from ct_audio.common.units import nats_to_bits
from ct_audio.data.corpus import Corpus
from ct_audio.evaluation.nll import Stretch, evaluate_nll, stretch_of
from ct_audio.evaluation.stored import BlockSums
from ct_audio.models.compressive.layer import CompressiveLayer
from ct_audio.models.compressive.memory import push
from ct_audio.models.compressive.reconstruction import reconstruct
from ct_audio.models.compressive.transformer import CompressiveTransformer
from ct_audio.models.compressive.windows import Geometry, LayerMemory, View
from ct_audio.runs.open_run import LoadedRun

PARTS = ("compressed_memory", "memory", "window")
NUM_BUCKETS = 6
"""Of each part."""
NUM_GROUPS = 30
NUM_POSITION_BUCKETS = 32

Rows = list[dict[str, Any]]


def analyse_run(
    run: LoadedRun, corpus: Corpus, *, split: str = "valid", num_codes: int, shares: tuple[float, ...]
) -> dict[str, Any]:
    """All analyses of a run's checkpoint on the beginning of a split.

    Args:
        num_codes: 0: all of the split.
        shares: at least 0, of the training lengths of memory and of compressed memory, tried beside 0 and 1.
    Returns:
        what was measured and how, plain values; its tables are "attention", "attention_by_part", "compression_loss",
        "context" and "position".
    Raises:
        UserError: it is no Compressive Transformer, or the stretch is too short to fill its memory.
    """
    if not isinstance(run.model, CompressiveTransformer):
        raise UserError(f"{run.config.name} is a {run.config.model.name}; expected a compressive_transformer")
    stretch = stretch_of(corpus, split, run.config.data, num_codes=num_codes or None)
    observations = observe_memory(run.model, stretch)
    return {
        "name": run.config.name,
        "checkpoint": run.checkpoint_path.name,
        "step": run.step,
        "split": split,
        "split_sha256": corpus.split(split).sha256,
        "num_codes": len(stretch.codes),
        "unit": corpus.codec.unit,
        "sample_rate_hz": corpus.codec.sample_rate_hz,
        "num_windows_with_full_memory": observations.attention.shape[1],
        "num_groups_of_standard_errors": NUM_GROUPS,
        "attention": attention_table(observations, run.model),
        "attention_by_part": part_table(observations),
        "compression_loss": compression_table(observations, run.model),
        **context_tables(run.model, stretch, shares),
    }


@dataclass(frozen=True)
class Observations:
    """What was seen in the windows whose memories are full in all layers.

    Attributes:
        attention: [L, N, 18] attention in each bucket, mean over heads and queries; oldest compressed memory first.
        loss: [L, N] attention-reconstruction loss of what each window's push compresses; NaN where nothing is kept.
        power: [L, N] mean square of what that loss wants to be reconstructed.
    """

    attention: Float64[np.ndarray, "L N 18"]
    loss: Float64[np.ndarray, "L N"]
    power: Float64[np.ndarray, "L N"]


def observe_memory(model: CompressiveTransformer, stretch: Stretch) -> Observations:
    """Run a stretch window by window and look into every layer.

    Raises:
        UserError: fewer than two windows have full memories in all layers.
    """
    layers = model.stack.layers
    observers = [_Observer() for _ in layers]
    with contextlib.ExitStack() as stack:
        for layer, observer in zip(layers, observers, strict=True):
            handle = layer.register_forward_hook(observer, with_kwargs=True)
            stack.callback(handle.remove)
        by_window = dataclasses.replace(stretch, chunk_length=model.window_length)
        evaluate_nll(model, by_window, progress="attention")
    full = np.array([observer.full for observer in observers], dtype=bool).all(axis=0)
    if full.sum() < 2:
        needed = max(
            model.config.memory_length + rate * model.config.compressed_memory_length
            for rate in model.config.compression_rates
        )
        raise UserError(
            f"expected two windows or more with full memories, got {full.sum()} in {len(stretch.codes)} codes; memory "
            f"is full after {needed} codes of one document"
        )
    attention = np.stack([np.stack(observer.attention) for observer in observers])
    losses = np.array([observer.losses for observer in observers])
    return Observations(attention[:, full], losses[:, full, 0], losses[:, full, 1])


class _Observer:
    """A forward hook of a layer that runs one window of one lane at a time."""

    def __init__(self) -> None:
        self.full: list[bool] = []
        self.attention: list[Float64[np.ndarray, "18"]] = []
        self.losses: list[tuple[float, float]] = []

    def __call__(self, module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], _: Any) -> None:
        if not options["with_push"]:  # a shorter last window
            return
        layer, (rows, memory, view) = cast(CompressiveLayer, module), arguments
        weights = layer.attention(rows, memory, view)
        self.full.append(bool((view.mask[..., -1, :] == 0).all()))  # the last query sees all rows that there are
        by_row = reduce(weights.double(), "1 h t s -> s", "mean").cpu().numpy()
        self.attention.append(np.bincount(bucket_of_rows(view.geometry), by_row, minlength=len(PARTS) * NUM_BUCKETS))
        self.losses.append(reconstruction_loss(layer, rows, memory, view, weights))


def bucket_of_rows(geometry: Geometry) -> Int64[np.ndarray, " S"]:
    """The bucket of each key of a window, 0 to 17: each part is cut into 6 of equal length, the oldest rows first."""
    lengths = (geometry.compressed_memory_length, geometry.memory_length, geometry.window_length)
    parts = [part * NUM_BUCKETS + np.arange(n) * NUM_BUCKETS // max(n, 1) for part, n in enumerate(lengths)]
    return np.concatenate(parts).astype(np.int64)


def reconstruction_loss(
    layer: CompressiveLayer,
    rows: Float[Tensor, "B T D"],
    memory: LayerMemory,
    view: View,
    weights: Float[Tensor, "B H T S"],
) -> tuple[float, float]:
    """Attention-reconstruction loss of what leaves the memory of a window, all rows valid; whatever f_c was trained by.

    Args:
        weights: attention of this window, by which most_used chooses.
    Returns:
        the loss, and the mean square of what it is to reconstruct; NaN where the layer keeps nothing.
    Source: Algorithm 2; mean squared error as in `CompressiveLayer`.
    """
    old_memory, _ = push(memory.memory, rows)
    compressed_length = view.geometry.compressed_memory_length
    usage = reduce(weights, "b h t s -> b s", "sum")[:, compressed_length:] / weights.shape[1]
    new_compressed, _ = layer.compress(old_memory, usage, view)
    if new_compressed is None or compressed_length == 0:
        return float("nan"), float("nan")
    old, new = (layer.key_value(layer.read(rows)) for rows in (old_memory, new_compressed))
    found, wanted = reconstruct(layer.query(layer.read(rows)), old, new, num_heads=layer.config.num_heads)
    return float((found - wanted).double().square().mean()), float(wanted.double().square().mean())


def mean_and_error(
    sums: Float64[np.ndarray, " N *rest"], counts: Int64[np.ndarray, " N"] | None = None
) -> tuple[Float64[np.ndarray, "*rest"], Float64[np.ndarray, "*rest"]]:
    """Mean and its standard error, by the means of at most NUM_GROUPS runs of consecutive values.

    Args:
        sums: two values or more, in the order of time.
        counts: of what each is the sum; None: one each.
    """
    counts = np.ones(len(sums), dtype=np.int64) if counts is None else counts
    starts = np.array([part[0] for part in np.array_split(np.arange(len(sums)), min(NUM_GROUPS, len(sums)))])
    group_counts = np.add.reduceat(counts, starts).reshape(-1, *[1] * (sums.ndim - 1))
    means = np.add.reduceat(sums, starts, axis=0) / group_counts
    error = means.std(axis=0, ddof=1) / len(means) ** 0.5
    return np.asarray(sums.sum(axis=0) / counts.sum()), np.asarray(error)


def attention_table(observations: Observations, model: CompressiveTransformer) -> Rows:
    """A row for each bucket, in total (layer None, the mean of all layers) and for each layer.

    "first_code" and "last_code" say which codes a bucket's rows stand for, relative to the window's first code; None in
    total and where a bucket has no rows.
    """
    table: Rows = []
    for layer, attention in [(None, observations.attention.mean(axis=0)), *enumerate(observations.attention)]:
        means, errors = mean_and_error(attention)
        extents = [(None, None)] * len(means) if layer is None else bucket_extents(_geometry(model, layer))
        for bucket, (first, last) in enumerate(extents):
            row = {"layer": layer, "part": PARTS[bucket // NUM_BUCKETS], "bucket": bucket}
            row |= {"first_code": first, "last_code": last}
            table.append(row | {"attention": float(means[bucket]), "standard_error": float(errors[bucket])})
    return table


def part_table(observations: Observations) -> Rows:
    """Attention to each whole part, in total (layer None) and for each layer."""
    parts = reduce(observations.attention, "l n (p k) -> l n p", "sum", k=NUM_BUCKETS)
    table: Rows = []
    for layer, attention in [(None, parts.mean(axis=0)), *enumerate(parts)]:
        for part, mean, error in zip(PARTS, *mean_and_error(attention), strict=True):
            table.append({"layer": layer, "part": part, "attention": float(mean), "standard_error": float(error)})
    return table


def bucket_extents(geometry: Geometry) -> list[tuple[int | None, int | None]]:
    """First and last code of each bucket, 0 being the window's first code."""
    rate, memory_length = geometry.compression_rate, geometry.memory_length
    compressed = np.arange(-geometry.compressed_memory_length, 0) * rate - memory_length
    rows = np.arange(-memory_length, geometry.window_length)
    first, last = np.concatenate([compressed, rows]), np.concatenate([compressed + rate - 1, rows])
    buckets, extents = bucket_of_rows(geometry), []
    for bucket in range(len(PARTS) * NUM_BUCKETS):
        inside = buckets == bucket
        extents.append((int(first[inside].min()), int(last[inside].max())) if inside.any() else (None, None))
    return extents


def compression_table(observations: Observations, model: CompressiveTransformer) -> Rows:
    """A row for each layer that compresses: attention-reconstruction loss, and as a share of what is reconstructed."""
    table: Rows = []
    for layer, (loss, power) in enumerate(zip(observations.loss, observations.power, strict=True)):
        if not np.isnan(loss).any():
            mean, error = mean_and_error(loss)
            row = {"layer": layer, "compression_rate": model.config.compression_rates[layer]}
            row |= {"loss": float(mean), "standard_error": float(error)}
            table.append(row | {"relative_loss": float(loss.sum() / power.sum())})
    return table


class _NLLSums(BlockSums):
    """NLL summed by blocks of codes and by position in the window: an `on_nll` of `evaluate_nll`."""

    def __init__(self, num_codes: int, window_length: int) -> None:
        super().__init__(num_codes)
        self._by_position: Float64[np.ndarray, " T"] = np.zeros(window_length)

    def __call__(self, positions: Int[Tensor, " B"], nll: Float[Tensor, "B T"]) -> None:
        super().__call__(positions, nll)
        length = len(self._by_position)
        places = (positions.numpy()[:, None] + np.arange(nll.shape[1])) % length
        self._by_position += np.bincount(places.ravel(), nll.double().cpu().numpy().ravel(), minlength=length)

    def position_means(self, num_codes: int) -> list[tuple[int, int, float]]:
        """First and last position of each of up to 32 stretches of the window, and the mean NLL there."""
        length = len(self._by_position)
        counts = np.bincount(np.arange(num_codes) % length, minlength=length)
        num_buckets = min(NUM_POSITION_BUCKETS, length)
        firsts = np.arange(num_buckets) * length // num_buckets
        means = np.add.reduceat(self._by_position, firsts) / np.add.reduceat(counts, firsts)
        lasts = [*(firsts[1:] - 1), length - 1]
        return [(int(first), int(last), float(mean)) for first, last, mean in zip(firsts, lasts, means, strict=True)]


def context_tables(model: CompressiveTransformer, stretch: Stretch, shares: tuple[float, ...]) -> dict[str, Rows]:
    """NLL of the same codes with less (or more) memory than the model was trained with.

    First the memory grows without a compressed memory, then, with the memory of training, the compressed memory. The
    model is not trained again: one that had never had a memory may do better without than this one.

    Returns:
        "context", a row for each choice of lengths: NLL, the gain over no memory at all and, with compressed memory,
        the gain over the same memory alone, with paired standard errors; and "position", NLL by position in the window,
        as means over up to 32 stretches of it.
    """
    table, positions, blocks_of = [], [], {}
    num_codes, length = len(stretch.codes), model.window_length
    for lengths in context_lengths(model, shares):
        sums = _NLLSums(num_codes, length)
        label = f"memory {lengths['memory_length']} + {lengths['compressed_memory_length']}"
        nll_nats = evaluate_nll(model, dataclasses.replace(stretch, **lengths), on_nll=sums, progress=label).nll_nats
        counts = np.array(sums.to_json()["counts"], dtype=np.int64)
        blocks = blocks_of[tuple(lengths.values())] = sums.nll_sums_nats
        gain, error = _gain(blocks_of[0, 0], blocks, counts)
        more, more_error = None, None
        if lengths["compressed_memory_length"]:
            more, more_error = _gain(blocks_of[lengths["memory_length"], 0], blocks, counts)
        temporal_range = dataclasses.replace(model.config, **lengths).paper_temporal_range
        row = lengths | {"temporal_range_codes": temporal_range}
        row |= {"nll_nats": nll_nats, "nll_bits": nats_to_bits(nll_nats)}
        row |= {"gain_nats": gain, "gain_standard_error": error}
        table.append(row | {"gain_over_memory_nats": more, "gain_over_memory_standard_error": more_error})
        for first, last, nll in sums.position_means(num_codes):
            positions.append({**lengths, "first_code": first, "last_code": last, "nll_nats": nll})
    return {"context": table, "position": positions}


def _gain(
    shorter: Float64[np.ndarray, " N"], longer: Float64[np.ndarray, " N"], counts: Int64[np.ndarray, " N"]
) -> tuple[float, float | None]:
    """Nats a code by which the longer context is better, from sums over the same blocks, and its standard error (None
    for a single block)."""
    if len(counts) < 2:
        return float((shorter - longer).sum() / counts.sum()), None
    gain, error = mean_and_error(shorter - longer, counts)
    return float(gain), float(error)


def context_lengths(model: CompressiveTransformer, shares: tuple[float, ...]) -> list[dict[str, int]]:
    """Lengths of both memories to be tried, the shortest first; the memory of training without compressed memory is
    always among them."""
    config, shares = model.config, tuple(sorted({*shares, 0.0, 1.0}))
    pairs = [(round(share * config.memory_length), 0) for share in shares]
    if config.compressed_memory_length:
        pairs += [(config.memory_length, round(share * config.compressed_memory_length)) for share in shares]
    return [{"memory_length": m, "compressed_memory_length": k} for m, k in dict.fromkeys(pairs)]


def _geometry(model: CompressiveTransformer, index: int) -> Geometry:
    config, layer = model.config, cast(CompressiveLayer, model.stack.layers[index])
    keeps = config.keeps_memory(index)
    memory_length, compressed_length = config.memory_length * keeps, config.compressed_memory_length * keeps
    return Geometry(config.window_length, memory_length, compressed_length, layer.compression_rate)
