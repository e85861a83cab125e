"""Measure bicubic, trained models and any other way to restore on a set of images: one row per method.

A restorer is any callable low_res (C, h, w) in [0, 1] -> restored (C, H, W) in [0, 1], C 1 (grey) or 3 (RGB).
Every metric sees what a user would find in an 8-bit file: results are rounded to uint8 before they are
measured. A grey file is its own luma.
"""

import hashlib
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bicubic import Border, resize
from degradation import Bicubic
from diffusion import ProcessConfig
from engine.checkpoint import LoadedModel, load_model
from engine.options import Options, option
from evaluation.images import ImageSet, Picture, printable
from evaluation.lpips import Lpips, MetricUnavailableError
from evaluation.metrics import SSIM_WINDOW, Protocol, to_uint8
from evaluation.report import Json, Label, Report, Scores
from evaluation.table import METRICS, Conditions, Pair
from evaluation.wasserstein import (
    LEVELS,
    PATCHES_OF_A_SET,
    PATCHES_PER_IMAGE,
    PatchPair,
    patch_positions,
    pyramid_patches,
)
from imaging.files import list_images, pixels_to_unit, unit_to_pixels
from restoration import RestoreConfig, Restorer
from unet import UNet

CPU = torch.device("cpu")
# What LPIPS, the spectrum and the pyramid of patches need: every image can be scored by every metric.
SMALLEST_SIDE = 32
# What one image may fail with while the others are measured.
IMAGE_ERRORS = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class EvaluationConfig(Options):
    """What is measured, and how. `scale` is the enlargement; a fraction such as 1.5 will do.

    Raises:
        OptionError: a value out of range.
    """

    scale: float = option(MISSING, "the enlargement, such as 4", above=1)
    border: Border = option("mirror", "what bicubic sees beyond the edge; mirror is today's MATLAB")
    channel: Literal["luma", "rgb"] = option("luma", "what PSNR and SSIM compare")
    crop: int | None = option(
        None, "pixels that PSNR and SSIM leave out at each border; without it, the scale", low=0
    )
    seed: int = option(0, "of the noise, and of SWD's patches", low=0, high=2**63 - 1)
    lpips: bool = option(True, "measure LPIPS")
    lpips_weights: str | None = option(
        None, "AlexNet's features for LPIPS, .pth or .safetensors; without it, SR_LPIPS_WEIGHTS or a download"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(self.ratio - self.scale) > 1e-6:
            raise ValueError(f"scale is {self.scale:g}; give a number such as 2, 3, 4 or 1.5")

    @property
    def ratio(self) -> Fraction:
        """The scale as a fraction: a side that can be shrunk exactly is a multiple of its numerator."""
        return Fraction(self.scale).limit_denominator(100)

    @property
    def protocol(self) -> Protocol:
        """What PSNR and SSIM compare."""
        return Protocol(math.ceil(self.ratio) if self.crop is None else self.crop, self.channel)


def read_image_set(
    folder: str | Path,
    config: EvaluationConfig,
    low_res_folder: str | Path | None = None,
    limit: int | None = None,
) -> ImageSet:
    """The images of a folder, subfolders left out, in the order of their names; no file is opened yet.

    Args:
        folder: high-resolution images.
        config: its scale and border say how the low resolution is made.
        low_res_folder: low-resolution images to use instead of making them, matched by name.
        limit: only the first so many.

    Raises:
        ValueError: a folder is missing or holds no image.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give a number of images, at least 1")
    return ImageSet(
        folder=printable(Path(folder).resolve().name),
        paths=tuple(list_images(folder, recursive=False)[:limit]),
        scale=config.ratio,
        degradation=Bicubic(scale=config.scale, border=config.border),
        smallest=max(SMALLEST_SIDE, 2 * config.protocol.crop + SSIM_WINDOW),
        low_res_paths=None if low_res_folder is None else tuple(list_images(low_res_folder, recursive=False)),
    )


# --------------------------------------------------------------------------------------------------- methods


class Estimate(NamedTuple):
    """What a restorer that averages samples may give: (C, H, W) in [0, 1], and their deviation (H, W)."""

    restored: Tensor
    deviation: Tensor | None


RestoreFunction: TypeAlias = "Callable[[Tensor], Tensor | Estimate]"


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        label: how it is called.
        restore: the restorer, see the top of this file.
        device: where it computes, to tell its time and memory.
    """

    label: Label
    restore: RestoreFunction
    device: torch.device = CPU


def bicubic_method(config: EvaluationConfig) -> Method:
    """Bicubic of 8-bit images, on the CPU: its row is the same to the last digit wherever others compute."""

    def restore(low_res: Tensor) -> Tensor:
        return resize(to_uint8(low_res), scale=config.scale, border=config.border).float() / 255

    return Method(Label("bicubic"), restore)


@dataclass(frozen=True)
class TrainedModel:
    """A trained network.

    Attributes:
        loaded: the network, its process and how long it was trained.
        path: the file it came from.
        device: where to compute.
        precision: dtype to autocast to, None for float32.
    """

    loaded: LoadedModel[UNet]
    path: Path
    device: torch.device = CPU
    precision: torch.dtype | None = None

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device = CPU, precision: torch.dtype | None = None
    ) -> "TrainedModel":
        """Read a checkpoint (.pth) or an exported model (.safetensors).

        Raises:
            CheckpointError: the file is missing, damaged or not a model.
        """
        return cls(load_model(Path(path), UNet, device), Path(path), device, precision)

    def method(self, how: RestoreConfig, scale: float) -> Method:
        """Restoring as infer.py does with this configuration, named after its mode, or "model".

        Raises:
            ValueError: the network cannot restore like that, or was trained for another scale.
        """
        trained = float(self.loaded.network.scale)
        if abs(trained - scale) > 1e-4:
            raise ValueError(
                f"{self.path.name} was trained for scale {trained:g}, not {scale:g}: "
                f"use --scale {trained:g} or another model"
            )
        restorer = Restorer(self.loaded, how, self.device, self.precision)
        samples = how.budget.num_images

        def restore(low_res: Tensor) -> Estimate:
            found = restorer.restore(unit_to_pixels(low_res), deviation=samples > 1)
            deviation = None if found.deviation is None else torch.from_numpy(found.deviation)
            return Estimate(pixels_to_unit(found.pixels), deviation)

        label = Label(how.mode or "model", how.scheduler, restorer.step_count, samples)
        return Method(label, restore, self.device)

    def describe(self) -> dict[str, Json]:
        """What identifies the model and how it is computed."""
        process = ProcessConfig.from_dict(self.loaded.process)
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
        return {
            "file": printable(self.path.name),
            "sha256": digest,
            "steps_trained": self.loaded.step,
            "parameters": sum(parameter.numel() for parameter in self.loaded.network.parameters()),
            "mode": process.mode,
            "schedule": process.schedule,
            "timesteps": process.timesteps,
            "precision": "fp32" if self.precision is None else "bf16",
        }


