"""Residual diffusion: the process, training a model of it, and sampling.

    clean = (high_res - upscaled) / residual_std - mean        mean: the network's own prediction, or 0
    noisy = signal_scale clean + noise_scale noise
    clean = c_skip noisy + c_out output                        what its output stands for

A schedule is (signal_scale, noise_scale), a prediction (c_skip, c_out, weight of the squared error): each is
a line in the tables below.

Shapes: B batch, C channels, H x W pixels of the high resolution, h x w of the low one, T timesteps. `t` is
int64 (B,), T - 1 the noisiest. Images are in [-1, 1], clean has unit variance.
"""

import math
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bicubic import exact_scale, upscale_image
from degradation import Degradation
from engine.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_weights, read_for_resume
from engine.options import OptionError, Options, option
from engine.processes import Processes
from engine.run import RunFiles
from imaging.pixels import to_model_range, to_unit_range
from network import Condition, Network, name_of
from samplers import (
    DEFAULT_SCHEDULER,
    Scales,
    SchedulerName,
    Step,
    draw_noise,
    initial_scale,
    level_steps,
    noise_stream,
    sample,
    sampler_steps,
)
from training import (
    LossFunction,
    ResolvedConfig,
    StepFunction,
    TrainingConfig,
    TrainingLoop,
    TrainState,
    Validate,
    new_state,
    restore_state,
    train_step,
)
from util import Crops, ImageDataset

MakeStep = Callable[[TrainState, ResolvedConfig, Processes], StepFunction]
Denoiser = Callable[[Tensor, Tensor, object], Tensor]
Contexts = tuple[object, ...]  # encoded conditions: with tokens and, for guidance, without


def variance_preserving(alpha_bar: Tensor) -> Scales:
    """signal_scale^2 = alpha_bar, noise_scale^2 = 1 - alpha_bar (Ho et al. 2020, Eq. 4)."""
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def cosine_alpha_bar(timesteps: int) -> Tensor:
    """(T,) float64: the cosine schedule (Nichol & Dhariwal 2021, Eq. 17)."""
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    return _capped(torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)


def _capped(f: Tensor) -> Tensor:
    """(T,) alpha_bar that follows f, (T + 1,), with betas of at most 0.999."""
    return torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), dim=0)


def linear_alpha_bar(timesteps: int) -> Tensor:
    """(T,) float64: betas grow evenly from 1e-4 to 0.02 at T = 1000 (Ho et al. 2020, section 4)."""
    stretch = 1000 / timesteps
    betas = torch.linspace(1e-4 * stretch, 0.02 * stretch, timesteps, dtype=torch.float64)
    return torch.cumprod(1 - betas.clamp(max=0.999), dim=0)


def sigmoid_alpha_bar(timesteps: int) -> Tensor:
    """(T,) float64: a sigmoid from -3 to 3 at temperature 1 (Jabri et al. 2022, Algorithm 2)."""
    f = torch.sigmoid(3 - 6 * torch.arange(timesteps + 1, dtype=torch.float64) / timesteps)
    return _capped((f - f[-1]) / (f[0] - f[-1]))


def zero_terminal_alpha_bar(timesteps: int) -> Tensor:
    """(T,) float64, the linear schedule moved to end in 0 (Lin et al. 2024, Algorithm 1)."""
    if timesteps < 2:
        raise ValueError(f"timesteps is {timesteps}: the schedule zero_terminal_snr needs at least 2")
    root = linear_alpha_bar(timesteps).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def flow_scales(timesteps: int) -> Scales:
    """1 - u and u = (t + 1) / T: a straight line (Lipman et al. 2023; Liu et al. 2023)."""
    u = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    return 1 - u, u


def resshift_scales(timesteps: int, kappa: float = 2.0, power: float = 0.3) -> Scales:
    """1 - eta and kappa sqrt(eta): ResShift (Yue et al. 2023, Eq. 2 and 10) of the residual.

    sqrt(eta) grows geometrically from min(0.04 / kappa, sqrt(0.001)) to sqrt(0.999), fastest at first.
    """
    u = torch.linspace(0, 1, timesteps, dtype=torch.float64) ** power
    first, last = min(0.04 / kappa, math.sqrt(0.001)), math.sqrt(0.999)
    root = first * (last / first) ** u
    return 1 - root**2, kappa * root


