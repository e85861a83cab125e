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
    """The device of that name; "auto": CUDA, then MPS, then the CPU; ValueError if it is missing."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    kind = name.split(":", maxsplit=1)[0]
    if kind not in available:
        raise ValueError(f"device must be auto, cuda, mps or cpu, not {name!r}")
    if not available[kind]:
        raise ValueError(f"device {name!r} is not available to PyTorch on this machine; use auto")
    return torch.device(name)


def autocast_dtype(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """The dtype to autocast to, None for float32; "auto": bfloat16 where a GPU has it natively.

    ValueError for an unknown precision, or bf16 that cannot be had.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be auto, fp32 or bf16, not {precision!r}")
    if precision == "fp32":
        return None
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return torch.bfloat16 if native else None
    if native or device.type == "cpu":  # virtual machines that announce AMX without having it end with SIGILL
        return torch.bfloat16
    raise ValueError(f"bf16 is not available on {device.type} here; use auto or fp32")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # of mapping a file
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # CUDA has a class for it; the CPU and MPS have words.
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(one in str(error) for one in words)


def compile_network(network: nn.Module, device: torch.device) -> bool:
    """Compile in place; False, with a warning, where there is no working compiler."""
    try:
        torch.compile(torch.square)(torch.ones(16, device=device))
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("torch.compile does not work here, going on without it: %s", reason)
        return False
    network.compile(dynamic=False)
    return True
