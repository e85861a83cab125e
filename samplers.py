"""Samplers: the schedulers of diffusers, exact for every number of steps, as linear steps of one loop.

    noisy_{k+1} = noisy_weight noisy_k + sum_j clean_weights[j] clean_{k-j} + noise_weight noise

The weights are read off diffusers with unit vectors; sampling then needs it no more, and can take an image in
pieces. A process is any (signal_scale, noise_scale): a pair with signal^2 + noise^2 = 1, as diffusers has,
times a factor for each timestep.

Shapes: B images, C channels, H x W pixels, T timesteps, n steps.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from engine.options import OptionError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SchedulerName = Literal["ddim", "ddpm", "dpm++", "unipc", "heun"]
SCHEDULERS: tuple[SchedulerName, ...] = get_args(SchedulerName)
DEFAULT_SCHEDULER: SchedulerName = "unipc"
HISTORY = 3  # the most clean estimates a step looks at: UniPC's corrector and predictor together
# Stands in for no signal at all (Lin et al. 2024), whose log-SNR is infinite: a signal of 3e-5, invisible.
LEAST_ALPHA_BAR = 1e-9
NOISE_ROWS = 64  # rows of an image whose noise is drawn together

State = TypeVar("State")  # an image being denoised: a Tensor, or a restoration.tiling.Field


class Step(NamedTuple):
    """One evaluation of the network, at `timestep` in [0, T), and the weights of what follows from it.

    At most HISTORY are of clean estimates, the newest first; the noise is fresh and standard normal.
    """

    timestep: int
    noisy_weight: float
    clean_weights: tuple[float, ...]
    noise_weight: float = 0.0

    def advance(self, noisy: Tensor, cleans: Sequence[Tensor], noise: Tensor | None = None) -> Tensor:
        """The next noisy image, a new tensor; after the last step it is the clean one. All have one shape.

        `cleans` begin with the newest and may outnumber the weights.
        """
        following = self.clean_weights[0] * cleans[0]
        if self.noisy_weight:
            following.add_(noisy, alpha=self.noisy_weight)
        for weight, clean in zip(self.clean_weights[1:], list(cleans)[1:], strict=False):
            following.add_(clean, alpha=weight)
        if self.noise_weight:
            assert noise is not None, "this step needs noise"
            following.add_(noise, alpha=self.noise_weight)
        return following


class Sampler:
    """The steps of one scheduler for one process.

    Args:
        name: "ddim" (Song et al. 2021a), "ddpm" (Ho et al. 2020), "dpm++" (DPM-Solver++ 2M, Lu et al. 2022),
            "unipc" (Zhao et al. 2023, order 2, B2) or "heun" (Karras et al. 2022, algorithm 1).
        signal_scale, noise_scale: (T,) float64; ValueError unless their ratio falls.
    """

    def __init__(self, name: SchedulerName, signal_scale: Tensor, noise_scale: Tensor) -> None:
        if name not in SCHEDULERS:
            raise OptionError("scheduler", name, f"choose one of {', '.join(SCHEDULERS)}")
        variance = signal_scale.double().square() + noise_scale.double().square()
        alpha_bar = signal_scale.double().square() / variance  # of the variance-preserving process
        if not bool((alpha_bar.diff() < 0).all()):
            raise ValueError("signal_scale / noise_scale must fall from each timestep to the next")
        self.name = name
        self._alpha_bar: tuple[float, ...] = tuple(alpha_bar.clamp(min=LEAST_ALPHA_BAR).tolist())
        # The squares of two roots make 1 only to the last bit; there the factor is to change nothing.
        preserving = (variance - 1).abs() < 1e-12
        self._factors: tuple[float, ...] = tuple(torch.where(preserving, 1.0, variance.sqrt()).tolist())

    @property
    def initial_scale(self) -> float:
        """What standard normal noise is multiplied by to start."""
        return self._factors[-1]

    def steps(self, count: int, eta: float = 0.0) -> tuple[Step, ...]:
        """The evaluations of `count` steps: as many, but 2 count - 2 for "heun" from 2 on.

        Args:
            count: 1 to T; one step gives the posterior mean at T - 1.
            eta: 0 to 1, for "ddim" only: the part of the posterior's variance drawn afresh (Song et al.
                2021a, Eq. 16). "ddpm" has 1, the others 0.

        Raises:
            OptionError: out of range.
        """
        total = len(self._alpha_bar)
        if not 1 <= count <= total:
            raise OptionError("steps", count, f"give a number from 1 to {total}")
        if not 0 <= eta <= 1:
            raise OptionError("eta", eta, "give a number from 0 to 1")
        if eta and self.name != "ddim":
            raise OptionError("eta", eta, f"the scheduler {self.name} has none; use ddim or eta 0")
        steps = _steps(self.name, self._alpha_bar, count, 1.0 if self.name == "ddpm" else float(eta))
        return _rescaled(steps, self._factors)


def sample(
    steps: Sequence[Step],
    noisy: State,
    denoise: Callable[[State, int], State],
    advance: Callable[[Step, State, Sequence[State]], State],
) -> Iterator[State]:
    """The sampling loop: yields the noisy image after each step; the last is the result.

    Args:
        steps, noisy: Sampler.steps, and standard normal noise times Sampler.initial_scale.
        denoise: (noisy, timestep) -> clean estimate.
        advance: (step, noisy, clean estimates from the newest) -> next noisy image.
    """
    cleans: deque[State] = deque(maxlen=max(len(step.clean_weights) for step in steps))
    for step in steps:
        if len(cleans) == cleans.maxlen:
            cleans.pop()  # its memory is free before the next is made
        cleans.appendleft(denoise(noisy, step.timestep))
        noisy = advance(step, noisy, cleans)
        yield noisy


def _rescaled(steps: Sequence[Step], factors: Sequence[float]) -> tuple[Step, ...]:
    """Steps for a process that is `factors[t]` times the variance-preserving one; clean images have 1."""
    following = [*(factors[step.timestep] for step in steps[1:]), 1.0]
    return tuple(
        Step(t, noisy * after / factors[t], tuple(after * weight for weight in cleans), after * noise)
        for (t, noisy, cleans, noise), after in zip(steps, following, strict=True)
    )


def trailing_timesteps(num_train_timesteps: int, num_inference_steps: int) -> list[int]:
    """round(T, T - T / n, T - 2 T / n, ...) - 1: starts at T - 1, the noisiest (Lin et al. 2024, Table 2)."""
    left = np.arange(num_inference_steps, 0, -1, dtype=np.int64) * num_train_timesteps
    rounded = (2 * left + num_inference_steps) // (2 * num_inference_steps)  # exact, halves up
    return [int(timestep) - 1 for timestep in rounded]


def log_snr_timesteps(alpha_bar: Sequence[float], num_inference_steps: int) -> list[int]:
    """T - 1, then timesteps evenly spaced in log-SNR (Lu et al. 2022, section 4) over `sigma_range`."""
    known = np.array(alpha_bar)
    log_sigma = 0.5 * np.log((1 - known) / known)  # rises with the timestep
    highest, lowest = sigma_range(num_inference_steps)
    levels = np.linspace(math.log(highest), math.log(lowest), num_inference_steps - 1)
    wanted = np.round(np.interp(levels, log_sigma, np.arange(len(known)))).astype(int)
    timesteps = [len(known) - 1]
    for index, timestep in enumerate(wanted.tolist(), start=2):
        # Where several would fall together, they take the nearest free ones.
        timesteps.append(max(min(timestep, timesteps[-1] - 1), num_inference_steps - index))
    return timesteps


def sigma_range(num_inference_steps: int) -> tuple[float, float]:
    """The largest and smallest noise_scale / signal_scale after T - 1: 14 and 0.05 for 10 steps."""
    # What lies beyond is crossed in one step and costs variance, (s / 14)^2 and (0.05 / s)^2 of data of
    # deviation s; what lies between needs short steps. Up to 10 steps the largest level grows with their
    # number: best up to 6 in a search over Gaussians of deviation 0.2 to 2, and photos gain texture from more
    # (recipes/ABLATIONS.md); the smallest, of an x4 residual less than a grey level, stays. From 10 to 100
    # only the smallest falls: a larger largest lets in more of the network's error at the noisiest levels.
    # Above 100 both widen, so that nothing is lost in the limit.
    width = min(num_inference_steps, 10) * max(1.0, num_inference_steps / 100)
    return 0.14 * width**2, 0.5 / max(10, num_inference_steps)


@lru_cache(maxsize=64)  # a folder of images asks for the same steps again and again
def _steps(name: SchedulerName, alpha_bar: tuple[float, ...], count: int, eta: float) -> tuple[Step, ...]:
    """Sampler.steps of the variance-preserving process."""
    if name in ("ddim", "ddpm"):
        return _ddim_steps(alpha_bar, trailing_timesteps(len(alpha_bar), count), eta)
    timesteps = log_snr_timesteps(alpha_bar, count)
    if name == "heun":
        return _heun_steps(alpha_bar, timesteps)
    kind = "DPMSolverMultistepScheduler" if name == "dpm++" else "UniPCMultistepScheduler"
    scheduler = _respaced(kind, alpha_bar, timesteps, solver_order=2, prediction_type="sample")
    noise, *cleans = torch.eye(1 + count, dtype=torch.float64)[:, None, None, None]  # images of one row
    states = [noise]
    for own, clean in zip(scheduler.timesteps, cleans, strict=True):
        states.append(scheduler.step(clean, own, states[-1]).prev_sample.double())
    return _local_form(timesteps, states)


def _respaced(
    kind: str, alpha_bar: Sequence[float], timesteps: Sequence[int], **options: int | str | bool
) -> "SchedulerMixin":
    """A scheduler of diffusers that knows these timesteps alone, and visits them all."""
    # That makes any list exact (Nichol & Dhariwal 2021, section 4). `DDIMScheduler.step` takes the previous
    # timestep to be t - T // n, which is another one wherever n does not divide T.
    from diffusers import schedulers  # takes seconds: only what samples an image pays for it

    kept = torch.tensor([alpha_bar[timestep] for timestep in reversed(timesteps)], dtype=torch.float64)
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    scheduler = getattr(schedulers, kind)(
        num_train_timesteps=len(timesteps),
        trained_betas=(1 - kept / before).tolist(),
        timestep_spacing="trailing",
        **options,
    )
    scheduler.alphas_cumprod = kept  # the same numbers, without the rounding of betas to float32
    scheduler.set_timesteps(len(timesteps))
    return scheduler


def _ddim_steps(alpha_bar: Sequence[float], timesteps: Sequence[int], eta: float) -> tuple[Step, ...]:
    """DDIM on any falling list of timesteps; eta = 1 is DDPM (Song et al. 2021a, section 4.1)."""
    scheduler = _respaced("DDIMScheduler", alpha_bar, timesteps, prediction_type="sample", clip_sample=False)
    noisy, clean, noise = torch.eye(3, dtype=torch.float64)
    steps = []
    for timestep, own in zip(timesteps, scheduler.timesteps, strict=True):
        following = scheduler.step(clean, own, noisy, eta=eta, variance_noise=noise).prev_sample
        noisy_weight, clean_weight, noise_weight = following.tolist()
        steps.append(Step(timestep, noisy_weight, (clean_weight,), noise_weight))
    return tuple(steps)


def _heun_steps(alpha_bar: Sequence[float], timesteps: Sequence[int]) -> tuple[Step, ...]:
    """Heun's method, behind one DDIM step (Euler's) from T - 1."""
    # The trapezoidal rule weighs both ends of a step in sigma alike, but the cosine schedule begins at sigma
    # 20000: a step from there to 10 would magnify the second slope's error by 1000.
    first = _ddim_steps(alpha_bar, timesteps, 0.0)[:1]
    if len(timesteps) == 1:
        return first
    scheduler = _respaced("HeunDiscreteScheduler", alpha_bar, timesteps[1:], prediction_type="epsilon")
    sigmas = scheduler.sigmas.double()
    scales = (1 + sigmas**2).sqrt()  # diffusers' Heun steps noisy / signal_scale by the noise estimate
    noise, *cleans = torch.eye(len(sigmas), dtype=torch.float64)[:, None, None, None]
    states = [noise]
    for index, (own, clean) in enumerate(zip(scheduler.timesteps, cleans, strict=True)):
        scaled = states[-1] * scales[index]
        slope = (scaled - clean) / sigmas[index]
        states.append(scheduler.step(slope, own, scaled).prev_sample / scales[index + 1])
    evaluated = [timesteps[1], *(timestep for timestep in timesteps[2:] for _ in range(2))]
    return first + _local_form(evaluated, states)


def _local_form(timesteps: Sequence[int], states: Sequence[Tensor]) -> tuple[Step, ...]:
    """Express each state by the one before it and the newest clean estimates, those of n timesteps.

    The n + 1 states (1, 1, 1, 1 + n) are made of the first noise and of each clean estimate.
    """
    steps = []
    for index, timestep in enumerate(timesteps):
        noisy, following = states[index].flatten(), states[index + 1].flatten()
        noisy_weight = float(following[0] / noisy[0])
        rest = following - noisy_weight * noisy
        oldest = max(0, index + 1 - HISTORY)
        assert rest[: 1 + oldest].abs().max() < 1e-4, "a scheduler looked further back than HISTORY"
        clean_weights = rest[1 + oldest : 2 + index].flip(0).tolist()
        while len(clean_weights) > 1 and abs(clean_weights[-1]) < 1e-7:
            clean_weights.pop()  # a step of lower order
        steps.append(Step(timestep, noisy_weight, tuple(clean_weights)))
    return tuple(steps)


def noise_seed(seed: int, step: int, micro_batch: int) -> int:
    """A 63-bit seed for one forward pass, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def noise_stream(seed: int, number: int) -> torch.Generator:
    """The noise of one sample of an image: a function of the seed and the sample's number."""
    return torch.Generator().manual_seed(noise_seed(seed, number, 0))


def draw_noise(streams: Sequence[torch.Generator], channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise (B, C, H, W) on the CPU, each image's from its own stream."""
    # NOISE_ROWS at a time: whoever holds only some rows of an image draws the same numbers.
    heights = [min(NOISE_ROWS, height - top) for top in range(0, height, NOISE_ROWS)]
    bands = [[torch.randn(channels, rows, width, generator=one) for one in streams] for rows in heights]
    return torch.cat([torch.stack(band) for band in bands], dim=2)
