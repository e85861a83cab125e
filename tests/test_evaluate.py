"""The evaluator: its rows against direct calls of the metrics, its files, and how it refuses wrong input."""

import csv
import io
import json
import math
import os
import runpy
import shutil
import sys
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as script
from bicubic import downscale_image, resize, upscale_image
from diffusion import ProcessConfig
from engine.checkpoint import save_checkpoint
from engine.processes import Processes
from evaluate import main
from evaluation import evaluation, metrics
from evaluation.config import EvaluationConfig
from evaluation.evaluation import Estimate, Method, TrainedModel
from evaluation.images import ImageSet
from evaluation.lpips import MetricUnavailableError
from evaluation.pairs import find_original
from evaluation.report import Label, Report, Scores, perception_distortion_figure
from evaluation.table import METRICS
from evaluation.wasserstein import (
    PATCHES_PER_IMAGE,
    PatchPair,
    patch_distance,
    patch_positions,
    pyramid_patches,
)
from examples.dead_leaves import dead_leaves
from imaging.files import pixels_to_unit, read_rgb, write_image
from models import load_model
from restoration import RestoreConfig, Restorer
from tests.networks import tiny_unet
from unet import UNet

CPU = torch.device("cpu")
LABELS = ["method", "scheduler", "steps", "samples"]
ROW_KEYS = LABELS + [metric.name for metric in METRICS]
TIMING = {"seconds_per_megapixel", "peak_memory_mb"}


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """Two images, one of them of odd sides."""
    folder = tmp_path_factory.mktemp("leaves")
    for index, size in enumerate([(64, 72), (67, 65)]):
        write_image(folder / f"{index}.png", dead_leaves(size, np.random.default_rng(index), max_radius=24))
    return folder


def save_model(path, unet, timesteps=1000):
    content = {
        "network": unet.config.to_dict(),
        "process": ProcessConfig(timesteps).to_dict(),
        "ema": unet.state_dict(),
        "model": unet.state_dict(),
        "step": 7,
    }
    save_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A network that predicts v = 0 whatever it sees."""
    unet = UNet(base_dim=8, dim_mults=(1, 2), context_dim=16, head_dim=8)
    unet.residual_std.fill_(0.1)
    unet.scale.fill_(2.0)
    return save_model(tmp_path_factory.mktemp("untrained") / "untrained.pth", unet)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A network whose output depends on its input."""
    return save_model(tmp_path_factory.mktemp("random") / "random.pth", tiny_unet())


def config(**changes):
    return EvaluationConfig(**({"scale": 2.0, "lpips": False} | changes))


def measured(folder, model=None, how=(), **changes):
    """A report on a folder; `how` are the fields of one RestoreConfig per row of the model."""
    chosen = config(**changes)
    methods = []
    if model is not None:
        trained = TrainedModel(model)
        methods = [trained.method(RestoreConfig(**each), chosen.scale) for each in how or [{"steps": 1}]]
    return evaluation.evaluate(ImageSet(folder, chosen), chosen, methods)


def numbers(row):
    """What the same seed has to give again."""
    return vars(row.label) | {name: value for name, value in row.values.items() if name not in TIMING}


def as_unit(pixels):
    """(H, W) or (H, W, 3) uint8 to (1, C, H, W) in [0, 1]."""
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(planes.astype(np.float64))[None] / 255


def bicubic_pair(path, scale):
    """Bicubic's answer and the truth, each (1, 3, H, W) in [0, 1], made from the file step by step."""
    pixels = read_rgb(path)
    height, width = (length - length % scale for length in pixels.shape[:2])
    truth = pixels[:height, :width]
    low_res = downscale_image(truth, scale, rounding="uint8")
    return as_unit(upscale_image(low_res, scale)), as_unit(truth), as_unit(low_res)


