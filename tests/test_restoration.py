"""Restoring in one piece and in windows, faithfully, with every kind of pixels, at any scale.

Networks here have random weights everywhere, also where training starts at zero, so that windows, attention
and conditioning all have an effect on the result.
"""

import errno
import io
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bicubic import resize, upscale_image
from degradation import Degradation
from diffusion import ResidualGenerator
from engine.options import OptionError
from examples.dead_leaves import dead_leaves
from imaging.files import DecodedImage, decode_image, write_image
from imaging.metadata import Metadata
from imaging.pixels import pixels_to_unit, to_model_range
from models import LoadedModel
from network import Condition
from restoration import PRESETS, RestoreConfig, Restorer, restore
from restoration.fields import release_pages, zeros
from restoration.scales import chain_to, check, plan_chain, restore_to
from restoration.tiling import Scale, Window, plan_windows
from samplers import DEFAULT_SCHEDULER, SCHEDULERS
from tests.networks import BICUBIC, PROCESS, random_model
from unet import UNet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def predicting():
    return random_model(predictor_blocks=2, patch_size=4, dim_mults=(1, 2))


@pytest.fixture(scope="module")
def picture():
    """Without black and white, where clipping would hide what is compared."""
    drawn = dead_leaves((96, 80), np.random.default_rng(3))
    return (40 + 0.7 * drawn).astype(np.uint8)


@pytest.fixture(scope="module")
def patch(picture):
    return picture[:40, :40]


def run(image, model, **settings):
    return restore(image, model, RestoreConfig(**settings), device="cpu", precision="fp32")


def psnr(a, b):
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


# -------------------------------------------------------------------------------------------------- windows


@given(
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    side=st.integers(0, 200),
    overlap=st.integers(2, 100),
    multiple=st.sampled_from([1, 4, 16]),
)
@pytest.mark.slow
def test_weights_of_windows_sum_to_1_and_windows_begin_at_multiples(size, side, overlap, multiple):
    total = torch.zeros(size)
    for window, row_weights, column_weights in plan_windows(*size, side, overlap, multiple):
        assert side == 0 or window.top % multiple == window.left % multiple == 0
        assert side == 0 or max(window.shape) <= max(2 * multiple, side + multiple - 1)
        weights = row_weights * column_weights
        assert weights.shape == window.shape
        window.cut(total).add_(weights)
        # the outermost pixels saw the padding beyond the window
        assert window.top == 0 or overlap < 3 * multiple or not row_weights[0].any()
    torch.testing.assert_close(total, torch.ones_like(total))


FACTORS = st.sampled_from([1.0, 1.5, 1.7, 2.0, 2.4, 2.5, 3.0, 10 / 3, 4.0])


@pytest.mark.slow
@given(data=st.data(), factor=FACTORS, height=st.integers(1, 60), width=st.integers(1, 60))
def test_a_window_is_resized_as_in_the_whole_image(data, factor, height, width):
    low_res = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = Scale(float(torch.tensor(factor, dtype=torch.float32)))  # as a checkpoint holds it
    whole = resize(low_res, scale=factor)
    assert whole.shape[-2:] == scale.high_size(height, width)

    def span(length):
        start = data.draw(st.integers(0, length - 1))
        return start, data.draw(st.integers(start + 1, length))

    high = Window(*span(whole.shape[1]), *span(whole.shape[2]))
    torch.testing.assert_close(scale.upscale(low_res, high), high.cut(whole))
    low = Window(*span(height), 0, width)
    expected = low.cut(resize(whole, scale=1 / factor))
    torch.testing.assert_close(scale.downscale(whole, low, CPU), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("large", [False, True])
def test_large_zeros_are_a_tensor_like_any_other_in_a_file_that_leaves_nothing(large, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("restoration.fields.IN_MEMORY_BYTES", 10**3 if large else 10**9)
    field = zeros((2, 3, 500, 64), CPU)
    assert not field.any()
    values = torch.rand(3, 4, 53, generator=torch.Generator().manual_seed(0))
    place = Window(495, 499, 7, 60).cut(field[1])
    place += values
    release_pages()
    assert torch.equal(place, values)
    assert field.count_nonzero() == values.count_nonzero()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "scheduler"),
    [
        *(({"conditioning": "both"}, scheduler) for scheduler in SCHEDULERS),
        ({"conditioning": "concat", "patch_size": 4, "dim_mults": (1, 2)}, DEFAULT_SCHEDULER),
        ({"conditioning": "concat", "norm": "group", "gain": 0.3}, DEFAULT_SCHEDULER),
    ],
    ids=str,
)
def test_windows_give_what_one_piece_gives_and_no_seams(how, scheduler, picture):
    loaded, options = random_model(**how), {"steps": 4, "scheduler": scheduler}
    whole, tiled = (run(picture, loaded, tile=tile, **options).pixels.astype(float) for tile in (0, 256))
    assert whole.std() > 20
    assert psnr(whole, tiled) >= 45
    multiple = loaded.network.window_multiple
    overlap = math.ceil(64 / multiple) * multiple
    for axis, length in enumerate(whole.shape[:2]):
        starts = range(256 - overlap, length - overlap, 256 - overlap)
        borders = [line for start in starts for line in (start, start + overlap) if line < length]
        seams = [np.diff(image, axis=axis).take(np.array(borders) - 1, axis=axis) for image in (tiled, whole)]
        assert np.square(seams[0]).sum() <= 1.02 * np.square(seams[1]).sum()


