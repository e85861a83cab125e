"""Large images in pieces: overlapping windows, resizing them, and where the whole is kept."""

import math
import os
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bicubic import Border, exact_scale, resize
from samplers import NOISE_ROWS

IN_MEMORY_BYTES = 32 * 2**20  # a larger field is kept in a file
_BICUBIC_REACH = 3  # low-resolution pixels beyond a window that its upscaled pixels depend on
Shape = tuple[int, int, int, int]


class Window(NamedTuple):
    """Rows [top, bottom) and columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    def grown(self, by: int, height: int, width: int) -> "Window":
        """As far as there are pixels."""
        top, left = max(0, self.top - by), max(0, self.left - by)
        return Window(top, min(height, self.bottom + by), left, min(width, self.right + by))

    def seen_from(self, top: int, left: int) -> "Window":
        """Counted from (top, left)."""
        return Window(self.top - top, self.bottom - top, self.left - left, self.right - left)

    def cut(self, image: Tensor) -> Tensor:
        """A view of (..., H, W)."""
        return image[..., self.top : self.bottom, self.left : self.right]


class Tile(NamedTuple):
    """Its pixels weigh row_weights[y] * column_weights[x]."""

    window: Window
    row_weights: Tensor  # (height, 1)
    column_weights: Tensor  # (width,)


def plan_tiles(height: int, width: int, tile: int, overlap: int, margin: int) -> list[Tile]:
    """Square windows whose weights sum to 1 at every pixel.

    Neighbours share `overlap` pixels, at most tile / 2; `margin` of them, below overlap / 2, count nothing.
    """
    assert tile >= max(height, width) or tile >= 2 * overlap > 4 * margin >= 0
    return [
        Tile(Window(top, bottom, left, right), row_weights[:, None], column_weights)
        for top, bottom, row_weights in _axis_spans(height, tile, overlap, margin)
        for left, right, column_weights in _axis_spans(width, tile, overlap, margin)
    ]


def _axis_spans(length: int, tile: int, overlap: int, margin: int) -> list[tuple[int, int, Tensor]]:
    """(start, stop, weights); starts are multiples of tile - overlap."""
    if length <= tile:
        return [(0, length, torch.ones(length))]
    count = math.ceil((length - overlap) / (tile - overlap))
    # Between the margins one window gives way to the other along half a cosine.
    blend = overlap - 2 * margin
    rise = torch.zeros(overlap)
    rise[margin : margin + blend] = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(blend) + 0.5) / blend)
    rise[margin + blend :] = 1
    spans = []
    for index in range(count):
        start = index * (tile - overlap)
        stop = min(start + tile, length)
        weights = torch.ones(stop - start)
        if index > 0:
            weights[:overlap] = rise
        if index < count - 1:
            weights[-overlap:] = 1 - rise
        spans.append((start, stop, weights))
    return spans


def row_bands(height: int, width: int, rows: int = NOISE_ROWS) -> Iterator[Window]:
    """From the top; the last may have fewer rows."""
    for top in range(0, height, rows):
        yield Window(top, min(top + rows, height), 0, width)


class Scale:
    """High over low resolution; a window is resized as the whole would be."""

    def __init__(self, factor: float) -> None:
        self.fraction = exact_scale(factor)

    def __float__(self) -> float:
        return float(self.fraction)

    def high_size(self, height: int, width: int) -> tuple[int, int]:
        """Each length rounded up."""
        return math.ceil(self.fraction * height), math.ceil(self.fraction * width)

    def upscale(self, low_res: Tensor, window: Window) -> Tensor:
        """A window of the whole (..., h, w) upscaled."""
        top, bottom = self._low_span(window.top, window.bottom, low_res.shape[-2])
        left, right = self._low_span(window.left, window.right, low_res.shape[-1])
        upscaled = resize(low_res[..., top:bottom, left:right], scale=float(self))
        return window.seen_from(int(top * self.fraction), int(left * self.fraction)).cut(upscaled)

    def high_window(self, low: Window, height: int, width: int) -> Window:
        """Of an H x W image, what `downscale` needs to make `low`."""
        return Window(
            *self._high_span(low.top, low.bottom, height), *self._high_span(low.left, low.right, width)
        )

    def downscale(self, high_res: Tensor, high: Window, low: Window, border: Border = "mirror") -> Tensor:
        """The window `low`, from its `high_window`."""
        shrunk = resize(high_res, scale=1 / float(self), border=border)
        return low.seen_from(int(high.top / self.fraction), int(high.left / self.fraction)).cut(shrunk)

    def _low_span(self, start: int, stop: int, length: int) -> tuple[int, int]:
        first = self._aligned(math.floor(start / self.fraction))
        return first, min(math.ceil(stop / self.fraction) + _BICUBIC_REACH, length)

    def _high_span(self, start: int, stop: int, length: int) -> tuple[int, int]:
        last = math.ceil((stop + _BICUBIC_REACH) * self.fraction)
        return int(self._aligned(start) * self.fraction), min(last, length)

    def _aligned(self, start: int) -> int:
        """Pixels of both resolutions begin every q and p of a scale p / q."""
        return max(0, (start - _BICUBIC_REACH) // self.fraction.denominator * self.fraction.denominator)


class Field:
    """Zeros (B, C, H, W), float32, in memory or, if large, in an unnamed file; or OSError."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        size = bytes_on_disk(shape)
        self._tensor = None if size else torch.zeros(shape, device=device)
        self._file = tempfile.TemporaryFile(prefix="field-") if size else None  # noqa: SIM115
        if self._file is not None:
            try:
                _reserve(self._file.fileno(), size)
            except OSError as error:
                reason = f"{tempfile.gettempdir()} has no room for {size / 1e6:.0f} MB ({error.strerror})"
                raise OSError(f"{reason}: set TMPDIR to a folder with more room") from error

    def bands(self) -> Iterator[Window]:
        return row_bands(*self.shape[-2:])

    def read(self, window: Window, image: int | None = None) -> Tensor:
        """A copy on the device, of one image or of all."""
        place = _place(window, image)
        if self._tensor is not None:
            return self._tensor[place].clone()
        return torch.from_numpy(np.array(self._mapped()[place])).to(self.device)

    def write(self, window: Window, values: Tensor, image: int | None = None) -> None:
        place = _place(window, image)
        if self._tensor is not None:
            self._tensor[place] = values
        else:
            self._mapped()[place] = values.cpu().numpy()

    def add(self, window: Window, values: Tensor, image: int | None = None) -> None:
        self.write(window, self.read(window, image) + values, image)

    def _mapped(self) -> npt.NDArray[np.float32]:
        # For the length of one access: the process never holds more of a large image than a window.
        assert self._file is not None
        mapped: npt.NDArray[np.float32] = np.memmap(self._file, np.float32, "r+", shape=self.shape)
        return mapped


def bytes_on_disk(shape: Shape) -> int:
    """Of a Field; 0 where it fits in memory."""
    size = 4 * math.prod(shape)
    return size if size > IN_MEMORY_BYTES else 0


def _reserve(file: int, size: int) -> None:
    # Without the room, the first write through the mapping would end the process with SIGBUS.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    zeros = bytes(2**20)  # macOS
    for start in range(0, size, len(zeros)):
        os.pwrite(file, zeros[: size - start], start)


def _place(window: Window, image: int | None) -> tuple["slice[int | None]", ...]:
    images = slice(None) if image is None else slice(image, image + 1)
    return images, slice(None), slice(window.top, window.bottom), slice(window.left, window.right)
