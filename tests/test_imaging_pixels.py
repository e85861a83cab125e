"""Tests of imaging/pixels.py and panels.py: ranges, hidden colours, panels in place."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from imaging.panels import comparison_picture
from imaging.pixels import (
    as_rgb8,
    pixels_to_unit,
    spread_colours,
    to_model_range,
    to_unit_range,
    unit_to_pixels,
)


@given(
    pixels=arrays(np.uint16, (9, 7, 3)) | arrays(np.uint8, (9, 7)),
    alpha=arrays(np.uint16, (9, 7), elements=st.sampled_from([0, 1, 65535])),
)
def test_colours_that_are_seen_stay_and_hidden_ones_become_those_of_the_nearest(pixels, alpha):
    spread = spread_colours(pixels, alpha)
    assert spread.dtype == pixels.dtype
    rows, columns = np.nonzero(alpha) if alpha.any() else np.nonzero(alpha == 0)
    for row, column in np.ndindex(alpha.shape):
        far = (rows - row) ** 2 + (columns - column) ** 2
        nearest = pixels[rows, columns][far == far.min()].tolist()
        assert spread[row, column].tolist() in nearest


def test_a_comparison_shows_the_input_enlarged_by_the_nearest_pixel_and_the_others_beside_it():
    source = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large, deep = np.full((8, 8, 3), 7, np.uint8), np.full((8, 8), 65535, np.uint16)
    picture = comparison_picture(source, large, deep, truth=np.full((3, 20, 3), 9, np.uint8))
    assert picture.shape == (24 + 8, 4 * 8 + 3 * 8, 3)
    assert all((picture[:24, start : start + 16] < 100).any() for start in range(0, 56, 16))  # labels
    panels = [picture[24:, start : start + 8] for start in range(0, picture.shape[1], 16)]
    assert np.array_equal(panels[0], source.repeat(4, axis=0).repeat(4, axis=1))
    assert [int(panel[0, 0, 0]) for panel in panels[1:]] == [7, 255, 9]
    assert (panels[3][3:] == 0).all()  # the original is padded to the result's size


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_value_survives_the_model_range(dtype, channels):
    count = np.iinfo(dtype).max + 1
    pixels = np.random.default_rng(0).permutation(np.repeat(np.arange(count), 3)).astype(dtype)
    pixels = pixels.reshape((256, -1, 3) if channels == 3 else (256, -1))
    unit = pixels_to_unit(pixels)
    assert unit.shape == (channels, *pixels.shape[:2])
    assert unit.dtype == torch.float32
    assert (unit.min(), unit.max()) == (0, 1)
    assert (to_model_range(unit).min(), to_model_range(unit).max()) == (-1, 1)
    assert np.array_equal(unit_to_pixels(to_unit_range(to_model_range(unit)), dtype), pixels)


def test_16_bits_are_rounded_to_8_exactly():
    every_value = np.arange(65536, dtype=np.uint16)[None]
    assert np.array_equal(as_rgb8(every_value)[..., 1], np.rint(every_value / 257))


def test_unit_to_pixels_clamps_and_rounds_half_up():
    values = torch.tensor([-0.7, 0.5 / 255, 0.499 / 255, 1.5 / 255, 2.5 / 255, 1.3], dtype=torch.float64)
    assert unit_to_pixels(values[None, None]).tolist() == [[0, 1, 0, 2, 3, 255]]
    deep = torch.tensor([0.5 / 65535, 65534.5 / 65535, 65534.49 / 65535], dtype=torch.float64)
    assert unit_to_pixels(deep[None, None], np.uint16).tolist() == [[1, 65535, 65534]]


def test_tensors_that_are_no_image_are_refused():
    for value, said in ((torch.zeros(2, 4, 4), r"\(2, 4, 4\)"), (torch.full((1, 4, 4), torch.nan), "NaN")):
        with pytest.raises(ValueError, match=said):
            unit_to_pixels(value)
