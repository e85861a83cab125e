"""Keeps decoded images in a folder of the user's: deleting it costs time, and nothing else.

It has a memory-mapped array for each image, of which a crop reads only the pixels that it needs.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from imaging.atomic import write_atomically
from imaging.files import read_rgb

logger = logging.getLogger(__name__)

_VERSION = 1  # of what read_rgb makes of a file: a new number leaves older entries alone


def default_cache_dir() -> Path | None:
    """Find a folder in the user's cache; None, with a warning, for a user without a home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a user that the system does not know
        logger.warning("nothing is cached (%s): give a folder, --cache_dir", error)
        return None
    return Path(base) / "residual-diffusion"


class CachedReader:
    """Reads (H, W, 3) uint8 images, each decoded once for all runs as long as its file stays the same.

    Up to `limit_bytes` are kept in `cache_dir`; what no run has used since this one began makes room.
    """

    def __init__(
        self,
        cache_dir: Path | None,
        limit_bytes: int,
        read: Callable[[Path], npt.NDArray[np.uint8]] = read_rgb,
    ) -> None:
        if limit_bytes < 0:
            raise ValueError(f"the cache may not have a negative size, such as {limit_bytes} bytes")
        self.limit_bytes, self.read, self.started = limit_bytes, read, time.time()
        self.folder = cache_dir / "images" if cache_dir is not None and limit_bytes else None
        # shared by the processes of a loader: bytes in the folder, and whether no more are written
        self._state = torch.zeros(2, dtype=torch.int64).share_memory_()
        try:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._state[0] = sum(entry.stat().st_size for entry in os.scandir(self.folder))
        except OSError as error:
            self._give_up(error)

    def __call__(self, path: Path) -> npt.NDArray[np.uint8]:
        """(H, W, 3) uint8, read-only if kept; OSError or UnreadableImageError."""
        if self.folder is None:
            return self.read(path)
        status = path.stat()
        identity = f"{os.path.abspath(path)}|{status.st_mtime_ns}|{status.st_size}|{_VERSION}"
        kept = self.folder / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]}.npy"
        try:
            mapped: npt.NDArray[np.uint8] = np.load(kept, mmap_mode="r")
            if kept.stat().st_mtime < self.started:
                kept.touch()  # in use
            return mapped
        except (OSError, ValueError, EOFError):  # not there, or damaged
            pixels = self.read(path)
        if not self._state[1]:
            try:
                if self._has_room(pixels.nbytes):
                    write_atomically(kept, lambda stream: np.save(stream, pixels))
                    self._state[0] += pixels.nbytes
            except OSError as error:
                self._give_up(error)
        return pixels

    def _has_room(self, size: int) -> bool:
        """Make room by removing what no run uses, the oldest first; False where too little is left."""
        assert self.folder is not None
        if self._state[0] + size <= self.limit_bytes:
            return True
        entries = ((entry.stat(), entry.path) for entry in os.scandir(self.folder))
        unused = sorted((at.st_mtime, at.st_size, name) for at, name in entries if at.st_mtime < self.started)
        for _, freed, name in unused:
            with suppress(FileNotFoundError):  # another process was faster
                os.unlink(name)
                self._state[0] -= freed
            if self._state[0] + size <= self.limit_bytes:
                return True
        self._state[1] = 1  # all of the folder is in use
        return False

    def _give_up(self, error: OSError) -> None:
        if not self._state[1]:
            self._state[1] = 1
            reason = error.strerror or error
            logger.warning(
                "no more images are kept (%s in %s): give another --cache_dir", reason, self.folder
            )
