"""Samplers, exact for every number of steps: linear steps of one loop.

    noisy_{k+1} = noisy_weight noisy_k + sum_j clean_weights[j] clean_{k-j} + noise_weight noise

A process is any (signal_scale, noise_scale): a pair with signal^2 + noise^2 = 1, times a factor for each of
T timesteps. Shapes: B images, C channels, H x W pixels.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from engine.options import OptionError
from engine.seeds import noise_seed

SchedulerName = Literal["ddim", "ddpm", "dpm++", "unipc", "heun"]
SCHEDULERS: tuple[SchedulerName, ...] = get_args(SchedulerName)
DEFAULT_SCHEDULER: SchedulerName = "unipc"
HISTORY = 3  # the most clean estimates a step looks at: UniPC's corrector and predictor together
# Stands in for no signal at all (Lin et al. 2024), whose log-SNR is infinite: a signal of 3e-5, invisible.
LEAST_ALPHA_BAR = 1e-9
NOISE_ROWS = 64  # rows of an image whose noise is drawn together

Scales = tuple[Tensor, Tensor]  # signal_scale and noise_scale, each (T,) float64
State = TypeVar("State")  # an image being denoised


class Step(NamedTuple):
    """One evaluation of the network, at `timestep` in [0, T), and the weights of what follows."""

    timestep: int
    noisy_weight: float
    clean_weights: tuple[float, ...]  # the newest first, at most HISTORY
    noise_weight: float = 0.0

    def advance(self, noisy: Tensor, cleans: Sequence[Tensor], noise: Tensor | None = None) -> Tensor:
        """Compute the next noisy image; `cleans` begin with the newest and may be more than the weights."""
        following = self.clean_weights[0] * cleans[0]
        if self.noisy_weight:
            following.add_(noisy, alpha=self.noisy_weight)
        for weight, clean in zip(self.clean_weights[1:], list(cleans)[1:], strict=False):
            following.add_(clean, alpha=weight)
        if self.noise_weight:
            assert noise is not None, "this step needs noise"
            following.add_(noise, alpha=self.noise_weight)
        return following


def sampler_steps(
    name: str, scales: Scales, count: int, eta: float = 0.0, detail: float = 1.0
) -> tuple[Step, ...]:
    """Plan the evaluations: `count` from 1 to T, but 2 count - 2 for "heun" from 2 on; OptionError.

    Args:
        name: "ddim" (Song et al. 2021a), "ddpm" (Ho et al. 2020), "dpm++" (Lu et al. 2022), "unipc" (Zhao et
            al. 2023) or "heun" (Karras et al. 2022).
        scales: signal_scale and noise_scale, (T,), of any process whose ratio falls; else ValueError.
        eta: 0 to 1, for "ddim": the part of the posterior's variance drawn afresh (Song et al. 2021a, Eq.
            16). "ddpm" has 1.
        detail: 0 to 1, scales the largest noise level after T - 1 (`sigma_range`): less of it leaves more
            of the first, faithful estimate. 1 for "ddim" and "ddpm", which have no such range.
    """
    alpha_bar, factors = _preserving(scales)
    total, trailing = len(alpha_bar), name in ("ddim", "ddpm")
    for option, value, holds, rule in (
        ("scheduler", name, name in SCHEDULERS, f"choose one of {', '.join(SCHEDULERS)}"),
        ("steps", count, count in range(1, total + 1), f"give a whole number from 1 to {total}"),
        ("eta", eta, 0 <= eta <= 1, "give a number from 0 to 1"),
        ("eta", eta, not eta or name == "ddim", f"the scheduler {name} has none; use ddim or eta 0"),
        ("scheduler", name, not trailing or detail == 1 or count == 1, "starts from pure noise: use unipc"),
    ):
        if not holds:
            raise OptionError(option, value, rule)
    if trailing:
        steps = _ddim_steps(alpha_bar, trailing_timesteps(total, count), 1.0 if name == "ddpm" else eta)
    elif name == "heun":
        steps = _heun_steps(alpha_bar, log_snr_timesteps(alpha_bar, count, detail))
    else:
        timesteps = log_snr_timesteps(alpha_bar, count, detail)
        steps = _multistep(alpha_bar, timesteps, corrected=name == "unipc")
    return _rescaled(steps, factors)


def level_steps(
    scales: Scales, levels: Sequence[float], detail: float = 1.0
) -> tuple[tuple[Step, ...], float]:
    """Plan a sharpened model's evaluations, one at each of at most two noise levels, all with the same noise.

    Gives the steps, and the factor of the standard normal noise that they start from.

    Args:
        scales: signal_scale and noise_scale, (T,), of any process.
        levels: noise_scale / signal_scale of each evaluation; the nearest timestep is taken.
        detail: 0 to 1, scales the last estimate, which is added to the mean.
    """
    signal, noise = scales
    timesteps = [int((noise / signal - level).abs().argmin()) for level in levels]
    steps = [
        Step(t, float(noise[after] / noise[t]), (float(signal[after]),))
        for t, after in itertools.pairwise(timesteps)
    ]
    return (*steps, Step(timesteps[-1], 0.0, (detail,))), float(noise[timesteps[0]])


def initial_scale(scales: Scales) -> float:
    """Compute the factor of the standard normal noise that sampling of a process starts from."""
    return _preserving(scales)[1][-1]


def _preserving(scales: Scales) -> tuple[list[float], list[float]]:
    """(T,), (T,): alpha_bar of the variance-preserving process, and the factors that make this one of it."""
    signal, noise = (scale.double() for scale in scales)
    variance = signal.square() + noise.square()
    alpha_bar = signal.square() / variance
    if not bool((alpha_bar.diff() < 0).all()):
        raise ValueError("signal_scale / noise_scale must fall from each timestep to the next")
    # The squares of two roots make 1 only to the last bit; there the factor is to change nothing.
    factors = torch.where((variance - 1).abs() < 1e-12, 1.0, variance.sqrt())
    # Only the last can be 0; it stays below the one before, however little signal that has.
    smallest = float(alpha_bar.where(alpha_bar > 0, torch.inf).min())
    return alpha_bar.clamp(min=min(LEAST_ALPHA_BAR, smallest / 2)).tolist(), factors.tolist()


def sample(
    steps: Sequence[Step],
    noisy: State,
    denoise: Callable[[State, int], State],
    advance: Callable[[Step, State, Sequence[State]], State],
) -> Iterator[State]:
    """Run the sampling loop: yield the noisy image after each step, at last the result.

    Args:
        noisy: standard normal, times initial_scale.
        denoise: (noisy, timestep) -> clean estimate.
        advance: (step, noisy, clean estimates, the newest first) -> next noisy image.
    """
    cleans: deque[State] = deque(maxlen=max(len(step.clean_weights) for step in steps))
    for step in steps:
        if len(cleans) == cleans.maxlen:
            cleans.pop()  # its memory is free before the next is made
        cleans.appendleft(denoise(noisy, step.timestep))
        noisy = advance(step, noisy, cleans)
        yield noisy


def _rescaled(steps: Sequence[Step], factors: Sequence[float]) -> tuple[Step, ...]:
    """Rewrite steps for a process of `factors[t]` times the variance-preserving one; clean images have 1."""
    following = [*(factors[step.timestep] for step in steps[1:]), 1.0]
    return tuple(
        Step(t, noisy * after / factors[t], tuple(after * weight for weight in cleans), after * noise)
        for (t, noisy, cleans, noise), after in zip(steps, following, strict=True)
    )


def trailing_timesteps(num_train_timesteps: int, num_inference_steps: int) -> list[int]:
    """List round(T, T - T / n, T - 2 T / n, ...) - 1 (Lin et al. 2024, Table 2)."""
    left = np.arange(num_inference_steps, 0, -1, dtype=np.int64) * num_train_timesteps
    rounded = (2 * left + num_inference_steps) // (2 * num_inference_steps)  # exact, halves up
    return [int(timestep) - 1 for timestep in rounded]


def log_snr_timesteps(alpha_bar: Sequence[float], num_inference_steps: int, detail: float = 1.0) -> list[int]:
    """List T - 1, then timesteps evenly spaced in log-SNR (Lu et al. 2022, section 4) over `sigma_range`."""
    known = np.array(alpha_bar)
    log_sigma = 0.5 * np.log((1 - known) / known)  # rises with the timestep
    highest, lowest = sigma_range(num_inference_steps)
    highest = max(detail * highest, lowest)
    levels = np.linspace(math.log(highest), math.log(lowest), num_inference_steps - 1)
    wanted = np.round(np.interp(levels, log_sigma, np.arange(len(known)))).astype(int)
    timesteps = [len(known) - 1]
    for index, timestep in enumerate(wanted.tolist(), start=2):
        # Where several would fall together, they take the nearest free ones.
        timesteps.append(max(min(timestep, timesteps[-1] - 1), num_inference_steps - index))
    return timesteps


def sigma_range(num_inference_steps: int) -> tuple[float, float]:
    """Choose the largest and smallest noise_scale / signal_scale after T - 1: 4.8 and 0.05 for 6 steps."""
    # What lies beyond is crossed in one step and costs variance; what lies between needs short steps. Up to
    # 10 steps the largest level grows with their number, for LPIPS on held-out photos (recipes/ABLATIONS.md).
    # The smallest, of an x4 residual less than a grey level, stays. From 10 to 100 only the smallest falls: a
    # larger largest lets in more of the network's error at the noisiest levels. Above 100 both widen, so that
    # nothing is lost in the limit.
    few, many = min(num_inference_steps, 10), max(1.0, num_inference_steps / 100)
    return 0.8 * few * many**2, 0.5 / max(10, num_inference_steps)


def _levels(alpha_bar: Sequence[float], timesteps: Sequence[int]) -> list[tuple[float, float]]:
    """List signal_scale and noise_scale at each timestep, and 1 and 0 after the last."""
    return [(math.sqrt(alpha_bar[t]), math.sqrt(1 - alpha_bar[t])) for t in timesteps] + [(1.0, 0.0)]


def _ddim_steps(alpha_bar: Sequence[float], timesteps: Sequence[int], eta: float) -> list[Step]:
    """Plan DDIM on any falling list of timesteps (Song et al. 2021a, Eq. 12 and 16); eta = 1 is DDPM."""
    steps = []
    for timestep, (signal, noise) in zip(timesteps, _levels(alpha_bar, timesteps)[1:], strict=True):
        before = alpha_bar[timestep]
        fresh = eta * noise * math.sqrt((1 - before / signal**2) / (1 - before))
        noisy = math.sqrt(max(0.0, noise**2 - fresh**2) / (1 - before))
        steps.append(Step(timestep, noisy, (signal - noisy * math.sqrt(before),), fresh))
    return steps


def _multistep(alpha_bar: Sequence[float], timesteps: Sequence[int], *, corrected: bool) -> list[Step]:
    """Plan DPM-Solver++ 2M (Lu et al. 2022, Algorithm 2); corrected, UniPC of order 2 (Zhao et al. 2023).

    UniPC's predictor is the same; it corrects once the next clean estimate is known: here, in the next step.
    """
    levels = _levels(alpha_bar, timesteps)
    log_snr = [math.log(signal / noise) if noise else math.inf for signal, noise in levels]
    newest, older, oldest = np.eye(HISTORY)  # weights of the clean estimates
    correction = np.zeros(HISTORY)
    steps: list[Step] = []
    for index, timestep in enumerate(timesteps):
        (_, before), (signal, noise) = levels[index : index + 2]
        h = log_snr[index + 1] - log_snr[index]
        phi = math.expm1(-h)
        weights, slope_weights = newest, (0.5, 0.0)  # of the first order, as are the first and the last step
        if 0 < index < len(timesteps) - 1:
            ratio = (log_snr[index] - log_snr[index - 1]) / h
            weights = newest + 0.5 / ratio * (newest - older)
            slope_weights = _corrector(h, phi, ratio)
        weights = noise / before * correction - signal * phi * weights
        steps.append(Step(timestep, noise / before, tuple(np.trim_zeros(weights, "b").tolist())))
        if corrected:  # seen from the next step, where what was the newest is older
            across, back = slope_weights
            correction = -signal * phi * (across * (newest - older) + back * (older - oldest))
    return steps


def _corrector(h: float, phi: float, ratio: float) -> tuple[float, float]:
    """Compute what UniPC adds for the slope of the last step and for the one before.

    `h` is how log(signal / noise) grew, `phi` exp(-h) - 1, `ratio` the growth in the step before over h.
    """
    first = -1 / h - 1 / phi  # b_1 and b_2 of Zhao et al. 2023, with B(h) = phi
    second = -2 * first / h - 1 / phi
    back = (first - second) / (1 + ratio)
    return first - back, (back - 0.5) / ratio


def _heun_steps(alpha_bar: Sequence[float], timesteps: Sequence[int]) -> list[Step]:
    """Plan Heun's method (Karras et al. 2022, algorithm 1), behind one DDIM step (Euler's) from T - 1."""
    # The trapezoidal rule weighs both ends of a step in sigma alike, but the cosine schedule begins at sigma
    # 20000: a step from there to 10 would magnify the second slope's error by 1000.
    euler, levels = _ddim_steps(alpha_bar, timesteps, 0.0), _levels(alpha_bar, timesteps)
    steps = [euler[0]]
    for index in range(1, len(timesteps)):
        steps.append(euler[index])
        if index + 1 < len(timesteps):
            sigma, following = (noise / signal for signal, noise in levels[index : index + 2])
            change = levels[index + 1][0] * (sigma / following - 1) / 2
            steps.append(Step(timesteps[index + 1], 1.0, (change, -change)))
    return steps


def noise_stream(seed: int, number: int) -> torch.Generator:
    """Make the generator of the noise of one sample of an image."""
    return torch.Generator().manual_seed(noise_seed(seed, number, 0))


def draw_noise(streams: Sequence[torch.Generator], channels: int, height: int, width: int) -> Tensor:
    """(B, C, H, W) standard normal on the CPU, each image's from its own stream."""
    # NOISE_ROWS at a time: whoever holds only some rows of an image draws the same numbers.
    heights = [min(NOISE_ROWS, height - top) for top in range(0, height, NOISE_ROWS)]
    bands = [[torch.randn(channels, rows, width, generator=one) for one in streams] for rows in heights]
    return torch.cat([torch.stack(band) for band in bands], dim=2)
