"""Measure bicubic and a trained model on a set of images: one row per method and number of steps.

Shapes: C channels (1 grey or 3 RGB), H x W pixels of the high resolution, h x w of the low one.
Ranges: uint8 in an ImageSet, [0, 1] in the metrics, [-1, 1] where a model takes its input.

Every metric sees what a user would find in an 8-bit file: restored images are rounded to uint8 before they
are measured. A grey file is given to the model as RGB of equal channels; the mean of the restored channels
is compared with the file, which is its own luma.
"""

import functools
import hashlib
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from bicubic import Border, downscale_image, resize, upscale_image
from diffusion import Network, ProcessConfig, ResidualGenerator
from engine.checkpoint import LoadedModel, load_model
from evaluation import metrics
from evaluation.meter import Cost, Meter
from evaluation.report import LPIPS_OFF, ImageScores, Json, Report, Row
from imaging.files import decode_image, list_images, pixels_to_unit, to_model_range, unit_to_pixels
from samplers import DEFAULT_SCHEDULER, SchedulerName
from unet import UNet

# What LPIPS, the spectrum and the pyramid of patches need: every image can be scored by every metric.
_SMALLEST_SIDE = 32
_SSIM_WINDOW = 11


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        scale: the enlargement, above 1; a fraction such as 1.5 too.
        steps: sampling steps of the model, one row each.
        num_samples: restorations of each image; above 1 their mean gets a row of its own.
        seed: of the model's noise and of the patches that SWD compares.
        border: what bicubic sees beyond the edge of an image, in the low resolution and in its own row.
        channel: what PSNR and SSIM compare, "luma" or "rgb".
        crop: pixels that PSNR and SSIM leave out at each border; None for as many as the scale (rounded up).
        lpips: measure LPIPS if its weights can be had.
    """

    scale: float
    steps: tuple[int, ...] = (1, 4, 10, 50)
    num_samples: int = 1
    seed: int = 0
    border: Border = "mirror"
    channel: Literal["luma", "rgb"] = "luma"
    crop: int | None = None
    lpips: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 1 and abs(self.ratio - self.scale) < 1e-6):
            raise ValueError(f"scale is {self.scale:g}; give a number above 1, such as 2, 3, 4 or 1.5")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps are {list(self.steps)}; give one number or more, each at least 1")
        if len(set(self.steps)) < len(self.steps):
            raise ValueError(f"steps are {list(self.steps)}; give each number once")
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; give 1 or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; give a whole number from 0 to 2^63 - 1")
        if self.border not in get_args(Border):
            raise ValueError(f"border is {self.border!r}; choose one of {', '.join(get_args(Border))}")
        _ = self.protocol  # refuses a wrong channel or crop

    @property
    def ratio(self) -> Fraction:
        """The scale as a fraction: a side that can be shrunk exactly is a multiple of its numerator."""
        return Fraction(self.scale).limit_denominator(100)

    @property
    def protocol(self) -> metrics.Protocol:
        """What PSNR and SSIM compare."""
        return metrics.Protocol(math.ceil(self.ratio) if self.crop is None else self.crop, self.channel)


# ---------------------------------------------------------------------------------------------------- images


class Picture(NamedTuple):
    """One image to restore and the truth to compare with.

    Attributes:
        name: of the file.
        truth: (C, H, W) uint8; the sides are whole multiples of what the scale needs.
        low_res: (C, h, w) uint8, H / h = W / w = scale.
    """

    name: str
    truth: Tensor
    low_res: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the truth."""
        return self.truth.shape[-2], self.truth.shape[-1]


class ImageSet(NamedTuple):
    """The images of one folder: its name, the images, and in words where their low resolution came from."""

    name: str
    pictures: list[Picture]
    degradation: str


