"""Writes every output: a file has its old content or all of the new, wherever its path leads."""

import errno
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

Write = Callable[[BinaryIO], object]

# What network file systems say that have no fsync or no locks.
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}
_DESCRIPTOR = re.compile(r"/dev/(?:stdout|stderr|fd/\d+)|/proc/self/fd/\d+")


def write_atomically(path: Path, write: Write) -> None:
    """Replace a file by what `write` puts into a stream; folders are made, and an error changes nothing.

    A link stays and its target is replaced; a file keeps its permissions, a new one follows the umask. A
    device, a pipe or an open descriptor such as /dev/stdout is written to.
    """
    if _is_stream(path):
        _write_to(path, write)
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is one step only within a file system. Named here rather than by
    # tempfile, which would make the file readable to its owner alone.
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            _sync(stream)
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except RuntimeError as error:  # so says torch.save that the disk is full
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    write_atomically(path, lambda stream: stream.write(text.encode()))


def check_outputs(
    outputs: Iterable[Path],
    *,
    inputs: Iterable[Path] = (),
    overwrite: bool = False,
    remedy: str = "use --overwrite or another name",
) -> None:
    """Raise ValueError, before any work, for outputs that cannot or must not be written.

    Refused are an input under any name, a folder, two outputs in one file, a file that exists (unless
    `overwrite`) or may not be written, and a folder that cannot be made or written to.
    """
    # Inode and device, which all names of a file share: links, hard links, and letters of another case.
    untouchable = {path.stat()[1:3] for path in inputs if path.exists()}
    taken: dict[str, Path] = {}
    for path in outputs:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder; give the name of a file")
        if path.exists() and path.stat()[1:3] in untouchable:
            raise ValueError(f"{path}: is an input; give the output another name")
        if _is_stream(path):
            continue
        target = os.path.realpath(path)
        if target in taken:
            raise ValueError(f"{taken[target]}, {path}: two outputs in one file; give each a name of its own")
        taken[target] = path
        _check_room(path, Path(target))
    existing = [path for path in taken.values() if path.exists()]
    if existing and not overwrite:
        more = f", and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise ValueError(f"{existing[0]}: exists already{more}; {remedy}")


def is_disk_error(error: BaseException) -> bool:
    """Tell whether further files would fail, too: the disk is full, over its quota, read-only or broken."""
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


def _check_room(path: Path, target: Path) -> None:
    if target.exists() and not os.access(target, os.W_OK):
        raise ValueError(f"{path}: may not be written; change its permissions or give another name")
    there = next(folder for folder in target.parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: cannot be written, because of {there}; give another place")


def _is_stream(path: Path) -> bool:
    """Tell whether something is there that is no plain file, or a descriptor that is open."""
    return (path.exists() and not path.is_file()) or _DESCRIPTOR.fullmatch(str(path)) is not None


def _write_to(path: Path, write: Write) -> None:
    content = io.BytesIO()  # encoders seek, which a pipe cannot
    write(content)
    place: Path | int = path
    if _DESCRIPTOR.fullmatch(str(path)):
        # Itself: a second descriptor of the same file would write over what the first one writes.
        place = {"stdout": 1, "stderr": 2}.get(path.name) or int(path.name)
    with open(place, "wb", closefd=place is path) as stream:
        stream.write(content.getvalue())


def _sync(stream: BinaryIO) -> None:
    try:
        os.fsync(stream.fileno())
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # which costs no result
            raise
