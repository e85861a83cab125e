"""Writes the checkpoints of a run, in a folder that it alone writes to, and its log for TensorBoard."""

import errno
import itertools
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from engine.checkpoint import save_checkpoint
from engine.packages import IMPORT_ERRORS
from imaging.atomic import UNSUPPORTED

logger = logging.getLogger(__name__)


class RunFiles:
    """A run's checkpoints, in a folder of its own; `record`, with a dict per kind of options, is in each."""

    def __init__(self, checkpoint_dir: Path, log_dir: Path, name: str, record: Mapping[str, object]) -> None:
        self.checkpoint_dir, self.log_dir, self.name, self.record = checkpoint_dir, log_dir, name, record
        self.best, self.last = (checkpoint_dir / f"{name}_{kind}.pth" for kind in ("best", "last"))

    def numbered(self) -> list[Path]:
        """List the numbered checkpoints, by step."""
        return sorted(self.checkpoint_dir.glob(f"{self.name}_step*.pth"))

    def save_best(self, content: dict[str, object]) -> None:
        save_checkpoint(self.best, {**self.record, **content})

    def save_last(self, content: dict[str, object], step: int, keep: int) -> None:
        """Write a numbered one, also named `last`; the `keep` newest are kept."""
        path = self.checkpoint_dir / f"{self.name}_step{step:09d}.pth"
        save_checkpoint(path, {**self.record, **content})
        _link(self.last, path)
        # Files of later steps are of a branch that was abandoned by going back.
        earlier = [other for other in self.numbered() if other.name <= path.name]
        for other in set(self.numbered()) - set(earlier[-keep:]):
            other.unlink()


def _link(name: Path, target: Path) -> None:
    """Let the name mean the target, in one step."""
    link = name.with_name(f".{name.name}.tmp")
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(target)
    except OSError:  # a file system without hard links
        shutil.copyfile(target, link)
    link.replace(name)


def new_folder(parent: Path, name: str) -> Path:
    """Make a folder `name`, or `name-2` and so on where there is one; OSError: it cannot be."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, cleared of half-written files; ValueError if another run holds it."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{folder} is in use by another run: wait for it, or start a new one") from error
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOLCK) not in UNSUPPORTED:  # such as NFS or Lustre say
            raise
        logger.warning("%s cannot be locked (%s): a second run there would not be noticed", folder, error)
    try:
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        yield
    finally:
        lock.release()


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
