"""How close a restored image is to the truth, how consistent with its input, and how real its texture looks.

Shapes: B images, C channels (1 grey or 3 RGB), H height, W width, N samples of one restoration.
Ranges: every image is floating point in [0, 1]; uint8 values divided by 255. Overshoot a little outside is
accepted, images in [-1, 1] or [0, 255] are refused. Results per image are float64.

Published tables differ by more than the methods they compare when luma, crop, rounding or the SSIM window
differ, so `psnr` and `ssim` take a `Protocol` that says all of it and prints it in one line. The protocol of
the accepted tables is `Protocol(crop=scale)`: images rounded to uint8 as a file would hold them, BT.601 luma
in 16-235 computed from those without rounding again, `scale` pixels cropped from each border.

The bicubic rows of those tables came about differently: the truth was first reduced to luma and rounded to
uint8, then shrunk and enlarged in double precision, and rounded to uint8 at the end. A grey image is its own
luma here, so that procedure needs no other metric, only other images: `tests/test_metrics.py` reproduces the
rows of Set5 and BSD100 (x2, x3, x4) to 0.005 dB and 0.0002 SSIM. Bicubic applied to RGB in uint8 differs
from them by up to 0.013 dB and 0.0008 SSIM.
"""

import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bicubic import Border, resize

_SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5
_PATCH = 7  # side of the patches that the sliced Wasserstein distance compares
_DIRECTIONS_AT_ONCE = 128  # bounds the memory of the sort
DETAIL_BAND = (0.35, 0.9)  # fractions of the Nyquist frequency
_SMALLEST_SPECTRUM = 16
_FLAT_POWER = 1e-10  # a hundred times below one uint8 step, squared
_SMALLEST_LPIPS = 32


class MetricUnavailableError(RuntimeError):
    """A metric that needs a package or weights which cannot be had; the message says why in one line."""


@dataclass(frozen=True)
class Protocol:
    """What `psnr` and `ssim` compare.

    Args:
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
        window = f"SSIM {_SSIM_WINDOW}x{_SSIM_WINDOW} Gaussian, sigma {_SSIM_SIGMA}, valid windows"
        return f"{channel}; {rounding}; {self.crop} pixels cropped from each border; {window}"


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


def _check_images(name: str, images: Tensor, dimensions: int = 4) -> None:
    """Refuse what cannot be images in [0, 1]; bicubic overshoot, up to 0.3 for two passes, is let through."""
    if images.ndim != dimensions or images.numel() == 0:
        shape = {3: "(C, H, W)", 4: "(B, C, H, W)", 5: "(N, B, C, H, W)"}[dimensions]
        raise ValueError(f"{name} has shape {tuple(images.shape)}; give {shape}, none of them 0")
    if not images.is_floating_point():
        raise ValueError(f"{name} is {images.dtype}; give floating point in [0, 1] (uint8 divided by 255)")
    lowest, highest = images.min().item(), images.max().item()
    if not (lowest > -0.5 and highest < 1.5):  # also true for nan
        raise ValueError(f"{name} spans {lowest:.3g} to {highest:.3g}; metrics take images in [0, 1]")


def _check_pair(restored: Tensor, truth: Tensor) -> None:
    if restored.shape != truth.shape:
        raise ValueError(
            f"restored is {tuple(restored.shape)} and truth is {tuple(truth.shape)}; give both the same "
            "channels, and crop the truth (top-left) to a multiple of the scale"
        )
    _check_images("restored", restored)
    _check_images("truth", truth)


def _to_float64(image: Tensor) -> Tensor:
    device = torch.device("cpu") if image.device.type == "mps" else image.device  # MPS has no float64
    return image.to(device, torch.float64)


def _filter(image: Tensor, taps: Sequence[float]) -> Tensor:
    """Separable correlation over H and W, valid part: (..., H, W) to (..., H - K + 1, W - K + 1) for K taps.

    Shifted sums instead of a convolution: seven times faster in float64 on a CPU.
    """
    for dim in (-2, -1):
        length = image.shape[dim] - len(taps) + 1
        total = image.narrow(dim, 0, length) * taps[0]
        for shift, tap in enumerate(taps[1:], start=1):
            total.add_(image.narrow(dim, shift, length), alpha=tap)
        image = total
    return image


# ---------------------------------------------------------------- fidelity


def psnr(restored: Tensor, truth: Tensor, protocol: Protocol) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / MSE), per image: two (B, C, H, W) in [0, 1] to (B,).

    For RGB the squared error is averaged over the channels before the logarithm. Identical images give inf.

    Raises:
        ValueError: shapes differ, values are not in [0, 1], or the crop leaves nothing.
    """
    _check_pair(restored, truth)
    error = _select(restored, protocol, smallest=1) - _select(truth, protocol, smallest=1)
    return -10 * error.square().mean(dim=(1, 2, 3)).log10()


