"""The network on images of any size: overlapping windows, blended at every step.

MultiDiffusion (Bar-Tal et al. 2023, Eq. 5) of clean estimates. B images or b windows together have C
channels, H x W high and h x w low resolution, in [-1, 1].
"""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from diffusion import Contexts, Network, ResidualGenerator
from engine.device import is_out_of_memory
from restoration.tiling import Field, Scale, Tile, Window, plan_tiles
from unet import Condition

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Progress = Callable[[float], object]  # called with the finished part of the work, up to 1

AUTOMATIC_TILE = 512
WHOLE_PIXELS = 2**20  # an image of no more is restored in one piece unless told otherwise
MARGIN = 16  # pixels at the inner edge of a window that see most of the padding beyond it


def no_progress(_: float) -> None:
    """Report none."""


class View(NamedTuple):
    """Turned by quarter circles, then perhaps mirrored."""

    turns: int
    mirrored: bool

    def apply(self, image: Tensor) -> Tensor:
        """(..., H, W)."""
        turned = image.rot90(self.turns, (-2, -1)) if self.turns else image
        return turned.flip(-1) if self.mirrored else turned

    def undo(self, image: Tensor) -> Tensor:
        turned = image.flip(-1) if self.mirrored else image
        return turned.rot90(-self.turns, (-2, -1)) if self.turns else turned


UPRIGHT = (View(0, False),)
ALL_VIEWS = tuple(View(turns, mirrored) for mirrored in (False, True) for turns in range(4))


