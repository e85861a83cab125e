"""The script as a user runs it: files in, files out, and what it says when something is wrong."""

import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import infer
from degradation import Degradation
from engine.checkpoint import save_checkpoint
from examples.dead_leaves import dead_leaves
from imaging.files import DecodedImage, decode_image, write_image
from imaging.metadata import Metadata
from models import export_safetensors, load_model
from restoration import weights as own_weights
from restoration.files import on_background
from tests.networks import PROCESS, random_model
from tests.test_restoration import psnr
from unet import UNet

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pth"
    loaded = random_model()
    content = {"network": loaded.network.config.to_dict(), "process": PROCESS.to_dict(), "step": 7}
    save_checkpoint(path, {**content, "ema": loaded.network.state_dict()})
    return path


@pytest.fixture(scope="module")
def picture():
    return dead_leaves((20, 28), np.random.default_rng(5))


def here(*arguments):
    """Run infer.py in this process, on the CPU."""
    return infer.main(["--device", "cpu", "--precision", "fp32", *map(str, arguments)])


# ------------------------------------------------------------------------------------------ as a user runs it


@pytest.mark.slow
def test_one_photo_as_the_readme_says(weights, picture, tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "photo.png", picture)
    flags = ("--weights_path", weights, "--input", "photo.png", "--output", "out/")
    flags += ("--steps", 3, "--seed", 0, "--precision", "fp32")
    done = subprocess.run(
        [sys.executable, ROOT / "infer.py", *map(str, flags)],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"out/photo_x4.png\n"
    assert done.stderr == f"infer.py: {weights}, on cpu in float32\n".encode()  # a log has no bar
    first = (tmp_path / "out/photo_x4.png").read_bytes()
    assert decode_image(tmp_path / "out/photo_x4.png").pixels.shape == (80, 112, 3)
    monkeypatch.chdir(tmp_path)
    assert here(*flags, "--overwrite") == 0
    assert (tmp_path / "out/photo_x4.png").read_bytes() == first
    assert here(*flags) == 2
    assert "out/photo_x4.png: exists already; use --overwrite, --skip_existing" in capsys.readouterr().err
    assert (tmp_path / "out/photo_x4.png").read_bytes() == first


def test_a_folder_with_a_bad_file_in_it(weights, picture, tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    write_image(folder / "a.png", picture)
    write_image(folder / "more" / "b.jpg", picture)
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:200])
    assert here("--weights_path", weights, folder, "--output", tmp_path / "out", "--mode", "fidelity") == 1
    _, first, last = capsys.readouterr().err.splitlines()
    assert "bad.png: PNG that is damaged" in first
    assert last == "infer.py: 1 of 3 images not restored"
    written = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").glob("**/*.*"))
    assert written == [Path("a_x4.png"), Path("more/b_x4.png")]


@pytest.mark.slow
def test_export_is_read_wherever_a_checkpoint_is(weights, picture, tmp_path, capsys):
    model = tmp_path / "model.safetensors"
    assert here("--weights_path", weights, "--export", model) == 0
    assert capsys.readouterr().out.startswith(str(model))
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
    write_image(folder / "alpha.png", picture, alpha.astype(np.uint8), metadata=Metadata(PROFILE))
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
    assert results["alpha_x4"].metadata.icc_profile == PROFILE
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


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("cut.png", "--output", "result.jpg"), "result.jpg: JPEG cannot hold alpha"),
        (("bomb.png",), "more than 700"),
        (("cut.png", "--compare", "bomb.png"), "30x40.*112x80"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(weights, picture, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    write_image("cut.png", picture, picture[..., 0].copy())
    write_image("bomb.png", np.zeros((40, 30), np.uint8))
    monkeypatch.setattr("imaging.files.MAX_PIXELS", 2000 if "--compare" in flags else 700)
    monkeypatch.setattr("restoration.Restorer.restore", lambda *_, **__: pytest.fail("the work was begun"))
    assert here("--weights_path", weights, *flags) == 2
    assert re.search(said, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.glob("**/*.*")) == ["bomb.png", "cut.png"]


# ---------------------------------------------------------------------------------------------- side results


