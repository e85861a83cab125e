"""Writes what TensorBoard shows of a run: curves, pictures, settings, and a trace."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.packages import import_optional

logger = logging.getLogger(__name__)


class RunLogger:
    """Writes TensorBoard's log, from `step` on; where it cannot be written, it ends with a warning."""

    def __init__(self, log_dir: Path, is_main: bool, step: int, record: Mapping[str, object]) -> None:
        self._writer: Any = None
        self._errors: tuple[type[Exception], ...] = (OSError,)
        tensorboard = import_optional("torch.utils.tensorboard", "no curves are logged") if is_main else None
        if tensorboard is not None:
            from tensorboard.compat import tf

            self._errors = (OSError, tf.errors.OpError)  # TensorFlow, where it is installed, writes the files
            with self._warning_once():
                self._writer = tensorboard.SummaryWriter(str(log_dir), purge_step=step + 1 if step else None)
        rows = [
            f"| {section}/{name} | {value} |"
            for section, values in record.items()
            if isinstance(values, dict)
            for name, value in values.items()
        ]
        table = "\n".join(["| setting | value |", "|---|---|", *rows])
        self._write("add_text", "configuration", table)

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self._write("close")

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write("add_scalar", f"{group}/{name}", value, step)

    def images(self, group: str, step: int, values: Mapping[str, Tensor]) -> None:
        """Write images (3, H, W) in [0, 1] by name."""
        for name, image in values.items():
            self._write("add_image", f"{group}/{name}", image, step)

    def bars(self, group: str, step: int, values: Mapping[str, tuple[list[float], list[float]]]) -> None:
        """Write histograms by name, as right edges and heights."""
        for name, (edges, heights) in values.items():
            total = sum(heights)
            numbers = (0.0, edges[-1], total, total, total, edges, heights)
            self._write("add_histogram_raw", f"{group}/{name}", *numbers, step)

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


@contextmanager
def profiled(wanted: bool, log_dir: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Trace steps 6 to 10; gives what to call after each step."""
    if not wanted:
        yield lambda: None
        return
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[kinds.CPU, kinds.CUDA] if device.type == "cuda" else [kinds.CPU],
        schedule=torch.profiler.schedule(wait=3, warmup=2, active=5, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(log_dir)),
        record_shapes=True,
    ) as profile:
        yield profile.step
