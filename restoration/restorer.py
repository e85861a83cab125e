"""The one way to restore: options, results, and the network at work on whole images.

B images of C channels, H x W high and h x w low resolution; [-1, 1] inside, [0, 1] once restored.
"""

import copy
import logging
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bicubic import Border
from degradation import Degradation
from diffusion import ResidualGenerator
from engine.checkpoint import load_weights
from engine.options import OptionError, Options, option
from imaging.files import Pixels, to_unit_range, write_image
from imaging.metadata import Metadata
from models import LoadedModel
from restoration.denoiser import (
    ALL_VIEWS,
    UPRIGHT,
    Base,
    Progress,
    TiledDenoiser,
    Windows,
    no_progress,
)
from restoration.pictures import Restorable, to_deviation, to_input, to_picture
from restoration.tiling import Field, Scale, Shape, Window, bytes_on_disk, row_bands
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
        "fidelity: the most faithful, no sampling; balanced: a sample of little invented texture; detail: a "
        "sharp sample; without it, detail where steps or num_images ask for samples, else fidelity",
    )
    detail: float | None = option(
        None, "0 to 1: how much texture to invent, instead of the mode's", low=0, high=1
    )
    steps: int | None = option(None, "denoising steps, instead of the mode's; 0: the predicted mean", low=0)
    num_images: int = option(1, "samples to average", low=1)
    scheduler: SchedulerName = option(DEFAULT_SCHEDULER, "how to step from noise to image")
    eta: float = option(0.0, "fresh noise at each step of ddim, 0 to 1")
    seed: int = option(0, "of the noise: the same seed gives the same bytes", low=0, high=2**63 - 1)
    tile: int | None = option(
        None,
        "side of the windows a large image is restored in; 0: in one piece; auto: by its size",
        low=0,
    )
    overlap: int = option(64, "pixels that neighbouring windows share", low=2)
    batch_size: int = option(1, "windows or samples that go through the network together", low=1)
    consistency: bool = option(
        False, "make the bicubic downscale of the result equal the input; for inputs that bicubic shrank"
    )
    self_ensemble: bool = option(False, "average over 8 flips and rotations, 8 times the work")
    guidance: float = option(
        1.0, "how much tokens steer: 1 as trained, 2 doubles what they change, at twice the work", low=0
    )

    def steps_and_detail(self) -> tuple[int, float]:
        """The mode's unless they were given."""
        sampled = self.num_images > 1 or self.steps
        detail = PRESETS[self.mode or ("detail" if sampled else "fidelity")]
        if self.detail is not None:
            detail = self.detail
        return self.steps if self.steps is not None else SAMPLED_STEPS if detail else 0, detail


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


def blend(clean: LoadedModel, photo: LoadedModel, strength: float) -> LoadedModel:
    """Weights clean + strength (photo - clean) (Wang et al. 2019).

    ValueError for a strength outside [0, 1], or where their networks, processes or enlargements differ.
    """
    if not 0 <= strength <= 1:
        raise OptionError("strength", strength, "give a number from 0, clean, to 1, photo")
    described = [
        (model.network.config, model.process, model.network.scale.tolist()) for model in (clean, photo)
    ]
    if described[0] != described[1]:
        raise ValueError(f"models that differ cannot be blended: {described[0]} and {described[1]}")
    if strength == 0:
        return clean
    first, last = (model.network.state_dict() for model in (clean, photo))
    weights = {name: first[name].lerp(last[name], strength) for name in first}
    blended = copy.deepcopy(photo.network)
    load_weights(cast(nn.Module, blended), weights, "the blend")
    return photo._replace(network=blended)


