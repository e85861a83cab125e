"""The diffusion process as a configuration: how many timesteps, what is predicted, how noise grows.

alpha_bar_t is the share of the signal's variance that is left after t + 1 noising steps; t is in [0, T).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

Mode = Literal["v_prediction", "noise", "clean", "regression"]
Schedule = Literal["cosine", "linear", "sigmoid", "zero_terminal_snr"]
TimestepDensity = Literal["uniform", "logit_normal", "high_noise"]
HIGH_NOISE_SHIFT = 3.0


@dataclass(frozen=True)
class ProcessConfig:
    """Which diffusion process a network was trained for; a checkpoint carries it.

    Attributes:
        timesteps: T.
        mode: what the network is compared with: "v_prediction", "noise" or "clean"; or "regression", which is
            no diffusion: from an input without noise to the clean residual, by its absolute error.
        schedule: how alpha_bar falls, see alpha_bar_of.
    """

    timesteps: int = 1000
    mode: Mode = "v_prediction"
    schedule: Schedule = "cosine"

    def __post_init__(self) -> None:
        if not 1 <= self.timesteps <= 100_000:
            raise ValueError(f"timesteps must be between 1 and 100000, not {self.timesteps}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, not {self.mode!r}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {get_args(Schedule)}, not {self.schedule!r}")

    def to_dict(self) -> dict[str, int | str]:
        """Plain values, as a checkpoint holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "ProcessConfig":
        """The inverse of to_dict. ValueError names what is missing or unknown."""
        own = {field.name for field in fields(cls)}
        if set(values) != own:
            raise ValueError(
                f"a process has {sorted(own)}, not {sorted(values)}: is the file of another version?"
            )
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks every value


def cosine_alpha_bar(timesteps: int, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """The cosine schedule (Nichol & Dhariwal 2021, Eq. 17), each beta at most max_beta.

    Returns:
        (T,) float64, strictly falling, alpha_bar after each of the T noising steps.
    """
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=max_beta)
    return torch.cumprod(1 - betas, dim=0)


def linear_alpha_bar(timesteps: int) -> Tensor:
    """Betas from 1e-4 to 0.02 for T = 1000 (Ho et al. 2020, section 4), scaled so that any T ends alike.

    Returns:
        (T,) float64, strictly falling.
    """
    stretch = 1000 / timesteps
    betas = torch.linspace(1e-4 * stretch, 0.02 * stretch, timesteps, dtype=torch.float64)
    return torch.cumprod(1 - betas.clamp(max=0.999), dim=0)


def sigmoid_alpha_bar(timesteps: int, start: float = -3.0, end: float = 3.0) -> Tensor:
    """The sigmoid schedule with temperature 1 (Jabri et al. 2022, Algorithm 2), each beta at most 0.999.

    Returns:
        (T,) float64, strictly falling.
    """
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.sigmoid(-(start + u * (end - start)))
    normalised = (f - f[-1]) / (f[0] - f[-1])
    betas = (1 - normalised[1:] / normalised[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


def zero_terminal_alpha_bar(timesteps: int) -> Tensor:
    """The linear schedule shifted and scaled to end in pure noise (Lin et al. 2024, Algorithm 1).

    Returns:
        (T,) float64, strictly falling to exactly 0; its first value is the linear schedule's.
    """
    if timesteps < 2:
        raise ValueError("zero_terminal_snr needs at least 2 timesteps")
    root = linear_alpha_bar(timesteps).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def alpha_bar_of(process: ProcessConfig) -> Tensor:
    """The (T,) float64 alpha_bar of a process."""
    schedules = {
        "cosine": cosine_alpha_bar,
        "linear": linear_alpha_bar,
        "sigmoid": sigmoid_alpha_bar,
        "zero_terminal_snr": zero_terminal_alpha_bar,
    }
    return schedules[process.schedule](process.timesteps)


def timestep_quantile(share: Tensor, density: TimestepDensity) -> Tensor:
    """The timestep below which a share of the training samples lies: uniform shares become timesteps.

    Args:
        share: (B,) in [0, 1).
        density: "uniform"; "logit_normal", whose logit is a standard normal variable and which favours the
            middle (Esser et al. 2024, section 3.1); or "high_noise", uniform timesteps shifted towards the
            noisiest by 3 (the same, Eq. 23).

    Returns:
        (B,) in [0, 1], as a fraction of T.

    Raises:
        ValueError: there is no such density.
    """
    if density == "uniform":
        return share
    if density == "logit_normal":
        return torch.sigmoid(torch.special.ndtri(share))
    if density == "high_noise":
        return HIGH_NOISE_SHIFT * share / (1 + (HIGH_NOISE_SHIFT - 1) * share)
    raise ValueError(f"timestep_density must be one of {get_args(TimestepDensity)}, not {density!r}")
