"""Samplers against the closed form of a Gaussian, against diffusers, and against their own definition.

The exact denoiser of N(mu, s^2) is affine and so is every sampler, so mean and variance of what comes out are
followed exactly: a state is a vector of its parts of the first noise, of 1, and of each later noise.
"""

import math
from collections import deque

import pytest
import torch
from diffusers.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import SCHEDULES, variance_preserving
from engine.options import OptionError
from samplers import (
    DEFAULT_SCHEDULER,
    HISTORY,
    LEAST_ALPHA_BAR,
    NOISE_ROWS,
    SCHEDULERS,
    Step,
    draw_noise,
    initial_scale,
    log_snr_timesteps,
    sample,
    sampler_steps,
)

T = 1000
DEVIATIONS = (0.1, 0.2, 0.4, 1.0)
MEAN = 0.3


PAIRS = {name: schedule(T) for name, schedule in SCHEDULES.items()}
COSINE = PAIRS["cosine"]
ALPHA_BAR = COSINE[0].square()
SIGMA = COSINE[1] / COSINE[0]


def gaussian_moments(name, count, deviation, pair=COSINE):
    """Mean, and variance over the true one, of samples from N(MEAN, deviation^2) with its exact denoiser."""
    steps = sampler_steps(name, pair, count)
    fresh = iter(range(2, 2 + len(steps)))
    start = torch.zeros(2 + len(steps), dtype=torch.float64)
    start[0] = initial_scale(pair)

    def denoise(state, timestep):
        signal, noise = (float(scale[timestep]) for scale in pair)
        gain = deviation**2 * signal / ((signal * deviation) ** 2 + noise**2)
        clean = gain * state
        clean[1] += (1 - gain * signal) * MEAN
        return clean

    def advance(step, state, cleans):
        noise = torch.zeros_like(state)
        noise[next(fresh)] = 1
        return step.advance(state, cleans, noise)

    *_, state = sample(steps, start, denoise, advance)
    mean, state[1] = float(state[1]), 0
    return mean, float(state @ state) / deviation**2


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_mean_and_variance_of_a_gaussian_converge(name):
    for deviation in DEVIATIONS:
        counts = (10, 30, 100, 300, T)
        moments = [gaussian_moments(name, n, deviation) for n in counts]
        assert all(abs(mean - MEAN) < 1e-4 for mean, _ in moments)
        errors = [abs(variance - 1) for _, variance in moments]
        assert errors[-1] < (0.05 if name == "ddpm" else 0.02)
        assert errors[3] < errors[1] + 1e-3  # small errors may change sign on the way
        assert errors[1] < max(errors[0], 0.07)
        assert errors[4] <= errors[3] + 1e-3
        if name not in ("ddim", "ddpm"):  # second order: soon there
            assert max(errors[2:]) < 0.04


def test_the_second_order_samplers_keep_the_variance_at_10_steps():
    for name, within in ((DEFAULT_SCHEDULER, 0.05), ("dpm++", 0.07), ("heun", 0.16)):
        kept = [gaussian_moments(name, 10, deviation)[1] for deviation in (0.2, 0.4, 1, 2)]
        assert kept == pytest.approx([1] * 4, abs=within)


