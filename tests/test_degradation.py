"""The degradations of photos: each step does what it says, and all of it can be repeated."""

import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from scipy.signal import freqz
from skimage.data import astronaut
from skimage.registration import phase_cross_correlation

import evaluate
import train_diffusion
from bicubic import resize
from degradation import (
    KINDS,
    Degradation,
    bell_kernel,
    gaussian_noise,
    grain,
    jpeg,
    poisson_noise,
    sinc_kernel,
)
from engine.options import OptionError
from models import load_model
from restoration import RestoreConfig, Restorer
from tests.runs import flags, newest

RANDOM_KINDS = ["light", "photo", "heavy"]
PLAIN = {"clean_share": 0, "gaussian_share": 1, "final_sinc_share": 0}


@pytest.fixture(scope="module")
def picture():
    return torch.from_numpy(astronaut()[:256, 100:356].transpose(2, 0, 1).copy())


def random(seed=0):
    return np.random.default_rng(seed)


# ---------------------------------------------------------------------------------------------------- kernels


@given(st.integers(0, 2**32), st.sampled_from(RANDOM_KINDS))
def test_kernels_sum_to_1_and_do_not_shift(seed, kind):
    kernel = Degradation(kind).blur_kernel((0.2, 3.0), random(seed))
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    assert kernel.shape[0] == kernel.shape[1]
    assert kernel.shape[0] % 2 == 1
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-7)


def test_an_anisotropic_kernel_is_wide_along_its_angle():
    kernel = bell_kernel(41, (4.0, 2.0), math.pi / 6, 1.0, plateau=False)
    axes = np.meshgrid(np.arange(41) - 20, np.arange(41) - 20)
    covariance = [[(kernel * a * b).sum() for a in axes] for b in axes]
    turn = np.array([[math.cos(math.pi / 6), -0.5], [0.5, math.cos(math.pi / 6)]])
    np.testing.assert_allclose(covariance, turn @ np.diag([16, 4]) @ turn.T, rtol=1e-3)


def test_plateaus_and_shapes_follow_their_formulas():
    wide = bell_kernel(31, (3.0, 3.0), 0.0, 1.5, plateau=True)
    assert wide[15, 18] / wide[15, 15] == pytest.approx(0.5)  # 1 / (1 + 1)
    sharp = bell_kernel(31, (3.0, 3.0), 0.0, 0.5, plateau=False)
    assert sharp[15, 21] / sharp[15, 15] == pytest.approx(math.exp(-0.5 * 2))


@pytest.mark.parametrize("cutoff", [0.3, 0.5, 0.8])
def test_a_sinc_kernel_passes_half_the_amplitude_at_its_cutoff(cutoff):
    rows = sinc_kernel(201, cutoff).sum(axis=0, dtype=np.float64)
    _, response = freqz(rows, worN=[0.6 * cutoff * math.pi, cutoff * math.pi, 1.2 * cutoff * math.pi])
    passed, middle, stopped = np.abs(response)
    assert passed == pytest.approx(1, abs=0.05)
    assert middle == pytest.approx(0.5, abs=0.1)
    assert stopped < 0.06


# ----------------------------------------------------------------------------------------------- single steps


@pytest.mark.parametrize(
    ("make", "amount", "light", "deviation"),
    [
        *((gaussian_noise, sigma, 0.5, sigma / 255) for sigma in (2.0, 25.0)),
        # of photons
        *((poisson_noise, 2.0, light, 2 * math.sqrt(light / 256)) for light in (0.05, 0.5, 1.0)),
    ],
)
@pytest.mark.parametrize("grey", [False, True])
def test_noise_has_the_deviation_that_is_asked(make, amount, light, deviation, grey):
    noise = make(np.full((200, 200, 3), light, np.float32), amount, grey, random()) - light
    assert noise.std() == pytest.approx(deviation, rel=0.02)
    assert noise.mean() == pytest.approx(0, abs=deviation / 50)
    between = np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]
    assert between == pytest.approx(1 if grey else 0, abs=0.02)


