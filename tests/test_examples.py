"""Tests of examples/: they run as their pages say."""

import pytest
import torch

from diffusion import DiffusionModel
from examples import demo
from examples.change_the_process import circle_scales, train_and_restore


def test_a_schedule_of_one_s_own_is_known_and_keeps_the_variance():
    signal_scale, noise_scale = circle_scales(50)
    torch.testing.assert_close(signal_scale**2 + noise_scale**2, torch.ones(50, dtype=torch.float64))
    diffusion = DiffusionModel(50, schedule="circle")
    torch.testing.assert_close(diffusion.signal_scale, signal_scale.float())


@pytest.mark.slow
def test_a_network_trained_with_it_for_seconds_beats_bicubic(tmp_path):
    original, bicubic, restored = train_and_restore(tmp_path, max_steps=60)
    assert (restored - original).square().mean() < 0.95 * (bicubic - original).square().mean()


def test_help_does_not_start_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        demo.main(["--help"])
    assert "usage" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_demo_goes_from_drawn_images_to_a_table(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "demo.args"
    recipe.write_text(
        "--img_size 32 --unet_base_dim 8 --unet_dim_mults 1 2 --predictor_blocks 1 --max_steps 3"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "RECIPE", recipe)
    monkeypatch.setattr(demo, "TRAINING_IMAGES", 6)
    monkeypatch.setattr(demo, "HELD_OUT_IMAGES", 1)
    monkeypatch.setattr(demo, "IMAGE_SIZE", 64)
    assert demo.main([]) == 0
    printed = capsys.readouterr().out
    assert "$ python train_diffusion.py" in printed
    assert "bicubic" in printed
    assert len(list((tmp_path / "demo_output" / "restored").glob("*.png"))) >= 1
