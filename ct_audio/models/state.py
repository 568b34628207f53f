"""Maps over the memory or the step state of any model: nests of tuples whose leaves are tensors and plain values."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ct_audio.common.errors import UserError


def map_memory(function: Callable[[Tensor], Tensor], memory: Any) -> Any:
    """Apply `function` to every tensor of a memory (any nest of tuples); other leaves are kept."""
    if isinstance(memory, Tensor):
        return function(memory)
    if isinstance(memory, tuple):
        parts = [map_memory(function, part) for part in memory]
        return type(memory)(*parts) if hasattr(memory, "_fields") else tuple(parts)
    return memory


def map_counts(function: Callable[[int], int], memory: Any) -> Any:
    """Apply `function` to every number that a memory holds on the host (see `Memory.codes_until_full`)."""
    if isinstance(memory, tuple):
        parts = [map_counts(function, part) for part in memory]
        return type(memory)(*parts) if hasattr(memory, "_fields") else tuple(parts)
    return function(memory) if type(memory) is int else memory  # no truth value


def tensor_options(like: Tensor) -> dict[str, Any]:
    """Type and device of a tensor, for plain new tensors beside it: `like` may be a shard of a parameter."""
    return {"dtype": like.dtype, "device": like.device}


def detach_memory(memory: Any) -> Any:
    """The same memory cut from the graph: what a training loop does between chunks."""
    return map_memory(torch.detach, memory)


def named_tensors(memory: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a memory with a path-like name, as `memory/0`; the inverse is `memory_from_tensors`."""
    if isinstance(memory, Tensor):
        yield prefix, memory
    elif isinstance(memory, tuple):
        names = getattr(memory, "_fields", range(len(memory)))
        for name, part in zip(names, memory, strict=True):
            yield from named_tensors(part, f"{prefix}/{name}" if prefix else str(name))


def memory_from_tensors(like: Any, tensors: dict[str, Tensor]) -> Any:
    """A memory of the form of `like` whose tensors come from a dict made by `named_tensors`.

    Raises:
        UserError: a tensor is missing, left over, or of another shape or dtype than in `like`.
    """
    expected = dict(named_tensors(like))
    if expected.keys() != tensors.keys():
        raise UserError(
            f"memory tensors: expected {sorted(expected)}, got {sorted(tensors)}; use the run's own checkpoint"
        )
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
            raise UserError(
                f"memory tensor {name}: expected {tuple(tensor.shape)} {tensor.dtype}, "
                f"got {tuple(tensors[name].shape)} {tensors[name].dtype}; use the run's own checkpoint"
            )
    ordered = iter([tensors[name].to(tensor.device) for name, tensor in expected.items()])
    return map_memory(lambda _: next(ordered), like)


def named_leaves(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value (None too) of a step state with a path-like name; `state_from_leaves` inverts it.

    A step state is a nest of tuples and dataclasses. A list in it is left out: it holds views of the tensors beside it.
    """
    parts = _named_parts(state)
    if parts is not None:
        for name, part in parts.items():
            yield from named_leaves(part, f"{prefix}/{name}" if prefix else name)
    elif not isinstance(state, list):
        yield prefix, state


@torch.inference_mode()
def state_from_leaves(like: Any, leaves: dict[str, Any]) -> Any:
    """A step state of the form of `like`, which is used up, with the leaves that `named_leaves` gave.

    Args:
        like: a step state of the same model and number of lanes.
        leaves: tensors on the device of `like`, and plain values. Where either is None a tensor may have come or gone.
    Raises:
        UserError: a leaf is missing, left over, or of another type, shape or dtype than in `like`.
    """
    expected = dict(named_leaves(like))
    if expected.keys() != leaves.keys():
        different = ", ".join(sorted(expected.keys() ^ leaves.keys()))
        raise UserError(f"step state: missing or left over: {different}; use the model that it was made with")
    for name, leaf in expected.items():
        if leaf is not None and leaves[name] is not None and _form(leaf) != _form(leaves[name]):
            raise UserError(
                f"step state {name}: expected {_form(leaf)}, got {_form(leaves[name])}; "
                "use the model that it was made with"
            )
    return _rebuild(like, leaves, "")


def _named_parts(nest: Any) -> dict[str, Any] | None:
    """The parts of a container by name; None for a leaf."""
    if isinstance(nest, tuple):
        return dict(zip(map(str, getattr(nest, "_fields", range(len(nest)))), nest, strict=True))
    if dataclasses.is_dataclass(nest):
        return {field.name: getattr(nest, field.name) for field in dataclasses.fields(nest)}
    return None


def _form(leaf: Any) -> str:
    return f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__


def _rebuild(like: Any, leaves: dict[str, Any], prefix: str) -> Any:
    parts = _named_parts(like)
    if parts is None:
        if isinstance(like, list):
            return like
        leaf = leaves[prefix]
        if not isinstance(leaf, Tensor):
            return leaf
        # A new tensor with the strides of `like`: another layout in memory could mean another rounding.
        return (torch.empty_like(like) if isinstance(like, Tensor) else torch.empty_like(leaf)).copy_(leaf)
    made = {name: _rebuild(part, leaves, f"{prefix}/{name}" if prefix else name) for name, part in parts.items()}
    if isinstance(like, tuple):
        return type(like)(*made.values()) if hasattr(like, "_fields") else tuple(made.values())
    for name, value in made.items():
        if isinstance(value, Tensor) and isinstance(parts[name], Tensor):
            parts[name].copy_(value)  # in place: lists beside it hold views of it
        else:
            setattr(like, name, value)
    return like
