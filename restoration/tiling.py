"""Windows of images: where they lie, how they are blended, and how each is resized as in the whole."""

import math
from typing import NamedTuple

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


class Scale:
    """Converts sizes and windows between the resolutions; a window is resized as in the whole image."""

    def __init__(self, factor: float) -> None:
        self.fraction = exact_scale(factor)

    def __float__(self) -> float:
        return float(self.fraction)

    def high_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of an image (h, w), each length rounded up."""
        return math.ceil(self.fraction * height), math.ceil(self.fraction * width)

    def upscale(self, low_res: Tensor, window: Window) -> Tensor:
        """Upscale what the high-resolution `window` needs of the whole (..., h, w)."""
        top, bottom = self._low_span(window.top, window.bottom, low_res.shape[-2])
        left, right = self._low_span(window.left, window.right, low_res.shape[-1])
        upscaled = resize(low_res[..., top:bottom, left:right], scale=float(self))
        return window.seen_from(int(top * self.fraction), int(left * self.fraction)).cut(upscaled)

    def high_window(self, low: Window, height: int, width: int) -> Window:
        """Return the window of an H x W image that `downscale` needs to make `low`."""
        return Window(
            *self._high_span(low.top, low.bottom, height), *self._high_span(low.left, low.right, width)
        )

    def downscale(self, high_res: Tensor, high: Window, low: Window, border: Border = "mirror") -> Tensor:
        """Make the window `low` from `high_res`, the pixels of its `high_window` called `high`."""
        shrunk = resize(high_res, scale=1 / float(self), border=border)
        return low.seen_from(int(high.top / self.fraction), int(high.left / self.fraction)).cut(shrunk)

    def _low_span(self, start: int, stop: int, length: int) -> tuple[int, int]:
        first = self._aligned(math.floor(start / self.fraction))
        return first, min(math.ceil(stop / self.fraction) + _BICUBIC_REACH, length)

    def _high_span(self, start: int, stop: int, length: int) -> tuple[int, int]:
        last = math.ceil((stop + _BICUBIC_REACH) * self.fraction)
        return int(self._aligned(start) * self.fraction), min(last, length)

    def _aligned(self, start: int) -> int:
        # At a scale of p / q, pixels of both resolutions begin together every q low-resolution ones.
        return max(0, (start - _BICUBIC_REACH) // self.fraction.denominator * self.fraction.denominator)
