"""The evaluator: its rows against direct calls of the metrics, its files, and how it refuses wrong input."""

import csv
import json
import math
import os
import runpy
import shutil
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as script
import infer
from bicubic import resize, upscale_image
from evaluate import main
from evaluation import measure, metrics
from evaluation.images import EvaluationConfig, ImageSet
from evaluation.lpips import MetricUnavailableError
from evaluation.measure import Method, evaluate, model_method
from evaluation.metrics import METRICS, Comparison
from examples.dead_leaves import dead_leaves
from imaging.files import read_rgb, write_image
from imaging.pairs import find_low_resolution, find_original
from imaging.pixels import pixels_to_unit
from models import LoadedModel, export_safetensors, load_model
from restoration import RestoreConfig
from tests.networks import BICUBIC, PROCESS, tiny_unet

LABEL = ["method", "scheduler", "steps", "samples"]
NAMES = [metric.name for metric in METRICS]


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """Two images, one of them of odd sides."""
    folder = tmp_path_factory.mktemp("leaves")
    for index, size in enumerate([(64, 72), (67, 65)]):
        write_image(folder / f"{index}.png", dead_leaves(size, np.random.default_rng(index), max_radius=24))
    return folder


def save_model(path, unet):
    export_safetensors(LoadedModel(unet, PROCESS, BICUBIC, 7), path)
    return path


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A network whose output depends on its input."""
    return save_model(tmp_path_factory.mktemp("random") / "random.safetensors", tiny_unet())


def image_set(folder, **changes):
    return ImageSet(folder, EvaluationConfig(**({"scale": 2.0, "lpips": False} | changes)))


def measured(folder, model=None, how=(), **changes):
    """A report on a folder; `how` are the fields of one RestoreConfig per row of the model."""
    images = image_set(folder, **changes)
    models = [] if model is None else [load_model(model)]
    return evaluate(
        images, [model_method(models, RestoreConfig(**each), images.config.scale) for each in how]
    )


def by(restore, folder, **changes):
    """A report on a folder, with one method more than bicubic."""
    return evaluate(image_set(folder, **changes), [Method("mine", restore)])


def first(folder, low_res=None):
    return next(iter(image_set(folder, low_res=low_res and str(low_res))))


def output_flags(folder):
    """The flags for a file of each kind, a.json to a.png."""
    endings = {"json": "json", "csv": "csv", "markdown": "md", "plot": "png"}
    return [part for name, ending in endings.items() for part in (f"--{name}", str(folder / f"a.{ending}"))]


def timeless(row):
    """The part of a row that the same seed has to give again."""
    return {name: value for name, value in row.items() if name != "seconds_per_megapixel"}


def as_unit(pixels):
    return pixels_to_unit(pixels)[None]


def bicubic_pair(path, scale):
    """Bicubic's answer, the truth (1, 3, H, W) and the low resolution in [0, 1], made by hand."""
    pixels = read_rgb(path)
    height, width = (length - length % scale for length in pixels.shape[:2])
    truth = pixels[:height, :width]
    planes = torch.from_numpy(truth).permute(2, 0, 1)
    low_res = resize(planes, scale=1 / scale, rounding="uint8").permute(1, 2, 0).numpy()
    return as_unit(upscale_image(low_res, scale)), as_unit(truth), as_unit(low_res)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("options", [{}, {"channel": "rgb", "crop": 5}])
