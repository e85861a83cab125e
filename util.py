"""Network blocks shared by the models, and the dataset that turns a folder of photos into training samples.

Shape legend: B batch, C channels, H x W pixels of the high resolution, h x w of the low one, N tokens,
D embedding width, T number of diffusion timesteps.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from bicubic import upscale_image
from degradation import Bicubic, Degradation
from imaging.files import UnreadableImageError, list_images, read_rgb, to_model_range
from imaging.sizes import image_sizes

logger = logging.getLogger(__name__)

Norm = Literal["group", "pixel"]

# --------------------------------------------------------------------------------------------------
# Network blocks
# --------------------------------------------------------------------------------------------------


class SinusoidalPositionEmbeddings(nn.Module):
    """Sines and cosines of t at geometrically spaced frequencies (Vaswani et al. 2017, section 3.5).

    Args:
        dim: width D of the embedding, an even number of at least 4.
        max_period: the longest wavelength, in timesteps, divided by 2 pi.
    """

    frequencies: Tensor

    def __init__(self, dim: int, max_period: float = 10_000.0) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"the embedding width must be an even number of at least 4, not {dim}")
        exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2 - 1)
        frequencies = torch.exp(-math.log(max_period) * exponents).float()
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) timesteps, integer or float -> (B, D) in [-1, 1], float32: sines, then cosines."""
        angles = t.float()[:, None] * self.frequencies[None, :]  # (B, D / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PixelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel (Ba et al. 2016, Eq. 3), for (B, C, H, W).

    No statistic reaches beyond its pixel, so a window of an image is normalised exactly as the whole image
    is, and a network trained on crops sees the same statistics on a photo (Chu et al. 2022 describe what
    group or instance normalisation loses there).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape, zero mean and unit variance over C before the affine map."""
        last = x.permute(0, 2, 3, 1)  # (B, H, W, C): no copy when x is channels-last
        return F.layer_norm(last, self.weight.shape, self.weight, self.bias).permute(0, 3, 1, 2)


def normalisation(norm: Norm, channels: int, groups: int = 8) -> nn.Module:
    """GroupNorm (Wu & He 2018) in at most `groups` groups that divide the channels, or PixelNorm."""
    if norm == "pixel":
        return PixelNorm(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(groups, channels), channels)
    raise ValueError(f"norm must be 'group' or 'pixel', not {norm!r}")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with normalisation and SiLU, added to the input (He et al. 2016).

    The time embedding, if there is one, scales and shifts the second normalisation (Dhariwal & Nichol 2021,
    section 3: adaptive group normalisation). The last convolution starts at zero: the block starts as the
    identity (or as its 1x1 projection where the widths differ).

    Args:
        in_channels, out_channels: widths before and after.
        time_dim: width of the time embedding, or None for a block without one.
        norm: "group" (GroupNorm) or "pixel" (see PixelNorm).
        groups: the most groups GroupNorm may use.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int | None = None,
        *,
        norm: Norm = "group",
        groups: int = 8,
    ) -> None:
        super().__init__()
        self.norm1 = normalisation(norm, in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalisation(norm, out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.modulation = None if time_dim is None else nn.Linear(time_dim, 2 * out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(_bias(self.conv2))

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """(B, C_in, H, W), (B, time_dim) or None -> (B, C_out, H, W)."""
        if (time_embedding is None) != (self.modulation is None):
            expected = "needs a" if self.modulation is not None else "was built without a"
            raise ValueError(f"this ResidualBlock {expected} time embedding; see its time_dim")
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.norm2(hidden)
        if self.modulation is not None and time_embedding is not None:
            modulation = self.modulation(F.silu(time_embedding))[:, :, None, None]
            scale, shift = modulation.chunk(2, dim=1)  # each (B, C_out, 1, 1)
            hidden = torch.addcmul(shift, hidden, 1 + scale)
        output: Tensor = self.shortcut(x) + self.conv2(F.silu(hidden))
        return output


class MultiHeadAttentionBlock(nn.Module):
    """Pre-normalised multi-head self-attention over all pixels, added to the input (Vaswani et al. 2017).

    Args:
        channels: width C, a multiple of num_heads.
        num_heads: number of heads.
        norm, groups: as in ResidualBlock.
    """

    def __init__(self, channels: int, num_heads: int = 4, *, norm: Norm = "group", groups: int = 8) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"{channels} channels do not split into {num_heads} heads")
        self.num_heads = num_heads
        self.norm = normalisation(norm, channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(_bias(self.out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        batch, channels, height, width = x.shape
        heads = (batch, 3, self.num_heads, channels // self.num_heads, height * width)
        query, key, value = self.qkv(self.norm(x)).reshape(heads).transpose(-1, -2).unbind(1)
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, heads, H W, C / heads)
        output: Tensor = x + self.out(attended.transpose(-1, -2).reshape(x.shape))
        return output


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


# --------------------------------------------------------------------------------------------------
# Dataset
# --------------------------------------------------------------------------------------------------

UpscaleFunction = Callable[[Tensor, float], Tensor]
Augmentation = Literal["none", "flip", "dihedral"]


class Sample(NamedTuple):
    """What the network trains on; every image in [-1, 1], their difference in [-2, 2].

    Attributes:
        low_res: (..., 3, h, w).
        upscaled: (..., 3, H, W), low_res through the upscale function, clipped to [-1, 1].
        original: (..., 3, H, W).
        residual: (..., 3, H, W), original - upscaled.
    """

    low_res: Tensor
    upscaled: Tensor
    original: Tensor
    residual: Tensor


def degrade(
    high_res: Tensor, degradation: Degradation, upscale_function: UpscaleFunction = upscale_image
) -> Sample:
    """Make the low-resolution image and everything derived from it.

    Args:
        high_res: (..., 3, H, W) uint8; H and W whole multiples of the degradation's scale.
        degradation: makes the low resolution.
        upscale_function: maps (..., 3, h, w) float in [-1, 1] and the scale to (..., 3, H, W).
    """
    low_res = to_model_range(degradation(high_res).float() / 255)
    original = to_model_range(high_res.float() / 255)
    upscaled = upscale_function(low_res, degradation.scale).clamp(-1, 1)
    if upscaled.shape != original.shape:
        raise ValueError(
            f"the upscale function gave {tuple(upscaled.shape)} for an original of {tuple(original.shape)}: "
            f"the sides must be whole multiples of the scale {degradation.scale:g}"
        )
    return Sample(low_res, upscaled, original, original - upscaled)


def check_crop_size(img_size: int, downscale_factor: float) -> None:
    """ValueError unless a crop of img_size pixels becomes a whole number of low-resolution pixels."""
    low_size = img_size / downscale_factor
    if img_size < 8 or not math.isclose(low_size, round(low_size), abs_tol=1e-6):
        raise ValueError(
            f"img_size must be at least 8 and a whole multiple of the downscale factor "
            f"{downscale_factor:g}, not {img_size}"
        )


class ImageDataset(Dataset[Sample]):
    """A folder of photos as (low_res, upscaled, original, residual) samples, each image in [-1, 1].

    `dataset[index]` is epoch 0; `dataset[epoch, index]` is the same photo with that epoch's crop and flip.
    A sample is a pure function of (seed, epoch, index): it is the same in any worker and any order.

    An image that is smaller than the crop or cannot be read is named in a warning and in `left_out`. One that
    turns unreadable later is replaced by the next one and marked in `failed`, which workers share.

    Args:
        images: a folder, searched with its subfolders, or the files themselves.
        img_size: side of the square crop, a whole multiple of downscale_factor.
        downscale_factor: HR size over LR size.
        upscale_function: maps (..., 3, h, w) in [-1, 1] and the factor to (..., 3, H, W). A checkpoint can
            only record bicubic, the default: DiffusionModel.train refuses others.
        train: a random crop and augmentation; False: the central crop.
        augment: "none", "flip" (left-right) or "dihedral" (all 8 flips and rotations).
        seed: of crops and flips.
        reader: path -> (H, W, 3) uint8, for instance a cache around `images.read_rgb`.
        cache_dir: folder to remember the sizes of the images in, see imaging.sizes.
        degradation: makes the low resolution; by default bicubic by downscale_factor.

    Raises:
        ValueError: a missing or empty folder, a crop that is no multiple of the factor, or no usable image.
    """

    def __init__(
        self,
        images: str | Path | Sequence[Path],
        img_size: int = 256,
        downscale_factor: float = 4.0,
        upscale_function: UpscaleFunction = upscale_image,
        *,
        train: bool = True,
        augment: Augmentation = "flip",
        seed: int = 0,
        reader: Callable[[Path], npt.NDArray[np.uint8]] = read_rgb,
        cache_dir: Path | None = None,
        degradation: Degradation | None = None,
    ) -> None:
        self.degradation = degradation or Bicubic(scale=downscale_factor)
        downscale_factor = self.degradation.scale
        check_crop_size(img_size, downscale_factor)
        if augment not in ("none", "flip", "dihedral"):
            raise ValueError(f"augment must be 'none', 'flip' or 'dihedral', not {augment!r}")
        self.img_size = img_size
        self.downscale_factor = downscale_factor
        self.upscale_function = upscale_function
        self.train = train
        self.augment = augment
        self.seed = seed
        self.reader = reader
        found = list_images(images) if isinstance(images, str | Path) else list(images)
        self.paths, self.left_out = _usable(found, img_size, cache_dir)
        if not self.paths:
            where = images if isinstance(images, str | Path) else f"{len(found)} files"
            raise ValueError(
                f"no usable image in {where} ({_first_reason(self.left_out)}): "
                f"give images of at least {img_size}x{img_size} or a smaller img_size"
            )
        self.failed = torch.zeros(len(self.paths), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        """Number of usable images: one crop of each is an epoch."""
        return len(self.paths)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        """The sample of an index (epoch 0) or of (epoch, index); see the class."""
        return degrade(self.crop(index), self.degradation, self.upscale_function)

    def crop(self, index: int | tuple[int, int]) -> Tensor:
        """The high-resolution crop alone, (3, img_size, img_size) uint8, before any degradation."""
        epoch, position = index if isinstance(index, tuple) else (0, index)
        if not 0 <= position < len(self.paths):
            raise IndexError(f"index {position} of {len(self.paths)} images")
        random = np.random.default_rng((self.seed, epoch, position))
        pixels = self._read(position)
        top, left = self._corner(pixels.shape[0], pixels.shape[1], random)
        window = pixels[top : top + self.img_size, left : left + self.img_size]
        if self.train:
            window = _augmented(window, self.augment, random)
        return torch.from_numpy(np.ascontiguousarray(window.transpose(2, 0, 1)))

    def _corner(self, height: int, width: int, random: np.random.Generator) -> tuple[int, int]:
        spare_y, spare_x = height - self.img_size, width - self.img_size
        if self.train:
            return int(random.integers(spare_y + 1)), int(random.integers(spare_x + 1))
        return spare_y // 2, spare_x // 2

    def _read(self, position: int) -> npt.NDArray[np.uint8]:
        """The pixels of the image at position, or of the next one that can still be read."""
        for offset in range(len(self.paths)):
            candidate = (position + offset) % len(self.paths)
            if self.failed[candidate]:
                continue
            try:
                pixels = self.reader(self.paths[candidate])
                if min(pixels.shape[:2]) < self.img_size:
                    raise UnreadableImageError(f"{self.paths[candidate]}: shrank to {pixels.shape[:2]}")
                return pixels
            except (UnreadableImageError, OSError) as error:
                self.failed[candidate] = True
                logger.warning("left out from now on: %s", error)
        raise RuntimeError(f"none of the {len(self.paths)} images can be read any more")


class CropDataset(Dataset[Tensor]):
    """The uint8 crops of an ImageDataset: what workers send, so that resizing runs batched on the device."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | tuple[int, int]) -> Tensor:
        """(3, img_size, img_size) uint8."""
        return self.images.crop(index)

    def name(self, index: int) -> str:
        """The path of the image."""
        return str(self.images.paths[index])

    def failures(self) -> int:
        """How many images turned unreadable since the start."""
        return int(self.images.failed.sum())


