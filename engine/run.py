"""The checkpoints of a run, in a folder that it alone writes to."""

import errno
import itertools
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from engine.checkpoint import save_checkpoint
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
