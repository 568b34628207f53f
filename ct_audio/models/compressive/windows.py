"""Which rows the windows of a chunk may see: a chunk is parallel over its windows, so each needs its own view.

Shape letters: B lanes, W windows of a chunk, T codes of a chunk (W x window length), M memory rows, K compressed rows,
S keys of a window (K + M + window length), D width.

Every row carries the number of its document: 0 for the one that was running when the chunk began, counting up at every
document start, -1 for a row that nobody may see. A query sees a key if the numbers are equal and the key is not later.
A compressed row whose codes straddle a document start belongs to nobody, or to the later document alone, whose codes it
then stands for (`straddling_groups`).
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ct_audio.models.compressive.attention import Distances, additive_mask
from ct_audio.models.compressive.memory import LayerMemory


class Geometry(NamedTuple):
    """Lengths that decide what the windows of a layer see.

    Attributes:
        window_length: codes a window (of this call: the last window of a stream may be shorter).
        memory_length, compressed_memory_length: rows.
        compression_rate: codes a compressed row (1 where there is no compressed memory).
        temporal: whether a compressed row's position is the mean of its codes' positions, in place of its index.
        keeps_straddling: whether a group in which a document starts is compressed without the rows before the start.
    """

    window_length: int
    memory_length: int
    compressed_memory_length: int
    compression_rate: int
    temporal: bool = False
    keeps_straddling: bool = False

    @property
    def num_keys(self) -> int:
        """Rows a window's queries may see: compressed memory, memory, own window."""
        return self.compressed_memory_length + self.memory_length + self.window_length


class Documents(NamedTuple):
    """Document numbers of the rows of a chunk, for one geometry.

    Attributes:
        stream: [B, M + T], of memory and chunk.
        compressed_stream: [B, K + T / c], of the compressed memory and of what the chunk's pushes add to it.
        before: [B, W], of the document that runs when each window begins.
    """

    stream: Int[Tensor, "B MT"]
    compressed_stream: Int[Tensor, "B KT"]
    before: Int[Tensor, "B W"]


class View(NamedTuple):
    """What all layers of one geometry share in one forward pass.

    Attributes:
        mask: additive, [T, S] for all windows, or [B W, 1, T, S] where some row is not valid or a document starts.
        documents: None where all rows are valid.
        codes_until_full: of the layer's memory after the chunk.
        query_positions, key_positions: [T] and [S], in codes, relative to the window's first code.
    """

    geometry: Geometry
    mask: Tensor
    documents: Documents | None
    codes_until_full: int
    query_positions: Tensor
    key_positions: Tensor


def document_numbers(
    geometry: Geometry,
    document_starts: Bool[Tensor, "B T"] | None,
    *,
    num_codes: int,
    memory_valid: Int[Tensor, " B"],
    compressed_memory_valid: Int[Tensor, " B"],
) -> Documents:
    """Number the documents of memory, chunk and compressed memory."""
    lanes, device = memory_valid.shape[0], memory_valid.device
    if document_starts is None:
        chunk = torch.zeros(lanes, num_codes, dtype=torch.int64, device=device)
    else:
        chunk = document_starts.long().cumsum(dim=1)
    stream = torch.cat([_valid_tail(memory_valid, geometry.memory_length), chunk], dim=1)
    compressed = _valid_tail(compressed_memory_valid, geometry.compressed_memory_length)
    if geometry.compressed_memory_length and num_codes % geometry.compression_rate == 0:
        groups = rearrange(stream[:, :num_codes], "b (k c) -> b k c", c=geometry.compression_rate)
        kept = (groups == groups[..., :1]).all(dim=-1) | geometry.keeps_straddling
        compressed = torch.cat([compressed, torch.where(kept, groups[..., -1], -1)], dim=1)
    last = chunk[:, geometry.window_length - 1 :: geometry.window_length]
    before = torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], dim=1)
    return Documents(stream, compressed, before)


