"""What the contract tests of the models share: float64 models, codes, running window by window, comparing.

A model of `window_length` 1 has no windows: a chunk of any length is whole, and gradients cross all of it. Such models
are cut at `window_of(model)` all the same.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from jaxtyping import Float, Int
from tiny import TINY_MODELS, tiny_model
from torch import Tensor

from ct_audio.models.adaptive_vocabulary import AdaptiveInput
from ct_audio.models.state import named_tensors

VOCAB_SIZE = 32
LANES = 2


VARIANTS = {
    "compressive_transformer_reference",
    "compressive_transformer_mean",
    "compressive_transformer_max",
    "compressive_transformer_dilated_conv",
    "compressive_transformer_gru",
    "compressive_transformer_zero",
    "compressive_transformer_adaptive_span",
    "compressive_transformer_adaptive",
    "compressive_transformer_tied",
    "linear_prediction_fixed_scale",
}
"""They differ from other entries in a part with tests of its own: the contract is run over them with -m slow."""


def _with(models: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in VARIANTS)) for name in models]
    )


every_model = _with(TINY_MODELS)
every_transformer = _with(name for name, plain in TINY_MODELS.items() if "window_length" in plain)
every_trained_model = _with(name for name, plain in TINY_MODELS.items() if plain["name"] != "linear_prediction")


def float64_model(name: str, **changes: Any) -> Any:
    model = tiny_model(name, **changes).double()
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros and ones, so that every path matters
            parameter.add_(0.2 * torch.randn_like(parameter))
    fit: Any = getattr(model, "fit", None)
    if fit is not None:
        fit(random_codes(200, seed=9)[0].numpy())
    return model


def random_codes(length: int, *, seed: int = 0) -> Int[Tensor, "B T"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (LANES, length), generator=generator)


def embedding_row(model: Any, code: int) -> Float[Tensor, " _"]:
    """The parameters that only this code's embedding reads; writable."""
    edges = getattr(model.front_end, "edges", [(0, model.vocab_size)])
    tables = getattr(model.front_end, "tables", None) or [model.front_end.table.weight]
    for (begin, end), table in zip(edges, tables, strict=True):
        if begin <= code < end:
            return table[code - begin]
    raise AssertionError(f"no row of code {code}")


def window_of(model: Any) -> int:
    return model.window_length if has_windows(model) else 8


def has_windows(model: Any) -> bool:
    return model.window_length > 1


def run_windows(
    model: Any, codes: Int[Tensor, "B T"], memory: Any = None, starts: Tensor | None = None
) -> tuple[Float[Tensor, "B T D"], Any]:
    """One forward a window without gradients: features and the last memory."""
    memory, parts = model.zero_memory(codes.shape[0]) if memory is None else memory, []
    with torch.no_grad():
        for begin in range(0, codes.shape[1], window_of(model)):
            piece = slice(begin, begin + window_of(model))
            piece_starts = None if starts is None else starts[:, piece]
            features, memory, _ = model(codes[:, piece], memory, document_starts=piece_starts)
            parts.append(features)
    return torch.cat(parts, dim=1), memory


def assert_same_memory(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    got, expected = dict(named_tensors(got)), dict(named_tensors(expected))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def same(model: Any, got: Tensor, expected: Tensor) -> bool:
    """Equal to the bit; with an adaptive input to rounding, as a band's product of other rows may round otherwise."""
    rounding = 1e-13 if isinstance(getattr(model, "front_end", None), AdaptiveInput) else 0.0
    return bool((got - expected).abs().max() <= rounding)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
