"""What a training step keeps alive: its memory and not the chunk that it came from, one mask for all layers."""

import pytest
import torch
from model_cases import every_trained_model, random_codes, window_of
from tiny import tiny_model
from torch import Tensor

from ct_audio.models.state import detach_memory, named_tensors


def bfloat16(*, enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@every_trained_model
def test_memory_is_all_that_its_storage_holds(name: str) -> None:
    model = tiny_model(name)
    memory = model.zero_memory(2)
    for seed in range(3):  # the last one with all rows valid
        memory = detach_memory(model(random_codes(4 * window_of(model), seed=seed), memory).memory)
        for key, tensor in named_tensors(memory):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, key


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_layers_share_one_mask(*, narrow: bool, with_documents: bool) -> None:
    model = tiny_model("compressive_transformer")
    codes, memory = random_codes(24), model.zero_memory(2)
    with torch.no_grad():
        for _ in range(3):
            memory = detach_memory(model(codes, memory).memory)
    masks = set()

    def see(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] == (8, 8 + 8 + 4) and tensor.dtype != torch.bool:
            masks.add((tensor.untyped_storage().data_ptr(), tensor.dtype))
        return tensor

    starts = torch.zeros(2, 24, dtype=torch.bool) if with_documents else None
    with bfloat16(enabled=narrow), torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        output = model(codes, memory, document_starts=starts)
    assert output.features.requires_grad
    assert [dtype for _, dtype in masks] == [torch.bfloat16 if narrow else torch.float32]


@pytest.mark.parametrize("name", ["compressive_transformer", "compressive_transformer_adaptive"])
def test_embeddings_are_as_wide_as_their_tables_in_narrow_arithmetic(name: str) -> None:
    """What all layers add to stays float32; with adaptive bands too."""
    model = tiny_model(name)
    rows, _, _ = model.get_submodule("front_end")(random_codes(16), ())
    with bfloat16():
        in_narrow, _, _ = model.get_submodule("front_end")(random_codes(16), ())
    assert in_narrow.dtype == torch.float32
    assert torch.equal(in_narrow, rows)
