"""The network on images of any size: clean estimates in overlapping windows that are blended at every step.

All windows see one noise field and are averaged before the next step begins, so no seam can grow. It is
MultiDiffusion (Bar-Tal et al. 2023, Eq. 5), but what is averaged is the clean estimate and not the next noisy
image: the same thing for a linear step, and the estimate is what solvers of a higher order remember.

Shape legend: B images, b windows that go through the network together, C channels, H x W pixels of the high
resolution, h x w of the low one. Images are in [-1, 1].
"""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from diffusion import Network, ResidualGenerator
from engine.device import is_out_of_memory
from restoration.tiling import Field, Scale, Tile, Window, plan_tiles
from unet import Condition

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

AUTOMATIC_TILE = 512
WHOLE_PIXELS = 2**20  # an image of no more is restored in one piece unless told otherwise
MARGIN = 16  # pixels at the inner edge of a window that see most of the padding beyond it


class View(NamedTuple):
    """One way to look at an image: turned by `turns` quarter circles, then mirrored if `mirrored`."""

    turns: int
    mirrored: bool

    def apply(self, image: Tensor) -> Tensor:
        """Turn and mirror (..., H, W)."""
        turned = image.rot90(self.turns, (-2, -1)) if self.turns else image
        return turned.flip(-1) if self.mirrored else turned

    def undo(self, image: Tensor) -> Tensor:
        """The inverse of `apply`."""
        turned = image.flip(-1) if self.mirrored else image
        return turned.rot90(-self.turns, (-2, -1)) if self.turns else turned


UPRIGHT = (View(0, False),)
ALL_VIEWS = tuple(View(turns, mirrored) for mirrored in (False, True) for turns in range(4))


