"""The one way to restore: what the scripts, the validation during training and a Python user call.

Shape legend: B images, C channels, H x W pixels of the high resolution, h x w of the low one. Images are in
[-1, 1] inside and in [0, 1] once restored.
"""

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion import Network, ProcessConfig, ResidualGenerator
from engine.checkpoint import LoadedModel, NetworkT, load_model, released_model
from engine.device import autocast_dtype, select_device
from engine.options import OptionError, Options, option
from imaging.files import Pixels, to_unit_range, write_image
from imaging.metadata import Metadata
from restoration.denoiser import ALL_VIEWS, UPRIGHT, Base, TiledDenoiser, Windows, logger
from restoration.pictures import Restorable, grey_picture, to_deviation, to_input, to_picture
from restoration.tiling import Field, Scale, Window, bytes_on_disk, row_bands
from samplers import (
    DEFAULT_SCHEDULER,
    NOISE_ROWS,
    SchedulerName,
    Step,
    draw_noise,
    noise_stream,
    sample,
)
from unet import UNet

Preset = Literal["fidelity", "balanced", "detail"]
Progress = Callable[[float], None]
Shape = tuple[int, int, int, int]


class Budget(NamedTuple):
    """What restoring an image may take: denoising steps, and samples to average."""

    steps: int
    num_images: int


# The mean has the highest PSNR and no texture it is unsure of; a sample has the texture and, for a perfect
# model, twice the squared error; the mean of N samples lies between at 1 + 1 / N. 0 steps are the mean that
# the network predicts; one that predicts none gives it in one step.
PRESETS: dict[Preset, Budget] = {
    "fidelity": Budget(0, 1),
    "balanced": Budget(10, 4),
    "detail": Budget(10, 1),
}
CONSISTENCY_ROUNDS = 10


@dataclass(frozen=True)
class RestoreConfig(Options):
    """How to restore; every option says of itself what it does."""

    mode: Preset | None = option(
        None,
        "fidelity: the most faithful, no sampling; balanced: the mean of 4 samples of 10 steps; detail: a "
        "sample of 10 steps; without it, detail where num_images asks for samples, else fidelity",
    )
    steps: int | None = option(None, "denoising steps, instead of the mode's; 0: the predicted mean", low=0)
    num_images: int | None = option(None, "samples to average, instead of the mode's", low=1)
    scheduler: SchedulerName = option(DEFAULT_SCHEDULER, "how to step from noise to image")
    eta: float = option(0.0, "fresh noise at each step of ddim, 0 to 1")
    seed: int = option(0, "of the noise: the same seed gives the same bytes", low=0, high=2**63 - 1)
    tile: int | None = option(
        None, "side of the windows a large image is restored in; 0: in one piece; None: by its size", low=0
    )
    overlap: int = option(64, "pixels that neighbouring windows share", low=2)
    batch_size: int = option(1, "windows or samples that go through the network together", low=1)
    consistency: bool = option(
        False, "make the bicubic downscale of the result equal the input; for inputs that bicubic shrank"
    )
    self_ensemble: bool = option(False, "average over 8 flips and rotations, 8 times the work")

    @property
    def budget(self) -> Budget:
        """Steps and samples: the mode's unless they were given."""
        preset = PRESETS[self.mode or ("fidelity" if self.num_images is None else "detail")]
        steps = preset.steps if self.steps is None else self.steps
        return Budget(steps, self.num_images or preset.num_images)


@dataclass(frozen=True)
class Restoration:
    """A restored picture and what its file carries besides.

    Attributes:
        pixels: (H, W), (H, W, 1) or (H, W, 3), uint8 or uint16, as the input.
        alpha: (H, W) of the same dtype, or None.
        deviation: (H, W) float32, standard deviation over the samples in [0, 1], root mean square over the
            channels; None unless asked for.
        metadata: as in imaging.files.DecodedImage.
    """

    pixels: Pixels
    alpha: Pixels | None = None
    deviation: npt.NDArray[np.float32] | None = None
    metadata: Metadata = field(default_factory=Metadata)

    def save(self, path: str | Path) -> None:
        """Write the picture, replacing an older file in one step; errors as imaging.files.write_image."""
        pixels = self.pixels[..., 0] if self.pixels.shape[2:] == (1,) else self.pixels
        write_image(path, pixels, self.alpha, metadata=self.metadata)


