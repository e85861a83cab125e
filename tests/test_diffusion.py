"""Tests of diffusion.py: the process against closed forms, training against what it must do."""

import math

import pytest
import torch

from bicubic import resize, upscale_image
from degradation import Degradation
from diffusion import (
    MODES,
    SCHEDULES,
    DiffusionModel,
    ObjectiveConfig,
    ResidualGenerator,
    measure_residual_std,
    resshift_scales,
    sigmoid_alpha_bar,
)
from engine.checkpoint import CheckpointError, load_checkpoint
from evaluation.validation import Validator
from imaging.files import write_image
from models import load_model
from network import Condition, Network
from samplers import Step, draw_noise, noise_stream, sample
from tests.networks import random_model, tiny_unet
from training import TrainingConfig
from unet import UNet, UNetConfig
from util import Crops, ImageDataset


def fixed(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- schedule


def test_the_sigmoid_schedule_is_symmetric_about_its_middle():
    alpha_bar = sigmoid_alpha_bar(1000)
    assert float(alpha_bar[499]) == pytest.approx(0.5)
    torch.testing.assert_close(alpha_bar[:499] + alpha_bar[500:999].flip(0), torch.ones(499).double())


def test_flow_is_the_straight_line_from_data_to_noise():
    signal_scale, noise_scale = SCHEDULES["flow"](8)
    assert noise_scale.tolist() == [(t + 1) / 8 for t in range(8)]
    assert (signal_scale + noise_scale).tolist() == [1.0] * 8


def test_resshift_moves_from_the_truth_to_the_upscaled_image_with_noise_kappa_sqrt_eta():
    signal_scale, noise_scale = resshift_scales(15, kappa=2.0, power=1.0)
    eta = 1 - signal_scale
    torch.testing.assert_close(noise_scale, 2 * eta.sqrt())
    assert float(eta[0].sqrt()) == pytest.approx(0.02)
    assert float(eta[-1]) == pytest.approx(0.999)
    growth = eta[1:] / eta[:-1]  # geometric
    torch.testing.assert_close(growth, growth[:1].expand(14))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_every_schedule_goes_from_signal_to_noise(schedule, timesteps):
    signal_scale, noise_scale = SCHEDULES[schedule](timesteps)
    assert signal_scale.dtype == noise_scale.dtype == torch.float64
    assert signal_scale.shape == noise_scale.shape == (timesteps,)
    assert (signal_scale.diff() < 0).all()
    assert (noise_scale.diff() > 0).all()
    assert noise_scale[0] > 0
    assert signal_scale[-1] >= 0


# ------------------------------------------------------------------------------------------------- targets


def test_v_is_the_rotation_of_salimans_and_ho():
    diffusion, t = DiffusionModel(), torch.tensor([250])
    clean, noise = fixed(1, 3, 4, 4), fixed(1, 3, 4, 4, seed=1)
    angle = math.acos(float(diffusion.signal_scale[250]))
    expected = math.cos(angle) * noise - math.sin(angle) * clean
    target = diffusion.target(clean, diffusion.q_sample(clean, t, noise), t)
    torch.testing.assert_close(target, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_target_as_output_gives_back_clean_at_every_timestep(mode, schedule):
    diffusion = DiffusionModel(mode=mode, schedule=schedule)
    t = torch.tensor([0, 1, 500, 998, 999])
    clean, noise = fixed(5, 3, 4, 4), fixed(5, 3, 4, 4, seed=1)
    noisy = diffusion.q_sample(clean, t, noise)
    output = diffusion.target(clean, noisy, t)
    torch.testing.assert_close(diffusion.clean_estimate(output, noisy, t), clean, atol=1e-5, rtol=0)


def test_the_loss_of_noise_is_the_squared_error_of_the_noise_that_the_output_stands_for():
    diffusion, clean, output = DiffusionModel(mode="noise"), fixed(3, 3, 4, 4), fixed(3, 3, 4, 4, seed=2)
    generator = torch.Generator().manual_seed(3)
    t = diffusion.draw_timesteps(3, generator)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = diffusion.q_sample(clean, t, noise)
    scales = (table[t][:, None, None, None] for table in (diffusion.signal_scale, diffusion.noise_scale))
    signal_scale, noise_scale = scales
    predicted = noise_scale * noisy + signal_scale * output
    losses = diffusion.loss(lambda *_: output, clean, None, generator.manual_seed(3))
    torch.testing.assert_close(losses, (predicted - noise).square().flatten(1).mean(1), rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_of_a_perfect_network_is_zero_and_of_a_silent_one_is_known(mode):
    diffusion = DiffusionModel(mode=mode)
    clean = fixed(16, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    perfect = diffusion.loss(lambda noisy, t, _: diffusion.target(clean, noisy, t), clean, None, generator)
    assert perfect.shape == (16,)
    assert perfect.max() < 1e-4
    silent = diffusion.loss(lambda noisy, t, context: torch.zeros_like(noisy), clean, None, generator)
    # noise: the input stands in for the noise, and is wrong by signal_scale v: E = mean(alpha_bar) = 1/2
    assert float(silent.mean()) == pytest.approx(0.5 if mode == "noise" else 1.0, abs=0.1)


@pytest.mark.parametrize("mean_only", [False, True])
def test_with_a_mean_the_diffusion_models_what_it_leaves_and_the_mean_has_its_absolute_error(mean_only):
    """The mean is off by 1/4 and the diffusion knows it: an error of 0 + 1/4, with a gradient of the mean."""
    objective = ObjectiveConfig(mean_only=mean_only)
    mean = torch.zeros(4, 3, 16, 16, requires_grad=True)
    crops = Crops(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8))
    clean = crops.sample(Degradation(scale=2.0)).residual / 0.1

    class Oracle(Network):
        def encode_context(self, condition):
            return None, mean + clean + 0.25

        def forward(self, noisy, t, context):
            assert not mean_only, "a first phase leaves the diffusion alone"
            return torch.full_like(noisy, -0.25)

    loss = DiffusionModel(mode="clean", objective=objective).restoration_loss(Degradation(scale=2.0))
    oracle = Oracle(UNetConfig())
    oracle.residual_std.fill_(0.1)
    losses = loss(oracle, crops, torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses, torch.full((4,), 0.25))
    losses.sum().backward()
    torch.testing.assert_close(mean.grad, torch.full_like(clean, 1 / clean[0].numel()))


def test_there_is_no_mean_to_train_alone_without_a_predictor():
    crops = Crops(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    loss = DiffusionModel(objective=ObjectiveConfig(mean_only=True)).restoration_loss(Degradation(scale=2.0))
    with pytest.raises(ValueError, match="mean_only"):
        loss(tiny_unet(), crops, torch.Generator())


def test_timesteps_cover_the_range_evenly():
    diffusion, generator = DiffusionModel(timesteps=50), torch.Generator().manual_seed(0)
    seen = [diffusion.draw_timesteps(8, generator) for _ in range(200)]
    counts = torch.bincount(torch.cat(seen), minlength=50)
    assert counts.min() > 10
    assert counts.max() < 60
    spread = torch.stack([t.sort().values.diff() for t in seen])
    assert spread.max() <= 8  # 50 timesteps over 8 samples: neighbours are 6 or 7 apart, wrapped once


# ------------------------------------------------------------------------------------------------- training


SMALL = {"base_dim": 8, "dim_mults": (1, 2), "context_dim": 16, "blocks_per_level": 1}


@pytest.fixture(scope="module")
def trained(photo_folder, tmp_path_factory):
    """The files of a run, the signal that ended it, its dataset and its folder."""
    torch.manual_seed(0)
    folder, dataset = tmp_path_factory.mktemp("trained"), ImageDataset(photo_folder, 32, 2)
    lengths = {"max_steps": 90, "warmup_steps": 5, "validate_every": 30, "save_every": 30}
    config = TrainingConfig(batch_size=6, learning_rate=5e-3, ema_decay=0.9, **lengths)
    diffusion, places = DiffusionModel(), {"checkpoint_dir": folder / "run", "log_dir": folder / "logs"}
    validate = Validator(diffusion, ImageDataset(photo_folder, 32, 2, train=False))
    run, received = diffusion.train(UNet(**SMALL), dataset, config, validate=validate, **places)
    return run, received, dataset, folder


def nearest(image, scale):
    return image.repeat_interleave(int(scale), -1).repeat_interleave(int(scale), -2)


@pytest.mark.parametrize(
    ("scale", "upscale_function", "named"), [(2.0, nearest, "nearest"), (4.0, upscale_image, "by 4, .*by 2")]
)
def test_what_no_checkpoint_records_and_another_scale_are_not_trained(
    photo_folder, tmp_path, scale, upscale_function, named
):
    dataset = ImageDataset(photo_folder, 32, 2, upscale_function)
    places = {"checkpoint_dir": tmp_path / "run", "log_dir": tmp_path / "logs"}
    with pytest.raises(ValueError, match=named):
        DiffusionModel().train(tiny_unet(scale=scale), dataset, TrainingConfig(max_steps=1), **places)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_beats_bicubic(trained, photo_folder):
    run, received, dataset, _ = trained
    network = load_model(run.best).network
    assert float(network.residual_std) == pytest.approx(measure_residual_std(dataset), rel=1e-6)
    validation = ImageDataset(photo_folder, 32, 2, train=False)
    result = Validator(DiffusionModel(), validation)(network)
    assert received is None
    assert result.scalars["psnr_over_bicubic"] > 0.3
    assert result.score == pytest.approx(load_checkpoint(run.best)["best_score"], abs=1e-4)


@pytest.mark.slow
def test_tensorboard_shows_what_a_person_looks_for(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[3] / "logs")).Reload()
    curves = {f"train/{name}" for name in ("loss", "learning_rate", "gradient_norm", "images_per_second")}
    assert {*curves, "validation/psnr", "validation/ssim"} <= set(events.Tags()["scalars"])
    assert all(0 < event.value < 1 for event in events.Scalars("train/share_waiting_for_data"))
    assert set(events.Tags()["images"]) == {
        "validation/low_bicubic_mean_original",
        "validation/low_bicubic_sample_original",
    }
    assert [event.step for event in events.Scalars("validation/psnr")] == [30, 60, 90]
    assert "configuration/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
def test_the_mission_s_example_runs(trained):
    unet = UNet(in_channels=3, out_channels=3, **SMALL)
    helper = DiffusionModel(device="cpu", mode="v_prediction")
    helper.load_model_weights(unet, trained[0].best, verbose=True)
    unet.eval()
    generator = ResidualGenerator(
        img_channels=3, img_size=64, device="cpu", num_train_timesteps=1000, predict_mode="v_prediction"
    )
    with torch.no_grad():
        image = generator.generate_images(
            model=unet, low_resolution_image=torch.zeros(1, 3, 32, 32), num_images=1, num_inference_steps=5
        )
    assert image.shape == (1, 3, 64, 64)
    assert image.min() >= 0
    assert image.max() <= 1


@pytest.mark.slow
def test_weights_of_another_mode_are_refused(trained):
    unet = UNet(**SMALL)
    with pytest.raises(CheckpointError, match=r"v_prediction.*noise"):
        DiffusionModel(mode="noise").load_model_weights(unet, trained[0].best)
    with pytest.raises(CheckpointError, match=r"1000.*500"):
        DiffusionModel(500).load_model_weights(unet, trained[0].best)


def test_a_blank_folder_has_nothing_to_learn(tmp_path):
    write_image(tmp_path / "blank.png", torch.full((32, 32, 3), 128, dtype=torch.uint8).numpy())
    with pytest.raises(ValueError, match="bicubic"):
        measure_residual_std(ImageDataset(tmp_path, 32, 4))


# ------------------------------------------------------------------------------------------------- generator


def test_what_the_mean_leaves_is_sampled_and_both_are_added_to_the_upscaled_images():
    """As training defines it: clean = residual / residual_std - mean."""
    network = random_model(scale=2.0, predictor_blocks=2, conditioning="concat").network
    generator, low_res = ResidualGenerator(), fixed(2, 3, 10, 13).clamp(-1, 1)
    upscaled = resize(low_res, scale=2).clamp(-1, 1)
    context, mean = network.encode_context(Condition(upscaled))
    bounds = [((edge - upscaled) / network.residual_std - mean) for edge in (-1, 1)]

    def denoise(noisy, timestep):
        t = torch.full((2,), timestep)
        return generator.diffusion.clean_estimate(network(noisy, t, context), noisy, t).clamp(*bounds)

    noise = draw_noise([noise_stream(5, 0) for _ in low_res], 3, 20, 26)
    with torch.inference_mode():
        for steps in (1, 4):
            *_, left = sample(generator.plan(steps), noise, denoise, Step.advance)
            residuals = generator.generate_residuals(network, low_res, 2, steps, seed=5)[::2]
            torch.testing.assert_close(residuals, (mean + left) * network.residual_std, atol=1e-4, rtol=0)


def test_samples_differ_by_number_seed_and_call():
    unet, generator, low_res = tiny_unet(), ResidualGenerator(), fixed(1, 3, 10, 13).clamp(-1, 1)
    images = [generator.generate_images(unet, low_res, 2, 3, seed=seed) for seed in (5, 6, None, None)]
    assert len({image.numpy().tobytes() for image in torch.cat(images)}) == 8


@pytest.mark.parametrize(
    ("settings", "network", "how", "message"),
    [
        ({}, {}, {"low_resolution_image": torch.zeros(3, 8, 8)}, r"\(3, 8, 8\)"),
        ({}, {}, {"low_resolution_image": torch.zeros(1, 1, 8, 8)}, r"\(1, 1, 8, 8\)"),
        ({}, {}, {"low_resolution_image": torch.full((1, 3, 8, 8), 200.0)}, r"\[-1, 1\]"),
        ({}, {"residual_std": 0.0}, {}, "residual_std"),
        ({}, {}, {"num_images": 0}, "num_images is 0"),
        ({}, {}, {"num_inference_steps": 2.5}, r"2\.5"),
        ({"guidance": 2.0}, {}, {}, r"2\.0"),
        ({"scheduler": "euler"}, {}, {}, "euler"),
    ],
)
def test_what_cannot_be_generated_is_refused(settings, network, how, message):
    inputs = {"low_resolution_image": torch.zeros(1, 3, 8, 8), **how}
    with pytest.raises(ValueError, match=message):
        ResidualGenerator(**settings).generate_images(tiny_unet(**network), **inputs)
