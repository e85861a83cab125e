"""The last phase of training: a diffusion model becomes a generator that is sharp in one evaluation, or two.

    noise    = temperature standard normal                    less of it leaves less grain
    noisy    = noise_scale_1 noise                            the first level, from noise alone
    clean    = estimate(noisy)
    noisy    = signal_scale_2 clean + noise_scale_2 noise     the second level, if any, with the same noise
    restored = upscaled + residual_std (mean + estimate(noisy))

Squared error teaches few evaluations an average, and many of them grain. Here they are trained through, from
diffusion weights, by a perceptual distance and a discriminator (adversarial diffusion distillation, Sauer et
al. 2023). What predicts the mean is left alone, so that `fidelity` stays the same to the bit. Every step
compares the images in another size and other colours, or the training would please VGG16 alone.

Shapes: B batch, H x W pixels; images (B, 3, H, W) in [-1, 1]. The features of an image are five tensors
(B, D_i, H_i, W_i), one of each stage of VGG16, of length 1 at each place; its views are itself and these.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from degradation import Degradation
from diffusion import ResidualGenerator, network_of, with_mean
from engine.options import Options, option
from engine.processes import Processes
from evaluation.lpips import PerceptualFeatures, WithoutAutocast
from imaging.pixels import to_model_range, to_unit_range
from network import Condition, Network
from training import (
    Batches,
    MicroBatch,
    ResolvedConfig,
    StepFunction,
    StepReport,
    TrainState,
    new_state,
    train_step,
)
from util import Crops, Sample

Views = list[Tensor]  # an image, then its features
PIXEL_WIDTHS = (3, 32, 48, 64, 96, 96, 1)  # channels between the convolutions that look at pixels
HALVING = (1, 3)  # which of these halve the size
Augmentation = Callable[[Tensor], Tensor]  # (B, 3, H, W) in [-1, 1] to (B, 3, H', W')
SIZES = (0.5, 1.4)  # the smallest and the largest of an augmented image, over its own
CONTRASTS = (0.6, 1.1)  # factors of its values, around grey


@dataclass(frozen=True)
class SharpeningConfig(Options):
    """Options of the last phase; its noise levels are the process's."""

    pixel_weight: float = option(0.1, "weight of the absolute error beside the perceptual distance", low=0)
    adversarial_share: float = option(
        0.3, "size of the discriminator's gradient over that of the perceptual distance", low=0, fixed=False
    )
    adversarial_pixel_weight: float = option(
        0.3, "weight of an absolute error with as large a gradient as the discriminator's of pixels", low=0
    )
    adversarial_warmup: int = option(150, "optimiser steps in which both grow from 0", low=0)
    discriminator_dim: int = option(64, "width of the discriminator's heads on features", low=1)
    discriminator_learning_rate: float = option(1e-3, "peak learning rate of the discriminator", above=0)
    most_psnr_lost: float = option(2.0, "dB below the predicted mean that the best checkpoint may be", low=0)


class Discriminator(nn.Module):
    """Tells restored images from originals by pixels and by features of VGG16.

    The perceptual distance computes the features anyway, so that heads on them cost next to nothing
    (projected GANs, Sauer et al. 2021). They are blind to a faint grid on smooth skin, which the head on
    pixels sees (PatchGAN, Isola et al. 2017). Spectral normalisation (Miyato et al. 2018, Eq. 8) bounds
    their slope.
    """

    def __init__(self, stage_dims: Sequence[int], dim: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (width, following) in enumerate(itertools.pairwise(PIXEL_WIDTHS)):
            size, stride = (4, 2) if number in HALVING else (3, 1)
            layers += [nn.LeakyReLU(0.2), spectral_norm(nn.Conv2d(width, following, size, stride, padding=1))]
        self.pixels = WithoutAutocast(nn.Sequential(*layers[1:]))
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(width, dim, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(dim, dim, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(dim, 1, 3, padding=1)),
            )
            for width in stage_dims
        )

    def forward(self, views: Views) -> list[Tensor]:
        """(B, 1, H_i, W_i) of the pixels and of each stage, above 0 where they look like an original's."""
        image, *features = views
        # The slope is bounded, and so small differences, as of features of length 1, would hardly be told.
        scores = [self.pixels(3 * image)]
        scores += [
            head(stage * stage.shape[1] ** 0.5) for head, stage in zip(self.heads, features, strict=True)
        ]
        return [score.float() for score in scores]


class Seen(NamedTuple):
    """Views of restored crops and of their originals, which the discriminator learns to tell apart."""

    restored: Views
    original: Views

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Seen":
        """Return the views where they are: on the device that made them."""
        return self


def random_augmentation(*seed: int) -> Augmentation:
    """Draw a size, an order of the colours and a contrast, for two images that are compared.

    A distance that holds for all of these is harder to lower without looking better (E-LPIPS, Kettunen et
    al. 2019).
    """
    random = np.random.default_rng(seed)
    size, contrast = float(np.exp(random.uniform(*np.log(SIZES)))), random.uniform(*CONTRASTS)
    colours = random.permutation(3).tolist()

    def augment(image: Tensor) -> Tensor:
        resized = F.interpolate(image[:, colours], scale_factor=size, mode="bicubic", antialias=True)
        return contrast * resized.clamp(-1, 1)

    return augment


