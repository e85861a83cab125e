"""Sizes of many image files, remembered between runs."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm.contrib.concurrent import thread_map

from imaging.atomic import write_text_atomically
from imaging.files import UnreadableImageError, image_size

logger = logging.getLogger(__name__)

MANY = 2000  # from this many files on, reading their headers shows its progress
THREADS = 16  # reading headers mostly waits, most of all on a network drive

Size = tuple[int, int]


def image_sizes(paths: Sequence[Path], cache_dir: Path | None = None) -> list[Size | UnreadableImageError]:
    """Upright (height, width), or why a file cannot be read; remembered in `cache_dir`."""
    names = {path: os.path.abspath(path) for path in paths}
    stamps = {path: _stamp(path) for path in paths}
    folder = os.path.commonpath([os.path.dirname(name) for name in names.values()]) if names else ""
    key = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    index = None if cache_dir is None else cache_dir / f"sizes-{key}.json"
    known = _load(index)
    sizes: dict[Path, Size | UnreadableImageError] = {}
    for path, stamp in stamps.items():
        match known.get(names[path]):
            case [int(time), int(length), int(height), int(width)] if [time, length] == stamp:
                sizes[path] = height, width
    unread = [path for path in stamps if path not in sizes]
    read = thread_map(_read, unread, max_workers=THREADS, desc="image sizes", disable=len(unread) < MANY)
    sizes.update(zip(unread, read, strict=True))
    if index is not None and unread:
        good = {path: size for path, size in sizes.items() if isinstance(size, tuple) and stamps[path]}
        known = {names[path]: [*stamps[path], *size] for path, size in good.items()}
        try:
            write_text_atomically(index, json.dumps(known))
        except OSError as error:
            logger.warning("image sizes are not remembered (%s): reading them takes as long next time", error)
    return [sizes[path] for path in paths]


def default_cache_dir() -> Path | None:
    """None, with a warning, without a home."""
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
    """Nothing for a file that is not there."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_mtime_ns, status.st_size]


def _load(index: Path | None) -> dict[str, object]:
    """A damaged index is only slower."""
    try:
        known = json.loads(index.read_text(encoding="utf-8")) if index else None
    except (OSError, ValueError):
        known = None
    return known if isinstance(known, dict) else {}
