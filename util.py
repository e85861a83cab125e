"""Network blocks, and the dataset of training samples.

Shapes: B batch, C channels, H x W pixels of the high resolution, h x w of the low one, D width.
"""

import ctypes
import logging
import math
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from bicubic import exact_scale, upscale_image
from degradation import Degradation
from imaging.files import UnreadableImageError, image_sizes, read_rgb
from imaging.kinds import list_images
from imaging.pixels import from_uint8, to_model_range
from imaging.tokens import check_tokens, read_tokens

logger = logging.getLogger(__name__)

Norm = Literal["group", "pixel"]
LayerT = TypeVar("LayerT", bound=nn.Module)


class SinusoidalPositionEmbeddings(nn.Module):
    """Embeds timesteps by waves of lengths 2 pi to 2 pi max_period (Vaswani et al. 2017, section 3.5)."""

    frequencies: Tensor

    def __init__(self, dim: int, max_period: float = 10_000.0) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"the embedding width must be an even number of at least 4, not {dim}")
        exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2 - 1)
        frequencies = torch.exp(-math.log(max_period) * exponents).float()
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) timesteps -> (B, D) float32 in [-1, 1]: sines, then cosines."""
        angles = t.float()[:, None] * self.frequencies[None, :]  # (B, D / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PixelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel (Ba et al. 2016, Eq. 3)."""

    # No statistic reaches beyond its pixel: windows are normalised exactly as the whole image is, and photos
    # as the crops of the training (Chu et al. 2022 describe what other normalisations lose there).

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        last = x.permute(0, 2, 3, 1)  # (B, H, W, C): no copy when x is channels-last
        return F.layer_norm(last, self.weight.shape, self.weight, self.bias).permute(0, 3, 1, 2)


