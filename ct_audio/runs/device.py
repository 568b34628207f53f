"""Where a program computes: CPU or CUDA, and how many threads."""

import torch

from ct_audio.common.errors import UserError

MAX_THREADS = 1024
"""Far more stall the machine."""


def choose_device(name: str, *, local_rank: int = 0) -> torch.device:
    """The device of this process.

    Args:
        name: "auto" (CUDA where there is one), "cpu" or "cuda".
        local_rank: the number of its CUDA device among those of this machine.
    Raises:
        UserError: CUDA is asked for and there is none, or there are more processes than devices.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device cuda: this machine has no usable CUDA device; use --device cpu (in training train.device=cpu)"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():  # NCCL refuses two processes on one device
        raise UserError(
            f"device {name}: process {local_rank + 1} of this machine, which has {torch.cuda.device_count()} CUDA "
            "devices; start one process a device (--nproc-per-node), or train on the CPU with train.device=cpu"
        )
    return torch.device("cuda", local_rank)


def set_up_device(name: str, *, num_threads: int) -> torch.device:
    """The device of a tool that works alone, where float32 means float32 from now on.

    Args:
        name: as in `choose_device`.
        num_threads: CPU threads, at most MAX_THREADS; 0: torch's default.
    Raises:
        UserError: CUDA is asked for and there is none, or the number of threads is beyond its bounds.
    """
    device = choose_device(name)
    if not 0 <= num_threads <= MAX_THREADS:
        raise UserError(f"threads: expected 0 (torch's default) to {MAX_THREADS}, got {num_threads}")
    if num_threads:
        torch.set_num_threads(num_threads)
    torch.backends.cudnn.allow_tf32 = False
    return device
