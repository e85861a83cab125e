"""Samplers against the closed form of a Gaussian, against diffusers, and against their own definition.

The analytic denoiser of N(mu, s^2) is affine and so is every sampler, so mean and variance of what comes out
are followed exactly: a state is a vector of its parts of the first noise, of 1, and of each later noise.
"""

from collections import deque

import pytest
import torch
from diffusers.schedulers import DDIMScheduler, DDPMScheduler
from schedules import cosine_alpha_bar

from samplers import (
    DEFAULT_SCHEDULER,
    HISTORY,
    NOISE_ROWS,
    SCHEDULERS,
    Step,
    build_scheduler,
    draw_noise,
    log_snr_timesteps,
    trailing_timesteps,
)

T = 1000
ALPHA_BAR = cosine_alpha_bar(T)
DEVIATIONS = (0.1, 0.2, 0.4, 1.0)
MEAN = 0.3


def gaussian_moments(steps, deviation, alpha_bar=ALPHA_BAR):
    """Mean, and variance over the true one, of samples from N(MEAN, deviation^2) with its exact denoiser."""
    state = torch.zeros(2 + sum(step.noise_weight > 0 for step in steps), dtype=torch.float64)
    state[0], fresh, cleans = 1, 2, []
    for step in steps:
        alpha_bar_t = float(alpha_bar[step.timestep])
        gain = deviation**2 * alpha_bar_t**0.5 / (alpha_bar_t * deviation**2 + 1 - alpha_bar_t)
        clean = gain * state
        clean[1] += (1 - gain * alpha_bar_t**0.5) * MEAN
        cleans.insert(0, clean)
        noise = torch.zeros_like(state)
        if step.noise_weight > 0:
            noise[fresh] = 1
            fresh += 1
        state = step.advance(state, cleans, noise)
    mean, state[1] = float(state[1]), 0
    return mean, float(state @ state) / deviation**2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_mean_and_variance_of_a_gaussian_converge(name):
    for deviation in DEVIATIONS:
        counts = (10, 30, 100, 300, T)
        moments = [gaussian_moments(build_scheduler(name, ALPHA_BAR).steps(n), deviation) for n in counts]
        assert all(abs(mean - MEAN) < 1e-4 for mean, _ in moments)
        errors = [abs(variance - 1) for _, variance in moments]
        assert errors[-1] < (0.05 if name == "ddpm" else 0.02)
        assert errors[3] < errors[1] + 1e-3  # small errors may change sign on the way
        assert errors[1] < max(errors[0], 0.07)
        assert errors[4] <= errors[3] + 1e-3
        if name not in ("ddim", "ddpm"):  # second order: soon there
            assert max(errors[2:]) < 0.04


def test_the_default_keeps_the_variance_within_5_percent_at_10_steps_and_ddim_does_not():
    def kept(name, deviations=(0.2, 0.4, 1, 2, 4)):
        steps = build_scheduler(name, ALPHA_BAR).steps(10)
        return [gaussian_moments(steps, deviation)[1] for deviation in deviations]

    assert kept(DEFAULT_SCHEDULER, (0.1,)) == pytest.approx([0.79], abs=0.01)  # below two grey levels
    assert kept(DEFAULT_SCHEDULER) == pytest.approx([1] * 5, abs=0.05)
    assert kept("dpm++") == pytest.approx([1] * 5, abs=0.07)
    assert kept("heun") == pytest.approx([1] * 5, abs=0.16)
    assert kept("ddim") == pytest.approx([0.49, 0.69, 0.78, 0.73, 0.59], abs=0.01)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_step_is_the_clean_estimate_at_the_noisiest_timestep(name):
    (step,) = build_scheduler(name, ALPHA_BAR).steps(1)
    assert step.timestep == T - 1
    noisy, clean = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(step.advance(noisy, [clean]), clean)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("total", [1, 2, 7, 60])
def test_every_step_count_ends_in_its_last_clean_estimate(name, total):
    alpha_bar = cosine_alpha_bar(total)
    for count in range(1, total + 1):
        steps = build_scheduler(name, alpha_bar).steps(count)
        last = steps[-1]
        assert last.noisy_weight == pytest.approx(0, abs=1e-6)
        assert last.clean_weights == pytest.approx((1.0,), abs=1e-6)
        assert last.noise_weight == 0
        assert steps[0].timestep == total - 1
        assert all(len(step.clean_weights) <= HISTORY for step in steps)
        timesteps = [step.timestep for step in steps]
        assert timesteps == sorted(timesteps, reverse=True)
        expected = 2 * count - 2 if name == "heun" and count > 1 else count
        assert len(steps) == expected
        assert len(set(timesteps)) == count


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_true_clean_image_keeps_the_noise_level_of_each_timestep(name):
    """Then noisy_k is signal_scale clean + noise_scale noise, exactly."""
    for count in (2, 5, 13, 100):
        state = torch.tensor([1.0, 0.0], dtype=torch.float64)  # parts of the noise and of the clean image
        clean = torch.tensor([0.0, 1.0], dtype=torch.float64)
        for step in build_scheduler(name, ALPHA_BAR).steps(count):
            alpha_bar_t = float(ALPHA_BAR[step.timestep])
            assert float(state[1]) == pytest.approx(alpha_bar_t**0.5, abs=1e-4)
            if name != "ddpm":
                assert float(state[0]) == pytest.approx((1 - alpha_bar_t) ** 0.5, abs=1e-4)
            state = step.advance(state, [clean] * HISTORY, torch.zeros(2, dtype=torch.float64))
        assert state.tolist() == pytest.approx([0, 1], abs=1e-5)