def test_bicubic_row_is_what_the_metrics_say(leaves, options):
    (row,) = measured(leaves, **options).rows
    assert [row[name] for name in LABEL] == ["bicubic", None, None, 1]
    pairs = [bicubic_pair(path, 2) for path in sorted(leaves.glob("*.png"))]
    how = Comparison(**({"crop": 2} | options))

    def mean(metric):
        return torch.cat([metric(*pair) for pair in pairs]).mean().item()

    expected = {
        "psnr": mean(lambda x, y, low: metrics.psnr(x, y, how)),
        "ssim": mean(lambda x, y, low: metrics.ssim(x, y, how)),
        "lr_psnr": mean(lambda x, y, low: metrics.low_resolution_psnr(x, low)),
        "hf_energy": math.exp(mean(lambda x, y, low: metrics.high_frequency_energy(x, y).log())),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "flags"),
    [
        (2, "--steps 3 --scheduler ddim --eta 0.5 --seed 5"),
        (2, "--steps 2 --num_images 2"),
        (2, "--mode fidelity --tile 32 --overlap 8 --consistency"),
        (4, "--mode fidelity"),
        (8, "--weights clean --mode fidelity --self_ensemble"),
        (8, "--mode fidelity"),
    ],
)
def test_what_is_measured_is_what_infer_writes(leaves, random_weights, tmp_path, scale, flags):
    """Two models in a row and the project's own weights, too."""
    images = image_set(leaves, scale=scale, crop=scale)
    (tmp_path / "low").mkdir()
    for pair in images:
        write_image(tmp_path / "low" / pair.name, pair.low_res.permute(1, 2, 0).numpy())
    given = image_set(leaves, scale=scale, low_res=str(tmp_path / "low"))
    assert all(torch.equal(one.low_res, pair.low_res) for one, pair in zip(given, images, strict=True))
    common = ["--scale", str(scale), "--device", "cpu", *flags.split()]
    common += [] if scale == 8 else ["--weights", str(random_weights)]
    assert infer.main([str(tmp_path / "low"), "--output", str(tmp_path / "restored"), *common]) == 0
    table = tmp_path / "table.json"
    assert main(["--data", str(leaves), "--no_lpips", "--json", str(table), *common]) == 0
    restored = [as_unit(read_rgb(tmp_path / "restored" / f"{stem}_x{scale}.png")) for stem in "01"]
    expected = [
        metrics.psnr(one, as_unit(pair.truth.permute(1, 2, 0).numpy()), Comparison(scale)).item()
        for one, pair in zip(restored, images, strict=True)
    ]
    found = json.loads(table.read_text())
    assert found["rows"][1]["psnr"] == pytest.approx(np.mean(expected), abs=1e-9)
    models = {8: ["x4.safetensors", "x2.safetensors"]}.get(scale, ["random.safetensors"])
    if scale == 8 and "clean" not in flags:
        models[0] = "photo_x4.safetensors"
    assert [model["file"] for model in found["protocol"]["models"]] == models


@pytest.mark.parametrize("kind", ["light", "photo", "heavy"])
def test_a_random_degradation_depends_on_the_seed_and_the_name_alone(leaves, kind):
    first, again, another, bicubic = (
        image_set(leaves, **changes)
        for changes in ({"degradation": kind}, {"degradation": kind}, {"degradation": kind, "seed": 1}, {})
    )
    alone = again.read(again.paths[1]).low_res
    assert torch.equal(alone, list(first)[1].low_res)
    assert not any(torch.equal(alone, other.read(other.paths[1]).low_res) for other in (another, bicubic))
    assert kind in first.describe()


def test_an_image_that_is_exact_hides_no_other(leaves, tmp_path):
    write_image(tmp_path / "flat.png", np.full((64, 64), 77, np.uint8))
    flat = measured(tmp_path)
    assert [flat.rows[0][name] for name in ("psnr", "ssim", "hf_energy")] == [math.inf, 1.0, None]
    assert json.loads(flat.to_json())["rows"][0]["psnr"] == "inf"
    (tmp_path / "colour").mkdir()
    for folder in (tmp_path, tmp_path / "colour"):
        shutil.copy(leaves / "0.png", folder / "colour.png")
    both, alone = measured(tmp_path), measured(tmp_path / "colour").rows[0]
    assert [score["psnr"] for score in both.scores] == [alone["psnr"], math.inf]
    assert both.rows[0]["hf_energy"] == alone["hf_energy"]
    assert both.rows[0]["psnr"] == alone["psnr"]


def test_images_are_measured_in_8_bits_and_without_colours_that_nobody_sees(leaves, tmp_path):
    deep = read_rgb(leaves / "0.png").astype(np.uint16) * 257
    alpha = np.zeros((64, 72), np.uint16)
    alpha[16:48, 16:48] = 65535
    white = np.where(alpha[..., None] > 0, np.uint16(65535), np.array([0, 65535, 0], np.uint16))
    write_image(tmp_path / "deep.png", deep + np.uint16(100) * (deep < 60000))  # less than half a step of 257
    write_image(tmp_path / "disc.png", white, alpha)
    found, disc = image_set(tmp_path)
    assert torch.equal(found.truth, first(leaves).truth)
    assert bool((disc.truth == 255).all())


# ---------------------------------------------------------------- images


def test_a_fraction_as_scale(leaves):
    pairs = list(image_set(leaves, scale=1.5))
    assert [tuple(pair.truth.shape[1:]) for pair in pairs] == [(63, 72), (66, 63)]
    assert torch.equal(pairs[0].low_res, resize(pairs[0].truth, size=(42, 48), rounding="uint8"))


