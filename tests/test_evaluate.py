"""The evaluator: its rows against direct calls of the metrics, its files, and how it refuses wrong input."""

import csv
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bicubic import downscale_image, resize, upscale_image
from diffusion import ProcessConfig, ResidualGenerator
from engine.checkpoint import load_model, save_checkpoint
from evaluate import main
from evaluation import evaluation, metrics
from evaluation.evaluation import Settings, load_trained, read_image_set
from evaluation.meter import Meter
from evaluation.report import CSV_COLUMNS, Report, Row, perception_distortion_figure
from examples.dead_leaves import dead_leaves
from imaging.files import read_rgb, write_image
from tests.networks import tiny_unet
from unet import UNet

CPU = torch.device("cpu")
ROW_KEYS = (
    "method scheduler steps samples psnr ssim lr_psnr lpips hf_energy swd seconds_per_megapixel "
    "peak_memory_mb uncertainty_pearson uncertainty_spearman"
).split()
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
        "unet": unet.config.to_dict(),
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


def settings(**changes):
    return Settings(**({"scale": 2, "steps": (1,), "lpips": False} | changes))


def measured(folder, model=None, **changes):
    chosen = settings(**changes)
    trained = None if model is None else load_trained(model, CPU)
    return evaluation.evaluate(read_image_set(folder, chosen), chosen, trained)


def numbers(row):
    """What the same seed has to give again."""
    return {name: value for name, value in asdict(row).items() if name not in TIMING}


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
    distance = metrics.sliced_wasserstein_distance(
        [image[0] for image in restored], [image[0] for image in truth], seed=seed
    )
    assert row.psnr == pytest.approx(psnr.mean().item(), abs=1e-9)
    assert row.ssim == pytest.approx(ssim.mean().item(), abs=1e-9)
    assert row.hf_energy == pytest.approx(energy.log().mean().exp().item(), rel=1e-5)
    assert row.lr_psnr == pytest.approx(
        values(metrics.low_resolution_psnr, restored, low_res).mean().item(), abs=1e-9
    )
    assert row.swd == pytest.approx(distance.average, rel=1e-4)


# ---------------------------------------------------------------- rows


def test_bicubic_row_is_what_the_metrics_say(leaves):
    report = measured(leaves)
    assert [row.method for row in report.rows] == ["bicubic"]
    assert_is_bicubic_row(report.rows[0], sorted(leaves.glob("*.png")), 2)


def test_bicubic_row_of_set5_and_of_its_published_low_resolution(sr_data):
    folder, chosen = sr_data / "test" / "Set5", settings(scale=4)
    made = evaluation.evaluate(read_image_set(folder, chosen), chosen)
    given = evaluation.evaluate(read_image_set(folder, chosen, folder / "LRx4_mirror"), chosen)
    assert_is_bicubic_row(made.rows[0], sorted(folder.glob("*.png")), 4)
    assert numbers(given.rows[0]) == numbers(made.rows[0])
    assert made.rows[0].psnr == pytest.approx(28.42, abs=0.02)
    assert given.protocol["low_resolution"] == "read from LRx4_mirror"
    replicated = read_image_set(folder, replace(chosen, border="replicate"))
    published = read_image_set(folder, chosen, folder / "LRx4")
    for ours, theirs in zip(replicated.pictures, published.pictures, strict=True):
        assert torch.equal(ours.low_res, theirs.low_res)


def test_a_network_that_predicts_v_0_restores_bicubic_in_one_step(leaves, untrained):
    # clean = signal_scale * noisy - noise_scale * v = 5e-5 * noise: less than a thousandth of a grey level.
    bicubic, model = measured(leaves, untrained).rows
    assert (model.method, model.steps, model.samples) == ("model", 1, 1)
    assert model.psnr == pytest.approx(bicubic.psnr, abs=0.01)
    assert model.ssim == pytest.approx(bicubic.ssim, abs=1e-4)
    assert model.lr_psnr == pytest.approx(bicubic.lr_psnr, abs=0.05)
    assert model.hf_energy == pytest.approx(bicubic.hf_energy, rel=0.01)