@given(st.data(), st.sampled_from(SCHEDULERS), st.sampled_from(["cosine", "sigmoid", "linear"]))
@settings(max_examples=200)
def test_every_step_count_falls_from_the_noisiest_and_ends_in_its_last_clean_estimate(data, name, schedule):
    total = data.draw(st.integers(1, 60) | st.integers(61, 1500))
    count = data.draw(st.integers(1, total))
    steps = sampler_steps(name, SCHEDULES[schedule](total), count)
    last, timesteps = steps[-1], [step.timestep for step in steps]
    assert (last.noisy_weight, *last.clean_weights) == pytest.approx((0, 1), abs=1e-6)
    assert count > 1 or last.clean_weights == (1.0,)
    assert last.noise_weight == 0
    assert all(len(step.clean_weights) <= HISTORY for step in steps)
    assert timesteps[0] == total - 1
    assert timesteps == sorted(timesteps, reverse=True)
    assert timesteps[-1] >= 0
    assert len(steps) == (2 * count - 2 if name == "heun" and count > 1 else count)
    assert len(set(timesteps)) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_true_clean_image_keeps_the_scales_of_each_timestep(pair, name):
    """Then noisy_k is signal_scale clean + noise_scale noise, exactly."""
    signal_scale, noise_scale = PAIRS[pair]
    for count in (2, 5, 13, 100):
        state = torch.stack([noise_scale[-1], signal_scale[-1]])  # parts of the noise and of the clean image
        clean = torch.tensor([0.0, 1.0], dtype=torch.float64)
        for step in sampler_steps(name, PAIRS[pair], count):
            assert float(state[1]) == pytest.approx(float(signal_scale[step.timestep]), abs=1e-4)
            if name != "ddpm":
                assert float(state[0]) == pytest.approx(float(noise_scale[step.timestep]), abs=1e-4)
            state = step.advance(state, [clean] * HISTORY, torch.zeros(2, dtype=torch.float64))
        assert state.tolist() == pytest.approx([0, 1], abs=1e-5)


# ------------------------------------------------------------------------------------------------- diffusers

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
DIFFUSERS_SCHEDULES = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": LINEAR,
    "zero_terminal_snr": {**LINEAR, "rescale_betas_zero_snr": True},
}
PREDICTS_CLEAN = {"prediction_type": "sample"}


def diffusers_pair(schedule):
    alpha_bar = DDIMScheduler(num_train_timesteps=T, **DIFFUSERS_SCHEDULES[schedule]).alphas_cumprod.double()
    return variance_preserving(alpha_bar)


def sent(reference, timesteps, sigmas, repeats=1):
    """A scheduler of diffusers that visits these timesteps, of these sigmas, and then 0."""
    reference.set_timesteps(len(timesteps))
    times, levels = torch.tensor(timesteps), torch.tensor(sigmas, dtype=torch.float32)
    reference.timesteps = torch.cat([times[:1], times[1:].repeat_interleave(repeats)])
    reference.sigmas = torch.cat([levels[:1], levels[1:].repeat_interleave(repeats), levels.new_zeros(1)])
    return reference


def run_diffusers(name, timesteps, sigmas, noisy, denoise):
    """Sample with diffusers' own objects; before Heun's method comes one step of Euler's (= DDIM's)."""
    if name != "heun":
        kind = UniPCMultistepScheduler if name == "unipc" else DPMSolverMultistepScheduler
        reference = sent(kind(T, solver_order=2, **PREDICTS_CLEAN), timesteps, sigmas)
        for timestep in reference.timesteps:
            noisy = reference.step(denoise(noisy, int(timestep)), timestep, noisy).prev_sample
        return noisy
    euler = sent(DPMSolverMultistepScheduler(T, solver_order=1, **PREDICTS_CLEAN), timesteps, sigmas)
    noisy = euler.step(denoise(noisy, timesteps[0]), euler.timesteps[0], noisy).prev_sample
    reference = sent(HeunDiscreteScheduler(T, **PREDICTS_CLEAN), timesteps[1:], sigmas[1:], repeats=2)
    scaled = noisy * (1 + reference.sigmas[0] ** 2).sqrt()
    for timestep in reference.timesteps:
        seen = reference.scale_model_input(scaled, timestep)
        scaled = reference.step(denoise(seen, int(timestep)), timestep, scaled).prev_sample
    return scaled


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unipc", "dpm++", "heun"])
@pytest.mark.parametrize("schedule", DIFFUSERS_SCHEDULES)
def test_a_random_linear_denoiser_is_sampled_as_by_diffusers(schedule, name):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(T, 12, 12, generator=generator, dtype=torch.float64) / 12
    noisy = torch.randn(1, 1, 1, 12, generator=generator, dtype=torch.float64)
    signal_scale, noise_scale = diffusers_pair(schedule)
    sigmas = noise_scale / signal_scale.clamp(min=LEAST_ALPHA_BAR**0.5)

    def denoise(noisy, timestep):
        return noisy @ matrices[timestep]

    for count in (2, 3, 5, 10, 25):
        steps = sampler_steps(name, (signal_scale, noise_scale), count)
        timesteps = sorted({step.timestep for step in steps}, reverse=True)
        *_, ours = sample(steps, noisy, denoise, Step.advance)
        theirs = run_diffusers(name, timesteps, sigmas[timesteps].tolist(), noisy, denoise)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("schedule", DIFFUSERS_SCHEDULES)
