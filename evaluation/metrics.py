"""How close an image is to the truth, how consistent with its input, how real its texture.

Images are (B, C, H, W) in [0, 1], C 1 or 3, or ValueError; scores (B,) float64 on the CPU. Published tables
use `Protocol(crop=scale)` with luma rounded before shrinking: RGB in uint8 differs by up to 0.013 dB.
"""

from dataclasses import MISSING, dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bicubic import Border, resize
from engine.options import Options, option

Channel: TypeAlias = Literal["luma", "rgb"]
SSIM_WINDOW = 11
DETAIL_BAND = (0.35, 0.9)  # of Nyquist; from x3 up the low resolution has none of it
_SMALLEST_SPECTRUM = 16
_FLAT_POWER = 1e-10  # a hundred times below one uint8 step, squared


@dataclass(frozen=True)
class Protocol(Options):
    """What `psnr` and `ssim` compare."""

    crop: int = option(MISSING, "pixels left out at each border", low=0)
    channel: Channel = option("luma", "luma of BT.601, or all channels of RGB")

    def describe(self) -> str:
        channel = "luma (BT.601, 16-235, not rounded)" if self.channel == "luma" else "RGB"
        return f"{channel}; images rounded to uint8; {self.crop} pixels cropped from each border"


def to_uint8(image: Tensor) -> Tensor:
    """As an 8-bit file, on the CPU; halves go up, as in MATLAB."""
    return (image.cpu().double() * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)


def to_luma(image: Tensor) -> Tensor:
    """BT.601 as MATLAB's `rgb2ycbcr` on double, 16 to 235 of 255; grey is its own."""
    channels = image.shape[-3]
    if channels == 1:
        return image
    if channels != 3:
        raise ValueError(f"luma needs 1 or 3 channels, got {channels}; drop alpha and keep RGB")
    weights = image.new_tensor([65.481, 128.553, 24.966]).view(3, 1, 1)
    return (16 + (image * weights).sum(dim=-3, keepdim=True)) / 255


def check_images(name: str, images: Tensor) -> None:
    """ValueError; bicubic may overshoot (0.3 in two passes)."""
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(images.shape)}; give (B, C, H, W), none of them 0")
    if not images.is_floating_point():
        raise ValueError(f"{name} is {images.dtype}; give floating point in [0, 1] (uint8 divided by 255)")
    lowest, highest = images.min().item(), images.max().item()
    if not (lowest > -0.5 and highest < 1.5):  # also true for nan
        raise ValueError(f"{name} spans {lowest:.3g} to {highest:.3g}; metrics take images in [0, 1]")


def check_pair(restored: Tensor, truth: Tensor) -> None:
    if restored.shape != truth.shape:
        shapes = f"restored is {tuple(restored.shape)} and truth is {tuple(truth.shape)}"
        raise ValueError(f"{shapes}; crop the truth (top-left) to a multiple of the scale")
    check_images("restored", restored)
    check_images("truth", truth)


def psnr(restored: Tensor, truth: Tensor, protocol: Protocol) -> Tensor:
    """In dB; inf for identical images."""
    ours, theirs = _compared(restored, truth, protocol, smallest=1)
    return _decibels(ours - theirs)


def ssim(restored: Tensor, truth: Tensor, protocol: Protocol) -> Tensor:
    """Wang et al. 2004, Eq. 13: Gaussian 11x11 of sigma 1.5, inside the image."""
    from skimage.metrics import structural_similarity

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(*_compared(restored, truth, protocol, smallest=SSIM_WINDOW), strict=True)
    values = [
        structural_similarity(one.numpy(), other.numpy(), data_range=1, channel_axis=0, **options)
        for one, other in pairs
    ]
    return torch.tensor(values, dtype=torch.float64)


