"""Document starts, over every entry of `TINY_MODELS` in float64: nothing before a start has any influence after it."""

import pytest
import torch
from model_cases import (
    LANES,
    VOCAB_SIZE,
    assert_close,
    assert_same_memory,
    every_model,
    every_transformer,
    float64_model,
    random_codes,
    run_windows,
    same,
    window_of,
)

from ct_audio.models.state import detach_memory, map_memory


@every_model
@pytest.mark.parametrize("in_one_chunk", [True, False], ids=["chunk", "windows"])
def test_document_start_at_a_window_begins_a_fresh_stream(name: str, in_one_chunk: bool) -> None:
    """Lane 0 begins documents at windows 2 and 3 of a warm stream, lane 1 goes on."""
    model = float64_model(name)
    window = window_of(model)
    _, memory = run_windows(model, random_codes(3 * window, seed=1))
    codes, begins = random_codes(6 * window), 3 * window
    starts = torch.zeros_like(codes, dtype=torch.bool)
    starts[0, 2 * window] = starts[0, begins] = True
    if in_one_chunk:
        with torch.no_grad():
            features, last, _ = model(codes, memory, document_starts=starts)
    else:
        features, last = run_windows(model, codes, memory, starts)
    fresh, fresh_last = run_windows(model, codes[:1, begins:])
    going_on, going_on_last = run_windows(model, codes, memory)
    assert_close(features[:1, begins:], fresh)
    assert_close(features[0, 2 * window : begins], run_windows(model, codes[:1, 2 * window : begins])[0][0])
    assert_close(features[1], going_on[1])
    assert_close(features[0, : 2 * window], going_on[0, : 2 * window])
    assert_same_memory(map_memory(lambda tensor: tensor[:1], last), fresh_last)
    assert_same_memory(
        map_memory(lambda tensor: tensor[1:], last), map_memory(lambda tensor: tensor[1:], going_on_last)
    )


@every_model
@pytest.mark.parametrize("windows", [1, 3], ids=["early in the chunk", "in its last window"])
def test_nothing_before_a_document_start_has_influence(name: str, windows: int) -> None:
    """The document starts mid-window; all that came before, the memory too, is replaced. Exact, also windows later."""
    model = float64_model(name)
    window = window_of(model)
    begins = (windows + 1) * window - 2
    codes, others = random_codes(4 * window), random_codes(4 * window, seed=3)
    others[:, begins:] = codes[:, begins:]
    starts = torch.zeros_like(codes, dtype=torch.bool)
    starts[:, begins] = True
    _, memory = run_windows(model, random_codes(4 * window, seed=1))
    _, other_memory = run_windows(model, random_codes(4 * window, seed=2))
    later = random_codes(3 * window, seed=4)
    with torch.no_grad():
        first = model(codes, memory, document_starts=starts)
        second = model(others, other_memory, document_starts=starts)
        assert not torch.equal(first.features[:, begins - 1], second.features[:, begins - 1])
        assert same(model, first.features[:, begins:], second.features[:, begins:])
        assert_same_memory(second.memory, first.memory, tolerance=1e-13 if name.endswith("adaptive") else 0)
        assert same(model, model(later, first.memory).features, model(later, second.memory).features)
        # Before its next start or the end of the range, the document does see its own codes.
        others[:, begins] = (others[:, begins] + 7) % VOCAB_SIZE
        third = model(others, other_memory, document_starts=starts)
    assert not torch.equal(third.features[:, begins + 1], second.features[:, begins + 1])


@every_transformer
def test_losses_do_not_depend_on_chunking_where_documents_start(name: str) -> None:
    """In the middle of a chunk, mid-window and where a window begins: one chunk of four windows or four chunks."""
    model = float64_model(name)
    window = window_of(model)
    _, memory = run_windows(model, random_codes(4 * window, seed=1))
    codes = random_codes(4 * window)
    starts = torch.zeros_like(codes, dtype=torch.bool)
    starts[0, window + 3] = starts[1, 2 * window] = True
    whole = model(codes, memory, document_starts=starts).auxiliary_losses
    parts = []
    for begin in range(0, 4 * window, window):
        piece = slice(begin, begin + window)
        _, memory, losses = model(codes[:, piece], memory, document_starts=starts[:, piece])
        memory = detach_memory(memory)
        parts.append(losses)
    for key, loss in whole.items():
        assert_close(loss.detach(), torch.stack([losses[key].detach() for losses in parts]).mean())


@every_model
def test_no_document_start_is_a_continuous_stream(name: str) -> None:
    model = float64_model(name)
    codes = random_codes(5 * window_of(model))
    nowhere = torch.zeros_like(codes, dtype=torch.bool)
    with torch.no_grad():
        continuous = model(codes, model.zero_memory(LANES))
        masked = model(codes, model.zero_memory(LANES), document_starts=nowhere)
    assert_close(masked.features, continuous.features)
    assert_same_memory(masked.memory, continuous.memory)
