"""The script as a user runs it: files in, files out, and what it says when something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infer
from engine.checkpoint import export_safetensors, load_model, save_checkpoint
from examples.dead_leaves import dead_leaves
from imaging.files import decode_image, write_image
from imaging.metadata import Metadata
from tests.networks import PROCESS, random_model
from tests.test_restoration import psnr
from unet import UNet

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pth"
    loaded = random_model()
    content = {"network": loaded.network.config.to_dict(), "process": PROCESS, "step": 7}
    save_checkpoint(path, {**content, "ema": loaded.network.state_dict()})
    return path


@pytest.fixture(scope="module")
def picture():
    return dead_leaves((20, 28), np.random.default_rng(5))


def script(*arguments, cwd=None):
    """Run infer.py in a process of its own, without importing more threads than the tests have."""
    return subprocess.run(
        [sys.executable, ROOT / "infer.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def here(*arguments):
    """Run infer.py in this process, on the CPU."""
    return infer.main([*map(str, arguments), "--device", "cpu", "--dtype", "fp32"])


# ---------------------------------------------------------------------------------------- in its own process


@pytest.mark.slow
def test_one_photo_as_the_readme_says(weights, picture, tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "photo.png", picture)
    flags = ("--weights_path", weights, "--input", "photo.png", "--output", "out/")
    flags += ("--steps", 3, "--seed", 0)
    done = script(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out/photo_x4.png\n"
    assert "100%" in done.stderr
    first = (tmp_path / "out/photo_x4.png").read_bytes()
    assert decode_image(tmp_path / "out/photo_x4.png").pixels.shape == (80, 112, 3)
    again = script(*flags, "--overwrite", cwd=tmp_path)
    assert again.returncode == 0
    assert (tmp_path / "out/photo_x4.png").read_bytes() == first
    monkeypatch.chdir(tmp_path)
    assert here(*flags) == 2
    assert "out/photo_x4.png: exists already; use --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out/photo_x4.png").read_bytes() == first


@pytest.mark.slow
def test_a_folder_with_a_bad_file_in_it(weights, picture, tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    write_image(folder / "a.png", picture)
    write_image(folder / "more" / "b.jpg", picture)
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:200])
    done = script("--weights_path", weights, folder, "--output", tmp_path / "out", "--mode", "fidelity")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert any("bad.png: damaged or cut short" in line for line in lines)
    assert lines[-1] == "infer.py: 1 of 3 images not restored"
    assert "Traceback" not in done.stderr
    written = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").glob("**/*.*"))
    assert written == [Path("a_x4.png"), Path("more/b_x4.png")]


@pytest.mark.slow
def test_export_is_read_wherever_a_checkpoint_is(weights, picture, tmp_path):
    model = tmp_path / "model.safetensors"
    done = script("--weights_path", weights, "--export", model)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(model))
    original, exported = load_model(weights, UNet), load_model(model, UNet)
    assert exported.process == original.process
    assert exported.network.config == original.network.config
    assert model.stat().st_size < 0.7 * weights.stat().st_size
    write_image(tmp_path / "photo.png", picture)
    outputs = []
    for path in (weights, model):
        output = tmp_path / f"{path.suffix[1:]}.png"
        assert here("--weights_path", path, tmp_path / "photo.png", "--output", output, "--steps", 3) == 0
        outputs.append(decode_image(output).pixels)
    assert psnr(*outputs) > 40


# --------------------------------------------------------------------------------------------- kinds of files


def test_grey_alpha_16_bit_palette_and_rotated_files(weights, picture, tmp_path):
    grey = picture.mean(axis=2).astype(np.uint8)
    folder = tmp_path / "in"
    folder.mkdir()
    write_image(folder / "grey.png", grey)
    alpha = np.where(np.arange(28) < 10, 0, 255) * np.ones((20, 1))
    write_image(folder / "alpha.png", picture, alpha.astype(np.uint8), metadata=Metadata(b"profile"))
    write_image(folder / "deep.tif", picture.astype(np.uint16) * 250)
    Image.fromarray(picture).convert("P").save(folder / "palette.png")
    Image.fromarray(picture).convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    Image.fromarray(picture).save(folder / "turned.jpg", exif=exif)
    output = tmp_path / "out"
    assert here("--weights_path", weights, folder, "--output", output, "--mode", "fidelity") == 0
    results = {path.stem: decode_image(path) for path in output.glob("*.png")}
    assert set(results) == {f"{name}_x4" for name in ("grey", "alpha", "deep", "palette", "cmyk", "turned")}
    assert results["grey_x4"].pixels.shape == (80, 112)
    assert results["alpha_x4"].alpha.shape == (80, 112)
    assert results["alpha_x4"].metadata.icc_profile == b"profile"
    assert results["deep_x4"].pixels.dtype == np.uint16
    assert results["palette_x4"].pixels.shape == results["cmyk_x4"].pixels.shape == (80, 112, 3)
    turned = results["turned_x4"]
    assert turned.pixels.shape == (112, 80, 3)
    kept = Image.Exif()
    kept.load(turned.metadata.exif)
    assert kept[0x010F] == "camera"
    assert kept.get(0x0112, 1) == 1


def test_the_first_frame_of_an_animation_is_restored_and_that_is_said(weights, picture, tmp_path, capsys):
    frames = [Image.fromarray(picture), Image.fromarray(255 - picture)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    write_image(tmp_path / "still.png", picture)
    outputs = []
    for name in ("moving.webp", "still.png"):
        output = tmp_path / f"out_{name}.png"
        assert here("--weights_path", weights, tmp_path / name, "--output", output, "--mode", "fidelity") == 0
        outputs.append(decode_image(output).pixels)
    assert np.array_equal(*outputs)
    assert "first of 2 frames" in capsys.readouterr().out


def test_a_decompression_bomb_is_refused(weights, picture, tmp_path, capsys, monkeypatch):
    write_image(tmp_path / "bomb.png", picture)
    monkeypatch.setattr("imaging.files.MAX_PIXELS", 500)
    assert here("--weights_path", weights, tmp_path / "bomb.png", "--output", tmp_path / "out") == 2
    assert "more than 500" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_what_a_format_cannot_hold_is_said_before_the_work(weights, picture, tmp_path, capsys, monkeypatch):
    write_image(tmp_path / "cut.png", picture, picture[..., 0].copy())
    monkeypatch.setattr(infer.Restorer, "restore", lambda *_, **__: pytest.fail("the work was begun"))
    target = tmp_path / "result.jpg"
    assert here("--weights_path", weights, tmp_path / "cut.png", "--output", target) == 2
    assert f"{target}: JPEG cannot hold alpha" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- side results


def test_an_image_does_not_depend_on_the_others_of_its_folder(weights, picture, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, pixels in (("a", picture), ("b", 255 - picture), ("c", picture[:9])):
        write_image(folder / f"{name}.png", pixels)
    assert here("--weights_path", weights, folder, "--output", tmp_path / "all", "--steps", 2) == 0
    alone = ("--output", tmp_path / "one", "--steps", 2, "--batch_size", 4)
    assert here("--weights_path", weights, folder / "b.png", *alone) == 0
    assert (tmp_path / "all/b_x4.png").read_bytes() == (tmp_path / "one/b_x4.png").read_bytes()


def test_compare_and_uncertainty_are_written(weights, picture, tmp_path):
    write_image(tmp_path / "photo.png", picture)
    (tmp_path / "truth").mkdir()
    write_image(tmp_path / "truth/photo.png", np.full((80, 112, 3), 77, np.uint8))
    flags = ("--compare", tmp_path / "truth", "--uncertainty", tmp_path / "map.png")
    flags += ("--num_images", 2, "--steps", 2, "--input", tmp_path / "photo.png")
    output = tmp_path / "out"
    assert (
        here(
            "--weights_path",
            weights,
            "--input",
            tmp_path / "photo.png",
            "--output",
            output,
            *flags,
            "--steps",
            2,
        )
        == 0
    )
    panels = decode_image(output / "photo_x4_compare.png").pixels
    height, width = panels.shape[:2]
    assert (height, width) == (80 + 24, 4 * (112 + 8) - 8)
    restored = decode_image(output / "photo_x4.png").pixels
    assert np.array_equal(panels[24:, 0:112], picture.repeat(4, 0).repeat(4, 1))
    assert np.array_equal(panels[24:, 240:352], restored)
    assert (panels[24:, 360:] == 77).all()
    assert all((panels[:24, left : left + 112] < 100).any() for left in range(0, width, 120))  # labels
    deviation = np.load(tmp_path / "map.npy")
    shown = decode_image(tmp_path / "map.png").pixels
    assert deviation.shape == shown.shape == (80, 112)
    assert deviation.max() > 0
    assert shown.max() == 255
    np.testing.assert_allclose(shown, deviation / deviation.max() * 255, atol=0.51)


def test_two_files_of_one_name_get_two_results(weights, picture, tmp_path):
    write_image(tmp_path / "a.png", picture)
    write_image(tmp_path / "a.bmp", picture)
    output = tmp_path / "out"
    assert (
        here(
            "--weights_path",
            weights,
            tmp_path / "a.png",
            tmp_path / "a.bmp",
            "--output",
            output,
            "--steps",
            1,
        )
        == 0
    )
    assert sorted(path.name for path in output.iterdir()) == ["a_bmp_x4.png", "a_png_x4.png"]


# ---------------------------------------------------------------------------------------------- what is wrong


def test_every_wrong_value_is_one_line_that_names_it(weights, picture, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    write_image(photo, picture)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.pth").write_bytes(b"nothing of ours")
    model = ("--weights_path", weights)
    for arguments, message in [
        ((photo, "--scale", "3"), "no weights for x3 come with the project"),
        (("--weights_path", tmp_path / "no.pth", photo), "no.pth"),
        (("--weights_path", tmp_path / "broken.pth", photo), "broken.pth is not a checkpoint"),
        (model, "no input"),
        ((*model, tmp_path / "missing.png"), "missing.png: no such file"),
        ((*model, tmp_path / "empty"), "no image in this folder"),
        ((*model, photo, "--steps", 1001), "--steps is 1001"),
        ((*model, photo, "--steps", 0), "--steps is 0"),
        ((*model, photo, "--tile", "wide"), "--tile"),
        ((*model, photo, "--eta", "0.5"), "--eta is 0.5"),
        ((*model, photo, "--uncertainty", tmp_path / "m.png"), "--num_images of at least 2"),
        ((*model, photo, "--compare", tmp_path / "empty"), "no original of photo.png"),
        ((*model, photo, photo, "--output", tmp_path / "one.png"), "names one image"),
        ((*model, tmp_path, "--output", tmp_path), "is the input folder"),
        ((*model, "--export", tmp_path / "model.bin"), "must end in .safetensors"),
    ]:
        before = sorted(tmp_path.rglob("*"))
        assert here(*arguments) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err, captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_named(weights, capsys):
    assert infer.main(["--weights_path", str(weights), "x.png", "--device", "cuda"]) == 2
    assert "'cuda' is not available" in capsys.readouterr().err


def test_the_input_is_never_replaced(weights, picture, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    write_image(photo, picture)
    before = photo.read_bytes()
    assert here("--weights_path", weights, photo, "--output", photo, "--overwrite") == 2
    assert "is the input itself" in capsys.readouterr().err
    assert photo.read_bytes() == before


def test_an_interrupted_run_leaves_whole_files_only(weights, picture, tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.png", picture)
    restore_file = infer.restore_file

    def interrupt(task, *arguments):
        if task.source.name == "b.png":
            raise KeyboardInterrupt
        return restore_file(task, *arguments)

    monkeypatch.setattr(infer, "restore_file", interrupt)
    inputs = (tmp_path / "a.png", tmp_path / "b.png")
    assert here("--weights_path", weights, *inputs, "--output", tmp_path / "out", "--steps", 1) == 130
    assert "stopped" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_x4.png"]


def test_an_existing_export_is_kept(weights, tmp_path, capsys):
    target = tmp_path / "model.safetensors"
    export_safetensors(load_model(weights, UNet), target)
    before = target.stat().st_mtime_ns
    assert here("--weights_path", weights, "--export", target) == 2
    assert "exists already" in capsys.readouterr().err
    assert target.stat().st_mtime_ns == before
