"""Tests of examples/: they run as their pages say, and the notebook from its first cell to its last."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from skimage.data import astronaut

from diffusion import DiffusionModel
from examples import demo
from examples.change_the_process import circle_scales, train_and_restore
from imaging.files import read_rgb

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_schedule_of_one_s_own_is_known_and_keeps_the_variance():
    signal_scale, noise_scale = circle_scales(50)
    torch.testing.assert_close(signal_scale**2 + noise_scale**2, torch.ones(50, dtype=torch.float64))
    diffusion = DiffusionModel(50, schedule="circle")
    torch.testing.assert_close(diffusion.signal_scale, signal_scale.float())


@pytest.mark.slow
def test_a_network_trained_with_it_for_seconds_beats_bicubic(tmp_path):
    original, bicubic, restored = train_and_restore(tmp_path, max_steps=60)
    assert (restored - original).square().mean() < 0.95 * (bicubic - original).square().mean()


@pytest.mark.slow
def test_the_demo_goes_from_a_photo_to_a_table(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "demo.args"
    recipe.write_text(
        "--img_size 32 --unet_base_dim 8 --unet_dim_mults 1 2 --predictor_blocks 1 --max_steps 3"
    )
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "RECIPE": recipe,
        "TRAINING_IMAGES": 6,
        "HELD_OUT_IMAGES": 1,
        "IMAGE_SIZE": 64,
    }.items():
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
