"""What outlives a run: its checkpoints and its TensorBoard log."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from engine.checkpoint import save_checkpoint
from engine.options import Plain


@dataclass(frozen=True)
class RunFiles:
    """The checkpoints of one run.

    Attributes:
        checkpoint_dir, log_dir: of this run alone.
        name: checkpoints are `{name}_best.pth` and `{name}_last.pth`.
        sections: what every checkpoint holds besides the state: sections of plain values, by name.
    """

    checkpoint_dir: Path
    log_dir: Path
    name: str
    sections: Mapping[str, dict[str, Plain]] = field(default_factory=dict)

    @property
    def best(self) -> Path:
        """Path of the checkpoint with the highest validation PSNR."""
        return self.checkpoint_dir / f"{self.name}_best.pth"

    @property
    def last(self) -> Path:
        """Path of the newest checkpoint."""
        return self.checkpoint_dir / f"{self.name}_last.pth"

    def numbered(self) -> list[Path]:
        """The checkpoints that are kept by step, the lowest step first."""
        return sorted(self.checkpoint_dir.glob(f"{self.name}_step*.pth"))

    def save_best(self, content: dict[str, object]) -> None:
        """Write the best checkpoint, atomically."""
        save_checkpoint(self.best, {**self.sections, **content})

    def save_last(self, content: dict[str, object], step: int, keep: int) -> None:
        """Write a numbered checkpoint, make `last` a name of it, and keep the `keep` newest.

        Files of later steps are of a branch that was abandoned by going back: they go first.
        """
        path = self.checkpoint_dir / f"{self.name}_step{step:09d}.pth"
        save_checkpoint(path, {**self.sections, **content})
        _link(self.last, path)
        earlier = [other for other in self.numbered() if other.name <= path.name]
        for other in set(self.numbered()) - set(earlier[-keep:]):
            other.unlink()


def _link(name: Path, target: Path) -> None:
    """Make name a second name of target in one step: a hard link, or a copy where there are none."""
    with tempfile.TemporaryDirectory(dir=name.parent, prefix=".link-") as folder:
        link = Path(folder) / name.name
        try:
            link.hardlink_to(target)
        except OSError:
            shutil.copyfile(target, link)
        link.replace(name)


class RunLogger:
    """The TensorBoard log of a run; writes nothing unless this is the main process.

    Args:
        log_dir: receives the events.
        is_main: whether this process writes.
        step: the step the run begins at; what a killed run logged beyond it is hidden.
        sections: settings, shown as text and in the table of runs.
    """

    def __init__(
        self, log_dir: Path, is_main: bool, step: int, sections: Mapping[str, dict[str, Plain]]
    ) -> None:
        self._settings = {
            f"{section}/{name}": value
            for section, values in sections.items()
            for name, value in values.items()
        }
        self._writer = SummaryWriter(str(log_dir), purge_step=step + 1 if step else None) if is_main else None
        if self._writer is not None:
            rows = [f"| {name} | {value} |" for name, value in self._settings.items()]
            self._writer.add_text("configuration", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Name -> value."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def images(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Name -> (3, H, W) in [0, 1]."""
        if self._writer is not None:
            for name, image in values.items():
                self._writer.add_image(name, image, step)

    def bars(self, step: int, values: Mapping[str, tuple[list[float], list[float]]]) -> None:
        """Name -> (right edges, heights) of a histogram."""
        if self._writer is not None:
            for name, (edges, heights) in values.items():
                total = sum(heights)
                self._writer.add_histogram_raw(
                    name, 0.0, edges[-1], total, total, total, edges, heights, global_step=step
                )

    def flush(self) -> None:
        """Let a viewer see what was written so far."""
        if self._writer is not None:
            self._writer.flush()

    def finish(self, step: int, found: Mapping[str, float]) -> None:
        """Enter the run, its settings and what came of it into the table of hyper-parameters."""
        if self._writer is None:
            return
        settings = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in self._settings.items()
        }
        self._writer.add_hparams(settings, dict(found), run_name=".", global_step=step)


@contextmanager
def profiled(wanted: bool, log_dir: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Trace steps 6 to 10, when memory is allocated already; gives what is to be called after each step."""
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
