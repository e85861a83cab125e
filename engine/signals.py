"""Signals as a request to stop: after the step, or at once as an exception."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

# Ctrl-C; the end of a job; a closed terminal; SLURM's warning before the time limit.
STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
Handler = Callable[[int, FrameType | None], object]


class Stopped(BaseException):
    """A signal, its argument, asked to stop."""


@contextlib.contextmanager
def handled_by(handler: Handler | signal.Handlers) -> Iterator[None]:
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
