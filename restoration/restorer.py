"""The one way to restore: options, results, and the network at work on whole images in windows.

Estimates of overlapping windows are blended at every step, MultiDiffusion (Bar-Tal et al. 2023, Eq. 5) of
clean estimates. B images of C channels, H x W high and h x w low resolution; b windows go through the network
together. [-1, 1] inside, [0, 1] once restored.
"""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion import Contexts, ResidualGenerator
from engine.device import is_out_of_memory
from engine.options import OptionError, Options, option
from imaging.files import DecodedImage, write_image
from imaging.pixels import Pixels, to_model_range, to_unit_range
from models import LoadedModel
from network import Condition
from restoration.fields import in_bands, release_pages, row_bands, zeros
from restoration.pictures import Restorable, to_deviation, to_picture
from restoration.tiling import Scale, Tile, Window, plan_windows, rounded_side
from samplers import DEFAULT_SCHEDULER, SchedulerName, Step, draw_noise, noise_stream, sample

Preset = Literal["fidelity", "balanced", "detail"]
Progress: TypeAlias = Callable[[float], object]  # called with the finished part of the work, up to 1
logger = logging.getLogger(__name__)

# The mean has the highest PSNR and no texture it is unsure of; a sample has the texture and, for a perfect
# model, twice the squared error. Between them lie samples that start from less noise. 0 steps are the mean
# that the network predicts; one that predicts none gives it in one step.
PRESETS: dict[Preset, float] = {"fidelity": 0.0, "balanced": 0.3, "detail": 1.0}
SAMPLED_STEPS = 6
CONSISTENCY_ROUNDS = 10
AUTOMATIC_TILE = 512
WHOLE_PIXELS = 2**20  # an image of no more is restored in one piece unless told otherwise


def no_progress(_: float) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class RestoreConfig(Options):
    """Holds the options of restoring."""

    mode: Preset | None = option(None, "preset, faithful to sharp (default: fidelity, or detail of samples)")
    detail: float | None = option(None, "amount of texture to invent, not the mode's", low=0, high=1)
    steps: int | None = option(None, "number of steps, not the mode's; 0: the predicted mean", low=0)
    num_images: int = option(1, "number of samples to average", low=1)
    scheduler: SchedulerName = option(DEFAULT_SCHEDULER, "sampler: how to step from noise to image")
    eta: float = option(0.0, "fresh noise at each step of ddim, 0 to 1")
    seed: int = option(0, "seed of the noise: the same one gives the same bytes", low=0, high=2**63 - 1)
    tile: int | None = option(None, "side of the windows; 0: one piece; auto: by the image's size", low=0)
    overlap: int = option(64, "pixels that neighbouring windows share", low=2)
    consistency: bool = option(False, "correction: the result shrinks to the input, which bicubic shrank")
    self_ensemble: bool = option(False, "average of the predicted mean over 8 flips and rotations")
    guidance: float = option(1.0, "weight of tokens: 2 doubles what they change, at twice the work", low=0)

    def steps_and_detail(self, sampled_steps: int = SAMPLED_STEPS) -> tuple[int, float]:
        """Steps and detail: the mode's, where they were not given."""
        sampled = self.num_images > 1 or self.steps
        detail = PRESETS[self.mode or ("detail" if sampled else "fidelity")]
        if self.detail is not None:
            detail = self.detail
        return self.steps if self.steps is not None else sampled_steps if detail else 0, detail


@dataclass(frozen=True)
class Restoration(DecodedImage):
    """A restored picture: (H, W), (H, W, 1) or (H, W, 3), uint8 or uint16, as the input."""

    deviation: npt.NDArray[np.float32] | None = None  # (H, W) in [0, 1], over samples; RMS of the channels

    def save(self, path: str | Path) -> None:
        write_image(path, self.pixels, self.alpha, metadata=self.metadata)


