"""Bicubic resize that reproduces MATLAB's ``imresize`` to the last digit, at any scale.

Shapes: H height, W width, C channels; ... any leading dimensions. Floats are never clamped, and overshoot.

Output pixel i sums the input around (i + 1/2) / scale - 1/2, weighted by Keys' kernel ("Cubic convolution
interpolation for digital image processing", 1981) with a = -1/2, widened by 1 / scale to shrink.
"""

import math
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imaging.files import read_rgb

Border: TypeAlias = Literal["mirror", "replicate"]
Rounding: TypeAlias = Literal["none", "uint8"]
ImageT = TypeVar("ImageT", bound=npt.NDArray[Any] | Tensor)
_Block: TypeAlias = tuple[slice, Tensor]  # the inputs of some outputs; their weights (outputs, inputs)

# Each direction is a product with a banded matrix, cut into dense blocks: fast, and its memory grows with the
# length of a line, not the square. Fewer output pixels per block waste time on calls, more on zeros of the
# band. torch's antialiased bicubic of a padded image needs a rational scale, and twice the time.
_BLOCK = 32
WITHOUT_FLOAT64 = {"mps"}  # devices whose images are resized on the CPU
_LARGEST = {torch.uint8: 255, torch.uint16: 65535}


def resize(
    image: Tensor,
    *,
    scale: float | None = None,
    size: tuple[int, int] | None = None,
    border: Border = "mirror",
    rounding: Rounding = "none",
) -> Tensor:
    """Resize (..., H, W) of floats, uint8 or uint16; differentiable for floats. ValueError for all else.

    Args:
        scale: output over input size; gives ceil(scale * size) pixels.
        size: the exact output (height, width) instead; each direction then has its own scale.
        border: outside, the image is reflected with its edge pixel ("mirror", MATLAB today) or the edge pixel
            goes on ("replicate", older MATLAB and data sets made with it).
        rounding: integers are rounded half up and clamped once, at the end ("none"), or uint8 ones after each
            direction as MATLAB does ("uint8").
    """
    _check(image, border, rounding)
    largest = _LARGEST.get(image.dtype)
    source = image.cpu() if image.device.type in WITHOUT_FLOAT64 else image
    # float64 keeps autocast and TF32 out. Channels-last would slow both products down.
    work = source.to(torch.float64, memory_format=torch.contiguous_format)
    sizes = _output_sizes(work.shape[-2:], scale, size)
    first, second = (0, 1) if sizes[0][1] <= sizes[1][1] else (1, 0)  # the smaller scale, or else the height
    work = _resize_axis(work, first, *sizes[first], border)
    if rounding == "uint8":
        work.add_(0.5).clamp_(0, 255).floor_()
    work = _resize_axis(work, second, *sizes[second], border)
    if largest is not None:
        work.add_(0.5).clamp_(0, largest)  # the cast drops the fractions
    return work.to(image.device, image.dtype)


def upscale_image(image: str | Path | ImageT, scale_factor: float = 4.0) -> ImageT:
    """Enlarge a file, read as RGB uint8, an array (H, W) or (H, W, 1, 3 or 4), or a tensor (..., H, W).

    An array stays an array of its dtype, and a tensor a tensor; alpha is resized like colour. ValueError as
    `resize`, UnreadableImageError for a file, TypeError for anything else.
    """
    pixels = read_rgb(image) if isinstance(image, str | Path) else image
    if isinstance(pixels, Tensor):
        return cast(ImageT, resize(pixels, scale=scale_factor))
    if not isinstance(pixels, np.ndarray):
        raise TypeError(f"an image of type {type(image).__name__}: expected a path, an array or a tensor")
    if pixels.ndim not in {2, 3} or (pixels.ndim == 3 and pixels.shape[2] not in {1, 3, 4}):
        raise ValueError(f"an array of shape {pixels.shape}: expected (H, W) or (H, W, 1, 3 or 4)")
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # (C, H, W)
    # The copy brings read-only memory, other byte orders and negative strides into what torch can take.
    dtype = np.float64 if pixels.dtype.kind == "f" else pixels.dtype.newbyteorder("=")
    tensor = resize(torch.from_numpy(planes.astype(dtype, order="C")), scale=scale_factor)
    resized = tensor.numpy().astype(pixels.dtype, copy=False)
    return cast(ImageT, resized[0] if pixels.ndim == 2 else np.stack(list(resized), axis=-1))