def read_image_set(
    folder: str | Path, settings: Settings, low_res_folder: str | Path | None = None, limit: int | None = None
) -> ImageSet:
    """Read the images of a folder, subfolders left out, in the order of their names.

    Args:
        folder: high-resolution images. Each is cropped (top-left) to a size that the scale divides.
        settings: its scale and border say how the low resolution is made.
        low_res_folder: low-resolution images to use instead of making them, matched by name.
        limit: read only the first so many.

    Raises:
        ValueError: a folder or a file is missing, unreadable or too small, or the low resolution has another
            size than the scale makes it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give a number of images, at least 1")
    paths = list_images(folder, recursive=False)[:limit]
    name = Path(folder).resolve().name
    if low_res_folder is None:
        edge = "mirrored" if settings.border == "mirror" else "replicated"
        degradation = (
            f"made by MATLAB's bicubic (antialiased, a = -0.5), {edge} border, uint8 after each pass"
        )
        return ImageSet(name, [_shrunk_picture(path, settings) for path in paths], degradation)
    candidates = list_images(low_res_folder, recursive=False)
    matches = [_match(path, candidates, settings.scale) for path in paths]
    pictures = [_given_picture(path, low, settings) for path, low in zip(paths, matches, strict=True)]
    return ImageSet(name, pictures, f"read from {Path(low_res_folder).resolve().name}")


def _shrunk_picture(path: Path, settings: Settings) -> Picture:
    truth = _read_truth(path, settings)
    low_res = downscale_image(
        truth, size=_low_size(truth, settings), border=settings.border, rounding="uint8"
    )
    return Picture(path.name, _to_planes(truth), _to_planes(low_res))


def _given_picture(path: Path, low_path: Path, settings: Settings) -> Picture:
    truth, low_res = _read_truth(path, settings), _read_pixels(low_path)
    expected = _low_size(truth, settings)
    if low_res.shape[:2] != expected:
        raise ValueError(
            f"{low_path} is {low_res.shape[1]}x{low_res.shape[0]}, but {path} at scale {settings.scale:g} "
            f"needs {expected[1]}x{expected[0]}; give the --scale and the --low_res that belong together"
        )
    if truth.ndim == 3 and low_res.ndim == 2:
        low_res = np.stack([low_res] * 3, axis=-1)
    elif truth.ndim == 2 and low_res.ndim == 3:
        if (low_res != low_res[..., :1]).any():
            raise ValueError(
                f"{low_path} has colours, but {path} is grey; give the files that belong together"
            )
        low_res = low_res[..., 0]
    return Picture(path.name, _to_planes(truth), _to_planes(low_res))


def _read_pixels(path: Path) -> npt.NDArray[np.uint8]:
    """(H, W) or (H, W, 3) uint8; 16 bits are rounded to 8, alpha is dropped."""
    pixels = decode_image(path).pixels
    if pixels.dtype == np.uint16:
        pixels = unit_to_pixels(pixels_to_unit(pixels))
    return pixels.astype(np.uint8, copy=False)


def _read_truth(path: Path, settings: Settings) -> npt.NDArray[np.uint8]:
    """Read an image and crop it, top-left, to a size that the scale divides."""
    pixels = _read_pixels(path)
    multiple = settings.ratio.numerator
    height, width = (length - length % multiple for length in pixels.shape[:2])
    needed = max(_SMALLEST_SIDE, 2 * settings.protocol.crop + _SSIM_WINDOW)
    if min(height, width) < needed:
        raise ValueError(
            f"{path} is {pixels.shape[1]}x{pixels.shape[0]}, {width}x{height} as a multiple of {multiple}; "
            f"{needed} pixels a side are needed: leave it out"
        )
    return pixels[:height, :width]


def _low_size(truth: npt.NDArray[np.uint8], settings: Settings) -> tuple[int, int]:
    height, width = (int(length / settings.ratio) for length in truth.shape[:2])
    return height, width


def _to_planes(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """(H, W) or (H, W, 3) to a tensor (C, H, W), all uint8."""
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(planes.copy())


def _match(path: Path, candidates: Sequence[Path], scale: float) -> Path:
    """The low-resolution file of a high-resolution one: of the same base name, or with an ending like x4."""
    stem, tag = path.stem.lower().removesuffix("_hr"), f"x{scale:g}"
    endings = ("", tag, f"_{tag}", f"-{tag}", "_lr", f"_lr{tag}", f"_lr_{tag}", f"_{tag}_lr", f"{tag}_lr")
    names = {path.stem.lower(), *(stem + ending for ending in endings)}
    found = [candidate for candidate in candidates if candidate.stem.lower() in names]
    same = [candidate for candidate in found if candidate.stem == path.stem]
    found = same or found
    if len(found) == 1:
        return found[0]
    folder = candidates[0].parent
    if found:
        raise ValueError(
            f"{folder}: {found[0].name} and {found[1].name} could both be the low resolution of {path}"
        )
    raise ValueError(
        f"{folder}: no low-resolution image for {path}; "
        f"looked for files named {stem}, {stem}{tag}, {stem}_{tag} and the like"
    )


def _unit(pixels: Tensor) -> Tensor:
    """(C, H, W) uint8 to (1, C, H, W) float32 in [0, 1]."""
    return pixels[None].float() / 255


def _to_uint8(image: Tensor) -> Tensor:
    """(C, H, W) in [0, 1] to what a file holds, uint8, on the CPU; half up, as `images.unit_to_pixels`."""
    return (metrics.round_to_uint8(image.cpu().double()) * 255).round().to(torch.uint8)


# --------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Model:
    """A trained network, ready to restore.

    Attributes:
        loaded: the network, its process and how long it was trained.
        generator: samples it, with one scheduler.
        file_name, digest: which file it came from, and the first 12 digits of that file's SHA-256.
    """

    loaded: LoadedModel
    generator: ResidualGenerator
    file_name: str
    digest: str

    def check(self, settings: Settings) -> None:
        """Refuse settings that the network cannot serve, before anything is computed.

        Raises:
            ValueError: another scale, a number of steps that the scheduler cannot take, or images of other
                than three channels.
        """
        trained, channels = float(self.loaded.network.scale), self.loaded.network.config.in_channels
        if abs(trained - settings.scale) > 1e-4:
            raise ValueError(
                f"{self.file_name} was trained for scale {trained:g}, not {settings.scale:g}: "
                f"use --scale {trained:g} or another model"
            )
        if channels != 3:
            raise ValueError(f"{self.file_name} restores images of {channels} channels: give a model of RGB")
        for steps in settings.steps:
            self.generator.plan(steps)

    def restore(self, low_res: Tensor, size: tuple[int, int], steps: int, seed: int, sample: int) -> Tensor:
        """Restore (C, h, w) uint8 to (C, H, W) in [0, 1], on the generator's device."""
        unit = _unit(low_res).to(self.generator.device)
        model_input = to_model_range(unit).expand(-1, 3, -1, -1)  # (1, 3, h, w)
        upscaled = upscale_image(model_input, size=size).clamp(-1, 1)  # (1, 3, H, W)
        network = cast(Network, self.loaded.network)
        restored = self.generator.restore(network, model_input, upscaled, steps, seed, sample=sample)[0]
        return restored.mean(dim=0, keepdim=True) if len(low_res) == 1 else restored

    def describe(self) -> dict[str, Json]:
        """What identifies the model and how it is computed."""
        process = self.generator.diffusion.process
        return {
            "file": self.file_name,
            "sha256": self.digest,
            "steps_trained": self.loaded.step,
            "parameters": sum(parameter.numel() for parameter in self.loaded.network.parameters()),
            "mode": process.mode,
            "schedule": process.schedule,
            "timesteps": process.timesteps,
            "precision": "fp32" if self.generator.precision is None else "bf16",
        }


