"""Tests of bicubic.py against published MATLAB outputs, its definition and PyTorch's own interpolation."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

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


def set5() -> Path:
    root = os.environ.get("SR_DATA")
    if not root:
        pytest.skip("SR_DATA is not set: it names the folder that holds test/Set5")
    return Path(root) / "test" / "Set5"


def published_differences(folder: str, border: str, rounding: str) -> dict[str, int]:
    scale = PUBLISHED[folder][0]
    differing = {}
    for path in sorted((set5() / folder).iterdir()):
        high_res = read_rgb(set5() / path.name)
        height, width = (length // scale * scale for length in high_res.shape[:2])
        low_res = downscale_image(high_res[:height, :width], scale, border=border, rounding=rounding)
        differing[path.stem] = int((low_res != read_rgb(path)).sum())
    return differing


def random_image(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=dtype)
    return torch.rand(*shape, generator=generator, dtype=dtype)


# Published files


@pytest.mark.parametrize("folder", PUBLISHED)
def test_published_low_resolution_files_have_no_differing_pixel(folder):
    _, border, rounding = PUBLISHED[folder]
    assert published_differences(folder, border, rounding) == dict.fromkeys(
        ["baby", "bird", "butterfly", "head", "woman"], 0
    )


@pytest.mark.parametrize("folder", ["LRx4", "LRx4_mirror", "LRx8_mirror"])
def test_published_files_tell_the_conventions_apart(folder):
    _, border, rounding = PUBLISHED[folder]
    other_border = {"mirror": "replicate", "replicate": "mirror"}[border]
    other_rounding = {"none": "uint8", "uint8": "none"}[rounding]
    assert min(published_differences(folder, other_border, rounding).values()) > 0
    assert min(published_differences(folder, border, other_rounding).values()) > 0


# Closed forms


@pytest.mark.parametrize("scale", [1.5, 2.0, 2.5, 3.0, 4.0])
def test_upscaling_reproduces_a_parabola_inside(scale):
    # Keys (1981): with a = -1/2, and no other a, the interpolation is exact for second-degree polynomials.
    x = torch.arange(40, dtype=torch.float64)
    resized = resize((x**2 - 7 * x)[None].expand(3, -1), scale=scale)
    u = (torch.arange(resized.shape[-1], dtype=torch.float64) + 0.5) / scale - 0.5
    inside = (u > 2) & (u < 37)
    torch.testing.assert_close(
        resized[:, inside], (u**2 - 7 * u)[inside].expand(len(resized), -1), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("border", ["mirror", "replicate"])
def test_scale_one_changes_nothing(border):
    floats, pixels = random_image(3, 37, 53), random_image(3, 37, 53, dtype=torch.uint8)
    assert torch.equal(resize(floats, scale=1, border=border), floats)
    assert torch.equal(resize(pixels, scale=1, border=border, rounding="uint8"), pixels)
    assert resize(floats, scale=1).data_ptr() != floats.data_ptr()


# Another implementation


@pytest.mark.parametrize("size", [(16, 24), (21, 40), (33, 50), (200, 123)])
def test_equals_torch_antialiased_bicubic_away_from_the_border(size):
    image = random_image(1, 3, 64, 96)
    ours = resize(image, size=size)
    theirs = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
    # torch leaves out what lies outside the image: it differs wherever the kernel reaches there
    rows, columns = (int(np.ceil(2 * max(1, n / m) * m / n)) for n, m in zip((64, 96), size, strict=True))
    inside = (..., slice(rows, -rows), slice(columns, -columns))
    assert ours[inside].numel() > 0
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=0, atol=1e-13)


# Sizes, rounding, dtypes


def test_rounding_errors_of_the_scale_add_no_pixel():
    assert 1.1 * 100 > 110
    assert resize(torch.zeros(100, 10), scale=1.1).shape == (110, 11)
    for factor in range(1, 60):
        assert downscale_image(np.zeros((7 * factor, 11 * factor)), factor).shape == (7, 11)


@pytest.mark.parametrize(("size", "first"), [((10, 30), 0), ((30, 10), 1), ((15, 15), 0)])
def test_rounding_after_each_direction_starts_with_the_smaller_scale(size, first):
    image = random_image(20, 20, dtype=torch.uint8)
    steps = [(size[0], 20), (20, size[1])]
    halfway = resize(image, size=steps[first])  # uint8: rounded and clamped
    assert torch.equal(resize(image, size=size, rounding="uint8"), resize(halfway, size=size))
    assert not torch.equal(
        resize(image, size=size, rounding="uint8"), resize(resize(image, size=steps[1 - first]), size=size)
    )


def test_uint8_is_rounded_half_up_and_clamped():
    # One output pixel in the middle of a step from 10 to 11 is exactly half-way, by symmetry.
    step = torch.tensor([10] * 8 + [11] * 8, dtype=torch.uint8)[None].expand(2, -1).contiguous()
    exact = resize(step.double(), size=(2, 1))
    assert torch.equal(exact, torch.full_like(exact, 10.5))
    assert torch.equal(resize(step, size=(2, 1)), torch.full((2, 1), 11, dtype=torch.uint8))
    edge = torch.tensor([0] * 8 + [255] * 8, dtype=torch.uint8)[None].expand(2, -1).contiguous()
    overshooting = resize(edge.double(), scale=4)
    assert overshooting.min() < -1
    assert overshooting.max() > 256
    expected = (overshooting + 0.5).floor().clamp(0, 255).to(torch.uint8)
    assert torch.equal(resize(edge, scale=4), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_keep_their_dtype_and_are_rounded_to_it_once(dtype):
    image = random_image(3, 30, 20).to(dtype)
    assert torch.equal(resize(image, scale=0.4), resize(image.double(), scale=0.4).to(dtype))


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
        on_device = resize(image.cuda(), scale=scale)
        assert on_device.is_cuda
        torch.testing.assert_close(on_device.cpu(), resize(image, scale=scale))


def test_leading_dimensions_and_memory_layout_do_not_matter():
    image = random_image(2, 3, 4, 18, 25)
    resized = resize(image, scale=1.5)
    assert resized.shape == (2, 3, 4, 27, 38)
    torch.testing.assert_close(resized[1, 2, 3], resize(image[1, 2, 3], scale=1.5))
    torch.testing.assert_close(
        resize(image[0].contiguous(memory_format=torch.channels_last), scale=1.5), resized[0]
    )


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


def test_awkward_arrays():
    array = np.random.default_rng(0).integers(0, 65536, (12, 10, 3)).astype(np.uint16)
    expected = upscale_image(array, 2)
    assert np.array_equal(upscale_image(array[::-1, ::-1], 2), expected[::-1, ::-1])
    assert np.array_equal(upscale_image(array.astype(">u2"), 2), expected)
    planes = torch.from_numpy(array.transpose(2, 0, 1).copy())  # torch.uint16
    assert np.array_equal(upscale_image(planes, 2).numpy(), expected.transpose(2, 0, 1))
    pixels = (array >> 8).astype(np.uint8)
    pixels.flags.writeable = False
    upscale_image(pixels, 2)
    assert np.array_equal(upscale_image(pixels[..., 0], 2), upscale_image(pixels, 2)[..., 0])


def test_a_path_gives_what_its_pixels_give(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    write_image(tmp_path / "image.png", pixels)
    for path in (tmp_path / "image.png", str(tmp_path / "image.png")):
        assert np.array_equal(upscale_image(path, 3), upscale_image(pixels, 3))
        assert np.array_equal(
            downscale_image(path, 2, border="replicate", rounding="uint8"),
            downscale_image(pixels, 2, border="replicate", rounding="uint8"),
        )


def test_tensors_come_back_as_tensors_and_size_replaces_the_factor():
    image = random_image(2, 3, 8, 10, dtype=torch.float32)
    assert upscale_image(image).shape == (2, 3, 32, 40)
    assert downscale_image(image).shape == (2, 3, 2, 3)
    assert torch.equal(upscale_image(image, 3.0), resize(image, scale=3.0))
    assert upscale_image(image, size=(9, 31)).shape == (2, 3, 9, 31)
    assert downscale_image(image, size=(5, 4)).shape == (2, 3, 5, 4)
    assert upscale_image(image[0, 0], 2).shape == (16, 20)


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
def test_wrong_images_are_refused(image, value):
    with pytest.raises((ValueError, TypeError), match=value):
        upscale_image(image, 2)


def test_an_impossible_factor_to_shrink_by_is_refused():
    with pytest.raises(ValueError, match="0"):
        downscale_image(np.zeros((4, 4)), 0)
