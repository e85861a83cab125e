"""Tests of the weights that come with the project: they are small, and they keep their promise."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

import infer
from bicubic import downscale_image, upscale_image
from engine.checkpoint import CheckpointError, load_model, released_model
from evaluation import metrics
from evaluation.config import EvaluationConfig
from evaluation.evaluation import TrainedModel, evaluate
from evaluation.images import ImageSet
from examples.dead_leaves import dead_leaves
from imaging.files import decode_image, pixels_to_unit, write_image
from restoration import RestoreConfig, restore
from unet import UNet

SCALES = [4, 2]
SRCNN = {4: 30.48, 2: 36.66}  # its published PSNR in dB on Set5


@pytest.mark.parametrize("scale", SCALES)
def test_the_files_are_small_and_their_cards_name_them(scale):
    path = released_model(scale)
    assert path.stat().st_size < 10_000_000
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:12] in path.with_suffix(".md").read_text()
    unet = load_model(path, UNet).network
    assert float(unet.scale) == scale
    assert float(unet.residual_std) > 0


def test_an_enlargement_that_is_not_there_is_named():
    with pytest.raises(CheckpointError, match=r"x3 .*x2, x4"):
        released_model(3)


@pytest.mark.parametrize("scale", SCALES)
def test_an_image_nobody_trained_on_gets_better(scale):
    """Drawn images, not photos: nothing like them was trained on."""
    truth = dead_leaves((96, 96), np.random.default_rng(5), min_radius=4)
    low_res = downscale_image(truth, scale)
    restored = restore(low_res, released_model(scale), RestoreConfig(mode="fidelity"), device="cpu").pixels
    protocol = metrics.Protocol(crop=scale)
    ours, bicubic = (
        float(metrics.psnr(pixels_to_unit(image)[None], pixels_to_unit(truth)[None], protocol))
        for image in (restored, upscale_image(low_res, scale))
    )
    assert ours > bicubic + 0.5


def rows_of(folder, scale, steps, limit=None, **settings):
    """Bicubic's row and the released model's."""
    config = EvaluationConfig(scale, **({"lpips": False} | settings))
    model = TrainedModel(released_model(scale))
    methods = [model.method(RestoreConfig(steps=count), scale) for count in steps]
    return evaluate(ImageSet(folder, config, limit=limit), config, methods).rows


@pytest.mark.slow
def test_set5_x4_reads_as_it_did_when_the_weights_were_released(sr_data):
    """LPIPS with AlexNet's own features. A perfect sample has twice the squared error of the posterior mean,
    3.01 dB less."""
    features = sr_data / "perceptual" / "alexnet_features.safetensors"
    settings = {"lpips": True, "lpips_weights": str(features)}
    bicubic, mean, sample = rows_of(sr_data / "test" / "Set5", 4, [1, 10], **settings)
    assert bicubic["psnr"] == pytest.approx(28.43, abs=0.005)
    assert mean["psnr"] == pytest.approx(31.14, abs=0.005)
    assert sample["psnr"] == pytest.approx(28.21, abs=0.005)
    assert bicubic["lpips"] == pytest.approx(0.341, abs=0.0005)
    assert mean["lpips"] == pytest.approx(0.176, abs=0.0005)
    assert min(mean["lr_psnr"], sample["lr_psnr"]) >= 45
    assert 0.85 < sample["hf_energy"] < 1.15
    assert sample["swd"] < mean["swd"] < bicubic["swd"]
    assert mean["psnr"] - 3.01 < sample["psnr"] < mean["psnr"]
    assert mean["psnr"] > SRCNN[4]


@pytest.mark.slow
def test_set5_x2_is_better_than_srcnn_in_one_step(sr_data):
    mean = rows_of(sr_data / "test" / "Set5", 2, [1])[1]
    assert mean["psnr"] > SRCNN[2]
    assert mean["lr_psnr"] >= 45


@pytest.mark.slow
def test_photos_of_another_set_read_as_measured(sr_data):
    """The first twelve of BSD100."""
    bicubic, mean = rows_of(sr_data / "test" / "BSD100", 4, [1], limit=12)
    assert bicubic["psnr"] == pytest.approx(25.93, abs=0.005)
    assert mean["psnr"] == pytest.approx(27.06, abs=0.005)


def test_infer_needs_nothing_but_a_photo(tmp_path):
    write_image(tmp_path / "photo.png", dead_leaves((24, 32), np.random.default_rng(0)))
    flags = [
        str(tmp_path / "photo.png"),
        "--output",
        str(tmp_path / "out"),
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    assert infer.main(flags) == 0
    assert decode_image(tmp_path / "out/photo_x4.png").pixels.shape == (96, 128, 3)
    assert infer.main([*flags, "--scale", "2"]) == 0
    assert decode_image(tmp_path / "out/photo_x2.png").pixels.shape == (48, 64, 3)
    assert infer.main([*flags, "--scale", "3"]) == 0
    assert decode_image(tmp_path / "out/photo_x3.png").pixels.shape == (72, 96, 3)
    model = str(released_model(2))
    assert infer.main([*flags, "--weights_path", model, "--scale", "4", "--overwrite"]) == 0
    assert decode_image(tmp_path / "out/photo_x4.png").pixels.shape == (96, 128, 3)


def test_the_results_in_the_readme_are_those_of_the_weights():
    """README.md repeats rows of weights/RESULTS.md, which `make results` writes."""
    root = Path(__file__).parent.parent
    readme = (root / "README.md").read_text()
    rows = [
        line
        for line in (root / "weights/RESULTS.md").read_text().splitlines()
        if line.startswith("| 1 step |")
    ]
    assert len(rows) == 4
    for row in rows:
        assert row.split("|")[2].strip() in readme
