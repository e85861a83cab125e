"""Images with natural statistics, drawn from nothing: occluding leaves whose radii follow a power law.

The dead-leaves model (Lee, Mumford & Huang 2001, "Occlusion models for natural images") drops opaque
shapes on top of each other until the plane is covered. With radii of density proportional to r^-3 every
octave of size covers the same area, so the image looks alike at every scale and its power spectrum falls
about as 1/f^2, as a photograph's does. Restoration networks trained on such images alone work on photographs
(Achddou, Gousseau & Ladjal 2021, "Synthetic images as a regularity prior for image restoration neural
networks").

Beyond flat disks, leaves here are ellipses, bars, polygons and petals, filled with gradients, gratings,
weaves and 1/f noise in a palette of muted colours, and a part of the images has an out-of-focus background:
a network needs edges of every orientation, corners, lines, texture and blur to learn from.

Leaves are drawn front to back: each colours only samples that no earlier leaf has covered, and the image
is finished, exactly as an endless back-to-front rain of leaves would leave it, when none is left.

Legend: H, W image size in pixels; s samples per pixel and axis; N samples of one leaf; lengths in pixels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from imaging.atomic import write_atomically

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Mask = NDArray[np.bool_]
Image8 = NDArray[np.uint8]
Choice = TypeVar("Choice")

_RECIPE_KEY = "dead_leaves"
_RECIPE_VERSION = 1  # raise it when a seed no longer gives the same bytes, so that folders are redrawn

_CANDIDATES = 4096  # leaves proposed at a time; few enough that the map of uncovered samples stays current
_NOISE_TILE = 512  # samples; a power of two, so that wrapping is a bit mask
_PALETTE_COLOURS = 12
_PLAIN_RADIUS = 3.0  # pixels; a smaller leaf has no room for corners or a pattern
_WAVELENGTHS = (3.0, 24.0)  # pixels; two would be the Nyquist limit
_THINNEST = 0.75  # pixels; half the width of the thinnest line, which still survives antialiasing
_DEFOCUS_CHANCE = 0.25
_DEFOCUS_SIGMA = (0.5, 1.5)  # pixels


def dead_leaves(
    size: tuple[int, int] | int,
    rng: np.random.Generator,
    *,
    min_radius: float = 1.5,
    max_radius: float = 200.0,
    supersample: int = 2,
) -> Image8:
    """Draw one image; generators in the same state give the same bytes.

    Args:
        size: (height, width) in pixels, or one number for a square.
        rng: source of every random choice; it is advanced.
        min_radius, max_radius: bounds of the r^-3 law of the circles around the leaves, in pixels.
            Few sizes between them make the image regular; a small ``min_radius`` makes it busy and slow.
        supersample: samples per pixel along each axis, averaged so that edges are not aliased; 1 is aliased.

    Returns:
        (H, W, 3) uint8 in [0, 255], display-referred RGB.

    Raises:
        ValueError: a size, radius or sample count out of range.
    """
    height, width = _checked_size(size)
    law = RadiusLaw(min_radius, max_radius)
    if not 1 <= supersample <= 8:
        raise ValueError(f"supersample is {supersample}: give 1 to 8 samples per pixel and axis, 2 is usual")
    canvas = _Canvas(height, width, supersample)
    scene = _draw_scene(rng)
    while canvas.uncovered.any():
        for centre_y, centre_x, radius in _draw_visible_leaves(canvas, law, rng):
            canvas.paint(centre_y, centre_x, radius, scene, rng)
    _defocus_some(canvas, rng)
    samples = canvas.colour.reshape(height, supersample, width, supersample, 3)
    image = samples.mean(axis=(1, 3))  # (H, W, 3): a box filter one pixel wide
    return np.rint(image.clip(0.0, 1.0) * 255.0).astype(np.uint8)


def draw_dead_leaves_folder(
    folder: str | Path,
    count: int,
    size: tuple[int, int] | int,
    seed: int,
    *,
    min_radius: float = 1.5,
) -> list[Path]:
    """Fill a folder with ``0000.png``, ``0001.png``, ... and return their paths in order.

    Image i depends on (seed, i, size, min_radius) only, never on ``count``. A file states in a PNG text field
    what it was drawn from: one drawn from the same is kept, one drawn from something else is redrawn. A file
    appears whole or not at all, so several processes may fill one folder.

    Args:
        folder: created if missing.
        count: number of images, at least 1.
        size: (height, width) in pixels, or one number for a square.
        seed: non-negative.
        min_radius: of the smallest leaves, in pixels; larger is calmer.

    Raises:
        ValueError: an argument out of range, or a file in the way that was not drawn here.
    """
    height, width = _checked_size(size)
    if count < 1:
        raise ValueError(f"count is {count}: ask for at least 1 image")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give a whole number of at least 0")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:04d}.png" for index in range(count)]
    for index, path in enumerate(paths):
        drawn_from = f"seed {seed}, index {index}, size {height}x{width}, radius {min_radius:g}"
        recipe = f"version {_RECIPE_VERSION}, {drawn_from}"
        if path.exists() and _read_recipe(path) == recipe:
            continue
        image = dead_leaves((height, width), np.random.default_rng([seed, index]), min_radius=min_radius)
        _write_png(path, image, recipe)
    return paths


@dataclass(frozen=True)
class RadiusLaw:
    """Radii in pixels of density proportional to r^-3 on [min_radius, max_radius] (Lee et al. 2001).

    Raises:
        ValueError: bounds out of order, or leaves too small to cover a sample.
    """

    min_radius: float
    max_radius: float

    def __post_init__(self) -> None:
        if not 0.5 <= self.min_radius < math.inf:
            raise ValueError(
                f"min_radius is {self.min_radius}: give at least 0.5 pixels, smaller leaves vanish"
            )
        if not self.min_radius < self.max_radius < math.inf:
            raise ValueError(
                f"max_radius is {self.max_radius}: give a finite number above min_radius, {self.min_radius}"
            )

    def draw_hitting(
        self, count: int, height: float, width: float, rng: np.random.Generator
    ) -> tuple[Doubles, Doubles, Doubles]:
        """Leaves of a rain uniform over the whole plane, given that their bounding square meets the window.

        A leaf of radius r meets the window from an area of (H + 2r)(W + 2r), so the radius of one that does
        has density proportional to  r^-3 (H + 2r)(W + 2r) = HW r^-3 + 2(H + W) r^-2 + 4 r^-1:  a mixture of
        three power laws. Large leaves thus reach in from outside, and the border looks like the centre.

        Returns:
            centre_y, centre_x, radius: (count,) each, in pixels from the top left corner of the window.
        """
        low, high = self.min_radius, self.max_radius
        masses = np.array(
            [
                height * width * (low**-2 - high**-2) / 2,
                2 * (height + width) * (1 / low - 1 / high),
                4 * math.log(high / low),
            ]
        )
        uniform = rng.random(count)
        by_exponent = (  # inverse of each cumulative distribution
            (low**-2 - uniform * (low**-2 - high**-2)) ** -0.5,
            1 / (1 / low - uniform * (1 / low - 1 / high)),
            low * (high / low) ** uniform,
        )
        radius = np.choose(rng.choice(3, size=count, p=masses / masses.sum()), by_exponent)
        centre_y = rng.random(count) * (height + 2 * radius) - radius
        centre_x = rng.random(count) * (width + 2 * radius) - radius
        return centre_y, centre_x, radius


# ---------------------------------------------------------------------------------------------- painting


@dataclass(frozen=True)
class _Scene:
    """What the leaves of one image share."""

    palette: tuple[Floats, ...]  # _PALETTE_COLOURS of (3,) about [0, 1]
    noise: Floats  # (_NOISE_TILE, _NOISE_TILE) periodic, in [0, 1]


class _Canvas:
    """Samples of an image, s to a pixel along each axis, and which of them are still bare.

    Attributes:
        colour: (H s, W s, 3) about [0, 1].
        order: (H s, W s) int32, number of the leaf that shows, counted from the front; -1 where bare.
        uncovered: (H s, W s) bool, where bare.
    """

    def __init__(self, height: int, width: int, supersample: int) -> None:
        shape = (height * supersample, width * supersample)
        self.size = (height, width)
        self.supersample = supersample
        self.colour: Floats = np.zeros((*shape, 3), np.float32)
        self.order: NDArray[np.int32] = np.full(shape, -1, np.int32)
        self.uncovered: Mask = np.ones(shape, np.bool_)
        self._leaves = 0

    def paint(
        self, centre_y: float, centre_x: float, radius: float, scene: _Scene, rng: np.random.Generator
    ) -> None:
        """Put a leaf of random shape and fill, inside a circle of ``radius``, behind all earlier ones."""
        s = self.supersample
        top, left = max(0, int((centre_y - radius) * s)), max(0, int((centre_x - radius) * s))
        bottom, right = int((centre_y + radius) * s) + 1, int((centre_x + radius) * s) + 1
        rows, columns = self.uncovered[top:bottom, left:right].nonzero()  # (N,) each
        if not rows.size:
            return
        rows += top
        columns += left
        y = ((rows + 0.5) / s - centre_y).astype(np.float32)
        x = ((columns + 0.5) / s - centre_x).astype(np.float32)
        x, y = _rotate(x, y, rng.random() * 2 * math.pi)
        shape = _pick(_SHAPES if radius > _PLAIN_RADIUS else _PLAIN_SHAPES, rng)
        inside = shape(x, y, radius, rng)
        if not inside.any():
            return
        rows, columns = rows[inside], columns[inside]
        self.colour[rows, columns] = _leaf_colours(x[inside], y[inside], radius, scene, rng)
        self.order[rows, columns] = self._leaves
        self.uncovered[rows, columns] = False
        self._leaves += 1


def _draw_visible_leaves(
    canvas: _Canvas, law: RadiusLaw, rng: np.random.Generator
) -> Iterator[tuple[float, float, float]]:
    """Propose leaves, and leave out at once those whose bounding square has no bare sample to show on.

    A hidden leaf changes nothing, so this only saves time: towards the end almost all are hidden.
    """
    centre_y, centre_x, radius = law.draw_hitting(_CANDIDATES, *canvas.size, rng)
    rows, columns = canvas.uncovered.shape
    bare = np.zeros((rows + 1, columns + 1), np.int32)  # summed-area table
    canvas.uncovered.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, out=bare[1:, 1:])
    s = canvas.supersample
    top, bottom = _sample_span(centre_y, radius, s, rows)
    left, right = _sample_span(centre_x, radius, s, columns)
    count = bare[bottom, right] - bare[top, right] - bare[bottom, left] + bare[top, left]
    for i in count.nonzero()[0]:
        yield float(centre_y[i]), float(centre_x[i]), float(radius[i])


def _sample_span(
    centre: Doubles, radius: Doubles, supersample: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and one past the last sample, along one axis, of bounding squares cut to [0, length]."""
    first = ((centre - radius) * supersample).clip(0, length).astype(np.int64)
    end = ((centre + radius) * supersample + 1).clip(0, length).astype(np.int64)
    return first, end


