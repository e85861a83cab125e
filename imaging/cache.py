"""Decoded images kept on disk as memory-mapped arrays, so that a crop reads only the pixels it needs."""

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
    """files.read_rgb that decodes a file once; worker processes share what any of them decoded.

    The arrays live in a temporary folder that goes with the object; folders of runs that were killed are
    removed. A file that changes is decoded again. Where the disk is full, or too small, a warning says so
    once, and what is not kept is decoded at every reading.

    Args:
        limit_bytes: at most this much disk; images beyond it are decoded at every reading.
        read: path -> (H, W, 3) uint8.
    """

    def __init__(self, limit_bytes: int, read: Callable[[Path], npt.NDArray[np.uint8]] = read_rgb) -> None:
        if limit_bytes < 0:
            raise ValueError(f"the cache may not have a negative size, such as {limit_bytes} bytes")
        self.limit_bytes = limit_bytes
        self.read = read
        # shared by the processes: bytes used, and whether the disk refused more
        self._state = torch.zeros(2, dtype=torch.int64)
        self._state.share_memory_()
        self._folder: Path | None = None
        if limit_bytes:
            try:
                self._folder = _own_folder(self)
            except OSError as error:
                self._give_up(error)

    def __call__(self, path: Path) -> npt.NDArray[np.uint8]:
        """(H, W, 3) uint8, read-only where it comes from the cache.

        Raises:
            UnreadableImageError, OSError: the file cannot be read.
        """
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
            self._keep(kept, pixels)
        return pixels

    def _keep(self, kept: Path, pixels: npt.NDArray[np.uint8]) -> None:
        self._state[0] += pixels.nbytes
        try:
            write_atomically(kept, lambda partial: _save_array(partial, pixels))  # nobody maps half a file
        except OSError as error:
            self._state[0] -= pixels.nbytes
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Keep what is kept and no more."""
        if not self._state[1]:
            self._state[1] = 1
            logger.warning(
                "no more decoded images are kept in %s (%s): the others are decoded each time; set TMPDIR to "
                "a larger disk, or allow the cache less",
                self._folder or "the temporary folder",
                error.strerror or error,
            )


def _save_array(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """np.save under exactly this name: given a path, it would add a suffix."""
    with path.open("wb") as stream:
        np.save(stream, pixels)


def _own_folder(owner: object) -> Path:
    """A new temporary folder that goes with its owner, after those that nobody owns any more are removed.

    Every process that uses a folder holds a lock in it, which ends with the last of them however it ends.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = _lock(folder / _LOCK, os.O_CREAT | os.O_RDWR)
        if lock is not None:
            weakref.finalize(owner, _remove, folder, lock, os.getpid())
            return folder


def _remove(folder: Path, lock: int, maker: int) -> None:
    if os.getpid() == maker:  # a forked worker leaves it to the process that made it
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(temporary: Path) -> None:
    """Remove the folders whose lock nobody holds; without locks (on Windows) they stay."""
    if sys.platform == "win32":
        return
    for folder in temporary.glob(f"{_PREFIX}*"):
        lock = _lock(folder / _LOCK, os.O_RDWR)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(path: Path, flags: int) -> int | None:
    """The descriptor of a locked file; None where another process holds it, or it cannot be opened."""
    try:
        lock = os.open(path, flags, 0o600)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    if sys.platform != "win32":
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return None
    return lock
