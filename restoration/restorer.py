"""The one way to restore: options, results, and the network at work on whole images in windows.

Estimates of overlapping windows are blended at every step, MultiDiffusion (Bar-Tal et al. 2023, Eq. 5) of
clean estimates. B images of C channels, H x W high and h x w low resolution; b windows go through the network
together. [-1, 1] inside, [0, 1] once restored.
"""

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bicubic import Border
from degradation import Degradation
from diffusion import Contexts, ResidualGenerator
from engine.options import OptionError, Options, option
from imaging.files import write_image
from imaging.metadata import Metadata
from imaging.pixels import Pixels, to_model_range, to_unit_range
from models import LoadedModel
from network import Condition
from restoration.fields import check_room, row_bands, zeros
from restoration.pictures import Restorable, to_deviation, to_picture
from restoration.tiling import Scale, Window
from restoration.windows import WHOLE_PIXELS, Progress, Windows, no_progress
from samplers import DEFAULT_SCHEDULER, SchedulerName, Step, draw_noise, noise_stream, sample

Preset = Literal["fidelity", "balanced", "detail"]
logger = logging.getLogger(__name__)

# The mean has the highest PSNR and no texture it is unsure of; a sample has the texture and, for a perfect
# model, twice the squared error. Between them lie samples that start from less noise. 0 steps are the mean
# that the network predicts; one that predicts none gives it in one step.
PRESETS: dict[Preset, float] = {"fidelity": 0.0, "balanced": 0.3, "detail": 1.0}
SAMPLED_STEPS = 6
CONSISTENCY_ROUNDS = 10


@dataclass(frozen=True)
class RestoreConfig(Options):
    """How to restore."""

    mode: Preset | None = option(
        None,
        "preset: fidelity is the most faithful, without sampling; balanced a sample of little invented "
        "texture; detail a sharp sample (default: detail where steps or num_images ask for samples, else "
        "fidelity)",
    )
    detail: float | None = option(
        None, "amount of texture to invent, 0 to 1, instead of the mode's", low=0, high=1
    )
    steps: int | None = option(
        None, "number of denoising steps, instead of the mode's; 0 is the predicted mean", low=0
    )
    num_images: int = option(1, "number of samples to average", low=1)
    scheduler: SchedulerName = option(DEFAULT_SCHEDULER, "sampler: how to step from noise to image")
    eta: float = option(0.0, "fresh noise at each step of ddim, 0 to 1")
    seed: int = option(0, "seed of the noise: the same one gives the same bytes", low=0, high=2**63 - 1)
    tile: int | None = option(
        None,
        "side of the windows a large image is restored in; 0 is one piece, auto goes by its size",
        low=0,
    )
    overlap: int = option(64, "pixels that neighbouring windows share", low=2)
    consistency: bool = option(
        False, "correction that makes the result shrink to the input, for inputs that bicubic shrank"
    )
    self_ensemble: bool = option(
        False, "average of the predicted mean over 8 flips and rotations, 8 times its work"
    )
    guidance: float = option(
        1.0, "weight of tokens: 1 as trained, 2 doubles what they change, at twice the work", low=0
    )

    def steps_and_detail(self, sampled_steps: int = SAMPLED_STEPS) -> tuple[int, float]:
        """Steps and detail: the mode's, where they were not given."""
        sampled = self.num_images > 1 or self.steps
        detail = PRESETS[self.mode or ("detail" if sampled else "fidelity")]
        if self.detail is not None:
            detail = self.detail
        return self.steps if self.steps is not None else sampled_steps if detail else 0, detail


@dataclass(frozen=True)
class Restoration:
    """A restored picture."""

    pixels: Pixels  # (H, W), (H, W, 1) or (H, W, 3), uint8 or uint16, as the input
    alpha: Pixels | None = None  # (H, W) of the same dtype
    deviation: npt.NDArray[np.float32] | None = None  # (H, W) in [0, 1], over samples; RMS of the channels
    metadata: Metadata = field(default_factory=Metadata)  # of the input's file

    def save(self, path: str | Path) -> None:
        pixels = self.pixels[..., 0] if self.pixels.shape[2:] == (1,) else self.pixels
        write_image(path, pixels, self.alpha, metadata=self.metadata)


class Sampling(NamedTuple):
    """How a sample is made: `gain` times what the steps make of noise of this scale; 0 without steps."""

    steps: tuple[Step, ...]
    initial_scale: float = 1.0
    gain: float = 1.0


