"""Tests of bicubic.py against published MATLAB outputs and its definition."""

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bicubic import downscale_image, resize, upscale_image
from imaging.files import read_rgb, write_image

# folder -> scale, border, rounding: the conventions under which the files were published
PUBLISHED = {
    "LRx2": (2, "replicate", "uint8"),
    "LRx4": (4, "replicate", "uint8"),
    "LRx8": (8, "replicate", "uint8"),
    "LRx2_mirror": (2, "mirror", "uint8"),
    "LRx4_mirror": (4, "mirror", "uint8"),
    "LRx8_mirror": (8, "mirror", "none"),
}

lengths = st.integers(1, 48)
sizes = st.tuples(lengths, lengths)
scales = st.one_of(
    st.sampled_from([1 / 8, 1 / 3, 0.4, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0]), st.floats(0.06, 9)
)
borders = st.sampled_from(["mirror", "replicate"])
dtypes = st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
seeds = st.integers(0, 2**31)


def random_image(*shape, dtype=torch.float64, seed=0):
    """Values from 0 to 255."""
    values = 256 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.clamp(max=255).to(dtype)


def cubic(x):
    """Keys (1981), with a = -1/2."""
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def definition(line, scale, out_size, border):
    """One direction of MATLAB's ``imresize``, pixel by pixel."""
    result = np.zeros(out_size)
    stretch = min(scale, 1)
    mirrored = [*range(len(line)), *reversed(range(len(line)))]
    for i in range(out_size):
        center = (i + 0.5) / scale - 0.5
        near = range(math.floor(center - 2 / stretch) - 1, math.ceil(center + 2 / stretch) + 2)
        weights = [cubic((center - j) * stretch) for j in near]
        if border == "replicate":
            taps = [line[min(max(j, 0), len(line) - 1)] for j in near]
        else:
            taps = [line[mirrored[j % len(mirrored)]] for j in near]
        result[i] = np.dot(weights, taps) / sum(weights)
    return result


# References


