"""Tests of diffusion.py: the process against closed forms, training against what it must do."""

import math

import pytest
import torch

from bicubic import resize
from diffusion import DiffusionModel, ResidualGenerator, measure_residual_std
from engine.checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint
from evaluation import metrics
from evaluation.validation import Validator, comparison_grid
from samplers import SCHEDULERS
from schedules import (
    ProcessConfig,
    cosine_alpha_bar,
    linear_alpha_bar,
    sigmoid_alpha_bar,
    timestep_quantile,
    zero_terminal_alpha_bar,
)
from tests.networks import tiny_unet
from training import TrainingConfig, new_state
from unet import UNet
from util import ImageDataset, Sample

MODES = ["v_prediction", "noise", "clean"]
DENSITIES = ["uniform", "logit_normal", "high_noise"]


def fixed(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- schedule


def test_the_cosine_schedule_is_equation_17():
    alpha_bar = cosine_alpha_bar(1000)

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 500, 990):
        assert float(alpha_bar[t]) == pytest.approx(f(t + 1) / f(0), rel=1e-12)


def test_the_schedule_falls_strictly_from_nearly_one_to_nearly_zero():
    alpha_bar = cosine_alpha_bar(1000)
    assert alpha_bar.dtype == torch.float64
    assert (alpha_bar.diff() < 0).all()
    assert alpha_bar[0] > 0.9999
    assert 4e-5 < alpha_bar[-1].sqrt() < 6e-5


@pytest.mark.parametrize("timesteps", [1, 7, 4000])
def test_no_beta_exceeds_the_limit(timesteps):
    alpha_bar = cosine_alpha_bar(timesteps)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    assert (1 - alpha_bar / previous).max() <= 0.999 + 1e-12
    assert len(alpha_bar) == timesteps


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"timesteps": 0}, "timesteps"), ({"mode": "epsilon"}, "mode"), ({"schedule": "square"}, "schedule")],
)
def test_an_unknown_process_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ProcessConfig(**settings)


def test_the_linear_schedule_has_the_betas_of_ddpm():
    alpha_bar = linear_alpha_bar(1000)
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    assert float(betas[0]) == pytest.approx(1e-4)
    assert float(betas[-1]) == pytest.approx(0.02)
    torch.testing.assert_close(betas.diff(), betas.diff()[:1].expand(999), atol=1e-12, rtol=0)
    log_end = float(alpha_bar[-1].log())
    assert float(linear_alpha_bar(100)[-1].log()) == pytest.approx(log_end, rel=0.1)


def test_the_sigmoid_schedule_is_symmetric_about_its_middle():
    alpha_bar = sigmoid_alpha_bar(1000)
    assert float(alpha_bar[499]) == pytest.approx(0.5)
    torch.testing.assert_close(alpha_bar[:499] + alpha_bar[500:999].flip(0), torch.ones(499).double())


def test_zero_terminal_snr_ends_in_nothing_but_noise_and_starts_as_the_linear_one():
    alpha_bar, linear = zero_terminal_alpha_bar(1000), linear_alpha_bar(1000)
    assert float(alpha_bar[-1]) == 0
    assert float(alpha_bar[0]) == pytest.approx(float(linear[0]), rel=1e-12)
    ratio = alpha_bar.sqrt().diff() / linear.sqrt().diff()  # a shift and a scale, nothing else
    torch.testing.assert_close(ratio, ratio[:1].expand(999))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "sigmoid", "zero_terminal_snr"])
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_every_schedule_falls_within_0_and_1(schedule, timesteps):
    alpha_bar = DiffusionModel(timesteps, schedule=schedule).alpha_bar
    assert (alpha_bar.diff() < 0).all()
    assert alpha_bar[0] < 1
    assert alpha_bar[-1] >= 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", ["cosine", "zero_terminal_snr"])
def test_min_snr_weighs_errors_of_the_clean_estimate_by_the_bounded_snr(mode, schedule):
    diffusion = DiffusionModel(mode=mode, schedule=schedule, min_snr_gamma=5.0)
    t = torch.tensor([5, 200, 500, 900])
    clean, wrong = fixed(4, 3, 4, 4), fixed(4, 3, 4, 4, seed=2)

    def off_by_wrong(noisy, t, context):
        """The output whose clean estimate is clean + wrong."""
        if mode == "clean":
            return clean + wrong
        signal_scale, noise_scale = diffusion.scales(t)
        return (signal_scale * noisy - clean - wrong) / noise_scale

    weighted = diffusion.loss_at(t, off_by_wrong, clean, None) * diffusion.loss_weight(t)
    expected = diffusion.snr[t].clamp(max=5.0) * wrong.square().flatten(1).mean(1)
    torch.testing.assert_close(weighted, expected, rtol=2e-3, atol=0)