def _rotate(x: Floats, y: Floats, angle: float) -> tuple[Floats, Floats]:
    """Coordinates (N,) of the same points along axes turned by ``angle`` radians."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return cosine * x + sine * y, cosine * y - sine * x


# ------------------------------------------------------------------------------------------------ shapes
# Each takes coordinates (N,) from the centre of the leaf, in pixels, and says which lie inside; all shapes
# fit in the circle of the given radius.


def _disk(x: Floats, y: Floats, radius: float, rng: np.random.Generator) -> Mask:
    return x * x + y * y <= radius * radius


def _ellipse(x: Floats, y: Floats, radius: float, rng: np.random.Generator) -> Mask:
    half_width = max(radius * rng.uniform(0.25, 0.9), min(radius, _THINNEST))
    stretched = y * (radius / half_width)
    return x * x + stretched * stretched <= radius * radius


def _bar(x: Floats, y: Floats, radius: float, rng: np.random.Generator) -> Mask:
    """A rectangle, from a square to a line."""
    half_width = max(radius * math.sqrt(0.5) * 10 ** -rng.uniform(0.0, 1.2), min(radius / 2, _THINNEST))
    half_length = math.sqrt(radius * radius - half_width * half_width)
    return (abs(x) <= half_length) & (abs(y) <= half_width)


def _polygon(x: Floats, y: Floats, radius: float, rng: np.random.Generator) -> Mask:
    """A convex polygon of three to seven corners on the circle: one half-plane for each side."""
    corners = int(rng.integers(3, 8))
    # A jitter below a quarter of a step keeps every gap below pi, so that the centre stays inside.
    jitter = rng.uniform(-0.2, 0.2, corners).tolist()
    angles = [(corner + shift) * 2 * math.pi / corners for corner, shift in enumerate(jitter)]
    inside = np.ones(x.shape, np.bool_)
    for angle, following in pairwise([*angles, angles[0] + 2 * math.pi]):
        normal, gap = (angle + following) / 2, following - angle
        inside &= math.cos(normal) * x + math.sin(normal) * y <= radius * math.cos(gap / 2)
    return inside


def _petals(x: Floats, y: Floats, radius: float, rng: np.random.Generator) -> Mask:
    """A smooth closed curve with two to six lobes: not convex."""
    depth, lobes = rng.uniform(0.1, 0.5), int(rng.integers(2, 7))
    boundary = radius * (1 - depth * (0.5 + 0.5 * np.cos(lobes * np.arctan2(y, x))))
    return x * x + y * y <= boundary * boundary


_Shape = Callable[[Floats, Floats, float, np.random.Generator], Mask]
_SHAPES: tuple[_Shape, ...] = (_disk, _ellipse, _bar, _polygon, _petals)
_PLAIN_SHAPES: tuple[_Shape, ...] = (_disk, _ellipse, _bar)


# ------------------------------------------------------------------------------------------------- fills
# Each takes coordinates (N,) from the centre of the leaf, in pixels, and gives weights (N,) in [0, 1]: the
# share of the second of the leaf's two colours.


def _flat(x: Floats, y: Floats, radius: float, scene: _Scene, rng: np.random.Generator) -> Floats:
    return np.zeros_like(x)


def _gradient(x: Floats, y: Floats, radius: float, scene: _Scene, rng: np.random.Generator) -> Floats:
    return 0.5 + x * np.float32(0.5 / radius)


def _grating(x: Floats, y: Floats, radius: float, scene: _Scene, rng: np.random.Generator) -> Floats:
    """Bent sinusoidal bands, from soft to nearly square."""
    bent = x + np.float32(0.3 * rng.standard_normal() / radius) * y * y
    wave = np.sin(bent * np.float32(2 * math.pi / _draw_wavelength(radius, rng)))
    return (0.5 + rng.uniform(0.5, 2.0) * wave).clip(0.0, 1.0)


def _weave(x: Floats, y: Floats, radius: float, scene: _Scene, rng: np.random.Generator) -> Floats:
    """A checkered or dotted pattern: the product of two gratings at a right angle."""
    across, along = _draw_wavelength(radius, rng), _draw_wavelength(radius, rng)
    wave = np.sin(x * np.float32(2 * math.pi / across)) * np.sin(y * np.float32(2 * math.pi / along))
    return (0.5 + rng.uniform(0.5, 2.0) * wave).clip(0.0, 1.0)


def _noise(x: Floats, y: Floats, radius: float, scene: _Scene, rng: np.random.Generator) -> Floats:
    """A piece of the scene's 1/f noise, turned, stretched and scaled."""
    scale, stretch = rng.uniform(0.7, 2.0), rng.uniform(1.0, 3.0)
    row, column = rng.integers(_NOISE_TILE, size=2)
    rows = np.floor(y * np.float32(scale)).astype(np.int64) + row
    columns = np.floor(x * np.float32(scale / stretch)).astype(np.int64) + column
    return scene.noise[rows & (_NOISE_TILE - 1), columns & (_NOISE_TILE - 1)]


