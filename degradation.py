"""How a low-resolution image came from a high-resolution one: what training imitates and restoring undoes.

The checkpoint records it; dataset, loss, validation, evaluation and consistency use the same object. A new
one is a class here and its kinds in DEGRADATIONS.

Shapes: C channels, H x W pixels of the high resolution, h x w of the low one, k x k of a kernel.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import torch
from scipy.special import j1
from torch import Tensor

from bicubic import Border, resize
from engine.options import OptionError, Options, option, specs

Kind = Literal["bicubic", "light", "photo", "heavy"]
Image: TypeAlias = npt.NDArray[np.floating[Any]]  # (H, W) or (H, W, 3), blue first as in OpenCV, in [0, 1]
Range: TypeAlias = tuple[float, ...]
Random: TypeAlias = np.random.Generator


@dataclass(frozen=True)
class Bicubic(Options):
    """MATLAB's antialiased bicubic, rounded to uint8 after each pass as the published test images are."""

    random: ClassVar[bool] = False  # so that it runs batched, on any device
    margin: ClassVar[int] = 0  # nothing beyond a crop is degraded with it

    kind: Literal["bicubic"] = option("bicubic", "how low resolution is made", flag="degradation")
    scale: float = option(4.0, "how much smaller the input is", flag="downscale_factor", above=1)
    border: Border = option("mirror", "what bicubic sees beyond the edge of an image")

    def __call__(self, high_res: Tensor, random: Random | None = None) -> Tensor:
        """(..., C, H, W) uint8 -> (..., C, h, w) uint8, h = ceil(H / scale)."""
        return resize(high_res, scale=1 / self.scale, border=self.border, rounding="uint8")

    def describe(self) -> str:
        edge = "mirrored" if self.border == "mirror" else "replicated"
        return f"made by MATLAB's bicubic (antialiased, a = -0.5), {edge} border, uint8 after each pass"


STRENGTHS: dict[Kind, float] = {"bicubic": 0.0, "light": 0.25, "photo": 0.5, "heavy": 1.0}