def normalisation(norm: Norm, channels: int) -> nn.Module:
    """PixelNorm, or GroupNorm (Wu & He 2018) of at most 8 groups."""
    if norm == "pixel":
        return PixelNorm(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    raise ValueError(f"norm must be 'group' or 'pixel', not {norm!r}")


class ResidualBlock(nn.Module):
    """Adds two 3x3 convolutions with normalisation and SiLU, at first 0 (He et al. 2016).

    A time embedding scales and shifts the second normalisation (Dhariwal & Nichol 2021, section 3).
    """

    def __init__(
        self, in_channels: int, out_channels: int, time_dim: int | None = None, *, norm: Norm = "group"
    ) -> None:
        super().__init__()
        self.norm1 = normalisation(norm, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalisation(norm, out_channels)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.modulation = None if time_dim is None else nn.Linear(time_dim, 2 * out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """(B, C_in, H, W), (B, time_dim) or None -> (B, C_out, H, W)."""
        if (time_embedding is None) != (self.modulation is None):
            expected = "needs a" if self.modulation is not None else "was built without a"
            raise ValueError(f"this ResidualBlock {expected} time embedding; see its time_dim")
        hidden = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.modulation is not None and time_embedding is not None:
            modulation = self.modulation(F.silu(time_embedding))[:, :, None, None]
            scale, shift = modulation.chunk(2, dim=1)  # each (B, C_out, 1, 1)
            hidden = torch.addcmul(shift, hidden, 1 + scale)
        added: Tensor = self.shortcut(x) + self.conv2(F.silu(hidden))
        return added


class MultiHeadAttentionBlock(nn.Module):
    """Adds self-attention over all pixels, normalised before and at first 0 (Vaswani et al. 2017)."""

    def __init__(self, channels: int, num_heads: int = 4, *, norm: Norm = "group") -> None:
        super().__init__()
        self.norm = normalisation(norm, channels)
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        zeroed(self.attention.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        attended = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        added: Tensor = x + attended.transpose(1, 2).reshape(x.shape)
        return added


def zeroed(layer: LayerT) -> LayerT:
    """Set all weights of a layer to 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


UpscaleFunction = Callable[[Tensor, float], Tensor]
Augmentation = Literal["none", "flip", "dihedral"]


class Sample(NamedTuple):
    """An image or a batch in [-1, 1], as the network and the loss take it."""

    low_res: Tensor  # (..., 3, h, w)
    upscaled: Tensor  # (..., 3, H, W), clipped to [-1, 1]
    original: Tensor  # (..., 3, H, W)
    residual: Tensor  # (..., 3, H, W) in [-2, 2], original - upscaled


class Crops(NamedTuple):
    """A crop or a batch of crops in uint8, and the tokens of their images."""

    high_res: Tensor  # (..., 3, H, W)
    low_res: Tensor | None = None  # (..., 3, h, w); None where bicubic makes it of a whole batch, in `sample`
    tokens: Tensor | None = None  # (..., N, E)

    @classmethod
    def stack(cls, crops: Sequence["Crops"]) -> "Crops":
        parts = zip(*crops, strict=True)
        return cls(*cast(Any, [None if one[0] is None else torch.stack(one) for one in parts]))

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Crops":
        parts = [None if one is None else one.to(device, non_blocking=non_blocking) for one in self]
        return Crops(*cast(Any, parts))

    def sample(self, degradation: Degradation, upscale_function: UpscaleFunction = upscale_image) -> Sample:
        """Make what the loss compares, in full precision also where a training autocasts.

        The sides must be whole multiples of the scale.
        """
        with torch.autocast(self.high_res.device.type, enabled=False):
            low_res = degradation(self.high_res) if self.low_res is None else self.low_res
            low_res, original = (to_model_range(from_uint8(image)) for image in (low_res, self.high_res))
            upscaled = upscale_function(low_res, degradation.scale).clamp(-1, 1)
        return Sample(low_res, upscaled, original, original - upscaled)


class ImageDataset(Dataset[Sample]):
    """Photos as samples: `dataset[index]` is of epoch 0, `dataset[epoch, index]` of any epoch.

    A sample depends on (seed, epoch, index) alone. `left_out` has the images that cannot be used and why;
    `failed`, which workers share, marks those that turn unreadable later: the next takes their place.

    Args:
        images: a folder, searched with its subfolders, or files.
        img_size: side of the square crop, a whole multiple of downscale_factor.
        upscale_function: (..., 3, h, w) in [-1, 1] and the factor -> (..., 3, H, W). Only bicubic's can be
            trained with, since checkpoints record no other.
        train: a random crop and augmentation; False: the central crop.
        augment: "none", "flip" (left-right) or "dihedral" (all 8 flips and rotations).
        reader: path -> (H, W, 3) uint8.
        degradation: by default bicubic by downscale_factor.
        tokens: folder of tokens, see imaging.tokens.

    ValueError: no usable image, an impossible crop, or tokens that do not fit the images or each other.
    """

    collate = staticmethod(Crops.stack)

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
        degradation: Degradation | None = None,
        tokens: str | Path | None = None,
    ) -> None:
        self.degradation = degradation or Degradation(scale=downscale_factor)
        low_size = img_size / self.degradation.scale
        if img_size < 8 or not math.isclose(low_size, round(low_size), abs_tol=1e-6):
            raise ValueError(
                f"img_size must be at least 8 and a whole multiple of the downscale factor "
                f"{self.degradation.scale:g}, not {img_size}"
            )
        if augment not in ("none", "flip", "dihedral"):
            raise ValueError(f"augment must be 'none', 'flip' or 'dihedral', not {augment!r}")
        self.img_size, self.upscale_function, self.reader = img_size, upscale_function, reader
        self.train, self.augment, self.seed = train, augment if train else "none", seed
        found = list_images(images) if isinstance(images, str | Path) else list(images)
        self.paths, self.left_out = _usable(found, img_size)
        self.token_folder = tokens
        if tokens is not None:
            check_tokens(tokens, self.paths)
        self.failed = multiprocessing.RawArray(ctypes.c_bool, len(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        return self.crop(index).sample(self.degradation, self.upscale_function)

    def crop(self, index: int | tuple[int, int]) -> Crops:
        """Cut (3, img_size, img_size); a degradation that draws makes the low resolution, too."""
        epoch, position = index if isinstance(index, tuple) else (0, index)
        if not 0 <= position < len(self.paths):
            raise IndexError(f"index {position} of {len(self.paths)} images")
        random = np.random.default_rng((self.seed, epoch, position))
        pixels, path = self._read(position)
        window = self._window(pixels, random)
        tokens = None if self.token_folder is None else read_tokens(self.token_folder, path)
        if not self.degradation.random:
            return Crops(window, None, tokens)
        low_res, ratio = self.degradation(window, random), exact_scale(self.degradation.scale)
        places = self._places([(n - self.img_size) // ratio.numerator for n in window.shape[-2:]], random)
        return Crops(
            _cut(window, [place * ratio.numerator for place in places], self.img_size),
            _cut(low_res, [place * ratio.denominator for place in places], round(self.img_size / ratio)),
            tokens,
        )

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def failures(self) -> int:
        return sum(self.failed)

    def _window(self, pixels: npt.NDArray[np.uint8], random: np.random.Generator) -> Tensor:
        """(3, H, W): a crop at a drawn place, augmented, with the margin that its degradation needs."""
        multiple = exact_scale(self.degradation.scale).numerator
        margin, sides = self.degradation.margin * self.degradation.scale, pixels.shape[:2]
        sizes = [self.img_size + int(min(margin, n - self.img_size)) // multiple * multiple for n in sides]
        top, left = self._places([n - size for n, size in zip(sides, sizes, strict=True)], random)
        window = pixels[top : top + sizes[0], left : left + sizes[1]]
        if self.augment != "none" and random.integers(2):
            window = window[:, ::-1]
        if self.augment == "dihedral":
            window = np.rot90(window, int(random.integers(4)))
        return torch.from_numpy(np.ascontiguousarray(window.transpose(2, 0, 1)))

    def _places(self, spare: Sequence[int], random: np.random.Generator) -> list[int]:
        """Draw a place from 0 to each of these; the middle in validation."""
        return [int(random.integers(rest + 1)) if self.train else rest // 2 for rest in spare]

    def _read(self, position: int) -> tuple[npt.NDArray[np.uint8], Path]:
        """Read the image at a position, or the next that can be read, (H, W, 3); and its file."""
        for offset in range(len(self.paths)):
            candidate = (position + offset) % len(self.paths)
            if self.failed[candidate]:
                continue
            try:
                pixels = self.reader(self.paths[candidate])
                if min(pixels.shape[:2]) < self.img_size:
                    raise UnreadableImageError(f"{self.paths[candidate]}: shrank to {pixels.shape[:2]}")
                return pixels, self.paths[candidate]
            except (UnreadableImageError, OSError) as error:
                self.failed[candidate] = True
                logger.warning("left out from now on: %s", error)
        raise RuntimeError(f"none of the {len(self.paths)} images can be read any more")


def _cut(image: Tensor, place: Sequence[int], size: int) -> Tensor:
    """Cut (..., size, size) from the row and column of its corner."""
    return image[..., place[0] : place[0] + size, place[1] : place[1] + size].contiguous()


def _usable(paths: Sequence[Path], img_size: int) -> tuple[list[Path], dict[Path, str]]:
    """List the images of at least img_size on both sides, and why the others are left out."""
    left_out: dict[Path, str] = {}
    for path, size in zip(paths, image_sizes(paths), strict=True):
        if isinstance(size, UnreadableImageError):
            left_out[path] = str(size).removeprefix(f"{path}: ")
        elif min(size) < img_size:
            left_out[path] = f"{size[1]}x{size[0]} is smaller than the crop of {img_size}"
    named = "; ".join(f"{path} ({reason})" for path, reason in [*left_out.items()][:3])
    if len(left_out) == len(paths):
        raise ValueError(
            f"none of {len(paths)} images can be used ({named}): "
            f"give images of at least {img_size}x{img_size} or a smaller img_size"
        )
    if left_out:
        logger.warning("%d of %d images are left out, such as %s", len(left_out), len(paths), named)
    return [path for path in paths if path not in left_out], left_out
