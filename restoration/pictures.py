"""Converts whatever holds a picture (h, w) to network input, and results (H, W) back."""

import io
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from imaging.files import DecodedImage, decode_image
from imaging.metadata import DAMAGE_ERRORS, Metadata
from imaging.pixels import Pixels, pixels_to_unit, to_model_range, unit_to_pixels
from restoration.fields import in_bands, row_bands

logger = logging.getLogger(__name__)
Restorable: TypeAlias = str | Path | Pixels | Tensor | Image.Image | DecodedImage

ACCEPTED = (
    "give the path of a file, a PIL image, an array (h, w) or (h, w, 1, 3 or 4) of uint8 or uint16, or a "
    "tensor (1, 3 or 4, h, w) of uint8 or of floats in [0, 1]"
)


@dataclass(frozen=True)
class Picture:
    """A picture as the network takes it, and what its result has to be."""

    low_res: Tensor  # (3, h, w) in [-1, 1]; grey is repeated
    source: DecodedImage  # (h, w), (h, w, 1) or (h, w, 3)
    dtype: npt.DTypeLike  # of the result

    def to_pixels(self, restored: Tensor) -> Pixels:
        """Round (1, 3, H, W) in [0, 1] to what the input had; grey is the mean of the channels."""
        channels, (height, width) = self.source.pixels.shape[2:], restored.shape[-2:]
        pixels = np.empty((height, width, *channels), self.dtype)
        for band in row_bands(height, width):
            values = band.cut(restored)[0]  # (3, rows, W)
            values = values if channels == (3,) else values.mean(dim=0, keepdim=True)
            pixels[band.top : band.bottom] = unit_to_pixels(values, self.dtype).reshape(-1, width, *channels)
        return pixels


def to_picture(image: Restorable) -> Picture:
    """Convert what ACCEPTED lists; ValueError for anything else, or an unreadable file."""
    decoded = _decoded(image)
    floats = isinstance(image, Tensor) and image.is_floating_point()
    dtype = np.uint8 if floats else decoded.pixels.dtype
    low_res = to_model_range(pixels_to_unit(decoded.visible)).expand(3, -1, -1)
    return Picture(low_res, decoded, dtype)


def to_deviation(variance: Tensor) -> npt.NDArray[np.float32]:
    """(H, W) of variances (1, 3, H, W): the root of their mean over the channels."""
    deviation = torch.empty(variance.shape[-2:])
    in_bands(lambda _, band: band[0].mean(dim=0).sqrt(), deviation.device, deviation, variance)
    return deviation.numpy()


def _decoded(image: Restorable) -> DecodedImage:
    if isinstance(image, str | Path):
        return decode_image(image)
    if isinstance(image, DecodedImage):
        return image
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_pixels(image)
    raise ValueError(f"an image of type {type(image).__name__}: {ACCEPTED}")


def _from_pixels(pixels: Pixels) -> DecodedImage:
    channels, known = pixels.shape[2:], pixels.dtype in (np.uint8, np.uint16)
    if not known or not pixels.size or pixels.ndim < 2 or channels not in ((), (1,), (3,), (4,)):
        raise ValueError(f"an array of shape {pixels.shape} and {pixels.dtype}: {ACCEPTED}")
    return DecodedImage(*((pixels[..., :3], pixels[..., 3]) if channels == (4,) else (pixels, None)))


def _from_tensor(image: Tensor) -> DecodedImage:
    if image.ndim != 3 or len(image) not in (1, 3, 4) or not image.numel():
        raise ValueError(f"a tensor of shape {tuple(image.shape)}: {ACCEPTED}")
    values = image.detach().cpu()
    if not values.is_floating_point():
        planes: Pixels = values.numpy()
        return _from_pixels(planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0))
    if not (values.min() >= 0 and values.max() <= 1):  # also where one is not a number
        raise ValueError(f"a tensor of values from {values.min():g} to {values.max():g}: {ACCEPTED}")
    alpha = unit_to_pixels(values[3:]) if len(values) == 4 else None
    return DecodedImage(unit_to_pixels(values[:3], np.uint16), alpha)


def _from_pil(image: Image.Image) -> DecodedImage:
    """Turn it upright and convert CMYK through its profile; EXIF that is damaged is left out."""
    try:
        upright = ImageOps.exif_transpose(image)
        exif = upright.getexif().tobytes() if upright.getexif() else None
    except DAMAGE_ERRORS as error:
        logger.warning("the image's EXIF is damaged (%s): left out", error)
        upright, exif = image, None
    if upright.mode in ("I", "F"):
        raise ValueError(f"a PIL image of mode {upright.mode}: {ACCEPTED}")
    metadata = Metadata(upright.info.get("icc_profile"), exif)
    if upright.mode.startswith("I;16"):
        return DecodedImage(np.asarray(upright, np.uint16), None, metadata)
    if upright.mode == "CMYK" and metadata.icc_profile:
        with suppress(ImageCms.PyCMSError, OSError):
            profile = ImageCms.ImageCmsProfile(io.BytesIO(metadata.icc_profile))
            srgb = ImageCms.createProfile("sRGB")
            upright = ImageCms.profileToProfile(upright, profile, srgb, outputMode="RGB") or upright
        metadata = replace(metadata, icc_profile=None)
    mode = "L" if upright.mode in ("1", "L", "LA", "La") else "RGB"
    if not upright.has_transparency_data:
        return DecodedImage(np.asarray(upright.convert(mode)), None, metadata)
    both = upright.convert(f"{mode}A")
    return DecodedImage(np.asarray(both.convert(mode)), np.asarray(both.getchannel("A")), metadata)
