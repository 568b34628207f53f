"""The stack for other people's models: steps with resets, f_c inside any module, the place of an LSTM. In float64."""

from typing import Any

import pytest
import torch
from model_cases import assert_close, assert_same_memory
from tiny import TINY_MODELS, tiny_model
from torch import Tensor, nn

from ct_audio.common.errors import UserError
from ct_audio.models.composition import ComposedModel
from ct_audio.models.compressive.config import StackConfig
from ct_audio.models.compressive.core import CompressiveCore
from ct_audio.models.compressive.stack import CompressiveStack, gradient_groups
from ct_audio.models.interface import Stack, clip_gradients
from ct_audio.models.state import detach_memory, map_memory

LANES, WINDOW = 3, 8
CONFIG = StackConfig(
    num_layers=2,
    width=16,
    num_heads=2,
    feedforward_width=24,
    position_width=4,
    window_length=WINDOW,
    memory_length=WINDOW,
    compressed_memory_length=4,
    compression_rate=4,
    straddling_groups="zero",
)
STACKS = [name for name in TINY_MODELS if isinstance(tiny_model(name), ComposedModel)]


def noisy(module: Any) -> Any:
    """In float64, away from zeros, so that every parameter matters."""
    with torch.no_grad():
        for name, parameter in module.double().named_parameters():
            parameter.uniform_(0.1, 0.9) if name.endswith(".span") else parameter.add_(
                0.2 * torch.randn_like(parameter)
            )
    return module


def stack_of(name: str) -> Stack:
    model: Any = tiny_model(name)
    return noisy(model.stack)


def random_starts(length: int, share: float, seed: int) -> Tensor:
    return torch.rand(LANES, length, generator=torch.Generator().manual_seed(seed)) < share


def random_rows(width: int, length: int) -> Tensor:
    return torch.randn(LANES, length, width, dtype=torch.float64)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("share", [0.04, 0.3])
def test_steps_with_random_resets_equal_forward(name: str, share: float) -> None:
    """Equality 2 with lanes that begin anew anywhere: a prime, an unfinished window, steps over window boundaries."""
    stack = stack_of(name)
    window = max(stack.window_length, WINDOW)
    length, known = 6 * window, window + 3
    rows, starts = random_rows(stack.width, length), random_starts(length, share, seed=1)
    starts[0, known - 1] = starts[1, known] = starts[2, 2 * window] = True
    with torch.no_grad():
        whole = stack(rows, stack.zero_memory(LANES), document_starts=starts)
        memory = stack(rows[:, :window], stack.zero_memory(LANES), document_starts=starts[:, :window]).memory
        state = stack.begin_steps(memory, rows[:, window:known], document_starts=starts[:, window:known])
        stepped = []
        for t in range(known, length):
            row, state = stack.step(rows[:, t], state, document_starts=starts[:, t])
            stepped.append(row)
    assert_close(torch.stack(stepped, dim=1), whole.rows[:, known:])
    assert_same_memory(state.memory, whole.memory)
    with torch.no_grad():  # what the state goes on with is clean: a copy of it too
        more = random_rows(stack.width, window)
        branch, continued = stack.clone_state(state), stack(more, whole.memory)
        for t in range(window):
            row, branch = stack.step(more[:, t], branch)
            assert_close(row, continued.rows[:, t])


@pytest.mark.parametrize("name", STACKS)
def test_a_reset_lane_steps_as_a_fresh_one_and_the_others_go_on(name: str) -> None:
    """No tolerance on what leaks: lane 0 gives the same bits whatever came before."""
    stack = stack_of(name)
    length = 3 * max(stack.window_length, WINDOW)
    before, others, after = (random_rows(stack.width, length) for _ in range(3))
    others[1:] = before[1:]
    found = []
    for past in (before, others):
        with torch.no_grad():
            state = stack.begin_steps(stack(past, stack.zero_memory(LANES)).memory, after[:, :0])
            outputs = []
            for t in range(length):
                starts = torch.tensor([t == 3, False, False])
                row, state = stack.step(after[:, t], state, document_starts=starts)
                outputs.append(row)
        found.append(torch.stack(outputs, dim=1))
    assert not torch.equal(found[0][0, :3], found[1][0, :3])
    assert torch.equal(found[0][0, 3:], found[1][0, 3:])
    assert torch.equal(found[0][1:], found[1][1:])


@pytest.mark.parametrize("groups", ["drop", "zero"])
def test_the_first_rows_of_an_episode_stay_where_straddling_groups_are_kept(groups: str) -> None:
    """An episode begins at the last row of a group of 4: that row alone is compressed, or lost. By perturbation."""
    config = StackConfig(**{**vars(CONFIG), "num_layers": 1, "straddling_groups": groups})
    stack = noisy(CompressiveStack(config))
    rows, starts = random_rows(config.width, 4 * WINDOW), torch.zeros(LANES, 4 * WINDOW, dtype=torch.bool)
    starts[:, 3] = True
    changed = rows.clone()
    changed[:, 3] += 1
    with torch.no_grad():
        found = [stack(part, stack.zero_memory(LANES), document_starts=starts).rows for part in (rows, changed)]
    late = slice(2 * WINDOW, 3 * WINDOW)  # row 3 has left the memory, which begins at row 8
    assert torch.equal(found[0][:, late], found[1][:, late]) == (groups == "drop")
    memory = stack(rows[:, : 2 * WINDOW], stack.zero_memory(LANES), document_starts=starts[:, : 2 * WINDOW]).memory
    assert memory.compressed_memory_valid[0].tolist() == [1 if groups == "drop" else 2] * LANES
    with torch.no_grad():
        zeros = torch.zeros(LANES, 3, config.width, dtype=torch.float64)
        expected = stack.layers[0].compression(torch.cat([zeros, rows[:, 3:8]], dim=1))
    kept = expected if groups == "zero" else expected[:, 1:]
    assert_close(memory.compressed_memory[0][:, -kept.shape[1] :].detach(), kept)


