"""Schedulers of diffusers, built from the process's own alpha_bar and made exact for every step count.

Every scheduler here is handed the clean estimate ("sample" in diffusers' words), so that bounds on the
estimate and the three prediction modes are dealt with in one place, before it.
"""

from typing import Literal

import numpy as np
import torch
from diffusers.schedulers import DDIMScheduler
from torch import Tensor

SchedulerName = Literal["ddim"]


def trailing_timesteps(num_train_timesteps: int, num_inference_steps: int) -> list[int]:
    """round(T, T - T / n, T - 2 T / n, ...) - 1: starts at T - 1, the noisiest (Lin et al. 2024, Table 2).

    Raises:
        ValueError: the step count is not in [1, T].
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(f"steps must be between 1 and {num_train_timesteps}, not {num_inference_steps}")
    left = np.arange(num_inference_steps, 0, -1, dtype=np.int64) * num_train_timesteps
    rounded = (2 * left + num_inference_steps) // (2 * num_inference_steps)  # exact, halves up
    return [int(timestep) - 1 for timestep in rounded]


class ExactDDIMScheduler(DDIMScheduler):
    """DDIMScheduler that steps to the next timestep of its own list, whatever the step count.

    The parent takes the previous timestep to be t - T // n, which is another one wherever n does not divide
    T; it also rounds the list in floating point. After the last timestep the signal is whole (alpha_bar 1).
    """

    def __init__(self, alpha_bar: Tensor) -> None:
        """alpha_bar: (T,) float64, falling."""
        previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        super().__init__(
            num_train_timesteps=len(alpha_bar),
            trained_betas=(1 - alpha_bar / previous).tolist(),
            clip_sample=False,
            set_alpha_to_one=True,
            prediction_type="sample",
            timestep_spacing="trailing",
        )
        self.alphas_cumprod = alpha_bar.double().cpu()

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps; see trailing_timesteps."""
        timesteps = trailing_timesteps(self.config.num_train_timesteps, num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(timesteps, device=device)
        self._next = dict(zip(timesteps, [*timesteps[1:], -1], strict=True))

    def previous_sample(
        self, clean: Tensor, timestep: int, noisy: Tensor, eta: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """One step of DDIM (Song et al. 2021, Eq. 12 and 16).

        Args:
            clean: (B, C, H, W) estimate of the clean signal.
            timestep: the timestep of `noisy`, one of the list.
            noisy: (B, C, H, W).
            eta: 0 is deterministic, 1 has the variance of DDPM.
            noise: (B, C, H, W) standard normal, used where eta is not 0.
        """
        earlier = self._next[timestep]
        alpha_bar_t = float(self.alphas_cumprod[timestep])
        alpha_bar_earlier = float(self.alphas_cumprod[earlier]) if earlier >= 0 else 1.0
        predicted_noise = (noisy - alpha_bar_t**0.5 * clean) / (1 - alpha_bar_t) ** 0.5
        variance = (1 - alpha_bar_earlier) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_earlier)
        fresh_scale = eta * variance**0.5
        direction_scale = max(0.0, 1 - alpha_bar_earlier - fresh_scale**2) ** 0.5
        sample = alpha_bar_earlier**0.5 * clean + direction_scale * predicted_noise
        if fresh_scale > 0:
            assert noise is not None, "eta above 0 needs noise"
            sample = sample + fresh_scale * noise
        return sample
