"""Signals as a request to stop after the step."""

import logging
import signal
from collections.abc import Callable
from types import FrameType

logger = logging.getLogger(__name__)

# Ctrl-C; the end of a job; a closed terminal; SLURM's warning before the time limit.
STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)


class StopSignals:
    """Notes the first as `received`; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOPPING:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            logger.warning("%s: finishing the step, then saving", signal.Signals(number).name)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


def leave_stopping_to_the_parent(worker: int) -> None:
    """DataLoader's worker_init_fn."""
    # Signals reach the whole process group, and the main process decides.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
