"""Dead leaves: their spectrum, reproducible images, folders."""

import re

import numpy as np
import pytest

from examples.dead_leaves import dead_leaves, draw_dead_leaves_folder
from imaging.files import read_rgb


def radial_power(image):
    """Mean power of luma at each whole number of cycles per image, of a square image under a Hann window."""
    luma = image @ np.array([0.299, 0.587, 0.114])
    length = len(luma)
    window = np.outer(np.hanning(length), np.hanning(length))
    power = np.abs(np.fft.fft2((luma - luma.mean()) * window)) ** 2
    cycles = np.fft.fftfreq(length) * length
    ring = np.rint(np.hypot(cycles[:, None], cycles)).astype(int).ravel()
    return np.bincount(ring, power.ravel()) / np.bincount(ring)


@pytest.mark.slow
def test_the_power_spectrum_falls_as_in_photos():
    # A photo's falls with exponent -2 on average (Field 1987).
    power = np.mean([radial_power(dead_leaves(256, np.random.default_rng([8, i]))) for i in range(4)], axis=0)
    cycles = np.arange(4, 101)
    slope, _ = np.polyfit(np.log(cycles), np.log(power[cycles]), 1)
    assert -2.4 < slope < -1.6


def test_image_i_depends_on_seed_and_index_alone(tmp_path):
    few = draw_dead_leaves_folder(tmp_path / "few", 1, (16, 24), seed=3)
    many = draw_dead_leaves_folder(tmp_path / "many", 3, (16, 24), seed=3)
    assert [path.name for path in many] == ["0000.png", "0001.png", "0002.png"]
    images = [read_rgb(path) for path in many]
    np.testing.assert_array_equal(read_rgb(few[0]), images[0])
    np.testing.assert_array_equal(images[1], dead_leaves((16, 24), np.random.default_rng([3, 1])))
    assert (images[0].shape, images[0].dtype) == ((16, 24, 3), np.uint8)
    assert len({image.tobytes() for image in images}) == 3


def test_a_second_call_draws_anew(tmp_path):
    draw_dead_leaves_folder(tmp_path, 1, 16, seed=0)
    (path,) = draw_dead_leaves_folder(tmp_path, 1, 16, seed=1)
    np.testing.assert_array_equal(read_rgb(path), dead_leaves(16, np.random.default_rng([1, 0])))


def test_a_file_of_someone_else_is_never_overwritten(tmp_path):
    (tmp_path / "0000.png").write_bytes(b"someone's")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        draw_dead_leaves_folder(tmp_path, 1, 16, seed=0)
    assert (tmp_path / "0000.png").read_bytes() == b"someone's"


@pytest.mark.parametrize(
    ("size", "radii", "value"),
    [((8, -1), (1, 2), "-1"), (8, (0, 2), "0"), (8, (float("nan"), 2), "nan"), (8, (4, 3), "3")],
)
def test_wrong_sizes_and_radii_are_refused(size, radii, value):
    with pytest.raises(ValueError, match=value):
        dead_leaves(size, np.random.default_rng(0), min_radius=radii[0], max_radius=radii[1])
