"""Decoded images as memory-mapped files: a crop reads only the pixels it needs."""

import hashlib
import logging
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from imaging.atomic import write_atomically
from imaging.files import read_rgb

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

_PREFIX, _LOCK = "decoded-images-", "lock"


class CachedReader:
    """Decodes a file once for all processes, as long as it stays the same; keeps up to `limit_bytes`."""

    def __init__(self, limit_bytes: int, read: Callable[[Path], npt.NDArray[np.uint8]] = read_rgb) -> None:
        if limit_bytes < 0:
            raise ValueError(f"the cache may not have a negative size, such as {limit_bytes} bytes")
        self.limit_bytes, self.read = limit_bytes, read
        # shared by the processes: bytes used, and whether the disk refused more
        self._state = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._folder: Path | None = None
        try:
            self._folder = _own_folder(self) if limit_bytes else None
        except OSError as error:
            self._give_up(error)

    def __call__(self, path: Path) -> npt.NDArray[np.uint8]:
        """(H, W, 3) uint8, read-only if kept; OSError or UnreadableImageError."""
        status = path.stat()
        if self._folder is None:
            return self.read(path)
        identity = os.fsencode(f"{path.resolve()}|{status.st_mtime_ns}|{status.st_size}")
        kept = self._folder / f"{hashlib.sha256(identity).hexdigest()}.npy"
        try:
            mapped: npt.NDArray[np.uint8] = np.load(kept, mmap_mode="r")
            return mapped
        except (OSError, ValueError):  # not there, or removed by a cleaner of temporary files
            pixels = self.read(path)
        used, refused = self._state.tolist()
        if not refused and used + pixels.nbytes <= self.limit_bytes:
            self._state[0] += pixels.nbytes
            try:
                write_atomically(kept, lambda stream: np.save(stream, pixels))  # never half a file
            except OSError as error:
                self._state[0] -= pixels.nbytes
                self._give_up(error)
        return pixels

    def _give_up(self, error: OSError) -> None:
        if not self._state[1]:
            self._state[1] = 1
            logger.warning(
                "no more decoded images are kept (%s in %s): set TMPDIR to a larger disk, or allow less",
                *(error.strerror or error, self._folder or "the temporary folder"),
            )


def _own_folder(owner: object) -> Path:
    """Goes with its owner; abandoned ones are removed."""
    # Every process that uses a folder holds a lock in it, which ends with the last of them however it ends.
    # Windows has no such locks: what a killed run left there stays.
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*") if sys.platform != "win32" else ():
        lock = _lock(folder / _LOCK, os.O_RDWR)
        if lock is not None:
            _remove(folder, lock, os.getpid())
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = _lock(folder / _LOCK, os.O_CREAT | os.O_RDWR)
        if lock is not None:  # else another process took it for abandoned
            weakref.finalize(owner, _remove, folder, lock, os.getpid())
            return folder


def _remove(folder: Path, lock: int, maker: int) -> None:
    if os.getpid() == maker:  # a forked worker leaves it to the process that made it
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(path: Path, flags: int) -> int | None:
    """None where another process holds it."""
    lock = None
    try:
        lock = os.open(path, flags, 0o600)
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except (FileNotFoundError, NotADirectoryError, PermissionError, BlockingIOError):
        if lock is not None:
            os.close(lock)
        return None
