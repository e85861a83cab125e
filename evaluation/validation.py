"""Validation during training: a fixed set of images, restored and measured with the averaged weights."""

from typing import cast

import torch
from torch import Tensor, nn

from diffusion import DiffusionModel, Network, ResidualGenerator
from engine.processes import Processes
from evaluation import metrics
from imaging.files import to_unit_range
from training import NonFiniteError, Validation
from unet import Condition
from util import ImageDataset, Sample, degrade

VALIDATION_SEED = 0
VALIDATION_BATCH = 8
GRID_IMAGES = 4
LOSS_BARS = 20


class Validator:
    """Restores the dataset's images with a network, and measures; for DiffusionModel.train.

    PSNR and SSIM are those of one step, the posterior mean, on luma; pictures are shown of one step and of
    ten; the loss is shown by timestep. The noise is the same at every call. Every process takes its share of
    the images.
    """

    def __init__(
        self,
        diffusion: DiffusionModel,
        dataset: ImageDataset,
        precision: torch.dtype | None = None,
        processes: Processes | None = None,
    ) -> None:
        processes = processes or Processes(diffusion.device)
        self.diffusion = diffusion
        self.processes = processes
        self.generator = ResidualGenerator.of(diffusion.process, processes.device, precision)
        self.protocol = metrics.Protocol(crop=round(dataset.downscale_factor))
        crops = torch.stack([dataset.crop(index) for index in range(len(dataset))])
        self.batches = [
            degrade(part.to(processes.device), dataset.degradation, dataset.upscale_function)
            for part in crops.split(VALIDATION_BATCH)
        ]

    def __call__(self, network: nn.Module) -> Validation:
        """Restore, measure, and draw."""
        model = cast(Network, network)
        mine = self.batches[self.processes.rank :: self.processes.world_size]
        sums = torch.zeros(4, dtype=torch.float64, device=self.processes.device)
        for batch in mine:
            sums += self._measure(batch, self._restore(model, batch, 1))
        psnr, ssim, bicubic, count = self.processes.sum(sums).tolist()
        first = Sample(*(image[:GRID_IMAGES] for image in self.batches[0]))
        scalars = {"psnr": psnr / count, "ssim": ssim / count, "psnr_over_bicubic": (psnr - bicubic) / count}
        images = {"low_bicubic_mean_original": comparison_grid(first, self._restore(model, first, 1))}
        sample = self._restore(model, first, min(10, self.diffusion.timesteps))
        images["low_bicubic_sample_original"] = comparison_grid(first, sample)
        curves = {"loss_by_timestep": self._loss_by_timestep(model, first)}
        return Validation(psnr / count, scalars, images, curves)

    def _restore(self, model: Network, batch: Sample, steps: int) -> Tensor:
        restored = self.generator.restore(model, batch.low_res, batch.upscaled, steps, VALIDATION_SEED)
        if not torch.isfinite(restored).all():
            raise NonFiniteError("the averaged weights are no longer finite: lower --learning_rate")
        return restored

    def _measure(self, batch: Sample, restored: Tensor) -> Tensor:
        """Sums over a batch: PSNR, SSIM, PSNR of bicubic, and the number of images."""
        truth = to_unit_range(batch.original)
        upscaled = to_unit_range(batch.upscaled)
        values = [
            metrics.psnr(restored, truth, self.protocol),
            metrics.ssim(restored, truth, self.protocol),
            metrics.psnr(upscaled, truth, self.protocol),
            torch.ones(len(truth), device=truth.device),
        ]
        return torch.stack([value.double().sum() for value in values])

    @torch.inference_mode()
    def _loss_by_timestep(self, model: Network, batch: Sample) -> tuple[list[float], list[float]]:
        """Right edges of even stretches of timesteps, and the unweighted loss in the middle of each."""
        clean = batch.residual / float(model.residual_std)
        context, _ = model.encode_context(Condition(batch.upscaled, batch.low_res))
        bars = min(LOSS_BARS, self.diffusion.timesteps)
        edges = [self.diffusion.timesteps * (bar + 1) / bars for bar in range(bars)]
        heights = []
        for edge in edges:
            middle = int(edge - self.diffusion.timesteps / bars / 2)
            t = torch.full((len(clean),), middle, device=clean.device)
            generator = torch.Generator(clean.device).manual_seed(VALIDATION_SEED)
            heights.append(float(self.diffusion.loss(model, clean, context, generator, t=t).mean()))
        return edges, heights


def comparison_grid(samples: Sample, restored: Tensor) -> Tensor:
    """A (3, H', W') picture in [0, 1], a row per image: low (nearest) | bicubic | restored | original."""
    from torchvision.utils import make_grid

    count, size = len(restored), samples.original.shape[-2:]
    low = torch.nn.functional.interpolate(to_unit_range(samples.low_res[:count]), size=size, mode="nearest")
    columns = [
        low,
        to_unit_range(samples.upscaled[:count]),
        restored,
        to_unit_range(samples.original[:count]),
    ]
    rows = torch.stack(columns, dim=1).flatten(0, 1).cpu()
    grid: Tensor = make_grid(rows, nrow=len(columns), padding=4)
    return grid