@dataclass(frozen=True)
class Photo(Options):
    """Blur, resizing, noise and JPEG, twice, as Real-ESRGAN (Wang et al. 2021, sections 3.2 to 3.4).

    Each amount is drawn evenly from its range, scaled by the strength. Deviations and cutoffs are of the
    pixels they are applied to, noise is in units of an 8-bit value.
    """

    random: ClassVar[bool] = True  # one image at a time, on the CPU
    margin: ClassVar[int] = 8  # low-resolution pixels more than a crop: it has any place in JPEG's grid

    kind: Kind = option("photo", "how low resolution is made", flag="degradation")
    scale: float = option(4.0, "how much smaller the input is", flag="downscale_factor", above=1)
    border: Border = option("mirror", "what bicubic sees beyond the edge of an image")
    strength: float | None = option(
        None, "scales every amount; by default light 0.25, photo 0.5, heavy 1; 0 is bicubic", low=0, high=1
    )
    clean_share: float = option(0.1, "of samples that are bicubic's", low=0, high=1)
    kernel_shares: tuple[float, ...] = option(
        (0.63, 0.135, 0.135, 0.1), "of Gaussian, generalised Gaussian, plateau and sinc kernels", low=0
    )
    isotropic_share: float = option(0.65, "of kernels that are round", low=0, high=1)
    blur_sigma: tuple[float, ...] = option((0.2, 3.0), "deviation of the first blur", above=0)
    second_blur_sigma: tuple[float, ...] = option((0.2, 1.5), "deviation of the second blur", above=0)
    second_blur_share: float = option(0.8, "of samples blurred twice", low=0, high=1)
    gaussian_shape: tuple[float, ...] = option((0.5, 4.0), "exponents of generalised Gaussians", above=0)
    plateau_shape: tuple[float, ...] = option((1.0, 2.0), "exponents of plateaus", above=0)
    sinc_size: tuple[int, ...] = option((7, 21), "sides of sinc kernels; odd ones are drawn", low=3)
    sinc_cutoff: tuple[float, ...] = option((0.33, 1.0), "their cutoff, 1 is Nyquist", above=0, high=1)
    final_sinc_share: float = option(0.8, "of samples that end with a sinc filter", low=0, high=1)
    first_resize: tuple[float, ...] = option((0.15, 1.5), "smallest and largest first resize", above=0)
    second_resize: tuple[float, ...] = option((0.3, 1.2), "as it, relative to the low resolution", above=0)
    resize_shares: tuple[float, ...] = option((0.2, 0.7, 0.1), "of up, down, keep, first resize", low=0)
    second_resize_shares: tuple[float, ...] = option((0.3, 0.4, 0.3), "as it, second resize", low=0)
    noise_sigma: tuple[float, ...] = option((1.0, 30.0), "deviation of the first Gaussian noise", low=0)
    second_noise_sigma: tuple[float, ...] = option((1.0, 25.0), "of the second", low=0)
    poisson_scale: tuple[float, ...] = option((0.05, 3.0), "of the first noise of 256 photons", low=0)
    second_poisson_scale: tuple[float, ...] = option((0.05, 2.5), "of the second", low=0)
    gaussian_share: float = option(0.5, "of noise that is Gaussian, not Poisson's", low=0, high=1)
    grey_share: float = option(0.4, "of noise that is the same in all channels", low=0, high=1)
    jpeg_quality: tuple[float, ...] = option((30.0, 95.0), "of JPEG, both times", low=1, high=100)
    jpeg_share: float = option(
        1.0, "of these JPEGs that are made; without them noise stays white in colour", low=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in specs(type(self)):
            value = getattr(self, name)
            if name.endswith("_shares"):
                wanted = 4 if name == "kernel_shares" else 3
                if len(value) != wanted or not math.isclose(sum(value), 1, abs_tol=1e-6):
                    raise OptionError(name, value, f"give {wanted} shares whose sum is 1")
            elif isinstance(value, tuple) and (len(value) != 2 or value[0] > value[1]):
                raise OptionError(name, value, "give the lowest and the highest value")
            elif name.endswith("_resize") and not value[0] <= 1 <= value[1]:
                raise OptionError(name, value, "1 must lie between them")

    @property
    def amount(self) -> float:
        return STRENGTHS[self.kind] if self.strength is None else self.strength

    def __call__(self, high_res: Tensor, random: Random) -> Tensor:
        """(1 or 3, H, W) uint8 -> (1 or 3, h, w) uint8, h = ceil(H / scale)."""
        if self.amount == 0 or random.random() < self.clean_share:
            return Bicubic(scale=self.scale, border=self.border)(high_res)
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
        sinc_first = random.random() < 0.5
        image = image if sinc_first else self._compressed(image, random)
        image = resized(image, height, width, random)
        if random.random() < self.final_sinc_share:
            image = filtered(image, self._sinc(random))
        return self._compressed(image, random) if sinc_first else image

    def describe(self) -> str:
        what = f"{self.kind}: blur, resize, noise and JPEG as in Real-ESRGAN, strength {self.amount:g}"
        return f"{what}, a share of {self.clean_share:g} bicubic"

    def blur_kernel(self, sigmas: Range, random: Random) -> Image:
        """(k, k) of one of the four families; all but sinc end at three deviations."""
        family = chosen(self.kernel_shares, random)
        if family == 3:
            return self._sinc(random)
        wide, high = (self.amount * drawn(sigmas, random) for _ in range(2))
        if random.random() < self.isotropic_share:
            high = wide
        shape = drawn(((1, 1), self.gaussian_shape, self.plateau_shape)[family], random)
        size = 2 * math.ceil(3 * max(wide, high)) + 1
        return bell_kernel(size, (wide, high), drawn((0, math.pi), random), shape, plateau=family == 2)

    def _sinc(self, random: Random) -> Image:
        low, high = self.sinc_size
        size = 2 * int(random.integers(low // 2, (high - 1) // 2 + 1)) + 1
        return sinc_kernel(size, 1 - self.amount * (1 - drawn(self.sinc_cutoff, random)))

    def _factor(self, sizes: Range, shares: Range, random: Random) -> float:
        """Of a resize; the strength scales its logarithm."""
        ranges = ((1, sizes[1]), (sizes[0], 1), (1, 1))
        return float(drawn(ranges[chosen(shares, random)], random) ** self.amount)

    def _noisy(self, image: Image, sigmas: Range, scales: Range, random: Random) -> Image:
        grey = random.random() < self.grey_share
        if random.random() < self.gaussian_share:
            return gaussian_noise(image, self.amount * drawn(sigmas, random), grey, random)
        return poisson_noise(image, self.amount * drawn(scales, random), grey, random)

    def _compressed(self, image: Image, random: Random) -> Image:
        # At 1 nothing is drawn: the presets keep the samples that weights/RESULTS.md was measured on.
        if self.jpeg_share < 1 and random.random() >= self.jpeg_share:
            return image
        quality = 100 - self.amount * (100 - drawn(self.jpeg_quality, random))
        pixels: Any = cv2.imdecode(jpeg(image, round(quality)), cv2.IMREAD_UNCHANGED)
        return np.asarray(np.float32(1 / 255) * pixels)


def drawn(limits: Range, random: Random) -> float:
    return limits[0] + (limits[1] - limits[0]) * float(random.random())


def chosen(shares: Range, random: Random) -> int:
    """A place, drawn by its share."""
    return min(int(np.searchsorted(np.cumsum(shares), random.random(), "right")), len(shares) - 1)


def bell_kernel(size: int, sigmas: Range, angle: float, shape: float, *, plateau: bool) -> Image:
    """A generalised Gaussian or a plateau (k, k) of sum 1 (Liu et al. 2020).

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
    """The ideal low-pass filter of circular cutoff, 1 is Nyquist, cut to (k, k), of sum 1."""
    offsets = np.arange(size) - size // 2
    radius, frequency = np.hypot(offsets, offsets[:, None]), math.pi * cutoff
    radius[size // 2, size // 2] = 1  # any but 0; the limit follows
    kernel = frequency * j1(frequency * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = frequency**2 / (4 * math.pi)
    return np.asarray(kernel / kernel.sum(), np.float32)


def filtered(image: Image, kernel: Image) -> Image:
    """Convolved; the image is mirrored beyond its edge."""
    return np.asarray(cv2.filter2D(image, -1, kernel), np.float32)


def resized(image: Image, height: float, width: float, random: Random) -> Image:
    """To the nearest whole size, at least 1, by area, bilinear or bicubic."""
    size = (max(1, round(width)), max(1, round(height)))
    how = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)[random.integers(3)]
    return np.asarray(cv2.resize(image, size, interpolation=how), np.float32)


def gaussian_noise(image: Image, sigma: float, grey: bool, random: Random) -> Image:
    """`sigma` in 8-bit values; grey: the same in all channels."""
    shape = (*image.shape[:2], *(1 if grey else n for n in image.shape[2:]))
    return image + np.float32(sigma / 255) * random.standard_normal(shape, dtype=np.float32)


def poisson_noise(image: Image, scale: float, grey: bool, random: Random) -> Image:
    """The noise of 256 photons in white, times scale: variance scale^2 x / 256 where the image is x."""
    light = image.clip(0, 1)
    if grey and light.ndim == 3:
        light = cv2.cvtColor(light, cv2.COLOR_BGR2GRAY)[..., None]
    noise = random.poisson(256 * light).astype(np.float32) / 256 - light
    return np.asarray(image + np.float32(scale) * noise)


def to_bytes(image: Image) -> npt.NDArray[np.uint8]:
    return np.asarray(np.rint(image.clip(0, 1) * 255), np.uint8)


def jpeg(image: Image, quality: int) -> Any:  # noqa: ANN401  # OpenCV takes and gives arrays of bytes
    """The bytes of its JPEG file, chroma at half resolution."""
    return cv2.imencode(".jpg", to_bytes(image), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]


Degradation = Bicubic | Photo
DEGRADATIONS: dict[str, type[Degradation]] = {
    "bicubic": Bicubic,
    **dict.fromkeys(("light", "photo", "heavy"), Photo),
}


def degradation_from_dict(values: Mapping[str, object]) -> Degradation:
    """The inverse of any `to_dict`; options of other kinds may be there with their defaults. ValueError."""
    name, others = values.get("kind", "bicubic"), Photo().to_dict()
    if name not in DEGRADATIONS:
        raise ValueError(f"degradation {name!r}: choose one of {', '.join(DEGRADATIONS)}")
    kind = DEGRADATIONS[str(name)]
    foreign = values.keys() & (others.keys() - specs(kind).keys())
    for one in sorted(foreign):
        if values[one] != others[one]:
            raise OptionError(one, values[one], f"the degradation {name} has no such option: leave it out")
    return kind.from_dict({one: value for one, value in values.items() if one not in foreign})
