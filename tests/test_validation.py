"""Validation during training: its numbers against the metrics, flat images, and networks of any kind."""

import math
import sys

import numpy as np
import pytest

from degradation import Degradation
from diffusion import DiffusionModel, ProcessConfig, ResidualGenerator
from evaluation import metrics
from evaluation.metrics import METRICS
from evaluation.validation import VALIDATION_SEED, Validator
from imaging.files import write_image
from imaging.pixels import to_unit_range
from tests.networks import tiny_unet
from training import NonFiniteError
from util import ImageDataset

SCALE = 2


@pytest.fixture
def dataset(photo_folder):
    return ImageDataset(photo_folder, 32, SCALE, train=False)


@pytest.mark.slow
def test_the_validation_of_a_random_degradation_is_always_the_same(photo_folder):
    photos = ImageDataset(photo_folder, 32, train=False, degradation=Degradation("heavy", float(SCALE)))
    shrunk = ImageDataset(photo_folder, 32, SCALE, train=False)
    unet = tiny_unet()
    first, again, bicubic = (
        Validator(DiffusionModel(), each)(unet).scalars for each in (photos, photos, shrunk)
    )
    assert first == again
    assert first["psnr"] < bicubic["psnr"]


@pytest.mark.slow
def test_scalars_are_what_the_metrics_say_of_one_step(dataset):
    unet, diffusion = tiny_unet(), DiffusionModel()
    found = Validator(diffusion, dataset)(unet)
    generator = ResidualGenerator()
    expected = {"psnr": [], "ssim": [], "psnr_over_bicubic": []}
    for index in range(len(dataset)):
        sample = dataset[index]
        restored = generator.generate_images(unet, sample.low_res[None], 1, 1, seed=VALIDATION_SEED)
        truth, upscaled = to_unit_range(sample.original[None]), to_unit_range(sample.upscaled[None])
        protocol = metrics.Comparison(crop=SCALE)
        psnr = metrics.psnr(restored, truth, protocol).item()
        expected["psnr"].append(psnr)
        expected["ssim"].append(metrics.ssim(restored, truth, protocol).item())
        expected["psnr_over_bicubic"].append(psnr - metrics.psnr(upscaled, truth, protocol).item())
    assert found.scalars == pytest.approx({name: np.mean(each) for name, each in expected.items()}, abs=1e-2)
    assert set(found.scalars) == {each.name for each in METRICS if each.in_training} | {"psnr_over_bicubic"}
    assert found.score == found.scalars["psnr"]


@pytest.mark.slow
def test_a_flat_image_changes_no_scalar_and_is_said(photo_folder, dataset, tmp_path, caplog):
    unet, diffusion = tiny_unet(), DiffusionModel()
    without = Validator(diffusion, dataset)(unet)
    write_image(tmp_path / "flat.png", np.full((40, 40, 3), 77, np.uint8))
    images = [tmp_path / "flat.png", *sorted(photo_folder.iterdir())]
    validator = Validator(diffusion, ImageDataset(images, 32, SCALE, train=False))
    assert "1 of 7" in caplog.text
    assert validator(unet).scalars == pytest.approx(without.scalars, abs=1e-6)


def test_a_network_that_restores_exactly_has_a_finite_score(photo_folder, tmp_path):
    """Flat images alone: bicubic is exact, and so is a network that predicts no residual."""
    unet = tiny_unet(residual_std=1e-6)
    write_image(tmp_path / "white.png", np.full((40, 40, 3), 255, np.uint8))
    found = Validator(DiffusionModel(), ImageDataset(tmp_path, 32, SCALE, train=False))(unet)
    assert all(math.isfinite(value) for value in found.scalars.values())
    assert found.scalars["psnr_over_bicubic"] == pytest.approx(0, abs=1e-6)


def test_validation_needs_no_torchvision(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = Validator(DiffusionModel(), dataset)(tiny_unet())
    assert all(image.shape[0] == 3 for image in found.images.values())


def absolute_error(restored, truth):
    return (restored - truth).abs().mean((1, 2, 3))


def test_a_sharpened_model_is_scored_by_its_lpips_and_what_it_loses_of_the_mean(dataset):
    unet = tiny_unet(predictor_blocks=1)
    mean = Validator(DiffusionModel(), dataset)(unet).scalars["psnr"]
    sharpened = DiffusionModel(process=ProcessConfig(levels=(8.0, 1.2)))
    found = Validator(sharpened, dataset, lpips=absolute_error, most_psnr_lost=-3.0)(unet)
    assert found.score == pytest.approx(-found.scalars["lpips"] - (mean + 3 - found.scalars["psnr"]))


def test_weights_that_are_not_finite_are_said(dataset):
    unet = tiny_unet()
    unet.residual_std.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        Validator(DiffusionModel(), dataset)(unet)
