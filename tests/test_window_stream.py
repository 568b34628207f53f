"""Lanes against an oracle of Python lists, resume, ranks and errors."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ct_audio.common.errors import UserError
from ct_audio.data.lanes import Chunk, WindowStream, shift_by_one, split_chunk

START = 255
CODES = np.arange(107, dtype=np.uint8)
OFFSETS = np.array([0, 3, 40, 41, 90], dtype=np.int64)


def stream_of(num_lanes: int = 3, chunk_length: int = 8, **options) -> WindowStream:
    return WindowStream(CODES, OFFSETS, start_code=START, chunk_length=chunk_length, num_lanes=num_lanes, **options)


def oracle(
    num_lanes: int, chunk_length: int, num_chunks: int, *, reset: bool
) -> list[list[tuple[int, int, bool, int]]]:
    """A lane's (input, target, document start, corpus index) one by one, from plain lists."""
    segment = len(CODES) // num_lanes
    used = CODES.tolist()[: segment * num_lanes]
    lanes = []
    for lane in range(num_lanes):
        index, rows = lane * segment, []
        for _ in range(num_chunks * chunk_length):
            starts = index in OFFSETS.tolist()
            previous = START if index == 0 or (reset and starts) else used[index - 1]
            rows.append((previous, used[index], reset and starts, index))
            index = index + 1 if index + 1 < len(used) else 0
        lanes.append(rows)
    return lanes


@given(st.integers(1, 5), st.integers(1, 20), st.booleans())
def test_lanes_are_what_the_oracle_says_over_several_epochs(num_lanes: int, chunk_length: int, reset: bool):
    num_chunks = 2 * len(CODES) // chunk_length + 2
    stream = stream_of(num_lanes, chunk_length, reset_memory_at_document=reset)
    chunks = [stream.next_chunk() for _ in range(num_chunks)]
    inputs, targets = torch.cat([c.inputs for c in chunks], 1), torch.cat([c.targets for c in chunks], 1)
    for lane, rows in enumerate(oracle(num_lanes, chunk_length, num_chunks, reset=reset)):
        assert inputs[lane].tolist() == [row[0] for row in rows]
        assert targets[lane].tolist() == [row[1] for row in rows]
        assert [int(c.positions[lane]) for c in chunks] == [row[3] for row in rows[::chunk_length]]
        if reset:
            starts = torch.cat([c.document_starts for c in chunks if c.document_starts is not None], 1)
            assert starts[lane].tolist() == [row[2] for row in rows]
        else:
            assert all(c.document_starts is None for c in chunks)


@given(st.integers(0, 106), st.integers(1, 30), st.booleans())
def test_codes_of_any_place_are_shifted_by_one(begin: int, length: int, reset: bool):
    end = min(begin + length, len(CODES))
    offsets = OFFSETS if reset else None
    inputs, targets, starts = shift_by_one(CODES, begin, end, start_code=START, document_offsets=offsets)
    [rows] = oracle(1, end, 1, reset=reset)
    assert [*zip(inputs.tolist(), targets.tolist(), starts.tolist(), strict=True)] == [row[:3] for row in rows[begin:]]
    assert inputs.dtype == targets.dtype == np.int64


def test_types_and_the_first_input():
    chunk = stream_of().next_chunk()
    assert chunk.inputs.dtype == chunk.targets.dtype == chunk.positions.dtype == torch.int64
    assert chunk.inputs[:, 0].tolist() == [START, 34, 69]
    assert chunk.positions.tolist() == [0, 35, 70]


def test_ranks_share_the_lanes():
    whole = stream_of(4)
    ranks = [stream_of(4, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(9):
        chunk, parts = whole.next_chunk(), [rank.next_chunk() for rank in ranks]
        assert torch.equal(chunk.targets, torch.cat([part.targets for part in parts]))
        assert torch.equal(chunk.positions, torch.cat([part.positions for part in parts]))
    assert whole.state_dict() == ranks[0].state_dict() == ranks[1].state_dict()


def test_a_position_goes_through_json_and_back():
    stream, other = stream_of(), stream_of()
    for _ in range(20):
        stream.next_chunk()
    other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(stream.next_chunk()[:2], other.next_chunk()[:2], strict=True))


@pytest.mark.parametrize("change", [{"num_lanes": 4}, {"num_codes": 106}, {"codes_per_lane": "8"}])
def test_a_position_of_something_else_is_refused(change: dict):
    stream = stream_of()
    with pytest.raises(UserError, match=next(iter(change))):
        stream.load_state_dict(stream.state_dict() | change)


def test_too_short_a_split_and_lanes_that_do_not_divide():
    with pytest.raises(UserError, match="107 codes; 14 lanes of a chunk of 8 need at least 112"):
        stream_of(14)
    stream_of(13)
    with pytest.raises(UserError, match="not divisible by the 2 processes"):
        stream_of(3, world_size=2)


def test_micro_batches_are_consecutive_lanes():
    chunk = stream_of(4, reset_memory_at_document=True).next_chunk()
    parts = split_chunk(chunk, 2)
    assert [part.positions.tolist() for part in parts] == [[0, 26], [52, 78]]
    assert torch.equal(torch.cat([part.inputs for part in parts]), chunk.inputs)
    assert all(part.document_starts is not None and part.document_starts.shape == (2, 8) for part in parts)
    without = split_chunk(Chunk(chunk.inputs, chunk.targets, None, chunk.positions), 4)
    assert [part.document_starts for part in without] == [None] * 4
