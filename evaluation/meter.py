"""What a piece of work takes: seconds, and the peak of memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Cost(NamedTuple):
    """What a restoration took: seconds, and the peak of memory in bytes, None where it cannot be told."""

    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Meter:
    """Measures what single restorations take.

    Attributes:
        device: where they are computed.
        memory: "cuda": what PyTorch had allocated on the GPU at the peak. "process": the peak of the resident
            memory of the whole process; Linux can start it afresh for each measurement, so that no row
            inherits the peak of another. "none": it cannot be told.
    """

    device: torch.device
    memory: Literal["cuda", "process", "none"]

    @classmethod
    def on(cls, device: torch.device) -> "Meter":
        """The meter of a device."""
        if device.type == "cuda":
            return cls(device, "cuda")
        return cls(device, "process" if device.type == "cpu" and _restart_process_peak() else "none")

    def describe(self) -> str:
        """What the peak of memory counts."""
        return {
            "cuda": "allocated by PyTorch on the GPU while restoring; bicubic runs on the CPU",
            "process": "resident memory of the whole process while restoring, all loaded images included",
            "none": "cannot be told on this system",
        }[self.memory]

    def measure(self, work: Callable[[], Tensor]) -> tuple[Tensor, Cost]:
        """Do the work, and give what it gave and what it took."""
        if self.memory == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.memory == "process":
            _restart_process_peak()
        wait_for(self.device)
        start = time.perf_counter()
        result = work()
        wait_for(self.device)
        return result, Cost(time.perf_counter() - start, self._peak())

    def _peak(self) -> int | None:
        if self.memory == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return _process_peak() if self.memory == "process" else None


def wait_for(device: torch.device) -> None:
    """Wait for what was handed to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _restart_process_peak() -> bool:
    """Let the peak of resident memory begin at its present value (Linux, proc(5)); False where that fails."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system, or a locked one
        return False
    return True


def _process_peak() -> int:
    """The peak of resident memory in bytes since it was restarted."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