@dataclass
class Windows:
    """Where memory runs out they get smaller, and stay so."""

    side: int | None  # in pixels of the result; 0 for one piece, None to decide by the image's size
    overlap: int  # pixels that neighbours share
    batch_size: int  # windows that go through the network together
    multiple: int  # of beginnings and overlaps

    def plan(self, height: int, width: int) -> list[Tile]:
        side = self.side
        if side is None:
            side = 0 if height * width <= WHOLE_PIXELS else AUTOMATIC_TILE
        if side == 0:
            return plan_tiles(height, width, max(height, width), 0, 0)
        side = self.rounded(side)
        most = side // self.multiple // 2
        overlap = min(math.ceil(self.overlap / self.multiple), most) * self.multiple
        return plan_tiles(height, width, side, overlap, min(MARGIN, (overlap - 1) // 2))

    def rounded(self, side: int) -> int:
        """The side that windows have."""
        return max(2, math.ceil(side / self.multiple)) * self.multiple

    def attempt(self, height: int, width: int, work: Callable[[list[Tile]], Result]) -> Result:
        """torch.OutOfMemoryError where even the smallest windows are too large."""
        while True:
            tiles = self.plan(height, width)
            try:
                return work(tiles)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
            # Behind the handler, which holds on to the tensors that filled the memory.
            self.use_less_memory(max(max(tile.window.shape) for tile in tiles))

    def use_less_memory(self, side: int) -> None:
        """One window at a time or, if it was one, half this side."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.batch_size > 1:
            self.batch_size = 1
            return
        smallest = self.rounded(1)
        if side <= smallest:
            raise torch.OutOfMemoryError(f"out of memory even with windows of {smallest} pixels")
        self.side = max(smallest, side // 2)
        logger.warning("out of memory: going on with windows of %d pixels", self.side)


class Base:
    """What sampled residuals are added to: the upscaled images, plus the predicted mean if there is one.

    `low_res` is (B, C, h, w), on the generator's device; `tokens` (B, N, E); `progress` is that of the mean.
    """

    def __init__(
        self,
        generator: ResidualGenerator,
        network: Network,
        low_res: Tensor,
        windows: Windows,
        views: Sequence[View],
        tokens: Tensor | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self.generator, self.network, self.low_res = generator, network, low_res
        self.windows, self.views, self.tokens = windows, views, tokens
        self.scale = Scale(float(network.scale))
        self.size = self.scale.high_size(*low_res.shape[-2:])
        predict = partial(self._predict, progress)
        self._field = windows.attempt(*self.size, predict) if network.mean_reach else None

    def read(self, window: Window, image: int | None = None) -> Tensor:
        """(1 or B, C, height, width)."""
        return self.upscaled(window, image) if self._field is None else self._field.read(window, image)

    def upscaled(self, window: Window, image: int | None = None) -> Tensor:
        """Without a predicted mean."""
        low_res = self.low_res if image is None else self.low_res[image : image + 1]
        return self.scale.upscale(low_res, window).clamp(-1, 1)

    def _predict(self, progress: Progress, tiles: list[Tile]) -> Field:
        field = Field((*self.low_res.shape[:2], *self.size), self.low_res.device)
        # The predictor sees all that it reaches, from where the whole image would be padded and folded alike.
        multiple = self.network.window_multiple
        halo = math.ceil(self.network.mean_reach / multiple) * multiple
        places = list(itertools.product(tiles, range(len(self.low_res))))
        for number, (tile, image) in enumerate(places):
            seen = tile.window.grown(halo, *self.size)
            mean = self._mean(self.upscaled(seen, image))
            field.write(tile.window, tile.window.seen_from(seen.top, seen.left).cut(mean), image)
            progress((number + 1) / len(places))
        return field

    def _mean(self, upscaled: Tensor) -> Tensor:
        """(1, C, height, width) plus its predicted mean."""
        total = torch.zeros_like(upscaled)
        for view in self.views:
            _, mean = self.generator.encode(self.network, Condition(view.apply(upscaled), self.low_res))
            assert mean is not None
            total += view.undo(mean.float())
        return upscaled + self.network.residual_std * total / len(self.views)


class Job(NamedTuple):
    image: int
    tile: Tile


class Prepared(NamedTuple):
    """For every step of a batch of windows."""

    base: Tensor  # (b, C, height, width)
    contexts: tuple[Contexts, ...]  # one for each view


class TiledDenoiser:
    """Estimates the clean residuals of n B images, the i-th of image i modulo B of the base."""

    def __init__(self, base: Base, progress: Progress) -> None:
        self.base, self.progress = base, progress
        self.evaluations = 0
        with base.generator.autocast():
            # (B, N, E) of the whole images for each view, which all windows share; or None.
            self.tokens = [
                base.network.encode_tokens(view.apply(base.low_res)) if base.tokens is None else base.tokens
                for view in base.views
            ]
        self.tiles: list[Tile] = []
        self.prepared: dict[int, Prepared] = {}  # by the batch's place in the list

    # All windows see one noise field and are averaged before the next step begins, so no seam can grow.
    def __call__(self, noisy: Field, timestep: int) -> Field:
        def work(tiles: list[Tile]) -> Field:
            if [tile.window for tile in tiles] != [tile.window for tile in self.tiles]:
                self.prepared.clear()
            self.tiles = tiles
            return self._denoise(noisy, timestep)

        clean = self.base.windows.attempt(*self.base.size, work)
        self.evaluations += 1
        return clean

    def _denoise(self, noisy: Field, timestep: int) -> Field:
        clean = Field(noisy.shape, noisy.device)
        batches = self._batches(noisy.shape[0])
        # Encoding costs little next to the network; kept for a large image, it would fill the memory.
        keep = noisy.shape[0] * math.prod(noisy.shape[-2:]) * len(self.base.views) <= WHOLE_PIXELS
        for place, jobs in enumerate(batches):
            prepared = self.prepared.get(place) or self._prepare(jobs)
            if keep:
                self.prepared[place] = prepared
            noisy_windows = torch.cat([noisy.read(job.tile.window, job.image) for job in jobs])
            estimates = self._estimate(noisy_windows, timestep, prepared)  # (b, C, height, width)
            for job, estimate in zip(jobs, estimates, strict=True):
                weighted = estimate * job.tile.row_weights.to(estimate) * job.tile.column_weights.to(estimate)
                clean.add(job.tile.window, weighted[None], job.image)
            self.progress(self.evaluations + (place + 1) / len(batches))
        return clean

    def _estimate(self, noisy: Tensor, timestep: int, prepared: Prepared) -> Tensor:
        """The mean over the views, (b, C, height, width)."""
        generator, network, views = self.base.generator, self.base.network, self.base.views
        total = torch.zeros_like(noisy)
        for view, contexts in zip(views, prepared.contexts, strict=True):
            seen, base = view.apply(noisy), view.apply(prepared.base)
            total += view.undo(generator.estimate(network, seen, timestep, contexts, base))
        return total / len(views)

    def _batches(self, images: int) -> list[list[Job]]:
        """Of one shape each."""
        jobs = [Job(image, tile) for tile in self.tiles for image in range(images)]
        jobs.sort(key=lambda job: job.tile.window.shape, reverse=True)
        size = self.base.windows.batch_size
        batches = []
        for _, group in itertools.groupby(jobs, key=lambda job: job.tile.window.shape):
            same = list(group)
            batches += [same[start : start + size] for start in range(0, len(same), size)]
        return batches

    def _prepare(self, jobs: Sequence[Job]) -> Prepared:
        images = [job.image % len(self.base.low_res) for job in jobs]
        places = [(job.tile.window, image) for job, image in zip(jobs, images, strict=True)]
        upscaled = torch.cat([self.base.upscaled(*place) for place in places])  # (b, C, height, width)
        contexts = []
        for view, tokens in zip(self.base.views, self.tokens, strict=True):
            condition = Condition(view.apply(upscaled), tokens=None if tokens is None else tokens[images])
            contexts.append(self.base.generator.encode(self.base.network, condition)[0])
        return Prepared(torch.cat([self.base.read(*place) for place in places]), tuple(contexts))
