"""Windows of images: where they lie, how they are blended, and how each is resized as in the whole."""

import math
from fractions import Fraction
from typing import NamedTuple, Self

import torch
from torch import Tensor

from bicubic import Border, exact_scale, resize

MARGIN = 16  # pixels at the inner edge of a window that see most of the padding beyond it
_BICUBIC_REACH = 3  # low-resolution pixels beyond a window that its upscaled pixels depend on


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
        """Add `by` pixels on each side, as far as an image of height x width has them."""
        top, left = max(0, self.top - by), max(0, self.left - by)
        return Window(top, min(height, self.bottom + by), left, min(width, self.right + by))

    def seen_from(self, top: int, left: int) -> "Window":
        """Count rows from `top` and columns from `left`."""
        return Window(self.top - top, self.bottom - top, self.left - left, self.right - left)

    def cut(self, image: Tensor) -> Tensor:
        """Return this window of (..., H, W), as a view."""
        return image[..., self.top : self.bottom, self.left : self.right]


class Tile(NamedTuple):
    """A window whose pixel (y, x) weighs row_weights[y] * column_weights[x]."""

    window: Window
    row_weights: Tensor  # (height, 1)
    column_weights: Tensor  # (width,)

    def weighted(self, image: Tensor) -> Tensor:
        """(..., height, width)."""
        return image * self.row_weights.to(image) * self.column_weights.to(image)


def plan_windows(height: int, width: int, side: int, overlap: int, multiple: int) -> list[Tile]:
    """Cover an image with square windows whose weights sum to 1 at every pixel; side 0 is one piece.

    Sides, overlaps and beginnings are multiples of `multiple`; neighbours share at most half a side. The
    outermost MARGIN of what they share has no weight: there the network saw the padding beyond the window.
    """
    if side == 0:
        side, overlap = max(height, width), 0
    else:
        side = rounded_side(side, multiple)
        overlap = min(math.ceil(overlap / multiple), side // multiple // 2) * multiple
    margin = min(MARGIN, max(0, overlap - 1) // 2)
    return [
        Tile(Window(top, bottom, left, right), row_weights[:, None], column_weights)
        for top, bottom, row_weights in _axis_spans(height, side, overlap, margin)
        for left, right, column_weights in _axis_spans(width, side, overlap, margin)
    ]


def rounded_side(side: int, multiple: int) -> int:
    """Return the next side that windows can have: two multiples or more, so that one can be shared."""
    return max(2, math.ceil(side / multiple)) * multiple


def _axis_spans(length: int, tile: int, overlap: int, margin: int) -> list[tuple[int, int, Tensor]]:
    """(start, stop, weights) along one axis; starts are multiples of tile - overlap."""
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
            weights[len(weights) - overlap :] = 1 - rise
        spans.append((start, stop, weights))
    return spans


class Scale(Fraction):
    """Converts sizes and parts of images between the resolutions: a part is resized as in the whole."""

    def __new__(cls, factor: float) -> Self:
        return super().__new__(cls, exact_scale(factor))

    def high_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of an image (h, w), each length rounded up."""
        return math.ceil(self * height), math.ceil(self * width)

    def upscale(self, low_res: Tensor, window: Window) -> Tensor:
        """Upscale what the high-resolution `window` needs of the whole (..., h, w)."""
        top, bottom = self._low_span(window.top, window.bottom, low_res.shape[-2])
        left, right = self._low_span(window.left, window.right, low_res.shape[-1])
        upscaled = resize(low_res[..., top:bottom, left:right], scale=float(self))
        return window.seen_from(int(top * self), int(left * self)).cut(upscaled)

    def downscale(
        self, high_res: Tensor, band: Window, device: torch.device, border: Border = "mirror"
    ) -> Tensor:
        """Make a band of rows of what the whole (..., H, W) shrinks to, on the device."""
        top, bottom = self._aligned(band.top), math.ceil((band.bottom + _BICUBIC_REACH) * self)
        seen = high_res[..., int(top * self) : bottom, :].to(device)
        return band.seen_from(top, 0).cut(resize(seen, scale=1 / float(self), border=border))

    def _low_span(self, start: int, stop: int, length: int) -> tuple[int, int]:
        first = self._aligned(math.floor(start / self))
        return first, min(math.ceil(stop / self) + _BICUBIC_REACH, length)

    def _aligned(self, start: int) -> int:
        # At a scale of p / q, pixels of both resolutions begin together every q low-resolution ones.
        return max(0, (start - _BICUBIC_REACH) // self.denominator * self.denominator)
