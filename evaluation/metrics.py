"""The metrics, and METRICS, the table that every output and TensorBoard's scalars come from.

Restored and true images are (B, C, H, W) in [0, 1], C 1 or 3, or ValueError; low resolution is (B, C, h, w);
scores are (B,) float64 on the CPU. Published tables use `Comparison(crop=scale)` with luma rounded before
shrinking: RGB in uint8 differs by up to 0.013 dB.

A new metric is a function of (restored, truth, low_res) and a row of METRICS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bicubic import Border, resize
from engine.packages import IMPORT_ERRORS
from imaging.pixels import to_uint8

Channel: TypeAlias = Literal["luma", "rgb"]
SSIM_WINDOW = 11
DETAIL_BAND = (0.35, 0.9)  # of Nyquist; from x3 up the low resolution has none of it
_FLAT_POWER = 1e-10  # a hundred times below one uint8 step, squared


def undefined(restored: Tensor, truth: Tensor) -> Tensor:
    """(B,) of nan: the score of a metric that cannot be had."""
    return torch.full((len(truth),), torch.nan)


@dataclass(frozen=True)
class Comparison:
    """Says how images are compared: what tables call their protocol."""

    crop: int  # pixels that PSNR and SSIM leave out at each border
    channel: Channel = "luma"  # of BT.601, or all channels of RGB
    border: Border = "mirror"  # what LR-PSNR sees beyond the edge when it shrinks
    lpips: Callable[[Tensor, Tensor], Tensor] = undefined  # (B, C, H, W) twice to (B,)
    lpips_note: str = "switched off"  # which network, or why there is none

    def __str__(self) -> str:
        channel = "luma (BT.601, 16-235, not rounded)" if self.channel == "luma" else "RGB"
        return f"{channel}; images rounded to uint8; {self.crop} pixels cropped from each border"


def to_luma(image: Tensor) -> Tensor:
    """Convert RGB to BT.601's luma, 16 to 235 of 255, as MATLAB's `rgb2ycbcr` on double; leave grey alone."""
    channels = image.shape[-3]
    if channels == 1:
        return image
    if channels != 3:
        raise ValueError(f"luma needs 1 or 3 channels, got {channels}; drop alpha and keep RGB")
    weights = image.new_tensor([65.481, 128.553, 24.966]).view(3, 1, 1)
    return (16 + (image * weights).sum(dim=-3, keepdim=True)) / 255


def check_images(name: str, images: Tensor) -> None:
    """Raise ValueError unless (B, C, H, W) in about [0, 1]: bicubic may overshoot by 0.3 in two passes."""
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


def psnr(restored: Tensor, truth: Tensor, comparison: Comparison) -> Tensor:
    """(B,) in dB; inf for identical images."""
    ours, theirs = _compared(restored, truth, comparison, smallest=1)
    return _decibels(ours - theirs)


def ssim(restored: Tensor, truth: Tensor, comparison: Comparison) -> Tensor:
    """(B,) of Wang et al. 2004, Eq. 13: Gaussian windows 11x11 of sigma 1.5 that lie inside the image."""
    try:
        from skimage.metrics import structural_similarity
    except IMPORT_ERRORS as error:
        raise ValueError(f"SSIM needs scikit-image, which does not import: {error}") from error
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(*_compared(restored, truth, comparison, smallest=SSIM_WINDOW), strict=True)
    values = [
        structural_similarity(one.numpy(), other.numpy(), data_range=1, channel_axis=0, **options)
        for one, other in pairs
    ]
    return torch.tensor(values, dtype=torch.float64)


def _compared(restored: Tensor, truth: Tensor, comparison: Comparison, smallest: int) -> list[Tensor]:
    """Round, crop and convert both images; ValueError where less than `smallest` pixels a side remain."""
    check_pair(restored, truth)
    crop, (height, width) = comparison.crop, truth.shape[-2:]
    remaining = height - 2 * crop, width - 2 * crop
    if min(remaining) < smallest:
        left = f"{height}x{width} less {crop} pixels at each border is {remaining[0]}x{remaining[1]}"
        raise ValueError(f"{left}, and {smallest}x{smallest} is needed; use a larger image or a smaller crop")
    images = [to_uint8(image)[..., crop : height - crop, crop : width - crop] for image in (restored, truth)]
    planes = [image.double() / 255 for image in images]
    return [to_luma(image) for image in planes] if comparison.channel == "luma" else planes


def _decibels(error: Tensor) -> Tensor:
    return -10 * error.square().mean(dim=(1, 2, 3)).log10()


def low_resolution_psnr(restored: Tensor, low_res: Tensor, border: Border = "mirror") -> Tensor:
    """(B,) PSNR in dB of the result shrunk again against its input, in uint8 (Li et al. 2022, "SRDiff").

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
    """(B,) power of fine detail over the truth's: below 1 is blur, above it noise; nan for a flat truth."""
    check_pair(restored, truth)
    energy, reference = _band_energy(restored), _band_energy(truth)
    return torch.where(reference > _FLAT_POWER, energy / reference, torch.nan)