def load_trained(
    path: str | Path,
    device: torch.device,
    precision: torch.dtype | None = None,
    scheduler: SchedulerName = DEFAULT_SCHEDULER,
) -> Model:
    """Read a trained model from a checkpoint (.pth) or an exported file (.safetensors).

    Raises:
        checkpoint.CheckpointError: the file is missing, damaged or not a model.
    """
    path = Path(path)
    loaded = load_model(path, UNet, device)
    process = ProcessConfig.from_dict(loaded.process)
    generator = ResidualGenerator.of(process, device, precision, scheduler)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return Model(loaded, generator, path.name, digest)


class _Method(NamedTuple):
    """One way to restore. It gives one row, or two where the mean of several samples is asked for.

    Attributes:
        name, scheduler, steps: as in Scores.
        samples: restorations of each image.
        evaluations: of the network for one restoration, for the progress bar.
        restore: the picture and the index of the sample -> (C, H, W) in [0, 1].
        meter: of the device it computes on.
    """

    name: Literal["bicubic", "model"]
    scheduler: str | None
    steps: int | None
    samples: int
    evaluations: int
    restore: Callable[[Picture, int], Tensor]
    meter: Meter


def _bicubic(settings: Settings, device: torch.device) -> _Method:
    """Bicubic stays on the CPU: its row is then the same, to the last digit, wherever the model runs."""

    def restore(picture: Picture, sample: int) -> Tensor:
        return resize(picture.low_res, size=picture.size, border=settings.border).float() / 255

    cpu = torch.device("cpu")
    meter = Meter.on(cpu) if device.type == "cpu" else Meter(cpu, "none")
    return _Method("bicubic", None, None, 1, 1, restore, meter)