def test_windows_are_of_the_given_side_or_by_the_size_of_the_image(model, caplog):
    sides = {None: (512, 512), 0: (1024, 1200), 128: (128, 128), 192: (192, 192), 64: (128, 128)}
    for tile, side in sides.items():
        assert not caplog.text
        restorer = Restorer(model, RestoreConfig(tile=tile), CPU)
        assert restorer.tiles(1024, 1200, 64)[0].window.shape == side
        assert tile or len(restorer.tiles(1024, 1024, 64)) == 1
    assert "at least 128; going on with 128" in caplog.text  # than 64, which no window can have


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), MemoryError(), OSError(errno.ENOMEM, "")], ids=repr
)
def test_windows_get_smaller_where_memory_runs_out_and_stay_so(error, model, caplog, monkeypatch):
    """With estimates that do not depend on their windows."""
    low_res, seen, limit = torch.rand(1, 3, 96, 80), [], 200
    restorer = Restorer(model, RestoreConfig(tile=0, steps=2), CPU)

    def estimate(network, noisy, timestep, context, base):
        seen.append(max(noisy.shape[-2:]))
        if timestep != 999 and seen[-1] > limit:  # at first all is well
            raise error
        return noisy / 2

    monkeypatch.setattr(restorer.generator, "estimate", estimate)
    restored = restorer(low_res)
    assert seen[:3] == [384, 384, 192]
    assert restorer.side == 192
    assert "192" in caplog.text
    limit = 400
    restorer.side = 0
    torch.testing.assert_close(restored, restorer(low_res))
    limit = 0
    with pytest.raises(torch.OutOfMemoryError, match="128"):
        restorer(low_res)
    error = RuntimeError("shape mismatch")
    with pytest.raises(RuntimeError, match="mismatch"):
        restorer(low_res)