def old_rows_valid(view: View, num_rows: int) -> tuple[Bool[Tensor, "BW R"], Bool[Tensor, "BW C"]] | None:
    """Of the rows that leave with each window's push and of their compressed rows: are they of the document that runs
    when the window begins (or of a later one)? What belongs to earlier documents was forgotten before that push.

    Args:
        num_rows: that leave in all, as many as the chunk has.
    Returns:
        None where all are valid.
    """
    documents = view.documents
    if documents is None:
        return None
    num_windows = documents.before.shape[1]
    before = rearrange(documents.before, "b w -> (b w) 1")
    old = rearrange(documents.stream[:, :num_rows], "b (w r) -> (b w) r", w=num_windows)
    valid = old >= before
    if view.geometry.keeps_straddling:
        valid &= rearrange(
            compressed_with_its_group(view.geometry, documents, num_rows), "b (w r) -> (b w) r", r=old.shape[1]
        )
    compressed = documents.compressed_stream[:, view.geometry.compressed_memory_length :]
    return valid, rearrange(compressed, "b (w r) -> (b w) r", w=num_windows) >= before


def compressed_with_its_group(geometry: Geometry, documents: Documents, num_rows: int) -> Bool[Tensor, "B R"]:
    """Of the rows that leave: are they of the document of the last row of their group of c?"""
    groups = rearrange(documents.stream[:, :num_rows], "b (k c) -> b k c", c=geometry.compression_rate)
    return rearrange(groups == groups[..., -1:], "b k c -> b (k c)")


def rows_to_compress(old_memory: Float[Tensor, "B R D"], view: View) -> Float[Tensor, "B R D"]:
    """The rows that leave as f_c sees them: as zeros where a document starts after them in their group and such groups
    are kept."""
    if view.documents is None or not view.geometry.keeps_straddling:
        return old_memory
    kept = compressed_with_its_group(view.geometry, view.documents, old_memory.shape[1])
    return old_memory.masked_fill(~kept[..., None], 0)


def window_mask(geometry: Geometry, documents: Documents) -> Bool[Tensor, "BW T S"]:
    """What each query of each window sees, keys ordered compressed memory, memory, own window (lanes outermost)."""
    num_windows = documents.before.shape[1]
    queries = rearrange(documents.stream[:, geometry.memory_length :], "b (w t) -> (b w) t 1", w=num_windows)
    earlier = windows_of_memory(geometry, documents.compressed_stream, documents.stream, num_windows)
    keys = torch.cat([*earlier, queries[..., 0]], dim=1)
    return (queries == keys[:, None, :]) & causal_mask(geometry, queries.device)


def causal_mask(geometry: Geometry, device: torch.device) -> Bool[Tensor, "T S"]:
    """What each query of a window sees when all rows are valid: both memories and what is not later in the window."""
    visible = torch.ones(geometry.window_length, geometry.num_keys, dtype=torch.bool, device=device)
    return visible.tril(geometry.num_keys - geometry.window_length)


def windows_of_memory(
    geometry: Geometry, compressed_stream: Tensor, stream: Tensor, num_windows: int
) -> tuple[Tensor, Tensor]:
    """The rows of compressed memory and of memory that each window sees.

    Args:
        compressed_stream: [B, at least K + (W - 1) x window length / c, ...].
        stream: [B, at least M + (W - 1) x window length, ...].
    Returns:
        [B W, K, ...] and [B W, M, ...].
    """

    def unfold(rows: Tensor, length: int, step: int) -> Tensor:
        if length == 0:
            return rows.new_empty(rows.shape[0] * num_windows, 0, *rows.shape[2:])
        windows = rows[:, : length + (num_windows - 1) * step].unfold(1, length, step)  # B W ... length
        return windows.movedim(-1, 2).flatten(0, 1)

    step = geometry.window_length
    return (
        unfold(compressed_stream, geometry.compressed_memory_length, step // geometry.compression_rate or 1),
        unfold(stream, geometry.memory_length, step),
    )


def keep_valid(
    rows: Float[Tensor, "B M D"], documents: Int[Tensor, "B M"], current: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "B M D"], Int[Tensor, " B"]]:
    """Zero the rows that are not of the current document; also the count of those that are."""
    valid = documents == current[:, None]
    return torch.where(valid[..., None], rows, torch.zeros((), dtype=rows.dtype, device=rows.device)), valid.sum(dim=1)


def geometry_of(
    memory: LayerMemory, *, window_length: int, compression_rate: int, temporal: bool, keeps_straddling: bool
) -> Geometry:
    """The geometry of a layer with this memory."""
    rows, compressed = memory.memory.shape[1], memory.compressed_memory.shape[1]
    return Geometry(window_length, rows, compressed, compression_rate, temporal, keeps_straddling)


