"""Timing in turns, so that a slow minute of the machine hits all contenders."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from engine.device import synchronize

LONGEST = 60.0  # seconds after which no further round begins


class Timing(NamedTuple):
    """Seconds over the rounds."""

    median: float
    low: float
    high: float

    def rate(self, amount: float) -> str:
        """Show an amount of work per second: the median, then the range."""
        return f"{amount / self.median:.3g} ({amount / self.high:.3g} to {amount / self.low:.3g})"

    def seconds(self, factor: float = 1.0) -> str:
        return f"{factor * self.median:.3g} ({factor * self.low:.3g} to {factor * self.high:.3g})"


def in_turns(
    works: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, Timing]:
    """Do every piece of work once per round, after a warm-up; fewer rounds where they take LONGEST."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    begun = time.perf_counter()
    for number in range(warm_up + rounds):
        if number > warm_up and time.perf_counter() - begun > LONGEST:
            break
        for name, work in works.items():
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing(statistics.median(each), min(each), max(each)) for name, each in seconds.items()}
