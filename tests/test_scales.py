"""One network for several scales: each scale has its own biases and its own residual_std."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch

from degradation import Photo
from diffusion import DiffusionModel
from engine.checkpoint import load_checkpoint
from engine.options import OptionError
from evaluate import main as evaluate
from examples.dead_leaves import dead_leaves
from imaging.files import decode_image, write_image
from infer import main as infer
from models import LoadedModel, load_model
from restoration import RestoreConfig, Restorer
from tests.networks import BICUBIC, PROCESS, tiny_unet
from train_diffusion import main
from training import TrainingConfig
from unet import Condition, UNet
from util import CropDataset, ImageDataset

SCALES = (2.0, 4.0)
CPU = torch.device("cpu")
TINY = (
    "--img_size 32 --downscale_factor 2 4 --unet_base_dim 8 --unet_dim_mults 1 2 --blocks_per_level 1".split()
)
TINY += "--predictor_blocks 1 --conditioning concat --batch_size 2 --accumulation_steps 1".split()
TINY += "--device cpu --precision fp32".split()


@pytest.mark.parametrize("settings", [{}, {"predictor_blocks": 2}, {"conditioning": "none"}], ids=str)
def test_the_network_at_one_scale_is_the_network_told_that_scale(settings):
    network = tiny_unet(scales=SCALES, **settings)
    generator = torch.Generator().manual_seed(1)
    noisy, upscaled, low_res = (torch.randn(2, 3, side, side, generator=generator) for side in (16, 16, 8))
    t, outputs = torch.tensor([3, 500]), []
    for number, scale in enumerate(SCALES):
        context, mean = network.encode_context(Condition(upscaled, low_res, scale=scale))
        alone = network.at(number)
        own_context, own_mean = alone.encode_context(Condition(upscaled, low_res))
        outputs.append(network(noisy, t, context))
        torch.testing.assert_close(alone(noisy, t, own_context), outputs[-1])
        if mean is not None:
            torch.testing.assert_close(own_mean, mean)
    assert not torch.allclose(*outputs, atol=1e-3)
    with pytest.raises(ValueError, match="3"):
        network.encode_context(Condition(upscaled, low_res, scale=3.0))


@pytest.fixture(scope="module")
def trained(photo_folder, tmp_path_factory):
    folder, images = tmp_path_factory.mktemp("trained"), ImageDataset(photo_folder, 32, 4, scales=SCALES)
    torch.manual_seed(0)
    settings = {"conditioning": "concat", "predictor_blocks": 2}
    network = UNet(base_dim=8, dim_mults=(1, 2), blocks_per_level=1, scales=SCALES, **settings)
    config = TrainingConfig(max_steps=150, batch_size=6, learning_rate=5e-3, ema_decay=0.9)
    run, _ = DiffusionModel(mode="clean").train(
        network, images, config, checkpoint_dir=folder, log_dir=folder / "logs"
    )
    return load_model(run.last, UNet).network, images


def error(network, images):
    """Mean square of what the predicted mean of a network of one scale leaves, in [0, 4]."""
    left = []
    for index in range(len(images)):
        sample = images[index]
        mean = network.encode_context(Condition(sample.upscaled[None], sample.low_res[None]))[1]
        left.append((network.residual_std * mean[0] - sample.residual).square().mean())
    return float(torch.stack(left).mean())


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_each_scale_is_restored_best_by_its_own_biases_and_its_own_residual_std(trained, number):
    network, images = trained
    own = images.at(SCALES[number])
    assert network.residual_std[0] < network.residual_std[1]
    others = copy.deepcopy(network), copy.deepcopy(network)
    others[0].scale_bias.data = network.scale_bias.flip(0)
    others[1].residual_std = network.residual_std.flip(0)
    found = error(network.at(number), own)
    bicubic = np.mean([float(own[index].residual.square().mean()) for index in range(len(own))])
    assert found < 0.97 * bicubic
    assert found < 0.99 * error(others[0].at(number), own)
    assert found < error(others[1].at(number), own)


@pytest.mark.parametrize("degradation", [None, Photo()], ids=["bicubic", "photo"])
def test_a_batch_has_one_scale_and_batches_have_every_scale(photo_folder, degradation):
    crops = CropDataset(ImageDataset(photo_folder, 32, 4, degradation=degradation, scales=SCALES))
    sides = []
    for epoch in range(12):
        keys = [(epoch, index) for index in (3, 1, 4)]
        batch, again = (crops.collate([crops[key] for key in keys]) for _ in range(2))
        assert torch.equal(batch.low_res, again.low_res)
        assert batch.scale_among(SCALES) == SCALES.index(32 / batch.low_res.shape[-1])
        sides.append(batch.low_res.shape[-1])
    assert set(sides) == {16, 8}


@pytest.mark.slow
def test_the_scripts_train_resume_and_restore_several_scales(photo_folder, tmp_path, capsys):
    flags = [*TINY, "--image_folder", str(photo_folder), "--log_dir", str(tmp_path / "logs")]
    saving = ["--max_steps", "4", "--save_every", "2", "--checkpoint_dir", str(tmp_path / "runs")]
    assert main([*flags, *saving]) == 0
    last = next(tmp_path.glob("runs/*/*_last.pth"))
    middle = shutil.copy(next(last.parent.glob("*_step*2.pth")), tmp_path / "middle.pth")
    assert main(["--weights_path", str(middle), "--downscale_factor", "2", "4"]) == 0
    resumed = load_checkpoint(next(path for path in tmp_path.glob("*_last.pth")))
    for name, value in load_checkpoint(last)["model"].items():
        assert torch.equal(resumed["model"][name], value), name
    assert main(["--weights_path", str(middle), "--downscale_factor", "4"]) == 2
    assert main([*flags, "--downscale_factor", "4", "--init_weights", str(last)]) == 2
    assert "[2.0, 4.0]" in capsys.readouterr().err
    picture, model = tmp_path / "a.png", tmp_path / "model.safetensors"
    write_image(picture, dead_leaves((12, 10), np.random.default_rng(0)))
    assert infer(["--weights_path", str(last), "--export", str(model)]) == 0
    common = [str(picture), "--weights_path", str(model), "--device", "cpu", "--output", str(tmp_path)]
    for scale in (["--scale", "2"], ["--scale", "3"], ["--scale", "8"], []):
        assert infer([*common, *scale]) == 0
    for factor in (2, 3, 8, 4):
        restored = decode_image(tmp_path / f"a_x{factor}.png").pixels
        assert restored.shape == (factor * 12, factor * 10, 3)
    alone = load_model(model, UNet)
    alone = alone._replace(network=alone.network.at(0))
    found = Restorer(alone, RestoreConfig(), CPU).restore(picture).pixels
    np.testing.assert_array_equal(found, decode_image(tmp_path / "a_x2.png").pixels)
    table = ["--data", str(photo_folder), "--limit", "1", "--no_lpips", "--mode", "fidelity"]
    for scale in "234":
        report = tmp_path / f"{scale}.json"
        model = ["--weights_path", str(last), "--device", "cpu", "--json", str(report)]
        assert evaluate([*table, "--scale", scale, *model]) == 0
        assert json.loads(report.read_text())["protocol"]["model"]["scale"] == [2.0, 4.0]


def test_what_does_not_fit_several_scales_is_refused(photo_folder):
    images = ImageDataset(photo_folder, 32, 4, scales=SCALES)
    with pytest.raises(ValueError, match="32"):
        ImageDataset(photo_folder, 32, 4, scales=(3.0, 4.0))
    several = LoadedModel(tiny_unet(scales=SCALES), PROCESS, BICUBIC, 1)
    with pytest.raises(ValueError, match="scales"):
        Restorer(several, RestoreConfig(), CPU)
    with pytest.raises(OptionError, match="scales"):
        UNet(scales=(4.0, 2.0))
    places = {"checkpoint_dir": photo_folder, "log_dir": photo_folder}
    with pytest.raises(ValueError, match=r"2.0, 4.0"):
        DiffusionModel().train(UNet(base_dim=8), images, TrainingConfig(max_steps=1), **places)
