"""Restore pictures of any size and kind with a trained network: what the scripts and a Python user call.

    from restoration.restorer import restore
    restore("photo.png", "model.safetensors").save("photo_x4.png")

A large image is restored in overlapping windows that are blended inside every denoising step, over one noise
field for the whole image: the windows agree with each other before the next step begins, and no seam can
grow. It is MultiDiffusion (Bar-Tal et al. 2023, Eq. 5) with one change: what is averaged is the clean
estimate and not the next noisy image. The two are the same for a linear step, and the estimate is what
solvers of a higher order remember.

Shape legend: B images, C channels, H x W pixels of the high resolution, h x w of the low one. Images are in
[-1, 1] inside and in [0, 1] once restored.
"""

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion import ProcessConfig, ResidualGenerator, noise_stream
from engine.checkpoint import LoadedModel, load_model, released_model
from engine.device import autocast_dtype, select_device
from imaging.files import (
    DecodedImage,
    Pixels,
    decode_image,
    pixels_to_unit,
    to_model_range,
    to_unit_range,
    unit_to_pixels,
    write_image,
)
from imaging.metadata import Metadata
from restoration.tiling import Field, Scale, Tile, Window, plan_tiles, row_bands
from samplers import DEFAULT_SCHEDULER, NOISE_ROWS, SCHEDULERS, SchedulerName, Step, draw_noise
from unet import Condition, UNet

logger = logging.getLogger(__name__)

Preset = Literal["fidelity", "balanced", "detail"]
Progress = Callable[[float], None]


class Effort(NamedTuple):
    """What a preset stands for: denoising steps, and how many samples are averaged."""

    steps: int
    num_images: int


# The posterior mean has the highest PSNR and no texture it is unsure of; a sample has the texture and, for a
# perfect model, twice the squared error; the mean of N samples lies between at 1 + 1 / N.
PRESETS: dict[Preset, Effort] = {
    "fidelity": Effort(1, 1),
    "balanced": Effort(10, 4),
    "detail": Effort(10, 1),
}

AUTOMATIC_TILE = 512
WHOLE_PIXELS = 2**20  # an image of no more is restored in one piece unless told otherwise
DEFAULT_OVERLAP = 64
MARGIN = 16  # pixels at the inner edge of a window that see most of the padding beyond it
CONSISTENCY_ROUNDS = 10