def _usable(
    paths: Sequence[Path], img_size: int, cache_dir: Path | None
) -> tuple[list[Path], dict[Path, str]]:
    """Split into images at least img_size on both sides, by their headers, and the others with the reason."""
    usable: list[Path] = []
    left_out: dict[Path, str] = {}
    for path, size in zip(paths, image_sizes(paths, cache_dir), strict=True):
        if isinstance(size, UnreadableImageError):
            left_out[path] = str(size)
        elif min(size) < img_size:
            left_out[path] = f"{size[1]}x{size[0]} is smaller than the crop of {img_size}"
        else:
            usable.append(path)
    for path, reason in left_out.items():
        logger.warning("left out: %s (%s)", path, reason)
    return usable, left_out


def _first_reason(left_out: dict[Path, str]) -> str:
    """The first file that was left out, and why."""
    if not left_out:
        return "no file was given"
    path, reason = next(iter(left_out.items()))
    return f"{len(left_out)} left out, the first: {path}, {reason}"


def _augmented(
    window: npt.NDArray[np.uint8], augment: Augmentation, random: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """(S, S, 3) -> the same, flipped or turned at random."""
    if augment == "none":
        return window
    if random.integers(2):
        window = window[:, ::-1]
    if augment == "dihedral":
        window = np.rot90(window, int(random.integers(4)))
    return window
