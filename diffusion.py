"""Residual diffusion: the process, the model of it that is trained, and the generator that samples it.

    clean   = (high_res - upscaled) / residual_std                       unit variance
    noisy   = signal_scale clean + noise_scale noise                     signal_scale^2 = alpha_bar_t
    v       = signal_scale noise - noise_scale clean                     noise_scale^2 = 1 - alpha_bar_t

Shape legend: B batch, C channels, H x W pixels of the high resolution, h x w of the low one, T timesteps.
`t` is int64 (B,) in [0, T); t = T - 1 is the noisiest. Images are in [-1, 1], clean residuals have unit
variance and are not bounded by 1.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from bicubic import exact_scale, upscale_image
from engine.checkpoint import CheckpointError, Plain, StateDict, load_checkpoint, load_model, load_weights
from engine.processes import Processes
from imaging.files import to_unit_range
from samplers import DEFAULT_SCHEDULER, Sampler, SchedulerName, Step, draw_noise, noise_stream, sample
from schedules import Mode, ProcessConfig, Schedule, TimestepDensity, alpha_bar_of, timestep_quantile
from training import (
    Run,
    TrainingConfig,
    TrainState,
    Validation,
    new_state,
    restore_state,
    train,
)
from unet import Condition, UNetConfig
from util import CropDataset, ImageDataset, UpscaleFunction, degrade

Denoiser = Callable[[Tensor, Tensor, object], Tensor]


class Restorer(Protocol):
    """What a generator needs of a network: prediction, condition, and the numbers it was trained with."""

    config: UNetConfig
    residual_std: Tensor
    scale: Tensor

    def encode_context(self, condition: Condition) -> object:
        """Turn the condition into what __call__ takes, once per image."""
        ...

    def __call__(self, noisy: Tensor, t: Tensor, context: object) -> Tensor:
        """(B, C, H, W), (B,), the encoded condition -> (B, C, H, W)."""
        ...


class DiffusionModel:
    """The forward process, the targets, the loss, and training.

    In mode "noise" the network's output o is not the noise itself: the noise is predicted as
    noise_scale * noisy + signal_scale * o. At the noisiest timesteps the input already is the noise, and a
    network that has to copy it leaves an error that the division by signal_scale (5e-5 at t = T - 1) blows up
    beyond any image. With this form the clean estimate is signal_scale * noisy - noise_scale * o: no division
    by a small number, and the loss still is that of noise prediction.

    Args:
        timesteps: T.
        device: where the schedule lives.
        mode: "v_prediction" (Salimans & Ho 2022, appendix D), "noise" (Ho et al. 2020, Eq. 14) or "clean"; or
            "regression", the baseline without diffusion: the network sees zeros in place of noise at
            t = T - 1, and its absolute error is the loss.
        schedule: how alpha_bar falls, see alpha_bar_of.
        min_snr_gamma: weigh the losses by min(SNR, gamma) in terms of the clean estimate (Hang et al. 2023,
            Eq. 8), None leaves the loss of each mode as it is.
        timestep_density: which timesteps are trained most, see schedules.timestep_quantile.

    Raises:
        ValueError: a value that is not among these.
    """

    def __init__(
        self,
        timesteps: int = 1000,
        device: torch.device | str = "cpu",
        mode: Mode = "v_prediction",
        schedule: Schedule = "cosine",
        min_snr_gamma: float | None = None,
        timestep_density: TimestepDensity = "uniform",
    ) -> None:
        timestep_quantile(torch.full((1,), 0.5), timestep_density)  # refuses one that is not known
        if min_snr_gamma is not None and not 0 < min_snr_gamma < math.inf:
            raise ValueError(f"min_snr_gamma must be a positive number, not {min_snr_gamma}")
        self.process = ProcessConfig(timesteps, mode, schedule)
        self.min_snr_gamma = min_snr_gamma
        self.timestep_density: TimestepDensity = timestep_density
        self.device = torch.device(device)
        self.timesteps = timesteps
        self.mode: Mode = mode
        self.alpha_bar = alpha_bar_of(self.process)  # (T,) float64, on the CPU
        self.signal_scale = self.alpha_bar.sqrt().float().to(device)  # (T,)
        self.noise_scale = (1 - self.alpha_bar).sqrt().float().to(device)  # (T,)
        self.snr = (self.alpha_bar / (1 - self.alpha_bar)).float().to(device)  # (T,)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) timesteps -> signal_scale and noise_scale, each (B, 1, 1, 1)."""
        return self.signal_scale[t][:, None, None, None], self.noise_scale[t][:, None, None, None]

    def q_sample(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Diffuse (B, C, H, W) to timestep t in one go (Ho et al. 2020, Eq. 4)."""
        signal_scale, noise_scale = self.scales(t)
        return signal_scale * clean + noise_scale * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the prediction is compared with, (B, C, H, W): v, the noise, or the clean residual."""
        if self.mode == "noise":
            return noise
        if self.mode in ("clean", "regression"):
            return clean
        signal_scale, noise_scale = self.scales(t)
        return signal_scale * noise - noise_scale * clean

    def prediction(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The network's output as an estimate of the target; only in mode "noise" are they different."""
        if self.mode != "noise":
            return output
        signal_scale, noise_scale = self.scales(t)
        return noise_scale * noisy + signal_scale * output

    def clean_estimate(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The clean residual that the network's output stands for, (B, C, H, W)."""
        if self.mode in ("clean", "regression"):
            return output
        signal_scale, noise_scale = self.scales(t)
        return signal_scale * noisy - noise_scale * output

    def noise_estimate(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise that the network's output stands for, (B, C, H, W)."""
        signal_scale, noise_scale = self.scales(t)
        if self.mode in ("clean", "regression"):
            return (noisy - signal_scale * output) / noise_scale
        return noise_scale * noisy + signal_scale * output

    def loss(
        self, denoiser: Denoiser, clean: Tensor, context: object, generator: torch.Generator | None = None
    ) -> Tensor:
        """The mean squared error of the prediction at one random timestep per sample.

        The timesteps of a batch are spread evenly over their density from one random start (Kingma et al.
        2021, appendix I.1): each has that density, and their mean varies far less.

        Args:
            denoiser: (noisy, t, context) -> (B, C, H, W).
            clean: (B, C, H, W), unit variance.
            context: handed to the denoiser.
            generator: of timesteps and noise, on the device of clean.

        Returns:
            (B,) losses in float32.
        """
        batch = clean.shape[0]
        if self.mode == "regression":
            last = torch.full((batch,), self.timesteps - 1, device=clean.device)
            output = denoiser(torch.zeros_like(clean), last, context).float()
            return (output - clean).abs().flatten(1).mean(1)
        start = torch.rand(1, generator=generator, device=clean.device)
        spread = torch.arange(batch, device=clean.device) / batch
        share = timestep_quantile((start + spread) % 1, self.timestep_density)
        t = (share * self.timesteps).long().clamp(max=self.timesteps - 1)
        return self.loss_at(t, denoiser, clean, context, generator) * self.loss_weight(t)

    def loss_weight(self, t: Tensor) -> Tensor:
        """(B,) timesteps -> (B,) weights: 1, or min-SNR-gamma's for what the mode predicts."""
        if self.min_snr_gamma is None:
            return torch.ones(t.shape, device=t.device)
        snr = self.snr[t]
        weight = snr.clamp(max=self.min_snr_gamma)  # of an error of the clean estimate
        if self.mode == "clean":
            return weight
        if self.mode == "noise":
            return torch.where(snr > 0, weight / snr, 1.0)  # an error of the noise, times 1 / SNR
        return weight / (snr + 1)

    def loss_at(
        self,
        t: Tensor,
        denoiser: Denoiser,
        clean: Tensor,
        context: object,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The unweighted losses at given timesteps (B,); otherwise as `loss`."""
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        noisy = self.q_sample(clean, t, noise)
        output = denoiser(noisy, t, context).float()
        error = self.prediction(output, noisy, t) - self.target(clean, noise, t)
        return error.square().flatten(1).mean(1)

    def train(
        self,
        model: nn.Module,
        dataset: ImageDataset,
        config: TrainingConfig,
        *,
        validate: Callable[[nn.Module], Validation] | None = None,
        checkpoint_dir: Path,
        log_dir: Path,
        resume: Path | None = None,
        processes: Processes | None = None,
        precision: torch.dtype | None = None,
        settings: dict[str, Plain] | None = None,
        progress: bool = True,
        profile: bool = False,
    ) -> tuple[Run, int | None]:
        """Train a network to restore; see training.train for what the loop does.

        Args:
            model: a Restorer on this model's device, for instance unet.UNet. Its scale and residual_std are
                set from the dataset unless it already has them.
            dataset: what to learn from.
            config: how to train.
            validate: measures the averaged network, to choose the best checkpoint by; see
                evaluation.validation.Validator.
            checkpoint_dir: receives `diffusion_model_{mode}_best.pth` and `..._last.pth`.
            log_dir: receives the TensorBoard events.
            resume: a checkpoint to continue from.
            processes: this process among those of the run.
            precision: dtype to autocast to.
            settings: further plain values to keep in the checkpoint and show in TensorBoard.
            progress, profile: see training.train.

        Returns:
            The run's files, and None or the signal that ended it early.

        Raises:
            CheckpointError, NonFiniteError: see training.train.
        """
        state = new_state(model, config)
        if resume is not None:
            self.load_checkpoint_for_resume(state, resume)
        else:
            residual_std = float(network_of(model).residual_std) or measure_residual_std(dataset)
            scale = float(network_of(model).scale) or dataset.downscale_factor
            for network in (network_of(model), network_of(state.ema)):
                network.residual_std.fill_(residual_std)
                network.scale.fill_(scale)
        run = self._run(network_of(model), config, settings or {}, checkpoint_dir, log_dir)
        received = train(
            state,
            self.restoration_loss(dataset.downscale_factor, dataset.upscale_function),
            CropDataset(dataset),
            config,
            run,
            processes=processes,
            precision=precision,
            validate=validate,
            progress=progress,
            profile=profile,
        )
        return run, received

    def _run(
        self,
        model: Restorer,
        config: TrainingConfig,
        settings: dict[str, Plain],
        checkpoint_dir: Path,
        log_dir: Path,
    ) -> Run:
        """Where the run writes, and what its checkpoints hold besides the state of the loop."""
        metadata = {
            "unet": model.config.to_dict(),
            "process": self.process.to_dict(),
            "training": config.to_dict(),
            "settings": settings,
        }
        everything = {**settings, **config.to_dict(), **self.process.to_dict()}
        return Run(checkpoint_dir, log_dir, f"diffusion_model_{self.mode}", metadata, everything)

    def restoration_loss(
        self, downscale_factor: float, upscale_function: UpscaleFunction
    ) -> Callable[[nn.Module, Tensor, torch.Generator], Tensor]:
        """The loss of uint8 crops (B, C, H, W): degrade them on their device, then denoise the residual."""

        def loss(model: nn.Module, crops: Tensor, generator: torch.Generator) -> Tensor:
            with torch.autocast(crops.device.type, enabled=False):
                sample = degrade(crops, downscale_factor, upscale_function)
                clean = sample.residual / network_of(model).residual_std
            return self.loss(model, clean, Condition(sample.upscaled, sample.low_res), generator)

        return loss

    def load_model_weights(self, model: nn.Module, path: str | Path, verbose: bool = False) -> None:
        """Copy the averaged weights of a checkpoint or an exported model into a network.

        Raises:
            CheckpointError: the file is damaged, does not fit the network, or was trained in another mode or
                with another number of timesteps than this DiffusionModel has.
        """
        loaded = load_model(path)
        self._check_process(loaded.process, path)
        load_weights(model, cast(StateDict, loaded.unet.state_dict()), path)
        if verbose:
            print(f"{path}: {self.mode}, {loaded.step} steps")  # noqa: T201  # what verbose asks for

    def load_checkpoint_for_resume(self, state: TrainState, path: str | Path) -> None:
        """Continue the training that a checkpoint holds: weights, average, optimiser, step.

        Raises:
            CheckpointError: as load_model_weights, or the optimiser is another one.
        """
        content = load_checkpoint(path)
        self._check_process(cast(dict[str, Plain], content.get("process", {})), path)
        restore_state(state, path)

    def _check_process(self, process: dict[str, Plain], path: str | Path) -> None:
        for name, own in self.process.to_dict().items():
            if process.get(name) != own:
                raise CheckpointError(
                    f"{path} was trained with {name} {process.get(name)}, not {own}: use the same {name}"
                )


class ResidualGenerator:
    """Restores images by sampling their residuals, in any number of steps from 1 to T.

    Every clean estimate is clipped so that upscaled + residual stays an image: a projection onto a convex set
    that holds the truth, so it never makes the estimate worse.

    Args:
        img_channels: channels of the images.
        img_size: length of the longer side of a result for networks that do not know their scale.
        device: where to compute.
        num_train_timesteps: T of the training.
        predict_mode: mode of the training.
        precision: dtype to autocast the network to, None for float32.
        scheduler: see samplers.Sampler.
        schedule: noise schedule of the training.
    """

    def __init__(
        self,
        img_channels: int = 3,
        img_size: int = 256,
        device: torch.device | str = "cpu",
        num_train_timesteps: int = 1000,
        predict_mode: Mode = "v_prediction",
        precision: torch.dtype | None = None,
        scheduler: SchedulerName = DEFAULT_SCHEDULER,
        schedule: Schedule = "cosine",
    ) -> None:
        self.img_channels = img_channels
        self.img_size = img_size
        self.device = torch.device(device)
        self.precision = precision
        self.diffusion = DiffusionModel(num_train_timesteps, device, predict_mode, schedule)
        alpha_bar = self.diffusion.alpha_bar
        self.sampler = Sampler(scheduler, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    @classmethod
    def of(
        cls,
        process: ProcessConfig,
        device: torch.device | str,
        precision: torch.dtype | None = None,
        scheduler: SchedulerName = DEFAULT_SCHEDULER,
    ) -> "ResidualGenerator":
        """The generator for a process, as a checkpoint describes it."""
        return cls(
            device=device,
            num_train_timesteps=process.timesteps,
            predict_mode=process.mode,
            precision=precision,
            scheduler=scheduler,
            schedule=process.schedule,
        )

    def generate_images(
        self,
        model: Restorer,
        low_resolution_image: Tensor,
        num_images: int = 1,
        num_inference_steps: int = 50,
        *,
        seed: int | None = None,
        eta: float = 0.0,
    ) -> Tensor:
        """Restore images.

        Args:
            model: a trained network, for instance unet.UNet.
            low_resolution_image: (B, C, h, w) in [-1, 1].
            num_images: restorations of each image, with different noise.
            num_inference_steps: 1 is the posterior mean; more steps give a sample.
            seed: of the noise; the noise of an image depends on nothing else. None draws one.
            eta: fresh noise per step, for the scheduler "ddim": 0 for none, 1 for the variance of DDPM.

        Returns:
            (B * num_images, C, H, W) in [0, 1], the restorations of one image next to each other.

        Raises:
            ValueError: a wrong shape or range, an untrained network, or a step count outside [1, T].
        """
        low_res, upscaled = self._inputs(model, low_resolution_image)
        residuals = self._residuals(model, low_res, upscaled, num_images, num_inference_steps, seed, eta)
        return to_unit_range((upscaled.repeat_interleave(num_images, dim=0) + residuals).clamp(-1, 1))

    def generate_residuals(
        self,
        model: Restorer,
        low_resolution_image: Tensor,
        num_images: int = 1,
        num_inference_steps: int = 50,
        *,
        seed: int | None = None,
        eta: float = 0.0,
    ) -> Tensor:
        """As generate_images, but what is to be added to the upscaled image: in [-2, 2]."""
        low_res, upscaled = self._inputs(model, low_resolution_image)
        return self._residuals(model, low_res, upscaled, num_images, num_inference_steps, seed, eta)

    def restore(
        self,
        model: Restorer,
        low_res: Tensor,
        upscaled: Tensor,
        steps: int,
        seed: int,
        *,
        sample: int = 0,
        eta: float = 0.0,
    ) -> Tensor:
        """Restore images whose upscaled version is at hand: (B, C, H, W) in [0, 1]."""
        streams = [noise_stream(seed, sample) for _ in upscaled]
        residual = self._residual(model, low_res, upscaled, self.plan(steps, eta), streams)
        return to_unit_range((upscaled + residual).clamp(-1, 1))

    def plan(self, steps: int, eta: float = 0.0) -> tuple[Step, ...]:
        """The steps of the sampler; ValueError for a number that it or the process cannot take."""
        return self.sampler.steps(steps, eta)

    def encode(self, model: Restorer, condition: Condition) -> object:
        """The condition as `estimate` takes it, encoded once and in this generator's precision."""
        with self.autocast():
            return model.encode_context(condition)

    def estimate(
        self, model: Restorer, noisy: Tensor, timestep: int, context: object, upscaled: Tensor
    ) -> Tensor:
        """One evaluation of the network: the clean residual of unit variance it sees in a noisy one.

        Args:
            model: a trained network.
            noisy: (B, C, H, W).
            timestep: of the noisy image, in [0, T).
            context: what `encode` made of the condition.
            upscaled: (B, C, H, W) in [-1, 1].

        Returns:
            (B, C, H, W), clipped so that upscaled + residual lies in [-1, 1].
        """
        t = torch.full((len(noisy),), timestep, device=noisy.device)
        with self.autocast():
            output = model(noisy, t, context).float()
        clean = self.diffusion.clean_estimate(output, noisy, t)
        # residual_std stays on its device: reading it here would make a GPU wait at every step.
        return clean.clamp((-1 - upscaled) / model.residual_std, (1 - upscaled) / model.residual_std)

    def autocast(self) -> torch.autocast:
        """The precision that the network computes in."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not None)

    def _inputs(self, model: Restorer, low_res: Tensor) -> tuple[Tensor, Tensor]:
        """Check the input, move it to the device and upscale it."""
        if low_res.ndim != 4 or low_res.shape[1] != self.img_channels:
            raise ValueError(
                f"the low-resolution image must be (B, {self.img_channels}, h, w), not {tuple(low_res.shape)}"
            )
        if low_res.min() < -1.001 or low_res.max() > 1.001:
            raise ValueError("the low-resolution image must be in [-1, 1]: to_model_range maps [0, 1] to it")
        low_res = low_res.to(self.device, torch.float32)
        scale = exact_scale(float(model.scale) or self.img_size / max(low_res.shape[-2:]))
        return low_res, upscale_image(low_res, float(scale)).clamp(-1, 1)

    def _residuals(
        self,
        model: Restorer,
        low_res: Tensor,
        upscaled: Tensor,
        num_images: int,
        steps: int,
        seed: int | None,
        eta: float,
    ) -> Tensor:
        """(B * num_images, C, H, W) residuals in [-2, 2], those of one image next to each other."""
        seed = torch.seed() % 2**62 if seed is None else seed
        plan = self.plan(steps, eta)
        residuals = [
            self._residual(model, low_res, upscaled, plan, [noise_stream(seed, number) for _ in upscaled])
            for number in range(num_images)
        ]
        return torch.stack(residuals, dim=1).flatten(0, 1)

    @torch.inference_mode()
    def _residual(
        self,
        model: Restorer,
        low_res: Tensor,
        upscaled: Tensor,
        plan: Sequence[Step],
        streams: Sequence[torch.Generator],
    ) -> Tensor:
        """One sample of each image, its noise from its own stream: residuals (B, C, H, W) in [-2, 2]."""
        if float(model.residual_std) <= 0:
            raise ValueError("this network has no residual_std: load trained weights into it first")
        context = self.encode(model, Condition(upscaled, low_res))

        def noise() -> Tensor:
            channels, height, width = upscaled.shape[1:]
            return draw_noise(streams, channels, height, width).to(self.device)

        def denoise(noisy: Tensor, timestep: int) -> Tensor:
            return self.estimate(model, noisy, timestep, context, upscaled)

        def advance(step: Step, noisy: Tensor, cleans: Sequence[Tensor]) -> Tensor:
            return step.advance(noisy, cleans, noise() if step.noise_weight else None)

        steps = sample(plan, self.sampler.initial_scale * noise(), denoise, advance)
        return deque(steps, maxlen=1).pop() * model.residual_std


def measure_residual_std(dataset: ImageDataset, samples: int = 256) -> float:
    """Root mean square of the residuals in [-2, 2] of up to `samples` training crops.

    Raises:
        ValueError: every residual is zero, as for a folder of blank images.
    """
    crops = [dataset[index].residual.double() for index in range(min(samples, len(dataset)))]
    mean_square = float(torch.stack(crops).square().mean())
    if mean_square == 0:
        raise ValueError("bicubic upscaling already restores every training image: there is nothing to learn")
    return math.sqrt(mean_square)


def network_of(model: nn.Module) -> Restorer:
    """The network inside a wrapper of DistributedDataParallel or torch.compile, or the network itself."""
    inner = getattr(model, "module", getattr(model, "_orig_mod", model))
    return cast(Restorer, inner)