def make_view(geometry: Geometry, memory: LayerMemory, num_codes: int, document_starts: Tensor | None) -> View:
    """What the windows of a chunk of `num_codes` may see, and where their rows stand; it never waits for the device."""
    rows, documents = memory.memory, None
    until_full = max(0, memory.codes_until_full - num_codes)
    if document_starts is not None:  # the device alone knows where: perhaps at the end of the chunk
        until_full = geometry.memory_length + geometry.compressed_memory_length * geometry.compression_rate
    if document_starts is None and memory.codes_until_full == 0:
        visible = causal_mask(geometry, rows.device)
    else:
        documents = document_numbers(
            geometry,
            document_starts,
            num_codes=num_codes,
            memory_valid=memory.memory_valid,
            compressed_memory_valid=memory.compressed_memory_valid,
        )
        visible = window_mask(geometry, documents)[:, None]
    query_positions = torch.arange(geometry.window_length, dtype=rows.dtype, device=rows.device)
    device_type = rows.device.type  # in the type of attention at once, or each layer would keep a copy for its gradient
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else rows.dtype
    positions = (query_positions, key_positions(geometry, rows))
    return View(geometry, additive_mask(visible, dtype), documents, until_full, *positions)


def key_positions(geometry: Geometry, like: Tensor) -> Float[Tensor, " S"]:
    """Positions relative to the window's first code; a compressed row carries its index, as in the paper, or the mean
    position of the codes that it stands for."""
    first = geometry.window_length - geometry.num_keys
    positions = torch.arange(first, geometry.window_length, dtype=like.dtype, device=like.device)
    if not geometry.temporal:
        return positions
    rate, compressed = geometry.compression_rate, geometry.compressed_memory_length
    groups = torch.arange(-compressed, 0, dtype=like.dtype, device=like.device)
    mean_positions = groups * rate - geometry.memory_length + (rate - 1) / 2
    return torch.cat([mean_positions, positions[compressed:]])


def distances_of(geometry: Geometry, like: Tensor) -> Distances:
    """Distances from the queries of a window to its keys, without looking at numbers on the device."""
    rate, compressed, length = geometry.compression_rate, geometry.compressed_memory_length, geometry.window_length
    at_index = 0 if geometry.temporal else compressed  # compressed rows that stand where their index is, as others do
    near = geometry.num_keys - compressed + at_index
    queries = torch.arange(length, device=like.device)[:, None]
    index = queries + (near - 1 - torch.arange(near, device=like.device))
    values = torch.arange(1 - length, near, dtype=like.dtype, device=like.device)
    if geometry.temporal and compressed:
        far = queries + rate * torch.arange(compressed - 1, -1, -1, device=like.device)
        index = torch.cat([far + len(values), index], dim=1)
        first = geometry.memory_length + (rate + 1) / 2  # from the first query to the newest compressed row
        far_values = torch.arange(length + rate * (compressed - 1), dtype=like.dtype, device=like.device) + first
        values = torch.cat([values, far_values])
    return Distances(values, index)


def remember(memory: LayerMemory, rows: Tensor, new_compressed: Tensor | None, view: View | None) -> LayerMemory:
    """The next memory of a layer: newest rows and compressed rows, those of other documents zeroed and not counted;
    without a view, all are valid.

    They are copies: a view would keep all rows of the chunk alive as long as the memory is.
    """
    compressed = memory.compressed_memory
    length = compressed.shape[1]
    if new_compressed is not None:
        compressed = torch.cat([compressed, new_compressed], dim=1)
        compressed = compressed[:, compressed.shape[1] - length :]
    if view is None or view.documents is None:
        # As full as it was. In one order, empty parts too: a compiled graph is of that order.
        rows, compressed = (part.clone(memory_format=torch.contiguous_format) for part in (rows, compressed))
        return memory._replace(memory=rows, compressed_memory=compressed)
    stream, compressed_stream = view.documents.stream, view.documents.compressed_stream
    current = stream[:, -1]
    rows, valid = keep_valid(rows, stream[:, stream.shape[1] - rows.shape[1] :], current)
    kept = compressed_stream[:, compressed_stream.shape[1] - length :]
    compressed, compressed_valid = keep_valid(compressed, kept, current)
    return LayerMemory(rows, compressed, valid, compressed_valid, view.codes_until_full)


def _valid_tail(valid: Int[Tensor, " B"], length: int) -> Int[Tensor, "B M"]:
    rows = torch.arange(length, device=valid.device)
    return torch.where(rows >= length - valid[:, None], 0, -1)