def test_a_model_row_is_what_the_generator_restores(leaves, random_weights):
    chosen = settings(steps=(3,), num_samples=2, seed=5)
    images = read_image_set(leaves, chosen)
    trained = load_trained(random_weights, CPU, scheduler="ddim")
    single, mean = evaluation.evaluate(images, chosen, trained).rows[1:]
    unet = load_model(random_weights, UNet).network
    generator = ResidualGenerator(num_train_timesteps=1000, scheduler="ddim")
    expected = {name: [] for name in ("single", "mean", "pearson", "spearman")}
    for picture in images.pictures:
        low_res = picture.low_res[None] / 255 * 2 - 1
        samples = generator.generate_images(unet, low_res, 2, 3, seed=5)
        truth = picture.truth[None] / 255
        protocol = metrics.Protocol(crop=2)
        expected["single"].append(metrics.psnr(samples[:1], truth, protocol).item())
        expected["mean"].append(metrics.psnr(samples.mean(0, keepdim=True), truth, protocol).item())
        correlation = metrics.uncertainty_correlation(samples[:, None], truth)
        expected["pearson"].append(correlation.pearson.item())
        expected["spearman"].append(correlation.spearman.item())
    assert (single.samples, mean.samples, single.scheduler, single.steps) == (1, 2, "ddim", 3)
    assert single.psnr == pytest.approx(np.mean(expected["single"]), abs=1e-4)
    assert mean.psnr == pytest.approx(np.mean(expected["mean"]), abs=1e-4)
    assert mean.psnr > single.psnr + 0.1  # averaging removes noise
    assert mean.uncertainty_pearson == pytest.approx(np.mean(expected["pearson"]), abs=1e-4)
    assert mean.uncertainty_spearman == pytest.approx(np.mean(expected["spearman"]), abs=1e-4)
    assert single.uncertainty_pearson is None


