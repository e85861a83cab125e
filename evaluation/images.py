"""The images of an evaluation, uint8, of C channels (1 or 3), H x W or h x w pixels."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from degradation import Degradation
from evaluation.config import EvaluationConfig
from evaluation.metrics import SSIM_WINDOW, to_uint8
from evaluation.pairs import find_low_resolution
from imaging.files import decode_image, list_images, pixels_to_unit

SMALLEST_SIDE = 32  # what LPIPS, the spectrum and the pyramid of patches need


class Picture(NamedTuple):
    """What to restore, and the truth."""

    name: str  # of the file
    truth: Tensor  # (C, H, W)
    low_res: Tensor  # (C, h, w), H / h = W / w = scale


class ImageSet:
    """The images of a folder without subfolders, by name; ValueError where there are none.

    Each is cropped (top-left) to a size that the scale divides. The low resolution is made as `config` says,
    or from `low_res_folder`, matched by name. `limit`: only the first so many.
    """

    def __init__(
        self,
        folder: str | Path,
        config: EvaluationConfig,
        low_res_folder: str | Path | None = None,
        limit: int | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}; give a number of images, at least 1")
        self.folder = printable(Path(folder).resolve().name)
        self.paths = list_images(folder, recursive=False)[:limit]
        self.low_res_paths = None if low_res_folder is None else list_images(low_res_folder, recursive=False)
        self.scale = config.ratio
        degradation = Degradation.of(kind=config.degradation, scale=config.scale, border=config.border)
        self.degradation = replace(degradation, clean_share=0.0)
        self.seed = config.seed
        self.smallest = max(SMALLEST_SIDE, 2 * config.protocol.crop + SSIM_WINDOW)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Picture]:
        return (self.read(path) for path in self.paths)

    def read(self, path: Path) -> Picture:
        """ValueError: unreadable, too small or without its partner."""
        truth, multiple = _read_planes(path), self.scale.numerator
        height, width = (length - length % multiple for length in truth.shape[-2:])
        if min(height, width) < self.smallest:
            raise ValueError(
                f"{path} is {truth.shape[2]}x{truth.shape[1]}, {width}x{height} as a multiple of {multiple}; "
                f"{self.smallest} pixels a side are needed: leave it out"
            )
        truth, scale = truth[:, :height, :width], float(self.scale)
        if self.low_res_paths is None:
            low_res = self.degradation(truth, random_of(path, self.seed))
        else:
            low_res = self._read_low_res(find_low_resolution(path, self.low_res_paths, scale), path, truth)
        return Picture(printable(path.name), truth, low_res)

    def describe(self) -> str:
        if self.low_res_paths is None:
            return self.degradation.describe()
        return f"read from {printable(self.low_res_paths[0].resolve().parent.name)}"

    def _read_low_res(self, low_path: Path, path: Path, truth: Tensor) -> Tensor:
        low_res = _read_planes(low_path)
        height, width = (int(length / self.scale) for length in truth.shape[-2:])
        if low_res.shape[-2:] != (height, width):
            raise ValueError(
                f"{low_path} is {low_res.shape[2]}x{low_res.shape[1]}, but {path} at scale "
                f"{float(self.scale):g} needs {width}x{height}; give the folders that belong together"
            )
        grey = len(truth) == 1
        if grey and bool((low_res != low_res[:1]).any()):
            raise ValueError(f"{low_path} has colours, but {path} is grey; give files that belong together")
        return low_res[:1] if grey else low_res.expand(3, -1, -1)


def _read_planes(path: Path) -> Tensor:
    """(1 or 3, H, W), without alpha."""
    return to_uint8(pixels_to_unit(decode_image(path).pixels))


def random_of(path: Path, seed: int) -> np.random.Generator:
    """An image has the same numbers among any others."""
    return np.random.default_rng((seed, *os.fsencode(path.stem)))


def printable(name: str) -> str:
    """UTF-8; bytes that are none become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