def ssim(restored: Tensor, truth: Tensor, protocol: Protocol) -> Tensor:
    """Structural similarity per image, 1 for identical ones: two (B, C, H, W) in [0, 1] to (B,).

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", Eq. 13 with
    the constants of its section III-C and of the authors' MATLAB code: Gaussian window 11x11 of sigma 1.5,
    moments without the N - 1 correction, K1 = 0.01, K2 = 0.03, L = 255, windows that lie wholly inside the
    image. For RGB, the mean over the channels.

    Raises:
        ValueError: shapes differ, values are not in [0, 1], or less than one window remains after the crop.
    """
    _check_pair(restored, truth)
    x = _select(restored, protocol, smallest=_SSIM_WINDOW) * 255
    y = _select(truth, protocol, smallest=_SSIM_WINDOW) * 255
    offsets = [i - _SSIM_WINDOW // 2 for i in range(_SSIM_WINDOW)]
    taps = [math.exp(-(offset**2) / (2 * _SSIM_SIGMA**2)) for offset in offsets]
    taps = [tap / sum(taps) for tap in taps]
    mean_x, mean_y, square_x, square_y, product = _filter(torch.stack([x, y, x * x, y * y, x * y]), taps)
    variances = square_x - mean_x**2 + square_y - mean_y**2
    covariance = product - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


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

    Protocol (the "LR-PSNR" of Li et al. 2022, "SRDiff", which reports 53.7 dB): the restored image is rounded
    to uint8, shrunk as MATLAB's `imresize` shrinks a uint8 image (rounded after each pass), and compared with
    the uint8 input over all channels and all pixels. Rounding the restored image first measures what the user
    gets in a file; the truth then scores inf if the input was made from it in this very way, and about 50 dB
    and more means that what differs is the rounding.

    Args:
        restored: (B, C, H, W) in [0, 1].
        low_res: (B, C, h, w) in [0, 1], h <= H and w <= W.
        border: what the shrinking saw beyond the edge when the input was made.

    Returns:
        (B,), inf where nothing differs.

    Raises:
        ValueError: batch or channels differ, values are not in [0, 1], or the restored image is smaller.
    """
    _check_images("restored", restored)
    _check_images("low_res", low_res)
    (height, width), size = restored.shape[-2:], (low_res.shape[-2], low_res.shape[-1])
    if restored.shape[:2] != low_res.shape[:2] or height < size[0] or width < size[1]:
        raise ValueError(
            f"restored is {tuple(restored.shape)} and low_res is {tuple(low_res.shape)}; give the restored, "
            "larger image first, with the same batch and channels"
        )
    shrunk = resize(_as_uint8(restored), size=size, border=border, rounding="uint8")
    error = (shrunk.to(torch.float64) - _as_uint8(low_res)) / 255
    return -10 * error.square().mean(dim=(1, 2, 3)).log10()


def _as_uint8(image: Tensor) -> Tensor:
    """What a file would hold, as integers in 0..255."""
    return (round_to_uint8(_to_float64(image)) * 255).round().to(torch.uint8)


# ---------------------------------------------------------------- texture


def high_frequency_energy(restored: Tensor, truth: Tensor) -> Tensor:
    """Energy of fine detail relative to the truth: 1 is right, less is blur, more is noise.

    The power spectrum of the luma, mean removed, is summed over the radial frequencies 0.35 to 0.9 of
    Nyquist: from x3 up, none of these exist in the low-resolution image, so the model alone put them there. A
    Hann window fades the image out at its borders: the jump from one border to the opposite one would spread
    over all frequencies (bicubic x4 of Set5 then reads 0.15 instead of 0.014). The ratio is one of powers:
    twice the amplitude is 4. It says nothing of position; average it over images with `geometric_mean`.

    Args:
        restored, truth: (B, C, H, W) in [0, 1]; any height and width from 16, odd ones too.

    Returns:
        (B,), 0 or more; nan where the truth has no such energy (a flat image).

    Raises:
        ValueError: shapes differ, values are not in [0, 1], or a side is shorter than 16.
    """
    _check_pair(restored, truth)
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
    luma = to_luma(_to_float64(image))[:, 0]  #                                     (B, H, W)
    luma = luma - luma.mean(dim=(-2, -1), keepdim=True)
    height, width = luma.shape[-2:]
    window = torch.outer(_hann(height), _hann(width)).to(luma)
    radius = torch.hypot(_frequencies(height)[:, None], _frequencies(width)[None, :]).to(luma)
    power = torch.fft.fft2(luma * window, norm="forward").abs().square()
    return power[:, (radius >= band[0]) & (radius <= band[1])].sum(dim=-1)


def _hann(length: int) -> Tensor:
    return torch.hann_window(length, periodic=False, dtype=torch.float64)


def _frequencies(length: int) -> Tensor:
    """Of each coefficient of a discrete Fourier transform; 1 is the Nyquist frequency."""
    return torch.fft.fftfreq(length, d=0.5, dtype=torch.float64)


def geometric_mean(ratios: Tensor) -> float:
    """exp(mean(log(ratio))) of a tensor of ratios, any shape: twice and half the energy average to 1.

    A ratio of 0 makes the mean 0, and nan stays nan.

    Raises:
        ValueError: there is no ratio, or a negative one.
    """
    if ratios.numel() == 0 or bool((ratios < 0).any()):
        raise ValueError(f"geometric mean of {ratios.tolist()}; give one ratio or more, none negative")
    return _to_float64(ratios).log().mean().exp().item()


class SlicedWasserstein(NamedTuple):
    """Sliced Wasserstein distances times 1000: their mean, and one for each pyramid level, finest first.

    Karras et al. 2018, "Progressive growing of GANs", section 5: random 7x7 patches from each level of a
    Laplacian pyramid, normalised per channel, projected on random directions of the unit sphere; the mean
    absolute difference of the sorted projections, averaged over directions. The last level is the low-pass
    remainder of the pyramid.
    """

    average: float
    per_level: tuple[float, ...]


def sliced_wasserstein_distance(
    restored: Sequence[Tensor],
    truth: Sequence[Tensor],
    *,
    seed: int,
    levels: int = 3,
    patches_per_image: int = 512,
    directions: int = 512,
    statistics: Literal["truth", "own"] = "truth",
) -> SlicedWasserstein:
    """Distance between two sets of images as distributions of local texture; 0 for a set and itself.

    Images of equal size and index give patches at the same positions. Sorting forgets which patch came from
    where, so this removes sampling noise (30 to 40 at 512 patches of each Set5 image) and compares no pixels.

    Args:
        restored, truth: equally many images (C, H, W) in [0, 1], of any sizes, of the same scenes or not.
        seed: of positions and directions. Compare only results of equal settings.
        levels: of the pyramid, each half as large as the one before.
        patches_per_image: at each level. Karras et al. take 128 of 16384 images; few photos need more.
        statistics: whose mean and deviation normalise the restored patches. "own", as the code of Karras et
            al., is symmetric and cannot see that all texture has half its contrast; "truth" can.

    Raises:
        ValueError: the sets differ in number or channels, an image is too small, or a set is flat.
    """
    _check_sets(restored, truth, levels)
    if min(patches_per_image, directions) < 1 or statistics not in ("truth", "own"):
        given = f"patches_per_image={patches_per_image}, directions={directions}, statistics={statistics!r}"
        raise ValueError(f"{given}; give 1 or more of the first two, and 'truth' or 'own'")
    ours = _pyramid_patches(restored, levels, patches_per_image, seed)
    theirs = _pyramid_patches(truth, levels, patches_per_image, seed)
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for found, reference in zip(ours, theirs, strict=True):
        restored_set = _normalize(found, reference if statistics == "truth" else found)
        true_set = _normalize(reference, reference)
        distances.append(1000 * _sliced_distance(restored_set, true_set, directions, generator))
    return SlicedWasserstein(sum(distances) / levels, tuple(distances))


def _check_sets(restored: Sequence[Tensor], truth: Sequence[Tensor], levels: int) -> None:
    if levels < 1:
        raise ValueError(f"levels is {levels}; a pyramid has 1 or more")
    if len(restored) != len(truth) or not truth:
        raise ValueError(f"{len(restored)} restored and {len(truth)} true images; give as many of both")
    smallest = (_PATCH - 1) * 2 ** (levels - 1) + 1  # each level keeps ceil(size / 2) pixels
    for name, images in (("restored", restored), ("truth", truth)):
        for image in images:
            _check_images(name, image, dimensions=3)
            if image.shape[0] != truth[0].shape[0]:
                raise ValueError(
                    f"{name} has {image.shape[0]} channels, the first true image {truth[0].shape[0]}"
                )
            if min(image.shape[1:]) < smallest:
                raise ValueError(
                    f"{name} has an image of {image.shape[1]}x{image.shape[2]}, and {levels} levels need "
                    f"{smallest} pixels a side; use fewer levels or larger images"
                )


def _pyramid_patches(images: Sequence[Tensor], levels: int, count: int, seed: int) -> list[Tensor]:
    """`count` random patches of every image, one tensor (images * count, C, 7, 7) for each pyramid level."""
    generator = torch.Generator().manual_seed(seed)  # the same for both sets: the same positions
    found: list[list[Tensor]] = [[] for _ in range(levels)]
    for image in images:
        for level, band in enumerate(_laplacian_pyramid(image.float(), levels)):
            windows = band.unfold(1, _PATCH, 1).unfold(2, _PATCH, 1)  #             (C, H - 6, W - 6, 7, 7)
            rows = torch.randint(windows.shape[1], (count,), generator=generator).to(band.device)
            columns = torch.randint(windows.shape[2], (count,), generator=generator).to(band.device)
            found[level].append(windows[:, rows, columns].transpose(0, 1))  #       (count, C, 7, 7)
    return [torch.cat(patches) for patches in found]


def _laplacian_pyramid(image: Tensor, levels: int) -> list[Tensor]:
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
    return _filter(F.pad(image, (2, 2, 2, 2), mode="reflect"), [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16])


def _normalize(patches: Tensor, scale_by: Tensor) -> Tensor:
    """Flat descriptors (n, C * 49) with each channel shifted and divided by the statistics of `scale_by`."""
    mean = scale_by.mean(dim=(0, 2, 3), keepdim=True)
    deviation = scale_by.std(dim=(0, 2, 3), keepdim=True, correction=0)
    if bool((deviation < 1e-6).any()):
        raise ValueError("a set of images is flat, so its texture has no scale; leave such images out")
    return ((patches - mean) / deviation).flatten(start_dim=1)


def _sliced_distance(ours: Tensor, theirs: Tensor, directions: int, generator: torch.Generator) -> float:
    """Mean 1-Wasserstein distance of two (n, D) sets over random directions."""
    axes = torch.randn(directions, ours.shape[1], generator=generator)
    axes = F.normalize(axes, dim=1).to(ours)  # uniform on the unit sphere
    total = 0.0
    for some in axes.split(_DIRECTIONS_AT_ONCE):
        difference = (some @ ours.T).sort(dim=1).values - (some @ theirs.T).sort(dim=1).values
        total += difference.abs().mean(dim=1).sum().item()
    return total / directions


# ---------------------------------------------------------------- perception


class Lpips:
    """LPIPS (Zhang et al. 2018, "The unreasonable effectiveness of deep features"), AlexNet, version 0.1.

    Building one loads the network through torchmetrics, which fetches AlexNet (233 MB) once and keeps it in
    torch's hub folder. Build one and call it for all batches.

    Raises:
        MetricUnavailableError: torchmetrics or torchvision is missing, or the weights cannot be had.
    """

    def __init__(self, device: torch.device | str = "cpu", *, timeout: float = 20.0) -> None:
        """`timeout` is how many seconds the server may stay silent while the weights are fetched."""
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            with _network_timeout(timeout):
                network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        except (ImportError, OSError, RuntimeError) as error:
            # Not installed; no network, no space or no permission; a download that fails its checksum.
            reason = " ".join(str(error).split())
            raise MetricUnavailableError(f"LPIPS is unavailable: {type(error).__name__}: {reason}") from error
        self._network = network.to(device)
        self._device = torch.device(device)

    @torch.no_grad()
    def __call__(self, restored: Tensor, truth: Tensor) -> Tensor:
        """Distance per image, 0 for identical ones: two (B, C, H, W) in [0, 1], C 3 or 1 (repeated), to (B,).

        Values are clipped to [0, 1], as a file would hold them, but not rounded.

        Raises:
            ValueError: shapes differ, values are not in [0, 1], or a side is shorter than 32.
        """
        _check_pair(restored, truth)
        batch, channels, height, width = truth.shape
        if min(height, width) < _SMALLEST_LPIPS or channels not in (1, 3):
            raise ValueError(
                f"LPIPS got {channels} channels of {height}x{width}; "
                f"give 1 or 3, of {_SMALLEST_LPIPS} pixels or more"
            )
        ours, theirs = (
            image.to(self._device, torch.float32).clamp(0, 1).expand(batch, 3, height, width)
            for image in (restored, truth)
        )
        # One at a time: the library averages over what it is given.
        distances = [self._network(ours[i : i + 1], theirs[i : i + 1]) for i in range(batch)]
        self._network.reset()  # it keeps every score otherwise
        return torch.stack(distances)


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Bound the silence of connections opened inside; what fetches the weights sets no bound of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# ---------------------------------------------------------------- uncertainty


class UncertaintyCorrelation(NamedTuple):
    """Correlation of spread and error, each (B,) in [-1, 1] or nan: of the values, and of their ranks."""

    pearson: Tensor
    spearman: Tensor


def uncertainty_correlation(samples: Tensor, truth: Tensor) -> UncertaintyCorrelation:
    """Does the spread of several restorations tell where their mean is wrong? 1 is perfect, 0 is no use.

    For each pixel of each channel: the standard deviation over the samples against |mean of the samples -
    truth|. Spearman's coefficient gives ties their average rank. An image whose spread or error is the same
    everywhere has no correlation: nan.

    Args:
        samples: (N, B, C, H, W) in [0, 1], N >= 2 independent restorations of each image.
        truth: (B, C, H, W) in [0, 1].

    Raises:
        ValueError: fewer than two samples, shapes that differ, or values not in [0, 1].
    """
    _check_images("samples", samples, dimensions=5)
    _check_images("truth", truth)
    if samples.shape[0] < 2 or samples.shape[1:] != truth.shape:
        raise ValueError(
            f"samples are {tuple(samples.shape)} and truth is {tuple(truth.shape)}; "
            "give two samples or more, stacked before the batch"
        )
    samples, truth = _to_float64(samples), _to_float64(truth)
    spread = samples.std(dim=0).flatten(start_dim=1)  #                             (B, C * H * W)
    error = (samples.mean(dim=0) - truth).abs().flatten(start_dim=1)
    pairs = list(zip(spread, error, strict=True))
    return UncertaintyCorrelation(
        pearson=torch.stack([_pearson(a, b) for a, b in pairs]),
        spearman=torch.stack([_pearson(_ranks(a), _ranks(b)) for a, b in pairs]),
    )


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation coefficient of two (n,), a scalar; nan where one of them is constant."""
    if a.min() == a.max() or b.min() == b.max():
        return a.new_tensor(torch.nan)  # not left to rounding, which turns 0 / 0 into any number
    return torch.corrcoef(torch.stack([a, b]))[0, 1]


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 of (n,), equal values sharing their average rank."""
    _, position, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(values)
    return (last - (counts - 1) / 2)[position]
