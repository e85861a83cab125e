"""Writing files so that a reader finds the old content or the whole of the new one, never half."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside path, flush it to disk, and rename it to path.

    Missing folders are made. Whatever goes wrong, nothing but the old file, if there was one, is left.

    Args:
        path: the file to write or replace.
        write: called with the path to write to; what it raises is passed on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is one step only within a file system. Named here rather than by
    # tempfile, which would make the file readable to its owner alone.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write text as UTF-8, as write_atomically does."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