@pytest.mark.parametrize("ending", ["", "x2", "_x2", "-X2", "_LRx2"])
def test_low_resolution_files_are_found_by_name(ending):
    high, low = [Path("0.png"), Path("1.png")], [Path(f"low/0{ending}.png"), Path(f"low/1{ending}.png")]
    assert [find_low_resolution(path, low, 2) for path in high] == low
    assert [find_original(path, high, 2) for path in low] == high
    assert find_low_resolution(high[0], [Path("0_x2.png"), Path("0.png")], 2) == Path("0.png")
    with pytest.raises(ValueError, match=r"0x2\.png and 0_x2\.png"):
        find_low_resolution(high[0], [Path("0x2.png"), Path("0_x2.png")], 2)


def test_grey_low_resolution_of_a_colour_image_and_the_reverse(leaves, tmp_path):
    grey = np.full((32, 36, 1), 9, np.uint8)
    pictures = {"truth": np.full((64, 72), 9, np.uint8), "grey": grey[..., 0], "rgb": grey.repeat(3, axis=-1)}
    pictures["coloured"] = pictures["rgb"] + np.array([0, 0, 1], np.uint8)
    for name, pixels in pictures.items():
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "0.png", pixels)
    assert first(leaves, tmp_path / "grey").low_res.shape == (3, 32, 36)
    assert first(tmp_path / "truth", tmp_path / "rgb").low_res.shape == (1, 32, 36)
    with pytest.raises(ValueError, match="coloured"):
        first(tmp_path / "truth", tmp_path / "coloured")


def test_one_image_is_in_memory_at_a_time(leaves):
    given, alive = [], []

    def restore(low_res):
        alive.append(sum(reference() is not None for reference in given))
        result = resize(low_res, scale=2)
        given.extend([weakref.ref(low_res), weakref.ref(result)])
        return result

    by(restore, leaves)
    assert alive == [0] * 3  # a warm-up, and two images


def test_time_is_that_of_restoring(leaves):
    def slow(low_res):
        time.sleep(0.05)
        return resize(low_res, scale=2)

    times = [score["seconds_per_megapixel"] for score in by(slow, leaves).scores[2:]]
    assert all(0.05e6 <= pixels * time < 5e6 for pixels, time in zip((64 * 72, 66 * 64), times, strict=True))


# ---------------------------------------------------------------- reports


class FakeLpips:
    def __init__(self, device, weights):
        if weights == "missing":
            raise MetricUnavailableError("no network")
        self.note = "fake"

    def __call__(self, restored, truth):
        return (restored - truth).abs().mean(dim=(1, 2, 3))


def test_lpips_is_measured_where_it_can_be_had_and_else_the_notes_say_why(leaves, monkeypatch):
    monkeypatch.setattr(measure, "Lpips", FakeLpips)
    report = measured(leaves, lpips=True)
    pairs = [bicubic_pair(path, 2)[:2] for path in sorted(leaves.glob("*.png"))]
    expected = np.mean([(restored - truth).abs().mean().item() for restored, truth in pairs])
    assert report.rows[0]["lpips"] == pytest.approx(expected, rel=1e-5)
    assert f"{expected:.4f}" in report.to_markdown()
    assert report.protocol["metrics"]["lpips"] == "fake"
    missing = measured(leaves, lpips=True, lpips_weights="missing")
    assert missing.rows[0]["lpips"] is None
    assert "LPIPS: unavailable: no network" in missing.to_markdown()
    assert "LPIPS" not in measured(leaves).to_markdown()


@pytest.mark.slow
def test_the_script_as_a_user_runs_it(leaves, random_weights, tmp_path, monkeypatch, capsys):
    flags = "--scale 2 --no_lpips --steps 2 1 --num_images 1 2 --seed 3 --device cpu --precision fp32"
    command = ["evaluate.py", "--data", str(leaves), *flags.split(), "--mode", "fidelity"]
    folder = tmp_path / "new"
    command += ["--weights_path", str(random_weights), *output_flags(folder)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("MPLBACKEND", "module://a_notebook.that_is_not_there")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script.__file__, run_name="__main__")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed == (folder / "a.md").read_text()
    found = json.loads((folder / "a.json").read_text())
    expected = [("bicubic", None, 1), ("fidelity", 1, 1), ("fidelity", 1, 2)]
    expected += [("model", 2, 1), ("model", 2, 2), ("model", 1, 1), ("model", 1, 2)]
    assert [(row["method"], row["steps"], row["samples"]) for row in found["rows"]] == expected
    assert all(list(row) == [*LABEL, *NAMES] for row in found["rows"])
    rows = measured(leaves, random_weights, [{"steps": 2, "num_images": 2, "seed": 3}], seed=3).rows
    assert [timeless(found["rows"][place]) for place in (0, 4)] == [timeless(row) for row in rows]
    protocol = found["protocol"]
    assert (protocol["data"], protocol["images"], protocol["scale"]) == (leaves.name, 2, 2)
    assert protocol["models"][0]["steps_trained"] == 7
    lines = list(csv.DictReader((folder / "a.csv").open()))
    assert list(lines[0]) == ["image", *LABEL, *NAMES]
    assert [line["image"] for line in lines] == ["0.png", "1.png"] * 7
    mean = np.mean([float(line["psnr"]) for line in lines[2:4]])
    assert found["rows"][1]["psnr"] == pytest.approx(mean, abs=1e-12)
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 7
    assert f"| bicubic |  |  | 1 | {rows[0]['psnr']:.2f} | {rows[0]['ssim']:.4f} |" in table[2]
    assert Image.open(folder / "a.png").format == "PNG"
    assert len(list(folder.iterdir())) == 4


