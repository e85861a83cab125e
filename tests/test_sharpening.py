"""The last phase: its evaluations, its losses, its step, and what comes of it."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import train_diffusion
from bicubic import upscale_image
from diffusion import ProcessConfig, ResidualGenerator, without_grid
from engine.options import OptionError
from engine.processes import Processes
from evaluation.lpips import PerceptualFeatures
from models import export_safetensors, load_model
from restoration import RestoreConfig, Restorer, restore
from samplers import draw_noise, level_steps, noise_stream
from sharpening import (
    Discriminator,
    Seen,
    Sharpening,
    SharpeningConfig,
    discriminator_loss,
    generator_loss,
    random_augmentation,
)
from tests.networks import random_model
from tests.runs import assert_equal
from training import BatchPlan, TrainingConfig, new_state
from util import ImageDataset, Sample

ONE, TWO = ProcessConfig(levels=(6.0,)), ProcessConfig(levels=(8.0, 1.2), temperature=0.5)
CPU = torch.device("cpu")


class RandomFeatures(nn.Module):
    """Stands in for VGG16: two stages of random convolutions, and the mean squared difference."""

    dims = (8, 12)

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.requires_grad_(False)

    def forward(self, image):
        first = F.relu(self.first(image))
        return [F.normalize(stage.float(), dim=1) for stage in (first, F.relu(self.second(first)))]

    def distance(self, features, others):
        pairs = zip(features, others, strict=True)
        return torch.stack([(a - b).square().mean((1, 2, 3)) for a, b in pairs]).sum(0)


def model_of(process, **settings):
    return random_model(process=process, predictor_blocks=1, conditioning="concat", **settings)


def picture(height=24, width=20, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


@given(st.floats(0, 1), st.sampled_from(["cosine", "linear", "flow", "resshift"]))
def test_both_evaluations_see_the_same_noise(detail, schedule):
    signal, noise = ProcessConfig(schedule=schedule).scales()
    (first, second), scale = level_steps((signal, noise), (3.0, 0.5), detail)
    for step, level in ((first, 3.0), (second, 0.5)):
        nearest = (noise / signal - level).abs().min()
        assert abs(noise[step.timestep] / signal[step.timestep] - level) == nearest
    z, clean = torch.randn(2, 1, 3, 4, 4)
    assert scale == float(noise[first.timestep])
    noisy = first.advance(scale * z, [clean])
    torch.testing.assert_close(noisy, (signal[second.timestep] * clean + noise[second.timestep] * z).float())
    torch.testing.assert_close(second.advance(noisy, [clean]), detail * clean)


@pytest.mark.parametrize("levels", [(1.0, 2.0), (2.0, 2.0), (3.0, 2.0, 1.0), (0.0,)])
def test_levels_are_at_most_two_and_fall(levels):
    with pytest.raises(OptionError, match="levels"):
        ProcessConfig(levels=levels)


def test_only_sharpened_models_have_a_temperature():
    with pytest.raises(OptionError, match="temperature"):
        ProcessConfig(temperature=0.3)


@pytest.mark.parametrize("process", [ONE, TWO])
def test_a_restored_crop_is_what_restoring_writes(process):
    model = model_of(process)
    image = picture()
    low_res = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    generator = ResidualGenerator(device="cpu", process=process)
    sharpening = Sharpening(generator, model.degradation, RandomFeatures(), SharpeningConfig())
    sample = sample_of(low_res)
    written = Restorer(model, RestoreConfig(mode="detail", tile=0), CPU).restore(image).pixels
    restored = sharpening.restore(model.network, sample, noise_of(sample.upscaled))
    pixels = ((restored.clamp(-1, 1) + 1) * 127.5).round().byte()[0].permute(1, 2, 0).numpy()
    assert np.abs(pixels.astype(int) - written).max() <= 1


def sample_of(low_res):
    upscaled = upscale_image(low_res, 4.0).clamp(-1, 1)
    return Sample(low_res, upscaled, upscaled, torch.zeros_like(upscaled))


def noise_of(image):
    return draw_noise([noise_stream(0, 0)], *image.shape[1:])


def test_the_dial_adds_more_and_more_to_the_mean():
    model, image = model_of(ONE), picture()

    def restored(**how):
        return restore(image, model, RestoreConfig(**how), device="cpu").pixels.astype(float)

    mean = restored(mode="fidelity")
    added = [np.abs(restored(detail=detail) - mean).mean() for detail in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert added[0] == 0
    assert all(more > less for less, more in itertools.pairwise(added))
    np.testing.assert_array_equal(restored(mode="detail"), restored(detail=1.0))


@given(st.sampled_from([2, 4, 8]), st.integers(17, 60), st.integers(17, 60), st.integers(0, 99))
def test_a_grid_is_taken_out_wherever_it_is_and_nothing_else(cell, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randn(1, 3, cell, cell, generator=generator)
    grid = (pattern - pattern.mean((2, 3), keepdim=True)).repeat(1, 1, 64 // cell, 64 // cell)
    grid = grid[..., :height, :width]
    smooth = torch.linspace(0, 1, 3)[None, :, None, None].expand_as(grid)
    torch.testing.assert_close(without_grid(smooth + grid, cell), smooth)
    torch.testing.assert_close(without_grid(smooth, cell), smooth)
    texture = torch.randn(1, 3, 8 * cell, 8 * cell, generator=generator)
    assert (without_grid(texture, cell) - texture).std() < 0.35  # a mean of at least 9 cells, 25 inside


def test_where_nothing_changes_sharpening_adds_no_grid():
    """Of a network whose last bias draws a strong grid, nothing is left."""
    model = model_of(replace(ONE, mode="clean"), attention_levels=())
    with torch.no_grad():
        model.network.out.weight.zero_()
        model.network.out.bias.normal_(std=5.0)
    flat = np.full((24, 24, 3), 128, np.uint8)
    mean, sharp = (
        restore(flat, model, RestoreConfig(mode=mode), device="cpu").pixels for mode in ("fidelity", "detail")
    )
    added = sharp.astype(float) - mean
    assert np.ptp(added, axis=(0, 1)).max() <= 1


def test_seeds_differ_and_tiles_do_not_show():
    model, image = model_of(TWO, attention_levels=()), picture(40, 48)
    whole, tiled, other = (
        restore(image, model, RestoreConfig(mode="detail", tile=tile, seed=seed), device="cpu").pixels
        for tile, seed in ((0, 0), (96, 0), (0, 1))
    )
    assert np.abs(whole.astype(int) - tiled).mean() < 0.5
    assert np.abs(whole.astype(int) - other).mean() > 2


@given(st.sampled_from([ONE, TWO]), st.floats(0.01, 1))
def test_the_temperature_scales_the_noise_and_nothing_else(process, temperature):
    hot, cold = (ResidualGenerator(process=replace(process, temperature=one)) for one in (1.0, temperature))
    assert cold.initial_scale == pytest.approx(temperature * hot.initial_scale)
    assert cold.plan(len(process.levels)) == hot.plan(len(process.levels))


@pytest.mark.parametrize("how", [{"steps": 6}, {"steps": 1, "scheduler": "ddim"}, {"steps": 1, "eta": 0.5}])
def test_a_sharpened_model_takes_no_other_sampler(how):
    with pytest.raises(OptionError, match="steps"):
        Restorer(model_of(ONE), RestoreConfig(**how), CPU)


def losses(share, seed=0):
    torch.manual_seed(seed)
    perceptual, discriminator = RandomFeatures(), Discriminator(RandomFeatures.dims, 4)
    restored, original = (torch.rand(2, 3, 16, 16) * 2 - 1 for _ in range(2))
    restored.requires_grad_(True)
    config = SharpeningConfig(pixel_weight=0.0, adversarial_share=share)
    same = torch.nn.Identity()
    return restored, *generator_loss(restored, original, perceptual, discriminator, config, same)


def test_the_discriminator_has_its_share_of_the_gradient_of_each_sample():
    def gradient(share):
        """Of the features; RandomFeatures are linear where no feature is cut, so of the image up to that."""
        restored, loss, _ = losses(share)
        return torch.autograd.grad(loss.sum(), restored)[0]

    alone, with_it, with_twice = gradient(0.0), gradient(0.5), gradient(1.0)
    torch.testing.assert_close(with_twice - alone, 2 * (with_it - alone), rtol=1e-3, atol=1e-7)
    assert float((with_it - alone).norm()) > 0.02 * float(alone.norm())


def test_augmentation_changes_size_contrast_and_the_order_of_colours():
    image = torch.tensor([-0.9, 0.1, 0.8]).view(1, 3, 1, 1).expand(1, 3, 40, 40)
    views = [random_augmentation(seed)(image) for seed in range(40)]
    orders = {tuple(view.mean((0, 2, 3)).argsort().tolist()) for view in views}
    assert len(orders) == 6
    sizes = [view.shape[-1] / 40 for view in views]
    contrasts = [float(view.max() - view.min()) / 1.7 for view in views]
    for drawn, (lowest, highest) in ((sizes, (0.5, 1.4)), (contrasts, (0.6, 1.1))):
        assert min(drawn) == pytest.approx(lowest, abs=0.1)
        assert max(drawn) == pytest.approx(highest, abs=0.1)
    one, other = (random_augmentation(3)(image) for _ in range(2))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_hinge_loss_is_its_closed_form():
    class Fixed(nn.Module):
        def forward(self, features):
            return features

    seen = Seen([torch.tensor([-2.0, 0.5]).view(2, 1, 1, 1)], [torch.tensor([3.0, 0.25]).view(2, 1, 1, 1)])
    torch.testing.assert_close(discriminator_loss(Fixed(), seen), torch.tensor([0.0, 1.5 + 0.75]))


def test_bfloat16_hides_no_texture_from_the_losses(sr_data):
    """Skin has texture of half an 8-bit level; near 1, one step of bfloat16 is a whole one."""
    features = sr_data / "perceptual" / "vgg16_features.safetensors"
    perceptual = PerceptualFeatures(weights=features)
    discriminator = Discriminator(perceptual.dims).eval()
    torch.manual_seed(0)
    skin = torch.full((1, 3, 32, 32), 0.8)
    texture = skin + torch.randn(skin.shape) * 0.5 / 127.5

    def seen(precision):
        with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision is not None):
            flat, rough = perceptual(skin), perceptual(texture)
            scores = [
                discriminator([image, *features])[0] for image, features in ((skin, flat), (texture, rough))
            ]
        return [float(perceptual.distance(flat, rough)), float((scores[1] - scores[0]).square().mean())]

    assert seen(torch.bfloat16) == pytest.approx(seen(None), rel=0.1)


def sharpened_state(model, folder, steps, perceptual=None, **options):
    """A state after some steps of the last phase, and the reports."""
    dataset = ImageDataset(folder, 32, 4)
    config = TrainingConfig(batch_size=2, max_steps=steps, learning_rate=1e-3, optimizer="muon")
    resolved = config.resolved(len(dataset), 1)
    state = new_state(copy.deepcopy(model.network).requires_grad_(True), resolved)
    generator = ResidualGenerator(device="cpu", process=model.process)
    settings = SharpeningConfig(adversarial_warmup=0, discriminator_dim=8, **options)
    make_step = Sharpening(generator, model.degradation, perceptual or RandomFeatures(), settings)
    step = make_step(state, resolved, Processes(CPU))
    reports = []
    plan = BatchPlan(len(dataset), resolved)
    for number in range(steps):
        parts = plan.micro_batches(number, 0)
        batches = ((part, dataset.collate([dataset.crop(pair) for pair in part.pairs])) for part in parts)
        reports.append(step(batches))
    return state, reports


@pytest.mark.parametrize("process", [ONE, TWO])
def test_a_step_trains_refiner_and_discriminator_and_leaves_the_mean_alone(process, photo_folder):
    model = model_of(process)
    state, reports = sharpened_state(model, photo_folder, 3)
    before, after = model.network.state_dict(), state.ema.state_dict()
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert {"stem", "encoder", "decoder", "out"} <= changed
    assert not changed & {"predictor", "residual_std", "scale"}
    assert all(report.finite and report.scalars["discriminator_gradient_norm"] > 0 for report in reports)
    fresh = Discriminator(RandomFeatures.dims, 8).state_dict()
    rival = state.others["discriminator"]
    assert rival.step == 3
    assert any(not torch.equal(fresh[name], value) for name, value in rival.model.state_dict().items())


def test_the_discriminator_learns_to_tell_restored_from_original(photo_folder):
    _, reports = sharpened_state(
        model_of(ONE), photo_folder, 20, adversarial_share=0.0, discriminator_learning_rate=1e-2
    )
    told = [report.scalars["discriminator_loss"] for report in reports]
    assert np.mean(told[-5:]) < 0.8 * np.mean(told[:2])  # an untrained one stays near 2


def test_a_step_that_is_not_finite_changes_nothing(photo_folder):
    class Broken(RandomFeatures):
        def distance(self, features, others):
            return super().distance(features, others) * math.nan

    model = model_of(ONE)
    state, (report,) = sharpened_state(model, photo_folder, 1, Broken())
    assert not report.finite
    for name, value in model.network.state_dict().items():
        torch.testing.assert_close(state.model.state_dict()[name], value, rtol=0, atol=0)


def test_sharpening_needs_a_predicted_mean(photo_folder):
    with pytest.raises(ValueError, match="predict"):
        sharpened_state(random_model(process=ONE, conditioning="concat"), photo_folder, 1)


SMALL = (
    "--img_size 32 --downscale_factor 4 --patch_size 4 --unet_base_dim 16 --unet_dim_mults 1 "
    "--blocks_per_level 1 --attention_levels --conditioning concat --diffusion_mode clean "
    "--predictor_blocks 2 --batch_size 4 --accumulation_steps 1 --optimizer muon --learning_rate 2e-3 "
    "--warmup_steps 5 --num_workers 0 --device cpu --precision fp32"
).split()


GENTLE = "--learning_rate 1e-3 --adversarial_share 0.1".split()


@pytest.fixture(scope="module")
def sharpened(sr_data, tmp_path_factory):
    """Diffusion weights, and two runs sharpened from them: one in one go, one stopped halfway and resumed."""
    root = tmp_path_factory.mktemp("sharpened")
    features = ["--perceptual_features", str(sr_data / "perceptual" / "vgg16_features.safetensors")]

    def run(name, *argv):
        folders = ["--checkpoint_dir", str(root / name), "--log_dir", str(root / "logs")]
        assert train_diffusion.main([*argv, *folders]) == 0
        return next((root / name).glob("*"))

    photos = ["--image_folder", str(sr_data / "train" / "T91"), "--val_fraction", "0.1", *SMALL]
    diffusion = run("diffusion", *photos, "--max_steps", "150") / "diffusion_model_clean_last.pth"
    start = ["--init_weights", str(diffusion), "--levels", "3", "--temperature", "0.5", *features, *GENTLE]
    start += ["--save_every", "20"]
    whole = run("whole", *photos, *start, "--max_steps", "40", "--validate_every", "40")
    half = whole / "diffusion_model_clean_step000000020.pth"
    part = root / "part"
    part.mkdir()
    copied = part / half.name
    copied.write_bytes(half.read_bytes())
    assert train_diffusion.main(["--weights_path", str(copied), *features]) == 0
    return diffusion, whole, part


@pytest.mark.slow
def test_sharpening_beats_its_diffusion_at_as_many_evaluations(sharpened, sr_data):
    diffusion, whole, _ = sharpened
    perceptual = PerceptualFeatures(weights=sr_data / "perceptual" / "vgg16_features.safetensors")
    dataset = ImageDataset([*(sr_data / "test" / "Set5").glob("*.png")], 64, 4, train=False)
    samples = [dataset[index] for index in range(len(dataset))]
    low_res, original = (torch.stack([one[part] for one in samples]) for part in (0, 2))

    def distance(path):
        restorer = Restorer(load_model(path), RestoreConfig(steps=1), CPU)
        restored = 2 * restorer((low_res + 1) / 2) - 1
        return float(perceptual.distance(perceptual(restored), perceptual(original)).mean())

    assert distance(whole / "diffusion_model_clean_last.pth") < 0.95 * distance(diffusion)


@pytest.mark.slow
def test_sharpening_resumes_to_the_same_bits(sharpened):
    _, whole, part = sharpened
    one, other = (
        torch.load(folder / "diffusion_model_clean_last.pth", weights_only=True) for folder in (whole, part)
    )

    for key in ("model", "ema", "optimizer", "discriminator", "step", "best_score"):
        assert_equal(one[key], other[key])
    untrained = Discriminator((64, 128, 256, 512, 512), 64).state_dict()
    trained = one["discriminator"]["model"]
    assert any(not torch.equal(untrained[name], value) for name, value in trained.items())


@pytest.mark.slow
def test_fidelity_is_the_same_bytes_before_and_after(sharpened):
    diffusion, whole, _ = sharpened
    image = picture(32, 40, seed=3)
    before, after = (
        restore(image, load_model(path), RestoreConfig(mode="fidelity"), device="cpu").pixels
        for path in (diffusion, whole / "diffusion_model_clean_last.pth")
    )
    np.testing.assert_array_equal(before, after)


def test_levels_need_weights_to_start_from(photo_folder, capsys):
    assert train_diffusion.main(["--image_folder", str(photo_folder), *SMALL, "--levels", "6"]) == 2
    assert "--init_weights" in capsys.readouterr().err


def test_a_sharpened_model_is_not_trained_as_a_diffusion(photo_folder, tmp_path, capsys):
    path = tmp_path / "sharp.safetensors"
    export_safetensors(model_of(replace(ONE, mode="clean")), path)
    argv = ["--image_folder", str(photo_folder), *SMALL, "--init_weights", str(path)]
    assert train_diffusion.main([*argv, "--checkpoint_dir", str(tmp_path)]) == 2
    assert "levels=(6.0,)" in capsys.readouterr().err