@pytest.mark.parametrize("folder", PUBLISHED)
def test_published_low_resolution_files_have_no_differing_pixel(folder, sr_data):
    scale, border, rounding = PUBLISHED[folder]
    paths = sorted((sr_data / "test" / "Set5" / folder).iterdir())
    assert len(paths) == 5
    for path in paths:
        high_res = read_rgb(path.parent.parent / path.name)
        height, width = (length // scale * scale for length in high_res.shape[:2])
        planes = torch.from_numpy(high_res[:height, :width]).permute(2, 0, 1)
        low_res = resize(planes, scale=1 / scale, border=border, rounding=rounding)
        np.testing.assert_array_equal(low_res.permute(1, 2, 0).numpy(), read_rgb(path))


@given(lengths, scales, borders, seeds)
def test_resize_equals_its_definition_in_both_directions(length, scale, border, seed):
    line = random_image(length, seed=seed)
    rows = resize(line[:, None], scale=scale, border=border)[:, 0]
    columns = resize(line[None], scale=scale, border=border)[0]
    expected = definition(line.numpy(), scale, len(rows), border)
    np.testing.assert_allclose(rows.numpy(), expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(columns.numpy(), expected, rtol=0, atol=1e-11)


# Sizes, rounding, dtypes


@given(sizes, st.integers(1, 16), st.integers(1, 16), borders, dtypes)
def test_a_resized_image_has_ceil_of_scale_times_size_pixels_of_its_dtype(size, above, below, border, dtype):
    image = random_image(2, *size, dtype=dtype)
    resized = resize(image, scale=above / below, border=border)
    assert list(resized.shape[1:]) == [math.ceil(Fraction(above * length, below)) for length in size]
    assert resized.dtype == dtype
    if dtype.is_floating_point:  # rounded once
        assert torch.equal(resized, resize(image.double(), scale=above / below, border=border).to(dtype))


@given(sizes, scales, borders, seeds)
def test_uint8_is_the_exact_result_rounded_half_up_and_clamped(size, scale, border, seed):
    image = random_image(*size, seed=seed, dtype=torch.uint8)
    exact = resize(image.double(), scale=scale, border=border)
    expected = (exact + 0.5).floor().clamp(0, 255).to(torch.uint8)
    assert torch.equal(resize(image, scale=scale, border=border), expected)


@pytest.mark.parametrize(("size", "first"), [((10, 30), 0), ((30, 10), 1), ((15, 15), 0)])
def test_rounding_after_each_direction_starts_with_the_smaller_scale(size, first):
    image = random_image(20, 20, dtype=torch.uint8)
    steps = [(size[0], 20), (20, size[1])]
    halfway = resize(image, size=steps[first])  # uint8: rounded and clamped
    assert torch.equal(resize(image, size=size, rounding="uint8"), resize(halfway, size=size))
    assert not torch.equal(
        resize(image, size=size, rounding="uint8"), resize(resize(image, size=steps[1 - first]), size=size)
    )


def test_autocast_does_not_coarsen_the_result():
    image = random_image(3, 40, 40, dtype=torch.float32)
    expected = resize(image, scale=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize(image, scale=4), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_cuda_gives_what_the_cpu_gives(dtype):
    image = random_image(2, 3, 70, 50, dtype=dtype)
    for scale in (0.25, 2.5):
        torch.testing.assert_close(resize(image.cuda(), scale=scale).cpu(), resize(image, scale=scale))


def test_leading_dimensions_and_memory_layout_do_not_matter():
    image = random_image(2, 3, 4, 18, 25)
    resized = resize(image, scale=1.5)
    assert resized.shape == (2, 3, 4, 27, 38)
    torch.testing.assert_close(resized[1, 2, 3], resize(image[1, 2, 3], scale=1.5))
    channels_last = image[0].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(resize(channels_last, scale=1.5), resized[0])


# Gradients and caching


@pytest.mark.parametrize(("scale", "border"), [(0.4, "mirror"), (2.5, "replicate")])
def test_gradients(scale, border):
    image = random_image(2, 5, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resize(x, scale=scale, border=border), image)


def test_weights_first_made_in_inference_mode_can_be_trained_through():
    size = 97  # of which no other test asks
    with torch.inference_mode():
        resize(torch.zeros(size, size), scale=2)
    image = torch.zeros(size, size, requires_grad=True)
    resize(image, scale=2).sum().backward()
    torch.testing.assert_close(image.grad, torch.full((size, size), 4.0), rtol=0.3, atol=0)


def test_the_memory_of_the_weights_grows_with_the_length_of_a_line():
    tracemalloc.start()
    resize(torch.zeros(1, 16001), size=(1, 16001))  # a whole matrix would take 2 GB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e7


# Paths, arrays, tensors


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(16, 20), (16, 20, 1), (16, 20, 3), (16, 20, 4)])
def test_arrays_come_back_as_they_went_in(shape, dtype):
    largest = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    array = (np.random.default_rng(0).random(shape) * largest).astype(dtype)
    planes = torch.from_numpy(np.atleast_3d(array).astype(np.float64).transpose(2, 0, 1).copy())
    for resized, scale in ((upscale_image(array, 2.5), 2.5), (downscale_image(array, 2.5), 0.4)):
        exact = resize(planes, scale=scale).numpy().transpose(1, 2, 0)
        exact = np.floor(np.clip(exact, 0, largest) + 0.5) if largest > 1 else exact
        assert (resized.dtype, resized.shape[2:]) == (dtype, shape[2:])
        assert np.array_equal(np.atleast_3d(resized), exact.astype(dtype))


def test_byte_orders_strides_read_only_memory_and_torch_s_uint16_are_taken():
    array = np.random.default_rng(0).integers(0, 65536, (12, 10, 3)).astype(np.uint16)
    expected = upscale_image(array, 2)
    assert np.array_equal(upscale_image(array[::-1, ::-1], 2), expected[::-1, ::-1])
    assert np.array_equal(upscale_image(array.astype(">u2"), 2), expected)
    planes = torch.from_numpy(array.transpose(2, 0, 1).copy())
    assert np.array_equal(upscale_image(planes, 2).numpy(), expected.transpose(2, 0, 1))
    array.flags.writeable = False
    assert np.array_equal(upscale_image(array[..., 0], 2), expected[..., 0])


def test_a_path_gives_what_its_pixels_give(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    write_image(tmp_path / "image.png", pixels)
    for path in (tmp_path / "image.png", str(tmp_path / "image.png")):
        assert np.array_equal(upscale_image(path, 3), upscale_image(pixels, 3))
        assert np.array_equal(downscale_image(path, 2), downscale_image(pixels, 2))


def test_tensors_come_back_as_tensors():
    image = random_image(2, 3, 8, 10, dtype=torch.float32)
    assert torch.equal(upscale_image(image), resize(image, scale=4))
    assert torch.equal(downscale_image(image), resize(image, scale=0.25))


# Errors


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, "None"),
        ({"scale": 2, "size": (8, 8)}, r"\(8, 8\)"),
        ({"size": (8, 0)}, r"\(8, 0\)"),
        ({"size": (8, 2.5)}, r"2\.5"),
        ({"size": (8, float("nan"))}, "nan"),
        ({"size": (8,)}, r"\(8,\)"),
        ({"scale": 2, "border": "zero"}, "zero"),
        ({"scale": 2, "rounding": "half"}, "half"),
        ({"scale": 2, "rounding": "uint8"}, "float32"),
        *(({"scale": scale}, str(scale)) for scale in (0, -1, float("nan"), float("inf"))),
    ],
)
def test_wrong_options_are_refused(options, value):
    with pytest.raises(ValueError, match=value):
        resize(torch.zeros(4, 4), **options)


@pytest.mark.parametrize(
    ("image", "value"),
    [
        (torch.zeros(0, 4), r"\(0, 4\)"),
        (torch.zeros(4), r"\(4,\)"),
        (torch.zeros(4, 4, dtype=torch.int64), "int64"),
        (np.zeros((4, 0, 3)), "4, 0"),
        (np.zeros((4, 4, 2)), r"\(4, 4, 2\)"),
        (np.zeros((1, 3, 4, 4)), r"\(1, 3, 4, 4\)"),
        (np.zeros((4, 4), bool), "bool"),
        ([[0.0, 1.0]], "list"),
    ],
)
def test_wrong_images_and_factors_are_refused(image, value):
    with pytest.raises((ValueError, TypeError), match=value):
        upscale_image(image, 2)
    with pytest.raises(ValueError, match="0"):
        downscale_image(np.zeros((4, 4)), 0)