def assert_is_bicubic_row(row, paths, scale, seed=0):
    restored, truth, low_res = zip(*(bicubic_pair(path, scale) for path in paths), strict=True)
    protocol = metrics.Protocol(crop=scale)

    def values(metric, *pairs):
        return torch.cat([metric(*pair) for pair in zip(*pairs, strict=True)])

    psnr = values(lambda a, b: metrics.psnr(a, b, protocol), restored, truth)
    ssim = values(lambda a, b: metrics.ssim(a, b, protocol), restored, truth)
    energy = values(metrics.high_frequency_energy, restored, truth)
    patches = []
    for path, ours, theirs in zip(paths, restored, truth, strict=True):
        random = np.random.default_rng((seed, *path.stem.encode()))
        positions = patch_positions(*theirs.shape[-2:], PATCHES_PER_IMAGE, random)
        patches.append(PatchPair(*(pyramid_patches(image[0], positions) for image in (ours, theirs))))
    distance = np.mean(patch_distance(patches, seed))
    assert row["psnr"] == pytest.approx(psnr.mean().item(), abs=1e-9)
    assert row["ssim"] == pytest.approx(ssim.mean().item(), abs=1e-9)
    assert row["hf_energy"] == pytest.approx(energy.log().mean().exp().item(), rel=1e-5)
    assert row["lr_psnr"] == pytest.approx(
        values(metrics.low_resolution_psnr, restored, low_res).mean().item(), abs=1e-9
    )
    assert row["swd"] == pytest.approx(distance, rel=1e-4)


# ---------------------------------------------------------------- rows


@pytest.mark.slow
def test_bicubic_row_is_what_the_metrics_say(leaves):
    report = measured(leaves)
    assert [row.label for row in report.rows] == [Label("bicubic")]
    assert_is_bicubic_row(report.rows[0], sorted(leaves.glob("*.png")), 2)


@pytest.mark.slow
def test_bicubic_row_of_set5_and_of_its_published_low_resolution(sr_data):
    folder, chosen = sr_data / "test" / "Set5", config(scale=4.0)
    made = evaluation.evaluate(ImageSet(folder, chosen), chosen)
    given = evaluation.evaluate(ImageSet(folder, chosen, folder / "LRx4_mirror"), chosen)
    assert_is_bicubic_row(made.rows[0], sorted(folder.glob("*.png")), 4)
    assert numbers(given.rows[0]) == numbers(made.rows[0])
    assert made.rows[0]["psnr"] == pytest.approx(28.42, abs=0.02)
    assert given.protocol["low_resolution"] == "read from LRx4_mirror"
    replicated = ImageSet(folder, replace(chosen, border="replicate"))
    published = ImageSet(folder, chosen, folder / "LRx4")
    for ours, theirs in zip(replicated, published, strict=True):
        assert torch.equal(ours.low_res, theirs.low_res)


@pytest.mark.slow
def test_a_network_that_predicts_v_0_restores_bicubic_in_one_step(leaves, untrained):
    # clean = signal_scale * noisy - noise_scale * v = 5e-5 * noise: less than a thousandth of a grey level.
    bicubic, model = measured(leaves, untrained).rows
    assert model.label == Label("model", "unipc", 1, 1)
    assert model["psnr"] == pytest.approx(bicubic["psnr"], abs=0.01)
    assert model["ssim"] == pytest.approx(bicubic["ssim"], abs=1e-4)
    assert model["lr_psnr"] == pytest.approx(bicubic["lr_psnr"], abs=0.05)
    assert model["hf_energy"] == pytest.approx(bicubic["hf_energy"], rel=0.01)


