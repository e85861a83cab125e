"""Writes what TensorBoard shows of a run: curves, pictures, settings, and a trace."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.packages import IMPORT_ERRORS

logger = logging.getLogger(__name__)


class RunLogger:
    """Writes TensorBoard's log, from `step` on; where it cannot be written, it ends with a warning."""

    def __init__(self, log_dir: Path, is_main: bool, step: int, record: Mapping[str, object]) -> None:
        self._writer: Any = None
        self._errors: tuple[type[Exception], ...] = IMPORT_ERRORS
        if not is_main:
            return
        with self._warning_once():
            from tensorboard.compat import tf
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(log_dir), purge_step=step + 1 if step else None)
            self._errors = (OSError, tf.errors.OpError)  # TensorFlow, where it is installed, writes the files
        sections = {name: values for name, values in record.items() if isinstance(values, dict)}
        rows = [f"| {name}/{key} | {sections[name][key]} |" for name in sections for key in sections[name]]
        self._write("add_text", "configuration", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def close(self) -> None:
        self._write("close")

    def add(self, kind: str, group: str, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Write by name what TensorBoard calls "scalar", or "image", (3, H, W) in [0, 1]."""
        for name, value in values.items():
            self._write(f"add_{kind}", f"{group}/{name}", value, step)

    def flush(self) -> None:
        self._write("flush")

    def _write(self, method: str, *values: object) -> None:
        with self._warning_once():
            if self._writer is not None:
                getattr(self._writer, method)(*values)

    @contextmanager
    def _warning_once(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:  # a full disk ends the log, and not the run
            self._writer = None
            logger.warning("the log is not written any more, training goes on: %s", error)


def tracer(log_dir: Path) -> torch.profiler.profile:
    """Make a profiler that traces steps 6 to 10 of those it is told of."""
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=3, warmup=2, active=5, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(log_dir)),
        record_shapes=True,
    )
