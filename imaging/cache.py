"""Keeps decoded images in a folder of the user's: deleting it costs time, and nothing else.

It has a memory-mapped array for each image, of which a crop reads only the pixels that it needs.
"""

import hashlib
import logging
import os
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

    Up to `limit_bytes` are kept in `cache_dir`; once they are there, further images are decoded each time.
    """

    def __init__(self, cache_dir: Path | None, limit_bytes: int) -> None:
        self.folder = cache_dir / "images" if cache_dir is not None and limit_bytes else None
        # bytes that may still be written, shared by the processes of a loader
        self._room = torch.tensor(limit_bytes).share_memory_()
        if self.folder is not None:
            with suppress(OSError):  # not there yet, or deleted meanwhile
                self._room -= sum(entry.stat().st_size for entry in os.scandir(self.folder))

    def __call__(self, path: Path) -> npt.NDArray[np.uint8]:
        """(H, W, 3) uint8, read-only if kept; OSError or UnreadableImageError."""
        if self.folder is None:
            return read_rgb(path)
        status = path.stat()
        identity = f"{os.path.abspath(path)}|{status.st_mtime_ns}|{status.st_size}|{_VERSION}"
        kept = self.folder / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]}.npy"
        with suppress(OSError, ValueError, EOFError):  # not there, or damaged
            mapped: npt.NDArray[np.uint8] = np.load(kept, mmap_mode="r")
            return mapped
        pixels = read_rgb(path)
        if self._room > 0:
            self._room -= pixels.nbytes
            try:
                if self._room < 0:
                    raise OSError("it is full")
                write_atomically(kept, lambda stream: np.save(stream, pixels))
            except OSError as error:
                self._room.zero_()
                reason = f"no more images are kept in {self.folder} ({error.strerror or error})"
                logger.warning("%s: empty it, or give another --cache_dir or more --cache_gb", reason)
        return pixels