def _compared(restored: Tensor, truth: Tensor, protocol: Protocol, smallest: int) -> list[Tensor]:
    """ValueError where less than `smallest` pixels a side remain."""
    check_pair(restored, truth)
    crop, (height, width) = protocol.crop, truth.shape[-2:]
    remaining = height - 2 * crop, width - 2 * crop
    if min(remaining) < smallest:
        left = f"{height}x{width} less {crop} pixels at each border is {remaining[0]}x{remaining[1]}"
        raise ValueError(f"{left}, and {smallest}x{smallest} is needed; use a larger image or a smaller crop")
    images = [to_uint8(image)[..., crop : height - crop, crop : width - crop] for image in (restored, truth)]
    planes = [image.double() / 255 for image in images]
    return [to_luma(image) for image in planes] if protocol.channel == "luma" else planes


def _decibels(error: Tensor) -> Tensor:
    return -10 * error.square().mean(dim=(1, 2, 3)).log10()


def low_resolution_psnr(restored: Tensor, low_res: Tensor, border: Border = "mirror") -> Tensor:
    """Of the image shrunk again against the input, in uint8 (Li et al. 2022, "SRDiff").

    From about 50 dB on, what differs is the rounding.
    """
    check_images("restored", restored)
    check_images("low_res", low_res)
    (height, width), size = restored.shape[-2:], (low_res.shape[-2], low_res.shape[-1])
    if restored.shape[:2] != low_res.shape[:2] or height < size[0] or width < size[1]:
        shapes = f"restored is {tuple(restored.shape)} and low_res is {tuple(low_res.shape)}"
        raise ValueError(f"{shapes}; give the larger image first, with the same batch and channels")
    shrunk = resize(to_uint8(restored), size=size, border=border, rounding="uint8")
    return _decibels((shrunk.double() - to_uint8(low_res)) / 255)


def high_frequency_energy(restored: Tensor, truth: Tensor) -> Tensor:
    """Over the truth's: less is blur, more noise; nan if flat."""
    check_pair(restored, truth)
    height, width = truth.shape[-2:]
    if min(height, width) < _SMALLEST_SPECTRUM:
        raise ValueError(
            f"{height}x{width} is too small for a spectrum; give sides from {_SMALLEST_SPECTRUM}"
        )
    energy, reference = _band_energy(restored), _band_energy(truth)
    return torch.where(reference > _FLAT_POWER, energy / reference, torch.nan)


def _band_energy(image: Tensor) -> Tensor:
    """Luma's power per pixel within DETAIL_BAND."""
    luma = to_luma(image.cpu().double())[:, 0]  # (B, H, W)
    sides = luma.shape[-2:]
    # Without a Hann window, the jump from one border to the opposite one would spread over all frequencies:
    # bicubic x4 of Set5 would read 0.15 of the truth's energy instead of 0.014.
    rows, columns = (torch.hann_window(side, periodic=False, dtype=torch.float64) for side in sides)
    windowed = (luma - luma.mean(dim=(-2, -1), keepdim=True)) * torch.outer(rows, columns)
    y, x = (torch.fft.fftfreq(side, d=0.5, dtype=torch.float64) for side in sides)  # 1 is Nyquist
    radius = torch.hypot(y[:, None], x)
    power: Tensor = torch.fft.fft2(windowed, norm="forward").abs().square()
    return power[:, (radius >= DETAIL_BAND[0]) & (radius <= DETAIL_BAND[1])].sum(dim=-1)


def uncertainty_correlation(
    deviation: Tensor, restored: Tensor, truth: Tensor, *, ranks: bool = False
) -> float:
    """Pearson's or Spearman's, of deviation (H, W) and error; nan if one is constant."""
    from scipy import stats

    check_pair(restored, truth)
    if deviation.shape != truth.shape[-2:]:
        raise ValueError(f"deviation is {tuple(deviation.shape)}, and the image {tuple(truth.shape[-2:])}")
    error = (restored.double() - truth.double()).square().mean(dim=(0, 1)).sqrt()
    x, y = (values.cpu().double().flatten().numpy() for values in (deviation, error))
    if x.min() == x.max() or y.min() == y.max():
        return float("nan")
    return float((stats.spearmanr if ranks else stats.pearsonr)(x, y).statistic)