def test_ddim_visits_exactly_its_own_list_at_every_step_count():
    sampler = build_scheduler("ddim", ALPHA_BAR)
    for count in [*range(1, 40), 333, 999, T]:
        timesteps = [step.timestep for step in sampler.steps(count)]
        assert timesteps == trailing_timesteps(T, count)
        assert len(set(timesteps)) == count


@pytest.mark.parametrize("count", [1, 2, 4, 5, 10, 50, 125, T])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_that_of_diffusers_where_the_step_count_divides_t(count, eta):
    before = torch.cat([ALPHA_BAR.new_ones(1), ALPHA_BAR[:-1]])
    reference = DDIMScheduler(
        num_train_timesteps=T,
        trained_betas=(1 - ALPHA_BAR / before).tolist(),
        clip_sample=False,
        prediction_type="sample",
        timestep_spacing="trailing",
    )
    reference.alphas_cumprod = ALPHA_BAR
    reference.set_timesteps(count)
    steps = build_scheduler("ddim", ALPHA_BAR).steps(count, eta)
    assert [step.timestep for step in steps] == reference.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    noisy, clean, noise = torch.randn(3, 1, 3, 8, 8, generator=generator, dtype=torch.float64)
    for step in steps:
        ours = step.advance(noisy, [clean], noise)
        theirs = reference.step(clean, step.timestep, noisy, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        noisy = ours


@pytest.mark.parametrize("count", [1, 3, 10, 17])
def test_ddpm_has_mean_and_variance_of_diffusers_ddpm(count):
    timesteps = trailing_timesteps(T, count)
    kept = ALPHA_BAR[timesteps[::-1]]
    betas = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
    reference = DDPMScheduler(
        num_train_timesteps=count,
        trained_betas=betas.tolist(),
        clip_sample=False,
        prediction_type="sample",
        timestep_spacing="trailing",
    )
    reference.set_timesteps(count)
    generator = torch.Generator().manual_seed(0)
    noisy, clean = torch.randn(2, 1, 3, 128, 128, generator=generator, dtype=torch.float64)
    for step, own in zip(build_scheduler("ddpm", ALPHA_BAR).steps(count), reference.timesteps, strict=True):
        seeded = torch.Generator().manual_seed(1)
        drawn = reference.step(clean, int(own), noisy, generator=seeded).prev_sample
        mean = step.advance(noisy, [clean], torch.zeros_like(noisy))
        assert float((drawn - mean).mean()) == pytest.approx(0, abs=0.02)
        assert float((drawn - mean).std()) == pytest.approx(step.noise_weight, rel=0.02, abs=1e-6)


def test_log_snr_is_evenly_spaced():
    timesteps = log_snr_timesteps(ALPHA_BAR.tolist(), 10)
    sigma = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()[timesteps]
    assert timesteps[0] == T - 1
    assert float(sigma[1]) == pytest.approx(14, rel=0.05)
    assert float(sigma[-1]) == pytest.approx(0.05, rel=0.1)
    gaps = sigma[1:].log().diff()
    assert float(gaps.max() - gaps.min()) < 0.1 * float(gaps.abs().mean())


@pytest.mark.parametrize("total", [1, 2, 10, 97])
def test_timestep_lists_fall_and_stay_in_range_at_every_step_count(total):
    alpha_bar = cosine_alpha_bar(total).tolist()
    for count in range(1, total + 1):
        for timesteps in (trailing_timesteps(total, count), log_snr_timesteps(alpha_bar, count)):
            assert len(timesteps) == count
            assert timesteps[0] == total - 1
            assert timesteps == sorted(set(timesteps), reverse=True)
            assert timesteps[-1] >= 0


def test_what_is_out_of_range_is_refused_by_name():
    with pytest.raises(ValueError, match="'euler'"):
        build_scheduler("euler", ALPHA_BAR)
    with pytest.raises(ValueError, match="between 1 and 1000, not 1001"):
        build_scheduler("dpm++", ALPHA_BAR).steps(1001)
    with pytest.raises(ValueError, match="between 1 and 1000, not 0"):
        trailing_timesteps(T, 0)
    with pytest.raises(ValueError, match="eta"):
        build_scheduler("ddim", ALPHA_BAR).steps(10, eta=1.5)
    with pytest.raises(ValueError, match="deterministic"):
        build_scheduler("unipc", ALPHA_BAR).steps(10, eta=0.5)


def test_advance_leaves_its_inputs_alone():
    step = Step(5, 0.5, (2.0, -1.0), 0.1)
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    noisy, newest, older, noise = before = inputs.clone()
    following = step.advance(noisy, deque([newest, older]), noise)
    torch.testing.assert_close(following, 0.5 * noisy + 2 * newest - older + 0.1 * noise)
    assert torch.equal(before, inputs)


def test_noise_of_an_image_depends_on_its_own_stream_and_not_on_how_it_is_cut():
    def streams(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    height = 2 * NOISE_ROWS + 5
    both = draw_noise(streams(1, 2), 3, height, 20)
    assert torch.equal(both[1:], draw_noise(streams(2), 3, height, 20))
    assert not torch.equal(both[0], both[1])
    stream = streams(1)
    bands = [draw_noise(stream, 3, rows, 20) for rows in (NOISE_ROWS, NOISE_ROWS, 5)]
    assert torch.equal(both[:1], torch.cat(bands, dim=2))
    assert float(both.mean()) == pytest.approx(0, abs=0.03)
    assert float(both.std()) == pytest.approx(1, abs=0.03)