class Restorer:
    """Restores images with one network, which moves to the device, and one configuration.

    `precision` is the dtype to autocast to, None for float32. Once memory ran out, windows stay smaller.
    ValueError: an untrained network, one not for RGB, or options that it cannot follow.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: RestoreConfig,
        device: torch.device,
        precision: torch.dtype | None = None,
    ) -> None:
        self.network = model.network.to(device)
        self.config, self.device = config, device
        self.generator = ResidualGenerator(
            device=device,
            process=model.process,
            precision=precision,
            scheduler=config.scheduler,
            guidance=config.guidance,
        )
        factor, self.residual_std = float(self.network.scale), float(self.network.residual_std)
        if self.residual_std <= 0 or factor <= 0:
            raise ValueError("this network was never trained: it knows no scale; give a trained checkpoint")
        if self.network.image_channels != 3:
            raise ValueError(f"this network is for {self.network.image_channels} channels: RGB needs 3")
        if config.self_ensemble and not self.network.mean_reach:
            raise OptionError("self_ensemble", True, "this network predicts no mean; leave it out")
        self.scale = Scale(factor)
        if config.consistency and model.degradation.random:
            rule = f"this model undoes {model.degradation.kind}: take the clean weights, or leave it out"
            raise OptionError("consistency", True, rule)
        self.border = model.degradation.border
        count, detail = config.steps_and_detail(len(model.process.levels) or SAMPLED_STEPS)
        if not count and not self.network.mean_reach:
            if config.steps == 0:
                raise OptionError("steps", 0, "this network predicts no mean; give 1 or more")
            count = 1
        self.step_count, self.steps = count, self.generator.plan(count, config.eta, detail)
        self.side, multiple = config.tile, self.network.window_multiple
        if config.tile and (side := rounded_side(config.tile, multiple)) != config.tile:
            needed = f"a multiple of {multiple} pixels, at least {2 * multiple}"
            logger.warning("tile %d: this network needs %s; going on with %d", config.tile, needed, side)

    def check(self, *, deviation: bool = False, tokens: bool = False) -> None:
        """Raise OptionError for what cannot be done to any picture."""
        config, steps = self.config, self.steps
        if deviation and not steps:
            raise OptionError("mode", config.mode or "fidelity", "the predicted mean has no uncertainty")
        if deviation and config.num_images < 2:
            raise OptionError("num_images", config.num_images, "an uncertainty map needs at least 2")
        if tokens and not self.network.takes_tokens:
            raise ValueError("this model takes no tokens: leave them out, or train one that does")
        if tokens and not steps:
            raise OptionError("steps", 0, "the predicted mean takes no tokens: give 1 or more, or no tokens")
        if not tokens and config.guidance != 1:
            raise OptionError("guidance", config.guidance, "it strengthens tokens: give some or leave it out")

    def restore(
        self,
        image: Restorable,
        *,
        deviation: bool = False,
        progress: Progress = no_progress,
        tokens: Tensor | None = None,
    ) -> Restoration:
        """Restore a picture: grey stays grey, 16 bits stay 16, alpha is restored too.

        Args:
            image: see pictures.ACCEPTED.
            deviation: measure the standard deviation over the samples.
            tokens: (N, E), of the encoder that the network was trained with.

        ValueError: another image, or what `check` refuses. OSError: no room for temporary files.
        """
        self.check(deviation=deviation, tokens=tokens is not None)
        picture = to_picture(image)
        described = None if tokens is None else tokens[None]
        mean, variance = self._restore(picture.low_res[None], self.steps, described, deviation, progress)
        self._make_consistent(mean, picture.low_res[None])
        return Restoration(
            picture.to_pixels(mean),
            None if picture.source.alpha is None else self._restore_alpha(picture.source.alpha),
            picture.source.metadata,
            deviation=None if variance is None else to_deviation(variance),
        )

    def __call__(self, low_res: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Restore (B, 3, h, w) in [0, 1], with tokens (B, N, E), to (B, 3, H, W), float32 on the CPU.

        Unlike `restore`, it rounds nothing; all images have the same noise. ValueError for another shape.
        """
        if low_res.ndim != 4 or low_res.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(low_res.shape)}: expected a batch (B, 3, h, w)")
        self.check(tokens=tokens is not None)
        low_res = to_model_range(low_res)
        restored, _ = self._restore(low_res, self.steps, tokens)
        self._make_consistent(restored, low_res)
        return restored.cpu().clone()  # no tensor of inference mode

    def tiles(self, height: int, width: int, overlap: int) -> list[Tile]:
        """Cover a result with windows, as large as memory allowed so far; none is larger than the first."""
        side = self.side
        if side is None:
            side = 0 if height * width <= WHOLE_PIXELS else AUTOMATIC_TILE
        return plan_windows(height, width, side, overlap, self.network.window_multiple)

    @torch.inference_mode()
    def _restore(
        self,
        low_res: Tensor,
        steps: Sequence[Step],
        tokens: Tensor | None = None,
        deviation: bool = False,
        progress: Progress = no_progress,
    ) -> tuple[Tensor, Tensor | None]:
        """Mean and variance of the samples, (B, C, H, W) in [0, 1], of (B, C, h, w) in [-1, 1].

        Where memory runs out, windows get smaller, and stay so.
        """
        size = self.scale.high_size(*low_res.shape[-2:])
        while True:
            try:
                return self._average(low_res.to(self.device), steps, tokens, deviation, progress)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
            # Behind the handler, which holds on to the tensors that filled the memory.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            side = max(self.tiles(*size, overlap=0)[0].window.shape)
            smallest = rounded_side(1, self.network.window_multiple)
            if side <= smallest:
                raise torch.OutOfMemoryError(f"out of memory even with windows of {smallest} pixels")
            self.side = max(smallest, side // 2)
            logger.warning("out of memory: going on with windows of %d pixels", self.side)

    def _average(
        self,
        low_res: Tensor,
        steps: Sequence[Step],
        tokens: Tensor | None,
        deviation: bool,
        progress: Progress,
    ) -> tuple[Tensor, Tensor | None]:
        """Average samples (Welford 1962); without steps there is the predicted mean alone."""
        size, count = self.scale.high_size(*low_res.shape[-2:]), self.config.num_images
        windows = len(self.tiles(*size, overlap=0)), len(self.tiles(*size, self.config.overlap))
        total, finished = windows[0] + len(steps) * count * windows[1], itertools.count(1)

        def tick() -> None:
            release_pages()
            progress(next(finished) / total)

        with self.generator.autocast():
            tokens = self.network.encode_tokens(low_res) if tokens is None else tokens.to(self.device)
        base = self._base(low_res, tokens, tick)
        if not steps:
            return in_bands(lambda band: to_unit_range(band.clamp(-1, 1)), self.device, base), None
        denoise = self._denoiser(low_res, tokens, base, tick)
        mean = self._sample(base, steps, denoise, 0)
        variance = zeros(mean.shape, self.device) if deviation else None
        for number in range(1, count):
            one = self._sample(base, steps, denoise, number)
            for band in row_bands(*size):
                before, new = (band.cut(image).to(self.device) for image in (mean, one))
                after = before + (new - before) / (number + 1)
                if variance is not None:
                    added = (new - before) * (new - after) / (count - 1)
                    band.cut(variance).add_(added.to(variance.device))
                band.cut(mean).copy_(after)
            del one  # its memory is free before the next is made
        return mean, variance

    def _restore_alpha(self, alpha: Pixels) -> Pixels:
        if alpha.min() == alpha.max():
            return np.full(self.scale.high_size(*alpha.shape), alpha.flat[0], alpha.dtype)
        mask = to_picture(alpha)
        # The posterior mean: a mask has edges and no texture to invent.
        steps = () if self.network.mean_reach else self.generator.plan(1)
        return mask.to_pixels(self._restore(mask.low_res[None], steps)[0])

    @torch.inference_mode()
    def _make_consistent(self, restored: Tensor, low_res: Tensor) -> None:
        """Make (B, C, H, W) in [0, 1] shrink to (B, C, h, w), if asked to (Irani & Peleg 1991)."""
        target = to_unit_range(low_res.to(self.device))
        for _ in range(CONSISTENCY_ROUNDS if self.config.consistency else 0):
            error = target.clone()
            for low in row_bands(*target.shape[-2:]):
                low.cut(error).sub_(self.scale.downscale(restored, low, self.device, self.border))
            for band in row_bands(*restored.shape[-2:]):
                corrected = band.cut(restored).to(self.device) + self.scale.upscale(error, band)
                band.cut(restored).copy_(corrected.clamp(0, 1))

    def _base(self, low_res: Tensor, tokens: Tensor | None, tick: Callable[[], None]) -> Tensor:
        """Upscale images to (B, C, H, W), and add the mean where the network predicts one.

        A self-ensemble averages the mean over 8 flips and rotations, each turned back.
        """
        views = list(itertools.product(([], [-1]), range(4)))[: 8 if self.config.self_ensemble else 1]
        # The predictor sees all that it reaches, from where the whole image would be padded and folded alike.
        multiple = self.network.window_multiple
        halo = math.ceil(self.network.mean_reach / multiple) * multiple
        size = self.scale.high_size(*low_res.shape[-2:])
        base = zeros((*low_res.shape[:2], *size), self.device)
        for window, *_ in self.tiles(*size, overlap=0):
            seen = window.grown(halo, *size)
            image = self.scale.upscale(low_res, seen).clamp(-1, 1)
            mean = torch.zeros_like(image)
            for flipped, turns in views if self.network.mean_reach else ():
                condition = Condition(image.rot90(turns, (-2, -1)).flip(flipped), tokens=tokens)
                with self.generator.autocast():  # not `encode`, which encodes once more for guidance
                    _, predicted = self.network.encode_context(condition)
                mean += cast(Tensor, predicted).float().flip(flipped).rot90(-turns, (-2, -1))
            image = image + self.residual_std * (mean / len(views))
            window.cut(base).copy_(window.seen_from(seen.top, seen.left).cut(image))
            tick()
        return base

    def _sample(
        self, base: Tensor, steps: Sequence[Step], denoise: Callable[[Tensor, int], Tensor], number: int
    ) -> Tensor:
        """Make the sample of this number, (B, C, H, W) in [0, 1]."""
        streams = [noise_stream(self.config.seed, number) for _ in base]

        def noise(band: Tensor) -> Tensor:  # of the same shape; bands must be asked for from the top
            return draw_noise(streams, *band.shape[1:]).to(self.device)

        def advance(step: Step, noisy: Tensor, cleans: Sequence[Tensor]) -> Tensor:
            def following(now: Tensor, *estimates: Tensor) -> Tensor:
                return step.advance(now, estimates, noise(now) if step.noise_weight else None)

            return in_bands(following, self.device, noisy, *cleans)

        def finished(residual: Tensor, below: Tensor) -> Tensor:
            return to_unit_range((below + self.residual_std * residual).clamp(-1, 1))

        first = zeros(base.shape, self.device)
        noisy = in_bands(lambda band: self.generator.initial_scale * noise(band), self.device, first)
        *_, residual = sample(steps, noisy, denoise, advance)
        return in_bands(finished, self.device, residual, base)

    def _denoiser(
        self, low_res: Tensor, tokens: Tensor | None, base: Tensor, tick: Callable[[], None]
    ) -> Callable[[Tensor, int], Tensor]:
        """Make the function that estimates clean residuals (B, C, H, W) of noisy ones at a timestep."""
        height, width = base.shape[-2:]
        tiles = self.tiles(height, width, self.config.overlap)

        # Encoding costs little next to the network; kept for a large image, it would fill the memory.
        @lru_cache(maxsize=None if base.numel() <= 3 * WHOLE_PIXELS else 0)
        def encode(window: Window) -> Contexts:
            upscaled = self.scale.upscale(low_res, window).clamp(-1, 1)
            return self.generator.encode(self.network, Condition(upscaled, tokens=tokens))[0]

        # All windows see one noise field and are averaged before the next step begins, so no seam can grow.
        def denoise(noisy: Tensor, timestep: int) -> Tensor:
            clean = zeros(noisy.shape, self.device)
            for tile in tiles:
                now, here = (tile.window.cut(one).to(self.device) for one in (noisy, base))
                estimate = self.generator.estimate(self.network, now, timestep, encode(tile.window), here)
                tile.window.cut(clean).add_(tile.weighted(estimate).to(clean.device))
                tick()
            return clean

        return denoise
