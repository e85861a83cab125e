"""Bicubic resize that reproduces MATLAB's ``imresize`` to the last digit, at any scale.

Shapes: H height, W width, C channels; ... any leading dimensions. Ranges: resizing is linear, so floating
values of any range pass through, unclamped (bicubic overshoots at edges); uint8 stays in [0, 255].

An output pixel i sits at the input coordinate u = (i + 1/2) / scale - 1/2 and is the sum of the input pixels
around u, weighted by the cubic kernel of R. G. Keys, "Cubic convolution interpolation for digital image
processing", 1981, with a = -1/2. When shrinking, the kernel is widened by 1 / scale, which removes the
frequencies that the smaller image cannot hold. The two directions follow one another: first the one with the
smaller scale, or the height where they are equal.

Each direction is a product with a banded matrix. The band is cut into blocks of output pixels, and each block
is a small dense matrix over the stretch of input that it reaches: matrix products at full speed, memory that
grows with the length of a line and not with its square, and gradients for free.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, TypeVar, cast, get_args, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imaging.files import Pixels, read_rgb

Border: TypeAlias = Literal["mirror", "replicate"]
Rounding: TypeAlias = Literal["none", "uint8"]
Floats: TypeAlias = npt.NDArray[np.float16] | npt.NDArray[np.float32] | npt.NDArray[np.float64]
Array: TypeAlias = Pixels | Floats
ArrayT = TypeVar("ArrayT", bound=Array)

# Output pixels per block: fewer waste time on calls, more on zeros of the band; 16 to 64 measured best.
_BLOCK = 32


class _Block(NamedTuple):
    """Weights (outputs, stop - start) that make some neighbouring output pixels from inputs start:stop."""

    start: int
    stop: int
    weights: Tensor


# ----------------------------------------------------------------------------------------------------- resize


def resize(
    image: Tensor,
    *,
    scale: float | None = None,
    size: tuple[int, int] | None = None,
    border: Border = "mirror",
    rounding: Rounding = "none",
) -> Tensor:
    """Resize a tensor (..., H, W) as MATLAB's ``imresize(image, scale or size, "bicubic")`` does.

    Differentiable with respect to a floating ``image``. The sums are made in float64 whatever the dtype:
    neither autocast nor TF32 can coarsen them.

    Args:
        image: floating values of any range, or uint8.
        scale: output size / input size, for both directions; the output has ceil(scale * size) pixels.
        size: the exact output (height, width) instead; each direction then has its own scale.
        border: what lies outside the image: "mirror" reflects it with its edge pixel repeated (MATLAB today),
            "replicate" repeats the edge pixel (older MATLAB, and data sets made with it).
        rounding: "uint8" rounds half up and clamps to [0, 255] after each direction, as MATLAB does to a
            uint8 image, and takes uint8 only. "none" does so to uint8 once, at the end.

    Returns:
        (..., out_H, out_W), of the dtype and on the device of ``image``.

    Raises:
        ValueError: both or neither of scale and size, or an image or option that is not as said here.
    """
    if image.ndim < 2:
        raise ValueError(f"an image of shape {tuple(image.shape)}: expected (..., H, W)")
    if not (image.dtype.is_floating_point or image.dtype == torch.uint8):
        raise ValueError(f"an image of {image.dtype}: expected a floating dtype or uint8; convert it first")
    _check_rounding(rounding, str(image.dtype))
    source = image.cpu() if image.device.type == "mps" else image  # MPS has no float64
    # Contiguous in the same copy: a channels-last image would slow both products down.
    work = source.to(torch.float64, memory_format=torch.contiguous_format)
    work = _resize_float64(work, scale, size, border, rounding)
    if image.dtype == torch.uint8:
        work = _shift_to_round(work, 255)
    return work.to(device=image.device, dtype=image.dtype)


def _resize_float64(
    work: Tensor,
    scale: float | None,
    size: tuple[int, int] | None,
    border: Border,
    rounding: Rounding,
) -> Tensor:
    """Resize a float64 tensor (..., H, W) into a new one; "uint8" rounds between the directions only."""
    _check_choice("border", border, get_args(Border))
    if work.numel() == 0:
        raise ValueError(f"an image of shape {tuple(work.shape)}: expected at least one pixel")
    height, width = work.shape[-2:]
    (out_height, scale_y), (out_width, scale_x) = _output_sizes((height, width), scale, size)
    rows = _axis_blocks(height, out_height, scale_y, border, work.device)
    columns = _axis_blocks(width, out_width, scale_x, border, work.device)
    passes: list[Callable[[Tensor], Tensor]] = [
        lambda tensor: _resize_rows(tensor, rows),
        lambda tensor: _resize_columns(tensor, columns),
    ]
    if scale_x < scale_y:
        passes.reverse()
    work = passes[0](work)
    if rounding == "uint8":
        work = _shift_to_round(work, 255).floor_()
    return passes[1](work)


def exact_scale(factor: float) -> Fraction:
    """The scale that a number stands for: 12/5 for 2.4, also where single precision made it 2.4000001."""
    nearby = Fraction(factor).limit_denominator(1000)
    return nearby if abs(nearby - Fraction(factor)) < 1e-6 * factor else Fraction(factor)


def _resize_rows(image: Tensor, blocks: tuple[_Block, ...]) -> Tensor:
    """Resize (..., H, W) to (..., out_H, W)."""
    return torch.cat([weights @ image[..., start:stop, :] for start, stop, weights in blocks], dim=-2)


def _resize_columns(image: Tensor, blocks: tuple[_Block, ...]) -> Tensor:
    """Resize (..., H, W) to (..., H, out_W)."""
    return torch.cat([image[..., start:stop] @ weights.T for start, stop, weights in blocks], dim=-1)


def _shift_to_round(values: Tensor, largest: int) -> Tensor:
    """Shift and clamp ``values`` to [0, largest] in place, so that dropping their fractions rounds half up.

    The drop is left to the cast to an integer dtype: one pass over the image less.
    """
    return values.add_(0.5).clamp_(0, largest)


def _output_sizes(
    in_size: tuple[int, int], scale: float | None, size: tuple[int, int] | None
) -> tuple[tuple[int, float], tuple[int, float]]:
    """Give (output length, scale) of the height and of the width."""
    if (scale is None) == (size is None):
        raise ValueError(f"scale={scale} and size={size}: give one of them")
    if size is not None:
        if len(size) != 2 or not all(float(n).is_integer() and n >= 1 for n in size):
            raise ValueError(f"size={size}: give a height and a width in whole pixels, each at least 1")
        height, width = (int(length) for length in size)
        return (height, height / in_size[0]), (width, width / in_size[1])
    assert scale is not None
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale}: give a positive number, such as 4 or 0.25")
    # 1.1 * 100 is a little more than 110 in floating point, and means 110 pixels, not 111.
    height, width = (math.ceil(scale * length * (1 - 1e-12)) for length in in_size)
    return (height, float(scale)), (width, float(scale))


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: use one of {', '.join(map(repr, allowed))}")


def _check_rounding(rounding: Rounding, dtype_name: str) -> None:
    """Refuse an unknown rounding, and that of uint8 for values which are not in [0, 255]."""
    _check_choice("rounding", rounding, get_args(Rounding))
    if rounding == "uint8" and not dtype_name.endswith("uint8"):
        raise ValueError(f"rounding='uint8' with {dtype_name}: convert the image to uint8, or use 'none'")


# ---------------------------------------------------------------------------------------------------- weights


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Evaluate the interpolation kernel of Keys (1981) with a = -1/2 at distances ``x``."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


@lru_cache(maxsize=256)
def _axis_blocks(
    in_size: int, out_size: int, scale: float, border: Border, device: torch.device
) -> tuple[_Block, ...]:
    """Make the float64 weights that take one direction from ``in_size`` to ``out_size`` pixels.

    Every output pixel's weights sum to 1. Cached: a data loader asks for the same few sizes again and again.
    """
    stretch = min(scale, 1.0)  # shrinking widens the kernel by 1 / scale
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
    # Cached tensors made inside inference_mode could never take part in training later.
    with torch.inference_mode(False):
        return tuple(
            _dense_block(taps[start : start + _BLOCK], weights[start : start + _BLOCK], device)
            for start in range(0, out_size, _BLOCK)
        )


def _dense_block(
    taps: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], device: torch.device
) -> _Block:
    """Gather (outputs, taps) positions and weights into one dense matrix over the inputs they touch."""
    used = taps[weights != 0]
    start, stop = int(used.min()), int(used.max()) + 1
    dense = np.zeros((len(taps), stop - start))
    outputs = np.broadcast_to(np.arange(len(taps))[:, None], taps.shape)[weights != 0]
    np.add.at(dense, (outputs, used - start), weights[weights != 0])  # a border pixel may be touched twice
    return _Block(start, stop, torch.from_numpy(dense).to(device))


# ---------------------------------------------------------------------------------- paths, arrays and tensors


@overload
def upscale_image(
    image: str | Path,
    scale_factor: float = ...,
    *,
    size: tuple[int, int] | None = ...,
    border: Border = ...,
    rounding: Rounding = ...,
) -> npt.NDArray[np.uint8]: ...
@overload
def upscale_image(
    image: ArrayT,
    scale_factor: float = ...,
    *,
    size: tuple[int, int] | None = ...,
    border: Border = ...,
    rounding: Rounding = ...,
) -> ArrayT: ...
@overload
def upscale_image(
    image: Tensor,
    scale_factor: float = ...,
    *,
    size: tuple[int, int] | None = ...,
    border: Border = ...,
    rounding: Rounding = ...,
) -> Tensor: ...
def upscale_image(
    image: str | Path | Array | Tensor,
    scale_factor: float = 4.0,
    *,
    size: tuple[int, int] | None = None,
    border: Border = "mirror",
    rounding: Rounding = "none",
) -> Array | Tensor:
    """Make an image ``scale_factor`` times as high and wide by MATLAB's bicubic (see ``resize``).

    It gives back what it was given: the kind, the channels, the dtype and the range.

    Args:
        image: the path of an image file, read as RGB (``files.read_rgb``); an array (H, W) or
            (H, W, 1, 3 or 4) of uint8, uint16 or floats; or a tensor (..., H, W), so also (C, H, W) and
            (B, C, H, W), of uint8 or floats. Floats may have any range and are neither rounded nor clamped.
            An alpha channel is resized like the others.
        scale_factor: any positive number; the output has ceil(scale_factor * size) pixels.
        size: the exact output (height, width); ``scale_factor`` is then not used.
        border: "mirror" or "replicate".
        rounding: "none" rounds integer pixels half up and clamps them once, at the end; "uint8" after each
            direction as MATLAB does, for uint8 pixels only.

    Returns:
        An (H, W, 3) uint8 array for a path, otherwise an array or tensor like the one given.

    Raises:
        ValueError: as ``resize``, and for an array of another shape or dtype.
        images.UnreadableImageError: for a file that cannot be read.
        TypeError: for anything that is not a path, an array or a tensor.
    """
    scale = None if size is not None else scale_factor
    return _resize_any(image, scale, size, border, rounding)


@overload
def downscale_image(
    image: str | Path,
    scale_factor: float = ...,
    *,
    size: tuple[int, int] | None = ...,
    border: Border = ...,
    rounding: Rounding = ...,
) -> npt.NDArray[np.uint8]: ...
@overload
def downscale_image(
    image: ArrayT,
    scale_factor: float = ...,
    *,
    size: tuple[int, int] | None = ...,
    border: Border = ...,
    rounding: Rounding = ...,
) -> ArrayT: ...
@overload
def downscale_image(
    image: Tensor,
    scale_factor: float = ...,
    *,
    size: tuple[int, int] | None = ...,
    border: Border = ...,
    rounding: Rounding = ...,
) -> Tensor: ...
def downscale_image(
    image: str | Path | Array | Tensor,
    scale_factor: float = 4.0,
    *,
    size: tuple[int, int] | None = None,
    border: Border = "mirror",
    rounding: Rounding = "none",
) -> Array | Tensor:
    """Make an image ``scale_factor`` times smaller (4 means to a quarter) by MATLAB's antialiased bicubic.

    Everything else is as in ``upscale_image``; the output has ceil(size / scale_factor) pixels. To compare
    with published low-resolution files, crop the image to a multiple of the factor first.
    """
    if size is None and not (math.isfinite(scale_factor) and scale_factor > 0):
        raise ValueError(f"scale_factor={scale_factor}: give a positive number, such as 4")
    scale = None if size is not None else 1 / scale_factor
    return _resize_any(image, scale, size, border, rounding)


def _resize_any(
    image: str | Path | Array | Tensor,
    scale: float | None,
    size: tuple[int, int] | None,
    border: Border,
    rounding: Rounding,
) -> Array | Tensor:
    """Resize a path, an array or a tensor."""
    if isinstance(image, str | Path):
        image = read_rgb(image)
    if isinstance(image, Tensor):
        return resize(image, scale=scale, size=size, border=border, rounding=rounding)
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"an image of type {type(image).__name__}: expected a path, a NumPy array or a tensor"
        )
    if image.ndim not in {2, 3} or (image.ndim == 3 and image.shape[2] not in {1, 3, 4}):
        raise ValueError(
            f"an array of shape {image.shape}: expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        )
    planes = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)  # (C, H, W)
    resized = _resize_planes(planes, scale, size, border, rounding)
    return resized[0] if image.ndim == 2 else np.stack(list(resized), axis=-1)


def _resize_planes(
    planes: Array,
    scale: float | None,
    size: tuple[int, int] | None,
    border: Border,
    rounding: Rounding,
) -> Array:
    """Resize an array (C, H, W) of uint8, uint16 or floats."""
    is_integer = planes.dtype.kind == "u" and planes.dtype.itemsize <= 2  # of either byte order
    if not is_integer and planes.dtype.kind != "f":
        raise ValueError(f"an array of {planes.dtype}: expected uint8, uint16 or floats; convert it first")
    _check_rounding(rounding, str(planes.dtype))
    # The copy also brings read-only memory, other byte orders and negative strides into what torch can take.
    work = torch.from_numpy(planes.astype(np.float64, order="C"))
    work = _resize_float64(work, scale, size, border, rounding)
    if is_integer:
        work = _shift_to_round(work, 255 if planes.dtype == np.uint8 else 65535)
    return cast(Array, work.numpy().astype(planes.dtype))
