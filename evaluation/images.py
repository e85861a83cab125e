"""The images of an evaluation, uint8, of C channels (1 or 3), H x W or h x w pixels."""

import math
import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from bicubic import Border, exact_scale
from degradation import KINDS, Degradation
from engine.options import OptionError, Options, option
from evaluation.metrics import SSIM_WINDOW, Channel, Comparison
from imaging.files import decode_image
from imaging.kinds import list_images
from imaging.pairs import find_low_resolution
from imaging.pixels import pixels_to_unit, to_uint8

SMALLEST_SIDE = 32  # that LPIPS and the spectrum need


@dataclass(frozen=True)
class EvaluationConfig(Options):
    """The options of an evaluation; the scale may be a fraction such as 1.5."""

    scale: float = option(MISSING, "enlargement, such as 4", above=1)
    low_res: str | None = option(None, "folder of low-resolution images; else they are made", path=True)
    limit: int | None = option(None, "number of images to measure, the first by name (default: all)", low=1)
    border: Border = option("mirror", "border that bicubic sees beyond the edge; today's MATLAB mirrors")
    degradation: str = option("bicubic", "kind of low resolution, drawn by the seed", choices=KINDS)
    channel: Channel = option("luma", "channels that PSNR and SSIM compare")
    crop: int | None = option(None, "border that PSNR and SSIM leave out (default: the scale)", low=0)
    seed: int = option(0, "seed of the noise and of the degradation", low=0, high=2**63 - 1)
    lpips: bool = option(True, "measure LPIPS")
    lpips_weights: str | None = option(None, "file of AlexNet; else SR_LPIPS_WEIGHTS or fetched", path=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio.denominator > 100:
            raise OptionError("scale", self.scale, "few sizes shrink by it exactly; give 2, 3, 4 or 1.5")

    @property
    def ratio(self) -> Fraction:
        """Return the scale as a fraction: a side that shrinks exactly is a multiple of its numerator."""
        return exact_scale(self.scale)

    @property
    def comparison(self) -> Comparison:
        """Compare as these options say, without LPIPS."""
        crop = math.ceil(self.ratio) if self.crop is None else self.crop
        return Comparison(crop, self.channel, self.border)


class Pair(NamedTuple):
    """An image to restore, and the truth."""

    name: str  # the file's
    truth: Tensor  # (C, H, W)
    low_res: Tensor  # (C, h, w), H / h = W / w = scale


class ImageSet:
    """The images of a folder without subfolders, by name; ValueError where there are none.

    Each is cropped (top-left) to a size that the scale divides.
    """

    def __init__(self, folder: str | Path, config: EvaluationConfig) -> None:
        self.config, self.folder = config, printable(Path(folder).resolve().name)
        self.paths = list_images(folder, recursive=False)[: config.limit]
        self.low_res_paths = None if config.low_res is None else list_images(config.low_res, recursive=False)
        degradation = Degradation.of(kind=config.degradation, scale=config.scale, border=config.border)
        self.degradation = replace(degradation, clean_share=0.0)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Pair]:
        return map(self.read, self.paths)

    def read(self, path: Path) -> Pair:
        """Read an image and its low resolution; ValueError: damaged, too small or without its partner."""
        truth, multiple = _read_planes(path), self.config.ratio.numerator
        height, width = (length - length % multiple for length in truth.shape[-2:])
        smallest = max(SMALLEST_SIDE, 2 * self.config.comparison.crop + SSIM_WINDOW)
        if min(height, width) < smallest:
            size = f"{truth.shape[2]}x{truth.shape[1]}, {width}x{height} as a multiple of {multiple}"
            raise ValueError(f"{path} is {size}; {smallest} pixels a side are needed: leave it out")
        truth = truth[:, :height, :width]
        if self.low_res_paths is None:
            # The same random numbers whichever other images there are.
            random = np.random.default_rng((self.config.seed, *os.fsencode(path.stem)))
            low_res = self.degradation(truth, random)
        else:
            low_res = self._read_low_res(self.low_res_paths, path, truth)
        return Pair(printable(path.name), truth, low_res)

    def describe(self) -> str:
        if self.low_res_paths is None:
            return self.degradation.describe()
        return f"read from {printable(self.low_res_paths[0].resolve().parent.name)}, 8 bits"

    def _read_low_res(self, candidates: list[Path], path: Path, truth: Tensor) -> Tensor:
        low_path = find_low_resolution(path, candidates, self.config.scale)
        low_res = _read_planes(low_path)
        height, width = (int(length / self.config.ratio) for length in truth.shape[-2:])
        if low_res.shape[-2:] != (height, width):
            needed = f"{path} needs {width}x{height} at scale {self.config.scale:g}; give folders that fit"
            raise ValueError(f"{low_path} is {low_res.shape[2]}x{low_res.shape[1]}, but {needed}")
        if len(truth) == 1 and bool((low_res != low_res[:1]).any()):
            raise ValueError(f"{low_path} has colours, but {path} is grey; give files that belong together")
        return low_res.expand(3, -1, -1)[: len(truth)]


def _read_planes(path: Path) -> Tensor:
    """(1 or 3, H, W) of a file as restoring sees it, in 8 bits, without alpha."""
    return to_uint8(pixels_to_unit(decode_image(path).visible))


def printable(name: str) -> str:
    """Write a name as UTF-8; bytes that are none become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
