"""Images with the statistics of photos, drawn from nothing: opaque leaves whose radii follow a power law.

Dead leaves (Lee, Mumford & Huang 2001, "Occlusion models for natural images"): with radii of density r^-3 the
power spectrum falls about as a photo's. Networks trained on them restore photos (Achddou et al. 2021). Leaves
are ellipses, lozenges and bars of N samples, filled with gradients, gratings and 1/f noise.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imaging.files import write_image

Floats = NDArray[np.float64]

SUPERSAMPLE = 2  # samples per pixel and axis: their mean has smooth edges
COVERAGE = 6.0  # area of the circles around all leaves, over that of the image
PLAIN_RADIUS = 3.0  # a smaller leaf has no room for a pattern
NOISE_SIDE = 256  # samples


def dead_leaves(
    size: tuple[int, int] | int,
    rng: np.random.Generator,
    *,
    min_radius: float = 1.5,
    max_radius: float = 200.0,
) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of size (H, W) or a square; ValueError unless 0 < min_radius < max_radius pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1 or not 0 < min_radius < max_radius < math.inf:
        given = f"size {size}, radii from {min_radius} to {max_radius}"
        raise ValueError(f"{given}: give at least 1 pixel, and 0 < min_radius < max_radius")
    shape = (height * SUPERSAMPLE, width * SUPERSAMPLE)
    canvas, bare = np.tile(draw_colour(rng), (*shape, 1)), np.ones(shape, np.bool_)
    noise = draw_noise(rng)
    # Front to back: a leaf colours only what is still bare.
    for circle in draw_leaves(height, width, min_radius, max_radius, rng):
        paint(canvas, bare, circle * SUPERSAMPLE, noise, rng)
    samples: Floats = canvas.reshape(height, SUPERSAMPLE, width, SUPERSAMPLE, 3).mean(axis=(1, 3)).clip(0, 1)
    return np.rint(255 * samples).astype(np.uint8)


def draw_leaves(height: int, width: int, low: float, high: float, rng: np.random.Generator) -> Floats:
    """(leaves, 3): centre y and x and radius of a uniform rain that meets the image."""
    high = min(high, 2 * (low + height + width))  # larger ones look alike
    mean_area = 2 * math.pi * math.log(high / low) / (low**-2 - high**-2)
    count = math.ceil(COVERAGE * (height + 2 * high) * (width + 2 * high) / mean_area)
    radius = (low**-2 - rng.random(count) * (low**-2 - high**-2)) ** -0.5  # the inverse of its distribution
    y, x = rng.uniform(-high, height + high, count), rng.uniform(-high, width + high, count)
    meets = (abs(y - height / 2) < height / 2 + radius) & (abs(x - width / 2) < width / 2 + radius)
    return np.stack((y, x, radius), axis=1)[meets]


def paint(
    canvas: Floats, bare: NDArray[np.bool_], circle: Floats, noise: Floats, rng: np.random.Generator
) -> None:
    """Put a random leaf, inside a circle given in samples, behind all that is there."""
    centre_y, centre_x, radius = circle
    top, left = max(0, int(centre_y - radius)), max(0, int(centre_x - radius))
    rows, columns = bare[top : int(centre_y + radius) + 1, left : int(centre_x + radius) + 1].nonzero()
    if not rows.size:
        return
    rows, columns = rows + top, columns + left
    turn = np.exp(2j * math.pi * rng.random()) / radius
    points = (columns + 0.5 - centre_x + 1j * (rows + 0.5 - centre_y)) * turn  # the leaf's own axes
    inside = covers(points.real, points.imag, rng)
    rows, columns, points = rows[inside], columns[inside], points[inside]
    canvas[rows, columns] = fill(points.real, points.imag, radius, noise, rng)
    bare[rows, columns] = False


def covers(x: Floats, y: Floats, rng: np.random.Generator) -> NDArray[np.bool_]:
    """(N,) bool: the points that a random shape inside the unit circle covers."""
    power = (1, 2, 2, 8)[rng.integers(4)]  # a lozenge, an ellipse, a bar with round corners
    half_width = 10 ** -rng.uniform(0, 0.8)
    shrink = math.hypot(1, half_width) if power > 2 else 1.0  # the corners of a bar stick out
    return np.asarray(abs(x * shrink) ** power + abs(y * shrink / half_width) ** power <= 1)


def fill(x: Floats, y: Floats, radius: float, noise: Floats, rng: np.random.Generator) -> Floats:
    """(N, 3), or (3,) for all: the colours at points on the axes of a leaf."""
    first, second, pattern = draw_colour(rng), draw_colour(rng), rng.integers(4)
    if radius <= PLAIN_RADIUS * SUPERSAMPLE or pattern == 0:
        return first
    if pattern == 1:
        weight = 0.5 + 0.5 * x
    elif pattern == 2:
        waves = rng.uniform(radius / 48, radius / 6)  # 3 to 24 pixels long
        weight = 0.5 + 0.5 * np.sin(2 * math.pi * waves * (x + 0.2 * y * y))
    else:
        scale, (row, column) = radius * rng.uniform(0.35, 1), rng.integers(NOISE_SIDE, size=2)
        rows, columns = np.floor(y * scale).astype(int) + row, np.floor(x * scale).astype(int) + column
        weight = noise[rows % NOISE_SIDE, columns % NOISE_SIDE]
    return first + (second - first) * weight[:, None]


def draw_colour(rng: np.random.Generator) -> Floats:
    """(3,): natural colours vary far more in lightness than in hue."""
    return rng.uniform(0.05, 0.95) + 0.06 * rng.standard_normal(3)


def draw_noise(rng: np.random.Generator) -> Floats:
    """(256, 256): periodic noise of amplitude 1/f, mean 0.5, deviation 0.35."""
    frequency = np.hypot(np.fft.fftfreq(NOISE_SIDE)[:, None], np.fft.rfftfreq(NOISE_SIDE))
    frequency[0, 0] = np.inf
    tile = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((NOISE_SIDE, NOISE_SIDE))) / frequency)
    return np.asarray(0.5 + 0.35 * tile / tile.std())


def draw_dead_leaves_folder(
    folder: str | Path, count: int, size: tuple[int, int] | int, seed: int, *, min_radius: float = 1.5
) -> list[Path]:
    """Fill a folder with 0000.png, 0001.png, ...; ValueError where it holds what was not drawn here."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / ".dead_leaves"
    if not mark.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that were not drawn here: choose another folder")
    mark.touch()
    paths = [folder / f"{index:04d}.png" for index in range(count)]
    for index, path in enumerate(paths):
        write_image(path, dead_leaves(size, np.random.default_rng([seed, index]), min_radius=min_radius))
    return paths