@pytest.mark.slow
def test_an_image_does_not_depend_on_the_others_of_its_folder(weights, picture, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, pixels in (("a", picture), ("b", 255 - picture), ("c", picture[:9])):
        write_image(folder / f"{name}.png", pixels)
    assert here("--weights_path", weights, folder, "--output", tmp_path / "all", "--steps", 2) == 0
    alone = ("--output", tmp_path / "one", "--steps", 2)
    assert here("--weights_path", weights, folder / "b.png", *alone) == 0
    assert (tmp_path / "all/b_x4.png").read_bytes() == (tmp_path / "one/b_x4.png").read_bytes()


def test_compare_and_uncertainty_are_written(weights, picture, tmp_path):
    write_image(tmp_path / "photo.png", picture)
    (tmp_path / "truth").mkdir()
    write_image(tmp_path / "truth/photo.png", np.full((80, 112, 3), 77, np.uint8))
    flags = ("--compare", tmp_path / "truth", "--uncertainty", tmp_path / "map.png")
    flags += ("--num_images", 2, "--steps", 2, "--input", tmp_path / "photo.png")
    output = tmp_path / "out"
    assert here("--weights_path", weights, "--output", output, *flags) == 0
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
    Image.fromarray(picture).save(tmp_path / "a.bmp")
    output = tmp_path / "out"
    inputs = (tmp_path / "a.png", tmp_path / "a.bmp")
    assert here("--weights_path", weights, *inputs, "--output", output, "--steps", 1) == 0
    assert sorted(path.name for path in output.iterdir()) == ["a_bmp_x4.png", "a_png_x4.png"]


# -------------------------------------------------------------------------------------- the project's weights


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A folder with clean weights of x4 and, once it is called, those for photos."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(own_weights, "RELEASED", folder)
    export_safetensors(random_model(), folder / "x4.safetensors")

    def add_photo():
        loaded = random_model(gain=2.0)._replace(degradation=Degradation("photo"))
        export_safetensors(loaded, folder / "photo_x4.safetensors")

    return add_photo


@pytest.mark.slow
def test_the_weights_are_those_for_photos_where_there_are_some(released, picture, tmp_path, capsys):
    write_image(tmp_path / "photo.png", picture)
    flags = (tmp_path / "photo.png", "--steps", 1, "--overwrite", "--output", tmp_path / "out")
    assert here(*flags) == 0
    assert "/x4.safetensors" in capsys.readouterr().err
    released()
    for name, file in (
        ((), "/photo_x4"),
        (("--weights", "photo"), "/photo_x4"),
        (("--weights", "clean"), "/x4"),
    ):
        assert here(*flags, *name) == 0
        assert f"{file}.safetensors" in capsys.readouterr().err


def test_consistency_needs_the_clean_weights_and_says_so(released, picture, tmp_path, capsys):
    released()
    write_image(tmp_path / "photo.png", picture)
    flags = (tmp_path / "photo.png", "--steps", 1, "--output", tmp_path / "out", "--consistency")
    assert here(*flags) == 2
    assert "clean" in capsys.readouterr().err
    assert here(*flags, "--weights", "clean") == 0


@pytest.mark.slow
def test_strength_blends_clean_and_photo(released, tmp_path, capsys):
    released()
    target = tmp_path / "blend.safetensors"
    assert here("--strength", 0.25, "--export", target) == 0
    assert "0.25" in capsys.readouterr().out
    clean, photo, blended = (
        load_model(path, UNet).network.state_dict()
        for path in (tmp_path / "weights/x4.safetensors", tmp_path / "weights/photo_x4.safetensors", target)
    )
    for name, value in blended.items():
        expected = 0.75 * clean[name] + 0.25 * photo[name]
        torch.testing.assert_close(value, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strength", "1.5"], "1.5"),
        (["--strength", "0.5", "--weights", "clean"], "--strength"),
        (["--strength", "0.5", "--weights", "weights/./x4.safetensors"], "--strength"),
        (["--weights", "photo", "--scale", "17"], "17"),
    ],
)
def test_weights_that_are_not_there_or_do_not_blend_are_named(
    released, flags, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert here("--weights", "photo", "--export", tmp_path / "out.safetensors") == 2
    assert "no photo weights for x4" in capsys.readouterr().err
    released()
    assert here(*flags, "--export", tmp_path / "out.safetensors") == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- what is wrong


WRONG = {
    "photo.png --scale 17": "17",
    "photo.png --scale 0": "scale is 0",
    "photo.png --weights_path no.pth": "no.pth",
    "photo.png --weights_path broken.pth": "broken.pth",
    "photo.png --weights_path=": "--weights_path",
    "": "no input",
    "=": "empty",
    "missing.png": "missing.png",
    "*.jpg": "*.jpg",
    "empty": "empty",
    "photo.png --steps 1001": "--steps is 1001",
    "photo.png --steps 0": "--steps is 0",
    "photo.png --mode balanced --scheduler ddim": "--scheduler is 'ddim'",
    "photo.png --tile -1": "--tile is -1",
    "photo.png --eta 0.5": "--eta is 0.5",
    "photo.png --eta nan": "--eta is nan",
    "photo.png --num_images 0": "--num_images is 0",
    "photo.png --seed -1": "--seed is -1",
    "photo.png --device cpu:x": "cpu:x",
    "photo.png --uncertainty m.png --steps 2": "--num_images is 1",
    "photo.png --uncertainty m.png --num_images 2 --scale 8": "x4 and x4",
    "photo.png --guidance 2": "--guidance is 2",
    "photo.png --compare empty": "empty",
    "photo.png --compare=": "--compare",
    "photo.png other.png --compare other.png": "2 inputs",
    "photo.png other.png --output one.png": "one.png",
    "photo.png --output=": "--output",
    "photo.png --output a.gif": ".gif",
    "photo.png --output a.pgn": ".pgn",
    "photo.png --output broken.pth": "broken.pth",
    "photo.png --output a.png --format jpg": "--format jpg",
    "photo.png --output photo.png/below": "because of",
    "photo.png --output photo.png --overwrite": "photo.png: is an input",
    "photo.png --background whitish": "whitish",
    "photo.png --background #ff88": "#ff88",
    "photo.png --overwrite --skip_existing": "--skip_existing",
    ". --output .": "is the input folder",
    "--export model.bin": "model.bin",
    "--export model.safetensors --scale 8": "exists",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_every_wrong_value_is_one_line_that_names_it(
    arguments, weights, picture, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "other.png"):
        write_image(name, picture)
    Path("empty").mkdir()
    Path("broken.pth").write_bytes(b"nothing of ours")
    Path("model.safetensors").write_bytes(b"an earlier one")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    words = [""] if arguments == "=" else [word for word in arguments.split(" ") if word]
    assert here("--weights_path", weights, *words) == 2
    captured = capsys.readouterr()
    assert WRONG[arguments] in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_leaves_whole_files_and_can_go_on(
    number, weights, picture, tmp_path, capsys, monkeypatch
):
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.png", picture)
    restore_file = infer.restore_file

    def interrupt(task, *arguments, **how):
        if task.source.name == "b.png":
            os.kill(os.getpid(), number)
            time.sleep(5)
        return restore_file(task, *arguments, **how)

    before = signal.getsignal(number)
    monkeypatch.setattr(infer, "restore_file", interrupt)
    flags = ("--weights_path", weights, tmp_path / "a.png", tmp_path / "b.png", "--output", tmp_path / "out")
    assert here(*flags) == 128 + number
    captured = capsys.readouterr().err
    assert signal.Signals(number).name in captured
    assert captured.count("\n") == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_x4.png"]
    assert signal.getsignal(number) == before
    first = (tmp_path / "out/a_x4.png").stat().st_mtime_ns
    monkeypatch.undo()
    assert here(*flags, "--skip_existing") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_x4.png", "b_x4.png"]
    assert (tmp_path / "out/a_x4.png").stat().st_mtime_ns == first
    assert here(*flags, "--skip_existing") == 0


# ---------------------------------------------------------------------------------------- where results go


def test_the_output_may_be_a_parent_of_the_input(weights, picture, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    write_image(tmp_path / "photos/a.png", picture)
    monkeypatch.chdir(tmp_path)
    assert here("--weights_path", weights, "photos", "--output", ".") == 0
    assert decode_image(tmp_path / "a_x4.png").pixels.shape == (80, 112, 3)


def test_results_below_the_input_are_no_inputs(weights, picture, tmp_path):
    write_image(tmp_path / "a.png", picture)
    flags = ("--weights_path", weights, tmp_path, "--output", tmp_path / "out")
    assert here(*flags) == 0
    assert here(*flags, "--overwrite") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_x4.png"]


@pytest.mark.parametrize("flag", [(), ("--overwrite",)])
def test_two_results_of_one_name_are_refused_before_the_work(flag, weights, picture, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "a.png", picture)
    inputs = (tmp_path / "one/a.png", tmp_path / "two/a.png")
    assert here("--weights_path", weights, *inputs, "--output", tmp_path / "out", *flag) == 2
    message = capsys.readouterr().err
    assert all(str(path) in message for path in inputs)
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_named_twice_is_restored_once(weights, picture, tmp_path, capsys):
    write_image(tmp_path / "a.png", picture)
    named = (tmp_path / "a.png", tmp_path, tmp_path / "." / "a.png")
    assert here("--weights_path", weights, *named, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_no_input_is_replaced_by_the_result_of_another(weights, picture, tmp_path, capsys):
    write_image(tmp_path / "a.png", picture)
    write_image(tmp_path / "a_x4.png", picture)
    before = (tmp_path / "a_x4.png").read_bytes()
    flags = ("--weights_path", weights, tmp_path / "a.png", tmp_path / "a_x4.png")
    assert here(*flags, "--output", tmp_path, "--overwrite") == 2
    assert "a_x4.png: is an input" in capsys.readouterr().err
    assert (tmp_path / "a_x4.png").read_bytes() == before


def test_what_exists_is_said_once_and_before_the_work(weights, picture, tmp_path, capsys):
    for name in "abc":
        write_image(tmp_path / f"{name}.png", picture)
    out = tmp_path / "out"
    out.mkdir()
    for name in "bc":
        write_image(out / f"{name}_x4.png", picture)
    inputs = [tmp_path / f"{name}.png" for name in "abc"]
    assert here("--weights_path", weights, *inputs, "--output", out) == 2
    message = capsys.readouterr().err
    assert "b_x4.png" in message
    assert "1 more" in message
    assert not (out / "a_x4.png").exists()


def test_a_folder_is_written_in_the_format_that_was_asked_for(weights, picture, tmp_path):
    write_image(tmp_path / "a.png", picture)
    output = f"{tmp_path}/v1.5/"
    assert here("--weights_path", weights, tmp_path, "--output", output, "--format", "webp") == 0
    with Image.open(tmp_path / "v1.5/a_x4.webp") as image:
        assert (image.format, image.size) == ("WEBP", (112, 80))


def test_an_uncertainty_map_keeps_the_dots_of_its_name(weights, picture, tmp_path):
    write_image(tmp_path / "a.png", picture)
    flags = ("--num_images", 2, "--steps", 1, "--uncertainty", tmp_path / "maps/photo_1.5")
    assert here("--weights_path", weights, tmp_path / "a.png", "--output", tmp_path / "out", *flags) == 0
    written = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert written == ["photo_1.5.npy", "photo_1.5.png"]


def test_an_original_has_a_name_that_belongs_to_the_input(weights, picture, tmp_path):
    for name in ("low", "high"):
        (tmp_path / name).mkdir()
    write_image(tmp_path / "low/0801x4.png", picture)
    write_image(tmp_path / "high/0801.png", np.full((80, 112, 3), 77, np.uint8))
    flags = ("--compare", tmp_path / "high", "--output", tmp_path / "out")
    assert here("--weights_path", weights, tmp_path / "low", *flags) == 0
    panels = decode_image(tmp_path / "out/0801x4_x4_compare.png").pixels
    assert (panels[24:, 360:] == 77).all()


# -------------------------------------------------------------------------------------------- transparency


def test_transparency_can_be_put_on_a_colour(weights, picture, tmp_path, capsys):
    alpha = np.zeros((20, 28), np.uint8)
    alpha[5:15, 8:20] = 255
    write_image(tmp_path / "cut.png", np.zeros_like(picture), alpha)
    flags = ("--weights_path", weights, tmp_path / "cut.png", "--output", tmp_path / "flat.jpg")
    assert here(*flags) == 2
    assert "cannot hold alpha" in capsys.readouterr().err
    assert here(*flags, "--background", "#ff8000") == 0
    with Image.open(tmp_path / "flat.jpg") as image:
        assert image.mode == "RGB"
        corner = np.asarray(image)[:8, :8].mean((0, 1))
    assert np.abs(corner - (255, 128, 0)).max() < 60  # the network has random weights


@pytest.mark.parametrize(
    ("pixels", "colour", "expected"),
    [
        (np.uint8([[100]]), (255, 255, 255), np.uint8([[193]])),  # grey stays grey
        (np.uint8([[100]]), (255, 0, 0), np.uint8([[[193, 40, 40]]])),
        (np.uint16([[[0, 257, 65535]]]), (0, 255, 0), np.uint16([[[0, 39424, 26214]]])),
    ],
)
def test_a_background_is_seen_by_what_alpha_leaves(pixels, colour, expected):
    alpha = np.full((1, 1), 102 if pixels.dtype == np.uint8 else 102 * 257, pixels.dtype)  # 0.4
    flat = on_background(DecodedImage(pixels, alpha), colour)
    assert flat.alpha is None
    assert flat.pixels.dtype == pixels.dtype
    assert np.array_equal(flat.pixels, expected)


def test_metadata_can_be_stripped(weights, picture, tmp_path):
    write_image(tmp_path / "a.png", picture, metadata=Metadata(PROFILE, text={"Comment": "mine"}))
    flags = ("--weights_path", weights, tmp_path / "a.png", "--output")
    assert here(*flags, tmp_path / "kept.png") == 0
    assert here(*flags, tmp_path / "bare.png", "--strip") == 0
    assert decode_image(tmp_path / "kept.png").metadata.icc_profile == PROFILE
    assert decode_image(tmp_path / "bare.png").metadata == Metadata()


# ------------------------------------------------------------------------- what a batch does not stop for


def failing(name, error):
    """restore_file, but for the file of this name."""
    restore_file = infer.restore_file

    def attempt(task, *arguments, **how):
        if task.source.name == name:
            raise error
        return restore_file(task, *arguments, **how)

    return attempt


@pytest.fixture
def three(picture, tmp_path):
    for name in "abc":
        write_image(tmp_path / f"{name}.png", picture)
    return [tmp_path / f"{name}.png" for name in "abc"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9.00 GiB"),
        torch.OutOfMemoryError("out of memory even with windows of 128 pixels"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError("2000 x 3000 pixels need 72 MB in /tmp"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_one_image_that_fails_does_not_cost_the_others(error, weights, three, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(infer, "restore_file", failing("b.png", error))
    assert here("--weights_path", weights, *three, "--output", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 3
    assert "b.png" in message or "b_x4.png" in message
    assert "1 of 3" in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_x4.png", "c_x4.png"]


def test_an_error_of_the_program_is_not_taken_for_one_of_a_file(weights, three, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "restore_file", failing("b.png", RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes"):
        here("--weights_path", weights, *three, "--output", tmp_path / "out")


def test_a_full_disk_ends_the_batch_and_names_the_file(weights, three, tmp_path, capsys, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(infer, "restore_file", failing("b.png", full))
    assert here("--weights_path", weights, *three, "--output", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert f"{tmp_path / 'out/b_x4.png'}: No space left on device" in message
    assert "--skip_existing" in message
    assert "2 of 3" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_x4.png"]


class Closed(io.StringIO):
    """A stdout whose reader is gone, or whose disk is full."""

    number = errno.EPIPE

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_a_stdout_that_takes_no_more_does_not_stop_the_work(number, weights, three, tmp_path, monkeypatch):
    stream = Closed()
    stream.number = number
    kept = os.dup(1)
    try:
        monkeypatch.setattr(sys, "stdout", stream)
        assert here("--weights_path", weights, *three, "--output", tmp_path / "out") == 0
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_large_image_needs_room_for_temporary_files(weights, three, tmp_path, capsys, monkeypatch):
    """The room is asked for before the work, and what it is short of is said."""
    write_image(tmp_path / "b.png", np.zeros((600, 500, 3), np.uint8))
    free = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    monkeypatch.setattr("restoration.fields.IN_MEMORY_BYTES", 10**6)
    assert here("--weights_path", weights, *three, "--output", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "b.png: 2000 x 2400 pixels need" in message
    assert "TMPDIR" in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_x4.png", "c_x4.png"]


def test_a_log_gets_a_line_now_and_then(weights, three, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engine.progress.SECONDS_BETWEEN_LINES", 0)
    assert here("--weights_path", weights, three[0], "--output", tmp_path / "out", "--steps", 3) == 0
    message = capsys.readouterr().err
    assert "[1/1] a.png: 33 of 100" in message
    assert "\r" not in message


def test_ctrl_c_while_the_imports_take_their_time_is_no_traceback(tmp_path):
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL/__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, ROOT / "infer.py", "x.png"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
