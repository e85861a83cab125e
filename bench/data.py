"""Resizing, reading crops, and how long training waits for them."""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from bench.timing import Timing, in_turns
from bicubic import downscale_image, upscale_image
from diffusion import DiffusionModel
from examples.dead_leaves import dead_leaves
from imaging.cache import CachedReader
from imaging.files import read_rgb, write_image
from training import TrainingConfig
from util import ImageDataset

Pixels = npt.NDArray[np.uint8]
CPU = torch.device("cpu")
PHOTO = (1356, 2040)
PHOTOS = 6
CACHE_BYTES = 2**30


def resizers(image: Pixels, side: int) -> dict[str, Callable[[], object]]:
    """What makes (H, W, 3) uint8 into (side, side, 3) uint8 by a bicubic filter."""
    factor = side / len(image)

    def exact() -> Pixels:
        return upscale_image(image, factor) if factor > 1 else downscale_image(image, 1 / factor)

    def by_torch() -> Pixels:
        planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        resized = F.interpolate(planes, size=(side, side), mode="bicubic", antialias=True)
        whole: Pixels = resized.round().clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()
        return whole

    return {
        "this project (exact MATLAB)": exact,
        "Pillow": lambda: np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)),
        "OpenCV (not antialiased)": lambda: cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC),
        "torch interpolate": by_torch,
    }


def resizing(rounds: int = 41) -> dict[str, dict[str, Timing]]:
    """Times of both directions."""
    large = dead_leaves((512, 512), np.random.default_rng(0))
    small = downscale_image(large, 4)
    return {
        "512² to 128²": in_turns(resizers(large, 128), rounds, CPU, warm_up=5),
        "128² to 512²": in_turns(resizers(small, 512), rounds, CPU, warm_up=5),
    }


def crops_per_second(rounds: int = 5) -> dict[str, Timing]:
    """An epoch of crops from large PNGs, cached and decoded each time."""
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


def share_waiting_for_data(network: nn.Module, photos: Path, device: torch.device, steps: int = 60) -> float:
    """With two workers, start-up and first epoch left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    dataset = ImageDataset(photos, 64, 4, reader=CachedReader(photos.parent / "cache", CACHE_BYTES))
    first = -(-len(dataset) // 16)  # the steps in which images are decoded
    config = TrainingConfig(
        max_steps=first + steps,
        batch_size=16,
        num_workers=2,
        log_every=10,
        validate_every=first + steps,
        save_every=first + steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        log_dir = Path(folder) / "logs"
        DiffusionModel(device=device).train(
            network, dataset, config, checkpoint_dir=Path(folder), log_dir=log_dir
        )
        events = EventAccumulator(str(log_dir)).Reload().Scalars("train/share_waiting_for_data")
    return fmean(event.value for event in events if event.step > first + 10)