@pytest.mark.parametrize("size", [0.6, 2.0])
def test_grain_is_coarse_and_has_half_as_much_luma_as_chroma(size):
    noise = grain((512, 512, 3), 10.0, size, random())
    luma_cr_cb = noise.astype(float) @ [
        [0.114, 0.5, -0.0813],
        [0.587, -0.3313, -0.4187],
        [0.299, -0.1687, 0.5],
    ]
    assert luma_cr_cb.std((0, 1)) * 255 == pytest.approx([5, 10, 10], rel=0.1)
    neighbours = np.corrcoef(noise[:, 1:, 0].ravel(), noise[:, :-1, 0].ravel())[0, 1]
    assert neighbours == pytest.approx(math.exp(-1 / (4 * size**2)), abs=0.1)
    grey = grain((512, 512), 10.0, size, random())
    assert grey.std() * 255 == pytest.approx(10, rel=0.1)


def test_the_share_of_grain_is_what_is_asked():
    flat = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    silent = {"jpeg_share": 0, "noise_sigma": (0, 0), "second_noise_sigma": (0, 0)}
    degrade = Degradation("photo", **PLAIN, **silent, grain_share=0.5, grain_sigma=(20, 20))
    grainy = [bool(degrade(flat, random(n)).float().std() > 1) for n in range(100)]
    assert np.mean(grainy) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_has_the_quality_that_is_asked(quality, picture):
    pixels, reference = picture.numpy().transpose(1, 2, 0), io.BytesIO()
    Image.fromarray(pixels).save(reference, "JPEG", quality=quality)
    ours = JpegImageFile(io.BytesIO(jpeg(pixels[..., ::-1] / 255, quality).tobytes()))
    assert ours.quantization == Image.open(reference).quantization
    assert ours.size == (256, 256)


# ------------------------------------------------------------------------------------------------- altogether


@pytest.mark.parametrize(
    "options", [{"kind": "heavy", "strength": 0.0}, {"kind": "photo", "clean_share": 1.0}, {}]
)
@pytest.mark.parametrize("scale", [2.0, 4.0, 1.5])
def test_no_strength_is_bicubic_exactly(picture, options, scale):
    image = picture[:, :240, :192]
    expected = resize(image, scale=1 / scale, border="replicate", rounding="uint8")
    assert torch.equal(Degradation(scale=scale, border="replicate", **options)(image, random()), expected)


def test_bicubic_takes_batches_and_no_generator_and_others_need_one(picture):
    batch = torch.stack([picture, picture.flip(-1)])
    assert torch.equal(Degradation()(batch)[0], Degradation()(picture))
    with pytest.raises(ValueError, match="photo"):
        Degradation("photo")(picture)
    for degradation, image in (("bicubic", picture / 255), ("photo", picture / 255), ("photo", batch)):
        with pytest.raises(ValueError, match=str(image.dtype)):
            Degradation(degradation)(image, random())


@pytest.mark.slow
@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_the_result_lies_exactly_over_bicubics(picture, kind):
    grey = [Degradation(kind, clean_share=0)(picture, random(seed)).float().mean(0) for seed in range(12)]
    expected = Degradation()(picture).float().mean(0)
    shifts = [
        phase_cross_correlation(expected.numpy(), one.numpy(), upsample_factor=20, normalization=None)[0]
        for one in grey
    ]
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.06
    assert np.abs(shifts).max() < 0.3


def test_more_strength_is_further_from_bicubic(picture):
    def error(kind):
        degraded = [Degradation(kind, clean_share=0)(picture, random(seed)) for seed in range(8)]
        return float((torch.stack(degraded).float() - Degradation()(picture).float()).square().mean())

    errors = [error(kind) for kind in ("bicubic", *RANDOM_KINDS)]
    assert errors == sorted(errors)


@pytest.mark.parametrize("scale", [4.0, 2.0, 1.5])
def test_sizes_are_bicubics_and_grey_stays_grey(picture, scale):
    for image in (picture[:, :101, :77], picture[:1, :101, :77]):
        heavy = Degradation("heavy", scale, clean_share=0)
        assert heavy(image, random()).shape == Degradation(scale=scale)(image).shape