class Inputs(NamedTuple):
    """What all samples of an image have in common."""

    low_res: Tensor  # (B, C, h, w)
    tokens: Tensor | None  # (B, N, E), of the whole images
    base: Tensor  # (B, C, H, W), upscaled plus the predicted mean


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
        self.border = _border(model.degradation) if config.consistency else None
        self.step_count, self.sampling = self._sampling()
        multiple = self.network.window_multiple
        self.windows = Windows(config.tile, config.overlap, multiple, device)
        if config.tile and (side := self.windows.rounded(config.tile)) != config.tile:
            needed = f"a multiple of {multiple} pixels, at least {2 * multiple}"
            logger.warning("tile %d: this network needs %s; going on with %d", config.tile, needed, side)

    def _sampling(self) -> tuple[int, Sampling]:
        """The number of steps, and the steps; OptionError for what network or sampler cannot do."""
        levels = self.generator.diffusion.process.levels
        count, detail = self.config.steps_and_detail(len(levels) or SAMPLED_STEPS)
        if not count and not self.network.mean_reach:
            if self.config.steps == 0:
                raise OptionError("steps", 0, "this network predicts no mean; give 1 or more")
            count = 1
        steps = self.generator.plan(count, self.config.eta, detail)
        return count, Sampling(steps, self.generator.initial_scale)

    def check(self, *, deviation: bool = False, tokens: bool = False) -> None:
        """Raise OptionError for what cannot be done to any picture."""
        config, steps = self.config, self.sampling.steps
        if deviation and not steps:
            raise OptionError("mode", config.mode or "fidelity", "the predicted mean has no uncertainty")
        if deviation and config.num_images < 2:
            raise OptionError("num_images", config.num_images, "an uncertainty map needs at least 2")
        if tokens and not steps:
            raise OptionError("steps", 0, "the predicted mean takes no tokens: give 1 or more, or no tokens")
        if not tokens and config.guidance != 1:
            raise OptionError(
                "guidance", config.guidance, "it strengthens tokens: give some, or leave it out"
            )

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
        mean, variance = self._restore(picture.low_res[None], described, deviation, progress)
        return Restoration(
            picture.to_pixels(mean),
            None if picture.alpha is None else self._restore_alpha(picture.alpha),
            None if variance is None else to_deviation(variance),
            picture.metadata,
        )

    def __call__(self, low_res: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Restore (B, 3, h, w) in [0, 1], with tokens (B, N, E), to (B, 3, H, W), float32 on the CPU.

        Unlike `restore`, it rounds nothing; all images have the same noise.
        """
        self.check(tokens=tokens is not None)
        return self._restore(to_model_range(low_res), tokens)[0].cpu().clone()  # no inference tensor

    @torch.inference_mode()
    def _restore(
        self,
        low_res: Tensor,
        tokens: Tensor | None = None,
        deviation: bool = False,
        progress: Progress = no_progress,
    ) -> tuple[Tensor, Tensor | None]:
        """Mean and variance of the samples, (B, C, H, W) in [0, 1], of (B, C, h, w) in [-1, 1]."""
        count, steps = self.config.num_images, self.sampling.steps
        remembered = max((len(step.clean_weights) + 1 for step in steps), default=0)
        size = self.scale.high_size(*low_res.shape[-2:])
        check_room((*low_res.shape[:2], *size), 1 + remembered + (count > 1) + deviation)
        # Without steps, the mean is all that is computed.
        inputs = self._inputs(low_res, tokens, no_progress if steps else progress)

        def make(number: int) -> Tensor:
            return self._sample(inputs, self.sampling, number, lambda done: progress((number + done) / count))

        samples = map(make, range(count if steps else 1))
        mean, variance = mean_and_variance(samples, count, deviation, self.device)
        if self.border is not None:
            project(mean, to_unit_range(inputs.low_res), self.scale, self.border)
        progress(1.0)
        return mean, variance

    @torch.inference_mode()
    def _restore_alpha(self, alpha: Pixels) -> Pixels:
        if alpha.min() == alpha.max():
            return np.full(self.scale.high_size(*alpha.shape), alpha.flat[0], alpha.dtype)
        mask = to_picture(alpha)
        inputs = self._inputs(mask.low_res[None], None, no_progress)
        # The posterior mean: a mask has edges and no texture to invent.
        steps = self.generator.plan(0 if self.network.mean_reach else 1)
        return mask.to_pixels(self._sample(inputs, self.sampling._replace(steps=steps), 0))

    def _inputs(self, low_res: Tensor, tokens: Tensor | None, progress: Progress) -> Inputs:
        """Upscale images, and add the mean where the network predicts one."""
        low_res = low_res.to(self.device)
        with self.generator.autocast():
            tokens = self.network.encode_tokens(low_res) if tokens is None else tokens.to(self.device)

        def predict(upscaled: Tensor) -> Tensor:
            _, mean = self.generator.encode(self.network, Condition(upscaled, tokens=tokens))
            return cast(Tensor, mean).float()

        def work(window: Window) -> Tensor:
            upscaled = self.scale.upscale(low_res, window).clamp(-1, 1)
            if not self.network.mean_reach:
                return upscaled
            mean = self_ensembled(predict, upscaled) if self.config.self_ensemble else predict(upscaled)
            return upscaled + self.residual_std * mean

        # The predictor sees all that it reaches, from where the whole image would be padded and folded alike.
        multiple = self.network.window_multiple
        halo = math.ceil(self.network.mean_reach / multiple) * multiple
        shape = (*low_res.shape[:2], *self.scale.high_size(*low_res.shape[-2:]))
        return Inputs(low_res, tokens, self.windows.blend(shape, work, progress, halo))

    def _sample(
        self, inputs: Inputs, sampling: Sampling, number: int, progress: Progress = no_progress
    ) -> Tensor:
        """Make the sample of this number, (B, C, H, W) in [0, 1]; without steps, base is overwritten."""
        streams = [noise_stream(self.config.seed, number) for _ in inputs.base]
        _, channels, height, width = inputs.base.shape

        def noise(band: Window) -> Tensor:  # (B, C, rows, W); bands must be asked for from the top
            return draw_noise(streams, channels, *band.shape).to(self.device)

        def advance(step: Step, noisy: Tensor, cleans: Sequence[Tensor]) -> Tensor:
            for band in row_bands(height, width):
                fresh = noise(band) if step.noise_weight else None
                now, *estimates = (band.cut(one).to(self.device) for one in (noisy, *cleans))
                band.cut(noisy).copy_(step.advance(now, estimates, fresh))
            return noisy

        restored, steps = inputs.base, sampling.steps
        if steps:
            restored = zeros(inputs.base.shape, self.device)
            for band in row_bands(height, width):
                band.cut(restored).copy_(sampling.initial_scale * noise(band))
            denoise = self._denoiser(inputs, lambda evaluations: progress(evaluations / len(steps)))
            restored = deque(sample(steps, restored, denoise, advance), maxlen=1).pop()
        for band in row_bands(height, width):
            image = band.cut(inputs.base)
            if steps:
                image = image + self.residual_std * sampling.gain * band.cut(restored)
            band.cut(restored).copy_(to_unit_range(image.clamp(-1, 1)))
        return restored

    def _denoiser(self, inputs: Inputs, progress: Progress) -> Callable[[Tensor, int], Tensor]:
        """Make the function that estimates clean residuals (B, C, H, W) of noisy ones at a timestep.

        `progress` is called with the number of finished evaluations.
        """
        finished = itertools.count()

        # Encoding costs little next to the network; kept for a large image, it would fill the memory.
        @lru_cache(maxsize=None if inputs.base.numel() <= 3 * WHOLE_PIXELS else 0)
        def encode(window: Window) -> Contexts:
            upscaled = self.scale.upscale(inputs.low_res, window).clamp(-1, 1)
            return self.generator.encode(self.network, Condition(upscaled, tokens=inputs.tokens))[0]

        def denoise(noisy: Tensor, timestep: int) -> Tensor:
            def work(window: Window) -> Tensor:
                now, base = (window.cut(one).to(self.device) for one in (noisy, inputs.base))
                return self.generator.estimate(self.network, now, timestep, encode(window), base)

            number = next(finished)
            return self.windows.blend(noisy.shape, work, lambda part: progress(number + part))

        return denoise


def self_ensembled(predict: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Average what `predict` makes of 8 flips and rotations of (..., H, W), each turned back."""
    total = torch.zeros_like(image)
    for mirrored, turns in itertools.product((False, True), range(4)):
        turned = image.rot90(turns, (-2, -1))
        made = predict(turned.flip(-1) if mirrored else turned)
        total += (made.flip(-1) if mirrored else made).rot90(-turns, (-2, -1))
    return total / 8


def mean_and_variance(
    samples: Iterator[Tensor], count: int, deviation: bool, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Average `count` samples (B, C, H, W), the first of which becomes the mean (Welford 1962)."""
    mean = next(samples)
    variance = zeros(mean.shape, device) if deviation else None
    for number, one in enumerate(samples, start=2):
        for band in row_bands(*mean.shape[-2:]):
            before, new = (band.cut(image).to(device) for image in (mean, one))
            after = before + (new - before) / number
            if variance is not None:
                added = (new - before) * (new - after) / (count - 1)
                band.cut(variance).add_(added.to(variance.device))
            band.cut(mean).copy_(after)
        del one  # its memory is free before the next is made
    return mean, variance


def project(restored: Tensor, target: Tensor, scale: Scale, border: Border) -> None:
    """Make images (B, C, H, W) shrink to their inputs (B, C, h, w): back-projection (Irani & Peleg 1991)."""
    for _ in range(CONSISTENCY_ROUNDS):
        error = target.clone()
        for low in row_bands(*target.shape[-2:]):
            high = scale.high_window(low, *restored.shape[-2:])
            shrunk = scale.downscale(high.cut(restored).to(target.device), high, low, border)
            low.cut(error).sub_(shrunk)
        for band in row_bands(*restored.shape[-2:]):
            corrected = band.cut(restored).to(target.device) + scale.upscale(error, band)
            band.cut(restored).copy_(corrected.clamp(0, 1))


def _border(degradation: Degradation) -> Border:
    """The border that bicubic had in training; OptionError for another degradation."""
    if degradation.random:
        raise OptionError(
            "consistency",
            True,
            f"this model undoes {degradation.kind}, not bicubic; take the clean weights, or leave it out",
        )
    return degradation.border
