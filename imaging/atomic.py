"""Files whose reader finds the old content or all of the new."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` makes the content of ``path`` under a temporary one; its errors change nothing."""
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


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    with path.open("wb") as stream:  # given a path, np.save would add a suffix
        np.save(stream, array)


def write_text_atomically(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