_Fill = Callable[[Floats, Floats, float, _Scene, np.random.Generator], Floats]
_FILLS: tuple[_Fill, ...] = (_flat, _gradient, _noise, _noise, _noise, _noise, _grating, _weave)


def _leaf_colours(x: Floats, y: Floats, radius: float, scene: _Scene, rng: np.random.Generator) -> Floats:
    """Colours (N, 3), or (1, 3) for all, about [0, 1]: a random fill between two colours of the palette."""
    first = _pick(scene.palette, rng) + np.float32(0.05 * rng.standard_normal())  # (3,)
    if radius <= _PLAIN_RADIUS:
        return first[None]  # (1, 3): every sample the same
    step = np.float32(rng.uniform(0.2, 1.0)) * (_pick(scene.palette, rng) - first)
    x, y = _rotate(x, y, rng.random() * 2 * math.pi)
    weight = _pick(_FILLS, rng)(x, y, radius, scene, rng)  # (N,)
    return first + weight[:, None] * step


def _pick(choices: Sequence[Choice], rng: np.random.Generator) -> Choice:
    """One of them, evenly; several times faster than ``rng.choice``, which counts for every leaf."""
    return choices[int(rng.random() * len(choices))]


def _draw_wavelength(radius: float, rng: np.random.Generator) -> float:
    """Pixels, log-uniform, no longer than the leaf's radius."""
    low, high = _WAVELENGTHS
    return low * (max(low, min(high, radius)) / low) ** rng.random()


