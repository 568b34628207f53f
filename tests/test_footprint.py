"""The table of memory against a real training step; layers that are run again have the same gradients."""

import copy
import ctypes
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade_runs import Output, Patch, tool
from tiny import tiny_model
from tiny_runs import tiny_run

from ct_audio.common.errors import UserError
from ct_audio.models import build_model
from ct_audio.models.state import detach_memory, named_tensors
from ct_audio.runs.config import RunConfig, load_config
from ct_audio.training.footprint import footprint
from ct_audio.training.session import ChunkLoss, checkpoint_layers

SIZES: dict[str, Any] = {"num_layers": 4, "width": 128, "num_heads": 4, "feedforward_width": 384}
LENGTHS: dict[str, Any] = {"window_length": 128, "memory_length": 128, "compressed_memory_length": 128}
WIDE: dict[str, dict[str, Any]] = {
    "compressive_transformer": SIZES | LENGTHS | {"position_width": 32},
    "compressive_transformer_pre_norm": SIZES | LENGTHS | {"position_width": 32},
    "transformer_xl": SIZES | LENGTHS | {"position_width": 32, "compressed_memory_length": 0},
    "compressive_transformer_prediction": SIZES | LENGTHS | {"position_width": 32},
    "wavenet": {"num_layers": 8, "width": 96, "skip_width": 80},
}


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int:
    """Bytes that this process holds from the C library, which torch allocates from on the CPU."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("no mallinfo2 in this system's C library")
    library.mallinfo2.restype = _Mallinfo
    info = library.mallinfo2()
    return info.uordblks + info.hblkhd


def wide_run(directory: Path, name: str, **changes: Any) -> RunConfig:
    settings = {f"model__{key}": value for key, value in WIDE[name].items() if key != "name"} | changes
    return tiny_run(directory, name, data__chunk_length=1024, train__precision="float32", **settings)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("name", WIDE)
def test_estimate_is_what_a_step_allocates(tmp_path: Path, name: str, checkpoints: bool):
    """What the forward pass of a full memory leaves allocated, less what it returned.

    Within 0.5%, and 150 kB a layer: the graph's own objects, and one mask.
    """
    config = wide_run(tmp_path, name)
    found = footprint(config)
    expected = found.activations_with_checkpoints if checkpoints else found.activations
    if expected is None:
        assert name == "wavenet"
        return
    torch.manual_seed(0)
    model = build_model(config)
    if checkpoints:
        checkpoint_layers(model)
    loss = ChunkLoss(model, device_type="cpu", precision="float32")
    codes = torch.randint(256, (2, 1024))
    memory = model.full_memory(2)
    loss(codes, codes, memory, None)  # what is made once, as numba's code and torch's caches, is made here
    gc.collect()
    before = allocated()
    output = loss(codes, codes, memory, None)
    kept = allocated() - before
    returned = sum(tensor.untyped_storage().nbytes() for _, tensor in named_tensors(output[:2]))
    graph = 150_000 * config.model.num_layers
    assert 0.995 * expected < kept - returned < 1.005 * expected + graph
    state = sum(p.numel() for p in model.parameters()) * 16
    assert found.whole_state == found.sharded_state == state
    assert found.memories == sum(tensor.untyped_storage().nbytes() for _, tensor in named_tensors(memory))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("compressive_transformer", {"dropout": 0.3}),
        ("compressive_transformer_pre_norm", {}),
        ("compressive_transformer_most_used", {}),
        ("compressive_transformer_bptt", {}),
        ("compressive_transformer_gru", {"dropout": 0.3}),
        ("compressive_transformer_convolution", {}),
        ("compressive_transformer_adaptive_span", {}),
        ("transformer_xl", {}),
    ],
)
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_layers_that_are_run_again_have_the_same_gradients(name: str, changes: dict[str, Any], precision: str):
    """Bit for bit, dropout drawn again as it was; over two chunks, the second with a memory."""
    torch.manual_seed(0)
    whole = tiny_model(name, **changes).to(torch.float64 if precision == "float64" else torch.float32)
    again = copy.deepcopy(whole)
    checkpoint_layers(again)
    codes = torch.randint(whole.vocab_size, (2, 33))
    gradients = []
    for model in (whole, again):
        torch.manual_seed(1)
        loss, memory = ChunkLoss(model, device_type="cpu", precision=precision), model.zero_memory(2)
        for begin in (0, 16):
            nll, memory, auxiliary = loss(codes[:, begin : begin + 16], codes[:, begin + 1 : begin + 17], memory, None)
            torch.stack([nll.mean(), *auxiliary.values()]).sum().backward()
            memory = detach_memory(memory)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for left, right in zip(*gradients, strict=True):
        assert left is right is None or torch.equal(left, right)


def test_a_model_without_layers_cannot_run_them_again():
    with pytest.raises(UserError, match=r"train\.checkpoint_layers: wavenet has no layers"):
        checkpoint_layers(tiny_model("wavenet"))


def test_processes_share_lanes_state_and_memories(tmp_path: Path):
    config = wide_run(tmp_path, "compressive_transformer", data__num_lanes=8, train__num_micro_batches=2)
    one, four = footprint(config), footprint(config, num_processes=4)
    assert (one.num_lanes, one.num_lanes_together) == (8, 4)
    assert (four.num_lanes, four.num_lanes_together) == (2, 1)
    assert four.whole_state == one.whole_state
    assert one.whole_state / 4 < four.sharded_state < one.whole_state
    assert four.memories == one.memories / 4
    assert one.activations
    assert four.activations == pytest.approx(one.activations / 4, rel=0.05)
    for processes in (0, 3):
        with pytest.raises(UserError, match=f"--processes {processes}: data.num_lanes = 8 is not divisible by them"):
            footprint(config, num_processes=processes)


def test_where_the_codes_decide_nothing_is_said(tmp_path: Path):
    assert footprint(tiny_run(tmp_path, "compressive_transformer_adaptive")).activations is None


def test_the_billion_is_one(monkeypatch: Patch, capsys: Output):
    """The recipe, its table, and a change of a key on the command line."""
    found = footprint(load_config("pg19/compressive_transformer_1b"), num_processes=64)
    assert 1.0e9 < found.num_parameters < 1.1e9
    assert found.whole_state == 16 * found.num_parameters
    assert found.activations_with_checkpoints < found.activations / 10  # type: ignore[operator]
    words = ["pg19/compressive_transformer_1b", "model.num_layers=2", "data.num_lanes=64", "--processes", "2"]
    assert tool("describe", monkeypatch)(*words) == 0
    assert "| pg19_compressive_transformer_1b |" in capsys.readouterr().out
