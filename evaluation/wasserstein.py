"""Sliced Wasserstein distance: do two sets of images have the same local texture?

Karras et al. 2018, "Progressive growing of GANs", section 5: random 7x7 patches from each level of a
Laplacian pyramid, normalised per channel, projected on random directions of the unit sphere; the mean
absolute difference of the sorted projections, averaged over directions. The last level is the low-pass
remainder of the pyramid.

Only patches are kept of an image, whatever its size.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.metrics import check_images

PATCH = 7
LEVELS = 3
DIRECTIONS = 512
PATCHES_PER_IMAGE = 512  # at each level. Karras et al. take 128 of 16384 images; few photos need more
PATCHES_OF_A_SET = 51200  # 90 MB of RGB over three levels
_DIRECTIONS_AT_ONCE = 128  # bounds the memory of the sort
_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)

# For each level, finest first: rows and columns (count,) of the patches' top-left pixels.
Positions: TypeAlias = "list[tuple[Tensor, Tensor]]"


class FlatSetError(ValueError):
    """A set of images without texture."""


class PatchPair(NamedTuple):
    """Patches of a restored image and of its truth at the same positions, (levels, count, C, 7, 7) each."""

    restored: Tensor
    truth: Tensor


class SlicedWasserstein(NamedTuple):
    """Distances times 1000: their mean, and one for each pyramid level, finest first."""

    average: float
    per_level: tuple[float, ...]


def sliced_wasserstein_distance(
    restored: Sequence[Tensor],
    truth: Sequence[Tensor],
    *,
    seed: int,
    levels: int = LEVELS,
    patches_per_image: int = PATCHES_PER_IMAGE,
    directions: int = DIRECTIONS,
    statistics: Literal["truth", "own"] = "truth",
) -> SlicedWasserstein:
    """Distance between two sets of images as distributions of local texture; 0 for a set and itself.

    Images of equal index give patches at the same positions. Sorting forgets which patch came from where, so
    this removes sampling noise (30 to 40 at 512 patches of each Set5 image) and compares no pixels.

    Args:
        restored, truth: equally many images (C, H, W) in [0, 1], of any sizes, pairs of one size.
        seed: of positions and directions. Compare only results of equal settings.
        levels: of the pyramid, each half as large as the one before.
        patches_per_image: at each level.
        directions, statistics: see patch_distance.

    Raises:
        ValueError: the sets differ in number, size or channels, an image is too small, or a set is flat.
    """
    if len(restored) != len(truth) or not truth:
        raise ValueError(f"{len(restored)} restored and {len(truth)} true images; give as many of both")
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for ours, theirs in zip(restored, truth, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"restored is {tuple(ours.shape)} and truth {tuple(theirs.shape)}")
        positions = patch_positions(ours.shape[-2], ours.shape[-1], levels, patches_per_image, generator)
        pairs.append(PatchPair(pyramid_patches(ours, positions), pyramid_patches(theirs, positions)))
    return patch_distance(pairs, seed=seed, directions=directions, statistics=statistics)


def patch_positions(
    height: int, width: int, levels: int, count: int, generator: torch.Generator
) -> Positions:
    """Draw where `count` patches of each level of an H x W image lie.

    Raises:
        ValueError: levels or count are below 1, or the smallest level holds no patch.
    """
    if min(levels, count) < 1:
        raise ValueError(f"{levels} levels of {count} patches; give 1 or more of both")
    smallest = (PATCH - 1) * 2 ** (levels - 1) + 1  # each level keeps ceil(size / 2) pixels
    if min(height, width) < smallest:
        raise ValueError(
            f"an image of {height}x{width}, and {levels} levels need {smallest} pixels a side; "
            "use fewer levels or larger images"
        )
    positions = []
    for _ in range(levels):
        rows = torch.randint(height - PATCH + 1, (count,), generator=generator)
        columns = torch.randint(width - PATCH + 1, (count,), generator=generator)
        positions.append((rows, columns))
        height, width = (height + 1) // 2, (width + 1) // 2
    return positions


def pyramid_patches(image: Tensor, positions: Positions) -> Tensor:
    """Patches (levels, count, C, 7, 7) of an image (C, H, W) in [0, 1]."""
    check_images("image", image, dimensions=3)
    found = []
    bands = laplacian_pyramid(image.float(), len(positions))
    for band, (rows, columns) in zip(bands, positions, strict=True):
        windows = band.unfold(1, PATCH, 1).unfold(2, PATCH, 1)  # (C, H - 6, W - 6, 7, 7)
        found.append(windows[:, rows.to(band.device), columns.to(band.device)].transpose(0, 1))
    return torch.stack(found)


def laplacian_pyramid(image: Tensor, levels: int) -> list[Tensor]:
    """Bands of (C, H, W), finest first, sides halved and rounded up; the last is low-pass.

    Burt & Adelson 1983, "The Laplacian pyramid as a compact image code", with the binomial filter 1 4 6 4 1.
    """
    bands = []
    for _ in range(levels - 1):
        smaller = _binomial_blur(image)[:, ::2, ::2]
        enlarged = torch.zeros_like(image)
        enlarged[:, ::2, ::2] = 4 * smaller  # three of four pixels are zero
        bands.append(image - _binomial_blur(enlarged))
        image = smaller
    return [*bands, image]


def _binomial_blur(image: Tensor) -> Tensor:
    """Convolve (C, H, W) with the binomial filter, borders mirrored."""
    image = F.pad(image, (2, 2, 2, 2), mode="reflect")
    # Shifted sums instead of a convolution: seven times faster in float64 on a CPU.
    for dim in (-2, -1):
        length = image.shape[dim] - len(_BINOMIAL) + 1
        total = image.narrow(dim, 0, length) * _BINOMIAL[0]
        for shift, tap in enumerate(_BINOMIAL[1:], start=1):
            total.add_(image.narrow(dim, shift, length), alpha=tap)
        image = total
    return image


def patch_distance(
    pairs: Sequence[PatchPair],
    *,
    seed: int,
    directions: int = DIRECTIONS,
    statistics: Literal["truth", "own"] = "truth",
) -> SlicedWasserstein:
    """Distance between the patches of two sets of images; grey ones become RGB where the set has both.

    Args:
        pairs: one for each image.
        seed: of the directions.
        directions: how many to project on.
        statistics: whose mean and deviation normalise the restored patches. "own", as the code of Karras et
            al., is symmetric and cannot see that all texture has half its contrast; "truth" can.

    Raises:
        ValueError: there is no direction or no such statistics, or a set is flat (FlatSetError).
    """
    if directions < 1 or statistics not in ("truth", "own"):
        raise ValueError(f"{directions} directions, statistics {statistics!r}; give 1, and 'truth' or 'own'")
    channels = max(pair.truth.shape[2] for pair in pairs)
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for level in range(len(pairs[0].truth)):
        ours, theirs = (
            torch.cat([patches[level].expand(-1, channels, -1, -1) for patches in side])
            for side in zip(*pairs, strict=True)
        )
        ours, theirs = _normalize(ours, theirs if statistics == "truth" else ours), _normalize(theirs, theirs)
        distances.append(1000 * _sliced_distance(ours, theirs, directions, generator))
    return SlicedWasserstein(sum(distances) / len(distances), tuple(distances))


def _normalize(patches: Tensor, scale_by: Tensor) -> Tensor:
    """Flat descriptors (n, C * 49) with each channel shifted and divided by the statistics of `scale_by`."""
    mean = scale_by.mean(dim=(0, 2, 3), keepdim=True)
    deviation = scale_by.std(dim=(0, 2, 3), keepdim=True, correction=0)
    if bool((deviation < 1e-6).any()):
        raise FlatSetError("a set of images is flat, so its texture has no scale; leave such images out")
    return ((patches - mean) / deviation).flatten(start_dim=1)


def _sliced_distance(ours: Tensor, theirs: Tensor, directions: int, generator: torch.Generator) -> float:
    """Mean 1-Wasserstein distance of two (n, D) sets over random directions."""
    axes = torch.randn(directions, ours.shape[1], generator=generator)
    axes = F.normalize(axes, dim=1).to(ours)  # uniform on the unit sphere
    total = 0.0
    for start in range(0, directions, _DIRECTIONS_AT_ONCE):
        some = axes[start : start + _DIRECTIONS_AT_ONCE]
        difference = (some @ ours.T).sort(dim=1).values - (some @ theirs.T).sort(dim=1).values
        total += difference.abs().mean(dim=1).sum().item()
    return total / directions