# ------------------------------------------------------------------------------------------------- scene


def _draw_scene(rng: np.random.Generator) -> _Scene:
    """Draw the palette and the noise texture of one image.

    Natural colours vary most in lightness, less between blue and yellow, least between red and green, and
    almost independently along these axes (Ruderman, Cronin & Chiao 1998, for cone responses); a common
    tint stands for the light.
    """
    axes = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])  # orthonormal rows
    lightness = rng.uniform(0.05, 0.95, _PALETTE_COLOURS)
    yellow = rng.normal(0.03, 0.06) + 0.10 * rng.standard_normal(_PALETTE_COLOURS)
    red = rng.normal(0.0, 0.02) + 0.06 * rng.standard_normal(_PALETTE_COLOURS)
    red = np.where(yellow < 0, 0.3 * red + 0.5 * yellow, red)  # blues lean to cyan: violet is rare in nature
    room = 0.3 + lightness  # dark colours have room for little chroma
    palette = np.column_stack((math.sqrt(3) * lightness, yellow * room, red * room)) @ axes  # (colours, 3)
    return _Scene(tuple(palette.astype(np.float32)), _draw_noise_tile(rng.uniform(0.3, 1.0), rng))


def _draw_noise_tile(exponent: float, rng: np.random.Generator) -> Floats:
    """Periodic Gaussian noise of amplitude spectrum f^-exponent, mean 0.5, deviation 0.35, cut to [0, 1]."""
    white = np.fft.rfft2(rng.standard_normal((_NOISE_TILE, _NOISE_TILE)))
    frequency = np.hypot(np.fft.fftfreq(_NOISE_TILE)[:, None], np.fft.rfftfreq(_NOISE_TILE))
    # Waves longer than an eighth of the tile would only shift the mean of a leaf.
    gain = np.where(frequency > 8 / _NOISE_TILE, frequency, np.inf) ** -exponent
    noise = np.fft.irfft2(white * gain, s=(_NOISE_TILE, _NOISE_TILE))
    return (0.5 + 0.35 * noise / noise.std()).clip(0.0, 1.0).astype(np.float32)


