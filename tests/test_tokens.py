"""Tests of tokens from any encoder: files, training, guidance, restoring."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import infer
import train_diffusion
from degradation import Degradation
from diffusion import DiffusionModel, ObjectiveConfig, ResidualGenerator
from engine.options import OptionError
from imaging.files import write_image
from imaging.tokens import read_tokens
from models import LoadedModel, load_model
from network import Condition
from restoration import RestoreConfig, Restorer, restore
from restoration.scales import chain_to, restore_to
from tests.networks import BICUBIC, PROCESS, tiny_unet
from util import Crops, ImageDataset

CPU = torch.device("cpu")
LOW_RES = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))


DESCRIBED = LoadedModel(tiny_unet(conditioning="tokens"), PROCESS, BICUBIC, 1)


def restored(tokens, **options):
    return Restorer(DESCRIBED, RestoreConfig(steps=2, overlap=8, **options), CPU)(LOW_RES, tokens)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_tokens_are_read_by_the_name_of_the_image(tmp_path, suffix):
    path = tmp_path / f"a.b{suffix}"
    if suffix == ".npy":
        np.save(path, TOKENS[0].double().numpy())
    else:
        save_file({"anything": TOKENS[0].half()}, path)
    found = read_tokens(tmp_path, tmp_path / "elsewhere" / "a.b.jpg")
    torch.testing.assert_close(found, TOKENS[0], rtol=1e-3, atol=1e-3)
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    "array", [None, np.zeros(3), np.full((2, 3), np.nan), np.array([[None]]), np.zeros((0, 4))]
)
def test_what_holds_no_tokens_is_named(tmp_path, array):
    if array is not None:
        np.save(tmp_path / "wrong.npy", array)
    with pytest.raises(ValueError, match=r"wrong\.npy"):
        read_tokens(tmp_path, tmp_path / "wrong.png")


@pytest.mark.parametrize("tile", [0, 16])
def test_guidance_goes_from_no_tokens_through_those_of_each_image_and_beyond(tile):
    silent, with_tokens = restored(None, tile=tile), restored(TOKENS, tile=tile)
    for others in (silent, restored(TOKENS.flip(0), tile=tile)):
        assert (with_tokens - others).abs().mean() > 1e-3
    torch.testing.assert_close(restored(TOKENS, guidance=0.0, tile=tile), silent)
    beyond = restored(TOKENS, guidance=2.0, tile=tile)
    assert ((beyond - with_tokens) * (with_tokens - silent)).mean() > 0


def test_guidance_is_linear_in_the_clean_estimate():
    model, noisy, base = DESCRIBED.network, torch.randn(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    condition = Condition(torch.zeros(2, 3, 16, 16), tokens=TOKENS)

    def estimate(guidance, condition):
        generator = ResidualGenerator(guidance=guidance)
        with torch.no_grad():
            return generator.estimate(model, noisy, 100, generator.encode(model, condition)[0], base)

    silent, said = estimate(1.0, condition._replace(tokens=None)), estimate(1.0, condition)
    expected = (silent + 3 * (said - silent)).clamp(-1 / 0.1, 1 / 0.1)
    torch.testing.assert_close(estimate(3.0, condition), expected, rtol=1e-4, atol=1e-4)


def test_tokens_where_there_are_none_or_that_nothing_takes_are_refused():
    with pytest.raises(OptionError, match=r"guidance is 2\.0"):
        restored(None, guidance=2.0)
    deaf = LoadedModel(tiny_unet(conditioning="concat"), PROCESS, BICUBIC, 1)
    with pytest.raises(ValueError, match="takes no tokens"):
        restore(np.zeros((8, 8, 3), np.uint8), deaf, tokens=TOKENS[0], device="cpu")
    mean = LoadedModel(tiny_unet(conditioning="tokens", predictor_blocks=2), PROCESS, BICUBIC, 1)
    with pytest.raises(OptionError, match="steps is 0"):
        Restorer(mean, RestoreConfig(mode="fidelity"), CPU)(LOW_RES, TOKENS)


def test_dropped_tokens_change_nothing_and_kept_ones_do():
    network, crops = tiny_unet(conditioning="tokens"), torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)

    def loss(dropout, tokens):
        of_batch = DiffusionModel(objective=ObjectiveConfig(dropout)).restoration_loss(Degradation(scale=2.0))
        return of_batch(network, Crops(crops, tokens=tokens), torch.Generator().manual_seed(0))

    assert torch.equal(loss(1.0, TOKENS), loss(1.0, -TOKENS))
    assert not torch.equal(loss(0.0, TOKENS), loss(0.0, -TOKENS))


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_tokens_steer_at_any_scale(scale):
    chain = chain_to(scale, [Restorer(DESCRIBED, RestoreConfig(steps=1), CPU)])
    pixels = (255 * LOW_RES[0]).byte()
    found = [restore_to(chain, pixels, tokens=tokens).pixels for tokens in (TOKENS[0], None)]
    assert not np.array_equal(*found)


def test_crops_carry_the_tokens_of_the_image_they_are_from(stripes):
    dataset = ImageDataset(stripes, 16, tokens=stripes, degradation=Degradation("photo", scale=2.0))
    (stripes / "0.png").unlink()
    batch = dataset.collate([dataset.crop(index) for index in range(3)]).to(CPU)
    assert batch.tokens[:, 0, 0].tolist() == [-1, -1, 1]  # the next image took the place of the first
    assert batch.low_res.shape == (3, 3, 8, 8)
    losses = DiffusionModel().restoration_loss(dataset.degradation)(
        tiny_unet(conditioning="tokens"), batch, torch.Generator()
    )
    assert losses.shape == (3,)


@pytest.mark.parametrize("spoil", [lambda path: np.save(path, np.zeros((3, 16))), Path.unlink])
def test_tokens_that_do_not_fit_are_refused_before_training(stripes, spoil):
    spoil(stripes / "5.npy")
    with pytest.raises(ValueError, match=r"5\.(npy|png)"):
        ImageDataset(stripes, 16, 2, tokens=stripes)


@pytest.fixture
def stripes(tmp_path):
    """Stripes that vanish at a quarter of the size, mirrored borders too; tokens alone tell their phase."""
    for index in range(8):
        sign = 1 - 2 * (index % 2)
        rows = sign * 40.0 * np.tile([1, -1, -1, 1], 8)[:, None, None]
        image = 100 + 10 * (index // 2) + rows + np.zeros((32, 32, 3))
        write_image(tmp_path / f"{index}.png", image.round().astype(np.uint8))
        np.save(tmp_path / f"{index}.npy", np.full((1, 16), float(sign)))
    return tmp_path


@pytest.mark.slow
def test_the_scripts_learn_what_only_tokens_tell_and_restore_with_them(stripes, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("run")
    run = (
        "--img_size 32 --downscale_factor 4 --patch_size 4 --predictor_blocks 0 --unet_base_dim 16 "
        "--unet_dim_mults 1 --blocks_per_level 1 --context_dim 16 --diffusion_mode clean --augment none "
        "--max_steps 60 --batch_size 8 --accumulation_steps 1 --learning_rate 5e-3 --ema_decay 0.9"
    ).split()
    run += ["--device", "cpu", "--image_folder", str(stripes), "--tokens", str(stripes)]
    run += ["--checkpoint_dir", str(folder), "--log_dir", str(folder / "logs")]
    assert train_diffusion.main(run) == 2
    assert "--conditioning is 'both'" in capsys.readouterr().err
    assert train_diffusion.main([*run, "--conditioning", "tokens"]) == 0
    weights = next(folder.glob("*/*_last.pth"))
    dataset = ImageDataset(stripes, 32, 4, train=False, tokens=stripes)
    low_res, _, original, _ = dataset[0]
    restorer = Restorer(load_model(weights), RestoreConfig(), CPU)

    def error(tokens):
        return float((restorer((low_res[None] + 1) / 2, tokens)[0] - (original + 1) / 2).square().mean())

    tokens = dataset.crop(0).tokens[None]
    assert error(tokens) < 0.1 * min(error(None), error(-tokens))
    restoring = [str(stripes / "0.png"), "--weights_path", str(weights), "--device", "cpu", "--output"]
    guided = ["--guidance", "2"]
    assert infer.main([*restoring, str(folder / "0.png"), "--tokens", str(stripes), *guided]) == 0
    for more, named in ((["--tokens", str(folder)], "0.npy"), (guided, "guidance is 2.0")):
        assert infer.main([*restoring, str(folder / "1.png"), *more]) == 2
        assert named in capsys.readouterr().err