def test_the_same_seed_gives_the_same_table_and_another_seed_another(leaves, random_weights):
    first, again, other = (
        [numbers(row) for row in measured(leaves, random_weights, steps=(1, 2), seed=seed).rows]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert [row["steps"] for row in first] == [None, 1, 2]
    assert first[2]["psnr"] != other[2]["psnr"]
    assert first[0]["psnr"] == other[0]["psnr"]


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
    assert bicubic.psnr == pytest.approx(np.mean(expected), abs=1e-6)
    assert model.psnr == pytest.approx(bicubic.psnr, abs=0.01)


def test_grey_and_colour_go_together_and_flat_images_have_no_energy(leaves, tmp_path):
    textured = read_rgb(leaves / "0.png")
    write_image(tmp_path / "colour.png", textured)
    alone = measured(tmp_path).rows[0]
    write_image(tmp_path / "flat.png", np.full((64, 64), 77, np.uint8))
    both = measured(tmp_path)
    assert [score.hf_energy is None for score in both.scores] == [False, True]
    assert both.rows[0].hf_energy == alone.hf_energy
    assert both.rows[0].psnr == math.inf  # a flat image is restored exactly


def test_sixteen_bits_are_rounded_to_eight(leaves, tmp_path):
    deep = read_rgb(leaves / "0.png").astype(np.uint16) * 257
    write_image(tmp_path / "deep.png", deep + np.uint16(100) * (deep < 60000))  # less than half a step of 257
    pictures = read_image_set(tmp_path, settings()).pictures
    assert torch.equal(pictures[0].truth, read_image_set(leaves, settings()).pictures[0].truth)


def test_channel_and_crop_reach_the_metrics(leaves):
    row = measured(leaves, channel="rgb", crop=5).rows[0]
    protocol = metrics.Protocol(crop=5, channel="rgb")
    pairs = [bicubic_pair(path, 2)[:2] for path in sorted(leaves.glob("*.png"))]
    expected = np.mean([metrics.psnr(*pair, protocol).item() for pair in pairs])
    assert row.psnr == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------- images


def test_a_fraction_as_scale(leaves):
    pictures = read_image_set(leaves, settings(scale=1.5)).pictures
    assert [tuple(picture.truth.shape[1:]) for picture in pictures] == [(63, 72), (66, 63)]
    assert [tuple(picture.low_res.shape[1:]) for picture in pictures] == [(42, 48), (44, 42)]
    expected = resize(pictures[0].truth, size=(42, 48), rounding="uint8")
    assert torch.equal(pictures[0].low_res, expected)


@pytest.mark.parametrize("ending", ["", "x2", "_x2", "-X2", "_LRx2"])
def test_low_resolution_files_are_found_by_name(leaves, tmp_path, ending):
    made = read_image_set(leaves, settings()).pictures
    for index, picture in enumerate(made):
        write_image(tmp_path / f"{index}{ending}.png", picture.low_res.permute(1, 2, 0).numpy())
    given = read_image_set(leaves, settings(), tmp_path).pictures
    for ours, theirs in zip(given, made, strict=True):
        assert torch.equal(ours.low_res, theirs.low_res)


def test_the_same_name_goes_before_an_ending_and_two_endings_are_refused(leaves, tmp_path):
    low_res = read_image_set(leaves, settings(), limit=1).pictures[0].low_res.permute(1, 2, 0).numpy()
    write_image(tmp_path / "0x2.png", np.zeros_like(low_res))
    write_image(tmp_path / "0_x2.png", low_res)
    with pytest.raises(ValueError, match=r"0_x2\.png and 0x2\.png could both be"):
        read_image_set(leaves, settings(), tmp_path, limit=1)
    write_image(tmp_path / "0.png", low_res)
    given = read_image_set(leaves, settings(), tmp_path, limit=1).pictures[0].low_res
    assert np.array_equal(given.permute(1, 2, 0), low_res)


def test_grey_low_resolution_of_a_colour_image_and_the_reverse(leaves, tmp_path):
    grey_truth, low_res = np.full((64, 72), 9, np.uint8), np.full((32, 36), 9, np.uint8)
    for name in ("truth", "low", "coloured"):
        (tmp_path / name).mkdir()
    write_image(tmp_path / "low" / "0.png", low_res)
    given = read_image_set(leaves, settings(), tmp_path / "low", limit=1).pictures[0]
    assert given.low_res.shape == (3, 32, 36)
    write_image(tmp_path / "truth" / "0.png", grey_truth)
    write_image(tmp_path / "low" / "0.png", np.stack([low_res] * 3, axis=-1))
    given = read_image_set(tmp_path / "truth", settings(), tmp_path / "low").pictures[0]
    assert given.low_res.shape == (1, 32, 36)
    write_image(tmp_path / "coloured" / "0.png", np.stack([low_res, low_res, low_res + 1], axis=-1))
    with pytest.raises(ValueError, match="has colours"):
        read_image_set(tmp_path / "truth", settings(), tmp_path / "coloured")


# ---------------------------------------------------------------- time and memory


def test_the_meter_tells_time_and_lets_no_measurement_inherit_the_peak_of_another():
    meter = Meter.on(CPU)
    _, waited = meter.measure(lambda: time.sleep(0.05))
    assert 0.05 <= waited.seconds < 5
    if meter.memory == "none":
        pytest.skip("the peak of resident memory cannot be restarted on this system")
    _, small = meter.measure(lambda: torch.ones(1))
    _, large = meter.measure(lambda: torch.ones(50_000_000).sum())
    _, after = meter.measure(lambda: torch.ones(1))
    assert 190e6 < large.peak_bytes - small.peak_bytes < 260e6
    assert after.peak_bytes < small.peak_bytes + 20e6


def test_cost_is_summed_over_pixels_and_samples(leaves, random_weights):
    report = measured(leaves, random_weights, num_samples=2)
    for row in report.rows:
        scores = [s for s in report.scores if (s.method, s.samples) == (row.method, row.samples)]
        pixels = 64 * 72 + 66 * 64
        assert len(scores) == 2
        assert row.seconds_per_megapixel == pytest.approx(sum(s.seconds for s in scores) / pixels * 1e6)
    first, both = report.scores[2], report.scores[4]
    assert first.image == both.image
    assert 0 < first.seconds < both.seconds


# ---------------------------------------------------------------- LPIPS


class FakeLpips:
    def __init__(self, device):
        self.device = device

    def __call__(self, restored, truth):
        return (restored - truth).abs().mean(dim=(1, 2, 3))


def test_lpips_is_measured_where_it_can_be_had(leaves, monkeypatch):
    monkeypatch.setattr(metrics, "Lpips", FakeLpips)
    report = measured(leaves, lpips=True)
    pairs = [bicubic_pair(path, 2)[:2] for path in sorted(leaves.glob("*.png"))]
    expected = np.mean([(restored - truth).abs().mean().item() for restored, truth in pairs])
    assert report.rows[0].lpips == pytest.approx(expected, rel=1e-5)
    assert f"{expected:.4f}" in report.to_markdown()
    assert perception_distortion_figure(report).axes[0].get_ylabel().startswith("LPIPS")


def test_without_lpips_the_column_says_why_and_the_rest_goes_on(leaves, monkeypatch):
    def missing(device):
        raise metrics.MetricUnavailableError("LPIPS is unavailable: no network")

    monkeypatch.setattr(metrics, "Lpips", missing)
    report = measured(leaves, lpips=True)
    assert report.rows[0].lpips is None
    assert report.protocol["lpips"] == "unavailable: no network"
    assert "| unavailable |" in report.to_markdown()
    assert "LPIPS: unavailable: no network" in report.to_markdown()
    assert "LPIPS" not in measured(leaves).to_markdown()


# ---------------------------------------------------------------- reports


def test_the_script_as_a_user_runs_it(leaves, random_weights, tmp_path):
    command = [
        sys.executable,
        "evaluate.py",
        "--data",
        leaves,
        "--scale",
        "2",
        "--no_lpips",
        "--steps",
        "2",
        "1",
    ]
    command += ["--weights_path", random_weights, "--num_samples", "2", "--seed", "3", "--device", "cpu"]
    for ending in ("json", "csv", "markdown"):
        command += [f"--{ending}", tmp_path / "new" / f"table.{ending}"]
    command += ["--plot", tmp_path / "new" / "plot.png"]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=Path(evaluation.__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "new" / "table.markdown").read_text()
    found = json.loads((tmp_path / "new" / "table.json").read_text())
    assert list(found) == ["protocol", "rows"]
    expected = [("bicubic", None, 1), ("model", 2, 1), ("model", 2, 2), ("model", 1, 1), ("model", 1, 2)]
    assert [(row["method"], row["steps"], row["samples"]) for row in found["rows"]] == expected
    assert all(list(row) == ROW_KEYS for row in found["rows"])
    again = measured(leaves, random_weights, steps=(2, 1), num_samples=2, seed=3)
    for row, other in zip(found["rows"], again.rows, strict=True):
        assert {name: row[name] for name in ROW_KEYS if name not in TIMING} == numbers(other)
    protocol = found["protocol"]
    assert (protocol["data"], protocol["images"], protocol["scale"]) == (leaves.name, 2, 2)
    assert protocol["metrics"] == metrics.Protocol(crop=2).describe()
    assert protocol["model"]["file"] == random_weights.name
    assert protocol["model"]["steps_trained"] == 7
    lines = list(csv.DictReader((tmp_path / "new" / "table.csv").open()))
    assert len(lines) == 5 * 2
    assert tuple(lines[0]) == CSV_COLUMNS
    assert [line["image"] for line in lines[:2]] == ["0.png", "1.png"]
    mean = np.mean([float(line["psnr"]) for line in lines[2:4]])
    assert found["rows"][1]["psnr"] == pytest.approx(mean, abs=1e-12)
    with Image.open(tmp_path / "new" / "plot.png") as plot:
        assert plot.format == "PNG"
        assert min(plot.size) > 500
    assert len(list((tmp_path / "new").iterdir())) == 4


ROW = Row("model", "ddim", 4, 1, 30.0, 0.9, 50.0, None, 1.0, 20.0, 0.5, None, None, None)


def test_json_writes_infinity_as_a_string_and_what_is_missing_as_null():
    text = Report({"lpips": "switched off"}, [replace(ROW, lr_psnr=math.inf)], []).to_json()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(text, parse_constant=refuse)["rows"][0]
    assert row["lr_psnr"] == "inf"
    assert row["lpips"] is None
    assert row["psnr"] == 30.0


def test_markdown_is_a_table(leaves, untrained):
    report = measured(leaves, untrained, num_samples=2)
    table = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| bicubic |  |  | 1 | ")
    assert f" {report.rows[0].psnr:.2f} | {report.rows[0].ssim:.4f} |" in table[2]
    assert "uncertainty" in table[0]
    assert "uncertainty" not in measured(leaves).to_markdown()


def test_the_plot_joins_the_rows_by_steps():
    rows = [
        replace(ROW, method="bicubic", scheduler=None, steps=None, psnr=28.0, swd=90.0),
        replace(ROW, steps=10, psnr=26.0, swd=30.0),
        replace(ROW, steps=10, samples=3, psnr=27.0, swd=40.0),
        replace(ROW, steps=1, psnr=29.0, swd=80.0),
        replace(ROW, steps=1, samples=3, psnr=math.inf, swd=80.0),
    ]
    protocol = {"data": "photos", "scale": 4, "images": 5, "metrics": "RGB; ..."}
    axes = perception_distortion_figure(Report(protocol, rows, [])).axes[0]
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves == {
        "bicubic": [[28.0, 90.0]],
        "model, ddim": [[29.0, 80.0], [26.0, 30.0]],
        "mean of 3 samples": [[27.0, 40.0]],
    }
    assert [text.get_text() for text in axes.texts] == ["", "1 step", "10 steps", "10 steps"]
    assert axes.get_xlabel().startswith("PSNR on RGB")
    assert axes.get_ylabel().startswith("SWD")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "missing"], "missing: no such folder"),
        (["--data", "empty"], "empty: no image in this folder itself"),
        (["--data", "small"], "small.png is 31x80, 30x80 as a multiple of 2; 32 pixels a side are needed"),
        (["--data", "small", "--crop", "20"], "51 pixels a side are needed"),
        (["--data", "flat"], "flat"),
        (["--low_res", "empty"], "empty: no image"),
        (["--low_res", "partial"], "no low-resolution image for"),
        (["--low_res", "wrong_size"], "0.png is 30x32, but "),
        (["--scale", "3", "--weights_path", "MODEL"], "untrained.pth was trained for scale 2, not 3"),
        (["--steps", "1", "1001", "--weights_path", "MODEL"], "steps must be between 1 and 1000, not 1001"),
        (["--weights_path", "missing.pth"], "no checkpoint at missing.pth"),
        (["--weights_path", "small/small.png"], "is not a checkpoint"),
        (["--scale", "1"], "scale is 1; give a number above 1"),
        (["--scale", "nan"], "scale is nan; give a number above 1"),
        (["--steps", "0"], "steps are [0]"),
        (["--steps", "4", "4"], "steps are [4, 4]; give each number once"),
        (["--num_samples", "0"], "num_samples is 0"),
        (["--limit", "0"], "limit is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--crop", "-1"], "crop is -1"),
        (["--device", "tpu"], "'tpu'"),
        (["--plot", "out/plot.pdf"], "give a name that ends in .png"),
        (["--json", "empty"], "empty is a folder"),
        (["--json", "small/small.png/table.json"], "cannot be written"),
        (["--json", "out/a", "--csv", "out/../out/a"], "give every output a file of its own"),
    ],
)
def test_wrong_input_is_refused_in_one_line(flags, message, leaves, untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "small", "flat", "partial", "wrong_size"):
        (tmp_path / name).mkdir()
    write_image(tmp_path / "small" / "small.png", np.zeros((80, 31, 3), np.uint8))
    write_image(tmp_path / "flat" / "flat.png", np.full((64, 64, 3), 5, np.uint8))
    write_image(tmp_path / "partial" / "1.png", np.zeros((33, 32, 3), np.uint8))
    for name in ("0", "1"):
        write_image(tmp_path / "wrong_size" / f"{name}.png", np.zeros((32, 30, 3), np.uint8))
    before = sorted(tmp_path.rglob("*"))
    flags = [str(untrained) if flag == "MODEL" else flag for flag in flags]
    common = ["--data", str(leaves), *"--scale 2 --no_lpips --csv out/table.csv --device cpu".split()]
    status = main([*common, *flags])
    printed = capsys.readouterr()
    assert status == 2
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_of_grey_images_is_refused(leaves, tmp_path):
    path = save_model(tmp_path / "grey.pth", tiny_unet(in_channels=1, out_channels=1))
    with pytest.raises(ValueError, match=r"grey\.pth restores images of 1 channels"):
        measured(leaves, path)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory"),
    ],
)
def test_an_interrupted_run_writes_nothing(leaves, tmp_path, monkeypatch, capsys, error, status, message):
    def stop(*arguments):
        raise error

    monkeypatch.setattr(metrics, "ssim", stop)
    flags = ["--data", str(leaves), "--scale", "2", "--no_lpips", "--json", str(tmp_path / "table.json")]
    assert main(flags) == status
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
