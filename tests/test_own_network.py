"""A network of one's own: the scripts train, resume, restore and measure it as they do unet.UNet."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import evaluate
import infer
import train_diffusion
from engine.checkpoint import load_checkpoint
from engine.options import Options, option
from imaging.files import read_rgb
from models import export_safetensors, load_model
from network import Network, name_of, network_class
from restoration import RestoreConfig, restore


@dataclass(frozen=True)
class PlainConfig(Options):
    width: int = option(8, "channels between the convolutions", low=1)


class Plain(Network):
    """Two convolutions of the noisy residual, the upscaled image and the timestep."""

    Config, window_multiple = PlainConfig, 8

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.Sequential(
            nn.Conv2d(7, config.width, 3, padding=1), nn.SiLU(), nn.Conv2d(config.width, 3, 3, padding=1)
        )

    def encode_context(self, condition):
        return condition.upscaled, None

    def forward(self, noisy, t, context):
        time = (t / 1000)[:, None, None, None].expand_as(noisy[:, :1])
        return self.layers(torch.cat([noisy, context, time], dim=1))


NETWORK = ["--network", "tests.test_own_network:Plain"]


@pytest.fixture(scope="module")
def trained(photo_folder, tmp_path_factory):
    """The checkpoint of four steps by the script, with an option of the network's own."""
    folder = tmp_path_factory.mktemp("own")
    flags = ["--image_folder", str(photo_folder), "--checkpoint_dir", str(folder), "--log_dir", str(folder)]
    flags += "--width 6 --img_size 32 --downscale_factor 2 --batch_size 2 --accumulation_steps 1".split()
    assert train_diffusion.main([*NETWORK, *flags, *"--max_steps 4 --save_every 2 --device cpu".split()]) == 0
    return next(folder.glob("*/*_last.pth"))


def test_the_scripts_train_resume_restore_and_measure_it(trained, photo_folder, tmp_path, capsys):
    assert load_checkpoint(trained)["network"] == {"width": 6}
    middle = shutil.copy(next(trained.parent.glob("*_step*2.pth")), tmp_path / "middle.pth")
    assert train_diffusion.main(["--weights_path", str(middle)]) == 0
    resumed, whole = (load_checkpoint(path)["model"] for path in (next(tmp_path.glob("*_last.pth")), trained))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    weights = ["--weights", str(trained), "--device", "cpu"]
    picture, result = str(next(photo_folder.glob("*.png"))), tmp_path / "restored.png"
    assert infer.main([picture, *weights, *NETWORK, "--output", str(result)]) == 0
    assert read_rgb(result).shape[0] == 2 * read_rgb(Path(picture)).shape[0]
    report = ["--json", str(tmp_path / "report.json"), "--no_lpips", "--limit", "1", "--mode", "fidelity"]
    assert evaluate.main(["--data", str(photo_folder), "--scale", "2", *weights, *NETWORK, *report]) == 0
    assert len(json.loads((tmp_path / "report.json").read_text())["rows"]) == 2
    capsys.readouterr()
    assert infer.main([picture, *weights, "--output", str(tmp_path / "other.png")]) == 2
    assert "tests.test_own_network:Plain" in capsys.readouterr().err


def test_it_is_exported_and_restores_in_tiles(trained, photo_folder, tmp_path):
    export_safetensors(load_model(trained, Plain), tmp_path / "plain.safetensors")
    picture = read_rgb(next(photo_folder.glob("*.png")))
    whole, tiled = (
        restore(picture, load_model(path, Plain), RestoreConfig(tile=tile, steps=2), device="cpu").pixels
        for path, tile in ((trained, 0), (tmp_path / "plain.safetensors", 32))
    )
    assert np.abs(whole.astype(int) - tiled).mean() < 8


@pytest.mark.parametrize("name", ["UNet", "nowhere:UNet", "unet:Net", "util:ImageDataset", ""])
def test_what_is_no_network_is_refused(name, capsys):
    assert train_diffusion.main(["--network", name]) == 2
    assert repr(name) in capsys.readouterr().err


def test_a_network_is_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text("from unet import UNet\n\nclass Mine(UNet):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert name_of(network_class("mine_alone:Mine")) == "mine_alone:Mine"