def _band_energy(image: Tensor) -> Tensor:
    """(B,) power per pixel of the luma within DETAIL_BAND."""
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


def finite_mean(values: Tensor) -> Tensor:
    """Average the finite values, if any: one exact image would hide all others."""
    finite = values[values.isfinite()]
    return (finite if len(finite) else values).mean()


def geometric_mean(ratios: Tensor) -> Tensor:
    """Average ratios so that twice and half make 1."""
    return ratios.log().mean().exp()


@dataclass(frozen=True)
class Metric:
    """A row of METRICS: a score of each image, and its average over a set."""

    name: str  # in JSON, in CSV and, with "validation/" before it, in TensorBoard
    heading: str  # of the column
    form: str  # how a value is printed
    note: str  # the meaning of the number; {0} is the Comparison
    # restored, truth, low_res -> (B,), nan where undefined; None for what is measured while restoring
    score: Callable[[Tensor, Tensor, Tensor, Comparison], Tensor] | None
    average: Callable[[Tensor], Tensor] = finite_mean  # over the images that have a value
    in_training: bool = False  # whether validation measures it, too

    def average_of(self, scores: Sequence[float | None]) -> float | None:
        """Average the scores of a set; None where no image has one."""
        defined = [score for score in scores if score is not None]
        return self.average(torch.tensor(defined, dtype=torch.float64)).item() if defined else None

    def print(self, value: float | None) -> str:
        """Format a cell of a table; None is an empty one."""
        return "" if value is None else format(value, self.form)


# fmt: off
METRICS = (
    Metric("psnr", "PSNR", ".2f", "{0}; mean of the images not exact",
           lambda restored, truth, low_res, how: psnr(restored, truth, how), in_training=True),
    Metric("ssim", "SSIM", ".4f", "of what PSNR compares; Gaussian 11x11 window",
           lambda restored, truth, low_res, how: ssim(restored, truth, how), in_training=True),
    Metric("lr_psnr", "LR-PSNR", ".2f", "result shrunk again (uint8) against the input",
           lambda restored, truth, low_res, how: low_resolution_psnr(restored, low_res, how.border)),
    Metric("lpips", "LPIPS", ".4f", "{0.lpips_note}",
           lambda restored, truth, low_res, how: how.lpips(restored, truth)),
    Metric("hf_energy", "HF energy", ".3f", "detail's power; 1 is the truth's",
           lambda restored, truth, low_res, how: high_frequency_energy(restored, truth), geometric_mean),
    Metric("seconds_per_megapixel", "s/MP", ".3g", "seconds per megapixel of output", None),
)
# fmt: on
BY_NAME = {metric.name: metric for metric in METRICS}