class SomebodysNetwork(nn.Module):
    """Encoder, stack, two heads; one of the heads has a name like that of f_c."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, config.width)
        self.middle = nn.ModuleDict({"remember": CompressiveStack(config)})
        self.compression_head, self.value = nn.Linear(config.width, 3), nn.Linear(config.width, 1)


@pytest.mark.parametrize("loss", ["attention_reconstruction", "autoencoding", "none"])
def test_gradient_groups_find_f_c_in_any_module(loss: str) -> None:
    network = SomebodysNetwork(StackConfig(**{**vars(CONFIG), "compression_loss": loss}))
    groups = gradient_groups(network)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    apart = {names[id(parameter)] for parameter in groups.get("compression", [])}
    expected = {"attention_reconstruction": {"compression"}, "autoencoding": {"compression", "compression_decoder"}}
    layer = "middle.remember.layers.{}.{}.project.{}"
    parts = expected.get(loss, set())
    assert apart == {layer.format(i, part, kind) for i in (0, 1) for part in parts for kind in ("weight", "bias")}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert len(groups["model"]) + len(groups.get("compression", [])) == len(trained)
    assert {"encoder.weight", "compression_head.weight"} <= {names[id(parameter)] for parameter in groups["model"]}


@pytest.mark.parametrize("cuts", [[1] * 37, [37], [8, 8, 21], [3, 17, 1, 16], [5, 3, 29]])
def test_a_stream_may_be_cut_anywhere_into_calls_of_the_core(cuts: list[int]) -> None:
    core = noisy(CompressiveCore(5, CONFIG))
    inputs = torch.randn(LANES, 37, 5, dtype=torch.float64)
    starts = random_starts(37, 0.1, seed=2)
    whole, last = core(inputs, document_starts=starts)
    outputs, memory, loss = [], None, torch.zeros((), dtype=torch.float64)
    begin = 0
    for count in cuts:
        part = slice(begin, begin + count)
        begin += count
        output, memory = core(inputs[:, part], memory, document_starts=starts[:, part])
        outputs.append(output)
        loss = loss + memory.auxiliary_loss * (count / 37)
        memory = detach_memory(memory)
    assert memory is not None
    assert_close(torch.cat(outputs, dim=1).detach(), whole.detach())
    assert_close(loss.detach(), last.auxiliary_loss.detach())
    assert last.auxiliary_loss > 0
    free = memory._replace(auxiliary_loss=last.auxiliary_loss.detach())
    assert_same_memory(free, map_memory(torch.detach, last))
    rows = core.input(inputs)
    expected = core.stack(rows, core.stack.zero_memory(LANES), document_starts=starts).rows
    assert_close(whole.detach(), expected.detach())


def test_the_core_learns_in_the_place_of_an_lstm() -> None:
    """One loop for both: say what the first input of the stream was, 20 inputs later, over calls of 7 inputs."""
    torch.manual_seed(0)
    config = StackConfig(**{**vars(CONFIG), "num_layers": 1, "norm_position": "pre"})
    found = {}
    for core in (nn.LSTM(3, 16, batch_first=True), CompressiveCore(3, config)):
        head = nn.Linear(16, 2)
        modules = nn.ModuleList([core, head])
        optimizer = torch.optim.Adam(modules.parameters(), lr=1e-2)
        for _ in range(120):
            cue = torch.randint(2, (32,))
            inputs = torch.zeros(32, 21, 3)
            inputs[:, 0, 0], inputs[:, 0, 1], inputs[:, -1, 2] = cue.float(), 1 - cue.float(), 1
            memory, loss = None, torch.zeros(())
            for part in inputs.split(7, dim=1):
                output, memory = core(part, memory)
                loss = loss + getattr(memory, "auxiliary_loss", 0.0)
            wrong = nn.functional.cross_entropy(head(output[:, -1]), cue)
            optimizer.zero_grad()
            (wrong + loss).backward()
            clip_gradients(gradient_groups(modules), 1.0)
            optimizer.step()
        found[type(core)] = wrong.item()
    assert found[CompressiveCore] < 0.1, found


def test_wrong_inputs_of_the_core_are_named() -> None:
    core = CompressiveCore(5, CONFIG)
    _, memory = core(torch.zeros(2, 3, 5))
    with pytest.raises(UserError, match=r"inputs of 3 lanes with a memory of 2; pass the memory of the call before"):
        core(torch.zeros(3, 3, 5), memory)
    with pytest.raises(UserError, match=r"expected at least one input, got none"):
        core(torch.zeros(2, 0, 5), memory)
    with pytest.raises(UserError, match=r"input_size: expected at least 1, got 0"):
        CompressiveCore(0, CONFIG)
