"""The sizes of many image files, read from their headers once and remembered between runs."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from imaging.atomic import write_atomically
from imaging.files import UnreadableImageError, image_size

logger = logging.getLogger(__name__)

MANY = 2000  # from this many files on, reading their headers shows its progress
CHUNK = 500  # files handed to the threads at a time: the bar moves with the reading
THREADS = 16  # reading headers mostly waits, most of all on a network drive

Size = tuple[int, int]


def image_sizes(paths: Sequence[Path], cache_dir: Path | None = None) -> list[Size | UnreadableImageError]:
    """The (height, width) of every file, upright, or why it cannot be read.

    Args:
        paths: image files.
        cache_dir: a folder to remember sizes in. A file that has changed since (by its time or its length) is
            read again, one that could not be read is tried again. None, or one that cannot be written
            (a warning says so), remembers nothing.
    """
    resolved = [Path(os.path.abspath(path)) for path in paths]
    stamps = [_stamp(path) for path in resolved]
    index = None if cache_dir is None else cache_dir / _index_name(resolved)
    known = _load(index)
    sizes: list[Size | UnreadableImageError | None] = [
        _recall(known.get(str(path)), stamp) for path, stamp in zip(resolved, stamps, strict=True)
    ]
    unread = [number for number, size in enumerate(sizes) if size is None]
    hidden = len(unread) < MANY
    with ThreadPoolExecutor(THREADS) as pool, tqdm(None, "image sizes", len(unread), disable=hidden) as bar:
        for start in range(0, len(unread), CHUNK):
            numbers = unread[start : start + CHUNK]
            for number, size in zip(numbers, pool.map(_read, [paths[n] for n in numbers]), strict=True):
                sizes[number] = size
            bar.update(len(numbers))
    complete = [size for size in sizes if size is not None]
    assert len(complete) == len(paths)
    if index is not None and unread:
        try:
            _save(index, resolved, stamps, complete)
        except OSError as error:
            logger.warning("image sizes are not remembered (%s): reading them takes as long next time", error)
    return complete


def default_cache_dir() -> Path | None:
    """The user's cache folder, $XDG_CACHE_HOME or ~/.cache, and in it this project's; None without a home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a user that the system does not know
        logger.warning("image sizes are not remembered (%s): set XDG_CACHE_HOME to a folder", error)
        return None
    return Path(base) / "residual-diffusion"


def _read(path: Path) -> Size | UnreadableImageError:
    try:
        return image_size(path)
    except UnreadableImageError as error:
        return error


def _stamp(path: Path) -> list[int]:
    """Time of the last change and length of a file; nothing for one that is not there."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_mtime_ns, status.st_size]


def _index_name(paths: Sequence[Path]) -> str:
    """One file for each folder of images, named after where it is."""
    folder = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return f"sizes-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.json"


def _recall(entry: object, stamp: list[int]) -> Size | None:
    """The size in an entry [time, length, height, width], if the file is still the same."""
    if not isinstance(entry, list) or len(entry) != 4 or not stamp or entry[:2] != stamp:
        return None
    return entry[2], entry[3]


def _load(index: Path | None) -> dict[str, object]:
    """What is remembered; an index that is missing or damaged is only slower, never wrong."""
    if index is None:
        return {}
    try:
        known = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _save(
    index: Path,
    paths: Sequence[Path],
    stamps: Sequence[list[int]],
    sizes: Sequence[Size | UnreadableImageError],
) -> None:
    """Remember the sizes that could be read."""
    known = {
        str(path): [*stamp, *size]
        for path, stamp, size in zip(paths, stamps, sizes, strict=True)
        if isinstance(size, tuple) and stamp
    }
    text = json.dumps(known)
    write_atomically(index, lambda temporary: temporary.write_text(text, encoding="utf-8"))