def test_a_process_survives_the_journey_through_a_dict():
    process = ProcessConfig(100, "noise", "sigmoid")
    assert ProcessConfig.from_dict(process.to_dict()) == process
    with pytest.raises(ValueError, match="another version"):
        ProcessConfig.from_dict({"timesteps": 100})


def test_an_impossible_gamma_is_refused():
    with pytest.raises(ValueError, match="min_snr_gamma"):
        DiffusionModel(min_snr_gamma=0.0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "sigmoid", "zero_terminal_snr"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_process_can_be_sampled(schedule, mode, scheduler):
    process = ProcessConfig(50, mode, schedule)
    generator = ResidualGenerator.of(process, "cpu", None, scheduler)
    assert generator.diffusion.process == process
    images = generator.generate_images(tiny_unet(), fixed(1, 3, 8, 8).clamp(-1, 1), 1, 4, seed=0)
    assert torch.isfinite(images).all()


# ------------------------------------------------------------------------------------------------- targets


def test_noisy_images_keep_unit_variance_and_the_right_signal():
    diffusion, clean, noise = DiffusionModel(), fixed(64, 3, 16, 16), fixed(64, 3, 16, 16, seed=1)
    for timestep in (0, 300, 999):
        noisy = diffusion.q_sample(clean, torch.full((64,), timestep), noise)
        assert float(noisy.var()) == pytest.approx(1, abs=0.03)
        correlation = float((noisy * clean).mean())
        assert correlation == pytest.approx(float(diffusion.signal_scale[timestep]), abs=0.03)


def test_v_is_the_rotation_of_salimans_and_ho():
    diffusion, t = DiffusionModel(), torch.tensor([250])
    clean, noise = fixed(1, 3, 4, 4), fixed(1, 3, 4, 4, seed=1)
    angle = math.acos(float(diffusion.alpha_bar[250].sqrt()))
    expected = math.cos(angle) * noise - math.sin(angle) * clean
    torch.testing.assert_close(diffusion.target(clean, noise, t), expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_perfect_output_gives_back_clean_and_noise_at_every_timestep(mode):
    diffusion = DiffusionModel(mode=mode)
    t = torch.tensor([0, 1, 500, 998, 999])
    clean, noise = fixed(5, 3, 4, 4), fixed(5, 3, 4, 4, seed=1)
    noisy = diffusion.q_sample(clean, t, noise)
    v = DiffusionModel().target(clean, noise, t)
    output = clean if mode == "clean" else v  # what the network has to put out, see DiffusionModel
    torch.testing.assert_close(diffusion.clean_estimate(output, noisy, t), clean, atol=1e-5, rtol=0)
    tolerance = 2e-4 if mode == "clean" else 1e-5  # noise of t = 0 is divided by its scale, 0.006
    torch.testing.assert_close(diffusion.noise_estimate(output, noisy, t), noise, atol=tolerance, rtol=0)
    torch.testing.assert_close(
        diffusion.prediction(output, noisy, t), diffusion.target(clean, noise, t), atol=1e-5, rtol=0
    )


def test_an_error_of_the_network_stays_bounded_in_noise_mode():
    diffusion, t = DiffusionModel(mode="noise"), torch.tensor([999])
    noisy = fixed(1, 3, 4, 4)
    error = diffusion.clean_estimate(torch.full_like(noisy, 0.1), noisy, t) - diffusion.clean_estimate(
        torch.zeros_like(noisy), noisy, t
    )
    assert error.abs().max() < 0.11


# ------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_of_a_perfect_network_is_zero_and_of_a_silent_one_is_known(mode):
    diffusion = DiffusionModel(mode=mode)
    clean = fixed(16, 3, 8, 8)

    def perfect(noisy, t, context):
        if mode == "clean":
            return clean
        signal_scale, noise_scale = diffusion.scales(t)
        noise = (noisy - signal_scale * clean) / noise_scale
        return signal_scale * noise - noise_scale * clean

    generator = torch.Generator().manual_seed(0)
    assert diffusion.loss(perfect, clean, None, generator).shape == (16,)
    assert diffusion.loss(perfect, clean, None, generator).max() < 1e-4
    silent = diffusion.loss(lambda noisy, t, context: torch.zeros_like(noisy), clean, None, generator)
    # noise: the input stands in for the noise, and is wrong by signal_scale v: E = mean(alpha_bar) = 1/2
    assert float(silent.mean()) == pytest.approx(0.5 if mode == "noise" else 1.0, abs=0.1)


def test_timesteps_cover_the_range_evenly():
    seen = []
    diffusion = DiffusionModel(timesteps=50)

    def remember(noisy, t, context):
        seen.append(t)
        return noisy

    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        diffusion.loss(remember, torch.zeros(8, 1, 2, 2), None, generator)
    counts = torch.bincount(torch.cat(seen), minlength=50)
    assert counts.min() > 10
    assert counts.max() < 60
    spread = torch.stack([t.sort().values.diff() for t in seen])
    assert spread.max() <= 8  # 50 timesteps over 8 samples: neighbours are 6 or 7 apart, wrapped once


@pytest.mark.parametrize("density", DENSITIES)
def test_timesteps_have_their_density(density):
    """The share of samples below a timestep, against the closed form of each distribution function."""
    below = {
        "uniform": lambda u: u,
        "logit_normal": lambda u: 0.5 * (1 + math.erf(math.log(u / (1 - u)) / math.sqrt(2))),
        "high_noise": lambda u: u / (3 - 2 * u),
    }[density]
    seen = []

    def remember(noisy, t, context):
        seen.append(t)
        return noisy

    diffusion = DiffusionModel(timestep_density=density)
    for seed in range(20):
        diffusion.loss(remember, torch.zeros(200, 1, 1, 1), None, torch.Generator().manual_seed(seed))
    t = torch.cat(seen)
    assert int(t.min()) >= 0
    assert int(t.max()) < 1000
    for edge in (0.05, 0.3, 0.5, 0.8, 0.95):
        assert float((t < 1000 * edge).float().mean()) == pytest.approx(below(edge), abs=0.01)


@pytest.mark.parametrize("density", DENSITIES)
def test_the_ends_of_every_density_are_timesteps(density):
    shares = torch.tensor([0.0, 1 - 2**-24])
    assert (timestep_quantile(shares, density) >= 0).all()
    assert (timestep_quantile(shares, density) <= 1).all()


def test_an_unknown_density_is_refused():
    with pytest.raises(ValueError, match=r"timestep_density must be one of .* not 'square'"):
        DiffusionModel(timestep_density="square")


def test_the_loss_is_a_function_of_the_generator():
    diffusion, clean = DiffusionModel(), fixed(4, 3, 8, 8)
    losses = [
        diffusion.loss(lambda noisy, t, c: noisy, clean, None, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


# ------------------------------------------------------------------------------------------------- training


def train_small(photo_folder, folder, mode="v_prediction"):
    torch.manual_seed(0)
    dataset = ImageDataset(photo_folder, 32, 2)
    validation = ImageDataset(photo_folder, 32, 2, train=False)
    config = TrainingConfig(
        max_steps=240,
        batch_size=6,
        learning_rate=3e-3,
        warmup_steps=5,
        ema_decay=0.9,
        validate_every=80,
        save_every=80,
    )
    unet = UNet(base_dim=8, dim_mults=(1, 2), context_dim=16)
    diffusion = DiffusionModel(mode=mode)
    run, received = diffusion.train(
        unet,
        dataset,
        config,
        validate=Validator(diffusion, validation),
        checkpoint_dir=folder / "run",
        log_dir=folder / "logs",
        progress=False,
    )
    return run, received, unet, dataset, folder


@pytest.fixture(scope="module")
def trained(photo_folder, tmp_path_factory):
    return train_small(photo_folder, tmp_path_factory.mktemp("trained"))


def restored_psnr(path, mode, photo_folder, steps):
    """Mean PSNR of the training images restored with DDIM."""
    samples = [ImageDataset(photo_folder, 32, 2, train=False)[index] for index in range(6)]
    low_res = torch.stack([sample.low_res for sample in samples])
    truth = torch.stack([sample.original for sample in samples]) / 2 + 0.5
    generator = ResidualGenerator(predict_mode=mode, scheduler="ddim")
    images = generator.generate_images(load_model(path).unet, low_res, 1, steps, seed=0)
    return float(metrics.psnr(images, truth, metrics.Protocol(crop=2)).mean())


@pytest.mark.parametrize("mode", ["noise", "clean"])
def test_every_mode_restores_as_well_as_v_prediction(trained, photo_folder, tmp_path, mode):
    """The naive sampler of noise prediction ends near 8 dB here, whatever the network."""
    run = train_small(photo_folder, tmp_path, mode)[0]
    ours = restored_psnr(run.last, mode, photo_folder, 50)
    theirs = restored_psnr(trained[0].last, "v_prediction", photo_folder, 50)
    assert theirs > 20
    assert ours > theirs - 3


def test_the_regression_loss_is_the_absolute_error():
    clean = fixed(2, 3, 4, 4)

    def denoiser(noisy, t, context):
        assert not noisy.any()
        assert t.tolist() == [999, 999]
        return torch.full_like(noisy, 0.5)

    losses = DiffusionModel(mode="regression").loss(denoiser, clean, None)
    torch.testing.assert_close(losses, (clean - 0.5).abs().mean(dim=(1, 2, 3)))


def test_training_beats_bicubic(trained, photo_folder):
    run, received, _, _, _ = trained
    validation = ImageDataset(photo_folder, 32, 2, train=False)
    result = Validator(DiffusionModel(), validation)(load_model(run.best).unet)
    assert received is None
    assert result.scalars["psnr_over_bicubic"] > 0.3
    assert result.psnr == pytest.approx(load_checkpoint(run.best)["best_psnr"], abs=1e-4)


def test_training_leaves_the_named_checkpoints(trained):
    run, _, _, _, _ = trained
    assert run.best.name == "diffusion_model_v_prediction_best.pth"
    assert run.last.name == "diffusion_model_v_prediction_last.pth"
    assert load_checkpoint(run.last)["step"] == 240


def test_the_network_carries_its_scale_and_residual_std(trained):
    run, _, unet, dataset, _ = trained
    loaded = load_model(run.best).unet
    assert float(loaded.scale) == 2
    assert float(loaded.residual_std) == pytest.approx(measure_residual_std(dataset), rel=1e-6)
    assert float(unet.residual_std) == float(loaded.residual_std)


def test_tensorboard_shows_what_a_person_looks_for(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[4] / "logs"), {"histograms": 0}).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/gradient_norm", "train/images_per_second"} <= scalars
    waited = [event.value for event in events.Scalars("train/share_waiting_for_data")]
    assert all(0 < share < 1 for share in waited)
    assert {"validation/psnr", "validation/ssim"} <= scalars
    assert set(events.Tags()["images"]) == {
        "validation/low_bicubic_mean_original",
        "validation/low_bicubic_sample_original",
    }
    assert [event.step for event in events.Scalars("validation/psnr")] == [80, 160, 240]
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses[-1] < losses[0]
    assert "configuration/text_summary" in events.Tags()["tensors"]
    assert [event.value for event in events.Scalars("final/best_psnr")] == pytest.approx(
        [load_checkpoint(trained[0].last)["best_psnr"]]
    )
    assert len(events.Histograms("validation/loss_by_timestep")) == 3


def test_the_loss_is_shown_by_timestep(trained, photo_folder):
    run, _, _, _, _ = trained
    validation = ImageDataset(photo_folder, 32, 2, train=False)
    edges, heights = Validator(DiffusionModel(), validation)(load_model(run.best).unet).curves[
        "loss_by_timestep"
    ]
    assert edges[-1] == 1000
    assert len(heights) == len(edges) == 20
    assert heights[0] > heights[10] > 0  # v of a nearly clean image is its noise, which cannot be seen


def test_the_mission_s_example_runs(trained):
    run, _, _, _, _ = trained
    unet = UNet(in_channels=3, out_channels=3, base_dim=8, dim_mults=(1, 2), context_dim=16)
    helper = DiffusionModel(device="cpu", mode="v_prediction")
    helper.load_model_weights(unet, run.best, verbose=True)
    unet.eval()
    generator = ResidualGenerator(
        img_channels=3, img_size=64, device="cpu", num_train_timesteps=1000, predict_mode="v_prediction"
    )
    low_res = fixed(1, 3, 32, 32).clamp(-1, 1)
    with torch.no_grad():
        image = generator.generate_images(
            model=unet, low_resolution_image=low_res, num_images=1, num_inference_steps=5
        )
    assert image.shape == (1, 3, 64, 64)
    assert image.min() >= 0
    assert image.max() <= 1


def test_weights_of_another_mode_are_refused(trained):
    unet = UNet(base_dim=8, dim_mults=(1, 2), context_dim=16)
    with pytest.raises(CheckpointError, match=r"mode v_prediction, not noise"):
        DiffusionModel(mode="noise").load_model_weights(unet, trained[0].best)
    with pytest.raises(CheckpointError, match=r"timesteps 1000, not 500"):
        DiffusionModel(500).load_model_weights(unet, trained[0].best)


def test_resuming_restores_the_whole_state(trained):
    run, _, unet, _, _ = trained
    config = TrainingConfig(max_steps=60)
    state = new_state(UNet(base_dim=8, dim_mults=(1, 2), context_dim=16), config)
    DiffusionModel().load_checkpoint_for_resume(state, run.last)
    assert state.step == 240
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, unet.state_dict()[name])


def test_a_blank_folder_has_nothing_to_learn(tmp_path):
    from imaging.files import write_image

    write_image(tmp_path / "blank.png", torch.full((32, 32, 3), 128, dtype=torch.uint8).numpy())
    with pytest.raises(ValueError, match="nothing to learn"):
        measure_residual_std(ImageDataset(tmp_path, 32, 4))


# ------------------------------------------------------------------------------------------------- generator


def test_the_residual_is_what_is_added_to_the_upscaled_image():
    unet, generator = tiny_unet(), ResidualGenerator()
    low_res = fixed(2, 3, 10, 13).clamp(-1, 1)
    residuals = generator.generate_residuals(unet, low_res, 2, 3, seed=5)
    images = generator.generate_images(unet, low_res, 2, 3, seed=5)
    upscaled = resize(low_res, scale=2).clamp(-1, 1)
    expected = (upscaled.repeat_interleave(2, 0) + residuals).clamp(-1, 1) / 2 + 0.5
    assert images.shape == (4, 3, 20, 26)
    torch.testing.assert_close(images, expected)


def test_seeds_repeat_and_samples_differ():
    unet, generator = tiny_unet(), ResidualGenerator()
    low_res = fixed(1, 3, 10, 13).clamp(-1, 1)
    first = generator.generate_images(unet, low_res, 2, 3, seed=5)
    assert torch.equal(first, generator.generate_images(unet, low_res, 2, 3, seed=5))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, generator.generate_images(unet, low_res, 2, 3, seed=6))
    assert not torch.equal(
        generator.generate_images(unet, low_res, 1, 3), generator.generate_images(unet, low_res, 1, 3)
    )


def test_an_image_does_not_depend_on_its_neighbours_in_the_batch():
    unet, generator = tiny_unet(), ResidualGenerator()
    low_res = fixed(3, 3, 12, 12).clamp(-1, 1)
    together = generator.generate_images(unet, low_res, 1, 4, seed=1)
    alone = generator.generate_images(unet, low_res[1:2], 1, 4, seed=1)
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("low_res", "message"),
    [
        (torch.zeros(3, 8, 8), r"\(B, 3, h, w\)"),
        (torch.zeros(1, 1, 8, 8), r"\(B, 3, h, w\)"),
        (torch.full((1, 3, 8, 8), 200.0), r"\[-1, 1\]"),
    ],
)
def test_a_wrong_input_is_refused(low_res, message):
    with pytest.raises(ValueError, match=message):
        ResidualGenerator().generate_images(tiny_unet(), low_res, 1, 2)


def test_an_untrained_network_is_refused():
    with pytest.raises(ValueError, match="residual_std"):
        ResidualGenerator().generate_images(tiny_unet(residual_std=0.0), torch.zeros(1, 3, 8, 8), 1, 2)


def test_the_comparison_grid_has_four_columns():
    low_res, image = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8)
    grid = comparison_grid(Sample(low_res, image, image, image), image / 2 + 0.5)
    assert grid.shape == (3, 2 * 12 + 4, 4 * 12 + 4)


def test_a_checkpoint_without_process_cannot_be_resumed(tmp_path):
    save_checkpoint(tmp_path / "bare.pth", {"step": 1})
    state = new_state(tiny_unet(), TrainingConfig(max_steps=1))
    with pytest.raises(CheckpointError, match="timesteps None"):
        DiffusionModel().load_checkpoint_for_resume(state, tmp_path / "bare.pth")