def _sampled(model: Model, settings: Settings, steps: int) -> _Method:
    """The model, at one number of steps."""

    def restore(picture: Picture, sample: int) -> Tensor:
        return model.restore(picture.low_res, picture.size, steps, settings.seed, sample)

    scheduler = model.generator.sampler
    evaluations = len(scheduler.steps(steps))
    meter = Meter.on(model.generator.device)
    return _Method("model", scheduler.name, steps, settings.num_samples, evaluations, restore, meter)


# ------------------------------------------------------------------------------------------------- measuring


@dataclass
class _Tally:
    """What goes into one row: the scores and, for the distance between sets, the restored images."""

    scores: list[ImageScores] = field(default_factory=list)
    restored: list[Tensor] = field(default_factory=list)  # (C, H, W) uint8

    def row(self, truths: Sequence[Tensor], seed: int) -> Row:
        """Sum up; `truths` are (C, H, W) uint8."""
        scores, first = self.scores, self.scores[0]
        energies = [score.hf_energy for score in scores if score.hf_energy is not None]
        peaks = [score.peak_bytes for score in scores if score.peak_bytes is not None]
        distance = metrics.sliced_wasserstein_distance(
            _UnitImages(self.restored), _UnitImages(truths), seed=seed
        )
        return Row(
            method=first.method,
            scheduler=first.scheduler,
            steps=first.steps,
            samples=first.samples,
            psnr=fmean(score.psnr for score in scores),
            ssim=fmean(score.ssim for score in scores),
            lr_psnr=fmean(score.lr_psnr for score in scores),
            lpips=_mean(score.lpips for score in scores),
            hf_energy=metrics.geometric_mean(torch.tensor(energies)) if energies else None,
            swd=distance.average,
            seconds_per_megapixel=sum(s.seconds for s in scores) / sum(s.megapixels for s in scores),
            peak_memory_mb=max(peaks) / 1e6 if peaks else None,
            uncertainty_pearson=_mean(score.pearson for score in scores),
            uncertainty_spearman=_mean(score.spearman for score in scores),
        )


class _UnitImages(Sequence[Tensor]):
    """A set of (C, H, W) uint8 images as float in [0, 1], converted one by one: a quarter of the memory.

    Grey images become RGB where the set has both.
    """

    def __init__(self, images: Sequence[Tensor]) -> None:
        self._images = images
        self._channels = max(len(image) for image in images)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # nobody takes slices of it
        return _unit(self._images[index])[0].expand(self._channels, -1, -1)


def _mean(values: Iterator[float | None]) -> float | None:
    """Mean of the values that are defined."""
    defined = [value for value in values if value is not None]
    return fmean(defined) if defined else None


def _defined(value: float) -> float | None:
    """None for nan."""
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class _Judge:
    """Restores pictures and measures the results."""

    protocol: metrics.Protocol
    border: Border
    lpips: metrics.Lpips | None

    def judge(self, method: _Method, picture: Picture, tallies: Sequence[_Tally]) -> None:
        """Add the first sample to the first tally and, if there are two, the mean of all to the second."""
        samples: list[Tensor] = []  # (C, H, W) in [0, 1]
        costs: list[Cost] = []
        for index in range(method.samples):
            restored, cost = method.meter.measure(functools.partial(method.restore, picture, index))
            samples.append(restored.cpu())
            costs.append(cost)
        for tally, count in zip(tallies, (1, method.samples), strict=False):
            pixels = _to_uint8(torch.stack(samples[:count]).mean(dim=0))
            tally.restored.append(pixels)
            tally.scores.append(self._score(method, picture, pixels, samples[:count], costs[:count]))

    def _score(
        self, method: _Method, picture: Picture, pixels: Tensor, samples: list[Tensor], costs: list[Cost]
    ) -> ImageScores:
        """Measure `pixels` (C, H, W) uint8, the mean of the samples."""
        restored, truth = _unit(pixels), _unit(picture.truth)
        peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
        pearson = spearman = None
        if len(samples) > 1:
            correlation = metrics.uncertainty_correlation(torch.stack(samples)[:, None], truth)
            pearson, spearman = _defined(correlation.pearson.item()), _defined(correlation.spearman.item())
        return ImageScores(
            method=method.name,
            scheduler=method.scheduler,
            steps=method.steps,
            samples=len(samples),
            psnr=metrics.psnr(restored, truth, self.protocol).item(),
            ssim=metrics.ssim(restored, truth, self.protocol).item(),
            lr_psnr=metrics.low_resolution_psnr(restored, _unit(picture.low_res), self.border).item(),
            lpips=None if self.lpips is None else self.lpips(restored, truth).item(),
            hf_energy=_defined(metrics.high_frequency_energy(restored, truth).item()),
            image=picture.name,
            seconds=sum(cost.seconds for cost in costs),
            peak_bytes=max(peaks, default=None),
            megapixels=pixels.shape[-2] * pixels.shape[-1] / 1e6,
            pearson=pearson,
            spearman=spearman,
        )


