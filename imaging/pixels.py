"""Converts value ranges: files hold uint8 or uint16, metrics [0, 1], the model [-1, 1]."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

Pixels: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


def to_model_range(unit: Tensor) -> Tensor:
    """Map [0, 1] to [-1, 1]."""
    return unit * 2 - 1


def to_unit_range(model: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1]."""
    return (model + 1) / 2


def from_uint8(pixels: Tensor) -> Tensor:
    """Convert uint8 of any shape to float32 in [0, 1]."""
    return pixels.float() / 255


def to_uint8(unit: Tensor) -> Tensor:
    """Round [0, 1] of any shape to uint8, as an 8-bit file holds it; halves go up, as in MATLAB."""
    return _levels(unit, 255).to(torch.uint8)


def _levels(unit: Tensor, largest: int) -> Tensor:
    # float64: at 65535 a float32 has too few bits left to round half up.
    return (unit.detach().cpu().double() * largest + 0.5).floor().clamp(0, largest)


def pixels_to_unit(pixels: Pixels) -> Tensor:
    """Convert (H, W) or (H, W, C), uint8 or uint16, to float32 (C, H, W) in [0, 1]."""
    unit = np.atleast_3d(pixels).transpose(2, 0, 1).astype(np.float32, order="C")
    unit /= np.iinfo(pixels.dtype).max
    return torch.from_numpy(unit)


def unit_to_pixels(image: Tensor, dtype: npt.DTypeLike = np.uint8) -> Pixels:
    """Clamp and round (1 or 3, H, W) in [0, 1] to (H, W[, 3]); ValueError for NaN."""
    if image.ndim != 3 or image.shape[0] not in {1, 3}:
        raise ValueError(f"an image of shape {tuple(image.shape)}: expected (1, H, W) or (3, H, W)")
    if bool(image.isnan().any()):
        raise ValueError("an image that holds NaN cannot become pixels; find where the NaN was made")
    planes = _levels(image, int(np.iinfo(dtype).max)).numpy().astype(dtype)  # (C, H, W)
    return planes[0] if len(planes) == 1 else np.stack(list(planes), axis=-1)


def as_rgb8(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """Convert (H, W) or (H, W, 3), uint8 or uint16, to (H, W, 3) of 8 bits."""
    if pixels.dtype == np.uint16:
        # 257 is odd, so no value lies half-way and adding 128 rounds exactly.
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.stack([pixels] * 3, axis=-1) if pixels.ndim == 2 else pixels.astype(np.uint8, copy=False)


def spread_colours(pixels: Pixels, alpha: Pixels) -> Pixels:
    """Give every pixel (H, W[, C]) with alpha 0 the colour of the nearest other one."""
    # What lies hidden there would bleed into the edges of what is seen when the picture is resized.
    hidden = alpha == 0
    if hidden.all() or not hidden.any():
        return pixels
    rows, columns = distance_transform_edt(hidden, return_distances=False, return_indices=True)
    spread: Pixels = pixels[rows, columns]
    return spread