# ------------------------------------------------------------------------------------------------- measuring


@dataclass
class _Row:
    """What one method has done so far."""

    method: Method
    scores: list[Scores] = field(default_factory=list)
    patches: list[PatchPair] = field(default_factory=list)

    def summarise(self, seed: int) -> Scores:
        values: dict[str, float | None] = {}
        for metric in METRICS:
            if metric.of_set is not None:
                values[metric.name] = metric.of_set(self.patches, seed)
            else:
                found = [score[metric.name] for score in self.scores]
                values[metric.name] = metric.summarise([value for value in found if value is not None])
        return Scores(self.method.label, values)


def evaluate(
    images: ImageSet,
    config: EvaluationConfig,
    methods: Sequence[Method] = (),
    *,
    device: torch.device = CPU,
    facts: Mapping[str, Json] | None = None,
    progress: bool = False,
) -> Report:
    """Measure bicubic and other methods.

    The same images, configuration and methods give the same numbers, except for time and memory. One image is
    in memory at a time; an image that cannot be read or restored is left out of every row, and named.

    Args:
        images: see read_image_set.
        config: what to measure.
        methods: see TrainedModel.method; for a restorer of your own, Method(Label("mine"), restore).
        device: where LPIPS is computed.
        facts: more for the protocol, such as which model it was.
        progress: show a progress bar on stderr, if that is a terminal.

    Raises:
        ValueError: no image could be measured, or the weights for LPIPS are wrong.
    """
    conditions = _conditions(config, device)
    rows = [_Row(method) for method in (bicubic_method(config), *methods)]
    failures = _fill(rows, images, conditions, progress)
    if len(failures) == len(images):
        raise ValueError(failures[0] if len(failures) == 1 else f"no image can be measured: {failures[0]}")
    protocol = _protocol(images, config, conditions, rows[-1].method.device)
    protocol |= {"images": len(images) - len(failures)} | dict(facts or {})
    scores = [score for row in rows for score in row.scores]
    return Report(protocol, [row.summarise(config.seed) for row in rows], scores, failures)


