"""Decoded images kept on disk as memory-mapped arrays, so that a crop reads only the pixels it needs."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from images import read_rgb


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
            self._keep(kept, pixels)
        return pixels

    def _keep(self, kept: Path, pixels: npt.NDArray[np.uint8]) -> None:
        """Write under another name and rename: no process maps half a file."""
        partial = kept.with_suffix(f".{os.getpid()}")
        with partial.open("wb") as stream:
            np.save(stream, pixels)
        os.replace(partial, kept)
