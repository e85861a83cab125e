"""The images of an evaluation, read one at a time.

Shapes: C channels (1 grey or 3 RGB), H x W pixels of the high resolution, h x w of the low one; all uint8.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from degradation import Degradation
from evaluation.pairs import find_low_resolution
from imaging.files import decode_image, pixels_to_unit, unit_to_pixels


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


@dataclass(frozen=True)
class ImageSet:
    """The images of one folder; `read` opens one of them.

    Attributes:
        folder: name of the folder.
        paths: high-resolution files, in the order of their names.
        scale: the enlargement. Each image is cropped (top-left) to a size that it divides.
        degradation: makes the low resolution.
        smallest: pixels a side that the metrics need.
        low_res_paths: low-resolution files to use instead of making them, matched by name.
    """

    folder: str
    paths: tuple[Path, ...]
    scale: Fraction
    degradation: Degradation
    smallest: int = 1
    low_res_paths: tuple[Path, ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Picture]:
        return (self.read(path) for path in self.paths)

    def read(self, path: Path) -> Picture:
        """Read one of the images, and make or read its low resolution.

        Raises:
            ValueError: a file is unreadable or too small, has no partner, or one of another size.
        """
        truth = self._read_truth(path)
        if self.low_res_paths is None:
            low_res = self.degradation(truth)
        else:
            low_res = self._read_low_res(path, truth, self.low_res_paths)
        return Picture(printable(path.name), truth, low_res)

    def describe(self) -> str:
        """Where the low resolution comes from."""
        if self.low_res_paths is not None:
            return f"read from {printable(self.low_res_paths[0].resolve().parent.name)}"
        return self.degradation.describe()

    def _read_truth(self, path: Path) -> Tensor:
        """Read an image and crop it, top-left, to a size that the scale divides."""
        truth, multiple = _read_planes(path), self.scale.numerator
        height, width = (length - length % multiple for length in truth.shape[-2:])
        if min(height, width) < self.smallest:
            raise ValueError(
                f"{path} is {truth.shape[2]}x{truth.shape[1]}, {width}x{height} as a multiple of {multiple}; "
                f"{self.smallest} pixels a side are needed: leave it out"
            )
        return truth[:, :height, :width]

    def _read_low_res(self, path: Path, truth: Tensor, candidates: tuple[Path, ...]) -> Tensor:
        low_path = find_low_resolution(path, candidates, float(self.scale))
        low_res = _read_planes(low_path)
        height, width = (int(length / self.scale) for length in truth.shape[-2:])
        if low_res.shape[-2:] != (height, width):
            raise ValueError(
                f"{low_path} is {low_res.shape[2]}x{low_res.shape[1]}, but {path} at scale "
                f"{float(self.scale):g} needs {width}x{height}; give the folders that belong together"
            )
        if len(truth) == 1 and bool((low_res != low_res[:1]).any()):
            raise ValueError(
                f"{low_path} has colours, but {path} is grey; give the files that belong together"
            )
        return low_res[:1] if len(truth) == 1 else low_res.expand(3, -1, -1)


def _read_planes(path: Path) -> Tensor:
    """(1 or 3, H, W) uint8; 16 bits are rounded to 8, alpha is dropped."""
    pixels = decode_image(path).pixels
    if pixels.dtype == np.uint16:
        pixels = unit_to_pixels(pixels_to_unit(pixels))
    narrow: npt.NDArray[np.uint8] = pixels.astype(np.uint8, copy=False)
    return torch.from_numpy(np.array(narrow[None] if narrow.ndim == 2 else narrow.transpose(2, 0, 1)))


def printable(name: str) -> str:
    """A file name as text that can be written as UTF-8: bytes that are none become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