# T -> signal_scale and noise_scale, each (T,) float64
SCHEDULES: dict[str, Callable[[int], Scales]] = {
    "cosine": lambda timesteps: variance_preserving(cosine_alpha_bar(timesteps)),
    "linear": lambda timesteps: variance_preserving(linear_alpha_bar(timesteps)),
    "sigmoid": lambda timesteps: variance_preserving(sigmoid_alpha_bar(timesteps)),
    "zero_terminal_snr": lambda timesteps: variance_preserving(zero_terminal_alpha_bar(timesteps)),
    "flow": flow_scales,
    "resshift": resshift_scales,
}


def _v_prediction(signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predict v = signal_scale noise - noise_scale clean (Salimans & Ho 2022, appendix D), at unit power."""
    power = signal.square() + noise.square()
    return signal / power, -noise / power, torch.ones_like(signal)


def _noise(signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predict v, and weigh its error as that of the noise is weighed (Ho et al. 2020, Eq. 14).

    The error of the noise is signal_scale that of v; an output of noise would have its error divided by
    signal_scale, 5e-5 at the noisiest.
    """
    c_skip, c_out, _ = _v_prediction(signal, noise)
    return c_skip, c_out, signal.square() / (signal.square() + noise.square())


def _clean(signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(signal), torch.ones_like(signal), torch.ones_like(signal)


# signal_scale, noise_scale -> c_skip, c_out, weight of the squared error
MODES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "v_prediction": _v_prediction,
    "noise": _noise,
    "clean": _clean,
}


@dataclass(frozen=True)
class ProcessConfig(Options):
    timesteps: int = option(1000, "number of noise levels of the diffusion process", low=1, high=100_000)
    mode: str = option("v_prediction", "quantity that is predicted", flag="diffusion_mode", choices=MODES)
    schedule: str = option("cosine", "growth of the noise over the timesteps", choices=SCHEDULES)
    levels: tuple[float, ...] = option(
        (), "noise over signal at the one or two evaluations of a sharpened model", above=0, may_be_empty=True
    )
    # As in Kingma & Dhariwal 2018, section 6.1; texture made of noise is grain (recipes/ABLATIONS.md).
    temperature: float = option(1.0, "factor of the noise that sharpened models start from", above=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.levels) > 2 or list(self.levels) != sorted(set(self.levels), reverse=True):
            raise OptionError("levels", self.levels, "give at most two, the largest first")
        if self.temperature != 1 and not self.levels:
            raise OptionError("temperature", self.temperature, "give levels, too, or leave it out")

    def scales(self) -> Scales:
        return SCHEDULES[self.schedule](self.timesteps)


@dataclass(frozen=True)
class ObjectiveConfig(Options):
    # Ho & Salimans 2022.
    token_dropout: float = option(0.1, "share of samples trained without their tokens", low=0, high=1)
    mean_only: bool = option(False, "training of the predicted mean alone, a first and quicker phase")


class DiffusionModel:
    """Diffuses clean residuals, measures the loss of a network on them, and trains it.

    `process` stands for timesteps, mode and schedule together. OptionError names a wrong value.
    """

    def __init__(
        self,
        timesteps: int = 1000,
        device: torch.device | str = "cpu",
        mode: str = "v_prediction",
        schedule: str = "cosine",
        *,
        process: ProcessConfig | None = None,
        objective: ObjectiveConfig | None = None,
    ) -> None:
        self.process = process or ProcessConfig(timesteps, mode, schedule)
        self.objective = objective or ObjectiveConfig()
        self.timesteps, self.mode = self.process.timesteps, self.process.mode
        self.device = torch.device(device)
        signal, noise = self.process.scales()
        tables = (signal, noise, *MODES[self.process.mode](signal, noise))
        self.signal_scale, self.noise_scale, self.c_skip, self.c_out, self.weight = (
            table.float().to(device) for table in tables
        )

    def q_sample(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Diffuse (B, C, H, W) to timestep t (Ho et al. 2020, Eq. 4)."""
        return _at(self.signal_scale, t) * clean + _at(self.noise_scale, t) * noise

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip, c_out (B, 1, 1, 1): clean = c_skip noisy + c_out output (Karras et al. 2022, Eq. 7)."""
        return _at(self.c_skip, t), _at(self.c_out, t)

    def clean_estimate(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """(B, C, H, W): what the network's output says the clean residual is."""
        c_skip, c_out = self.coefficients(t)
        return c_skip * noisy + c_out * output

    def target(self, clean: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """(B, C, H, W): the output whose clean estimate is `clean`."""
        c_skip, c_out = self.coefficients(t)
        return (clean - c_skip * noisy) / c_out

    def draw_timesteps(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count,) int64, spread evenly over all timesteps (Kingma et al. 2021, appendix I.1)."""
        start = torch.rand(1, generator=generator, device=self.device)
        shares = (start + torch.arange(count, device=self.device) / count) % 1
        return (shares * self.timesteps).long().clamp(max=self.timesteps - 1)

    def loss(
        self, denoiser: Denoiser, clean: Tensor, context: object, generator: torch.Generator | None = None
    ) -> Tensor:
        """(B,) float32: weighted squared error of what the denoiser outputs at timesteps that are drawn."""
        t = self.draw_timesteps(len(clean), generator)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        noisy = self.q_sample(clean, t, noise)  # (B, C, H, W)
        error = denoiser(noisy, t, context).float() - self.target(clean, noisy, t)
        return self.weight[t] * error.square().flatten(1).mean(1)

    def restoration_loss(self, degradation: Degradation) -> LossFunction:
        """Make the loss (B,) of crops: of the diffusion, and the absolute error of the predicted mean.

        The diffusion models what the mean leaves (Whang et al. 2022, section 3).
        """

        def loss(model: nn.Module, crops: Crops, generator: torch.Generator) -> Tensor:
            network, tokens = network_of(model), crops.tokens
            if tokens is not None:
                draws = torch.rand(len(tokens), 1, 1, generator=generator, device=tokens.device)
                tokens = tokens * (draws >= self.objective.token_dropout)
            low_res, upscaled, _, residual = crops.sample(degradation)
            clean = residual / network.residual_std
            context, mean = network.encode_context(Condition(upscaled, low_res, tokens))
            if mean is None:
                if self.objective.mean_only:
                    raise ValueError("this network predicts no mean: give it a predictor, or no mean_only")
                return self.loss(model, clean, context, generator)
            mean_error = (mean.float() - clean).abs().flatten(1).mean(1)
            if self.objective.mean_only:
                return mean_error
            left = clean - mean.detach().float()
            return self.loss(model, left, context, generator) + mean_error

        return loss

    def train(
        self,
        model: nn.Module,
        dataset: ImageDataset,
        config: TrainingConfig,
        *,
        checkpoint_dir: Path,
        log_dir: Path,
        resume: Path | Checkpoint | None = None,
        record: Mapping[str, object] = types.MappingProxyType({}),
        processes: Processes | None = None,
        precision: torch.dtype | None = None,
        validate: Validate | None = None,
        make_step: MakeStep | None = None,
    ) -> tuple[RunFiles, int | None]:
        """Train a Network on what the dataset degrades; return its files, and the signal that ended it.

        Writes `checkpoint_dir/diffusion_model_{mode}_best.pth` and `..._last.pth`, with `record` in them.
        `precision` is what the loss is autocast to. `validate` is an evaluation.validation.Validator.
        `make_step` is for another loss than the diffusion's, as sharpening.Sharpening.
        ValueError: what a checkpoint cannot record, or another scale; else as TrainingLoop.train.
        """
        network, processes = network_of(model), processes or Processes(self.device)
        resolved = config.resolved(len(dataset), processes.world_size)
        if resume is None:
            _set_buffers(network, dataset)
        processes.share(model)
        state = new_state(model, resolved, precision)
        loss = self.restoration_loss(dataset.degradation)
        step: StepFunction = partial(train_step, state, loss, config=resolved, processes=processes)
        if make_step is not None:
            step = make_step(state, resolved, processes)
        if resume is not None:
            self.load_checkpoint_for_resume(state, resume)
        decided = replace(resolved, optimizer=state.optimizer_name)
        record = {**self._record(network, dataset, decided), **record}
        run = RunFiles(checkpoint_dir, log_dir, f"diffusion_model_{self.mode}", record)
        return run, TrainingLoop(state, step, dataset, resolved, run, processes, validate).train()

    def _record(self, network: Network, dataset: ImageDataset, config: ResolvedConfig) -> dict[str, object]:
        """Return the options that restoring and resuming follow; ValueError for a dataset that has others."""
        if dataset.upscale_function is not upscale_image:
            raise ValueError(
                f"a checkpoint cannot record the upscale function {dataset.upscale_function!r}, and "
                "restoring would use bicubic: train with bicubic.upscale_image"
            )
        scale, wanted = float(network.scale), dataset.degradation.scale
        if not math.isclose(scale, wanted, rel_tol=1e-5):
            raise ValueError(f"the network enlarges by {scale:g}, the dataset by {wanted:g}: give one scale")
        options = {"process": self.process, "objective": self.objective, "degradation": dataset.degradation}
        options |= {"network": network.config, "training": config}
        sections = {name: one.to_dict() for name, one in options.items()}
        return {**sections, "network_class": name_of(type(network))}

    def load_model_weights(self, model: nn.Module, path: str | Path, verbose: bool = False) -> None:
        """Load the averaged weights; CheckpointError where they are damaged, unfit or of another process."""
        content = load_checkpoint(path)
        self._check_process(content.get("process"), path)
        load_weights(model, content.get("ema", {}), path)
        if verbose:
            print(f"{path}: {self.mode}, {content['step']} steps")  # noqa: T201  # what verbose asks for

    def load_checkpoint_for_resume(self, state: TrainState, checkpoint: str | Path | Checkpoint) -> None:
        """Set the state to the checkpoint's; CheckpointError where process, network or optimiser differ."""
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = read_for_resume(checkpoint)
        self._check_process(checkpoint.content.get("process"), checkpoint.path)
        restore_state(state, checkpoint)

    def _check_process(self, process: Mapping[str, object] | None, path: str | Path) -> None:
        recorded = ProcessConfig.from_dict(process or {})
        if recorded != self.process:
            raise CheckpointError(f"{path} was trained with {recorded}: use it, not {self.process}")


def _at(table: Tensor, t: Tensor) -> Tensor:
    """(T,), (B,) -> (B, 1, 1, 1): the values of a table at each image's timestep."""
    return table[t][:, None, None, None]


def _set_buffers(network: Network, dataset: ImageDataset) -> None:
    if not network.residual_std:
        network.residual_std.fill_(measure_residual_std(dataset))
    if not network.scale:
        network.scale.fill_(dataset.degradation.scale)


class ResidualGenerator:
    """Restores images by sampling their residuals, in any number of steps from 1 to T.

    Clean estimates are clipped so that upscaled + residual is an image: a projection, closer to the truth.

    Args:
        img_size: longer side of a result, for networks without a scale.
        num_train_timesteps, predict_mode: of the training.
        process: of the training, instead of these two, as `load_model(path).process`.
        precision: dtype to autocast to, None for float32.
        guidance: estimates go from those without tokens, 0, to those with them, 1, and beyond (Ho & Salimans
            2022, Eq. 6); another than 1 costs a second evaluation.
    """

    def __init__(
        self,
        img_channels: int = 3,
        img_size: int = 256,
        device: torch.device | str = "cpu",
        num_train_timesteps: int = 1000,
        predict_mode: str = "v_prediction",
        *,
        process: ProcessConfig | None = None,
        precision: torch.dtype | None = None,
        scheduler: SchedulerName = DEFAULT_SCHEDULER,
        guidance: float = 1.0,
    ) -> None:
        process = process or ProcessConfig(num_train_timesteps, predict_mode)
        self.diffusion = DiffusionModel(device=device, process=process)
        self.img_channels, self.img_size, self.device = img_channels, img_size, self.diffusion.device
        self.precision, self.scheduler, self.guidance = precision, scheduler, guidance
        levels, scales = process.levels, process.scales()
        start = level_steps(scales, levels)[1] if levels else initial_scale(scales)
        self.initial_scale = process.temperature * start

    @torch.inference_mode()
    def generate_images(
        self,
        model: Network,
        low_resolution_image: Tensor,
        num_images: int = 1,
        num_inference_steps: int = 50,
        *,
        seed: int | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """(B * num_images, C, H, W) in [0, 1], those of one image next to each other.

        Args:
            low_resolution_image: (B, C, h, w) in [-1, 1].
            num_images: of each image, with different noise.
            num_inference_steps: more give a sample; 1 the posterior mean; 0 the mean of a predictor.
            seed: of the noise; None draws one.
            tokens: (B, N, E) on the device, which describe the images.

        ValueError: a wrong shape, range or step count, or an untrained network.
        """
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}: give at least 1")
        if self.guidance != 1 and tokens is None:
            raise ValueError(f"guidance is {self.guidance}, but there are no tokens to strengthen: give some")
        steps = self.plan(num_inference_steps)
        upscaled = self._upscaled(model, low_resolution_image)
        contexts, mean = self.encode(model, Condition(upscaled, low_resolution_image.to(upscaled), tokens))
        if mean is None and not steps:
            raise ValueError("0 steps: this network predicts no mean; give 1 step or more")
        base = with_mean(model, upscaled, mean)
        denoise = partial(self.estimate, model, contexts=contexts, base=base)
        seed = torch.seed() % 2**62 if seed is None else seed
        clean = base.new_zeros(num_images, *base.shape)  # what the mean leaves
        for number in range(num_images if steps else 0):
            streams = [noise_stream(seed, number) for _ in base]
            clean[number] = self.sample(steps, partial(draw_noise, streams, *base.shape[1:]), denoise)
        restored = (base + clean * model.residual_std).clamp(-1, 1)  # (num_images, B, C, H, W)
        return to_unit_range(restored).transpose(0, 1).flatten(0, 1)

    @torch.inference_mode()
    def generate_residuals(
        self,
        model: Network,
        low_resolution_image: Tensor,
        num_images: int = 1,
        num_inference_steps: int = 50,
        *,
        seed: int | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """(B * num_images, C, H, W) in [-2, 2]: what generate_images adds to the upscaled image."""
        images = self.generate_images(
            model, low_resolution_image, num_images, num_inference_steps, seed=seed, tokens=tokens
        )
        upscaled = self._upscaled(model, low_resolution_image).repeat_interleave(num_images, dim=0)
        return to_model_range(images) - upscaled

    def sample(
        self, steps: Sequence[Step], draw: Callable[[], Tensor], denoise: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        """(B, C, H, W) of unit variance: what the steps make of the standard normal noise that is drawn."""

        def advance(step: Step, noisy: Tensor, cleans: Sequence[Tensor]) -> Tensor:
            return step.advance(noisy, cleans, draw().to(self.device) if step.noise_weight else None)

        noisy = self.initial_scale * draw().to(self.device)
        return deque(sample(steps, noisy, denoise, advance), maxlen=1).pop()

    def plan(self, steps: int, eta: float = 0.0, detail: float = 1.0) -> tuple[Step, ...]:
        """Plan the evaluations, none for 0 steps; OptionError as samplers.sampler_steps.

        Those of a sharpened model are fixed: `steps` is their number.
        """
        scales, levels = self.diffusion.process.scales(), self.diffusion.process.levels
        if steps and levels:
            if (steps, eta, self.scheduler) != (len(levels), 0.0, DEFAULT_SCHEDULER):
                rule = f"this model is sharpened for {len(levels)} and no other sampler: leave it out"
                raise OptionError("steps", steps, rule)
            return level_steps(scales, levels, detail)[0]
        return sampler_steps(self.scheduler, scales, steps, eta, detail) if steps else ()

    def encode(self, model: Network, condition: Condition) -> tuple[Contexts, Tensor | None]:
        """Encode a condition for `estimate`; the predicted mean (B, C, H, W), if any, comes with it."""
        with self.autocast():
            context, mean = model.encode_context(condition)
            if self.guidance == 1 or condition.tokens is None:
                return (context,), mean
            silent = condition._replace(tokens=torch.zeros_like(condition.tokens))
            return (context, model.encode_context(silent)[0]), mean

    def estimate(
        self, model: Network, noisy: Tensor, timestep: int, contexts: Contexts, base: Tensor
    ) -> Tensor:
        """(B, C, H, W): the clean residual of unit variance that the network sees in a noisy one.

        `base` is upscaled + residual_std * mean, (B, C, H, W); base + residual is clipped to [-1, 1].
        """
        t = torch.full((len(noisy),), timestep, device=noisy.device)
        with self.autocast():
            output, *without = (model(noisy, t, context).float() for context in contexts)
        if without:
            output = without[0] + self.guidance * (output - without[0])
        clean = self.diffusion.clean_estimate(output, noisy, t)
        if self.diffusion.process.levels:
            clean = without_grid(clean, model.cell)
        # residual_std stays on its device: reading it here would make a GPU wait at every step.
        return clean.clamp((-1 - base) / model.residual_std, (1 - base) / model.residual_std)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not None)

    def _upscaled(self, model: Network, low_res: Tensor) -> Tensor:
        """(B, C, H, W) float32 in [-1, 1] on the device."""
        if low_res.ndim != 4 or low_res.shape[1] != self.img_channels:
            raise ValueError(
                f"the low-resolution image must be (B, {self.img_channels}, h, w), not {tuple(low_res.shape)}"
            )
        if float(model.residual_std) <= 0:
            raise ValueError("this network has no residual_std: load trained weights into it first")
        if low_res.min() < -1.001 or low_res.max() > 1.001:
            raise ValueError("the low-resolution image must be in [-1, 1]: to_model_range maps [0, 1] to it")
        scale = exact_scale(float(model.scale) or self.img_size / max(low_res.shape[-2:]))
        return upscale_image(low_res.to(self.device, torch.float32), float(scale)).clamp(-1, 1)


def without_grid(image: Tensor, cell: int) -> Tensor:
    """(B, C, H, W): the image less what repeats in all of the 5 x 5 cells around, each of cell x cell pixels.

    Sub-pixel convolutions draw such a grid on smooth skin as soon as an adversary asks for texture (Odena et
    al. 2016), and perceptual features take it for that. The mean of a cell is left alone.
    """
    height, width = image.shape[-2:]
    # A cell that is cut off ends as the one before.
    rows, columns = (torch.arange(n + -n % cell, device=image.device) for n in (height, width))
    rows = rows.where(rows < height, rows - cell).clamp(min=0)
    columns = columns.where(columns < width, columns - cell).clamp(min=0)
    # (B, C cell cell, H / cell, W / cell)
    places = F.pixel_unshuffle(image[..., rows[:, None], columns], cell)
    repeated = F.avg_pool2d(places, 5, stride=1, padding=2, count_include_pad=False)
    repeated = repeated.unflatten(1, (image.shape[1], -1))  # (B, C, cell cell, H / cell, W / cell)
    grid = (repeated - repeated.mean(2, keepdim=True)).flatten(1, 2)
    return image - F.pixel_shuffle(grid, cell)[..., :height, :width]


def with_mean(network: Network, upscaled: Tensor, mean: Tensor | None) -> Tensor:
    """(B, C, H, W): the upscaled images, plus what the network predicts of their residuals, if anything."""
    return upscaled if mean is None else upscaled + network.residual_std * mean.float()


def measure_residual_std(dataset: ImageDataset, samples: int = 256) -> float:
    """Measure the root mean square of residuals, in [-2, 2], of up to `samples` crops; ValueError if 0."""
    crops = [dataset[index].residual.double() for index in range(min(samples, len(dataset)))]
    mean_square = float(torch.stack(crops).square().mean())
    if mean_square == 0:
        raise ValueError("bicubic upscaling already restores every training image: there is nothing to learn")
    return math.sqrt(mean_square)


def network_of(model: nn.Module) -> Network:
    """Unwrap the network of several processes; TypeError for another module."""
    network = getattr(model, "module", getattr(model, "_orig_mod", model))
    if not isinstance(network, Network):
        raise TypeError(f"{type(network).__name__} is no network.Network: derive its class from that")
    return network
