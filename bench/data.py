"""Resizing, and reading crops."""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from bench.timing import Timing, in_turns
from bicubic import upscale_image
from examples.dead_leaves import dead_leaves
from imaging.cache import CachedReader
from imaging.files import read_rgb, write_image
from imaging.pixels import Pixels
from util import ImageDataset

CPU = torch.device("cpu")
PHOTOS = 6
CACHE_BYTES = 2**30


def resizers(image: Pixels, side: int) -> dict[str, Callable[[], npt.NDArray[np.generic]]]:
    """The works that make (H, W, 3) uint8 into (side, side, 3) uint8 by a bicubic filter."""
    size = (side, side)

    def by_torch() -> npt.NDArray[np.generic]:
        planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        wide = F.interpolate(planes, size=size, mode="bicubic", antialias=True)
        return wide.round().clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()

    return {
        "this project (exact MATLAB)": lambda: upscale_image(image, size=size),
        "Pillow": lambda: np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)),
        "OpenCV (not antialiased)": lambda: cv2.resize(image, size, interpolation=cv2.INTER_CUBIC),
        "torch interpolate": by_torch,
    }


def resizing(rounds: int = 41) -> dict[str, dict[str, Timing]]:
    """Time both directions."""
    large = dead_leaves((512, 512), np.random.default_rng(0))
    return {
        "512² to 128²": in_turns(resizers(large, 128), rounds, CPU, warm_up=5),
        "128² to 512²": in_turns(resizers(large[:128, :128].copy(), 512), rounds, CPU, warm_up=5),
    }


def crops_per_second(rounds: int = 5) -> dict[str, Timing]:
    """Time an epoch of crops from large PNGs, cached and decoded each time."""
    with tempfile.TemporaryDirectory() as folder:
        for index in range(PHOTOS):
            tile = dead_leaves((226, 340), np.random.default_rng(index))
            write_image(Path(folder) / f"{index}.png", np.tile(tile, (6, 6, 1)))
        cached = ImageDataset(folder, 256, 4, reader=CachedReader(Path(folder) / "cache", CACHE_BYTES))
        decoding = ImageDataset(folder, 256, 4, reader=read_rgb)
        epochs = itertools.count()

        def epoch(dataset: ImageDataset) -> None:
            number = next(epochs)
            for index in range(len(dataset)):
                dataset.crop((number, index))

        works = {"cached": lambda: epoch(cached), "decoded each time": lambda: epoch(decoding)}
        return in_turns(works, rounds, CPU)
