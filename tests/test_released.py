"""Tests of the weights that come with the project: they are small, and they keep their promise."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

import infer
from bicubic import downscale_image, upscale_image
from engine.checkpoint import CheckpointError
from evaluation import metrics
from evaluation.images import EvaluationConfig, ImageSet
from evaluation.measure import evaluate, model_method
from examples.dead_leaves import dead_leaves
from imaging.files import decode_image, write_image
from imaging.pixels import pixels_to_unit
from models import load_model
from restoration import RestoreConfig, restore
from restoration.weights import KINDS, find_weights, released_model
from restoration.weights import RELEASED as RELEASED_FOLDER
from unet import UNet

RELEASED = [(4, "clean"), (2, "clean"), (4, "photo")]
SRCNN = {4: 30.48, 2: 36.66}  # its published PSNR in dB on Set5


@pytest.mark.parametrize("path", sorted(RELEASED_FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
def test_the_files_are_small_and_their_cards_name_them(path):
    assert path.stat().st_size < 10_000_000
    name, _, _ = path.stem.partition("_diffusion")
    card = path.with_name(f"{name}.md").read_text()
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:12] in card
    model = load_model(path, UNet)
    assert float(model.network.scale) == int(name[-1])
    assert float(model.network.residual_std) > 0
    if path.with_stem(f"{name}_diffusion").exists():  # it was sharpened from that
        assert bool(model.process.levels) != path.stem.endswith("_diffusion")


def test_an_enlargement_that_is_not_there_is_named():
    with pytest.raises(CheckpointError, match=r"x3 .*x2, x4"):
        released_model(3)


@pytest.mark.parametrize(
    ("name", "scale", "files"),
    [
        (None, None, ["photo_x4"]),
        (None, 1.5, ["photo_x4"]),
        (None, 8, ["photo_x4", "x2"]),
        ("photo", 2, ["photo_x4"]),
        ("clean", 2, ["x2"]),
        ("clean", 3, ["x4"]),
    ],
)
def test_a_real_photo_is_cleaned_at_every_scale(name, scale, files):
    assert [path.stem for path in find_weights(name, scale)] == files


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "weights"), RELEASED)
def test_an_image_nobody_trained_on_gets_better(scale, weights):
    """Drawn images, not photos: nothing like them was trained on."""
    truth = dead_leaves((96, 96), np.random.default_rng(5), min_radius=4)
    low_res = downscale_image(truth, scale)
    restored = restore(
        low_res, released_model(scale, weights), RestoreConfig(mode="fidelity"), device="cpu"
    ).pixels
    protocol = metrics.Comparison(crop=scale)
    ours, bicubic = (
        float(metrics.psnr(pixels_to_unit(image)[None], pixels_to_unit(truth)[None], protocol))
        for image in (restored, upscale_image(low_res, scale))
    )
    assert ours > bicubic + 0.5


def rows_of(folder, scale, modes, limit=None, weights="clean", **settings):
    """Bicubic's row and those of a released model, by its kind or its file's name."""
    config = EvaluationConfig(scale, limit=limit, **({"lpips": False} | settings))
    path = released_model(scale, weights) if weights in KINDS else RELEASED_FOLDER / weights
    models = [load_model(path)]
    methods = [model_method(models, RestoreConfig(mode=mode), scale) for mode in modes]
    return evaluate(ImageSet(folder, config), methods).rows


@pytest.fixture
def lpips(sr_data):
    """With AlexNet's own features."""
    return {"lpips": True, "lpips_weights": str(sr_data / "perceptual" / "alexnet_features.safetensors")}


@pytest.mark.slow
def test_set5_x4_reads_as_it_did_when_the_weights_were_released(sr_data, lpips):
    """A perfect sample has twice the squared error of the posterior mean, 3.01 dB less."""
    bicubic, mean, sample = rows_of(sr_data / "test" / "Set5", 4, ["fidelity", "detail"], **lpips)
    assert bicubic["psnr"] == pytest.approx(28.43, abs=0.005)
    assert mean["psnr"] == pytest.approx(31.63, abs=0.005)
    assert sample["psnr"] == pytest.approx(29.66, abs=0.02)
    assert bicubic["lpips"] == pytest.approx(0.341, abs=0.0005)
    assert mean["lpips"] == pytest.approx(0.180, abs=0.0005)
    assert sample["lpips"] == pytest.approx(0.0984, abs=0.001)
    assert min(mean["lr_psnr"], sample["lr_psnr"]) >= 45
    assert mean["hf_energy"] < sample["hf_energy"] < 1
    assert mean["psnr"] - 3.01 < sample["psnr"] < mean["psnr"]
    assert mean["psnr"] > SRCNN[4]


@pytest.mark.slow
def test_the_diffusion_weights_still_sample_in_six_steps(sr_data, lpips):
    weights = "x4_diffusion.safetensors"
    _, sample = rows_of(sr_data / "test" / "Set5", 4, ["detail"], weights=weights, **lpips)
    assert sample["psnr"] == pytest.approx(30.26, abs=0.005)
    assert sample["lpips"] == pytest.approx(0.099, abs=0.0005)


@pytest.mark.slow
def test_degraded_set5_reads_as_it_did_when_the_weights_were_released(sr_data, lpips):
    settings = {"weights": "photo", "degradation": "photo", **lpips}
    bicubic, mean, sample = rows_of(sr_data / "test" / "Set5", 4, ["fidelity", "detail"], **settings)
    assert bicubic["psnr"] == pytest.approx(25.55, abs=0.01)
    assert mean["psnr"] == pytest.approx(26.67, abs=0.01)
    assert mean["lpips"] == pytest.approx(0.349, abs=0.001)
    assert sample["lpips"] == pytest.approx(0.2565, abs=0.002)


@pytest.mark.slow
def test_set5_x2_reads_as_it_did_when_the_weights_were_released(sr_data):
    mean = rows_of(sr_data / "test" / "Set5", 2, ["fidelity"])[1]
    assert mean["psnr"] == pytest.approx(37.45, abs=0.01)
    assert mean["psnr"] > SRCNN[2]
    assert mean["lr_psnr"] >= 45


@pytest.mark.slow
def test_photos_of_another_set_read_as_measured(sr_data):
    """The first four of BSD100."""
    bicubic, mean = rows_of(sr_data / "test" / "BSD100", 4, ["fidelity"], limit=4)
    assert bicubic["psnr"] == pytest.approx(26.14, abs=0.005)
    assert mean["psnr"] == pytest.approx(27.28, abs=0.005)


@pytest.mark.slow
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
    """README.md repeats PSNR and LPIPS of weights/RESULTS.md, which `make results` writes."""
    root = Path(__file__).parent.parent
    readme = (root / "README.md").read_text()
    tables = {}
    for table in (root / "weights/RESULTS.md").read_text().split("## ")[1:]:
        heading, *lines = table.splitlines()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
        tables[heading] = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows}
    for degraded, methods in {
        "": ("bicubic", "clean, fidelity", "clean, detail"),
        ", degraded: photo": ("bicubic", "photo, fidelity", "photo, detail"),
    }.items():
        for method in methods:
            rows = [tables[f"{images}, x4{degraded}"][method] for images in ("Set5", "BSD100")]
            for metric in ("PSNR", "LPIPS"):
                assert " / ".join(row[metric] for row in rows) in readme, (method, metric)
