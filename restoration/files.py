"""One image file to restore, with all that is written for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from bicubic import upscale_image
from engine.device import is_out_of_memory
from engine.options import one_line
from imaging.atomic import write_atomically
from imaging.files import DecodedImage, check_format, decode_image, read_rgb, write_image
from imaging.metadata import Metadata
from imaging.panels import comparison_picture
from imaging.pixels import Pixels
from imaging.tokens import read_tokens
from restoration.restorer import Progress
from restoration.scales import Chain, restore_to

FILE_ERRORS = (ValueError, OSError, MemoryError, RuntimeError)  # what one picture may fail with


@dataclass(frozen=True)
class Task:
    """The files of one image."""

    source: Path
    target: Path
    comparison: Path | None = None  # for a picture of input, bicubic, result and original
    truth: Path | None = None  # the original, to be read
    maps: Sequence[Path] = ()  # for the standard deviation, as a picture and as an array
    tokens: Path | None = None  # the folder of those that describe it
    strip: bool = False  # whether the metadata is left out
    background: tuple[int, ...] | None = None  # to put it on: red, green and blue in [0, 255]


def restore_file(task: Task, chain: Chain, progress: Progress) -> str:
    """Restore one file, write what belongs to it, and return a remark for the user, or "".

    ValueError, before the work: an unreadable file or a format that cannot hold the result.
    """
    source = on_background(decode_image(task.source), task.background)
    if task.strip:
        source = replace(source, metadata=Metadata())
    scale, (height, width) = float(chain.scale), chain.scale.high_size(*source.pixels.shape[:2])
    check_format(task.target, height, width, source.pixels.dtype, has_alpha=source.alpha is not None)
    truth = None if task.truth is None else read_original(task.truth, height, width, scale)
    tokens = None if task.tokens is None else read_tokens(task.tokens, task.source)
    restored = restore_to(chain, source, deviation=bool(task.maps), progress=progress, tokens=tokens)
    if task.comparison is not None:
        bicubic = cast(Pixels, upscale_image(source.pixels, scale))
        write_image(task.comparison, comparison_picture(source.pixels, bicubic, restored.pixels, truth))
    if restored.deviation is not None:
        write_maps(restored.deviation, *task.maps)
    restored.save(task.target)
    return f"first of {source.frames} frames" if source.frames > 1 else ""


def read_original(path: Path, height: int, width: int, scale: float) -> Pixels:
    """Read what a result of height x width is compared with; ValueError unless it is about as large."""
    original = read_rgb(path)
    if any(abs(there - here) >= scale for there, here in zip(original.shape, (height, width), strict=False)):
        there = f"{original.shape[1]}x{original.shape[0]}"
        raise ValueError(f"{path} is {there}, but the result {width}x{height}: give originals of that size")
    return original


def on_background(image: DecodedImage, colour: tuple[int, ...] | None) -> DecodedImage:
    """Put what is transparent on red, green and blue in [0, 255], if any; grey stays grey over a grey."""
    if image.alpha is None or colour is None:
        return image
    largest = int(np.iinfo(image.pixels.dtype).max)
    height, width = image.alpha.shape
    grey = image.pixels.ndim == 2 and len(set(colour)) == 1
    alpha = image.alpha.reshape(height, width, 1) / largest
    behind = np.array(colour[:1] if grey else colour) * (largest / 255)
    mixed = alpha * image.pixels.reshape(height, width, -1) + (1 - alpha) * behind + 0.5  # rounds half up
    pixels: Pixels = mixed.astype(np.uint8) if largest == 255 else mixed.astype(np.uint16)
    return replace(image, pixels=pixels[..., 0] if grey else pixels, alpha=None)


def write_maps(deviation: npt.NDArray[np.float32], picture: Path, array: Path) -> None:
    """Write an uncertainty (H, W) as it is, and as a picture in which the largest value is white."""
    write_atomically(array, lambda stream: np.save(stream, deviation))
    white = max(float(deviation.max()), 1e-9)
    write_image(picture, np.round(deviation / white * 255).astype(np.uint8))


def describe_failure(error: BaseException, source: Path, target: Path) -> str:
    """Name the file and the reason; raise what neither file nor disk nor memory caused."""
    if isinstance(error, RuntimeError) and not is_out_of_memory(error):
        raise error
    line = one_line(error)
    if is_out_of_memory(error):
        return f"{source}: out of memory ({line}); close other programs or cut it into pieces"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{target}: {error.strerror}"
    return line if str(source) in line or str(target) in line else f"{source}: {line}"