def test_the_schedules_are_those_of_diffusers(schedule):
    for ours, theirs in zip(PAIRS[schedule], diffusers_pair(schedule), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 10, 50, 125, pytest.param(T, marks=pytest.mark.slow)])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("schedule", DIFFUSERS_SCHEDULES)
def test_ddim_is_that_of_diffusers_where_the_step_count_divides_t(schedule, count, eta):
    reference = DDIMScheduler(
        num_train_timesteps=T,
        clip_sample=False,
        timestep_spacing="trailing",
        **PREDICTS_CLEAN,
        **DIFFUSERS_SCHEDULES[schedule],
    )
    alpha_bar = reference.alphas_cumprod.double().clamp(min=LEAST_ALPHA_BAR)
    reference.alphas_cumprod = alpha_bar
    reference.set_timesteps(count)
    steps = sampler_steps("ddim", variance_preserving(alpha_bar), count, eta)
    assert [step.timestep for step in steps] == reference.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    noisy, clean, noise = torch.randn(3, 1, 3, 8, 8, generator=generator, dtype=torch.float64)
    for step in steps:
        ours = step.advance(noisy, [clean], noise)
        theirs = reference.step(clean, step.timestep, noisy, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        noisy = ours


def test_ddpm_is_ddim_that_draws_all_of_the_posterior_s_variance():
    for count in (1, 3, 17, T):
        assert sampler_steps("ddpm", COSINE, count) == sampler_steps("ddim", COSINE, count, eta=1.0)


def test_log_snr_is_evenly_spaced():
    timesteps = log_snr_timesteps(ALPHA_BAR.tolist(), 10)
    sigma = SIGMA[timesteps]
    assert timesteps[0] == T - 1
    assert float(sigma[1]) == pytest.approx(8, rel=0.05)
    assert float(sigma[-1]) == pytest.approx(0.05, rel=0.1)
    gaps = sigma[1:].log().diff()
    assert float(gaps.max() - gaps.min()) < 0.1 * float(gaps.abs().mean())


@pytest.mark.parametrize("detail", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("name", ["dpm++", "unipc", "heun"])
def test_detail_scales_the_largest_noise_level_after_the_first(name, detail):
    own, whole = (
        [float(SIGMA[step.timestep]) for step in sampler_steps(name, COSINE, 6, detail=amount)]
        for amount in (detail, 1.0)
    )
    assert own[0] == whole[0] == SIGMA[-1]
    assert own[1] == pytest.approx(max(detail * whole[1], whole[-1]), rel=0.1)
    assert own[-1] <= 1.1 * whole[-1]


@pytest.mark.parametrize(
    ("field", "value", "name", "count", "options"),
    [
        ("scheduler", "euler", "euler", 4, {}),
        *(("steps", count, "dpm++", count, {}) for count in (0, -1, 1001)),
        *(("eta", eta, "ddim", 10, {"eta": eta}) for eta in (-0.1, 1.5, math.nan)),
        *(("eta", 0.5, name, 10, {"eta": 0.5}) for name in SCHEDULERS if name != "ddim"),
        *(("scheduler", name, name, 10, {"detail": 0.5}) for name in ("ddim", "ddpm")),  # from pure noise
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field, value, name, count, options):
    with pytest.raises(OptionError) as caught:
        sampler_steps(name, COSINE, count, **options)
    assert (caught.value.field, caught.value.value) == (field, value)


def test_a_process_whose_noise_falls_is_refused():
    with pytest.raises(ValueError, match="fall"):
        sampler_steps("ddim", tuple(scale.flip(0) for scale in COSINE), 4)


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
