"""Tests of examples/: they run as their pages say, the notebook from its first cell to its last."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from skimage.data import astronaut

from diffusion import DiffusionModel
from examples import demo
from examples.change_the_process import circle_scales, train_and_restore
from examples.dead_leaves import dead_leaves, draw_dead_leaves_folder
from imaging.files import read_rgb

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_schedule_of_one_s_own_is_known_and_keeps_the_variance():
    signal_scale, noise_scale = circle_scales(50)
    torch.testing.assert_close(signal_scale**2 + noise_scale**2, torch.ones(50, dtype=torch.float64))
    diffusion = DiffusionModel(50, schedule="circle")
    torch.testing.assert_close(diffusion.signal_scale, signal_scale.float())


@pytest.mark.slow
def test_a_network_trained_with_it_for_seconds_beats_bicubic(tmp_path):
    original, bicubic, restored = train_and_restore(tmp_path)
    assert (restored - original).square().mean() < 0.95 * (bicubic - original).square().mean()


@pytest.mark.slow
def test_the_demo_goes_from_a_photo_to_a_table(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "demo.args"
    recipe.write_text(
        "--img_size 32 --unet_base_dim 8 --unet_dim_mults 1 2 --predictor_blocks 1 --max_steps 3"
    )
    monkeypatch.chdir(tmp_path)
    small = {"RECIPE": recipe, "TRAINING_IMAGES": 6, "HELD_OUT_IMAGES": 1, "IMAGE_SIZE": 64}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    assert demo.main([]) == 0
    for mode in ("fidelity", "detail"):
        compared = read_rgb(demo.OUTPUT / mode / "astronaut_x4_compare.png")
        np.testing.assert_array_equal(compared[-512:, -512:], astronaut())
    printed = capsys.readouterr().out
    assert printed.count("| detail") == 1
    assert len(list((demo.OUTPUT / "restored").glob("*.png"))) == 2


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    # In this process, as a kernel would import all once more. Its last cell asserts that it learnt something.
    monkeypatch.chdir(EXAMPLES)
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells), "commit it without outputs"
    pyplot.switch_backend("agg")
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert len(pyplot.get_fignums()) == 2
    pyplot.close("all")


# ---------------------------------------------------------------------------------------------- dead leaves


def radial_power(image):
    """Mean power of luma at each whole number of cycles per image, of a square image under a Hann window."""
    luma = image @ np.array([0.299, 0.587, 0.114])
    length = len(luma)
    window = np.outer(np.hanning(length), np.hanning(length))
    power = np.abs(np.fft.fft2((luma - luma.mean()) * window)) ** 2
    cycles = np.fft.fftfreq(length) * length
    ring = np.rint(np.hypot(cycles[:, None], cycles)).astype(int).ravel()
    return np.bincount(ring, power.ravel()) / np.bincount(ring)


@pytest.mark.slow
def test_the_power_spectrum_falls_as_in_photos():
    # A photo's falls with exponent -2 on average (Field 1987).
    power = np.mean([radial_power(dead_leaves(256, np.random.default_rng([8, i]))) for i in range(4)], axis=0)
    cycles = np.arange(4, 101)
    slope, _ = np.polyfit(np.log(cycles), np.log(power[cycles]), 1)
    assert -2.4 < slope < -1.6


def test_image_i_depends_on_seed_and_index_alone(tmp_path):
    few = draw_dead_leaves_folder(tmp_path / "few", 1, (16, 24), seed=3)
    many = draw_dead_leaves_folder(tmp_path / "many", 3, (16, 24), seed=3)
    assert [path.name for path in many] == ["0000.png", "0001.png", "0002.png"]
    images = [read_rgb(path) for path in many]
    np.testing.assert_array_equal(read_rgb(few[0]), images[0])
    np.testing.assert_array_equal(images[1], dead_leaves((16, 24), np.random.default_rng([3, 1])))
    assert (images[0].shape, images[0].dtype) == ((16, 24, 3), np.uint8)
    assert len({image.tobytes() for image in images}) == 3


def test_a_second_call_draws_anew_and_a_file_of_someone_else_is_never_overwritten(tmp_path):
    mine = tmp_path / "mine"
    for seed in (0, 1):
        (path,) = draw_dead_leaves_folder(mine, 1, 16, seed)
    np.testing.assert_array_equal(read_rgb(path), dead_leaves(16, np.random.default_rng([1, 0])))
    (tmp_path / "0000.png").write_bytes(b"someone's")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        draw_dead_leaves_folder(tmp_path, 1, 16, seed=0)
    assert (tmp_path / "0000.png").read_bytes() == b"someone's"


@pytest.mark.parametrize(
    ("size", "radii", "value"),
    [((8, -1), (1, 2), "-1"), (8, (0, 2), "0"), (8, (float("nan"), 2), "nan"), (8, (4, 3), "3")],
)
def test_wrong_sizes_and_radii_are_refused(size, radii, value):
    with pytest.raises(ValueError, match=value):
        dead_leaves(size, np.random.default_rng(0), min_radius=radii[0], max_radius=radii[1])