def restore(
    image: Restorable,
    model: str | Path | LoadedModel[NetworkT] | None = None,
    config: RestoreConfig | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
) -> Restoration:
    """Restore one picture.

    Args:
        image: a file, array, tensor or PIL image; see Restorer.restore.
        model: a checkpoint or exported model, or its path; None is the x4 model that comes with the project.
        config: how; RestoreConfig() if left out.
        device, precision: see engine.device.select_device and autocast_dtype.

    Raises:
        ValueError: the image, the checkpoint (CheckpointError), the device or the configuration is wrong.
    """
    chosen = select_device(device)
    dtype = autocast_dtype(chosen, precision)
    loaded = (
        model
        if isinstance(model, LoadedModel)
        else load_model(released_model() if model is None else model, UNet)
    )
    return Restorer(loaded, config or RestoreConfig(), chosen, dtype).restore(image)


class Restorer:
    """Restores images with one network and one configuration.

    Args:
        model: a loaded checkpoint or exported model; its network is moved to the device.
        config: how to restore.
        device: where to compute.
        precision: dtype to autocast the network to, None for float32.

    Attributes:
        windows: how large images are cut; smaller once memory has run out.
        step_count, steps: of the sampler; none where the network's mean is the result.

    Raises:
        ValueError: the network was never trained or is not for RGB images, or the configuration asks for what
            its process does not have (OptionError).
    """

    def __init__(
        self,
        model: LoadedModel[NetworkT],
        config: RestoreConfig,
        device: torch.device,
        precision: torch.dtype | None = None,
    ) -> None:
        self.network = cast(Network, model.network.to(device))
        self.config = config
        self.device = device
        process = ProcessConfig.from_dict(model.process)
        self.generator = ResidualGenerator.of(process, device, precision, config.scheduler)
        self.step_count = self._step_count()
        self.steps = self.generator.plan(self.step_count, config.eta)
        self.residual_std, factor = float(self.network.residual_std), float(self.network.scale)
        if self.residual_std <= 0 or factor <= 0:
            raise ValueError("this network was never trained: it knows no scale; give a trained checkpoint")
        if self.network.image_channels != 3:
            raise ValueError(f"this network is for {self.network.image_channels} channels: RGB needs 3")
        self.scale = Scale(factor)
        multiple = self.network.window_multiple
        self.windows = Windows(config.tile, config.overlap, config.batch_size, multiple)
        if config.tile and self.windows.rounded(config.tile) != config.tile:
            logger.warning(
                "tile %d: windows of this network have a multiple of %d pixels, going on with %d",
                config.tile,
                multiple,
                self.windows.rounded(config.tile),
            )

    def _step_count(self) -> int:
        """The steps of the configuration; one where the network predicts no mean and nobody asked for 0."""
        steps = self.config.budget.steps
        if steps == 0 and not self.network.mean_reach:
            if self.config.steps == 0:
                raise OptionError("steps", 0, "this network predicts no mean; give 1 or more")
            return 1
        return steps

    def restore(
        self, image: Restorable, *, deviation: bool = False, progress: Progress | None = None
    ) -> Restoration:
        """Restore one picture: grey stays grey, 16 bits stay 16, alpha is restored beside the colour.

        Args:
            image: the path of a file; a decoded file; a PIL image; pixels (h, w) or (h, w, 1, 3 or 4) of
                uint8 or uint16; or a tensor (1, 3 or 4, h, w) of uint8 or of floats in [0, 1].
            deviation: whether to measure the standard deviation over the samples.
            progress: called with the finished part of the work, rising to 1.

        Raises:
            ValueError: the image cannot be read or is none of these, or a deviation of one sample is asked.
            OSError: the folder of temporary files has no room for a large image.
        """
        if deviation and self.config.budget.num_images < 2:
            raise ValueError("an uncertainty map needs num_images of at least 2")
        picture = to_picture(image)
        mean, variance = self._restore(picture.low_res[None], deviation, progress or _silent)
        return Restoration(
            picture.to_pixels(mean),
            None if picture.alpha is None else self._restore_alpha(picture.alpha),
            None if variance is None else to_deviation(variance),
            picture.metadata,
        )

    def __call__(self, low_res: Tensor) -> Tensor:
        """What `restore` does, before it rounds.

        Args:
            low_res: (C, h, w) or (B, C, h, w) in [0, 1], C 1 or 3. All images of a batch use the same noise,
                and so what one becomes does not depend on the others.

        Returns:
            (C, H, W) or (B, C, H, W) float32 in [0, 1], on the CPU.

        Raises:
            ValueError: another shape.
        """
        if low_res.ndim not in (3, 4) or low_res.shape[-3] not in (1, 3) or not low_res.numel():
            raise ValueError(
                f"low_res is {tuple(low_res.shape)}: expected (C, h, w) or (B, C, h, w), C 1 or 3"
            )
        batch = to_input(low_res if low_res.ndim == 4 else low_res[None]).float()
        mean, _ = self._restore(batch, False, _silent)
        restored = mean.read(Window(0, mean.shape[2], 0, mean.shape[3])).cpu()  # (B, 3, H, W)
        if low_res.shape[-3] == 1:
            restored = restored.mean(dim=1, keepdim=True)
        return restored if low_res.ndim == 4 else restored[0]

    def _restore_alpha(self, alpha: Pixels) -> Pixels:
        """(h, w) to (H, W): the posterior mean, because a mask has edges and no texture to invent."""
        if alpha.min() == alpha.max():
            return np.full(self.scale.high_size(*alpha.shape), alpha.flat[0], alpha.dtype)
        mask = grey_picture(alpha)
        steps = self.generator.plan(0 if self.network.mean_reach else 1)
        with torch.inference_mode():
            mean, _ = self._average(mask.low_res[None].to(self.device), steps, 1, False, _silent)
        return mask.to_pixels(mean)

    @torch.inference_mode()
    def _restore(self, low_res: Tensor, deviation: bool, progress: Progress) -> tuple[Field, Field | None]:
        """(B, C, h, w) in [-1, 1] to the mean (B, C, H, W) of the samples in [0, 1], and their variance."""
        low_res = low_res.to(self.device)
        num_images = self.config.budget.num_images
        mean, variance = self._average(low_res, self.steps, num_images, deviation, progress)
        if self.config.consistency:
            project(mean, to_unit_range(low_res), self.scale)
        progress(1.0)
        return mean, variance

    def _average(
        self, low_res: Tensor, steps: Sequence[Step], num_images: int, deviation: bool, progress: Progress
    ) -> tuple[Field, Field | None]:
        """Mean and, if asked for, variance of the samples, (B, C, H, W) each."""
        images, channels = low_res.shape[:2]
        shape = (images, channels, *self.scale.high_size(*low_res.shape[-2:]))
        remembered = max((len(step.clean_weights) + 1 for step in steps), default=0)
        check_room(shape, fields=remembered + 1 + deviation + (self.network.mean_reach > 0))
        views = ALL_VIEWS if self.config.self_ensemble else UPRIGHT
        base = Base(self.generator, self.network, low_res, self.windows, views)
        mean = Field(shape, self.device)
        squares = Field(shape, self.device) if deviation else None
        done = 0
        if not steps:
            self._add(mean, squares, 0, base, None, 0)
            done = num_images
        while done < num_images:
            whole = len(self.windows.plan(*shape[-2:])) == 1
            together = min(num_images - done, max(1, self.windows.batch_size // images)) if whole else 1
            numbers = range(done, done + together)
            reached = _part(progress, done / num_images, together / num_images / len(steps))
            residuals = self._sample(base, steps, numbers, reached)
            for place, number in enumerate(numbers):
                self._add(mean, squares, number, base, residuals, place * images)
            done += together
        if squares is not None:
            for band in _bands(shape):
                squares.write(band, squares.read(band) / (num_images - 1))
        return mean, squares

    def _sample(
        self, base: Base, steps: Sequence[Step], numbers: range, reached: Callable[[float], None]
    ) -> Field:
        """Clean residuals (n B, C, H, W) of unit variance: the samples of those numbers, made together."""
        images, channels = base.low_res.shape[:2]
        denoiser = TiledDenoiser(self.generator, self.network, base, self.windows, reached)
        streams = [noise_stream(self.config.seed, number) for number in numbers for _ in range(images)]
        shape = (len(numbers) * images, channels, *base.size)
        noisy = Field(shape, self.device)

        def noise(band: Window) -> Tensor:  # (n B, C, rows, W); bands must be asked for from the top
            return draw_noise(streams, shape[1], *band.shape).to(self.device)

        def advance(step: Step, noisy: Field, cleans: Sequence[Field]) -> Field:
            for band in _bands(shape):
                fresh = noise(band) if step.noise_weight else None
                estimates = [clean.read(band) for clean in cleans]
                noisy.write(band, step.advance(noisy.read(band), estimates, fresh))
            return noisy

        for band in _bands(shape):
            noisy.write(band, self.generator.sampler.initial_scale * noise(band))
        return deque(sample(steps, noisy, denoiser, advance), maxlen=1).pop()

    def _add(
        self,
        mean: Field,
        squares: Field | None,
        number: int,
        base: Base,
        residuals: Field | None,
        first: int,
    ) -> None:
        """Add a sample, residuals from `first` on, to the running mean and sum of squares (Welford 1962)."""
        for band in _bands(mean.shape):
            restored = base.read(band)  # (B, C, rows, W)
            if residuals is not None:
                restored = restored + self.residual_std * residuals.read(band)[first : first + len(restored)]
            restored = to_unit_range(restored.clamp(-1, 1))
            before = mean.read(band)
            after = before + (restored - before) / (number + 1)
            mean.write(band, after)
            if squares is not None:
                squares.add(band, (restored - before) * (restored - after))


def project(restored: Field, target: Tensor, scale: Scale) -> None:
    """Make restored images shrink to their inputs: back-projection (Irani & Peleg 1991) and clamping in turn.

    Args:
        restored: (B, C, H, W) in [0, 1], changed in place.
        target: (B, C, h, w) in [0, 1].
        scale: H / h.
    """
    height, width = restored.shape[-2:]
    for _ in range(CONSISTENCY_ROUNDS):
        error = torch.empty_like(target)
        for low in row_bands(target.shape[-2], target.shape[-1], NOISE_ROWS):
            high = scale.high_window(low, height, width)
            shrunk = scale.downscale(restored.read(high), high, low)
            error[..., low.top : low.bottom, :] = target[..., low.top : low.bottom, :] - shrunk
        for band in _bands(restored.shape):
            corrected = restored.read(band) + scale.upscale(error, band)
            restored.write(band, corrected.clamp(0, 1))


def check_room(shape: Shape, fields: int) -> None:
    """Refuse an image whose `fields` arrays (B, C, H, W) have no room in the folder of temporary files.

    Raises:
        OSError: says how much room is needed, and where.
    """
    needed, folder = fields * bytes_on_disk(shape), tempfile.gettempdir()
    if not needed:
        return
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{shape[3]} x {shape[2]} pixels need {needed / 1e6:.0f} MB in {folder} while they are restored, "
            f"and {free / 1e6:.0f} MB are free: set TMPDIR to a folder with more room"
        )


def _bands(shape: Shape) -> Iterator[Window]:
    return row_bands(shape[-2], shape[-1], NOISE_ROWS)


def _part(progress: Progress, start: float, step: float) -> Callable[[float], None]:
    """Evaluations of the network as progress that begins at `start`."""
    return lambda evaluations: progress(start + step * evaluations)


def _silent(_: float) -> None:
    """Report no progress."""
