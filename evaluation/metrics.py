"""How close a restored image is to the truth, how consistent with its input, and how real its texture looks.

Shapes: B images, C channels (1 grey or 3 RGB), H height, W width.
Ranges: every image is floating point in [0, 1]; uint8 values divided by 255. Overshoot a little outside is
accepted, images in [-1, 1] or [0, 255] are refused. Results per image are float64.

Published tables differ by more than the methods they compare when luma, crop, rounding or the SSIM window
differ, so `psnr` and `ssim` take a `Protocol`. That of the accepted tables is `Protocol(crop=scale)`: images
rounded to uint8, BT.601 luma in 16-235 computed from those and not rounded again, `scale` pixels cropped
from each border.

The bicubic rows of those tables came about differently: the truth was first reduced to luma and rounded to
uint8, then shrunk and enlarged in double precision, and rounded to uint8 at the end. A grey image is its own
luma here, so `tests/test_metrics.py` reproduces these rows from other images, with the same metrics. Bicubic
applied to RGB in uint8 differs from them by up to 0.013 dB and 0.0008 SSIM.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bicubic import Border, resize

SSIM_WINDOW = 11
DETAIL_BAND = (0.35, 0.9)  # fractions of the Nyquist frequency
_SMALLEST_SPECTRUM = 16
_FLAT_POWER = 1e-10  # a hundred times below one uint8 step, squared


@dataclass(frozen=True)
class Protocol:
    """What `psnr` and `ssim` compare.

    Attributes:
        crop: pixels left out at each border; the accepted tables leave out as many as the scale.
        channel: "luma", see `to_luma`, or "rgb": all channels, weighted equally.
        quantize: first clamp and round both images to what an 8-bit file holds.
    """

    crop: int
    channel: Literal["luma", "rgb"] = "luma"
    quantize: bool = True

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise ValueError(f"crop is {self.crop}; give the pixels to drop at each border, 0 or more")
        if self.channel not in ("luma", "rgb"):
            raise ValueError(f"channel is {self.channel!r}; choose 'luma' or 'rgb'")

    def describe(self) -> str:
        """One line to print beside the numbers."""
        channel = "luma (BT.601, 16-235, not rounded)" if self.channel == "luma" else "RGB"
        rounding = "images rounded to uint8" if self.quantize else "images not rounded"
        return f"{channel}; {rounding}; {self.crop} pixels cropped from each border"


# ---------------------------------------------------------------- images


def round_to_uint8(image: Tensor) -> Tensor:
    """The nearest values that an 8-bit file holds, k / 255 with k in 0..255; halves go up, as in MATLAB."""
    return (image * 255 + 0.5).floor().clamp(0, 255) / 255


def to_luma(image: Tensor) -> Tensor:
    """BT.601 luma in studio range, as MATLAB's `rgb2ycbcr` on double: (B, 3, H, W) in [0, 1] to (B, 1, H, W).

    Y = (16 + 65.481 R + 128.553 G + 24.966 B) / 255, so black is 16 / 255 and white 235 / 255. A grey image,
    (B, 1, H, W), is its own luma and comes back unchanged: through RGB it would be compressed to that range.
    Nothing is rounded; `rgb2ycbcr` on uint8 is `round_to_uint8(to_luma(round_to_uint8(image)))`.

    Raises:
        ValueError: the image has neither 1 nor 3 channels.
    """
    channels = image.shape[-3]
    if channels == 1:
        return image
    if channels != 3:
        raise ValueError(f"luma needs 1 or 3 channels, got {channels}; drop alpha and keep RGB")
    weights = image.new_tensor([65.481, 128.553, 24.966]).view(3, 1, 1)
    return (16 + (image * weights).sum(dim=-3, keepdim=True)) / 255


def check_images(name: str, images: Tensor, dimensions: int = 4) -> None:
    """ValueError for what cannot be images in [0, 1]; bicubic overshoot, up to 0.3 in two passes, may."""
    if images.ndim != dimensions or images.numel() == 0:
        shape = {3: "(C, H, W)", 4: "(B, C, H, W)"}[dimensions]
        raise ValueError(f"{name} has shape {tuple(images.shape)}; give {shape}, none of them 0")
    if not images.is_floating_point():
        raise ValueError(f"{name} is {images.dtype}; give floating point in [0, 1] (uint8 divided by 255)")
    lowest, highest = images.min().item(), images.max().item()
    if not (lowest > -0.5 and highest < 1.5):  # also true for nan
        raise ValueError(f"{name} spans {lowest:.3g} to {highest:.3g}; metrics take images in [0, 1]")


def check_pair(restored: Tensor, truth: Tensor) -> None:
    """ValueError for images that cannot be compared, each (B, C, H, W)."""
    if restored.shape != truth.shape:
        raise ValueError(
            f"restored is {tuple(restored.shape)} and truth is {tuple(truth.shape)}; give both the same "
            "channels, and crop the truth (top-left) to a multiple of the scale"
        )
    check_images("restored", restored)
    check_images("truth", truth)


def _to_float64(image: Tensor) -> Tensor:
    device = torch.device("cpu") if image.device.type == "mps" else image.device  # MPS has no float64
    return image.to(device, torch.float64)


# ---------------------------------------------------------------- fidelity


def psnr(restored: Tensor, truth: Tensor, protocol: Protocol) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / MSE), per image: two (B, C, H, W) in [0, 1] to (B,).

    For RGB the squared error is averaged over the channels before the logarithm. Identical images give inf.

    Raises:
        ValueError: shapes differ, values are not in [0, 1], or the crop leaves nothing.
    """
    check_pair(restored, truth)
    error = _select(restored, protocol, smallest=1) - _select(truth, protocol, smallest=1)
    return -10 * error.square().mean(dim=(1, 2, 3)).log10()


