"""Writing files so that a reader finds the old content or the whole of the new one, never half."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write``, given a temporary path, fill the new content of ``path``; its errors change nothing.

    Missing folders are made; the content is on the disk before it takes the name.
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