# ---------------------------------------------------------------- faults of one file


def run_main(*flags):
    return main([*map(str, flags), *"--scale 2 --no_lpips --device cpu".split()])


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
    assert timeless(found["rows"][0]) == timeless(measured(leaves).rows[0])


@pytest.mark.parametrize("place", ["restoring", "measuring"])
def test_an_image_that_runs_out_of_memory_is_left_out_of_every_row(leaves, monkeypatch, place):
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    def restore(low_res):
        if place == "restoring" and low_res.shape[-1] == 32:
            raise error
        return resize(low_res, scale=2)

    def ssim(restored, truth, how, right=metrics.ssim):
        if place == "measuring" and truth.shape[-1] == 64:
            raise error
        return right(restored, truth, how)

    monkeypatch.setattr(metrics, "ssim", ssim)
    report = by(restore, leaves)
    assert [score["image"] for score in report.scores] == ["0.png", "0.png"]
    (failure,) = report.failures
    assert "1.png" in failure
    assert str(error) in failure


@pytest.mark.slow
def test_an_output_that_cannot_be_written_loses_no_other(leaves, tmp_path, monkeypatch, capsys):
    write = script.write_atomically

    def full(path, content):
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(script, "write_atomically", full)
    assert run_main("--data", leaves, *output_flags(tmp_path)) == 1
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
    assert run_main("--data", folder, *output_flags(tmp_path)) == 0
    assert json.loads((tmp_path / "a.json").read_text())["protocol"]["data"] == "caf\\xe9"
    assert "\\xe9.png" in (tmp_path / "a.csv").read_text(encoding="utf-8")
    assert "caf\\xe9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("package", "error"),
    [("matplotlib", RuntimeError("another NumPy")), ("skimage", ImportError("no such library"))],
)
def test_a_package_that_does_not_import_costs_a_sentence(
    leaves, tmp_path, monkeypatch, capsys, package, error
):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == package:
                raise error

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert run_main("--data", leaves, "--plot", tmp_path / "plot.png") == 2
    printed = capsys.readouterr()
    assert str(error) in printed.err
    assert printed.out == ""


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ("--no_lpips --data empty", "empty: "),
        ("--no_lpips --data small", "small.png is 31x80"),
        ("--no_lpips --data small --crop 20", "51 "),
        ("--no_lpips --low_res wrong_size", "0.png is 30x32"),
        ("--no_lpips --scale 1", "scale is 1"),
        ("--no_lpips --scale 2.333", "--scale is 2.333"),
        ("--no_lpips --weights small/small.png", "small.png"),
        ("--no_lpips --weights GREY.safetensors", "1 channels"),
        ("--no_lpips --weights clean --steps 1 1001", "1001"),
        ("--no_lpips --plot out/plot.pdf", "out/plot.pdf"),
        (
            "--no_lpips --low_res wrong_size --json wrong_size/0.png --overwrite",
            "wrong_size/0.png: is an input",
        ),
        ("--lpips_weights missing.pth", "missing.pth"),
    ],
)
def test_wrong_input_is_refused_in_one_line(flags, value, leaves, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "small", "wrong_size"):
        (tmp_path / name).mkdir()
    write_image(tmp_path / "small" / "small.png", np.zeros((80, 31, 3), np.uint8))
    for name in ("0", "1"):
        write_image(tmp_path / "wrong_size" / f"{name}.png", np.zeros((32, 30, 3), np.uint8))
    save_model(tmp_path / "GREY.safetensors", tiny_unet(in_channels=1, out_channels=1))
    before = sorted(tmp_path.rglob("*"))
    common = ["--data", str(leaves), *"--scale 2 --csv out/table.csv --device cpu".split()]
    status = main([*common, *flags.split()])
    printed = capsys.readouterr()
    assert status == 2
    assert value in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before
