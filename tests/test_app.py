"""Tests of app.py: the page, in a real browser. `python -m tests.test_app` makes docs/app.jpg."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import app
import infer
from bicubic import downscale_image
from examples.dead_leaves import dead_leaves
from imaging.files import decode_image, write_image
from imaging.metadata import Metadata
from models import export_safetensors
from tests.networks import random_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    export_safetensors(random_model(scale=2.0, predictor_blocks=1), path)
    return path


@contextlib.contextmanager
def launched():
    """Debian's Chromium, or any other of that name."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@contextlib.contextmanager
def serving(temporary, *weights):
    """The address of the page, whose temporary files are in this folder."""
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    # Neither a proxy that answers nothing nor a backend that is not there may matter.
    environment |= {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "MPLBACKEND": "module://missing"}
    command = [sys.executable, "app.py", *map(str, weights)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stdout if "://" in line)
        yield re.search(r"http://[\w.]+:\d+", line)[0]
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("gradio")
    pytest.importorskip("playwright.sync_api")
    if not (shutil.which("chromium") or shutil.which("chromium-browser")):
        pytest.skip("there is no chromium: apt-get install chromium")
    with launched() as started:
        yield started


@pytest.fixture(scope="module")
def served(weights, tmp_path_factory):
    """The address of the page, and the folder of its temporary files, which has to be empty at the end."""
    temporary = tmp_path_factory.mktemp("temporary")
    with serving(temporary, weights) as address:
        yield address, temporary
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
    flags = ["--weights_path", str(weights), "--output", str(tmp_path / "infer.png"), "--mode", mode]
    assert infer.main([str(deep_picture), *flags]) == 0
    assert (tmp_path / "downloaded.png").read_bytes() == (tmp_path / "infer.png").read_bytes()
    assert decode_image(tmp_path / "downloaded.png").alpha.dtype == np.uint16
    assert page.locator("#slider img").count() == 2


@pytest.mark.browser
@pytest.mark.slow
def test_a_file_that_cannot_be_restored_gets_the_sentence_of_infer(
    page, weights, deep_picture, tmp_path, capsys
):
    bad = tmp_path / "bad.png"
    bad.write_bytes(deep_picture.read_bytes()[:400])
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


def test_what_cannot_be_served_is_one_line(capsys):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, said in (
            (["missing.pth"], "missing.pth"),
            (["--port", port], port),
            (["--port", "x"], "'x'"),
        ):
            assert app.main(flags) == 2
            captured = capsys.readouterr().err
            assert said in captured
            assert captured.count("\n") == 1


def test_a_model_that_was_replaced_under_its_name_is_loaded_again(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    path, picture, seen = tmp_path / "mine.safetensors", tmp_path / "a.png", []
    write_image(picture, np.zeros((8, 8, 3), np.uint8))
    for scale in (2.0, 4.0):
        export_safetensors(random_model(scale=scale), path)
        os.utime(path, ns=(0, int(scale)))
        seen += [
            Path(download).name for _, download in app.restore_upload(str(picture), str(path), "fidelity", id)
        ]
    assert seen == ["a_x2.png", "a_x4.png"]


def main():
    """The page with a drawn picture, restored by the released weights."""
    with tempfile.TemporaryDirectory() as folder, serving(folder) as address, launched() as chromium:
        picture = Path(folder) / "leaves.png"
        drawn = dead_leaves((480, 640), np.random.default_rng(0), min_radius=16)
        write_image(picture, downscale_image(drawn, 4))
        tab = chromium.new_page(viewport={"width": 1100, "height": 640})
        tab.goto(address)
        drop(tab, picture)
        tab.get_by_label("Weights").click()
        tab.get_by_role("option", name="x4", exact=True).click()
        tab.get_by_label("detail").check()
        tab.click("#start")
        tab.wait_for_selector("#result a[download]", timeout=120_000)  # milliseconds
        tab.wait_for_load_state("networkidle")
        tab.screenshot(path=ROOT / "docs/app.jpg", quality=85)
    return 0


if __name__ == "__main__":
    sys.exit(main())
