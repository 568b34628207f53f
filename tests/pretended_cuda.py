"""Tensors that say they are on a CUDA device and hold their numbers on the CPU: results are exact, the place is not.

Operations on tensors of both places raise, as they would on a GPU, and what would make the CPU wait for the device is
noted. (torch's fake tensors know places too, but no backward pass on a machine without CUDA, and no numbers.)
"""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
_READS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal"}
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Waits:
    """What would have waited for the device, and where; in an `allowed` block nothing is noted."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._depth = 0

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def note(self, what: str) -> None:
        if not self._depth:
            frames = [frame for frame in traceback.extract_stack() if "/ct_audio/" in frame.filename]
            self.found[what] = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "in the test"


waits = Waits()


class PretendedCuda(Tensor):
    """A wrapper; autograd sees the wrapper, its operations see what is inside."""

    inner: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "PretendedCuda":
        made = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendedCuda({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        _check_places(function, name, args, kwargs or {}, given)
        if name in _READS or function.namespace == "ct_audio":  # our own operations compute on the CPU
            waits.note(name)

        def bare(leaf: Any) -> Any:
            return leaf.inner if isinstance(leaf, cls) else leaf

        result = function(*tree_map(bare, args), **tree_map(bare, kwargs or {}))
        known = {id(bare(tensor)): tensor for tensor in given}  # what is worked on in place stays itself

        def dressed(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return known[id(leaf)] if id(leaf) in known else cls(leaf)

        return tree_map(dressed, result)


def _check_places(function: Any, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> None:
    strangers = [tensor for tensor in given if tensor.dim() and not isinstance(tensor, PretendedCuda)]
    if name in _INDEXES:
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, PretendedCuda) for index in indices):
            waits.note(f"{name} with indices that are on the CPU")
        scalar = name != "index" and args[2].numel() == 1
        if not scalar and any(index.dtype == torch.bool for index in indices):
            waits.note(f"{name} with a mask")
        strangers = [tensor for tensor in strangers if all(tensor is not index for index in indices)]
    if name in ("copy_", "_to_copy"):
        if strangers and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            waits.note(f"{name} from or to the CPU")
        return
    if (
        torch._C._current_autograd_node() is not None
    ):  # its zeros for a gradient that there is none of: C++ sees the CPU
        strangers = [tensor for tensor in strangers if tensor.any()]
    if function.namespace != "ct_audio" and strangers:
        raise RuntimeError(f"{name}: a CPU tensor of shape {tuple(strangers[0].shape)} among CUDA tensors")


class _Places(TorchFunctionMode):
    """Factories with a device, `.to`, `.cpu`, `.numpy`, `.tolist`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        own = bool(args) and isinstance(args[0], PretendedCuda)
        if own and name in ("numpy", "__array__") and not kwargs.get("force"):
            raise TypeError("can't convert a CUDA tensor to numpy")
        if own and name in ("numpy", "cpu", "tolist"):
            waits.note(name)
            inner = args[0].detach().inner.clone()
            return inner if name == "cpu" else getattr(inner, name)()
        if name == "to":
            return _to(function, args, kwargs)
        place = kwargs.pop("device", None)
        made = function(*args, **kwargs)
        if place is None or torch.device(place).type == "cpu" or not isinstance(made, Tensor):
            return made
        if name in ("tensor", "as_tensor"):
            waits.note(f"{name} of numbers of the CPU")
        return made if isinstance(made, PretendedCuda) else PretendedCuda(made.detach())


def _to(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    rest, place = [], kwargs.pop("device", None)
    for argument in args[1:]:
        if isinstance(argument, str | torch.device):
            place = torch.device(argument)
        elif isinstance(argument, Tensor):
            place, rest = argument.device, [*rest, argument.dtype]
        else:
            rest.append(argument)
    non_blocking, copies = kwargs.pop("non_blocking", False), kwargs.get("copy", False)
    tensor = function(args[0], *rest, **kwargs) if rest or kwargs else args[0]
    own = isinstance(tensor, PretendedCuda)
    if place is None or (torch.device(place).type == "cuda") == own:
        return tensor
    if own or not non_blocking:
        waits.note("to the CPU" if own else "to the device, blocking")
    if own:
        return tensor.detach().inner.clone()  # type: ignore[attr-defined]
    return PretendedCuda(tensor.detach().clone() if not copies else tensor.detach())


def to_cuda(module: Any) -> Any:
    """A module whose parameters and buffers are moved, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, PretendedCuda):
                moved = PretendedCuda(parameter.detach())
                part._parameters[name] = _shared(parameter, moved)
        for name, buffer in part._buffers.items():
            part._buffers[name] = PretendedCuda(buffer) if buffer is not None else None
    return module


def _shared(parameter: nn.Parameter, moved: Tensor) -> nn.Parameter:
    """One parameter for each, so that those that are tied stay so."""
    if not hasattr(parameter, "_moved"):
        parameter._moved = nn.Parameter(moved, requires_grad=parameter.requires_grad)  # type: ignore[attr-defined]
    return parameter._moved  # type: ignore[attr-defined]


def _group(tensors: Any, *arguments: Any) -> Any:
    """torch's groups by device and type, which in C++ are those of what is inside."""
    found = _GROUP(tensors, *arguments)
    own = isinstance(tensors[0][0], PretendedCuda)
    return {(CUDA if own else device, dtype): group for (device, dtype), group in found.items()}


_GROUP = clip_grad._group_tensors_by_device_and_dtype


@contextlib.contextmanager
def pretended() -> Iterator[Waits]:
    """Within it there is a CUDA device, also for `module.to`."""
    move = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        places = [part for part in (*args, *kwargs.values()) if isinstance(part, str | torch.device)]
        rest = [part for part in args if isinstance(part, torch.dtype)]
        module = move(module, rest[0]) if rest else module
        return to_cuda(module) if any(torch.device(place).type == "cuda" for place in places) else module

    def enter(mode: torch.inference_mode) -> None:  # which knows no wrappers
        mode._pretended = torch.set_grad_enabled(torch.is_grad_enabled() and not mode.mode)  # type: ignore[attr-defined]

    def leave(mode: torch.inference_mode, *_: Any) -> None:
        mode._pretended.__exit__(None, None, None)  # type: ignore[attr-defined]

    waits.found = {}
    with pytest.MonkeyPatch.context() as patch, _Places():
        patch.setattr(nn.Module, "to", to)
        patch.setattr(torch.inference_mode, "__enter__", enter)
        patch.setattr(torch.inference_mode, "__exit__", leave)
        patch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", _group)
        yield waits