MEASURE = """
import resource, sys
sys.path.insert(0, {root!r})
import numpy as np, torch
torch.set_num_threads(1)
from tests.networks import random_model
from tests.test_restoration import run
model = random_model(patch_size=4, dim_mults=(1, 2))
for side in (256, 512):
    run(np.zeros((side, side, 3), np.uint8) + 100, model, steps=1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_peak_memory_hardly_grows_with_the_image():
    script = MEASURE.format(root=str(Path(__file__).parent.parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    small, large = (int(line) / 1024 for line in done.stdout.split())  # 1 and 4.2 megapixels of result
    one_field = 2048**2 * 3 * 4 / 2**20  # MiB; a sampler has three
    assert large - small < 0.75 * one_field


# ------------------------------------------------------------------------------------------------ sampling


def test_one_piece_is_what_the_generator_gives_and_the_same_bytes_again(model, predicting, patch):
    low_res = to_model_range(pixels_to_unit(patch))[None]
    for loaded, steps, seed in ((predicting, 2, 5), (model, 1, 5), (model, 3, 5), (model, 3, 6)):
        expected = ResidualGenerator().generate_images(loaded.network, low_res, 1, steps, seed=seed)
        ours, again = (run(patch, loaded, steps=steps, seed=seed).pixels for _ in range(2))
        assert psnr(ours, np.round(expected[0].permute(1, 2, 0).numpy() * 255)) > 70
        assert np.array_equal(ours, again)
    assert psnr(ours, run(patch, model, steps=3, seed=5).pixels) < 40


@pytest.mark.slow
def test_mean_and_deviation_are_those_of_the_samples(model, patch):
    restorer = Restorer(model, RestoreConfig(steps=2, num_images=3), CPU)
    result = restorer.restore(patch, deviation=True)
    low_res = to_model_range(pixels_to_unit(patch))[None]
    samples = ResidualGenerator().generate_images(model.network, low_res, 3, 2, seed=0)
    mean = samples.mean(0).permute(1, 2, 0).numpy()
    assert np.abs(result.pixels / 255 - mean).max() < 0.6 / 255
    expected = samples.var(0).mean(0).sqrt().numpy()
    np.testing.assert_allclose(result.deviation, expected, atol=1e-4)
    with pytest.raises(ValueError, match="at least 2"):
        Restorer(model, RestoreConfig(), CPU).restore(patch, deviation=True)


def test_self_ensemble_turns_with_the_image(predicting, patch):
    """The mean of a turned image is the turned mean."""
    low_res = pixels_to_unit(patch)[None]

    def turn(image):
        return image.rot90(1, (2, 3)).flip(3)

    def upright_and_turned(**how):
        restorer = Restorer(predicting, RestoreConfig(mode="fidelity", **how), CPU)
        return restorer(low_res), turn(restorer(turn(low_res)))

    upright, turned = upright_and_turned(self_ensemble=True)
    torch.testing.assert_close(upright, turned, rtol=0, atol=1e-5)
    alone, other = upright_and_turned()
    assert (alone - other).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"mode": "fidelity"}, {"steps": 2, "num_images": 2}])
def test_progress_rises_to_1(predicting, picture, options):
    seen = []
    Restorer(predicting, RestoreConfig(tile=128, **options), CPU).restore(picture, progress=seen.append)
    assert seen == sorted(seen)
    assert len(seen) > 8
    assert 0 < seen[0] < 0.2
    assert seen[-1] == 1


# ------------------------------------------------------------------------------------- what it is faithful to


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factor", "border", "other"),
    [(4.0, "mirror", "replicate"), (4.0, "replicate", "mirror"), (2.5, "mirror", "replicate")],
)
def test_consistency_makes_the_result_shrink_to_the_input_with_the_recorded_border(
    factor, border, other, picture
):
    loaded = random_model(scale=factor)._replace(degradation=Degradation(scale=factor, border=border))
    low_res = pixels_to_unit(picture)[None]

    def error(restored, border):
        return (resize(restored, scale=1 / factor, border=border) - low_res).abs().max()

    free, bound = (
        Restorer(loaded, RestoreConfig(steps=1, consistency=on), CPU)(low_res) for on in (False, True)
    )
    assert error(bound, border) < 1 / 255 < error(bound, other) < error(free, border)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0, 0)),
        ({"mode": "fidelity"}, (0, 0)),
        ({"detail": 0}, (0, 0)),
        ({"mode": "detail"}, (6, 1)),
        ({"num_images": 7}, (6, 1)),
        ({"steps": 4}, (4, 1)),
        ({"mode": "balanced", "steps": 3}, (3, PRESETS["balanced"])),
        ({"mode": "balanced", "detail": 0.7}, (6, 0.7)),
    ],
    ids=str,
)
def test_presets_are_overridden_by_what_is_given(options, expected):
    assert RestoreConfig(**options).steps_and_detail() == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "fast"},
        {"overlap": 0},
        {"eta": float("nan")},
        {"eta": 0.5},  # of ddim alone
        {"steps": 1001},
        {"steps": 0},  # without a predictor
        {"self_ensemble": True},
        {"consistency": True},  # of what no bicubic shrank
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_the_work_by_its_field(wrong, model):
    other = model._replace(degradation=Degradation("photo"))
    with pytest.raises(OptionError) as caught:
        Restorer(other, RestoreConfig(**wrong), CPU)
    assert [caught.value.field] == list(wrong)


def test_a_network_that_cannot_restore_and_images_that_are_no_batch_are_refused(model):
    with pytest.raises(ValueError, match="never trained"):
        Restorer(LoadedModel(UNet(base_dim=8), PROCESS, BICUBIC, 0), RestoreConfig(), CPU)
    for shape in ((3, 8, 8), (1, 1, 8, 8)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            Restorer(model, RestoreConfig(), CPU)(torch.zeros(shape))


# -------------------------------------------------------------------------------------------- kinds of pixels


@pytest.mark.slow
def test_16_bits_stay_16_bits(model, picture):
    deep = np.minimum(picture.astype(np.uint32) * 257 + 1, 65535).astype(np.uint16)
    fine, coarse = run(deep, model).pixels, run(picture, model).pixels
    assert fine.dtype == np.uint16
    assert len(np.unique(fine)) > 1000
    assert psnr(fine / 257, coarse) > 50


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 40)])
def test_any_size_is_restored(size, model, picture):
    assert run(picture[: size[0], : size[1]], model, steps=2).pixels.shape == (4 * size[0], 4 * size[1], 3)


# --------------------------------------------------------------------------------------- the predicted mean


def test_fidelity_is_the_predicted_mean_whatever_the_noise(predicting, picture):
    unet = predicting.network
    low_res = to_model_range(pixels_to_unit(picture))[None]
    upscaled = upscale_image(low_res, 4).clamp(-1, 1)
    _, mean = unet.encode_context(Condition(upscaled, low_res))
    expected = ((upscaled + unet.residual_std * mean).clamp(-1, 1) + 1) / 2
    restored = [
        Restorer(predicting, RestoreConfig(mode="fidelity", seed=n), CPU)(low_res / 2 + 0.5) for n in (0, 1)
    ]
    torch.testing.assert_close(restored[0], expected, atol=1e-6, rtol=0)
    assert torch.equal(*restored)
    generated = ResidualGenerator().generate_images(unet, low_res, 1, 0)
    torch.testing.assert_close(generated, expected, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [64, 128])
def test_the_predicted_mean_is_exact_in_tiles(predicting, picture, tile):
    low_res = pixels_to_unit(picture)[None]
    whole = Restorer(predicting, RestoreConfig(tile=0), CPU)(low_res)
    tiled = Restorer(predicting, RestoreConfig(tile=tile), CPU)(low_res)
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------- kinds of images


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_kind_of_image_is_restored_alike(model, picture, tmp_path, channels):
    image = picture[:20, :24, 0] if channels == 1 else picture[:20, :24]
    alpha = np.full((20, 24), 200, np.uint8) if channels == 4 else None
    path, samples = tmp_path / "a.png", image if alpha is None else np.dstack([image, alpha])
    write_image(path, image, alpha, metadata=Metadata(dpi=(300, 300)))
    planes = torch.from_numpy(np.atleast_3d(samples).copy()).permute(2, 0, 1)
    named = (path, str(path), decode_image(path))
    first, *others = (
        run(one, model) for one in (*named, samples, Image.fromarray(samples), planes, planes / 255)
    )
    assert first.metadata.dpi == pytest.approx((300, 300), abs=0.01)
    assert first.pixels.shape == ((80, 96) if channels == 1 else (80, 96, 3))
    for result in others:
        assert np.array_equal(result.pixels, first.pixels)
        assert np.array_equal(result.alpha, first.alpha)
    assert first.alpha is alpha or (first.alpha == np.full((80, 96), 200)).all()
    assert np.array_equal(first.pixels, run(image, model).pixels)
    if channels == 1:
        with_axis = run(image[..., None], model)
        assert with_axis.pixels.shape == (80, 96, 1)
        with_axis.save(path)
        assert np.array_equal(decode_image(path).pixels, first.pixels)


def test_a_pil_image_is_upright_rgb_without_what_is_damaged(model, picture):
    image = Image.fromarray(picture[:8, :6])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(buffer := io.BytesIO(), "PNG", exif=exif)
    assert run(Image.open(buffer), model).pixels.shape == (24, 32, 3)
    printed = image.convert("CMYK")
    printed.info["icc_profile"] = bytes(16) + b"CMYK" + bytes(108)
    junk, turned = image.copy(), image.copy()
    junk.info["exif"] = b"junkjunkjunk"
    turned.getexif()[0x0112] = "upright"
    for one in (printed, junk, turned):
        result = run(one, model)
        assert result.pixels.shape == (32, 24, 3)
        assert result.metadata.icc_profile is result.metadata.exif is None


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((8, 8, 3)),
        torch.zeros(8, 8, 3),
        torch.full((3, 8, 8), 1.5),
        torch.full((3, 8, 8), math.nan),
        Image.new("F", (8, 8)),
        b"bytes",
    ],
    ids=lambda image: f"{type(image).__name__} {getattr(image, 'shape', '')}",
)
def test_what_is_no_image_is_refused_with_what_is_one(image, model):
    with pytest.raises(ValueError, match="PIL"):
        run(image, model)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_hidden_colours_do_not_show_at_the_edge_of_what_is_seen(dtype):
    """A white disc on transparent black, put on white, is white."""
    network = random_model(gain=0.02)  # nearly bicubic
    y, x = np.mgrid[:40, :40]
    largest = np.iinfo(dtype).max
    alpha = ((x - 20) ** 2 + (y - 20) ** 2 < 144).astype(dtype) * largest
    result = run(np.dstack([alpha] * 4), network)
    opacity = result.alpha[..., None] / largest
    over_white = opacity * result.pixels + (1 - opacity) * largest
    assert over_white.min() / largest > 0.98


# ------------------------------------------------------------------------------------------- any enlargement


def restorer(scale=2.0, **options):
    return Restorer(random_model(scale), RestoreConfig(**({"steps": 1} | options)), CPU)


@pytest.mark.parametrize(
    ("scale", "factors", "expected"),
    [(3, [2, 4], (4,)), (4, [2, 4], (4,)), (6, [2, 4], (4, 2)), (5, [3], (3, 3))],
)
def test_the_fewest_models_that_exceed_the_scale_least(scale, factors, expected):
    assert plan_chain(scale, factors) == expected


@given(scale=st.floats(1.01, 16), factors=st.sets(st.sampled_from([1.5, 2, 3, 4, 8]), min_size=1))
def test_a_chain_reaches_the_scale_and_no_shorter_one_of_its_models_does(scale, factors):
    chain = plan_chain(scale, sorted(factors))
    assert math.prod(chain) > scale - 1e-6
    assert all(math.prod(chain) / factor < scale for factor in set(chain))


def test_the_scale_of_the_model_is_the_model_itself_and_one_beside_it_is_not():
    doubling = restorer(2.4)  # kept in single precision
    for scale in (2.4, None):
        assert chain_to(scale, [doubling]).restorers == (doubling,)
    near = chain_to(2.4001, [doubling])
    assert float(near.scale) == pytest.approx(2.4001, abs=3e-6)
    assert len(near.restorers) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "passes"), [(1.5, 1), (3.0, 2), (3.7, 2), (4.0, 2)])
def test_a_result_is_the_repeated_models_shrunk_as_a_whole(scale, passes):
    """70 rows become more than one band."""
    doubling, low_res = restorer(), np.random.default_rng(0).integers(256, size=(70, 9, 3), dtype=np.uint8)
    result, expected = restore_to(chain_to(scale, [doubling]), low_res).pixels, low_res
    for _ in range(passes):
        expected = doubling.restore(expected).pixels
    whole = torch.from_numpy(expected).permute(2, 0, 1)
    shrunk = resize(whole, scale=scale / 2**passes)[:, : result.shape[0], : result.shape[1]]
    assert result.shape == (math.ceil(round(scale * 70, 9)), math.ceil(round(scale * 9, 9)), 3)
    assert np.array_equal(result, shrunk.permute(1, 2, 0))


def test_pictures_keep_depth_alpha_and_grey_and_the_deviation_is_shrunk_too():
    seen = []
    pixels = (dead_leaves((10, 12), np.random.default_rng(0)).astype(np.uint16) * 257)[..., 0]
    alpha = np.linspace(0, 65535, 120).reshape(10, 12).astype(np.uint16)
    chain = chain_to(1.5, [restorer(steps=2, num_images=2)])
    result = restore_to(chain, DecodedImage(pixels, alpha), deviation=True, progress=seen.append)
    assert result.pixels.shape == result.alpha.shape == result.deviation.shape == (15, 18)
    assert result.pixels.dtype == result.alpha.dtype == np.uint16
    assert abs(result.pixels.mean() / pixels.mean() - 1) < 0.3
    assert result.deviation.min() >= 0
    assert seen == sorted(seen)
    assert seen[-1] == 1


@pytest.mark.parametrize("scale", [1.0, 0.5, 17.0, float("nan")])
def test_a_scale_out_of_range_is_refused(scale):
    with pytest.raises(OptionError, match=f"{scale}"):
        plan_chain(scale, [2.0])


def test_what_several_passes_cannot_do_is_refused_without_a_picture():
    with pytest.raises(OptionError, match="consistency"):
        chain_to(3.0, [restorer(consistency=True)])
    with pytest.raises(OptionError, match=r"3\.0.*x2 and x2"):
        check(chain_to(3.0, [restorer(steps=2, num_images=2)]), deviation=True)
