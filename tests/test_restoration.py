"""Restoring in one piece and in windows, faithfully, with every kind of pixels.

Networks here have random weights everywhere, also where training starts at zero, so that windows, attention
and conditioning all have an effect on the result.
"""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bicubic import resize
from diffusion import ResidualGenerator
from engine.checkpoint import LoadedModel
from evaluation.metrics import low_resolution_psnr
from examples.dead_leaves import dead_leaves
from imaging.files import pixels_to_unit, to_model_range, write_image
from imaging.metadata import Metadata
from restoration import restorer as restoration
from restoration.restorer import PRESETS, ImageRestorer, RestoreConfig, restore
from restoration.tiling import IN_MEMORY_BYTES, Field, Scale, Window, plan_tiles, row_bands
from samplers import SCHEDULERS
from unet import UNet

PROCESS = {"timesteps": 1000, "mode": "v_prediction", "schedule": "cosine"}
CPU = torch.device("cpu")


def random_model(scale=4.0, gain=1.0, **settings):
    """A small network whose zero-initialised layers are random too."""
    torch.manual_seed(0)
    unet = UNet(base_dim=8, context_dim=16, head_dim=8, **settings)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=gain / math.sqrt(parameter[0].numel()))
        unet.residual_std.fill_(0.12)
        unet.scale.fill_(scale)
    return LoadedModel(unet.eval().requires_grad_(False), PROCESS, 1)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def picture():
    return dead_leaves((96, 80), np.random.default_rng(3))


def run(image, model, **settings):
    return restore(image, model, RestoreConfig(**settings), device="cpu", precision="fp32")


def psnr(a, b):
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


