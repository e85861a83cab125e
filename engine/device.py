"""Devices and precisions."""

import contextlib
import errno
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from engine.options import OptionError, Options, option

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class ComputingOptions(Options):
    """Says what to compute on, and in which numbers."""

    device: str = option("auto", "device: auto, cpu, mps, cuda or one such as cuda:1", fixed=False)
    precision: Precision = option("auto", "number format; auto: bf16 where the device has it", fixed=False)


def select_device(name: str = "auto") -> torch.device:
    """Choose the device of a name; "auto" is CUDA, then MPS, then the CPU. OptionError: there is none."""
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind in count if count[kind]))
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
        if (device.index or 0) < count.get(device.type, 0):
            return device
    there = ", ".join(kind for kind in count if count[kind])
    raise OptionError("device", name, f"give auto, or of what this machine has: {there}")


def autocast_dtype(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """Choose what to autocast to, None for float32; "auto" is bfloat16 where the device has it natively.

    OptionError for what cannot be had.
    """
    if precision not in get_args(Precision):
        raise OptionError("precision", precision, f"give one of {', '.join(get_args(Precision))}")
    if precision in ("fp32", "fp16"):
        return None if precision == "fp32" else torch.float16
    native = _has_bfloat16(device)
    if precision == "bf16" and not native and device.type != "cpu":
        raise OptionError("precision", precision, f"{device.type} here lacks it: give auto, fp16 or fp32")
    return torch.bfloat16 if native or precision == "bf16" else None


def _has_bfloat16(device: torch.device) -> bool:
    """Tell whether products in bfloat16 are faster than in float32, and safe."""
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        # Virtual machines that announce AMX without having it end with SIGILL. ATEN_CPU_CAPABILITY may hold
        # torch to older instructions than the CPU has, and bfloat16 is a hundred times slower with those.
        used = torch.backends.cpu.get_cpu_capability()
        return used.startswith("AVX512") and bool(has.get("avx512_bf16")) and not has.get("amx_tile")
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def tune_for_training(device: torch.device) -> None:
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def default_workers(device: torch.device, world_size: int) -> int:
    """Processes that read images: 0 on a CPU, which has no time to spare, else up to 8, by the cores."""
    if device.type == "cpu":
        return 0
    # SLURM and taskset give a job a part of the machine; torchrun says how many processes share it.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what it was asked to compute."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # of mapping a file
    # CUDA has a class for it, other devices a RuntimeError of these words.
    words = ("out of memory", "can't allocate memory")
    said = isinstance(error, RuntimeError) and any(one in str(error) for one in words)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)
