"""One run in many processes, one per device, as torchrun starts them, and the signals that stop them.

A signal is a request to stop: after the step, or at once as an exception.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.device import select_device

T = TypeVar("T")
NEEDED = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}  # by torch.distributed, from torchrun
# Ctrl-C; the end of a job; a closed terminal; SLURM's warning before the time limit.
STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)


class RunError(RuntimeError):
    """The run ended for want of data, of finite numbers or of another process: one line says why."""


class LostProcessError(RunError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class Processes:
    """This process among all of the run."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up in place; every process must call it. LostProcessError: one of them has ended."""
        self._together(dist.all_reduce, values)
        return values

    def any(self, here: bool) -> bool:
        """Tell whether it is so in one of the processes; every process must call it."""
        return here if self.world_size == 1 else bool(self.sum(torch.tensor(float(here), device=self.device)))

    def sum_gradients(self, network: nn.Module) -> None:
        """Add up the gradients of all processes, 0 where one has none."""
        # Once a step and all together. DistributedDataParallel would begin within the last backward pass, but
        # it takes one network and one backward pass of all processes each time.
        if self.world_size == 1:
            return
        parameters = [one for one in network.parameters() if one.requires_grad]
        for one in parameters:
            one.grad = torch.zeros_like(one) if one.grad is None else one.grad
        gradients = [cast(Tensor, one.grad) for one in parameters]
        summed = self.sum(torch.cat([one.flatten() for one in gradients]))
        for gradient, part in zip(gradients, summed.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape))

    def share(self, network: nn.Module) -> None:
        """Give every process the weights and buffers of the main one."""
        for value in network.state_dict().values():
            self._together(dist.broadcast, value, 0)

    def gather(self, value: T) -> list[T]:
        """List the values by rank; every process must call it."""
        values = [value] * self.world_size
        self._together(dist.all_gather_object, values, value)
        return values

    def _together(self, collective: Callable[..., object], *inputs: object) -> None:
        try:
            if self.world_size > 1:
                collective(*inputs)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise LostProcessError(f"another process of the run has ended ({reason})") from error


@contextmanager
def started_processes(device_name: str, patience: timedelta | None = None) -> Iterator[Processes]:
    """Join the others (CPUs by gloo, CUDA by NCCL); alone without torchrun.

    `patience`: how long to wait for each other. ValueError: a device that is missing or cannot be shared.
    """
    world_size, device = os.environ.get("WORLD_SIZE", "1"), select_device(device_name)
    if world_size == "1":
        yield Processes(device)
        return
    if not (world_size.isdecimal() and os.environ.keys() >= NEEDED):
        remedy = f"torchrun sets it, and {', '.join(sorted(NEEDED))}: start with it, or unset it"
        raise ValueError(f"WORLD_SIZE is {world_size!r}; {remedy}")
    if device.type == "mps":
        raise ValueError("several processes cannot share mps: use --device cpu")
    if device.type == "cuda":
        device = select_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    with handled_by(signal.SIG_DFL):  # the wait for the others is not in Python, which could heed a signal
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        yield Processes(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class Stopped(BaseException):
    """A signal, its argument, asked to stop."""


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> Iterator[None]:
    """Let the handler have the signals that ask to stop; outside the main thread nothing can have them."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    # A signal that the parent ignores, as nohup does SIGHUP, stays ignored.
    heeded = [number for number in STOPPING if in_main_thread and signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Raise Stopped, as a handler; a second signal ends the process at once."""
    for one in STOPPING:
        if signal.getsignal(one) == stop:
            signal.signal(one, signal.SIG_DFL)
    raise Stopped(number)


def leave_stopping_to_the_parent(worker: int) -> None:
    """Ignore the signals, as DataLoader's worker_init_fn."""
    # Signals reach the whole process group, and the main process decides.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
