"""Decoded images kept on disk as memory-mapped arrays, so that a crop reads only the pixels it needs."""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from imaging.atomic import write_atomically
from imaging.files import read_rgb


class CachedReader:
    """images.read_rgb that decodes a file once; worker processes share what any of them decoded.

    The arrays live in a temporary folder that goes with the object. A file that changes is decoded again.

    Args:
        limit_bytes: at most this much disk; images beyond it are decoded at every reading.
        read: path -> (H, W, 3) uint8.
    """

    def __init__(self, limit_bytes: int, read: Callable[[Path], npt.NDArray[np.uint8]] = read_rgb) -> None:
        if limit_bytes < 0:
            raise ValueError(f"the cache may not have a negative size, such as {limit_bytes} bytes")
        self.limit_bytes = limit_bytes
        self.read = read
        self._folder = tempfile.TemporaryDirectory(prefix="decoded-images-")
        self._used = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __call__(self, path: Path) -> npt.NDArray[np.uint8]:
        """(H, W, 3) uint8, read-only where it comes from the cache.

        Raises:
            UnreadableImageError, OSError: the file cannot be read.
        """
        status = path.stat()
        identity = f"{path.resolve()}|{status.st_mtime_ns}|{status.st_size}"
        kept = Path(self._folder.name) / f"{hashlib.sha256(identity.encode()).hexdigest()}.npy"
        if kept.exists():
            mapped: npt.NDArray[np.uint8] = np.load(kept, mmap_mode="r")
            return mapped
        pixels = self.read(path)
        if int(self._used) + pixels.nbytes <= self.limit_bytes:
            self._used += pixels.nbytes
            write_atomically(kept, lambda partial: _save_array(partial, pixels))  # nobody maps half a file
        return pixels


def _save_array(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """np.save under exactly this name: given a path, it would add a suffix."""
    with path.open("wb") as stream:
        np.save(stream, pixels)