def downscale_image(image: str | Path | ImageT, scale_factor: float = 4.0) -> ImageT:
    """Shrink an image to ceil(size / scale_factor), as `upscale_image` enlarges it.

    To compare with published low-resolution files, crop to a multiple of the factor first, and `resize` with
    their border and rounding.
    """
    if not (math.isfinite(scale_factor) and scale_factor > 0):
        raise ValueError(f"scale_factor={scale_factor}: give a positive number, such as 4")
    return upscale_image(image, 1 / scale_factor)


def exact_scale(factor: float) -> Fraction:
    """Find the fraction that a number stands for: 12/5 for 2.4, and for single precision's 2.4000001."""
    nearby = Fraction(factor).limit_denominator(1000)
    return nearby if abs(nearby - Fraction(factor)) < 1e-6 * factor else Fraction(factor)


def _check(image: Tensor, border: Border, rounding: Rounding) -> None:
    if image.ndim < 2 or image.numel() == 0:
        raise ValueError(f"an image of shape {tuple(image.shape)}: expected (..., H, W), at least one pixel")
    if not (image.dtype.is_floating_point or image.dtype in _LARGEST):
        raise ValueError(f"an image of {image.dtype}: expected floats, uint8 or uint16; convert it first")
    for name, value, allowed in (("border", border, Border), ("rounding", rounding, Rounding)):
        if value not in get_args(allowed):
            raise ValueError(f"{name}={value!r}: use one of {', '.join(map(repr, get_args(allowed)))}")
    if rounding == "uint8" and image.dtype != torch.uint8:
        raise ValueError(f"rounding='uint8' with {image.dtype}: convert the image to uint8, or use 'none'")


def _output_sizes(
    in_size: tuple[int, ...], scale: float | None, size: tuple[int, int] | None
) -> list[tuple[int, float]]:
    if (scale is None) == (size is None):
        raise ValueError(f"scale={scale} and size={size}: give one of them")
    if size is not None:
        if len(size) != 2 or not all(float(n).is_integer() and n >= 1 for n in size):
            raise ValueError(f"size={size}: give a height and a width in whole pixels, each at least 1")
        return [(int(out), out / length) for out, length in zip(size, in_size, strict=True)]
    assert scale is not None
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale}: give a positive number, such as 4 or 0.25")
    # 1.1 * 100 is a little more than 110 in floating point, and means 110 pixels, not 111.
    return [(math.ceil(scale * length * (1 - 1e-12)), float(scale)) for length in in_size]


def _resize_axis(image: Tensor, axis: int, length: int, scale: float, border: Border) -> Tensor:
    """Resize the height, axis 0, or the width, axis 1, of (..., H, W)."""
    blocks = _axis_blocks(image.shape[axis - 2], length, scale, border, image.device)
    if axis == 0:
        return torch.cat([weights @ image[..., inputs, :] for inputs, weights in blocks], dim=-2)
    return torch.cat([image[..., inputs] @ weights.T for inputs, weights in blocks], dim=-1)


@lru_cache(maxsize=256)  # a data loader asks for the same few sizes again and again
def _axis_blocks(
    in_size: int, out_size: int, scale: float, border: Border, device: torch.device
) -> tuple[_Block, ...]:
    """Compute the weights of one direction; those of every output pixel sum to 1."""
    stretch = min(scale, 1.0)
    reach = 2 / stretch
    center = (np.arange(out_size) + 0.5) / scale - 0.5
    first = np.floor(center - reach).astype(np.int64)
    taps = first[:, None] + np.arange(math.ceil(2 * reach) + 2)  # (out, taps), may lie outside the image
    weights = _cubic((center[:, None] - taps) * stretch)
    weights /= weights.sum(axis=1, keepdims=True)
    if border == "mirror":  # with period 2 * in_size, so that tiny images reflect more than once
        taps = taps % (2 * in_size)
        taps = np.minimum(taps, 2 * in_size - 1 - taps)
    else:
        taps = taps.clip(0, in_size - 1)
    blocks = [slice(start, start + _BLOCK) for start in range(0, out_size, _BLOCK)]
    # Cached tensors made inside inference_mode could never take part in training later.
    with torch.inference_mode(False):
        return tuple(_dense_block(taps[block], weights[block], device) for block in blocks)


def _dense_block(
    taps: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], device: torch.device
) -> _Block:
    """Turn positions and weights (outputs, taps) into one matrix over the inputs that they touch."""
    outputs, used = np.nonzero(weights)
    inputs = taps[outputs, used]
    start, stop = int(inputs.min()), int(inputs.max()) + 1
    dense = np.zeros((len(taps), stop - start))
    np.add.at(dense, (outputs, inputs - start), weights[outputs, used])  # a border pixel may be touched twice
    return slice(start, stop), torch.from_numpy(dense).to(device)


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