@dataclass
class Windows:
    """How images are cut into windows. Where memory runs out they get smaller, and stay so.

    Attributes:
        side: of a window in pixels of the result; 0 for one piece, None to decide by the size of the image.
        overlap: pixels that neighbouring windows share.
        batch_size: windows that go through the network together.
        multiple: windows begin at multiples of this many pixels, and overlap by multiples of it.
    """

    side: int | None
    overlap: int
    batch_size: int
    multiple: int

    @property
    def smallest(self) -> int:
        """The least side of a window."""
        return 2 * self.multiple

    def plan(self, height: int, width: int) -> list[Tile]:
        """The windows of an H x W image."""
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
        """The side that stands for this one: a multiple, and not below the smallest."""
        return max(self.smallest, math.ceil(side / self.multiple) * self.multiple)

    def attempt(self, height: int, width: int, work: Callable[[list[Tile]], Result]) -> Result:
        """Do something with the windows of an H x W image, in smaller ones where memory runs out."""
        while True:
            tiles = self.plan(height, width)
            try:
                return work(tiles)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
            # Behind the handler, which holds on to the tensors that filled the memory.
            self.use_less_memory(tiles)

    def use_less_memory(self, tiles: Sequence[Tile]) -> None:
        """One window at a time from now on or, where it was one, windows of half the side.

        Raises:
            torch.OutOfMemoryError: they are as small as they can be.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.batch_size > 1:
            self.batch_size = 1
            return
        side = max(max(tile.window.shape) for tile in tiles)
        if side <= self.smallest:
            raise torch.OutOfMemoryError(f"out of memory even with windows of {self.smallest} pixels")
        self.side = max(self.smallest, side // 2)
        logger.warning("out of memory: going on with windows of %d pixels", self.side)


class Job(NamedTuple):
    """A window of one of the images."""

    image: int
    tile: Tile


class Prepared(NamedTuple):
    """What a batch of windows needs at every step."""

    base: Tensor  # (b, C, height, width)
    contexts: tuple[object, ...]  # one for each view


class Base:
    """What sampled residuals are added to: the upscaled images and, if the network predicts one, their mean.

    The mean is that of the whole image, in whatever windows it is computed: each sees as far beyond its edges
    as the predictor reaches.

    Args:
        generator: the process and the precision.
        network: a trained network.
        low_res: (B, C, h, w) on the generator's device.
        windows: how to cut the images.
        views: the predicted mean is averaged over them.
    """

    def __init__(
        self,
        generator: ResidualGenerator,
        network: Network,
        low_res: Tensor,
        windows: Windows,
        views: Sequence[View],
    ) -> None:
        self.generator, self.network, self.low_res, self.views = generator, network, low_res, views
        self.scale = Scale(float(network.scale))
        self.size = self.scale.high_size(*low_res.shape[-2:])
        self._field: Field | None = None
        if network.mean_reach:
            self._field = windows.attempt(*self.size, self._predict)

    def read(self, window: Window, image: int | None = None) -> Tensor:
        """(1 or B, C, height, width) of one image or all."""
        if self._field is not None:
            return self._field.read(window, image)
        low_res = self.low_res if image is None else self.low_res[image : image + 1]
        return self.scale.upscale(low_res, window).clamp(-1, 1)

    def _predict(self, tiles: list[Tile]) -> Field:
        field = Field((*self.low_res.shape[:2], *self.size), self.low_res.device)
        # Windows begin where those of the whole image would, so that padding and folding are the same.
        multiple = self.network.window_multiple
        halo = math.ceil(self.network.mean_reach / multiple) * multiple
        for tile in tiles:
            window = tile.window
            seen = window.grown(halo, *self.size)
            place = window.within(seen)
            for image in range(len(self.low_res)):
                mean = self._mean(self.scale.upscale(self.low_res[image : image + 1], seen).clamp(-1, 1))
                field.write(window, mean[..., place.top : place.bottom, place.left : place.right], image)
        return field

    def _mean(self, upscaled: Tensor) -> Tensor:
        """(1, C, height, width) -> the same with the predicted mean added."""
        total = torch.zeros_like(upscaled)
        for view in self.views:
            _, mean = self.generator.encode(self.network, Condition(view.apply(upscaled), self.low_res))
            assert mean is not None
            total += view.undo(mean.float())
        return upscaled + self.network.residual_std * total / len(self.views)


class TiledDenoiser:
    """Estimates the clean residuals of images of one size.

    Args:
        generator: the process and the precision.
        network: a trained network.
        base: of the images (B, C, H, W); image number n that is denoised is its image n modulo B.
        windows: how to cut the images.
        progress: called with the evaluations of the network done so far, in fractions.
    """

    def __init__(
        self,
        generator: ResidualGenerator,
        network: Network,
        base: Base,
        windows: Windows,
        progress: Callable[[float], None],
    ) -> None:
        self.generator = generator
        self.network = network
        self.base = base
        self.scale, self.views = base.scale, base.views
        self.windows = windows
        self.progress = progress
        self.evaluations = 0
        # (B, N, E) of the whole images for each view, which all windows share; or None.
        self.tokens = [self._encode_tokens(view.apply(base.low_res)) for view in self.views]
        self.tiles: list[Tile] = []
        self.prepared: dict[int, Prepared] = {}  # by the batch's place in the list

    def __call__(self, noisy: Field, timestep: int) -> Field:
        """The clean estimates (n B, C, H, W), in smaller windows if memory runs out."""
        clean = Field(noisy.shape, noisy.device)

        def work(tiles: list[Tile]) -> None:
            clean.clear()
            if [tile.window for tile in tiles] != [tile.window for tile in self.tiles]:
                self.prepared.clear()
            self.tiles = tiles
            self._denoise(noisy, clean, timestep)

        self.windows.attempt(*self.base.size, work)
        self.evaluations += 1
        return clean

    def _denoise(self, noisy: Field, clean: Field, timestep: int) -> None:
        """Add the weighted estimates of all windows to `clean`."""
        batches = self._batches(noisy.shape[0])
        # Encoding costs little next to the network; kept for a large image, it would fill the memory.
        keep = noisy.shape[0] * math.prod(noisy.shape[-2:]) * len(self.views) <= WHOLE_PIXELS
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

    def _estimate(self, noisy: Tensor, timestep: int, prepared: Prepared) -> Tensor:
        """The mean over the views of the network's estimates for windows (b, C, height, width)."""
        total = torch.zeros_like(noisy)
        for view, context in zip(self.views, prepared.contexts, strict=True):
            seen, base = view.apply(noisy), view.apply(prepared.base)
            total += view.undo(self.generator.estimate(self.network, seen, timestep, context, base))
        return total / len(self.views)

    def _batches(self, images: int) -> list[list[Job]]:
        """The windows of all images, in batches of one shape."""
        jobs = [Job(image, tile) for tile in self.tiles for image in range(images)]
        jobs.sort(key=lambda job: job.tile.window.shape, reverse=True)
        size = self.windows.batch_size
        batches = []
        for _, group in itertools.groupby(jobs, key=lambda job: job.tile.window.shape):
            same = list(group)
            batches += [same[start : start + size] for start in range(0, len(same), size)]
        return batches

    def _prepare(self, jobs: Sequence[Job]) -> Prepared:
        """Read the base of a batch of windows, and encode their condition."""
        images = [job.image % len(self.base.low_res) for job in jobs]
        windows = [job.tile.window for job in jobs]
        pairs = list(zip(windows, images, strict=True))
        base = torch.cat([self.base.read(window, image) for window, image in pairs])  # (b, C, height, width)
        upscaled = torch.stack([self.scale.upscale(self.base.low_res[image], one) for one, image in pairs])
        contexts = []
        for view, tokens in zip(self.views, self.tokens, strict=True):
            shared = None if tokens is None else tokens[images]
            condition = Condition(view.apply(upscaled.clamp(-1, 1)), tokens=shared)
            contexts.append(self.generator.encode(self.network, condition)[0])
        return Prepared(base, tuple(contexts))

    def _encode_tokens(self, low_res: Tensor) -> Tensor | None:
        """Tokens (B, N, E) for cross-attention, or None where the network has none."""
        with self.generator.autocast():
            return self.network.encode_tokens(low_res)