def test_colours_keep_their_places():
    red = torch.zeros(3, 64, 64, dtype=torch.uint8)
    red[0] = 200
    mean = Degradation("light", clean_share=0)(red, random()).float().mean((1, 2))
    torch.testing.assert_close(mean, torch.tensor([200.0, 0, 0]), atol=8, rtol=0)


def test_the_clean_share_is_what_is_asked(picture):
    small, photo = picture[:, :32, :32], Degradation("photo", clean_share=0.5)
    clean = [torch.equal(photo(small, random(n)), Degradation()(small)) for n in range(100)]
    assert np.mean(clean) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(("share", "between"), [(0.0, (-0.1, 0.1)), (1.0, (0.4, 1.0))])
def test_noise_is_white_in_colour_unless_jpeg_halves_the_chroma(share, between):
    flat = torch.full((3, 512, 512), 128, dtype=torch.uint8)
    noise = {"grey_share": 0, "second_resize_shares": (0, 0, 1), "second_noise_sigma": (20, 20)}
    noisy = Degradation("heavy", jpeg_quality=(90, 90), jpeg_share=share, **PLAIN, **noise)
    image = noisy(flat, random()).numpy().astype(float)
    chroma = image[0] - image[1]
    neighbours = np.corrcoef(chroma[:, 1:].ravel(), chroma[:, :-1].ravel())[0, 1]
    assert between[0] < neighbours < between[1]


# ---------------------------------------------------------------------------------------------------- options


def test_records_of_former_versions_are_read():
    bicubic = {"kind": "bicubic", "scale": 2.0, "border": "mirror"}
    assert Degradation.from_dict(bicubic) == Degradation(scale=2.0)
    photo = {**Degradation("photo").to_dict(), "strength": None}
    assert Degradation.from_dict(photo).amount == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blur_sigma", (3.0, 1.0)),
        ("blur_sigma", (1.0,)),
        ("kernel_shares", (0.5, 0.5)),
        ("resize_shares", (0.5, 0.5, 0.5)),
        ("first_resize", (0.2, 0.8)),
    ],
)
def test_what_makes_no_sense_is_named(name, value):
    with pytest.raises(OptionError, match=name):
        Degradation("photo", **{name: value})


@pytest.mark.parametrize(
    "given", [{"kind": "sepia"}, {"jpeg_share": 0.5}, {"kind": "bicubic", "strength": 0.4}]
)
def test_an_unknown_kind_and_amounts_of_bicubic_are_refused(given):
    with pytest.raises(OptionError, match=re.escape(str([*given.values()][-1]))):
        Degradation.of(**given)


@pytest.mark.slow
def test_a_kind_of_ones_own_is_one_line(photo_folder, tmp_path, monkeypatch):
    """It is trained with, resumed, measured with, and restored with where the line is missing."""
    monkeypatch.setitem(KINDS, "scan", {"strength": 0.3, "jpeg_share": 0.0, "grey_share": 1.0})
    monkeypatch.chdir(tmp_path)
    more = "--max_steps 1 --degradation scan --second_blur_share 0.5".split()
    assert train_diffusion.main(flags(photo_folder, tmp_path, *more)) == 0
    path = newest(tmp_path)
    assert train_diffusion.main(["--weights_path", str(path), "--max_steps", "2"]) == 0
    how = "--scale 2 --degradation scan --limit 1 --no_lpips --json table.json"
    assert evaluate.main(["--data", str(photo_folder), *how.split()]) == 0
    assert "scan: " in Path("table.json").read_text()
    scan = Degradation.of(kind="scan", scale=2.0, second_blur_share=0.5)
    assert (scan.amount, scan.jpeg_share) == (0.3, 0.0)
    monkeypatch.delitem(KINDS, "scan")
    model = load_model(path)
    assert (model.degradation, model.step) == (scan, 2)
    with pytest.raises(OptionError, match="scan"):
        Restorer(model, RestoreConfig(consistency=True), torch.device("cpu"))