# -------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "margin"), [(1000, 256, 64, 16), (300, 256, 128, 0), (257, 256, 2, 0)]
)
def test_windows_cover_every_pixel_with_weights_that_sum_to_1(length, tile, overlap, margin):
    total = torch.zeros(length, 300)
    for one in plan_tiles(length, 300, tile, overlap, margin):
        top, bottom, left, right = one.window
        assert top % (tile - overlap) == 0
        assert bottom - top <= tile
        weights = one.row_weights * one.column_weights
        assert weights.shape == one.window.shape
        total[top:bottom, left:right] += weights
        if top > 0 and margin:
            assert not one.row_weights[:margin].any()
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("factor", [4.0, 3.0, 2.0, 2.5, 1.7, 10 / 3])
def test_a_window_is_resized_as_in_the_whole_image(factor):
    low_res = torch.rand(3, 61, 47, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = Scale(float(torch.tensor(factor, dtype=torch.float32)))  # as a checkpoint holds it
    whole = resize(low_res, scale=factor)
    height, width = scale.high_size(61, 47)
    assert whole.shape[-2:] == (height, width)
    for window in (
        Window(0, 40, 0, 30),
        Window(33, 70, 21, 75),
        Window(height - 20, height, width - 9, width),
    ):
        torch.testing.assert_close(
            scale.upscale(low_res, window), whole[:, window.top : window.bottom, window.left : window.right]
        )
    shrunk = resize(whole, scale=1 / factor)
    for low in (Window(0, 9, 0, 47), Window(20, 33, 5, 30), Window(50, 61, 40, 47)):
        high = scale.high_window(low, height, width)
        pixels = whole[:, high.top : high.bottom, high.left : high.right]
        expected = shrunk[:, low.top : low.bottom, low.left : low.right]
        torch.testing.assert_close(scale.downscale(pixels, high, low), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("height", [8, IN_MEMORY_BYTES // (4 * 3 * 64) + 1])
def test_a_field_holds_what_is_written_in_memory_and_in_a_file(height):
    field = Field((2, 3, height, 64), CPU)
    assert (field._file is None) == (height == 8)
    window = Window(height - 5, height - 1, 7, 60)
    values = torch.rand(2, 3, 4, 53, generator=torch.Generator().manual_seed(0))
    field.write(window, values)
    field.add(window, values[1:], 1)
    assert torch.equal(field.read(window, 0), values[:1])
    torch.testing.assert_close(field.read(window, 1), 2 * values[1:])
    assert not field.read(Window(0, 3, 0, 64)).any()
    taken = field.read(window)
    field.clear()
    assert taken.any()
    assert not field.read(window).any()


CONFIGURATIONS = {
    "convolutions only": {"conditioning": "concat"},
    "attention": {"conditioning": "both"},
    "patch 4": {"conditioning": "concat", "patch_size": 4, "dim_mults": (1, 2)},
    "group normalisation": {"conditioning": "concat", "norm": "group", "gain": 0.3},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_windows_give_what_one_piece_gives_and_no_seams(name, picture):
    loaded = random_model(**CONFIGURATIONS[name])
    if name == "convolutions only":
        for transformer in loaded.unet.transformers:
            transformer.block.self_attention.out.weight.zero_()
    whole = run(picture, loaded, tile=0, steps=4).pixels.astype(float)
    tiled = run(picture, loaded, tile=256, steps=4).pixels.astype(float)
    assert whole.std() > 20
    assert psnr(whole, tiled) >= 45
    config = loaded.unet.config
    multiple = config.size_multiple * config.attention_window
    overlap = math.ceil(64 / multiple) * multiple
    for axis in (0, 1):
        length = whole.shape[axis]
        starts = range(256 - overlap, length - overlap, 256 - overlap)
        borders = [line for start in starts for line in (start, start + overlap) if line < length]
        assert borders
        energy = [
            sum(np.square(np.diff(image, axis=axis).take(line - 1, axis=axis)).sum() for line in borders)
            for image in (tiled, whole)
        ]
        assert energy[0] <= 1.02 * energy[1]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_windows_work_with_every_scheduler(scheduler, model, picture):
    whole = run(picture, model, tile=0, steps=3, scheduler=scheduler).pixels
    tiled = run(picture, model, tile=192, overlap=64, steps=3, scheduler=scheduler).pixels
    assert psnr(whole, tiled) >= 45


def test_windows_begin_where_attention_windows_begin(model, picture):
    restorer = ImageRestorer(model, RestoreConfig(tile=100, overlap=10), CPU)
    low_res = to_model_range(pixels_to_unit(picture))
    tiles = restoration._Canvas(restorer, low_res, restorer.plan, lambda _: None).tiles
    multiple = model.unet.config.size_multiple * model.unet.config.attention_window
    assert len(tiles) > 4
    assert all(tile.window.top % multiple == 0 and tile.window.left % multiple == 0 for tile in tiles)


def test_a_large_image_is_cut_by_itself_and_a_small_one_is_not(model, monkeypatch):
    restorer = ImageRestorer(model, RestoreConfig(), CPU)

    def windows(height, width):
        low_res = torch.zeros(3, height, width)
        return restoration._Canvas(restorer, low_res, restorer.plan, lambda _: None).tiles

    assert len(windows(256, 256)) == 1
    assert max(tile.window.shape for tile in windows(256, 300)) == (512, 512)


def test_the_work_goes_on_in_smaller_windows_when_a_gpu_runs_out_of_memory(model, picture, caplog):
    restorer = ImageRestorer(model, RestoreConfig(tile=0, steps=3, batch_size=2, num_images=2), CPU)
    largest, shapes = 200, []
    estimate = restorer.estimate

    def limited(noisy, timestep, context, upscaled):
        if timestep != 999 and max(noisy.shape[-2:]) > largest:  # at first all is well
            raise torch.cuda.OutOfMemoryError("no memory")
        shapes.append((timestep, len(noisy), max(noisy.shape[-2:])))
        return estimate(noisy, timestep, context, upscaled)

    restorer.estimate = limited
    pixels = restorer.restore(picture).pixels
    assert shapes[0] == (999, 2, 384)
    assert all(batch == 1 and side <= largest for timestep, batch, side in shapes if timestep != 999)
    assert restorer.tile == 192
    assert "192" in caplog.text
    assert psnr(pixels, run(picture, model, tile=0, steps=3, num_images=2).pixels) > 45


def test_no_memory_even_for_the_smallest_windows_is_an_error(model, picture):
    restorer = ImageRestorer(model, RestoreConfig(), CPU)

    def fail(*_):
        raise torch.cuda.OutOfMemoryError("no memory")

    restorer.estimate = fail
    with pytest.raises(torch.cuda.OutOfMemoryError, match="even with windows of 128 pixels"):
        restorer.restore(picture)


MEASURE = """
import resource, sys
sys.path.insert(0, {root!r})
import numpy as np, torch
torch.set_num_threads(1)
from tests.test_restoration import random_model, run
run(np.zeros(({side}, {side}, 3), np.uint8) + 100, random_model(patch_size=4, dim_mults=(1, 2)), steps=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_peak_memory_hardly_grows_with_the_image():
    def peak(side):
        script = MEASURE.format(root=str(Path(__file__).parent.parent), side=side)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1]) / 1024

    small, large = peak(256), peak(640)  # 1 and 6.6 megapixels of result
    one_field = 2560**2 * 3 * 4 / 2**20  # MiB; a sampler has three
    assert large - small < 0.75 * one_field


# ------------------------------------------------------------------------------------------------ sampling


def test_one_piece_is_what_the_generator_gives(model, picture):
    low_res = to_model_range(pixels_to_unit(picture))[None]
    for steps in (1, 3):
        expected = ResidualGenerator().generate_images(model.unet, low_res, 1, steps, seed=5)
        ours = run(picture, model, steps=steps, seed=5).pixels
        assert psnr(ours, np.round(expected[0].permute(1, 2, 0).numpy() * 255)) > 70


def test_a_scale_kept_in_single_precision_gives_the_size_it_stands_for(picture):
    loaded = random_model(scale=2.4)
    low_res = to_model_range(pixels_to_unit(picture[:50, :30]))[None]
    assert ResidualGenerator().generate_images(loaded.unet, low_res, 1, 1, seed=0).shape == (1, 3, 120, 72)
    assert run(picture[:50, :30], loaded, steps=1).pixels.shape == (120, 72, 3)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(model, picture):
    first, again, other = (run(picture, model, steps=3, seed=seed).pixels for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert psnr(first, other) < 40


def test_a_batch_does_not_change_the_result(model, picture):
    for settings in ({"num_images": 4}, {"tile": 128}):
        alone = run(picture, model, steps=3, **settings).pixels
        together = run(picture, model, steps=3, batch_size=3, **settings).pixels
        assert psnr(alone, together) > 60


def test_mean_and_deviation_are_those_of_the_samples(model, picture):
    restorer = ImageRestorer(model, RestoreConfig(steps=2, num_images=3), CPU)
    result = restorer.restore(picture, deviation=True)
    low_res = to_model_range(pixels_to_unit(picture))[None]
    samples = ResidualGenerator().generate_images(model.unet, low_res, 3, 2, seed=0)
    mean = samples.mean(0).permute(1, 2, 0).numpy()
    assert np.abs(result.pixels / 255 - mean).max() < 0.6 / 255
    expected = samples.var(0).mean(0).sqrt().numpy()
    np.testing.assert_allclose(result.deviation, expected, atol=1e-4)
    with pytest.raises(ValueError, match="at least 2"):
        ImageRestorer(model, RestoreConfig(), CPU).restore(picture, deviation=True)


def test_self_ensemble_makes_the_result_turn_with_the_image(model, picture):
    """Without noise, which would have to turn as well."""
    square = picture[:64, :64]
    restorer = ImageRestorer(model, RestoreConfig(mode="fidelity", self_ensemble=True), CPU)
    low_res = to_model_range(pixels_to_unit(square))

    def estimate(image):
        canvas = restoration._Canvas(restorer, image, restorer.plan, lambda _: None)
        canvas._noise = lambda streams, band: torch.zeros(1, 3, *band.shape)
        return canvas.restore(1, deviation=False)[0].read(Window(0, 256, 0, 256))

    with torch.inference_mode():
        upright, turned = estimate(low_res), estimate(low_res.rot90(1, (1, 2)).flip(2))
    torch.testing.assert_close(turned, upright.rot90(1, (2, 3)).flip(3), rtol=0, atol=1e-4)


def test_progress_rises_to_1(model, picture):
    seen = []
    restorer = ImageRestorer(model, RestoreConfig(steps=2, num_images=2, tile=256), CPU)
    restorer.restore(picture, progress=seen.append)
    assert seen == sorted(seen)
    assert len(seen) > 8
    assert 0 < seen[0] < 0.2
    assert seen[-1] == 1


# ------------------------------------------------------------------------------------- what it is faithful to


@pytest.mark.parametrize("factor", [4.0, 2.5])
def test_consistency_makes_the_downscaled_result_equal_the_input(factor, picture):
    loaded = random_model(scale=factor)
    low_res = pixels_to_unit(picture)[None]
    scores = []
    for consistency in (False, True):
        restored = pixels_to_unit(run(picture, loaded, steps=2, consistency=consistency).pixels)[None]
        scores.append(float(low_resolution_psnr(restored, low_res)))
    assert scores[1] > 53.7
    assert scores[1] > scores[0] + 10


def test_presets_are_overridden_by_what_is_given():
    assert RestoreConfig(mode="fidelity").effort == PRESETS["fidelity"] == (1, 1)
    assert RestoreConfig(mode="balanced", steps=3).effort == (3, PRESETS["balanced"].num_images)
    assert RestoreConfig().effort == PRESETS["fidelity"]
    assert RestoreConfig(num_images=7).effort == (PRESETS["detail"].steps, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fast"}, "'fast'"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"num_images": -1}, "num_images"),
        ({"batch_size": 0}, "batch_size"),
        ({"scheduler": "lcm"}, "'lcm'"),
        ({"eta": 0.5}, "needs the scheduler ddim"),
        ({"eta": 2.0, "scheduler": "ddim"}, "between 0 and 1"),
        ({"seed": -1}, "seed"),
        ({"tile": -5}, "tile"),
        ({"overlap": 0}, "overlap"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        RestoreConfig(**settings)


def test_a_network_that_cannot_restore_is_refused(model):
    untrained = LoadedModel(UNet(base_dim=8), PROCESS, 0)
    with pytest.raises(ValueError, match="never trained"):
        ImageRestorer(untrained, RestoreConfig(), CPU)
    with pytest.raises(ValueError, match="between 1 and 1000, not 1001"):
        ImageRestorer(model, RestoreConfig(steps=1001), CPU)


# -------------------------------------------------------------------------------------------- kinds of pixels


def test_grey_16_bits_and_alpha_stay_what_they_are(model, picture, tmp_path):
    grey = picture.mean(axis=2).astype(np.uint8)
    assert run(grey, model, steps=2).pixels.shape == (384, 320)
    deep = (picture.astype(np.uint16) * 257) + 1
    deep[deep > 65000] = 65000
    fine = run(deep, model, mode="fidelity").pixels
    assert fine.dtype == np.uint16
    assert len(np.unique(fine)) > 1000
    coarse = run(picture, model, mode="fidelity").pixels
    assert psnr(fine / 257, coarse) > 50
    alpha = np.zeros((96, 80), np.uint8)
    alpha[20:60, 30:70] = 255
    path = tmp_path / "cut.png"
    write_image(path, picture, alpha, metadata=Metadata(b"profile"))
    cut = run(path, model, mode="fidelity")
    assert cut.alpha.shape == (384, 320)
    assert cut.alpha.dtype == np.uint8
    assert cut.metadata.icc_profile == b"profile"
    assert np.array_equal(cut.pixels, coarse)
    opaque = tmp_path / "opaque.png"
    write_image(opaque, picture, np.full_like(alpha, 200))
    assert np.array_equal(run(opaque, model, mode="fidelity").alpha, np.full((384, 320), 200, np.uint8))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 40)])
def test_any_size_is_restored(size, model, picture):
    assert run(picture[: size[0], : size[1]], model, steps=2).pixels.shape == (4 * size[0], 4 * size[1], 3)


def test_three_lines_are_enough(model, picture, tmp_path):
    from engine.checkpoint import export_safetensors
    from imaging.files import read_rgb

    write_image(tmp_path / "photo.png", picture)
    export_safetensors(model, tmp_path / "model.safetensors")
    restore(tmp_path / "photo.png", tmp_path / "model.safetensors").save(tmp_path / "photo_x4.png")
    assert read_rgb(tmp_path / "photo_x4.png").shape == (384, 320, 3)


def test_bands_cover_an_image_from_the_top():
    assert list(row_bands(10, 3, 4)) == [Window(0, 4, 0, 3), Window(4, 8, 0, 3), Window(8, 10, 0, 3)]