# ----------------------------------------------------------------------------------------------- defocus


def _defocus_some(canvas: _Canvas, rng: np.random.Generator) -> None:
    """In a part of the images, blur what lies behind the front leaves, as a lens focused on them does."""
    defocused, sharp_share, sigma = rng.random(), rng.uniform(0.2, 0.6), rng.uniform(*_DEFOCUS_SIGMA)
    if defocused >= _DEFOCUS_CHANCE:
        return
    background = canvas.order > np.quantile(canvas.order, sharp_share)
    canvas.colour[background] = _blur_within(canvas.colour, background, sigma * canvas.supersample)


def _blur_within(colour: Floats, region: Mask, sigma: float) -> Floats:
    """Gaussian blur of (rows, columns, 3) among the samples of ``region`` (rows, columns) alone: (N, 3).

    Normalised convolution (Knutsson & Westin 1993): the blurred product over the blurred mask, so that
    nothing in focus bleeds into the background and the border needs no padding rule.
    """
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
    blurred = np.concatenate((colour, np.ones_like(colour[..., :1])), axis=-1) * region[..., None]
    for _ in range(2):  # rows, then columns
        padded = np.pad(blurred, ((reach, reach), (0, 0), (0, 0)))
        total = np.zeros_like(blurred)
        for offset, weight in enumerate(kernel):
            total += weight * padded[offset : offset + len(blurred)]
        blurred = total.swapaxes(0, 1)
    within = blurred[region]  # (N, 4); the last is at least 1, the weight of the sample itself
    return within[:, :3] / within[:, 3:]


# ------------------------------------------------------------------------------------- arguments and files


def _checked_size(size: tuple[int, int] | int) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size is {size}: give a height and a width of at least 1 pixel")
    return height, width


def _read_recipe(path: Path) -> str:
    """Return what ``path`` states it was drawn from, or refuse to touch a file that states nothing.

    Raises:
        ValueError: the file is not an image drawn here.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            recipe = image.info.get(_RECIPE_KEY)
    except OSError:
        recipe = None
    if not isinstance(recipe, str):
        raise ValueError(
            f"{path} was not drawn by draw_dead_leaves_folder: move it, or choose another folder"
        )
    return recipe


def _write_png(path: Path, image: Image8, recipe: str) -> None:
    """Write an image that states what it was drawn from."""
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text(_RECIPE_KEY, recipe)
    picture = Image.fromarray(image)
    write_atomically(path, lambda unfinished: picture.save(unfinished, format="PNG", pnginfo=text))
