"""Tests of app.py: the page, in a real browser."""

import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import app
import infer
from engine.checkpoint import export_safetensors
from examples.dead_leaves import dead_leaves
from imaging.files import decode_image, write_image
from imaging.metadata import Metadata
from tests.networks import random_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    export_safetensors(random_model(scale=2.0, predictor_blocks=1), path)
    return path


@pytest.fixture(scope="module")
def chromium():
    """Debian's Chromium, or any other of that name."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    if (found := shutil.which("chromium") or shutil.which("chromium-browser")) is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def served(weights, tmp_path_factory):
    """The address of the page, and the folder of its temporary files, which has to be empty at the end."""
    temporary = tmp_path_factory.mktemp("temporary")
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "app.py", str(weights)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stdout if "://" in line)
        yield re.search(r"http://[\w.]+:\d+", line)[0], temporary
        process.terminate()
        assert process.wait(60) == 0
    assert not list(temporary.iterdir())


@pytest.fixture
def page(chromium, served):
    """The page in a new tab, which may ask no other site for anything."""
    address, _ = served
    assert address.startswith("http://127.0.0.1:")
    tab, asked = chromium.new_page(), []
    tab.set_default_timeout(120_000)  # milliseconds
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    yield tab
    tab.close()
    assert len(asked) > 10
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def restored_by_infer(picture, weights, folder, *flags):
    """The file, or the sentence that is printed instead."""
    assert infer.main([str(picture), "--weights_path", str(weights), "--output", str(folder), *flags]) == 0
    return next(folder.iterdir()).read_bytes()


def drop(page, path):
    page.set_input_files("#picture input[type=file]", path)
    page.wait_for_selector("#picture .file-preview")


@pytest.fixture
def deep_picture(tmp_path):
    """16 bits, with transparency and an author."""
    pixels = dead_leaves((24, 32), np.random.default_rng(0), max_radius=12).astype(np.uint16) * 257
    alpha = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)
    write_image(tmp_path / "deep.png", pixels, alpha, metadata=Metadata(dpi=(300.0, 300.0)))
    return tmp_path / "deep.png"


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fidelity", "detail"])
def test_the_page_gives_the_file_that_infer_writes(page, weights, deep_picture, tmp_path, mode):
    drop(page, deep_picture)
    page.get_by_label(mode).check()
    page.click("#start")
    with page.expect_download() as download:
        page.click("#result a[download]")
    assert download.value.suggested_filename == "deep_x2.png"
    download.value.save_as(tmp_path / "downloaded.png")
    expected = restored_by_infer(deep_picture, weights, tmp_path / "infer", "--mode", mode)
    assert (tmp_path / "downloaded.png").read_bytes() == expected
    assert decode_image(tmp_path / "downloaded.png").alpha.dtype == np.uint16
    assert page.locator("#slider img").count() == 2


def damaged(path, whole):
    path.write_bytes(whole[: len(whole) // 2])


def huge(path, whole):
    """Its header says 60000 x 60000 pixels."""
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + whole[24:29]
    path.write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("spoil", [damaged, huge])
def test_a_file_that_cannot_be_restored_gets_the_sentence_of_infer(
    page, weights, deep_picture, tmp_path, capsys, spoil
):
    bad = tmp_path / "bad.png"
    spoil(bad, deep_picture.read_bytes())
    assert infer.main([str(bad), "--weights_path", str(weights), "--output", str(tmp_path / "infer")]) == 2
    sentence = re.search(r"error: (.*)", capsys.readouterr().err)[1].replace(f"{tmp_path}{os.sep}", "")
    assert "bad.png" in sentence
    drop(page, bad)
    page.click("#start")
    assert sentence in page.get_by_test_id("toast-body").inner_text()


@pytest.mark.slow
def test_one_picture_at_a_time_is_restored(weights):
    pytest.importorskip("gradio")
    blocks = app.build_page([weights])
    assert [function.concurrency_limit for function in blocks.fns.values()] == [1]
    assert not blocks.analytics_enabled


def test_a_model_that_is_missing_is_named(capsys):
    with pytest.raises(SystemExit):
        app.main(["missing.pth"])
    assert "missing.pth" in capsys.readouterr().err
