"""Large images in pieces: overlapping windows, the weight of each in the whole, and where the whole is kept.

Shape legend: B images, C channels, H x W pixels of the high resolution, h x w of the low one.
"""

import math
import os
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bicubic import exact_scale, resize

IN_MEMORY_BYTES = 32 * 2**20  # a larger field is kept in a file
_BICUBIC_REACH = 3  # low-resolution pixels beyond a window that its upscaled pixels depend on


class Window(NamedTuple):
    """A rectangle of pixels; slices [top, bottom) and [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left

    def grown(self, by: int, height: int, width: int) -> "Window":
        """The window with so many pixels more on each side, as far as an H x W image has them."""
        top, left = max(0, self.top - by), max(0, self.left - by)
        return Window(top, min(height, self.bottom + by), left, min(width, self.right + by))

    def within(self, other: "Window") -> "Window":
        """Where this window lies in another that contains it."""
        height, width = self.shape
        top, left = self.top - other.top, self.left - other.left
        return Window(top, top + height, left, left + width)


class Tile(NamedTuple):
    """A window and its weight in each of its pixels: row_weights[y] * column_weights[x].

    At every pixel of the image the weights of all tiles sum to 1.
    """

    window: Window
    row_weights: Tensor  # (height, 1)
    column_weights: Tensor  # (width,)


def plan_tiles(height: int, width: int, tile: int, overlap: int, margin: int) -> list[Tile]:
    """Cover an image with windows of `tile` x `tile` pixels, in reading order.

    Args:
        height, width: of the image.
        tile: side of a window, at least 2 overlap; an image no larger is one window.
        overlap: pixels that neighbouring windows share.
        margin: pixels at an inner edge of a window that count nothing, less than overlap / 2; between the
            margins of two windows one gives way to the other along half a cosine.
    """
    assert tile >= max(height, width) or tile >= 2 * overlap > 4 * margin >= 0
    rows = _axis_spans(height, tile, overlap, margin)
    columns = _axis_spans(width, tile, overlap, margin)
    return [
        Tile(Window(top, bottom, left, right), row_weights[:, None], column_weights)
        for top, bottom, row_weights in rows
        for left, right, column_weights in columns
    ]


def _axis_spans(length: int, tile: int, overlap: int, margin: int) -> list[tuple[int, int, Tensor]]:
    """(start, stop, weights (stop - start,)) along one axis. Every start is a multiple of tile - overlap."""
    if length <= tile:
        return [(0, length, torch.ones(length))]
    count = math.ceil((length - overlap) / (tile - overlap))
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


def row_bands(height: int, width: int, rows: int) -> Iterator[Window]:
    """Cut an image into bands of `rows` rows (the last may have fewer), from the top."""
    for top in range(0, height, rows):
        yield Window(top, min(top + rows, height), 0, width)


# ---------------------------------------------------------------------------------------- resizing in windows


class Scale:
    """How the two resolutions of one image relate, and resizing a window of it as the whole would be resized.

    Args:
        factor: high over low resolution, above 0. Stored as a fraction p / q: windows are cut where pixels of
            both resolutions begin, every q and p pixels.
    """

    def __init__(self, factor: float) -> None:
        self.fraction = exact_scale(factor)

    def __float__(self) -> float:
        return float(self.fraction)

    def high_size(self, height: int, width: int) -> tuple[int, int]:
        """The size of an image of h x w pixels once upscaled: each length rounded up."""
        return math.ceil(self.fraction * height), math.ceil(self.fraction * width)

    def upscale(self, low_res: Tensor, window: Window) -> Tensor:
        """A window of the upscaled image.

        Args:
            low_res: (..., h, w), the whole image.
            window: of the high resolution.

        Returns:
            (..., height, width) of the window, as cut from `resize(low_res, scale=factor)`.
        """
        top, bottom = self._low_span(window.top, window.bottom, low_res.shape[-2])
        left, right = self._low_span(window.left, window.right, low_res.shape[-1])
        upscaled = resize(low_res[..., top:bottom, left:right], scale=float(self))
        y, x = window.top - int(top * self.fraction), window.left - int(left * self.fraction)
        height, width = window.shape
        return upscaled[..., y : y + height, x : x + width]

    def _low_span(self, start: int, stop: int, length: int) -> tuple[int, int]:
        first = math.floor(start / self.fraction) - _BICUBIC_REACH
        first = max(0, first // self.fraction.denominator * self.fraction.denominator)
        last = math.ceil(stop / self.fraction) + _BICUBIC_REACH
        return first, min(last, length)

    def high_window(self, low: Window, height: int, width: int) -> Window:
        """The window of an H x W image that `downscale` needs to make the window `low` of the small one."""
        top, bottom = self._high_span(low.top, low.bottom, height)
        left, right = self._high_span(low.left, low.right, width)
        return Window(top, bottom, left, right)

    def _high_span(self, start: int, stop: int, length: int) -> tuple[int, int]:
        first = max(0, (start - _BICUBIC_REACH) // self.fraction.denominator * self.fraction.denominator)
        return int(first * self.fraction), min(math.ceil((stop + _BICUBIC_REACH) * self.fraction), length)

    def downscale(self, high_res: Tensor, high: Window, low: Window) -> Tensor:
        """A window of the downscaled image (antialiased bicubic).

        Args:
            high_res: (..., height, width) of the window `high`.
            high: as `high_window` gave it.
            low: the window to make.
        """
        shrunk = resize(high_res, scale=1 / float(self))
        y, x = low.top - int(high.top / self.fraction), low.left - int(high.left / self.fraction)
        height, width = low.shape
        return shrunk[..., y : y + height, x : x + width]


# ------------------------------------------------------------------------------------------------- the fields


class Field:
    """A float32 array (B, C, H, W), zero at first, in memory or, where it is large, in an unnamed file.

    A file is mapped into memory for the length of one access only: the process never holds more of a large
    image than the window it works on.

    Args:
        shape: (B, C, H, W).
        device: where windows are handed out, and where the array is kept if it is small.

    Raises:
        OSError: the folder of temporary files has no room for a large array.
    """

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device) -> None:
        self.shape = shape
        self.device = device
        size = bytes_on_disk(shape)
        self._tensor = None if size else torch.zeros(shape, device=device)
        self._file = tempfile.TemporaryFile(prefix="field-") if size else None  # noqa: SIM115
        self.clear()

    def clear(self) -> None:
        """Set every value to zero."""
        if self._tensor is not None:
            self._tensor.zero_()
        if self._file is not None:
            self._file.truncate(0)
            size = bytes_on_disk(self.shape)
            try:
                _reserve(self._file.fileno(), size)
            except OSError as error:
                reason = f"{tempfile.gettempdir()} has no room for {size / 1e6:.0f} MB ({error.strerror})"
                raise OSError(f"{reason}: set TMPDIR to a folder with more room") from error

    def read(self, window: Window, image: int | None = None) -> Tensor:
        """A copy of (b, C, height, width): of one image, or of all."""
        place = _place(window, image)
        if self._tensor is not None:
            return self._tensor[place].clone()
        return torch.from_numpy(np.array(self._mapped()[place])).to(self.device)

    def write(self, window: Window, values: Tensor, image: int | None = None) -> None:
        """Replace the window's values by (b, C, height, width)."""
        place = _place(window, image)
        if self._tensor is not None:
            self._tensor[place] = values
        else:
            self._mapped()[place] = values.cpu().numpy()

    def add(self, window: Window, values: Tensor, image: int | None = None) -> None:
        """Add (b, C, height, width) to the window's values."""
        self.write(window, self.read(window, image) + values, image)

    def _mapped(self) -> npt.NDArray[np.float32]:
        assert self._file is not None
        mapped: npt.NDArray[np.float32] = np.memmap(self._file, np.float32, "r+", shape=self.shape)
        return mapped


def bytes_on_disk(shape: tuple[int, int, int, int]) -> int:
    """What a Field of this shape takes in the folder of temporary files; 0 where it fits in memory."""
    size = 4 * math.prod(shape)
    return size if size > IN_MEMORY_BYTES else 0


def _reserve(file: int, size: int) -> None:
    """Give an empty file `size` zeros and the room for them.

    Without the room, the first write through the mapping would end the process with SIGBUS.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    zeros = bytes(2**20)  # macOS
    for start in range(0, size, len(zeros)):
        os.pwrite(file, zeros[: size - start], start)


def _place(window: Window, image: int | None) -> tuple["slice[int | None]", ...]:
    images = slice(None) if image is None else slice(image, image + 1)
    return images, slice(None), slice(window.top, window.bottom), slice(window.left, window.right)