def generator_loss(
    restored: Tensor,
    original: Tensor,
    perceptual: PerceptualFeatures,
    discriminator: nn.Module,
    config: SharpeningConfig,
    augment: Augmentation,
) -> tuple[Tensor, Seen]:
    """(B,): perceptual distance, absolute error, and the discriminator's verdicts; and what that has seen.

    Verdicts are weighed by the length of their gradients, sample by sample (the adaptive weight of VQGAN,
    Esser et al. 2021, Eq. 7): of the features' it is `adversarial_share` times the distance's, of the pixels'
    `adversarial_share` times that of an absolute error of weight `adversarial_pixel_weight`. The features are
    of augmented images.
    """
    features, originals = perceptual(augment(restored)), perceptual(augment(original))
    distance = perceptual.distance(features, originals)
    error = (restored - original).abs().mean((1, 2, 3))
    by_pixels, *by_stages = (score.mean((1, 2, 3)) for score in discriminator([restored, *features]))
    by_features = torch.stack(by_stages).mean(0)
    of_features = _gradient_length(distance, features) / _gradient_length(by_features, features).clamp(1e-12)
    of_pixels = restored[0].numel() ** -0.5 / _gradient_length(by_pixels, [restored]).clamp(1e-12)
    verdict = of_features * by_features + config.adversarial_pixel_weight * of_pixels * by_pixels
    seen = Seen([one.detach() for one in (restored, *features)], [original, *originals])
    return distance + config.pixel_weight * error - config.adversarial_share * verdict, seen


def discriminator_loss(discriminator: nn.Module, seen: Seen) -> Tensor:
    """(B,): the hinge loss (Lim & Ye 2017), mean over heads and places."""
    restored = [F.relu(1 + score).mean((1, 2, 3)) for score in discriminator(seen.restored)]
    original = [F.relu(1 - score).mean((1, 2, 3)) for score in discriminator(seen.original)]
    return torch.stack(restored).mean(0) + torch.stack(original).mean(0)


def _gradient_length(losses: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """(B,): the length of each sample's gradient with respect to its inputs."""
    gradients = torch.autograd.grad(losses.sum(), inputs, retain_graph=True)
    return torch.stack([one.float().flatten(1).square().sum(1) for one in gradients]).sum(0).sqrt()


class Sharpening:
    """Makes the step of the last phase, for DiffusionModel.train: one of the generator, one of its adversary.

    Args:
        generator: of a process with levels; its precision is the training's.
        degradation: of the crops.
        perceptual: features and distance, on the generator's device.
    """

    def __init__(
        self,
        generator: ResidualGenerator,
        degradation: Degradation,
        perceptual: PerceptualFeatures,
        config: SharpeningConfig,
    ) -> None:
        self.generator, self.degradation = generator, degradation
        self.perceptual, self.config = perceptual, config
        self.steps = generator.plan(len(generator.diffusion.process.levels))

    def __call__(self, state: TrainState, config: ResolvedConfig, processes: Processes) -> StepFunction:
        """Freeze what predicts the mean, add a discriminator; ValueError where nothing predicts it."""
        predictor = network_of(state.model).predictor
        if predictor is None:
            raise ValueError("sharpening needs a network that predicts the mean: train one with a predictor")
        predictor.requires_grad_(False)
        torch.manual_seed(config.seed)
        learning_rate = self.config.discriminator_learning_rate
        adversary = replace(config, optimizer="adamw", learning_rate=learning_rate)
        discriminator = Discriminator(self.perceptual.dims, self.config.discriminator_dim)
        state.others["discriminator"] = new_state(
            discriminator.to(processes.device), adversary, state.precision
        )
        return partial(self.step, state, config, adversary, processes)

    def step(
        self,
        state: TrainState,
        config: ResolvedConfig,
        adversary: ResolvedConfig,
        processes: Processes,
        batches: Batches,
    ) -> StepReport:
        """One step of the generator against the discriminator, and one of that on what it has seen."""
        rival, micro_batches, seen = state.others["discriminator"], list[MicroBatch](), list[Seen]()
        grown = min(1, state.step / max(1, self.config.adversarial_warmup))
        options = replace(self.config, adversarial_share=grown * self.config.adversarial_share)

        def noted() -> Batches:
            for micro, crops in batches:
                micro_batches.append(micro)
                yield micro, crops

        def loss(model: nn.Module, crops: Crops, generator: torch.Generator) -> Tensor:
            sample = crops.sample(self.degradation)
            noise = torch.randn(sample.original.shape, generator=generator, device=sample.original.device)
            restored = self.restore(network_of(model), sample, noise)
            augment = random_augmentation(config.seed, state.step, micro_batches[-1].number)
            losses, features = generator_loss(
                restored, sample.original, self.perceptual, rival.model, options, augment
            )
            seen.append(features)
            return losses

        rival.model.requires_grad_(False)
        report = train_step(state, loss, noted(), config, processes)
        rival.model.requires_grad_(True)
        pairs = zip(micro_batches, seen, strict=True)
        other = train_step(
            rival, lambda model, features, _: discriminator_loss(model, features), pairs, adversary, processes
        )
        scalars = {
            f"discriminator_{name}": one for name, one in {"loss": other.loss, **other.scalars}.items()
        }
        return StepReport(report.loss, report.finite and other.finite, {**report.scalars, **scalars})

    def restore(self, network: Network, sample: Sample, noise: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], from noise of that shape; gradients reach the refiner, not the mean."""
        with torch.no_grad():
            contexts, mean = self.generator.encode(network, Condition(sample.upscaled, sample.low_res))
            base = with_mean(network, sample.upscaled, mean)
        denoise = partial(self.generator.estimate, network, contexts=contexts, base=base)
        restored = base + network.residual_std * self.generator.sample(self.steps, lambda: noise, denoise)
        # A file holds 8 bits, whose rounding is as large as the finest texture; the gradient ignores it.
        rounded = to_model_range((to_unit_range(restored) * 255).round() / 255)
        return restored + (rounded - restored).detach()
