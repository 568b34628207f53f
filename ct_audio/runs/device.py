"""Where a program computes: CPU or CUDA, and how many threads."""

import torch

from ct_audio.common.errors import UserError


def choose_device(name: str, *, local_rank: int = 0) -> torch.device:
    """The device of this process.

    Args:
        name: "auto" (CUDA where there is one), "cpu" or "cuda".
        local_rank: the number of its CUDA device; where there are more processes than devices, they share them in turn.
    Raises:
        UserError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device cuda: this machine has no usable CUDA device; use --device cpu (in training train.device=cpu)"
        )
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", device_number(local_rank))
    return torch.device("cpu")


def device_number(local_rank: int) -> int:
    return local_rank % torch.cuda.device_count()


def set_up_device(name: str, *, num_threads: int) -> torch.device:
    """The device of a tool that works alone, where float32 means float32 from now on.

    Args:
        name: as in `choose_device`.
        num_threads: CPU threads; 0: torch's default.
    Raises:
        UserError: CUDA is asked for and there is none.
    """
    device = choose_device(name)
    if num_threads:
        torch.set_num_threads(num_threads)
    torch.backends.cudnn.allow_tf32 = False
    return device
