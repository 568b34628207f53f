"""Random configurations of the compressive stack against `paper.py`: outputs, memories, losses and all gradients.

By default for about half a minute; for hours with -m slow (set CT_AUDIO_RANDOM_CONFIGURATIONS to their number).
"""

import os
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ct_audio.models.compressive.config import StackConfig
from ct_audio.models.compressive.paper import PaperStack
from ct_audio.models.compressive.stack import CompressiveStack
from ct_audio.models.state import detach_memory

NUM_WINDOWS = 5
TOLERANCE = 1e-10
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""No shrinking: it takes minutes, and a configuration of at most three layers is small."""


@st.composite
def configurations(draw: Any) -> dict[str, Any]:
    """Fields of small `StackConfig`s, any combination of options that it allows."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    num_layers, function = one_of(1, 2, 3), one_of("conv", "dilated_conv", "gru", "mean", "max", "most_used")
    rates = [one_of(1, 2, 4) for _ in range(num_layers)]
    loss = one_of("attention_reconstruction", "autoencoding", "bptt", "none")
    if function == "most_used" and loss in ("autoencoding", "bptt"):
        loss = "attention_reconstruction"
    backend = one_of("fused", "reference")
    return {  # no StackConfig yet: checking its types draws random numbers, which hypothesis forbids here
        "num_layers": num_layers,
        "width": one_of(8, 12),
        "num_heads": one_of(1, 2),
        "num_kv_heads": one_of(0, 1),
        "feedforward_width": one_of(4, 10),
        "positions": one_of("relative", "rotary"),
        "position_width": one_of(2, 4),
        "window_length": one_of(4, 8),
        "memory_length": one_of(0, 4, 8, 12),
        "compressed_memory_length": one_of(0, 1, 3, 4, 9),
        "compression_rate": rates,
        "compression_function": function,
        "compression_loss": loss,
        "reconstruction_query_share": one_of(1.0, 0.5),
        "memory_layers": one_of(None, [0], list(range(num_layers))[-1:]),
        "compressed_positions": "index" if function == "most_used" else one_of("index", "temporal"),
        # with most_used, spans of 0 would make ties between rows that nobody attends to
        "adaptive_span": backend == "reference" and function != "most_used" and one_of(True, False),
        "adaptive_span_ramp": one_of(1, 6),
        "attention_backend": backend,
        "norm_position": one_of("post", "pre"),
        "straddling_groups": one_of("drop", "zero"),
        "convolution_length": one_of(0, 0, 1, 3, 11),
    }


def noisy_stack(config: StackConfig, seed: int) -> CompressiveStack:
    """In float64, away from zeros, so that every parameter matters."""
    torch.manual_seed(seed)
    stack = CompressiveStack(config).double()
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            parameter.uniform_(0.1, 0.9) if name.endswith(".span") else parameter.add_(
                0.3 * torch.randn_like(parameter)
            )
    return stack


def weights_of(shape: torch.Size) -> Tensor:
    return torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).view(shape)


def check(config: StackConfig, cut: int, reset: int, seed: int) -> None:
    """Two chunks of a stack against loops, cut between windows; at row `reset` lane 1 starts afresh.

    With a start the losses of f_c are left out: the window where a document starts still reconstructs the rows that
    were there when it began, of which a fresh stream has none.
    """
    stack, length = noisy_stack(config, seed), config.window_length
    inputs = torch.randn(2, NUM_WINDOWS * length, config.width, dtype=torch.float64)
    starts = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    reset, nowhere = min(reset, NUM_WINDOWS * length), NUM_WINDOWS * length
    if reset < nowhere:
        starts[1, reset] = True
    outputs, memory, losses = [], stack.zero_memory(2), torch.zeros((), dtype=torch.float64)
    for begin, end in ((0, cut * length), (cut * length, NUM_WINDOWS * length)):
        output = stack(inputs[:, begin:end], memory, document_starts=starts[:, begin:end] if starts.any() else None)
        memory = detach_memory(output.memory)
        outputs.append(output.rows)
        of_compression = [loss for name, loss in output.auxiliary_losses.items() if "span" not in name]
        losses = losses + sum(of_compression) * (end - begin) / length
    found, continuous = torch.cat(outputs, dim=1), reset == nowhere
    ((found * weights_of(found.shape)).sum() + losses * continuous).backward()

    parameters = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in stack.named_parameters()}
    lanes, expected_losses, expected = [], torch.zeros((), dtype=torch.float64), []
    for lane in range(2):
        paper, rows = PaperStack(config, parameters), []
        for window in range(NUM_WINDOWS):
            if window == cut:  # between chunks the graph is cut, as the training loop does
                paper.compressed_memory = [[row.detach() for row in layer] for layer in paper.compressed_memory]
            begin, end = window * length, (window + 1) * length
            if lane == 1 and begin <= reset < end:
                if begin < reset:
                    rows += paper.window(list(inputs[lane, begin:reset]))[0]
                paper, begin = PaperStack(config, parameters), reset
            outputs_of_window, window_losses = paper.window(list(inputs[lane, begin:end]))
            rows += outputs_of_window
            expected_losses = expected_losses + sum(window_losses) / 2
        lanes.append(paper)
        expected.append(torch.stack(rows))
    wanted = torch.stack(expected)
    ((wanted * weights_of(wanted.shape)).sum() + expected_losses * continuous).backward()

    assert (found - wanted).abs().max() <= TOLERANCE
    assert not continuous or (losses - expected_losses).detach().abs() <= TOLERANCE
    for lane, paper in enumerate(lanes):
        for layer in range(config.num_layers):
            for rows, valid, kept in (
                (memory.memory, memory.memory_valid, paper.memory),
                (memory.compressed_memory, memory.compressed_memory_valid, paper.compressed_memory),
            ):
                assert int(valid[layer][lane]) == len(kept[layer])
                newest = rows[layer][lane, rows[layer].shape[1] - len(kept[layer]) :]
                assert not kept[layer] or (newest - torch.stack(kept[layer])).abs().max() <= TOLERANCE
        for queue, kept in zip(memory.queues, paper.queue, strict=bool(memory.queues)):
            newest = kept[max(len(kept) - queue.shape[1], 0) :]
            rest, found_newest = queue[lane].tensor_split([queue.shape[1] - len(newest)])
            assert not rest.any()
            assert not newest or (found_newest - torch.stack(newest)).abs().max() <= TOLERANCE
    for name, parameter in stack.named_parameters():
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (parameter, parameters[name])]
        assert (gradients[0] - gradients[1]).abs().max() <= TOLERANCE * (1 + gradients[1].abs().max()), name


arguments = {
    "config": configurations(),
    "cut": st.integers(1, NUM_WINDOWS - 1),
    "reset": st.one_of(st.just(NUM_WINDOWS * 8), st.sampled_from([4, 8, 16, 24]), st.integers(1, NUM_WINDOWS * 8 - 1)),
    "seed": st.integers(0, 2**16),
}


@given(**arguments)
@settings(max_examples=60, phases=PHASES)
def test_random_configurations_equal_the_paper(config: dict, cut: int, reset: int, seed: int) -> None:
    check(StackConfig(**config), cut, reset, seed)


@pytest.mark.slow
@pytest.mark.timeout(0)
@given(**arguments)
@settings(max_examples=int(os.environ.get("CT_AUDIO_RANDOM_CONFIGURATIONS", "1000")), derandomize=False, phases=PHASES)
def test_many_random_configurations_equal_the_paper(config: dict, cut: int, reset: int, seed: int) -> None:
    check(StackConfig(**config), cut, reset, seed)
