"""Samplers: the schedulers of diffusers, exact for every number of steps, as linear steps of one loop.

Every scheduler is handed the clean estimate ("sample" in diffusers' words): what the network predicts and
how the estimate is bounded is settled before. Given the estimates each scheduler is linear:

    noisy_{k+1} = noisy_weight noisy_k + sum_j clean_weights[j] clean_{k-j} + noise_weight noise

The weights are read off diffusers' own scheduler by feeding it unit vectors. Sampling then needs no
scheduler: it can go through an image in pieces, and keeps at most HISTORY clean estimates.

A process is any pair (signal_scale, noise_scale). diffusers knows those with signal^2 + noise^2 = 1; every
other is one of these times a factor that depends on the timestep, and so are its steps (see _rescaled).

Shape legend: B images, C channels, H x W pixels, T timesteps, n steps.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from engine.options import OptionError

if TYPE_CHECKING:  # seconds to import: only what samples an image pays for it
    from diffusers.schedulers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
    )

SchedulerName = Literal["ddim", "ddpm", "dpm++", "unipc", "heun"]
SCHEDULERS: tuple[SchedulerName, ...] = get_args(SchedulerName)
DEFAULT_SCHEDULER: SchedulerName = "unipc"
HISTORY = 3  # the most clean estimates a step looks at: UniPC's corrector and predictor together
# A schedule may end in no signal at all (Lin et al. 2024), where log-SNR is infinite. This much, a signal of
# 3e-5, stands in for it: the solvers stay finite, and no image can tell.
LEAST_ALPHA_BAR = 1e-9
NOISE_ROWS = 64  # rows of an image whose noise is drawn together

State = TypeVar("State")  # an image being denoised: a Tensor, or a restoration.tiling.Field

_Diffusers: TypeAlias = (
    "DDIMScheduler | DPMSolverMultistepScheduler | HeunDiscreteScheduler | UniPCMultistepScheduler"
)


class Step(NamedTuple):
    """One evaluation of the network and what becomes of it.

    Attributes:
        timestep: the timestep to evaluate at, in [0, T).
        noisy_weight: of the noisy image that was evaluated.
        clean_weights: of the clean estimates, this step's first and older ones after it; at most HISTORY.
        noise_weight: of fresh standard normal noise; 0 where the step is deterministic.
    """

    timestep: int
    noisy_weight: float
    clean_weights: tuple[float, ...]
    noise_weight: float = 0.0

    def advance(self, noisy: Tensor, cleans: Sequence[Tensor], noise: Tensor | None = None) -> Tensor:
        """The next noisy image.

        Args:
            noisy: (...) what the network was given.
            cleans: clean estimates of the same shape, the newest first, at least as many as the weights.
            noise: standard normal, needed where noise_weight is not 0.

        Returns:
            A new tensor of the same shape; after the last step of a sampler it is the clean estimate.
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
        signal_scale, noise_scale: (T,) float64; their ratio falls with the timestep.

    Raises:
        ValueError: an unknown name, or scales that do not fall.
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
        """The evaluations that `count` steps take: as many, but 2 count - 2 for "heun" from 2 steps on.

        With one step every scheduler gives the clean estimate at T - 1, the posterior mean.

        Args:
            count: 1 to T.
            eta: 0 to 1, the part of the posterior's variance that "ddim" puts in afresh at each step (Song et
                al. 2021a, Eq. 16). "ddpm" is eta = 1 by definition; the others are deterministic.

        Raises:
            OptionError: `steps` or `eta` is out of range, or eta is given to another scheduler than "ddim".
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
    """The sampling loop: yields the noisy image after each step, the last of which is the result.

    Args:
        steps: as Sampler.steps gives them.
        noisy: standard normal noise times Sampler.initial_scale.
        denoise: (noisy, timestep) -> clean estimate.
        advance: (step, noisy, clean estimates with the newest first) -> next noisy image.
    """
    cleans: deque[State] = deque(maxlen=max(len(step.clean_weights) for step in steps))
    for step in steps:
        if len(cleans) == cleans.maxlen:
            cleans.pop()  # its memory is free before the next is made
        cleans.appendleft(denoise(noisy, step.timestep))
        noisy = advance(step, noisy, cleans)
        yield noisy


def _rescaled(steps: Sequence[Step], factors: Sequence[float]) -> tuple[Step, ...]:
    """Steps of the variance-preserving process for one that is `factors[t]` times it; clean images have 1."""
    after = [*(factors[step.timestep] for step in steps[1:]), 1.0]
    return tuple(
        Step(
            step.timestep,
            step.noisy_weight * factor / factors[step.timestep],
            tuple(factor * weight for weight in step.clean_weights),
            factor * step.noise_weight,
        )
        for step, factor in zip(steps, after, strict=True)
    )


# -------------------------------------------------------------------------------------------------- timesteps


def trailing_timesteps(num_train_timesteps: int, num_inference_steps: int) -> list[int]:
    """round(T, T - T / n, T - 2 T / n, ...) - 1: starts at T - 1, the noisiest (Lin et al. 2024, Table 2)."""
    left = np.arange(num_inference_steps, 0, -1, dtype=np.int64) * num_train_timesteps
    rounded = (2 * left + num_inference_steps) // (2 * num_inference_steps)  # exact, halves up
    return [int(timestep) - 1 for timestep in rounded]


def log_snr_timesteps(alpha_bar: Sequence[float], num_inference_steps: int) -> list[int]:
    """T - 1, then timesteps whose log-SNR is evenly spaced between two noise levels (see sigma_range).

    Even steps in log-SNR are what exponential integrators assume (Lu et al. 2022, section 4). Timesteps are
    whole numbers: where several would fall together, they take the nearest free ones.
    """
    total = len(alpha_bar)
    known = np.array(alpha_bar)
    log_sigma = 0.5 * np.log((1 - known) / known)  # rises with the timestep
    highest, lowest = sigma_range(num_inference_steps)
    levels = np.linspace(math.log(highest), math.log(lowest), num_inference_steps - 1)
    wanted = np.round(np.interp(levels, log_sigma, np.arange(total))).astype(int)
    timesteps = [total - 1]
    for index, timestep in enumerate(wanted.tolist(), start=1):
        still_to_come = num_inference_steps - 1 - index
        timesteps.append(max(min(timestep, timesteps[-1] - 1), still_to_come))
    return timesteps


def sigma_range(num_inference_steps: int) -> tuple[float, float]:
    """The largest and smallest noise_scale / signal_scale, after T - 1: 14 and 0.05 for 10 steps.

    What lies beyond is crossed in one step and costs variance, (s / 14)^2 and (0.05 / s)^2 of data of
    deviation s; what lies between must be covered in short steps. Up to 10 steps the largest level therefore
    grows with their number, as a search over Gaussians of deviation 0.2 to 2 found best up to 6 steps, and
    the smallest stays: of an x4 residual it is less than a grey level. At 10 steps Gaussians would start at 4
    to 6, but photos gain texture from more; recipes/ABLATIONS.md has how much. From 10 to 100 only the
    smallest falls: a largest level that grew with the steps would make more steps noisier, as it decides how
    much of the network's own error at the noisiest levels gets into the image. Above 100 both widen, so that
    nothing is lost in the limit.
    """
    width = min(num_inference_steps, 10) * max(1.0, num_inference_steps / 100)
    return 0.14 * width**2, 0.5 / max(10, num_inference_steps)


# ------------------------------------------------------------------------------- reading off diffusers' steps


@lru_cache(maxsize=64)
def _steps(name: SchedulerName, alpha_bar: tuple[float, ...], count: int, eta: float) -> tuple[Step, ...]:
    """See Sampler.steps; cached, because a folder of images asks for the same steps again and again."""
    if name in ("ddim", "ddpm"):
        return _ddim_steps(alpha_bar, trailing_timesteps(len(alpha_bar), count), eta)
    timesteps = log_snr_timesteps(alpha_bar, count)
    if name == "heun":
        return _heun_steps(alpha_bar, timesteps)
    from diffusers.schedulers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    chosen = DPMSolverMultistepScheduler if name == "dpm++" else UniPCMultistepScheduler
    scheduler = _respaced(chosen, alpha_bar, timesteps, solver_order=2, prediction_type="sample")
    noisy, states = _unit(1 + count, 0), []
    for index in range(count):
        states.append(noisy)
        clean = _unit(1 + count, 1 + index)
        noisy = scheduler.step(clean, scheduler.timesteps[index], noisy).prev_sample.double()
    return _local_form(timesteps, [*states, noisy])


def _respaced(
    kind: type[_Diffusers],
    alpha_bar: Sequence[float],
    timesteps: Sequence[int],
    **options: int | str | bool,
) -> _Diffusers:
    """A scheduler of diffusers for a process that has these timesteps and no others.

    Its timestep i is the i-th of ours from the clean end, and it visits them all. That makes any list of
    timesteps exact (Nichol & Dhariwal 2021, section 4), where `DDIMScheduler.step` otherwise takes the
    previous timestep to be t - T // n, which is another one wherever n does not divide T.
    """
    kept = torch.tensor([alpha_bar[timestep] for timestep in reversed(timesteps)], dtype=torch.float64)
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    scheduler = kind(
        num_train_timesteps=len(timesteps),
        trained_betas=(1 - kept / before).tolist(),
        timestep_spacing="trailing",
        **options,
    )
    scheduler.alphas_cumprod = kept  # the same numbers, without the rounding of betas to float32
    scheduler.set_timesteps(len(timesteps))
    return scheduler


def _unit(length: int, index: int) -> Tensor:
    """The unit vector along one axis, shaped as an image: (1, 1, 1, length)."""
    unit = torch.zeros(1, 1, 1, length, dtype=torch.float64)
    unit[..., index] = 1
    return unit


def _ddim_steps(alpha_bar: Sequence[float], timesteps: Sequence[int], eta: float) -> tuple[Step, ...]:
    """DDIM on any falling list of timesteps; eta = 1 is DDPM (Song et al. 2021a, section 4.1)."""
    from diffusers.schedulers import DDIMScheduler

    scheduler = _respaced(DDIMScheduler, alpha_bar, timesteps, prediction_type="sample", clip_sample=False)
    noisy, clean, noise = torch.eye(3, dtype=torch.float64)
    steps = []
    for timestep, own in zip(timesteps, scheduler.timesteps, strict=True):
        following = scheduler.step(clean, own, noisy, eta=eta, variance_noise=noise).prev_sample
        noisy_weight, clean_weight, noise_weight = following.tolist()
        steps.append(Step(timestep, noisy_weight, (clean_weight,), noise_weight))
    return tuple(steps)


def _heun_steps(alpha_bar: Sequence[float], timesteps: Sequence[int]) -> tuple[Step, ...]:
    """Heun's method, behind one DDIM step from T - 1.

    The trapezoidal rule weighs both ends of a step in sigma alike, but the cosine schedule begins at sigma
    20000, and a step from there to 10 would magnify the second slope's error by 1000. The first step is
    Euler's instead. diffusers' scheduler works on noisy / signal_scale and takes the noise estimate; both
    are converted.
    """
    from diffusers.schedulers import HeunDiscreteScheduler

    if len(timesteps) == 1:
        return _ddim_steps(alpha_bar, timesteps, 0.0)
    first = _ddim_steps(alpha_bar, timesteps, 0.0)[:1]
    scheduler = _respaced(HeunDiscreteScheduler, alpha_bar, timesteps[1:], prediction_type="epsilon")
    sigmas = scheduler.sigmas.double()
    count = len(scheduler.timesteps)
    noisy, states = _unit(1 + count, 0), []
    for index in range(count):
        states.append(noisy)
        sigma, sigma_next = sigmas[index], sigmas[index + 1]
        scaled = noisy * (1 + sigma**2).sqrt()
        noise = (scaled - _unit(1 + count, 1 + index)) / sigma
        scaled = scheduler.step(noise, scheduler.timesteps[index], scaled).prev_sample
        noisy = scaled / (1 + sigma_next**2).sqrt()
    evaluated = [timesteps[1], *(timestep for timestep in timesteps[2:] for _ in range(2))]
    return first + _local_form(evaluated, [*states, noisy])


def _local_form(timesteps: Sequence[int], states: Sequence[Tensor]) -> tuple[Step, ...]:
    """Express each state by the one before it and the newest clean estimates.

    Args:
        timesteps: where the clean estimates were made.
        states: the noisy images, one more than the timesteps, each (1, 1, 1, 1 + n): its part of the
            initial noise and of every clean estimate.
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


# ------------------------------------------------------------------------------------------------------ noise


def noise_seed(seed: int, step: int, micro_batch: int) -> int:
    """A 63-bit seed for the random numbers of one forward pass, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def noise_stream(seed: int, number: int) -> torch.Generator:
    """The noise of one sample of an image; it depends on the seed and the sample's number alone."""
    return torch.Generator().manual_seed(noise_seed(seed, number, 0))


def draw_noise(streams: Sequence[torch.Generator], channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise (B, C, H, W), each image's from its own stream on the CPU.

    It is drawn NOISE_ROWS rows at a time from the top: whoever holds only some rows of an image at once draws
    the same numbers, on any device, and no image's noise depends on the others of its batch.
    """
    bands = [
        torch.stack(
            [torch.randn(channels, min(NOISE_ROWS, height - top), width, generator=one) for one in streams]
        )
        for top in range(0, height, NOISE_ROWS)
    ]
    return torch.cat(bands, dim=2)
