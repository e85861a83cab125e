"""A network of one's own: trained, saved, loaded and restored with like unet.UNet."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from diffusion import DiffusionModel
from engine.options import Options, option
from evaluation.validation import Validator
from imaging.files import read_rgb
from models import export_safetensors, load_model
from network import Network
from restoration import RestoreConfig, restore
from training import TrainingConfig
from util import ImageDataset


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


@pytest.mark.slow
def test_a_network_of_one_s_own_is_trained_saved_loaded_and_restored_with(photo_folder, tmp_path):
    torch.manual_seed(0)
    diffusion = DiffusionModel(mode="clean")
    config = TrainingConfig(max_steps=10, batch_size=4, learning_rate=1e-3)
    run, _ = diffusion.train(
        Plain(PlainConfig(width=6)),
        ImageDataset(photo_folder, 32, 2),
        config,
        validate=Validator(diffusion, ImageDataset(photo_folder, 32, 2, train=False)),
        checkpoint_dir=tmp_path / "run",
        log_dir=tmp_path / "logs",
    )
    loaded = load_model(run.best, Plain)
    assert loaded.network.config == PlainConfig(width=6)
    export_safetensors(loaded, tmp_path / "plain.safetensors")
    picture = read_rgb(next(photo_folder.glob("*.png")))
    whole, tiled = (
        restore(picture, load_model(path, Plain), RestoreConfig(tile=tile, steps=2), device="cpu").pixels
        for path, tile in ((run.best, 0), (tmp_path / "plain.safetensors", 32))
    )
    assert whole.shape == (2 * picture.shape[0], 2 * picture.shape[1], 3)
    assert np.abs(whole.astype(int) - tiled).mean() < 8
