"""Which device to compute on, and in which precision, found out by trying rather than by asking the name."""

import faulthandler
import functools
import logging
import os
import time
import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

logger = logging.getLogger(__name__)

DeviceName = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "fp32", "bf16"]

PROBE_SECONDS = 30.0


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
        raise ValueError(f"device {name!r} is not available to PyTorch on this machine; use --device auto")
    return torch.device(name)


def autocast_dtype(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """The dtype to autocast to, or None for float32 throughout.

    "auto" takes bfloat16 on a GPU that computes it natively. On CPUs with AVX512_BF16 a training step of
    this project's UNet took 1.36 times as long in bfloat16 as in float32, so there it is only used when
    asked for; "bf16" insists on it.

    Raises:
        ValueError: bf16 was asked for and cannot be had, or the precision is unknown.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be auto, fp32 or bf16, not {precision!r}")
    if precision == "fp32" or (precision == "auto" and device.type == "cpu"):
        return None
    if _has_bfloat16(device):
        return torch.bfloat16
    if precision == "bf16":
        raise ValueError(f"bf16 is not available on {device.type} here; use auto or fp32")
    return None


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


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of a GPU, of MPS (a plain RuntimeError), or of the CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_bfloat16_works()


@functools.cache
def cpu_bfloat16_works() -> bool:
    """Whether this CPU computes bfloat16 in hardware and survives doing so.

    Some virtual machines announce AMX tiles and then stop the process with SIGILL at the first product. So
    a child process tries; if it dies, oneDNN is held to AVX512_BF16 and another one tries. Call this before
    the process has computed anything in oneDNN, which reads that setting once.
    """
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return False
    if not hasattr(os, "fork"):
        return True
    if _survives_bfloat16():
        return True
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        return False
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
    if _survives_bfloat16():
        logger.info("bfloat16 matrix tiles (AMX) fail on this CPU: using AVX512_BF16")
        return True
    del os.environ["ONEDNN_MAX_CPU_ISA"]
    return False


def _survives_bfloat16() -> bool:
    """Run the bfloat16 operations of a network in a forked child; False if it dies or hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking beside threads
        child = os.fork()
    if child == 0:
        _probe_and_exit()
    deadline = time.monotonic() + PROBE_SECONDS
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return status == 0
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def _probe_and_exit() -> None:
    """Forward and backward through a linear layer, a convolution and attention; never returns."""
    status = 1
    faulthandler.disable()  # dying is an answer here, not a crash to report
    try:
        torch.set_num_threads(1)
        x = torch.ones(2, 64, 8, 8, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.ones(64, 64, 3, 3, dtype=torch.bfloat16, requires_grad=True)
        tokens = F.conv2d(x, weight, padding=1).flatten(2).transpose(1, 2)  # (2, 64, 64)
        tokens = F.linear(tokens, weight[:, :, 0, 0])
        heads = tokens.unflatten(-1, (2, 32)).transpose(1, 2)
        F.scaled_dot_product_attention(heads, heads, heads).float().mean().backward()
        status = 0
    finally:
        os._exit(status)
