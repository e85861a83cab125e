"""Restoring files into files: one image with all that is written for it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from bicubic import upscale_image
from imaging.atomic import write_atomically
from imaging.files import DecodedImage, Pixels, check_format, decode_image, read_rgb, write_image
from imaging.metadata import Metadata
from imaging.pictures import comparison_picture
from restoration.restorer import Progress, Restoration, Restorer


@dataclass(frozen=True)
class Task:
    """One image to restore.

    Attributes:
        source: the file to read.
        target: the file for the result.
        comparison: the file for a picture of input, bicubic, result and original, or None.
        truth: the file of the original, or None.
        uncertainty: where the standard deviation goes, as .png and .npy, or None.
    """

    source: Path
    target: Path
    comparison: Path | None = None
    truth: Path | None = None
    uncertainty: Path | None = None

    @property
    def targets(self) -> list[Path]:
        """Every file that is written, the result last."""
        maps = [] if self.uncertainty is None else [with_ending(self.uncertainty, one) for one in MAP_ENDINGS]
        return [*([] if self.comparison is None else [self.comparison]), *maps, self.target]


MAP_ENDINGS = (".png", ".npy")


def with_ending(path: Path, ending: str) -> Path:
    """A suffix behind a name that may have dots of its own."""
    return path.with_name(path.name + ending)


def restore_file(
    task: Task,
    restorer: Restorer,
    progress: Progress,
    *,
    strip: bool = False,
    background: tuple[int, ...] | None = None,
) -> str:
    """Restore one file and write what belongs to it; returns what is to be said about it, if anything.

    Args:
        task: what goes where.
        restorer: of uncertain images, with at least two samples.
        progress: called with the finished part of the work.
        strip: leave out what the file says besides its pixels.
        background: red, green and blue in [0, 255] to put a transparent image on.

    Raises:
        ValueError: a file that cannot be read, or a format that cannot hold the result: before the work.
        OSError: it could not be written.
    """
    source = decode_image(task.source)
    if strip:
        source = replace(source, metadata=Metadata())
    if background is not None and source.alpha is not None:
        source = on_background(source, background)
    height, width = restorer.scale.high_size(*source.pixels.shape[:2])
    has_alpha, dtype = source.alpha is not None, source.pixels.dtype
    check_format(task.target, height, width, dtype, has_alpha=has_alpha, metadata=source.metadata)
    truth = None if task.truth is None else read_rgb(task.truth)
    restoration = restorer.restore(source, deviation=task.uncertainty is not None, progress=progress)
    write_results(task, source, restoration, float(restorer.scale), truth)
    return f"first of {source.frames} frames" if source.frames > 1 else ""


def on_background(image: DecodedImage, colour: tuple[int, ...]) -> DecodedImage:
    """An image without transparency: over red, green and blue in [0, 255]; grey stays grey over a grey."""
    assert image.alpha is not None
    largest = int(np.iinfo(image.pixels.dtype).max)
    height, width = image.alpha.shape
    grey = image.pixels.ndim == 2 and len(set(colour)) == 1
    alpha = image.alpha.reshape(height, width, 1) / largest
    behind = np.array(colour[:1] if grey else colour) * (largest / 255)
    mixed = alpha * image.pixels.reshape(height, width, -1) + (1 - alpha) * behind + 0.5  # rounds half up
    pixels: Pixels = mixed.astype(np.uint8) if largest == 255 else mixed.astype(np.uint16)
    return replace(image, pixels=pixels[..., 0] if grey else pixels, alpha=None)


def write_results(
    task: Task, source: DecodedImage, restoration: Restoration, scale: float, truth: Pixels | None
) -> None:
    """Write the side results, then the restored image: where that exists, all of them do."""
    for target in task.targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    if task.comparison is not None:
        bicubic = cast(Pixels, upscale_image(source.pixels, scale))
        write_image(task.comparison, comparison_picture(source.pixels, bicubic, restoration.pixels, truth))
    if task.uncertainty is not None and restoration.deviation is not None:
        write_uncertainty(task.uncertainty, restoration.deviation)
    restoration.save(task.target)


def write_uncertainty(path: Path, deviation: npt.NDArray[np.float32]) -> None:
    """Write path.npy, and path.png in which white is the largest deviation."""
    largest = max(float(deviation.max()), 1e-9)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            np.save(stream, deviation)

    picture, array = (with_ending(path, ending) for ending in MAP_ENDINGS)
    write_atomically(array, save)
    write_image(picture, np.round(deviation / largest * 255).astype(np.uint8))
