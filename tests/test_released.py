"""Tests of the weights that come with the project: they are small, and they keep their promise."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from bicubic import downscale_image, upscale_image
from evaluation import metrics
from evaluation.images import EvaluationConfig, ImageSet
from evaluation.measure import evaluate, model_method
from examples.dead_leaves import dead_leaves
from imaging.pixels import pixels_to_unit
from models import load_model
from restoration import RestoreConfig, restore
from restoration.weights import RELEASED as RELEASED_FOLDER
from restoration.weights import find_weights
from unet import UNet

RELEASED = [(4, "clean"), (2, "clean"), (4, "photo")]


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
    (path,), config = find_weights(weights, scale), RestoreConfig(mode="fidelity")
    restored = restore(low_res, path, config, device="cpu").pixels
    protocol = metrics.Comparison(crop=scale)
    ours, bicubic = (
        float(metrics.psnr(pixels_to_unit(image)[None], pixels_to_unit(truth)[None], protocol))
        for image in (restored, upscale_image(low_res, scale))
    )
    assert ours > bicubic + 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "weights", "settings", "expected"),
    [
        (
            "Set5",
            "x4",
            {},
            {"bicubic": (28.43, 0.341), "fidelity": (31.72, 0.181), "detail": (30.16, 0.0885)},
        ),
        ("Set5", "x4_diffusion", {}, {"detail": (30.35, 0.1009)}),  # in six steps
        (
            "Set5",
            "photo_x4",
            {"degradation": "photo"},
            {"bicubic": (25.55,), "fidelity": (26.67, 0.349), "detail": (25.36, 0.2451)},
        ),
        ("Set5", "x2", {}, {"fidelity": (37.45,)}),
        ("BSD100", "x4", {"limit": 4}, {"bicubic": (26.14,), "fidelity": (27.33,)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_photos_read_as_they_did_when_the_weights_were_released(sr_data, images, weights, settings, expected):
    features = str(sr_data / "perceptual" / "alexnet_features.safetensors")
    model = load_model(RELEASED_FOLDER / f"{weights}.safetensors")
    config = EvaluationConfig(float(model.network.scale), lpips_weights=features, **settings)
    modes = [mode for mode in expected if mode != "bicubic"]
    methods = [model_method([model], RestoreConfig(mode=mode), config.scale) for mode in modes]
    report = evaluate(ImageSet(sr_data / "test" / images, config), methods)
    rows = {row["method"]: row for row in report.rows}
    for name, (psnr, *lpips) in expected.items():
        loose = name == "detail"
        assert rows[name]["psnr"] == pytest.approx(psnr, abs=0.02 if loose else 0.01)
        assert [rows[name]["lpips"]][: len(lpips)] == pytest.approx(lpips, abs=0.002 if loose else 0.001)
    if not settings:
        assert min(rows[mode]["lr_psnr"] for mode in modes) >= 45
        energies = [rows[name]["hf_energy"] for name in expected]
        assert sorted(energies) == energies
        assert energies[-1] < 1


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
