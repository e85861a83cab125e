"""Validation during training, of the averaged weights on a fixed set of images."""

import itertools
import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffusion import DiffusionModel, network_of
from engine.processes import Processes
from evaluation.lpips import Lpips
from evaluation.metrics import METRICS, Comparison, undefined
from imaging.pixels import to_unit_range
from models import LoadedModel
from restoration import RestoreConfig, Restorer
from training import NonFiniteError, Validation
from util import Crops, ImageDataset, Sample

VALIDATION_SEED = 0
VALIDATION_BATCH = 8
GRID_IMAGES, GRID_GAP = 4, 4
PERFECT_PSNR = 100.0  # dB; what an image counts that is restored exactly
FAITHFUL = RestoreConfig(mode="fidelity", seed=VALIDATION_SEED)

logger = logging.getLogger(__name__)


class Validator:
    """Measures a network on fixed images; every process restores a part, always with the same noise.

    Scalars and score are of "fidelity"; pictures show it and a sample of ten steps. Of a sharpened process
    (`ProcessConfig.levels`), scalars are of its result; the score is minus its LPIPS, less the dB by which
    its PSNR is more than `most_psnr_lost` below the predicted mean's.

    Args:
        precision: dtype to autocast to, None for float32.
        lpips: the metric of a sharpened process.
    """

    def __init__(
        self,
        diffusion: DiffusionModel,
        dataset: ImageDataset,
        precision: torch.dtype | None = None,
        processes: Processes | None = None,
        lpips: Lpips | None = None,
        most_psnr_lost: float = 2.0,
    ) -> None:
        self.diffusion, self.precision = diffusion, precision
        self.processes = processes or Processes(diffusion.device)
        self.most_psnr_lost, self.mean_psnr = most_psnr_lost, 0.0
        self.degradation = dataset.degradation
        self.comparison = Comparison(crop=round(dataset.degradation.scale), lpips=lpips or undefined)
        self.metrics = [one for one in METRICS if one.in_training or (lpips and one.name == "lpips")]
        pairs, size = [dataset.crop(index) for index in range(len(dataset))], VALIDATION_BATCH
        batches = [
            Crops.stack(pairs[start : start + size]).to(self.processes.device)
            for start in range(0, len(pairs), size)
        ]
        self.batches = [some.sample(dataset.degradation, dataset.upscale_function) for some in batches]
        self.tokens = [some.tokens for some in batches]
        bicubic = [self._scores(batch, to_unit_range(batch.upscaled)) for batch in self.batches]
        self.bicubic_psnr = [scores["psnr"] for scores in bicubic]
        self.counted = self._choose_counted()

    def _choose_counted(self) -> list[Tensor]:
        """(B,) bool of each batch: the images that are not flat, or all where all are flat."""
        # A flat image's PSNR, infinite or nearly so, would outweigh all others, and no other be the best.
        counted = [psnr < PERFECT_PSNR for psnr in self.bicubic_psnr]
        flat, total = int((~torch.cat(counted)).sum()), len(torch.cat(counted))
        if flat and self.processes.is_main:
            logger.warning("%d of %d validation images are flat and do not count", flat, total)
        return counted if flat < total else [torch.ones_like(one) for one in counted]

    def __call__(self, network: nn.Module) -> Validation:
        model = LoadedModel(network_of(network), self.diffusion.process, self.degradation, 0)
        sharpened = bool(self.diffusion.process.levels)
        steps = None if sharpened else min(10, self.diffusion.timesteps)
        sampled = replace(FAITHFUL, mode="detail", steps=steps)
        mean, sample = (
            Restorer(model, how, self.processes.device, self.precision) for how in (FAITHFUL, sampled)
        )
        first = Sample(*(image[:GRID_IMAGES] for image in self.batches[0]))
        tokens = None if self.tokens[0] is None else self.tokens[0][:GRID_IMAGES]
        images = {
            f"low_bicubic_{name}_original": comparison_grid(first, restore(restorer, first, tokens))
            for name, restorer in (("mean", mean), ("sample", sample))
        }
        if not sharpened:
            scalars = self._measure_all(mean)
            return Validation(scalars["psnr"], scalars, images)
        scalars = self._measure_all(sample)
        self.mean_psnr = self.mean_psnr or self._measure_all(mean)["psnr"]  # which training leaves alone
        lost = max(0.0, self.mean_psnr - self.most_psnr_lost - scalars["psnr"])
        return Validation(-scalars["lpips"] - lost, scalars, images)

    def _measure_all(self, restorer: Restorer) -> dict[str, float]:
        """Average the scores of the images of all processes."""
        measured = []
        for index in range(self.processes.rank, len(self.batches), self.processes.world_size):
            batch = self.batches[index]
            scores = self._scores(batch, restore(restorer, batch, self.tokens[index]))
            scores["psnr_over_bicubic"] = scores["psnr"] - self.bicubic_psnr[index]
            measured.append({name: score[self.counted[index]] for name, score in scores.items()})
        every = [*itertools.chain(*self.processes.gather(measured))]
        return {name: float(torch.cat([one[name] for one in every]).double().mean()) for name in every[0]}

    def _scores(self, batch: Sample, restored: Tensor) -> dict[str, Tensor]:
        """(B,) by each of the metrics, at most PERFECT_PSNR."""
        truth, low_res = to_unit_range(batch.original).cpu(), to_unit_range(batch.low_res).cpu()
        images = restored.cpu(), truth, low_res, self.comparison
        scores = {metric.name: metric.score(*images) for metric in self.metrics if metric.score is not None}
        return {name: score.clamp(max=PERFECT_PSNR) for name, score in scores.items()}


def restore(restorer: Restorer, batch: Sample, tokens: Tensor | None) -> Tensor:
    """(B, C, H, W) in [0, 1] on the CPU; NonFiniteError."""
    restored = restorer(to_unit_range(batch.low_res), tokens if restorer.step_count else None)
    if not torch.isfinite(restored).all():
        raise NonFiniteError("the averaged weights are no longer finite: lower learning_rate")
    return restored


def comparison_grid(samples: Sample, restored: Tensor) -> Tensor:
    """(3, H', W') in [0, 1], a row per image: low | bicubic | restored | original."""
    low_res, upscaled, original, _ = (to_unit_range(image[: len(restored)]) for image in samples)
    low = nn.functional.interpolate(low_res, size=original.shape[-2:], mode="nearest")
    images = torch.stack([column.cpu() for column in (low, upscaled, restored, original)])  # (4, B, 3, H, W)
    framed = nn.functional.pad(images, [GRID_GAP, 0, GRID_GAP, 0])
    grid = framed.permute(2, 1, 3, 0, 4).flatten(1, 2).flatten(2)  # (3, B (H + gap), 4 (W + gap))
    return nn.functional.pad(grid, [0, GRID_GAP, 0, GRID_GAP])