def ssim(restored: Tensor, truth: Tensor, protocol: Protocol) -> Tensor:
    """Structural similarity per image, 1 for identical ones: two (B, C, H, W) in [0, 1] to (B,), on the CPU.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", Eq. 13, with
    the settings of the authors' MATLAB code: Gaussian window 11x11 of sigma 1.5, moments without the N - 1
    correction, K1 = 0.01, K2 = 0.03, windows that lie wholly inside the image. For RGB, the mean over the
    channels.

    Raises:
        ValueError: shapes differ, values are not in [0, 1], or less than one window remains after the crop.
    """
    from skimage.metrics import structural_similarity

    check_pair(restored, truth)
    ours, theirs = (
        _select(image, protocol, smallest=SSIM_WINDOW).cpu().numpy() for image in (restored, truth)
    )
    values = [
        structural_similarity(
            one,
            other,
            data_range=1,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for one, other in zip(ours, theirs, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def _select(image: Tensor, protocol: Protocol, smallest: int) -> Tensor:
    """What the protocol compares, float64; ValueError where less than `smallest` pixels a side remain."""
    height, width = image.shape[-2:]
    remaining = (height - 2 * protocol.crop, width - 2 * protocol.crop)
    if min(remaining) < smallest:
        raise ValueError(
            f"{height}x{width} less {protocol.crop} pixels at each border is {remaining[0]}x{remaining[1]}, "
            f"and {smallest}x{smallest} is needed; use a larger image or a smaller crop"
        )
    image = _to_float64(image)
    if protocol.quantize:
        image = round_to_uint8(image)
    if protocol.channel == "luma":
        image = to_luma(image)
    return image[..., protocol.crop : height - protocol.crop, protocol.crop : width - protocol.crop]


def low_resolution_psnr(restored: Tensor, low_res: Tensor, border: Border = "mirror") -> Tensor:
    """PSNR in dB of the restored image, shrunk again, against the input: does it explain what was seen?

    The "LR-PSNR" of Li et al. 2022, "SRDiff": the restored image is rounded to uint8, shrunk as MATLAB's
    `imresize` shrinks a uint8 image (rounded after each pass), and compared with the uint8 input over all
    channels and pixels. The truth scores inf if the input was made from it in this very way; about 50 dB and
    more means that what differs is the rounding.

    Args:
        restored: (B, C, H, W) in [0, 1].
        low_res: (B, C, h, w) in [0, 1], h <= H and w <= W.
        border: what the shrinking saw beyond the edge when the input was made.

    Returns:
        (B,), inf where nothing differs.

    Raises:
        ValueError: batch or channels differ, values are not in [0, 1], or the restored image is smaller.
    """
    check_images("restored", restored)
    check_images("low_res", low_res)
    (height, width), size = restored.shape[-2:], (low_res.shape[-2], low_res.shape[-1])
    if restored.shape[:2] != low_res.shape[:2] or height < size[0] or width < size[1]:
        raise ValueError(
            f"restored is {tuple(restored.shape)} and low_res is {tuple(low_res.shape)}; give the restored, "
            "larger image first, with the same batch and channels"
        )
    shrunk = resize(to_uint8(restored), size=size, border=border, rounding="uint8")
    error = (shrunk.to(torch.float64) - to_uint8(low_res)) / 255
    return -10 * error.square().mean(dim=(1, 2, 3)).log10()


def to_uint8(image: Tensor) -> Tensor:
    """What an 8-bit file would hold, any shape in [0, 1] to uint8; halves go up."""
    return (round_to_uint8(_to_float64(image)) * 255).round().to(torch.uint8)


# ---------------------------------------------------------------- texture


def high_frequency_energy(restored: Tensor, truth: Tensor) -> Tensor:
    """Energy of fine detail relative to the truth: 1 is right, less is blur, more is noise.

    The power spectrum of the luma, mean removed, is summed over the radial frequencies 0.35 to 0.9 of
    Nyquist: from x3 up, none of these exist in the low-resolution image, so the model alone put them there.
    The ratio is one of powers: twice the amplitude is 4. Average it over images with `geometric_mean`.

    Args:
        restored, truth: (B, C, H, W) in [0, 1]; any height and width from 16, odd ones too.

    Returns:
        (B,), 0 or more; nan where the truth has no such energy (a flat image).

    Raises:
        ValueError: shapes differ, values are not in [0, 1], or a side is shorter than 16.
    """
    check_pair(restored, truth)
    height, width = truth.shape[-2:]
    if min(height, width) < _SMALLEST_SPECTRUM:
        raise ValueError(
            f"{height}x{width} is too small for a spectrum; give {_SMALLEST_SPECTRUM} pixels or more"
        )
    energy, reference = band_energy(restored), band_energy(truth)
    return torch.where(reference > _FLAT_POWER, energy / reference, torch.nan)


def band_energy(image: Tensor, band: tuple[float, float] = DETAIL_BAND) -> Tensor:
    """Mean power per pixel of the luma within a band of radial frequencies, behind a Hann window.

    Args:
        image: (B, C, H, W) in [0, 1].
        band: lowest and highest frequency; 1 is Nyquist.

    Returns:
        (B,), float64.
    """
    luma = to_luma(_to_float64(image))[:, 0]  # (B, H, W)
    luma = luma - luma.mean(dim=(-2, -1), keepdim=True)
    height, width = luma.shape[-2:]
    # Without a window, the jump from one border to the opposite one would spread over all frequencies:
    # bicubic x4 of Set5 would read 0.15 of the truth's energy instead of 0.014.
    window = torch.outer(_hann(height), _hann(width)).to(luma)
    radius = torch.hypot(_frequencies(height)[:, None], _frequencies(width)[None, :]).to(luma)
    power: Tensor = torch.fft.fft2(luma * window, norm="forward").abs().square()
    inside = (radius >= band[0]) & (radius <= band[1])
    return power[:, inside].sum(dim=-1)


def _hann(length: int) -> Tensor:
    window: Tensor = torch.hann_window(length, periodic=False, dtype=torch.float64)
    return window


def _frequencies(length: int) -> Tensor:
    """Of each coefficient of a discrete Fourier transform; 1 is the Nyquist frequency."""
    frequencies: Tensor = torch.fft.fftfreq(length, d=0.5, dtype=torch.float64)
    return frequencies


def geometric_mean(ratios: Tensor) -> float:
    """exp(mean(log(ratio))) of a tensor of ratios, any shape: twice and half the energy average to 1.

    A ratio of 0 makes the mean 0, and nan stays nan.

    Raises:
        ValueError: there is no ratio, or a negative one.
    """
    if ratios.numel() == 0 or bool((ratios < 0).any()):
        raise ValueError(f"geometric mean of {ratios.tolist()}; give one ratio or more, none negative")
    return _to_float64(ratios).log().mean().exp().item()


# ---------------------------------------------------------------- uncertainty


def uncertainty_correlation(
    deviation: Tensor, restored: Tensor, truth: Tensor, *, ranks: bool = False
) -> float:
    """Does the deviation of several samples tell where their mean is wrong? 1 is perfect, 0 is no use.

    Args:
        deviation: (H, W), standard deviation over the samples, root mean square over the channels.
        restored: (1, C, H, W) in [0, 1], the mean of the samples.
        truth: (1, C, H, W) in [0, 1].
        ranks: Spearman's coefficient instead of Pearson's.

    Returns:
        The correlation over the pixels with the error (root mean square over the channels); nan where one of
        the two is the same everywhere.

    Raises:
        ValueError: shapes differ, or values are not in [0, 1].
    """
    from scipy import stats

    check_pair(restored, truth)
    if deviation.shape != truth.shape[-2:]:
        raise ValueError(f"deviation is {tuple(deviation.shape)}, and the image {tuple(truth.shape[-2:])}")
    error = (_to_float64(restored) - _to_float64(truth)).square().mean(dim=(0, 1)).sqrt()
    x, y = (_to_float64(values).cpu().flatten().numpy() for values in (deviation, error))
    if x.min() == x.max() or y.min() == y.max():
        return float("nan")
    found = stats.spearmanr(x, y) if ranks else stats.pearsonr(x, y)
    return float(found.statistic)
