"""Keeps decoded images and sizes in a folder of the user's: deleting it costs time, and nothing else.

`images/` has a memory-mapped array for each image, of which a crop reads only the pixels that it needs, and
`sizes.npy` the sizes of all images ever listed.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm.contrib.concurrent import thread_map

from imaging.atomic import write_atomically
from imaging.files import UnreadableImageError, image_size, read_rgb

logger = logging.getLogger(__name__)

MANY = 2000  # from this many files on, reading their headers shows its progress
THREADS = 16  # reading headers mostly waits, most of all on a network drive
_VERSION = 1  # of what read_rgb makes of a file: a new number leaves older entries alone

Size = tuple[int, int]


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
        kept = self.folder / f"{_identity(path):016x}.npy"
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


def image_sizes(paths: Sequence[Path], cache_dir: Path | None = None) -> list[Size | UnreadableImageError]:
    """Read the upright (height, width) of each file, or why it has none; `cache_dir` remembers them."""
    index = None if cache_dir is None else cache_dir / "sizes.npy"
    known = _load_sizes(index)
    identities: dict[Path, int] = {}
    for path in paths:
        with suppress(OSError):
            identities[path] = _identity(path)
    unread = [path for path in paths if identities.get(path) not in known]
    read = thread_map(_read_size, unread, max_workers=THREADS, desc="image sizes", disable=len(unread) < MANY)
    sizes = dict(zip(unread, read, strict=True))
    new = {identities[path]: size for path, size in sizes.items() if isinstance(size, tuple)}
    if index is not None and new:
        rows = np.array([(key, *size) for key, size in (known | new).items()], np.uint64)
        try:
            write_atomically(index, lambda stream: np.save(stream, rows))
        except OSError as error:
            logger.warning("sizes of images are not kept (%s): reading them takes as long next time", error)
    return [sizes[path] if path in sizes else known[identities[path]] for path in paths]


def _load_sizes(index: Path | None) -> dict[int, Size]:
    """Read the sizes by identity; a damaged or missing file has none."""
    with suppress(OSError, ValueError, EOFError):
        if index is not None and (rows := np.load(index)).dtype == np.uint64:
            return {key: (height, width) for key, height, width in rows.reshape(-1, 3).tolist()}
    return {}


def _read_size(path: Path) -> Size | UnreadableImageError:
    try:
        return image_size(path)
    except UnreadableImageError as error:
        return error


def _identity(path: Path) -> int:
    """Hash a file's name, time and length, below 2^64; OSError where there is no such file."""
    status = path.stat()
    name = os.fsencode(f"{os.path.abspath(path)}|{status.st_mtime_ns}|{status.st_size}|{_VERSION}")
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big")
