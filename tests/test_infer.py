"""The script as a user runs it: files in, files out, and what it says when something is wrong."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms

import infer
from bicubic import upscale_image
from degradation import Degradation
from engine.checkpoint import save_checkpoint
from examples.dead_leaves import dead_leaves
from imaging.files import DecodedImage, decode_image, write_image
from imaging.metadata import Metadata
from imaging.panels import comparison_picture
from models import export_safetensors
from restoration import restore
from restoration import weights as own_weights
from restoration.files import on_background
from tests.networks import PROCESS, random_model

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
def test_one_photo_as_the_readme_says(weights, picture, tmp_path):
    write_image(tmp_path / "photo.png", picture)
    flags = ("--weights_path", weights, "--input", "photo.png", "--output", "out/", "--precision", "fp32")
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
    expected = restore(picture, weights, device="cpu", precision="fp32").pixels
    assert np.array_equal(decode_image(tmp_path / "out/photo_x4.png").pixels, expected)


def test_a_folder_with_a_bad_file_in_it(weights, picture, tmp_path, capsys):
    folder, output = tmp_path / "photos", tmp_path / "out"
    write_image(folder / "a.png", picture)
    write_image(folder / "more" / "b.jpg", picture)
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:200])
    assert here("--weights_path", weights, folder, "--output", output) == 1
    _, first, last = capsys.readouterr().err.splitlines()
    assert "bad.png: PNG that is damaged" in first
    assert last == "infer.py: 1 of 3 images not restored"
    assert set(output.rglob("*.*")) == {output / "a_x4.png", output / "more/b_x4.png"}


# --------------------------------------------------------------------------------------------- kinds of files


def test_of_an_animation_the_first_frame_is_restored(weights, picture, tmp_path, capsys):
    frames = [Image.fromarray(one) for one in (picture, 255 - picture)]
    source, output = tmp_path / "i.webp", tmp_path / "o.png"
    frames[0].save(source, save_all=True, append_images=frames[1:], lossless=True)
    assert here("--weights_path", weights, source, "--output", output) == 0
    assert capsys.readouterr().out == f"{output} (first of 2 frames)\n"
    expected = restore(picture, weights, device="cpu", precision="fp32").pixels
    assert np.array_equal(decode_image(output).pixels, expected)


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


def test_compare_and_uncertainty_are_written(weights, picture, tmp_path):
    write_image(tmp_path / "0801x4.png", picture)
    original = tmp_path / "truth/0801.png"
    write_image(original, np.full((80, 112, 3), 77, np.uint8))
    flags = ("--compare", tmp_path / "truth", "--uncertainty", tmp_path / "map.png")
    flags += ("--num_images", 2, "--steps", 2, "--input", tmp_path / "0801x4.png")
    output = tmp_path / "out"
    assert here("--weights_path", weights, "--output", output, *flags) == 0
    panels = decode_image(output / "0801x4_x4_compare.png").pixels
    restored, truth = (decode_image(path).pixels for path in (output / "0801x4_x4.png", original))
    assert np.array_equal(panels, comparison_picture(picture, upscale_image(picture, 4), restored, truth))
    deviation = np.load(tmp_path / "map.npy")
    shown = decode_image(tmp_path / "map.png").pixels
    assert deviation.shape == shown.shape == (80, 112)
    assert deviation.max() > 0
    assert shown.max() == 255
    np.testing.assert_allclose(shown, deviation / deviation.max() * 255, atol=0.51)


# -------------------------------------------------------------------------------------- the project's weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("", 0, "/photo_x4.safetensors"),
        ("--weights clean", 0, "/x4.safetensors"),
        ("--weights clean --consistency", 0, "/x4.safetensors"),
        ("--consistency", 2, "clean"),
    ],
)
def test_the_project_s_weights_are_chosen_and_named(
    picture, tmp_path, monkeypatch, capsys, arguments, status, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_weights, "RELEASED", tmp_path / "weights")
    Path("weights").mkdir()
    write_image("photo.png", picture)
    export_safetensors(random_model(), Path("weights/x4.safetensors"))
    assert here("photo.png", "--output", "early.png") == 0  # before there are weights for photos
    assert "/x4.safetensors" in capsys.readouterr().err
    assert here("photo.png", "--output", "early.png", "--overwrite", "--weights", "photo") == 2
    assert "no photo weights" in capsys.readouterr().err
    photo = random_model(gain=2.0)._replace(degradation=Degradation("photo"))
    export_safetensors(photo, Path("weights/photo_x4.safetensors"))
    assert here("photo.png", *arguments.split()) == status
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- what is wrong


WRONG = {
    "photo.png --weights_path no.pth": "no.pth",
    "": "no input",
    "=": "empty",
    "missing.png": "missing.png",
    "empty": "empty",
    "photo.png --steps 0": "--steps is 0",
    "photo.png --eta nan": "--eta is nan",
    "photo.png --device cpu:x": "cpu:x",
    "photo.png --uncertainty m.png --steps 2": "--num_images is 1",
    "photo.png --uncertainty m.png --num_images 2 --scale 8": "x4 and x4",
    "photo.png --guidance 2": "--guidance is 2",
    "photo.png --compare empty": "empty",
    "photo.png other.png --compare other.png": "2 inputs",
    "photo.png other.png --output one.png": "one.png",
    "photo.png --output a.gif": ".gif",
    "photo.png --output a.png --format jpg": "--format jpg",
    "photo.png --output photo.png/below": "because of",
    "photo.png --output photo.png --overwrite": "photo.png: is an input",
    "photo.png --background #ff88": "#ff88",
    "photo.png --overwrite --skip_existing": "--skip_existing",
    ". --output .": "is the input folder",
    "one/a.png two/a.png --output out --overwrite": "one/a.png and two/a.png",
    "photo.png one/a.png other.png --output done": "done/a_x4.png: exists already, and 1 more",
    "--export model.bin": "model.bin",
    "--export model.safetensors": "exists",
    "--weights clean --export new.safetensors --scale 8": "several models",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_every_wrong_value_is_one_line_that_names_it(
    arguments, weights, picture, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in "photo other one/a two/a done/a_x4 done/other_x4".split():
        write_image(f"{name}.png", picture)
    Path("empty").mkdir()
    Path("model.safetensors").write_bytes(b"an earlier one")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    words = [""] if arguments == "=" else [word for word in arguments.split(" ") if word]
    assert here("--weights_path", weights, *words) == 2
    captured = capsys.readouterr()
    assert WRONG[arguments] in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ---------------------------------------------------------------------------------------- where results go


@pytest.mark.parametrize(
    ("arguments", "made"),
    [
        ("photos --output .", "a_x4.png"),  # a parent of the input
        (". --output out", "out/a_png_x4.png out/a_webp_x4.png out/photos/a_x4.png"),
        ("a.png a.webp --output out", "out/a_png_x4.png out/a_webp_x4.png"),
        ("a.png photos/../a.png ./a.png --output out", "out/a_x4.png"),  # named twice
        ("photos --output v1.5/ --format jpg", "v1.5/a_x4.jpg"),
        (
            "a.png --num_images 2 --steps 1 --uncertainty m/a_1.5 --output b.png",
            "b.png m/a_1.5.npy m/a_1.5.png",
        ),
        ("a.png --compare --output b.tif", "b.tif b_compare.png"),
        ("a.png --scale 2.5 --output out", "out/a_x2.5.png"),
    ],
)
def test_results_go_where_they_were_asked_to(weights, picture, tmp_path, monkeypatch, arguments, made):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a.webp", "photos/a.png"):
        write_image(name, picture)
    inputs = set(tmp_path.rglob("*.*"))
    for flags in ([], ["--overwrite"]):  # results below the input are no inputs
        assert here("--weights_path", weights, *arguments.split(), *flags) == 0
        results = {path for path in set(tmp_path.rglob("*.*")) - inputs if path.is_file()}
        assert results == {tmp_path / name for name in made.split()}
    assert Image.open(tmp_path / made.split()[0]).size == ((70, 50) if "2.5" in made else (112, 80))


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


def test_metadata_can_be_stripped_and_what_is_transparent_put_on_a_colour(weights, picture, tmp_path):
    alpha = np.zeros((20, 28), np.uint8)
    alpha[5:15, 8:20] = 255
    write_image(tmp_path / "a.png", picture, alpha, metadata=Metadata(PROFILE, text={"Comment": "mine"}))
    flags = ("--strip", "--background", "#ff8000", "--output", tmp_path / "flat.png")
    assert here("--weights_path", weights, tmp_path / "a.png", *flags) == 0
    flat = decode_image(tmp_path / "flat.png")
    assert flat.metadata == Metadata()
    assert flat.alpha is None
    assert np.abs(flat.pixels[:8, :8].mean((0, 1)) - (255, 128, 0)).max() < 60  # of random weights


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


def test_a_stopped_run_leaves_whole_files_and_can_go_on(weights, three, tmp_path, capsys, monkeypatch):
    flags, output = ("--weights_path", weights, *three, "--output", tmp_path / "out"), tmp_path / "out"
    monkeypatch.setattr(infer, "restore_file", failing("b.png", KeyboardInterrupt()))
    assert here(*flags) == 128 + signal.SIGINT
    assert "--skip_existing" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["a_x4.png"]
    first = (output / "a_x4.png").stat().st_mtime_ns
    monkeypatch.undo()
    for _ in range(2):
        assert here(*flags, "--skip_existing") == 0
        assert sorted(path.name for path in output.iterdir()) == ["a_x4.png", "b_x4.png", "c_x4.png"]
    assert (output / "a_x4.png").stat().st_mtime_ns == first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 9.00 GiB"), "b.png: out of memory"),
        (PermissionError(errno.EACCES, "Permission denied"), "b_x4.png: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "b_x4.png: No space left on device"),
    ],
    ids=str,
)
def test_only_a_full_disk_ends_a_batch(error, said, weights, three, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(infer, "restore_file", failing("b.png", error))
    assert here("--weights_path", weights, *three, "--output", tmp_path / "out") == 1
    _, first, *others = capsys.readouterr().err.splitlines()
    full = "No space" in said
    assert said in first
    assert ("--skip_existing" in others[0]) == full
    assert f"{1 + full} of 3" in others[-1]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == (["a_x4.png"] if full else ["a_x4.png", "c_x4.png"])


def test_an_error_of_the_program_is_not_taken_for_one_of_a_file(weights, three, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "restore_file", failing("b.png", RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes"):
        here("--weights_path", weights, *three, "--output", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_a_stdout_that_takes_no_more_does_not_stop_the_work(number, weights, three, tmp_path, monkeypatch):
    def refuse(text):
        raise OSError(number, os.strerror(number))

    kept = os.dup(1)
    try:
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=refuse))
        assert here("--weights_path", weights, *three, "--output", tmp_path / "out") == 0
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_large_image_needs_room_for_temporary_files(weights, three, tmp_path, capsys, monkeypatch):
    write_image(tmp_path / "b.png", np.zeros((600, 500, 3), np.uint8))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: io.FileIO("/dev/full", "w"))
    monkeypatch.setattr("restoration.fields.IN_MEMORY_BYTES", 10**6)
    assert here("--weights_path", weights, *three, "--output", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert re.search(r"b\.png: .* no room for 58 MB .*TMPDIR", message)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_x4.png", "c_x4.png"]


def test_a_log_gets_a_line_now_and_then(weights, three, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engine.progress.SECONDS_BETWEEN_LINES", 0)
    assert here("--weights_path", weights, three[0], "--output", tmp_path / "out", "--steps", 3) == 0
    message = capsys.readouterr().err
    assert "[1/1] a.png: 50 of 100" in message
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
