"""Tests of the weights that come with the project: they are small, and they keep their promise."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

import infer
from bicubic import downscale_image, upscale_image
from engine.checkpoint import CheckpointError, load_model, released_model
from evaluation import metrics
from evaluation.evaluation import Settings, evaluate, load_trained, read_image_set
from examples.dead_leaves import dead_leaves
from imaging.files import decode_image, pixels_to_unit, write_image
from restoration import RestoreConfig, restore

SCALES = [4, 2]
# One step, Set5 and BSD100: SRCNN's published 30.48 and 26.90 dB for x4, 36.66 dB for x2 (Set5).
BARS = {(4, "Set5"): 30.48, (4, "BSD100"): 26.90, (2, "Set5"): 36.66}
CPU = torch.device("cpu")


@pytest.mark.parametrize("scale", SCALES)
def test_the_files_are_small_and_their_cards_name_them(scale):
    path = released_model(scale)
    assert path.stat().st_size < 10_000_000
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:12] in path.with_suffix(".md").read_text()
    unet = load_model(path).unet
    assert float(unet.scale) == scale
    assert float(unet.residual_std) > 0


def test_an_enlargement_that_is_not_there_is_named():
    with pytest.raises(CheckpointError, match=r"no weights for x3 .* \(there are: x2, x4\)"):
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


@pytest.mark.parametrize(("scale", "name"), [(4, "Set5"), (4, "BSD100"), (2, "Set5")])
def test_one_step_reaches_the_bar(sr_data, scale, name):
    settings = Settings(scale, steps=(1,), lpips=False)
    images = read_image_set(sr_data / "test" / name, settings, limit=None)
    report = evaluate(images, settings, load_trained(released_model(scale), CPU))
    assert report.rows[1].psnr >= BARS[scale, name]
    assert report.rows[1].lr_psnr >= 45


def test_ten_steps_are_a_sample_with_the_texture_of_the_originals(sr_data):
    """A perfect sample has twice the squared error of the posterior mean: 3.01 dB less."""
    settings = Settings(4, steps=(1, 10), lpips=False)
    images = read_image_set(sr_data / "test" / "Set5", settings, limit=None)
    bicubic, mean, sample = evaluate(images, settings, load_trained(released_model(4), CPU)).rows
    assert 0.85 < sample.hf_energy < 1.15
    assert mean.psnr - 3.01 < sample.psnr < mean.psnr
    assert sample.swd < mean.swd < bicubic.swd
    assert sample.lr_psnr >= 45


def test_infer_needs_nothing_but_a_photo(tmp_path, capsys):
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
    capsys.readouterr()
    assert infer.main([*flags, "--scale", "3"]) == 2
    assert "no weights for x3" in capsys.readouterr().err
    model = str(released_model(2))
    assert infer.main([*flags, "--weights_path", model, "--scale", "4", "--overwrite"]) == 2
    assert "--scale 4, but" in capsys.readouterr().err


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