class Restorer:
    """Restores images with one network, which moves to the device, and one configuration.

    `precision`: dtype to autocast to, None for float32. `steps` are none where the mean is the result.
    ValueError: an untrained network or one not for RGB, or options it cannot follow.
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
        self.step_count, detail = config.steps_and_detail()
        if not self.step_count and not self.network.mean_reach:
            if config.steps == 0:
                raise OptionError("steps", 0, "this network predicts no mean; give 1 or more")
            self.step_count = 1
        self.steps = self.generator.plan(self.step_count, config.eta, detail)
        self.border = _border(model.degradation) if config.consistency else None
        factor = float(self.network.scale)
        self.residual_std = float(self.network.residual_std)
        if self.residual_std <= 0 or factor <= 0:
            raise ValueError("this network was never trained: it knows no scale; give a trained checkpoint")
        if self.network.image_channels != 3:
            raise ValueError(f"this network is for {self.network.image_channels} channels: RGB needs 3")
        self.scale = Scale(factor)
        multiple = self.network.window_multiple
        self.windows = Windows(config.tile, config.overlap, config.batch_size, multiple)
        if config.tile and (side := self.windows.rounded(config.tile)) != config.tile:
            logger.warning(
                "tile %d: this network needs a multiple of %d pixels, going on with %d",
                *(config.tile, multiple, side),
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

        ValueError: another image, the deviation of one sample, tokens that the network does not take.
        OSError: no room for temporary files.
        """
        if deviation and self.config.num_images < 2:
            raise ValueError("an uncertainty map needs num_images of at least 2")
        picture = to_picture(image)
        described = None if tokens is None else tokens[None]
        mean, variance = self._restore(picture.low_res[None], deviation, progress, described)
        return Restoration(
            picture.to_pixels(mean),
            None if picture.alpha is None else self._restore_alpha(picture.alpha),
            None if variance is None else to_deviation(variance),
            picture.metadata,
        )

    def __call__(self, low_res: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(B, C, h, w) or (C, h, w), C 1 or 3, and tokens (B, N, E), to H x W, float32 on the CPU.

        Unlike `restore`, it rounds nothing; all images have the same noise.
        """
        if low_res.ndim not in (3, 4) or low_res.shape[-3] not in (1, 3) or not low_res.numel():
            raise ValueError(
                f"low_res is {tuple(low_res.shape)}: expected (C, h, w) or (B, C, h, w), C 1 or 3"
            )
        batch = to_input(low_res if low_res.ndim == 4 else low_res[None]).float()
        mean, _ = self._restore(batch, False, no_progress, tokens)
        restored = mean.read(Window(0, mean.shape[2], 0, mean.shape[3])).cpu()  # (B, 3, H, W)
        if low_res.shape[-3] == 1:
            restored = restored.mean(dim=1, keepdim=True)
        return restored if low_res.ndim == 4 else restored[0]

    def _restore_alpha(self, alpha: Pixels) -> Pixels:
        if alpha.min() == alpha.max():
            return np.full(self.scale.high_size(*alpha.shape), alpha.flat[0], alpha.dtype)
        mask = to_picture(alpha)
        # The posterior mean: a mask has edges and no texture to invent.
        steps = self.generator.plan(0 if self.network.mean_reach else 1)
        with torch.inference_mode():
            mean, _ = self._average(mask.low_res[None].to(self.device), steps, 1, False, no_progress)
        return mask.to_pixels(mean)

    @torch.inference_mode()
    def _restore(
        self, low_res: Tensor, deviation: bool, progress: Progress, tokens: Tensor | None
    ) -> tuple[Field, Field | None]:
        """Mean and variance of the samples in [0, 1], of (B, C, h, w) in [-1, 1]."""
        if tokens is None and self.config.guidance != 1:
            raise OptionError(
                "guidance", self.config.guidance, "it strengthens tokens: give some, or leave it out"
            )
        if tokens is not None and not self.steps:
            raise OptionError("steps", 0, "the predicted mean takes no tokens: give 1 or more, or no tokens")
        low_res, tokens = low_res.to(self.device), None if tokens is None else tokens.to(self.device)
        count = self.config.num_images
        mean, variance = self._average(
            low_res, self.steps, count, deviation, lambda samples: progress(samples / count), tokens
        )
        if self.border is not None:
            project(mean, to_unit_range(low_res), self.scale, self.border)
        progress(1.0)
        return mean, variance

    def _average(
        self,
        low_res: Tensor,
        steps: Sequence[Step],
        count: int,
        deviation: bool,
        progress: Progress,
        tokens: Tensor | None = None,
    ) -> tuple[Field, Field | None]:
        """Welford 1962."""
        shape = (*low_res.shape[:2], *self.scale.high_size(*low_res.shape[-2:]))
        remembered = max((len(step.clean_weights) + 1 for step in steps), default=0)
        check_room(shape, fields=remembered + 1 + deviation + (self.network.mean_reach > 0))
        views = ALL_VIEWS if self.config.self_ensemble else UPRIGHT
        predicted = no_progress if steps else progress  # the mean is then all that is computed
        base = Base(self.generator, self.network, low_res, self.windows, views, tokens, predicted)
        mean = Field(shape, self.device)
        variance = Field(shape, self.device) if deviation else None
        for number, (residuals, first) in enumerate(self._samples(base, steps, count, progress)):
            for band in mean.bands():
                restored = base.read(band)  # (B, C, rows, W)
                if residuals is not None:
                    own = residuals.read(band)[first : first + len(restored)]
                    restored = restored + self.residual_std * own
                restored = to_unit_range(restored.clamp(-1, 1))
                before = mean.read(band)
                after = before + (restored - before) / (number + 1)
                mean.write(band, after)
                if variance is not None:
                    variance.add(band, (restored - before) * (restored - after) / (count - 1))
        return mean, variance

    def _samples(
        self, base: Base, steps: Sequence[Step], count: int, progress: Progress
    ) -> Iterator[tuple[Field | None, int]]:
        """Residuals, and where the images of each sample begin; (None, 0) without steps."""
        if not steps:
            yield None, 0
            return
        images, done = len(base.low_res), 0
        while done < count:
            whole = len(self.windows.plan(*base.size)) == 1
            together = min(count - done, max(1, self.windows.batch_size // images)) if whole else 1
            residuals = self._sample(base, steps, range(done, done + together), progress)
            yield from ((residuals, place * images) for place in range(together))
            done += together

    def _sample(self, base: Base, steps: Sequence[Step], numbers: range, progress: Progress) -> Field:
        """Unit-variance residuals (n B, C, H, W) of the samples of those numbers."""
        images, channels = base.low_res.shape[:2]
        streams = [noise_stream(self.config.seed, number) for number in numbers for _ in range(images)]
        noisy = Field((len(streams), channels, *base.size), self.device)

        def reached(evaluations: float) -> None:
            progress(numbers.start + len(numbers) * evaluations / len(steps))

        def noise(band: Window) -> Tensor:  # (n B, C, rows, W); bands must be asked for from the top
            return draw_noise(streams, channels, *band.shape).to(self.device)

        def advance(step: Step, noisy: Field, cleans: Sequence[Field]) -> Field:
            for band in noisy.bands():
                fresh = noise(band) if step.noise_weight else None
                estimates = [clean.read(band) for clean in cleans]
                noisy.write(band, step.advance(noisy.read(band), estimates, fresh))
            return noisy

        for band in noisy.bands():
            noisy.write(band, self.generator.initial_scale * noise(band))
        return deque(sample(steps, noisy, TiledDenoiser(base, reached), advance), maxlen=1).pop()


def project(restored: Field, target: Tensor, scale: Scale, border: Border) -> None:
    """Make images shrink to their inputs: back-projection (Irani & Peleg 1991)."""
    for _ in range(CONSISTENCY_ROUNDS):
        error = target.clone()
        for low in row_bands(*target.shape[-2:]):
            high = scale.high_window(low, *restored.shape[-2:])
            low.cut(error).sub_(scale.downscale(restored.read(high), high, low, border))
        for band in restored.bands():
            corrected = restored.read(band) + scale.upscale(error, band)
            restored.write(band, corrected.clamp(0, 1))


def check_room(shape: Shape, fields: int) -> None:
    """OSError where so many fields have no room."""
    needed, folder = fields * bytes_on_disk(shape), tempfile.gettempdir()
    if needed and needed > (free := shutil.disk_usage(folder).free):
        raise OSError(
            f"{shape[3]} x {shape[2]} pixels need {needed / 1e6:.0f} MB in {folder} while they are restored, "
            f"and {free / 1e6:.0f} MB are free: set TMPDIR to a folder with more room"
        )


def _border(degradation: Degradation) -> Border:
    """OptionError for another degradation than bicubic."""
    if degradation.random:
        raise OptionError(
            "consistency",
            True,
            f"this model undoes {degradation.kind}, not bicubic; take the clean weights, or leave it out",
        )
    return degradation.border