def evaluate(
    images: ImageSet,
    settings: Settings,
    model: Model | None = None,
    *,
    device: torch.device | None = None,
    progress: bool = False,
) -> Report:
    """Measure bicubic and, if given, a model at each number of steps.

    The same images, settings and model give the same numbers, except for time and memory.

    Args:
        images: see read_image_set; read with the same settings.
        settings: what to measure.
        model: see load_trained.
        device: where LPIPS is computed; by default where the model is, or the CPU.
        progress: show a progress bar on stderr, if that is a terminal.

    Raises:
        ValueError: the model does not fit the settings, or every image is flat.
    """
    if model is not None:
        model.check(settings)
    model_device = torch.device("cpu") if model is None else model.generator.device
    lpips, lpips_note = _load_lpips(settings, device or model_device)
    methods = [_bicubic(settings, model_device)]
    if model is not None:
        methods += [_sampled(model, settings, steps) for steps in settings.steps]
        # What the first call alone has to set up belongs to no row.
        model.restore(images.pictures[0].low_res, images.pictures[0].size, 1, settings.seed, 0)
    rows: list[Row] = []
    scores: list[ImageScores] = []
    for tally in _tallies(
        images.pictures, methods, _Judge(settings.protocol, settings.border, lpips), progress
    ):
        rows.append(tally.row([picture.truth for picture in images.pictures], settings.seed))
        scores += tally.scores
    return Report(_protocol(images, settings, model, lpips_note, methods[-1].meter), rows, scores)


def _tallies(
    pictures: Sequence[Picture], methods: Sequence[_Method], judge: _Judge, progress: bool
) -> Iterator[_Tally]:
    """What goes into each row, in the order of the rows."""
    total = len(pictures) * sum(method.samples * method.evaluations for method in methods)
    with tqdm(total=total, unit="step", disable=None if progress else True, dynamic_ncols=True) as bar:
        for method in methods:
            bar.set_description(method.name if method.steps is None else f"{method.steps} steps")
            tallies = [_Tally() for _ in range(min(2, method.samples))]
            for picture in pictures:
                judge.judge(method, picture, tallies)
                bar.update(method.samples * method.evaluations)
            yield from tallies


def _load_lpips(settings: Settings, device: torch.device) -> tuple[metrics.Lpips | None, str]:
    """LPIPS if it is wanted and can be had, and in words what became of it."""
    if not settings.lpips:
        return None, LPIPS_OFF
    try:
        return metrics.Lpips(device), "AlexNet, version 0.1; lower is better"
    except metrics.MetricUnavailableError as error:
        return None, str(error).replace("LPIPS is unavailable", "unavailable")


def _protocol(
    images: ImageSet, settings: Settings, model: Model | None, lpips_note: str, meter: Meter
) -> dict[str, Json]:
    """All that the numbers depend on, and what each of them means."""
    return {
        "data": images.name,
        "images": len(images.pictures),
        "scale": int(settings.scale) if settings.ratio.denominator == 1 else settings.scale,
        "low_resolution": images.degradation,
        "border": settings.border,
        "metrics": settings.protocol.describe(),
        "lr_psnr": "restored image shrunk again (uint8, same border) against the input, all channels",
        "lpips": lpips_note,
        "hf_energy": "power at 0.35 to 0.9 of Nyquist relative to the truth, geometric mean; 1 is right",
        "swd": "sliced Wasserstein distance x 1000 of 7x7 patches, 3 pyramid levels; lower is better",
        "samples": "restorations of each image that were averaged before measuring",
        "uncertainty": "correlation over pixels of the samples' deviation with the error of their mean",
        "seconds_per_megapixel": "of output, from the decoded input to the result",
        "peak_memory_mb": f"in 10^6 bytes: {meter.describe()}",
        "infinite": 'identical images have an infinite PSNR, written as the string "inf"',
        "seed": settings.seed,
        "model": None if model is None else model.describe(),
        "device": _device_name(meter.device),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, threads: {torch.get_num_threads()}" if device.type == "cpu" else device.type
