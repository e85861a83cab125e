"""Degradation: how a low-resolution image came from a high-resolution one, which restoring undoes.

The checkpoint records it; dataset, loss, validation, evaluation and consistency use the same object. A new
kind is a line in KINDS; a new stage is its options and a line in `_degraded`.

Shapes: C channels, H x W pixels of the high resolution, h x w of the low one, k x k of a kernel.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Self, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import torch
from scipy.special import j1
from torch import Tensor

from bicubic import Border, resize
from engine.options import OptionError, Options, option, rare_option, specs

Image: TypeAlias = npt.NDArray[np.floating[Any]]  # (H, W) or (H, W, 3), blue first as in OpenCV, in [0, 1]
Range: TypeAlias = tuple[float, float]
Shares: TypeAlias = tuple[float, ...]
Random: TypeAlias = np.random.Generator

# The options of each kind: its strength, and any others whose default it changes.
KINDS: dict[str, dict[str, Any]] = {
    "bicubic": {"strength": 0.0},
    "light": {"strength": 0.25},
    "photo": {"strength": 0.5},
    "heavy": {"strength": 1.0},
}
# Rows are luma, Cb and Cr of JPEG (ITU-T T.871), columns blue, green and red; with half the luma.
GRAIN_TO_BLUE_GREEN_RED = np.array(
    [[0.5, 0.5, 0.5], [1.772, -0.344136, 0], [0, -0.714136, 1.402]], np.float32
)
MARGIN = 8  # low-resolution pixels more than a crop, so that it has any place in JPEG's grid


def share(default: float, of: str, rare: bool = True) -> Any:  # noqa: ANN401  # as option
    return option(default, f"share of {of}", low=0, high=1, rare=rare)


@dataclass(frozen=True)
class Degradation(Options):
    """Blur, resizing, noise and JPEG, twice, as Real-ESRGAN (Wang et al. 2021, sections 3.2 to 3.4).

    Each amount is drawn evenly from its range, scaled by the strength. Strength 0 is MATLAB's bicubic, in
    uint8 after each pass as the published test images are. Deviations and cutoffs are in pixels of the image
    that they are applied to, noise is in units of an 8-bit value.
    """

    # A name that KINDS lacks may be recorded: the amounts are recorded, too.
    kind: str = option("bicubic", f"preset of the amounts: {', '.join(KINDS)}", flag="degradation")
    scale: float = option(4.0, "factor by which the input is smaller", flag="downscale_factor", above=1)
    border: Border = option("mirror", "pixels that bicubic sees beyond the edge of an image")
    strength: float | None = option(
        None, "factor of every amount; by default light 0.25, photo 0.5, heavy 1", low=0, high=1
    )
    clean_share: float = share(0.1, "samples that bicubic alone shrinks", rare=False)
    kernel_shares: Shares = rare_option(
        (0.63, 0.135, 0.135, 0.1), "shares of Gaussian, generalised Gaussian, plateau and sinc kernels", low=0
    )
    isotropic_share: float = share(0.65, "kernels that are round")
    blur_sigma: Range = option((0.2, 3.0), "deviation of the first blur", above=0)
    second_blur_sigma: Range = rare_option((0.2, 1.5), "deviation of the second blur", above=0)
    second_blur_share: float = share(0.8, "samples that are blurred twice")
    gaussian_shape: Range = rare_option((0.5, 4.0), "exponents of generalised Gaussians", above=0)
    plateau_shape: Range = rare_option((1.0, 2.0), "exponents of plateaus", above=0)
    sinc_size: tuple[int, ...] = rare_option((7, 21), "sides of sinc kernels; odd ones are drawn", low=3)
    sinc_cutoff: Range = rare_option((0.33, 1.0), "cutoffs of sinc kernels, 1 is Nyquist", above=0, high=1)
    final_sinc_share: float = share(0.8, "samples that end with a sinc filter")
    first_resize: Range = rare_option((0.15, 1.5), "factors of the first resize", above=0)
    second_resize: Range = rare_option((0.3, 1.2), "factors of the second, from the low resolution", above=0)
    resize_shares: Shares = rare_option((0.2, 0.7, 0.1), "shares of first resizes up, down and by 1", low=0)
    second_resize_shares: Shares = rare_option((0.3, 0.4, 0.3), "shares of second resizes, likewise", low=0)
    noise_sigma: Range = option((1.0, 30.0), "deviation of the first Gaussian noise", low=0)
    second_noise_sigma: Range = option((1.0, 25.0), "deviation of the second Gaussian noise", low=0)
    poisson_scale: Range = rare_option((0.05, 3.0), "factor of the first noise of 256 photons", low=0)
    second_poisson_scale: Range = rare_option((0.05, 2.5), "factor of the second noise of 256 photons", low=0)
    gaussian_share: float = share(0.5, "noise that is Gaussian, not Poisson's")
    grey_share: float = share(0.4, "noise that is the same in all channels")
    grain_share: float = share(0.0, "samples with coarse coloured grain, as of small sensors", rare=False)
    grain_sigma: Range = rare_option((1.0, 16.0), "deviation of the grain's chroma; luma's is half", low=0)
    grain_size: Range = rare_option((0.5, 1.5), "deviation of the blur that smears the grain", above=0)
    jpeg_quality: Range = option((30.0, 95.0), "quality of JPEG, both times", low=1, high=100)
    jpeg_share: float = share(1.0, "these JPEGs that are made; without them noise stays white", rare=False)

    @classmethod
    def of(cls, **given: Any) -> Self:  # noqa: ANN401  # any option
        """Build a kind, with the given options instead of the kind's; OptionError names a wrong one."""
        kind = given.get("kind", "bicubic")
        if kind not in KINDS:
            raise OptionError("kind", kind, f"choose one of {', '.join(KINDS)}")
        amounts = sorted(given.keys() - {"kind", "scale", "border"})
        if amounts and not KINDS[kind]["strength"]:
            raise OptionError(amounts[0], given[amounts[0]], f"{kind} has none: choose another degradation")
        return cls(**{**KINDS[kind], **given})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength is None:
            object.__setattr__(self, "strength", KINDS.get(self.kind, {"strength": 1.0})["strength"])
        for name in specs(type(self)):
            value = getattr(self, name)
            if name.endswith("_shares"):
                wanted = 4 if name == "kernel_shares" else 3
                if len(value) != wanted or not math.isclose(sum(value), 1, abs_tol=1e-8):
                    raise OptionError(name, value, f"give {wanted} shares whose sum is 1")
            elif isinstance(value, tuple) and (len(value) != 2 or value[0] > value[1]):
                raise OptionError(name, value, "give the lowest and the highest value")
            elif name.endswith("_resize") and not value[0] <= 1 <= value[1]:
                raise OptionError(name, value, "1 must lie between them")

    @property
    def amount(self) -> float:
        return self.strength or 0.0

    @property
    def random(self) -> bool:
        """True where amounts are drawn: for one image, on the CPU; bicubic takes batches on any device."""
        return self.amount > 0

    @property
    def margin(self) -> int:
        """Count the low-resolution pixels beyond a crop that must be degraded with it."""
        return MARGIN if self.random else 0

    def __call__(self, high_res: Tensor, random: Random | None = None) -> Tensor:
        """(1 or 3, H, W) uint8 -> (1 or 3, h, w) uint8, h = ceil(H / scale); bicubic takes (..., C, H, W)."""
        alone = high_res.ndim == 3 and len(high_res) in (1, 3)
        if high_res.dtype != torch.uint8 or (self.random and not alone):
            given = f"{tuple(high_res.shape)} of {high_res.dtype}"
            raise ValueError(f"{given}: expected (1 or 3, H, W) of torch.uint8")
        if not self.random:
            return resize(high_res, scale=1 / self.scale, border=self.border, rounding="uint8")
        if random is None:
            raise ValueError(f"the degradation {self.kind} draws its amounts: give it a generator")
        if random.random() < self.clean_share:
            return replace(self, strength=0.0)(high_res)
        height, width = (math.ceil(n / self.scale * (1 - 1e-12)) for n in high_res.shape[-2:])
        pixels = high_res.numpy()[::-1].transpose(1, 2, 0)  # blue first
        image = np.float32(1 / 255) * (pixels[..., 0] if len(high_res) == 1 else pixels)
        threads = cv2.getNumThreads()
        cv2.setNumThreads(0)  # a pool of threads would not survive the fork of a data loader
        try:
            degraded = to_bytes(self._degraded(image, height, width, random))
        finally:
            cv2.setNumThreads(threads)
        planes = np.atleast_3d(degraded).transpose(2, 0, 1)[::-1]
        return torch.from_numpy(np.ascontiguousarray(planes))

    def _degraded(self, image: Image, height: int, width: int, random: Random) -> Image:
        image = filtered(image, self.blur_kernel(self.blur_sigma, random))
        factor = self._factor(self.first_resize, self.resize_shares, random)
        image = resized(image, factor * image.shape[0], factor * image.shape[1], random)
        image = self._noisy(image, self.noise_sigma, self.poisson_scale, random)
        image = self._compressed(image, random)
        if random.random() < self.second_blur_share:
            image = filtered(image, self.blur_kernel(self.second_blur_sigma, random))
        factor = self._factor(self.second_resize, self.second_resize_shares, random)
        image = resized(image, factor * height, factor * width, random)
        image = self._noisy(image, self.second_noise_sigma, self.second_poisson_scale, random)
        if self.grain_share and random.random() < self.grain_share:
            sigma, size = self.amount * random.uniform(*self.grain_sigma), random.uniform(*self.grain_size)
            image = image + grain(image.shape, sigma, size, random)
        sinc_first = random.random() < 0.5
        image = image if sinc_first else self._compressed(image, random)
        image = resized(image, height, width, random)
        if random.random() < self.final_sinc_share:
            image = filtered(image, self._sinc(random))
        return self._compressed(image, random) if sinc_first else image

    def describe(self) -> str:
        if not self.random:
            edge = "mirrored" if self.border == "mirror" else "replicated"
            return f"made by MATLAB's bicubic (antialiased, a = -0.5), {edge} border, uint8 after each pass"
        what = f"{self.kind}: blur, resize, noise and JPEG as in Real-ESRGAN, strength {self.amount:g}"
        return f"{what}, a share of {self.clean_share:g} bicubic"

    def blur_kernel(self, sigmas: Range, random: Random) -> Image:
        """Draw a kernel (k, k) of one of the four families; all but sinc end at three deviations."""
        family = random.choice(4, p=self.kernel_shares)
        if family == 3:
            return self._sinc(random)
        wide, high = (self.amount * random.uniform(*sigmas) for _ in range(2))
        if random.random() < self.isotropic_share:
            high = wide
        shape = random.uniform(*((1, 1), self.gaussian_shape, self.plateau_shape)[family])
        size = 2 * math.ceil(3 * max(wide, high)) + 1
        return bell_kernel(size, (wide, high), random.uniform(0, math.pi), shape, plateau=family == 2)

    def _sinc(self, random: Random) -> Image:
        low, high = self.sinc_size
        size = 2 * int(random.integers(low // 2, (high - 1) // 2 + 1)) + 1
        return sinc_kernel(size, 1 - self.amount * (1 - random.uniform(*self.sinc_cutoff)))

    def _factor(self, sizes: Range, shares: Shares, random: Random) -> float:
        """Draw the factor of a resize; the strength scales its logarithm."""
        ranges = ((1, sizes[1]), (sizes[0], 1), (1, 1))
        return float(random.uniform(*ranges[random.choice(3, p=shares)]) ** self.amount)

    def _noisy(self, image: Image, sigmas: Range, scales: Range, random: Random) -> Image:
        grey = random.random() < self.grey_share
        if random.random() < self.gaussian_share:
            return gaussian_noise(image, self.amount * random.uniform(*sigmas), grey, random)
        return poisson_noise(image, self.amount * random.uniform(*scales), grey, random)

    def _compressed(self, image: Image, random: Random) -> Image:
        # At 1 nothing is drawn: the presets keep the samples that weights/RESULTS.md was measured on.
        if self.jpeg_share < 1 and random.random() >= self.jpeg_share:
            return image
        quality = 100 - self.amount * (100 - random.uniform(*self.jpeg_quality))
        pixels: Any = cv2.imdecode(jpeg(image, round(quality)), cv2.IMREAD_UNCHANGED)
        return np.asarray(np.float32(1 / 255) * pixels)


def bell_kernel(size: int, sigmas: Range, angle: float, shape: float, *, plateau: bool) -> Image:
    """Compute a generalised Gaussian or a plateau (k, k) of sum 1 (Liu et al. 2020).

    `sigmas` are two deviations in pixels, `angle` is of the first in radians, `shape` the exponent of the
    squared distance: 1 is Gaussian.
    """
    across = np.arange(size) - size // 2
    down = across[:, None]
    cos, sin = math.cos(angle), math.sin(angle)
    along, beside = (cos * across + sin * down) / sigmas[0], (cos * down - sin * across) / sigmas[1]
    distance = (along**2 + beside**2) ** shape
    kernel = 1 / (1 + distance) if plateau else np.exp(-0.5 * distance)
    return np.asarray(kernel / kernel.sum(), np.float32)


def sinc_kernel(size: int, cutoff: float) -> Image:
    """Compute the ideal low-pass filter of circular cutoff, 1 is Nyquist, cut to (k, k), of sum 1."""
    offsets = np.arange(size) - size // 2
    radius, frequency = np.hypot(offsets, offsets[:, None]), math.pi * cutoff
    radius[size // 2, size // 2] = 1  # any but 0; the limit follows
    kernel = frequency * j1(frequency * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = frequency**2 / (4 * math.pi)
    return np.asarray(kernel / kernel.sum(), np.float32)


def filtered(image: Image, kernel: Image) -> Image:
    """Convolve with a kernel; the image is mirrored beyond its edge."""
    return np.asarray(cv2.filter2D(image, -1, kernel), np.float32)


def resized(image: Image, height: float, width: float, random: Random) -> Image:
    """Resize to the nearest whole size, at least 1, by area, bilinear or bicubic."""
    size = (max(1, round(width)), max(1, round(height)))
    how = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)[random.integers(3)]
    return np.asarray(cv2.resize(image, size, interpolation=how), np.float32)


def gaussian_noise(image: Image, sigma: float, grey: bool, random: Random) -> Image:
    """Add noise of deviation `sigma` in 8-bit values; grey noise is the same in all channels."""
    shape = (*image.shape[:2], *(1 if grey else n for n in image.shape[2:]))
    return image + np.float32(sigma / 255) * random.standard_normal(shape, dtype=np.float32)


def poisson_noise(image: Image, scale: float, grey: bool, random: Random) -> Image:
    """Add the noise of 256 photons in white, times scale: variance scale^2 x / 256 where the image is x."""
    light = image.clip(0, 1)
    if grey and light.ndim == 3:
        light = cv2.cvtColor(light, cv2.COLOR_BGR2GRAY)[..., None]
    noise = random.poisson(256 * light).astype(np.float32) / 256 - light
    return np.asarray(image + np.float32(scale) * noise)


def grain(shape: tuple[int, ...], sigma: float, size: float, random: Random) -> Image:
    """Make noise that demosaicking and noise reduction have smeared, in [-1, 1] of the image's range.

    `sigma` is the deviation of Cb and Cr in 8-bit values; luma has half of it, and a grey image all of it.
    `size` is the deviation in pixels of the Gaussian that smears them.
    """
    kernel = bell_kernel(2 * math.ceil(3 * size) + 1, (size, size), 0, 1, plateau=False)
    deviation = np.float32(sigma / 255 / np.sqrt(np.square(kernel).sum()))
    noise = filtered(deviation * random.standard_normal(shape, dtype=np.float32), kernel)
    return noise if len(shape) == 2 else np.asarray(noise @ GRAIN_TO_BLUE_GREEN_RED)


def to_bytes(image: Image) -> npt.NDArray[np.uint8]:
    return np.asarray(np.rint(image.clip(0, 1) * 255), np.uint8)


def jpeg(image: Image, quality: int) -> Any:  # noqa: ANN401  # OpenCV takes and gives arrays of bytes
    """Encode as a JPEG file with chroma at half resolution."""
    return cv2.imencode(".jpg", to_bytes(image), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
