"""One training run in many processes, one per device, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.device import select_device

NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # by torch.distributed, from torchrun


@dataclass(frozen=True)
class Processes:
    """This process among all `world_size` of the run; `rank` counts from 0."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, logs and messages."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; every one must call it."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


def _world_size() -> int:
    """How many torchrun started; 1 without it."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"WORLD_SIZE is {given!r}: it must be a number of processes; torchrun sets it")
    missing = [name for name in NEEDED if name not in os.environ]
    if int(given) > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE is {given} without {', '.join(missing)}: start with torchrun, or unset WORLD_SIZE"
        )
    return int(given)


@contextmanager
def started_processes(device_name: str) -> Iterator[Processes]:
    """Join the other processes (CPUs by gloo, CUDA by NCCL); alone without torchrun.

    Raises:
        ValueError: the device is missing, or cannot be shared by processes.
    """
    world_size = _world_size()
    device = select_device(device_name)
    if world_size == 1:
        yield Processes(device)
        return
    if device.type == "mps":
        raise ValueError("several processes cannot train on mps: use --device cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device, dist.get_rank(), world_size)
    finally:
        dist.destroy_process_group()