OPTIONS = [
    {"steps": 3, "scheduler": "ddim", "eta": 0.5, "seed": 5},
    {"steps": 2, "num_images": 2, "batch_size": 2},
    {"mode": "fidelity", "tile": 32, "overlap": 8, "consistency": True, "self_ensemble": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("how", OPTIONS)
def test_a_model_row_is_what_the_restorer_writes(leaves, random_weights, how):
    images = ImageSet(leaves, config())
    row = measured(leaves, random_weights, [how]).rows[1]
    restorer = Restorer(load_model(random_weights, UNet), RestoreConfig(**how), CPU)
    expected = []
    for picture in images:
        restored = restorer.restore(picture.low_res.permute(1, 2, 0).numpy()).pixels
        pair = pixels_to_unit(restored)[None], picture.truth[None] / 255
        expected.append(metrics.psnr(*pair, metrics.Protocol(crop=2)).item())
    assert row["psnr"] == pytest.approx(np.mean(expected), abs=1e-9)
    samples = how.get("num_images", 1)
    steps = how.get("steps", 1)  # this network predicts no mean
    assert row.label == Label(how.get("mode", "model"), how.get("scheduler", "unipc"), steps, samples)
    assert (row["uncertainty_pearson"] is None) == (samples == 1)


@pytest.mark.slow
def test_averaging_samples_removes_noise_and_has_an_uncertainty(leaves, random_weights):
    how = [{"steps": 3, "detail": 0.375, "num_images": number} for number in (1, 4)]
    single, mean = measured(leaves, random_weights, how).rows[1:]
    assert mean["psnr"] > single["psnr"] + 0.1
    assert -1 <= mean["uncertainty_pearson"] <= 1
    assert -1 <= mean["uncertainty_spearman"] <= 1


@pytest.mark.slow
def test_any_callable_is_a_restorer(leaves):
    def nearest(low_res):
        return low_res.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def overshooting(low_res):
        return Estimate(3 * nearest(low_res) - 1, None)

    chosen = config()
    images = ImageSet(leaves, chosen)
    methods = [Method(Label("nearest"), nearest), Method(Label("overshooting"), overshooting)]
    rows = evaluation.evaluate(images, chosen, methods).rows
    expected = [
        metrics.psnr(nearest(one.low_res)[None] / 255, one.truth[None] / 255, chosen.protocol).item()
        for one in images
    ]
    assert rows[1]["psnr"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert math.isfinite(rows[2]["psnr"])  # clipped, as a file would clip it


def test_a_result_of_the_wrong_size_is_refused(leaves):
    chosen = config()
    methods = [Method(Label("same"), lambda low_res: low_res)]
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 36\)"):
        evaluation.evaluate(ImageSet(leaves, chosen, limit=1), chosen, methods)


def test_a_result_that_is_not_a_number_is_refused_and_not_measured_as_black(leaves):
    chosen = config()
    methods = [Method(Label("nan"), lambda low_res: resize(low_res, scale=2) * math.nan)]
    with pytest.raises(ValueError, match="NaN"):
        evaluation.evaluate(ImageSet(leaves, chosen, limit=1), chosen, methods)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table_and_another_seed_another(leaves, random_weights):
    first, again, other = (
        [
            numbers(row)
            for row in measured(leaves, random_weights, [{"steps": 2, "seed": seed}], seed=seed).rows
        ]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first[1]["psnr"] != other[1]["psnr"]
    assert first[0]["swd"] != other[0]["swd"]
    assert first[0]["psnr"] == other[0]["psnr"]


@pytest.mark.parametrize("kind", ["light", "photo", "heavy"])
def test_a_random_degradation_depends_on_the_seed_and_the_name_alone(leaves, kind):
    first, again = (ImageSet(leaves, config(degradation=kind)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.low_res, other.low_res)
    alone = first.read(first.paths[1])
    assert torch.equal(alone.low_res, list(again)[1].low_res)
    another = ImageSet(leaves, config(degradation=kind, seed=1)).read(first.paths[1])
    assert not torch.equal(alone.low_res, another.low_res)
    assert not torch.equal(alone.low_res, ImageSet(leaves, config()).read(first.paths[1]).low_res)
    assert kind in first.describe()


@pytest.mark.slow
def test_a_grey_file_is_its_own_luma(leaves, untrained, tmp_path):
    grey = [read_rgb(path).mean(axis=-1).astype(np.uint8) for path in sorted(leaves.glob("*.png"))]
    for index, pixels in enumerate(grey):
        write_image(tmp_path / f"{index}.png", pixels)
    bicubic, model = measured(tmp_path, untrained).rows
    expected = []
    for pixels in grey:
        truth = pixels[: len(pixels) // 2 * 2, : pixels.shape[1] // 2 * 2].astype(float)
        low_res = downscale_image(truth.astype(np.uint8), 2, rounding="uint8")
        error = (upscale_image(low_res, 2) - truth)[2:-2, 2:-2]
        expected.append(10 * math.log10(255**2 / np.square(error).mean()))
    assert bicubic["psnr"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert model["psnr"] == pytest.approx(bicubic["psnr"], abs=0.01)


@pytest.mark.slow
def test_grey_and_colour_go_together_and_an_exact_image_hides_nothing(leaves, tmp_path):
    write_image(tmp_path / "colour.png", read_rgb(leaves / "0.png"))
    alone = measured(tmp_path).rows[0]
    write_image(tmp_path / "flat.png", np.full((64, 64), 77, np.uint8))
    both = measured(tmp_path)
    assert [score["hf_energy"] is None for score in both.scores] == [False, True]
    assert [score["psnr"] for score in both.scores] == [alone["psnr"], math.inf]
    assert both.rows[0]["hf_energy"] == alone["hf_energy"]
    assert both.rows[0]["psnr"] == alone["psnr"]
    assert (alone["exact"], both.rows[0]["exact"]) == (0, 1)
    assert "| exact |" in both.to_markdown()
    assert "| exact |" not in measured(leaves).to_markdown()


def test_flat_images_alone_have_no_texture_and_lose_nothing_else(tmp_path):
    write_image(tmp_path / "flat.png", np.full((64, 64, 3), 5, np.uint8))
    report = measured(tmp_path)
    assert (report.rows[0]["swd"], report.rows[0]["hf_energy"]) == (None, None)
    assert (report.rows[0]["psnr"], report.rows[0]["ssim"]) == (math.inf, 1.0)
    assert json.loads(report.to_json())["rows"][0]["psnr"] == "inf"


def test_sixteen_bits_are_rounded_to_eight(leaves, tmp_path):
    deep = read_rgb(leaves / "0.png").astype(np.uint16) * 257
    write_image(tmp_path / "deep.png", deep + np.uint16(100) * (deep < 60000))  # less than half a step of 257
    ours, theirs = (next(iter(ImageSet(folder, config()))) for folder in (tmp_path, leaves))
    assert torch.equal(ours.truth, theirs.truth)


def test_channel_and_crop_reach_the_metrics(leaves):
    row = measured(leaves, channel="rgb", crop=5).rows[0]
    protocol = metrics.Protocol(crop=5, channel="rgb")
    pairs = [bicubic_pair(path, 2)[:2] for path in sorted(leaves.glob("*.png"))]
    expected = np.mean([metrics.psnr(*pair, protocol).item() for pair in pairs])
    assert row["psnr"] == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------- images


def test_a_fraction_as_scale(leaves):
    pictures = list(ImageSet(leaves, config(scale=1.5)))
    assert [tuple(picture.truth.shape[1:]) for picture in pictures] == [(63, 72), (66, 63)]
    assert [tuple(picture.low_res.shape[1:]) for picture in pictures] == [(42, 48), (44, 42)]
    expected = resize(pictures[0].truth, size=(42, 48), rounding="uint8")
    assert torch.equal(pictures[0].low_res, expected)


def first(folder, low_res=None):
    return next(iter(ImageSet(folder, config(), low_res)))


@pytest.mark.parametrize("ending", ["", "x2", "_x2", "-X2", "_LRx2"])
def test_low_resolution_files_are_found_by_name(leaves, tmp_path, ending):
    made = list(ImageSet(leaves, config()))
    for index, picture in enumerate(made):
        write_image(tmp_path / f"{index}{ending}.png", picture.low_res.permute(1, 2, 0).numpy())
    given = list(ImageSet(leaves, config(), tmp_path))
    for ours, theirs in zip(given, made, strict=True):
        assert torch.equal(ours.low_res, theirs.low_res)
    low_res = sorted(tmp_path.iterdir())[1]
    assert find_original(low_res, sorted(leaves.glob("*.png")), 2) == leaves / "1.png"


def test_the_same_name_goes_before_an_ending_and_two_endings_are_refused(leaves, tmp_path):
    low_res = first(leaves).low_res.permute(1, 2, 0).numpy()
    write_image(tmp_path / "0x2.png", np.zeros_like(low_res))
    write_image(tmp_path / "0_x2.png", low_res)
    with pytest.raises(ValueError, match=r"0_x2\.png and 0x2\.png"):
        first(leaves, tmp_path)
    write_image(tmp_path / "0.png", low_res)
    assert np.array_equal(first(leaves, tmp_path).low_res.permute(1, 2, 0), low_res)


def test_grey_low_resolution_of_a_colour_image_and_the_reverse(leaves, tmp_path):
    grey_truth, low_res = np.full((64, 72), 9, np.uint8), np.full((32, 36), 9, np.uint8)
    for name in ("truth", "low", "coloured"):
        (tmp_path / name).mkdir()
    write_image(tmp_path / "low" / "0.png", low_res)
    assert first(leaves, tmp_path / "low").low_res.shape == (3, 32, 36)
    write_image(tmp_path / "truth" / "0.png", grey_truth)
    write_image(tmp_path / "low" / "0.png", np.stack([low_res] * 3, axis=-1))
    assert first(tmp_path / "truth", tmp_path / "low").low_res.shape == (1, 32, 36)
    write_image(tmp_path / "coloured" / "0.png", np.stack([low_res, low_res, low_res + 1], axis=-1))
    with pytest.raises(ValueError, match="coloured"):
        first(tmp_path / "truth", tmp_path / "coloured")


class SecondOfTwo(Processes):
    """Measures its part, and hears nothing of the first."""

    def gather(self, value):
        return [value]


def test_a_process_reads_its_own_images_alone_and_measures_what_one_process_would(leaves, monkeypatch):
    chosen, read = config(), []
    images = ImageSet(leaves, chosen)
    whole = evaluation.evaluate(ImageSet(leaves, chosen, limit=2), chosen)
    decode = ImageSet.read
    monkeypatch.setattr(ImageSet, "read", lambda self, path: (read.append(path.name), decode(self, path))[1])
    part = evaluation.evaluate(images, chosen, processes=SecondOfTwo(CPU, 1, 2))
    assert read == ["1.png"]
    assert [score["psnr"] for score in part.scores] == [whole.scores[1]["psnr"]]


def test_patches_of_an_image_are_the_same_among_any_others(leaves, tmp_path):
    shutil.copy(leaves / "1.png", tmp_path)
    alone = measured(tmp_path).rows[0]
    write_image(tmp_path / "0.png", np.zeros((8, 8), np.uint8))  # too small to be measured
    assert measured(tmp_path).rows[0]["swd"] == alone["swd"]


def test_one_image_is_in_memory_at_a_time(leaves):
    given, alive = [], []

    def restore(low_res):
        alive.append(sum(reference() is not None for reference in given))
        result = resize(low_res, scale=2)
        given.extend([weakref.ref(low_res), weakref.ref(result)])
        return result

    chosen = config()
    evaluation.evaluate(ImageSet(leaves, chosen), chosen, [Method(Label("mine"), restore)])
    assert alive == [0] * 3  # a warm-up, and two images


# ---------------------------------------------------------------- time


@pytest.mark.slow
def test_time_is_that_of_restoring(leaves):
    def slow(low_res):
        time.sleep(0.05)
        return resize(low_res, scale=2).clamp(0, 1)

    chosen = config()
    report = evaluation.evaluate(ImageSet(leaves, chosen), chosen, [Method(Label("slow"), slow)])
    megapixels = [64 * 72 / 1e6, 66 * 64 / 1e6]
    found = [score["seconds_per_megapixel"] for score in report.scores if score.label.method == "slow"]
    for value, size in zip(found, megapixels, strict=True):
        assert 0.05 / size <= value < 5 / size
    assert report.rows[1]["seconds_per_megapixel"] == pytest.approx(np.mean(found))
    assert report.rows[1]["peak_memory_mb"] is None  # told on CUDA only


# ---------------------------------------------------------------- LPIPS


class FakeLpips:
    def __init__(self, device, weights):
        self.weights = weights

    def describe(self):
        return f"fake, {self.weights}"

    def __call__(self, restored, truth):
        return (restored - truth).abs().mean(dim=(1, 2, 3))


def test_lpips_is_measured_where_it_can_be_had(leaves, monkeypatch):
    monkeypatch.setattr(evaluation, "Lpips", FakeLpips)
    report = measured(leaves, lpips=True, lpips_weights="alex.pth")
    pairs = [bicubic_pair(path, 2)[:2] for path in sorted(leaves.glob("*.png"))]
    expected = np.mean([(restored - truth).abs().mean().item() for restored, truth in pairs])
    assert report.rows[0]["lpips"] == pytest.approx(expected, rel=1e-5)
    assert f"{expected:.4f}" in report.to_markdown()
    assert report.protocol["metrics"]["lpips"] == "fake, alex.pth"
    assert perception_distortion_figure(report).axes[0].get_ylabel().startswith("LPIPS")


@pytest.mark.slow
def test_without_lpips_the_notes_say_why_and_the_rest_goes_on(leaves, monkeypatch):
    def missing(device, weights):
        raise MetricUnavailableError("no network")

    monkeypatch.setattr(evaluation, "Lpips", missing)
    report = measured(leaves, lpips=True)
    assert report.rows[0]["lpips"] is None
    assert "LPIPS: unavailable: no network" in report.to_markdown()
    assert "LPIPS" not in measured(leaves).to_markdown()


# ---------------------------------------------------------------- reports


@pytest.mark.slow
def test_the_script_as_a_user_runs_it(leaves, random_weights, tmp_path, monkeypatch, capsys):
    flags = "--scale 2 --no_lpips --steps 2 1 --num_images 1 2 --seed 3 --device cpu --mode fidelity".split()
    command = ["evaluate.py", "--data", leaves, *flags, "--weights_path", random_weights]
    for ending in ("json", "csv", "markdown"):
        command += [f"--{ending}", tmp_path / "new" / f"table.{ending}"]
    command += ["--plot", tmp_path / "new" / "plot.png"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script.__file__, run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out == (tmp_path / "new" / "table.markdown").read_text()
    found = json.loads((tmp_path / "new" / "table.json").read_text())
    assert list(found) == ["protocol", "rows"]
    expected = [("bicubic", None, 1), ("fidelity", 1, 1), ("fidelity", 1, 2)]
    expected += [("model", 2, 1), ("model", 2, 2), ("model", 1, 1), ("model", 1, 2)]
    assert [(row["method"], row["steps"], row["samples"]) for row in found["rows"]] == expected
    assert all(list(row) == ROW_KEYS for row in found["rows"])
    how = [{"steps": 2, "num_images": 2, "seed": 3}]
    bicubic, model = measured(leaves, random_weights, how, seed=3).rows
    for row, other in ((found["rows"][0], bicubic), (found["rows"][4], model)):
        assert {name: row[name] for name in ROW_KEYS if name not in TIMING} == numbers(other)
    protocol = found["protocol"]
    assert (protocol["data"], protocol["images"], protocol["scale"]) == (leaves.name, 2, 2)
    assert set(protocol["metrics"]) == {metric.name for metric in METRICS}
    assert protocol["model"]["file"] == random_weights.name
    assert protocol["model"]["steps_trained"] == 7
    assert protocol["restoring"]["consistency"] is False
    lines = list(csv.DictReader((tmp_path / "new" / "table.csv").open()))
    assert len(lines) == 7 * 2
    per_image = [metric.name for metric in METRICS if metric.of_image is not None]
    assert list(lines[0]) == ["image", *LABELS, *per_image]
    assert [line["image"] for line in lines[:2]] == ["0.png", "1.png"]
    mean = np.mean([float(line["psnr"]) for line in lines[2:4]])
    assert found["rows"][1]["psnr"] == pytest.approx(mean, abs=1e-12)
    with Image.open(tmp_path / "new" / "plot.png") as plot:
        assert plot.format == "PNG"
        assert min(plot.size) > 500
    assert len(list((tmp_path / "new").iterdir())) == 4


EMPTY = {metric.name: None for metric in METRICS}


def row(method="model", scheduler="ddim", steps=4, samples=1, **values):
    return Scores(Label(method, scheduler, steps, samples), EMPTY | values)


def test_json_writes_infinity_as_a_string_and_what_is_missing_as_null():
    text = Report({}, [row(lr_psnr=math.inf, psnr=30.0)], [], []).to_json()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(text, parse_constant=refuse)["rows"][0]
    assert found["lr_psnr"] == "inf"
    assert found["lpips"] is None
    assert found["psnr"] == 30.0


@pytest.mark.slow
def test_markdown_is_a_table_of_what_was_measured(leaves, untrained):
    how = [{"steps": 1, "num_images": number} for number in (1, 2)]
    report = measured(leaves, untrained, how)
    table = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| bicubic |  |  | 1 | ")
    assert f" {report.rows[0]['psnr']:.2f} | {report.rows[0]['ssim']:.4f} |" in table[2]
    assert "uncertainty" in table[0]
    assert "uncertainty" not in measured(leaves).to_markdown()


def test_the_plot_joins_the_rows_by_steps():
    rows = [
        row("bicubic", None, None, psnr=28.0, swd=90.0),
        row(steps=10, psnr=26.0, swd=30.0),
        row(steps=10, samples=3, psnr=27.0, swd=40.0),
        row(steps=1, psnr=29.0, swd=80.0),
        row(steps=1, samples=3, psnr=math.inf, swd=80.0),
        row("detail", steps=10, psnr=25.0, swd=20.0),
    ]
    protocol = {"data": "photos", "scale": 4, "images": 5, "metrics": {"psnr": "RGB; ..."}}
    axes = perception_distortion_figure(Report(protocol, rows, [], [])).axes[0]
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves == {
        "bicubic": [[28.0, 90.0]],
        "model, ddim": [[29.0, 80.0], [26.0, 30.0]],
        "model, ddim, mean of 3": [[27.0, 40.0]],
        "detail, ddim": [[25.0, 20.0]],
    }
    assert [text.get_text() for text in axes.texts] == ["", "1 step", "10 steps", "10 steps", "10 steps"]
    assert axes.get_xlabel().startswith("PSNR on RGB")
    assert axes.get_ylabel().startswith("SWD")


# ---------------------------------------------------------------- faults of one file


def run_main(*flags):
    return main([*map(str, flags), *"--scale 2 --no_lpips --device cpu".split()])


@pytest.mark.slow
def test_an_unreadable_image_is_named_counted_and_left_out(leaves, tmp_path, capsys):
    shutil.copytree(leaves, tmp_path / "photos")
    (tmp_path / "photos" / "0a.png").write_bytes((leaves / "0.png").read_bytes()[:300])
    assert run_main("--data", tmp_path / "photos", "--json", tmp_path / "table.json") == 1
    printed = capsys.readouterr()
    assert "0a.png" in printed.err
    assert "1 of 3" in printed.err
    assert "0a.png" in printed.out
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["protocol"]["images"] == 2
    without = measured(leaves).rows[0]
    assert {name: found["rows"][0][name] for name in ROW_KEYS if name not in TIMING} == numbers(without)


def test_running_out_of_memory_for_one_image_leaves_it_out_of_every_row(leaves):
    def restore(low_res):
        if low_res.shape[-1] == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return resize(low_res, scale=2)

    chosen = config()
    report = evaluation.evaluate(ImageSet(leaves, chosen), chosen, [Method(Label("mine"), restore)])
    assert [score.image for score in report.scores] == ["0.png", "0.png"]
    assert len(report.failures) == 1
    assert "1.png" in report.failures[0]
    assert "CUDA out of memory" in report.failures[0]


@pytest.mark.slow
def test_an_output_that_cannot_be_written_loses_no_other(leaves, tmp_path, monkeypatch, capsys):
    write = script.write_text_atomically

    def full(path, text):
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(script, "write_text_atomically", full)
    flags = ["--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv", "--markdown", tmp_path / "a.md"]
    assert run_main("--data", leaves, *flags, "--plot", tmp_path / "a.png") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.md", "a.png"]
    printed = capsys.readouterr()
    assert "a.json" in printed.err
    assert "| bicubic |" in printed.out


def test_file_names_that_are_not_utf8_are_written(leaves, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        shutil.copytree(leaves, folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (folder / "0.png").rename(folder / os.fsdecode(b"\xe9.png"))
    flags = [
        part for name in ("json", "csv", "markdown") for part in (f"--{name}", tmp_path / f"table.{name}")
    ]
    assert run_main("--data", folder, *flags) == 0
    assert json.loads((tmp_path / "table.json").read_text())["protocol"]["data"] == "caf\\xe9"
    assert "\\xe9.png" in (tmp_path / "table.csv").read_text(encoding="utf-8")
    assert "caf\\xe9" in capsys.readouterr().out


def test_a_terminal_that_cannot_print_a_name_gets_the_table(leaves, tmp_path, monkeypatch):
    shutil.copytree(leaves, tmp_path / "\u5199\u771f")
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="cp1252"))
    assert run_main("--data", tmp_path / "\u5199\u771f") == 0
    assert b"| bicubic |" in screen.getvalue()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "missing"], "missing: "),
        (["--data", "empty"], "empty: "),
        (["--data", "small"], "small.png is 31x80"),
        (["--data", "small", "--crop", "20"], "51 "),
        (["--low_res", "empty"], "empty: "),
        (["--low_res", "wrong_size"], "0.png is 30x32"),
        (["--scale", "17", "--weights_path", "MODEL"], "--scale is 17"),
        (["--steps", "1", "1001", "--weights_path", "MODEL"], "1001"),
        (["--weights_path", "missing.pth"], "missing.pth"),
        (["--weights_path", "small/small.png"], "small.png"),
        (["--scale", "1"], "scale is 1"),
        (["--scale", "nan"], "scale is nan"),
        (["--steps", "0", "--weights_path", "MODEL"], "--steps is 0"),
        (["--steps", "4", "4"], "4 4"),
        (["--detail", "0.5", "1.5", "--weights_path", "MODEL"], "1.5"),
        (["--num_images", "0"], "--num_images is 0"),
        (["--eta", "2", "--scheduler", "ddim", "--weights_path", "MODEL"], "2.0"),
        (["--overlap", "1"], "--overlap is 1"),
        (["--limit", "0"], "limit is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--crop", "-1"], "--crop is -1"),
        (["--device", "tpu"], "'tpu'"),
        (["--plot", "out/plot.pdf"], "out/plot.pdf"),
        (["--json", "empty"], "empty: is a folder"),
        (
            ["--low_res", "wrong_size", "--json", "wrong_size/0.png", "--overwrite"],
            "wrong_size/0.png: is an input",
        ),
        (["--json", "small/small.png/table.json"], "small/small.png/table.json"),
        (["--json", "out/a", "--csv", "out/../out/a"], "out/a, out/../out/a"),
        (["--data", ""], "--data"),
        (["--low_res", ""], "--low_res"),
        (["--weights_path", ""], "--weights_path"),
        (["--json", ""], "--json"),
        (["--lpips_weights", "missing.pth", "--lpips"], "missing.pth"),
    ],
)
def test_wrong_input_is_refused_in_one_line(flags, message, leaves, untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "small", "wrong_size"):
        (tmp_path / name).mkdir()
    write_image(tmp_path / "small" / "small.png", np.zeros((80, 31, 3), np.uint8))
    for name in ("0", "1"):
        write_image(tmp_path / "wrong_size" / f"{name}.png", np.zeros((32, 30, 3), np.uint8))
    before = sorted(tmp_path.rglob("*"))
    flags = [str(untrained) if flag == "MODEL" else flag for flag in flags]
    without = [] if "--lpips" in flags else ["--no_lpips"]
    common = ["--data", str(leaves), *"--scale 2 --csv out/table.csv --device cpu".split(), *without]
    status = main([*common, *(flag for flag in flags if flag != "--lpips")])
    printed = capsys.readouterr()
    assert status == 2
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_of_grey_images_is_refused(leaves, tmp_path):
    path = save_model(tmp_path / "grey.pth", tiny_unet(in_channels=1, out_channels=1))
    with pytest.raises(ValueError, match="1 channels"):
        measured(leaves, path)


def test_an_interrupted_run_writes_nothing(leaves, tmp_path, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "ssim", stop)
    assert run_main("--data", leaves, "--json", tmp_path / "table.json") == 130
    printed = capsys.readouterr()
    assert len(printed.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
