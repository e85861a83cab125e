"""Which device to compute on, and in which precision."""

import errno
import logging
from typing import Literal

import torch
from torch import nn

logger = logging.getLogger(__name__)

DeviceName = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "fp32", "bf16"]


def select_device(name: str = "auto") -> torch.device:
    """The device a name stands for; "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        ValueError: the device is not one of the names, or not to be had on this machine.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    kind = name.split(":", maxsplit=1)[0]
    if kind not in available:
        raise ValueError(f"device must be auto, cuda, mps or cpu, not {name!r}")
    if not available[kind]:
        raise ValueError(f"device {name!r} is not available to PyTorch on this machine; use auto")
    return torch.device(name)


def autocast_dtype(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """The dtype to autocast to, or None for float32 throughout.

    "auto" takes bfloat16 on a GPU that computes it natively, and float32 elsewhere. "bf16" on a CPU is at the
    caller's risk: it may be slow, and virtual machines that announce AMX without having it end with SIGILL.

    Raises:
        ValueError: bf16 was asked for and cannot be had, or the precision is unknown.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be auto, fp32 or bf16, not {precision!r}")
    if precision == "fp32":
        return None
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return torch.bfloat16 if native else None
    if native or device.type == "cpu":
        return torch.bfloat16
    raise ValueError(f"bf16 is not available on {device.type} here; use auto or fp32")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA has a class for it, the CPU and MPS have words."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # of mapping a file
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(one in str(error) for one in words)


def compile_network(network: nn.Module, device: torch.device) -> bool:
    """Compile a network in place with torch.compile, once for each shape it meets.

    Compiling takes a minute or more on a CPU. Where there is no working compiler a warning says so, and the
    network stays as it is.

    Returns:
        Whether it will be compiled.
    """
    try:
        torch.compile(torch.square)(torch.ones(16, device=device))
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("torch.compile does not work here, going on without it: %s", reason)
        return False
    network.compile(dynamic=False)
    return True
