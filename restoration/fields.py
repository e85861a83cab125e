"""Tensors too large for memory, kept in files: zeros like any others, worked on in bands of rows."""

import math
import mmap
import tempfile
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from restoration.tiling import Window
from samplers import NOISE_ROWS

IN_MEMORY_BYTES = 32 * 2**20  # a larger tensor is kept in a file
_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def row_bands(height: int, width: int) -> Iterator[Window]:
    """Cut an image into bands of rows, from the top; the last may have fewer.

    Behind each, the memory is free again that files took.
    """
    for top in range(0, height, NOISE_ROWS):
        yield Window(top, min(top + NOISE_ROWS, height), 0, width)
        release_pages()


def in_bands(
    function: Callable[..., Tensor], device: torch.device, target: Tensor, *others: Tensor
) -> Tensor:
    """Replace an image (..., H, W) by what the function makes of it and others, on the device, in bands."""
    for band in row_bands(*target.shape[-2:]):
        band.cut(target).copy_(function(*(band.cut(one).to(device) for one in (target, *others))))
    return target


def zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Make float32 zeros on the device or, where they are large, on the CPU in a file without a name.

    OSError: the folder of temporary files has no room.
    """
    size = 4 * math.prod(shape)
    if size <= IN_MEMORY_BYTES:
        return torch.zeros(shape, device=device)
    with tempfile.TemporaryFile(prefix="field-", buffering=0) as file:
        block, written = bytes(2**20), 0
        try:
            while written < size:  # without the room, a write through the mapping would end in SIGBUS
                written += file.write(block[: size - written])
        except OSError as error:
            reason = f"{tempfile.gettempdir()} has no room for {size / 1e6:.0f} MB ({error.strerror})"
            raise OSError(f"{reason}: set TMPDIR to a folder with more room") from error
        mapped = mmap.mmap(file.fileno(), size)
    _mapped.add(mapped)
    return torch.frombuffer(mapped, dtype=torch.float32).view(shape)


def release_pages() -> None:
    """Let go of the memory that tensors in files take; what they hold stays in the files."""
    for mapped in list(_mapped):
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