def _fill(rows: Sequence[_Row], images: ImageSet, conditions: Conditions, progress: bool) -> list[str]:
    """Measure every image by every method; returns why images were left out."""
    failures: list[str] = []
    generator = torch.Generator().manual_seed(conditions.seed)
    count = max(1, min(PATCHES_PER_IMAGE, PATCHES_OF_A_SET // len(images)))
    for path in tqdm(images.paths, unit="image", disable=None if progress else True, dynamic_ncols=True):
        try:
            picture = images.read(path)
            height, width = picture.truth.shape[-2:]
            positions = patch_positions(height, width, LEVELS, count, generator)
            if not rows[0].scores:
                _warm_up([row.method for row in rows], picture)
            found = [_measure(row.method, picture, conditions) for row in rows]
        except IMAGE_ERRORS as error:
            failures.append(_why(path, error))
            continue
        true_patches = pyramid_patches(_unit(picture.truth)[0], positions)
        for row, (scores, restored) in zip(rows, found, strict=True):
            row.scores.append(scores)
            row.patches.append(PatchPair(pyramid_patches(restored, positions), true_patches))
    return failures


def _why(path: Path, error: BaseException) -> str:
    """One line that names the file."""
    message = " ".join(str(error).split()) or type(error).__name__
    return printable(message if path.name in message else f"{path}: {message}")


def _warm_up(methods: Sequence[Method], picture: Picture) -> None:
    """What the first call alone has to set up belongs to no row."""
    quickest = min(methods[1:], key=lambda method: method.label.steps or 0, default=methods[0])
    quickest.restore(_unit(picture.low_res)[0, :, :16, :16])


def _measure(method: Method, picture: Picture, conditions: Conditions) -> tuple[Scores, Tensor]:
    """Restore one picture: its scores, and the result (C, H, W) as an 8-bit file holds it, in [0, 1]."""
    low_res = _unit(picture.low_res)
    found, seconds, peak_bytes = _timed(method, low_res[0])
    estimate = found if isinstance(found, Estimate) else Estimate(found, None)
    restored = _unit(to_uint8(estimate.restored.cpu()))
    pair = Pair(restored, _unit(picture.truth), low_res, conditions, estimate.deviation, seconds, peak_bytes)
    values: dict[str, float | None] = {}
    for metric in METRICS:
        value = math.nan if metric.of_image is None else metric.of_image(pair).item()
        values[metric.name] = None if math.isnan(value) else value
    return Scores(method.label, values, picture.name), restored[0]


def _timed(method: Method, low_res: Tensor) -> tuple[Tensor | Estimate, float, int | None]:
    """The result, seconds, and on CUDA the most bytes that PyTorch had allocated."""
    cuda = method.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(method.device)
    synchronize(method.device)
    start = time.perf_counter()
    found = method.restore(low_res)
    synchronize(method.device)
    seconds = time.perf_counter() - start
    return found, seconds, int(torch.cuda.max_memory_allocated(method.device)) if cuda else None


def synchronize(device: torch.device) -> None:
    """Wait for what was handed to the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _unit(pixels: Tensor) -> Tensor:
    """(C, H, W) uint8 to (1, C, H, W) float32 in [0, 1]."""
    return pixels[None].float() / 255


def _conditions(config: EvaluationConfig, device: torch.device) -> Conditions:
    """What the metrics depend on, and LPIPS if it is wanted and can be had."""
    without = Conditions(config.protocol, config.border, seed=config.seed)
    if not config.lpips:
        return without
    try:
        lpips = Lpips(device, config.lpips_weights)
    except MetricUnavailableError as error:
        return replace(without, lpips_note=str(error).replace("LPIPS is unavailable", "unavailable"))
    return replace(without, lpips=lpips, lpips_note=lpips.describe())


def _protocol(
    images: ImageSet, config: EvaluationConfig, conditions: Conditions, device: torch.device
) -> dict[str, Json]:
    """All that the numbers depend on, and what each of them means."""
    return {
        "data": images.folder,
        "images": len(images),
        "scale": int(config.scale) if config.ratio.denominator == 1 else config.scale,
        "low_resolution": images.describe(),
        "border": config.border,
        "metrics": {metric.name: metric.note(conditions) for metric in METRICS},
        "samples": "restorations of each image that were averaged before measuring",
        "infinite": 'written as the string "inf"',
        "seed": config.seed,
        "model": None,
        "restoring": None,
        "device": _device_name(device),
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
