"""The only loop over windows of an image, which get smaller where memory runs out."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from engine.device import is_out_of_memory
from restoration.fields import release_pages, zeros
from restoration.tiling import Tile, Window, plan_tiles

Progress: TypeAlias = Callable[[float], object]  # called with the finished part of the work, up to 1
AUTOMATIC_TILE = 512
WHOLE_PIXELS = 2**20  # an image of no more is restored in one piece unless told otherwise
MARGIN = 16  # pixels at the inner edge of a window that see most of the padding beyond it
logger = logging.getLogger(__name__)


def no_progress(_: float) -> None:
    """Report nothing."""


@dataclass
class Windows:
    """Plans windows and works on them one after another; once memory ran out, they stay smaller."""

    side: int | None  # in pixels of the result; 0 for one piece, None to decide by the image's size
    overlap: int  # pixels that neighbours share
    multiple: int  # sides, overlaps and beginnings are multiples of it
    device: torch.device

    def plan(self, height: int, width: int, overlap: int | None = None) -> list[Tile]:
        """Cover an image with windows that share so many pixels, None for the usual overlap."""
        side = self.side
        if side is None:
            side = 0 if height * width <= WHOLE_PIXELS else AUTOMATIC_TILE
        if side == 0:
            return plan_tiles(height, width, max(height, width), 0, 0)
        side, wanted = self.rounded(side), self.overlap if overlap is None else overlap
        overlap = min(math.ceil(wanted / self.multiple), side // self.multiple // 2) * self.multiple
        return plan_tiles(height, width, side, overlap, min(MARGIN, max(0, overlap - 1) // 2))

    def rounded(self, side: int) -> int:
        """Return the next side that windows can have: two multiples or more, so that one can be shared."""
        return max(2, math.ceil(side / self.multiple)) * self.multiple

    # All windows see one noise field and are averaged before the next step begins, so no seam can grow.
    def blend(
        self,
        shape: tuple[int, ...],
        work: Callable[[Window], Tensor],
        progress: Progress = no_progress,
        halo: int | None = None,
    ) -> Tensor:
        """Put (B, C, H, W) together from what `work` makes of windows, (B, C, height, width).

        With a halo, windows share nothing, but `work` gets so many pixels more on each side of them.
        torch.OutOfMemoryError where even the smallest windows are too large.
        """
        height, width = shape[-2:]
        while True:
            tiles = self.plan(height, width, None if halo is None else 0)
            tiles.sort(key=lambda tile: tile.window.shape, reverse=True)  # the largest soon tell what fits
            try:
                return self._blended(shape, tiles, work, progress, halo or 0)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
            # Behind the handler, which holds on to the tensors that filled the memory.
            self._get_smaller(max(tiles[0].window.shape))

    def _blended(
        self,
        shape: tuple[int, ...],
        tiles: list[Tile],
        work: Callable[[Window], Tensor],
        progress: Progress,
        halo: int,
    ) -> Tensor:
        blended = zeros(shape, self.device)
        height, width = shape[-2:]
        for number, tile in enumerate(tiles, start=1):
            seen = tile.window.grown(halo, height, width)
            made = tile.window.seen_from(seen.top, seen.left).cut(work(seen))
            tile.window.cut(blended).add_(tile.weighted(made).to(blended.device))
            release_pages()
            progress(number / len(tiles))
        return blended

    def _get_smaller(self, side: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smallest = self.rounded(1)
        if side <= smallest:
            raise torch.OutOfMemoryError(f"out of memory even with windows of {smallest} pixels")
        self.side = max(smallest, side // 2)
        logger.warning("out of memory: going on with windows of %d pixels", self.side)
