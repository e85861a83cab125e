"""Dead leaves: the laws of the model (radius, coverage, spectrum), reproducible bytes, safe files."""

from pathlib import Path

import dead_leaves as module
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from examples.dead_leaves import RadiusLaw, dead_leaves, draw_dead_leaves_folder
from imaging import atomic as files


def radius_cdf(radius: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """The integral of r^-3 from low to radius, over that from low to high."""
    return (low**-2.0 - radius**-2.0) / (low**-2.0 - high**-2.0)


def radial_power(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean power of luma at each whole number of cycles per image, of a square image under a Hann window."""
    luma = image @ np.array([0.299, 0.587, 0.114])
    length = len(luma)
    window = np.outer(np.hanning(length), np.hanning(length))
    power = np.abs(np.fft.fft2((luma - luma.mean()) * window)) ** 2
    cycles = np.fft.fftfreq(length) * length
    ring = np.rint(np.hypot(cycles[:, None], cycles)).astype(int).ravel()
    return np.bincount(ring, power.ravel()) / np.bincount(ring)


# ------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize(("low", "high"), [(1.5, 200.0), (4.0, 20.0)])
def test_radii_of_leaves_centred_in_the_window_follow_the_inverse_cube(low, high):
    # The rain is uniform over the plane: which centres fall in the window says nothing about the radius.
    centre_y, centre_x, radius = RadiusLaw(low, high).draw_hitting(60_000, 48, 64, np.random.default_rng(1))
    within = (centre_y >= 0) & (centre_y < 48) & (centre_x >= 0) & (centre_x < 64)
    assert within.sum() > 10_000
    result = stats.kstest(radius[within], lambda r: radius_cdf(r, low, high))
    assert result.pvalue > 0.01


def test_centres_of_leaves_inside_the_window_are_uniform():
    centre_y, centre_x, _ = RadiusLaw(2.0, 50.0).draw_hitting(60_000, 48, 64, np.random.default_rng(2))
    within = (centre_y >= 0) & (centre_y < 48) & (centre_x >= 0) & (centre_x < 64)
    assert stats.kstest(centre_y[within] / 48, "uniform").pvalue > 0.01
    assert stats.kstest(centre_x[within] / 64, "uniform").pvalue > 0.01


def test_every_leaf_proposed_has_a_square_that_meets_the_window_and_a_radius_within_bounds():
    centre_y, centre_x, radius = RadiusLaw(2.0, 50.0).draw_hitting(10_000, 48, 64, np.random.default_rng(3))
    assert radius.min() >= 2.0
    assert radius.max() <= 50.0
    assert (centre_y > -radius).all()
    assert (centre_y < 48 + radius).all()
    assert (centre_x > -radius).all()
    assert (centre_x < 64 + radius).all()


@pytest.mark.parametrize("shape", module._SHAPES)
@pytest.mark.parametrize("radius", [0.5, 1.5, 20.0])
def test_shapes_lie_in_their_circle_and_are_not_empty(shape, radius):
    rng = np.random.default_rng(4)
    y, x = (np.mgrid[-60:61, -60:61] * (radius / 50)).reshape(2, -1).astype(np.float32)
    for _ in range(20):
        inside = shape(x, y, radius, rng)
        assert inside.any()
        assert np.hypot(x, y)[inside].max() <= radius * 1.0001


def test_fill_weights_lie_between_the_two_colours():
    rng = np.random.default_rng(5)
    scene = module._draw_scene(rng)
    radius = 30.0
    angle, distance = rng.uniform(0, 2 * np.pi, 4000), radius * rng.random(4000)
    x, y = (distance * np.stack((np.cos(angle), np.sin(angle)))).astype(np.float32)
    for fill in module._FILLS:
        weight = fill(x, y, radius, scene, rng)
        assert weight.shape == x.shape
        assert weight.dtype == np.float32
        assert weight.min() >= -1e-6
        assert weight.max() <= 1 + 1e-6


def test_every_sample_is_painted_and_by_the_frontmost_leaf(monkeypatch):
    canvases = []
    monkeypatch.setattr(module, "_defocus_some", lambda canvas, rng: canvases.append(canvas))
    dead_leaves((37, 53), np.random.default_rng(6), supersample=3)
    (canvas,) = canvases
    assert canvas.order.shape == (111, 159)
    assert canvas.order.min() == 0  # -1 where bare
    assert len(np.unique(canvas.order)) == canvas.order.max() + 1  # a leaf is counted only where it shows


def test_painted_samples_are_never_painted_again():
    canvas, rng = module._Canvas(40, 40, 1), np.random.default_rng(7)
    scene = module._draw_scene(rng)
    canvas.paint(20.0, 20.0, 15.0, scene, rng)
    front, colour = canvas.order == 0, canvas.colour.copy()
    for _ in range(30):
        canvas.paint(20.0, 20.0, 20.0, scene, rng)
    np.testing.assert_array_equal(canvas.order == 0, front)
    np.testing.assert_array_equal(canvas.colour[front], colour[front])


def test_power_spectrum_falls_as_in_photographs():
    # Measured over 4 to 100 cycles per image: -2.27; a photograph's is -2 on average (Field 1987).
    power = np.mean(
        [radial_power(dead_leaves(256, np.random.default_rng([8, i]))) for i in range(12)], axis=0
    )
    cycles = np.arange(4, 101)
    slope, _ = np.polyfit(np.log(cycles), np.log(power[cycles]), 1)
    assert -2.4 < slope < -1.6


def test_edges_are_antialiased_by_supersampling_alone(monkeypatch):
    def black_or_white(x, y, radius, scene, rng):
        return np.full((1, 3), float(rng.random() < 0.5), np.float32)

    monkeypatch.setattr(module, "_leaf_colours", black_or_white)
    monkeypatch.setattr(module, "_DEFOCUS_CHANCE", 0.0)
    aliased = dead_leaves(64, np.random.default_rng(9), min_radius=6, supersample=1)
    smooth = dead_leaves(64, np.random.default_rng(9), min_radius=6, supersample=2)
    assert set(np.unique(aliased)) == {0, 255}
    assert set(np.unique(smooth)) == {0, 64, 128, 191, 255}
    between = np.mean((smooth > 0) & (smooth < 255))
    assert 0.02 < between < 0.5  # edges only


def test_defocus_keeps_a_constant_and_lets_nothing_bleed_in():
    colour = np.zeros((30, 40, 3), np.float32)
    region = np.zeros((30, 40), np.bool_)
    region[:, 20:] = True
    colour[region] = 0.25
    colour[~region] = 9.0
    np.testing.assert_allclose(module._blur_within(colour, region, 2.0), 0.25, rtol=1e-5)


def test_defocus_of_a_point_is_a_gaussian():
    colour = np.zeros((41, 41, 3), np.float32)
    colour[20, 20] = 1.0
    blurred = module._blur_within(colour, np.ones((41, 41), np.bool_), 1.5).reshape(41, 41, 3)
    offset = np.arange(41) - 20
    expected = stats.norm.pdf(offset[:, None], scale=1.5) * stats.norm.pdf(offset, scale=1.5)
    np.testing.assert_allclose(blurred[..., 0], expected, atol=1e-3)


def test_noise_tile_has_the_asked_spectrum_and_range():
    tile = module._draw_noise_tile(1.0, np.random.default_rng(10))
    assert tile.min() >= 0.0
    assert tile.max() <= 1.0
    power = np.abs(np.fft.rfft(tile - tile.mean(), axis=1)) ** 2
    cycles = np.arange(16, 128)
    # Amplitude 1/f in the plane is power 1/f^2, which along a line leaves 1/f.
    slope, _ = np.polyfit(np.log(cycles), np.log(power.mean(axis=0)[cycles]), 1)
    assert slope == pytest.approx(-1.0, abs=0.25)


# ------------------------------------------------------------------------------------- reproducibility


def test_same_generator_state_gives_the_same_bytes_and_another_does_not():
    first, again, other = (dead_leaves(48, np.random.default_rng(seed)) for seed in (11, 11, 12))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(("size", "shape"), [(1, (1, 1, 3)), ((20, 33), (20, 33, 3))])
def test_size_and_type(size, shape):
    image = dead_leaves(size, np.random.default_rng(13))
    assert image.shape == shape
    assert image.dtype == np.uint8


def test_a_very_large_radius_costs_nothing():
    assert dead_leaves(32, np.random.default_rng(14), max_radius=1e5).shape == (32, 32, 3)


# ----------------------------------------------------------------------------------------------- folders


def test_image_i_does_not_depend_on_count(tmp_path):
    few = draw_dead_leaves_folder(tmp_path / "few", 2, 24, seed=0)
    many = draw_dead_leaves_folder(tmp_path / "many", 4, 24, seed=0)
    assert [path.name for path in many] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert [path.read_bytes() for path in few] == [path.read_bytes() for path in many[:2]]
    assert len({path.read_bytes() for path in many}) == 4
    assert sorted((tmp_path / "many").iterdir()) == many  # nothing unfinished is left


def test_file_holds_the_image_of_its_seed_and_index(tmp_path):
    path = draw_dead_leaves_folder(tmp_path, 2, (16, 24), seed=3)[1]
    with Image.open(path) as image:
        np.testing.assert_array_equal(image, dead_leaves((16, 24), np.random.default_rng([3, 1])))


def test_second_call_keeps_what_is_right_and_redraws_what_is_not(tmp_path, monkeypatch):
    drawn = []
    write = module._write_png

    def counted(path: Path, image: NDArray[np.uint8], recipe: str) -> None:
        drawn.append(path.name)
        write(path, image, recipe)

    monkeypatch.setattr(module, "_write_png", counted)
    for count, size, seed in [(2, 16, 0), (2, 16, 0), (3, 16, 0), (1, 16, 1), (1, 18, 1)]:
        draw_dead_leaves_folder(tmp_path, count, size, seed)
    assert drawn == ["0000.png", "0001.png", "0002.png", "0000.png", "0000.png"]


@pytest.mark.parametrize("photograph", [True, False])
def test_a_file_of_someone_else_is_never_overwritten(tmp_path, photograph):
    path = tmp_path / "0000.png"
    if photograph:
        Image.new("RGB", (16, 16)).save(path)
    else:
        path.write_bytes(b"not an image")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"0000\.png was not drawn .* choose another folder"):
        draw_dead_leaves_folder(tmp_path, 1, 16, seed=0)
    assert path.read_bytes() == before


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*paths: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        draw_dead_leaves_folder(tmp_path, 1, 16, seed=0)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (0, {}, "size is 0: give"),
        ((8, -1), {}, r"size is \(8, -1\): give"),
        (8, {"min_radius": 0.1}, "min_radius is 0.1: give at least 0.5"),
        (8, {"min_radius": float("nan")}, "min_radius is nan"),
        (8, {"min_radius": 4, "max_radius": 4}, "max_radius is 4: give .* above min_radius, 4"),
        (8, {"max_radius": float("inf")}, "max_radius is inf"),
        (8, {"supersample": 0}, "supersample is 0: give 1 to 8"),
        (8, {"supersample": 9}, "supersample is 9"),
    ],
)
def test_wrong_arguments_name_the_value_and_the_remedy(size, options, message):
    with pytest.raises(ValueError, match=message):
        dead_leaves(size, np.random.default_rng(0), **options)


@pytest.mark.parametrize(
    ("count", "seed", "message"), [(0, 0, "count is 0: ask"), (1, -1, "seed is -1: give")]
)
def test_wrong_folder_arguments(tmp_path, count, seed, message):
    with pytest.raises(ValueError, match=message):
        draw_dead_leaves_folder(tmp_path / "new", count, 8, seed)
    assert not (tmp_path / "new").exists()