@dataclass(frozen=True)
class RestoreConfig:
    """How to restore.

    Attributes:
        mode: "fidelity", "balanced" or "detail", see PRESETS; None is "detail" where num_images asks for
            samples, and "fidelity" otherwise.
        steps: denoising steps, 1 to T; None for those of the mode.
        num_images: samples to average; None for those of the mode.
        scheduler: see samplers.Sampler.
        eta: fresh noise of the scheduler "ddim", 0 to 1.
        seed: of the noise. An image's noise depends on the seed and its size, and on nothing else.
        tile: side of the windows in pixels of the result; 0 restores in one piece, None decides by size.
        overlap: pixels that neighbouring windows share.
        batch_size: windows or samples that go through the network together.
        consistency: make the bicubic downscale of the result equal the input.
        self_ensemble: average each estimate over the eight flips and rotations of the image.
    """

    mode: Preset | None = None
    steps: int | None = None
    num_images: int | None = None
    scheduler: SchedulerName = DEFAULT_SCHEDULER
    eta: float = 0.0
    seed: int = 0
    tile: int | None = None
    overlap: int = DEFAULT_OVERLAP
    batch_size: int = 1
    consistency: bool = False
    self_ensemble: bool = False

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in PRESETS:
            raise ValueError(f"mode must be one of {', '.join(PRESETS)}, not {self.mode!r}")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, not {self.scheduler!r}")
        for name in ("steps", "num_images", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.eta and self.scheduler != "ddim":
            raise ValueError(f"eta {self.eta} needs the scheduler ddim, not {self.scheduler}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, not {self.eta}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2^63 - 1, not {self.seed}")
        if self.tile is not None and self.tile < 0:
            raise ValueError(f"tile must be 0 for one piece or a number of pixels, not {self.tile}")
        if self.overlap < 2:
            raise ValueError(f"overlap must be at least 2 pixels, not {self.overlap}")

    @property
    def effort(self) -> Effort:
        """Steps and samples, the mode's unless they were given."""
        preset = PRESETS[self.mode or ("fidelity" if self.num_images is None else "detail")]
        return Effort(self.steps or preset.steps, self.num_images or preset.num_images)


@dataclass(frozen=True)
class Restoration:
    """A restored picture and what its file carries besides.

    Attributes:
        pixels: (H, W) or (H, W, 3), uint8 or uint16 as the input.
        alpha: (H, W) of the same dtype, or None.
        deviation: (H, W) float32, standard deviation over the samples in [0, 1], root mean square over the
            channels; None unless asked for.
        metadata: as in files.DecodedImage.
    """

    pixels: Pixels
    alpha: Pixels | None = None
    deviation: npt.NDArray[np.float32] | None = None
    metadata: Metadata = field(default_factory=Metadata)

    def save(self, path: str | Path) -> None:
        """Write the picture, replacing an older file in one step; errors as images.write_image."""
        write_image(path, self.pixels, self.alpha, metadata=self.metadata)


def restore(
    image: str | Path | Pixels | DecodedImage,
    model: str | Path | LoadedModel | None = None,
    config: RestoreConfig | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
) -> Restoration:
    """Restore one picture.

    Args:
        image: the path of a file; pixels (H, W) or (H, W, 3) of uint8 or uint16; or a decoded file.
        model: a checkpoint or exported model, or its path; None is the x4 model that comes with the project.
        config: how; RestoreConfig() if left out.
        device, precision: see device.select_device and device.autocast_dtype.

    Raises:
        ValueError: the file, the checkpoint (CheckpointError), the device or the configuration is wrong.
    """
    chosen = select_device(device)
    dtype = autocast_dtype(chosen, precision)
    loaded = model if isinstance(model, LoadedModel) else load_model(model or released_model(), UNet)
    return ImageRestorer(loaded, config or RestoreConfig(), chosen, dtype).restore(image)


class _View(NamedTuple):
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


_UPRIGHT = (_View(0, False),)
_ALL_VIEWS = tuple(_View(turns, mirrored) for mirrored in (False, True) for turns in range(4))


class _Job(NamedTuple):
    """A tile of one of the samples that are being made together."""

    sample: int
    tile: Tile


class _Prepared(NamedTuple):
    """What a batch of jobs needs at every step: (b, C, height, width) upscaled, and a context per view."""

    upscaled: Tensor
    contexts: tuple[object, ...]


class ImageRestorer:
    """Restores pictures with one network and one configuration.

    Args:
        model: a loaded checkpoint or exported model; its network is moved to the device.
        config: how to restore.
        device: where to compute.
        precision: dtype to autocast the network to, None for float32.

    Attributes:
        tile: side of the windows, 0 for one piece, None for automatic; halved when a GPU's memory runs out.
        batch_size: windows or samples per evaluation; 1 once a GPU's memory has run out.

    Raises:
        ValueError: the network was never trained or is not for RGB images, or the configuration asks for
            more steps than it was trained with.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: RestoreConfig,
        device: torch.device,
        precision: torch.dtype | None = None,
    ) -> None:
        self.unet: UNet = model.network.to(device)
        self.config = config
        self.device = device
        process = ProcessConfig.from_dict(model.process)
        self.generator = ResidualGenerator.of(process, device, precision, config.scheduler)
        self.plan = self.generator.plan(config.effort.steps, config.eta)
        self.residual_std, factor = float(self.unet.residual_std), float(self.unet.scale)
        if self.residual_std <= 0 or factor <= 0:
            raise ValueError("this network was never trained: it knows no scale; give a trained checkpoint")
        if self.unet.config.in_channels != 3:
            raise ValueError(f"this network is for {self.unet.config.in_channels} channels: RGB needs 3")
        self.scale = Scale(factor)
        self.tile = config.tile
        self.batch_size = config.batch_size

    def restore(
        self,
        image: str | Path | Pixels | DecodedImage,
        *,
        deviation: bool = False,
        progress: Progress | None = None,
    ) -> Restoration:
        """Restore one picture: grey stays grey, 16 bits stay 16, alpha is restored beside the colour.

        Args:
            image: the path of a file; pixels (H, W) or (H, W, 3) of uint8 or uint16; or a decoded file.
            deviation: whether to measure the standard deviation over the samples.
            progress: called with the finished share of the work, rising to 1.

        Raises:
            ValueError: the file cannot be read (UnreadableImageError), or a deviation of one sample is asked.
        """
        if deviation and self.config.effort.num_images < 2:
            raise ValueError("an uncertainty map needs num_images of at least 2")
        source = decode_image(image) if isinstance(image, str | Path) else image
        if isinstance(source, np.ndarray):
            source = DecodedImage(Path(), source)
        dtype = source.pixels.dtype
        with torch.inference_mode():
            colour = _Canvas(self, _as_input(source.pixels), self.plan, progress or _silent)
            mean, spread = colour.restore(self.config.effort.num_images, deviation)
            pixels = _to_pixels(mean, colour.size, grey=source.pixels.ndim == 2, dtype=dtype)
            alpha = None if source.alpha is None else self._restore_alpha(source.alpha)
            deviations = None if spread is None else _to_deviation(spread, colour.size)
        return Restoration(pixels, alpha, deviations, source.metadata)

    @property
    def window_multiple(self) -> int:
        """Windows begin and end at multiples of this many pixels: the side of one attention window."""
        config = self.unet.config
        return config.size_multiple * max(1, config.attention_window)

    def tokens(self, low_res: Tensor) -> Tensor | None:
        """(1, C, h, w) -> tokens (1, N, E) for cross-attention, or None where the network has none."""
        if self.unet.context_extractor is None:
            return None
        with self.generator.autocast():
            tokens: Tensor = self.unet.context_extractor(low_res)
        return tokens

    def encode(self, condition: Condition) -> object:
        """See ResidualGenerator.encode."""
        return self.generator.encode(self.unet, condition)

    def estimate(self, noisy: Tensor, timestep: int, context: object, upscaled: Tensor) -> Tensor:
        """See ResidualGenerator.estimate."""
        return self.generator.estimate(self.unet, noisy, timestep, context, upscaled)

    def _restore_alpha(self, alpha: Pixels) -> Pixels:
        """(h, w) to (H, W): the posterior mean, because a mask has edges and no texture to invent."""
        if alpha.min() == alpha.max():
            return np.full(self.scale.high_size(*alpha.shape), alpha.flat[0], alpha.dtype)
        plan = self.generator.plan(1)
        canvas = _Canvas(self, _as_input(alpha), plan, _silent)
        mean, _ = canvas.restore(1, deviation=False)
        return _to_pixels(mean, canvas.size, grey=True, dtype=alpha.dtype)


def _silent(_: float) -> None:
    """Report no progress."""


def _as_input(pixels: Pixels) -> Tensor:
    """Pixels (h, w) or (h, w, 3) as (3, h, w) in [-1, 1]; grey is repeated."""
    unit = pixels_to_unit(pixels)
    return to_model_range(unit.expand(3, -1, -1) if len(unit) == 1 else unit)


def _to_pixels(field: Field, size: tuple[int, int], *, grey: bool, dtype: npt.DTypeLike) -> Pixels:
    """A field (1, 3, H, W) in [0, 1] as pixels (H, W, 3), or (H, W): the mean of the channels."""
    height, width = size
    pixels = np.empty((height, width) if grey else (height, width, 3), dtype)
    for band in row_bands(height, width, NOISE_ROWS):
        values = field.read(band)[0]
        values = values.mean(dim=0, keepdim=True) if grey else values
        pixels[band.top : band.bottom] = unit_to_pixels(values, dtype)
    return pixels


def _to_deviation(variance: Field, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """A field (1, 3, H, W) of variances as deviations (H, W), root mean square over the channels."""
    height, width = size
    deviation = np.empty((height, width), np.float32)
    for band in row_bands(height, width, NOISE_ROWS):
        deviation[band.top : band.bottom] = variance.read(band)[0].mean(dim=0).sqrt().cpu().numpy()
    return deviation


class _Canvas:
    """One image while it is being restored.

    Args:
        restorer: network, schedule and settings.
        low_res: (C, h, w) in [-1, 1].
        plan: the steps of the sampler.
        progress: called with the finished share.
    """

    def __init__(
        self, restorer: ImageRestorer, low_res: Tensor, plan: Sequence[Step], progress: Progress
    ) -> None:
        self.restorer = restorer
        self.low_res = low_res.to(restorer.device)
        self.plan = plan
        self.progress = progress
        self.size = restorer.scale.high_size(*low_res.shape[-2:])
        self.views = _ALL_VIEWS if restorer.config.self_ensemble else _UPRIGHT
        self.tokens = [self._tokens(view) for view in self.views]
        self.tiles = self._plan_tiles()
        self.prepared: dict[int, _Prepared] = {}  # by the batch's place in the list
        self.steps_done, self.steps_in_all = 0, len(plan)

    # ---------------------------------------------------------------- from samples to the restored image

    def restore(self, num_images: int, deviation: bool) -> tuple[Field, Field | None]:
        """The mean of the samples (1, C, H, W) in [0, 1], and their variance if asked for."""
        mean = self._field(1)
        squares = self._field(1) if deviation else None
        self.steps_in_all = num_images * len(self.plan)
        done = 0
        while done < num_images:
            together = min(num_images - done, self.restorer.batch_size) if len(self.tiles) == 1 else 1
            samples = self._sample(range(done, done + together))
            for index in range(together):
                self._average(samples, index, done + index, mean, squares)
            done += together
        if squares is not None:
            for band in self._bands():
                squares.write(band, squares.read(band) / (num_images - 1))
        if self.restorer.config.consistency:
            self._project(mean)
        self.progress(1.0)
        return mean, squares

    def _average(self, samples: Field, index: int, seen: int, mean: Field, squares: Field | None) -> None:
        """Add one sample, a clean residual, to the running mean and sum of squares (Welford 1962)."""
        restorer = self.restorer
        for band in self._bands():
            upscaled = restorer.scale.upscale(self.low_res, band).clamp(-1, 1)
            residual = restorer.residual_std * samples.read(band, index)
            restored = to_unit_range((upscaled + residual).clamp(-1, 1))
            before = mean.read(band)
            after = before + (restored - before) / (seen + 1)
            mean.write(band, after)
            if squares is not None:
                squares.add(band, (restored - before) * (restored - after))

    def _project(self, restored: Field) -> None:
        """Back-projection (Irani & Peleg 1991): add the upscaled low-resolution error until there is none.

        Each round also clamps to [0, 1]: it projects onto two convex sets in turn.
        """
        target = to_unit_range(self.low_res)
        scale = self.restorer.scale
        for _ in range(CONSISTENCY_ROUNDS):
            error = torch.empty_like(target)
            for low in row_bands(target.shape[-2], target.shape[-1], NOISE_ROWS):
                high = scale.high_window(low, *self.size)
                shrunk = scale.downscale(restored.read(high)[0], high, low)
                error[:, low.top : low.bottom] = target[:, low.top : low.bottom] - shrunk
            for band in self._bands():
                restored.add(band, scale.upscale(error, band)[None])
                restored.write(band, restored.read(band).clamp(0, 1))

    # ----------------------------------------------------------------------------------------- sampling

    def _sample(self, samples: range) -> Field:
        """Clean residuals (samples, C, H, W) of unit variance, made together."""
        streams = [noise_stream(self.restorer.config.seed, sample) for sample in samples]
        noisy = self._field(len(samples))
        self.prepared.clear()
        for band in self._bands():
            noisy.write(band, self._noise(streams, band))
        remembered = max(len(step.clean_weights) for step in self.plan)
        cleans: deque[Field] = deque()
        for step in self.plan:
            cleans.appendleft(cleans.pop() if len(cleans) == remembered else self._field(len(samples)))
            self._denoise(noisy, cleans[0], step.timestep)
            self.steps_done += len(samples)
            for band in self._bands():
                noise = self._noise(streams, band) if step.noise_weight else None
                estimates = [field.read(band) for field in cleans]
                noisy.write(band, step.advance(noisy.read(band), estimates, noise))
        return noisy

    def _denoise(self, noisy: Field, clean: Field, timestep: int) -> None:
        """Blend the clean estimates of all windows into `clean`; make do with less memory if it runs out."""
        count = noisy.shape[0]
        while True:
            clean.clear()
            batches = self._batches(count)
            try:
                for place, jobs in enumerate(batches):
                    self._denoise_jobs(place, jobs, noisy, clean, timestep)
                    part = count * (place + 1) / len(batches)
                    self.progress((self.steps_done + part) / self.steps_in_all)
                return
            except torch.cuda.OutOfMemoryError:
                self._use_less_memory()

    def _denoise_jobs(
        self, place: int, jobs: Sequence[_Job], noisy: Field, clean: Field, timestep: int
    ) -> None:
        """Estimate a batch of windows and add each one's share."""
        encoded_pixels = noisy.shape[0] * math.prod(self.size) * len(self.views)
        upscaled, contexts = self._prepare(place, jobs, keep=encoded_pixels <= WHOLE_PIXELS)
        windows = [noisy.read(job.tile.window, job.sample) for job in jobs]
        batch = torch.cat(windows)  # (b, C, height, width)
        total = torch.zeros_like(batch)
        for view, context in zip(self.views, contexts, strict=True):
            turned = view.apply(batch), view.apply(upscaled)
            total += view.undo(self.restorer.estimate(turned[0], timestep, context, turned[1]))
        total /= len(self.views)
        for job, estimate in zip(jobs, total, strict=True):
            share = estimate * job.tile.row_weights.to(estimate) * job.tile.column_weights.to(estimate)
            clean.add(job.tile.window, share[None], job.sample)

    def _prepare(self, place: int, jobs: Sequence[_Job], keep: bool) -> _Prepared:
        """Upscale and encode for a batch: once for a small image, again at every step for a large one.

        Encoding costs little next to the network, and keeping it for a large image would cost more memory
        than all else.
        """
        if place in self.prepared:
            return self.prepared[place]
        scale = self.restorer.scale
        windows = [scale.upscale(self.low_res, job.tile.window).clamp(-1, 1) for job in jobs]
        upscaled = torch.stack(windows)  # (b, C, height, width)
        contexts = []
        for view, tokens in zip(self.views, self.tokens, strict=True):
            shared = None if tokens is None else tokens.expand(len(jobs), -1, -1)
            contexts.append(self.restorer.encode(Condition(view.apply(upscaled), tokens=shared)))
        prepared = _Prepared(upscaled, tuple(contexts))
        if keep:
            self.prepared[place] = prepared
        return prepared

    # ------------------------------------------------------------------------------- windows and memory

    def _plan_tiles(self) -> list[Tile]:
        """The windows; they begin where attention windows begin, so that those are the untiled run's."""
        height, width = self.size
        tile = self.restorer.tile
        if tile is None:
            tile = 0 if height * width <= WHOLE_PIXELS else AUTOMATIC_TILE
        multiple = self.restorer.window_multiple
        if tile == 0:
            return plan_tiles(height, width, max(height, width), 0, 0)
        tile = max(2, math.ceil(tile / multiple)) * multiple
        overlap = min(math.ceil(self.restorer.config.overlap / multiple), tile // multiple // 2) * multiple
        return plan_tiles(height, width, tile, overlap, min(MARGIN, (overlap - 1) // 2))

    def _use_less_memory(self) -> None:
        """Go on with one window at a time, then with windows of half the side.

        Raises:
            torch.cuda.OutOfMemoryError: the windows are as small as they can be.
        """
        restorer = self.restorer
        self.prepared.clear()
        torch.cuda.empty_cache()
        if restorer.batch_size > 1:
            restorer.batch_size = 1
            return
        side = max(max(tile.window.shape) for tile in self.tiles)
        smallest = 2 * restorer.window_multiple
        if side <= smallest:
            raise torch.cuda.OutOfMemoryError(f"out of memory even with windows of {smallest} pixels")
        restorer.tile = max(smallest, side // 2)
        logger.warning("out of GPU memory: going on with windows of %d pixels", restorer.tile)
        self.tiles = self._plan_tiles()

    def _batches(self, samples: int) -> list[list[_Job]]:
        """The windows of all samples, in batches of one shape."""
        jobs = [_Job(sample, tile) for tile in self.tiles for sample in range(samples)]
        jobs.sort(key=lambda job: job.tile.window.shape, reverse=True)
        size = self.restorer.batch_size
        batches = []
        for _, group in itertools.groupby(jobs, key=lambda job: job.tile.window.shape):
            same = list(group)
            batches += [same[start : start + size] for start in range(0, len(same), size)]
        return batches

    def _tokens(self, view: _View) -> Tensor | None:
        """Tokens (1, N, E) of the whole image as one view shows it, shared by all its windows."""
        return self.restorer.tokens(view.apply(self.low_res)[None])

    def _field(self, samples: int) -> Field:
        return Field((samples, self.low_res.shape[0], *self.size), self.restorer.device)

    def _bands(self) -> Iterator[Window]:
        return row_bands(*self.size, NOISE_ROWS)

    def _noise(self, streams: Sequence[torch.Generator], band: Window) -> Tensor:
        """The noise of one band, (samples, C, rows, W); bands must be asked for from the top."""
        return draw_noise(streams, self.low_res.shape[0], *band.shape).to(self.restorer.device)
