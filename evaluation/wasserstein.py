"""Sliced Wasserstein distance: do two sets of images have the same local texture?

Karras et al. 2018, "Progressive growing of GANs", section 5. Patches of an image and its truth lie at the
same positions, which removes sampling noise (30 to 40 at 512 patches of each Set5 image).
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 7
LEVELS = 3
DIRECTIONS = 512
PATCHES_PER_IMAGE = 512  # at each level. Karras et al. take 128 of 16384 images; few photos need more
PATCHES_OF_A_SET = 51200  # 90 MB of RGB over three levels
_DIRECTIONS_AT_ONCE = 128  # bounds the memory of the sort
_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)

# For each level, finest first: rows and columns (count,) of the patches' top-left pixels.
Positions: TypeAlias = "list[tuple[Tensor, Tensor]]"


class PatchPair(NamedTuple):
    """Of an image and of its truth, (levels, count, C, 7, 7) each."""

    restored: Tensor
    truth: Tensor


def patch_count(images: int) -> int:
    """Of each image, at each level."""
    return max(1, min(PATCHES_PER_IMAGE, PATCHES_OF_A_SET // images))


def patch_positions(height: int, width: int, count: int, random: np.random.Generator) -> Positions:
    """Of each level of H x W pixels; sides from 25."""
    positions = []
    for _ in range(LEVELS):
        rows, columns = (random.integers(side - PATCH + 1, size=count) for side in (height, width))
        positions.append((torch.from_numpy(rows), torch.from_numpy(columns)))
        height, width = (height + 1) // 2, (width + 1) // 2
    return positions


def pyramid_patches(image: Tensor, positions: Positions) -> Tensor:
    """(levels, count, C, 7, 7) of (C, H, W) in [0, 1]."""
    found = []
    for band, (rows, columns) in zip(laplacian_pyramid(image.float()), positions, strict=True):
        windows = band.unfold(1, PATCH, 1).unfold(2, PATCH, 1)  # (C, H - 6, W - 6, 7, 7)
        found.append(windows[:, rows, columns].transpose(0, 1))
    return torch.stack(found)


def laplacian_pyramid(image: Tensor) -> list[Tensor]:
    """Of (C, H, W), finest first, each half as large; the last is low-pass (Burt & Adelson 1983)."""
    bands = []
    for _ in range(LEVELS - 1):
        smaller = _binomial_blur(image)[:, ::2, ::2]
        enlarged = torch.zeros_like(image)
        enlarged[:, ::2, ::2] = 4 * smaller  # three of four pixels are zero
        bands.append(image - _binomial_blur(enlarged))
        image = smaller
    return [*bands, image]


def _binomial_blur(image: Tensor) -> Tensor:
    """(C, H, W), borders mirrored."""
    kernel = torch.outer(*[image.new_tensor(_BINOMIAL)] * 2).expand(len(image), 1, -1, -1)
    return F.conv2d(F.pad(image, (2, 2, 2, 2), mode="reflect"), kernel, groups=len(image))


def patch_distance(pairs: Sequence[PatchPair], seed: int) -> list[float]:
    """Times 1000 at each level, finest first; nan for a flat truth."""
    channels = max(pair.truth.shape[2] for pair in pairs)
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for level in range(LEVELS):
        ours, theirs = (
            torch.cat([patches[level].expand(-1, channels, -1, -1) for patches in side])  # grey to RGB
            for side in zip(*pairs, strict=True)
        )
        # Of the truth for both: with its own, as Karras et al. have it, half the contrast would go unseen.
        deviation, mean = torch.std_mean(theirs, dim=(0, 2, 3), keepdim=True, correction=0)
        deviation = deviation.where(deviation > 1e-6, torch.nan)
        ours, theirs = (((one - mean) / deviation).flatten(start_dim=1) for one in (ours, theirs))
        distances.append(1000 * _sliced_distance(ours, theirs, generator))
    return distances


def _sliced_distance(ours: Tensor, theirs: Tensor, generator: torch.Generator) -> float:
    """Mean 1-Wasserstein distance of two (n, D) sets."""
    axes = torch.randn(DIRECTIONS, ours.shape[1], generator=generator)
    total = 0.0
    for some in F.normalize(axes, dim=1).split(_DIRECTIONS_AT_ONCE):  # uniform on the unit sphere
        difference = (some @ ours.T).sort(dim=1).values - (some @ theirs.T).sort(dim=1).values
        total += difference.abs().mean(dim=1).sum().item()
    return total / DIRECTIONS
