"""What outlives a run: its checkpoints and its TensorBoard log."""

import itertools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from engine.checkpoint import save_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFiles:
    """A run's checkpoints, in a folder of its own; `record`, with a dict per kind of options, is in each."""

    checkpoint_dir: Path
    log_dir: Path
    name: str
    record: Mapping[str, object] = field(default_factory=dict)

    @property
    def best(self) -> Path:
        return self.checkpoint_dir / f"{self.name}_best.pth"

    @property
    def last(self) -> Path:
        return self.checkpoint_dir / f"{self.name}_last.pth"

    def numbered(self) -> list[Path]:
        """By step."""
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
    """In one step."""
    with tempfile.TemporaryDirectory(dir=name.parent, prefix=".link-") as folder:
        link = Path(folder) / name.name
        try:
            link.hardlink_to(target)
        except OSError:  # a file system without hard links
            shutil.copyfile(target, link)
        link.replace(name)


def new_folder(parent: Path, name: str) -> Path:
    """`name`, or `name-2` and so on."""
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if not folder.is_dir():
                raise
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, cleared of half-written files; ValueError if another run holds it."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{folder} is in use by another run: wait for its end, or start a new run"
        ) from error
    try:
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        for leftover in folder.glob(".link-*"):
            shutil.rmtree(leftover)
        yield
    finally:
        lock.release()


class RunLogger:
    """TensorBoard's log, hidden beyond `step`; where it cannot be written, it ends with a warning."""

    def __init__(self, log_dir: Path, is_main: bool, step: int, record: Mapping[str, object]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second that only training needs

        self._writer: SummaryWriter | None = None
        if is_main:
            with self._warning_once():
                self._writer = SummaryWriter(str(log_dir), purge_step=step + 1 if step else None)
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
        except OSError as error:  # a full disk ends the log, and not the run
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
