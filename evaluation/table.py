"""The metrics: all outputs and TensorBoard's scalars come from METRICS."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from bicubic import Border
from evaluation import metrics
from evaluation.lpips import Lpips
from evaluation.wasserstein import PatchPair, patch_distance


@dataclass(frozen=True)
class Conditions:
    """What scores depend on besides images."""

    protocol: metrics.Protocol  # what PSNR and SSIM compare
    border: Border = "mirror"  # beyond the edge when the low resolution was made
    lpips: Lpips | None = None
    lpips_note: str = "switched off"  # which network, or why there is none


@dataclass(frozen=True)
class Pair:
    """Images to compare; methods give a score (B,), nan where undefined."""

    restored: Tensor  # (B, C, H, W) in [0, 1]
    truth: Tensor  # (B, C, H, W) in [0, 1]
    low_res: Tensor  # (B, C, h, w) in [0, 1]
    conditions: Conditions
    deviation: Tensor | None = None  # (H, W), standard deviation over the samples of one image
    seconds: float = math.nan
    peak_bytes: float = math.nan

    def each(self, value: float) -> Tensor:
        return torch.full((len(self.truth),), value, dtype=torch.float64)

    def psnr(self) -> Tensor:
        return metrics.psnr(self.restored, self.truth, self.conditions.protocol)

    def ssim(self) -> Tensor:
        return metrics.ssim(self.restored, self.truth, self.conditions.protocol)

    def exact(self) -> Tensor:
        return self.psnr().isinf().double()

    def lr_psnr(self) -> Tensor:
        return metrics.low_resolution_psnr(self.restored, self.low_res, self.conditions.border)

    def lpips(self) -> Tensor:
        lpips = self.conditions.lpips
        return self.each(math.nan) if lpips is None else lpips(self.restored, self.truth)

    def energy(self) -> Tensor:
        return metrics.high_frequency_energy(self.restored, self.truth)

    def pearson(self, ranks: bool = False) -> Tensor:
        if self.deviation is None:
            return self.each(math.nan)
        images = self.restored, self.truth
        return self.each(metrics.uncertainty_correlation(self.deviation, *images, ranks=ranks))

    def spearman(self) -> Tensor:
        return self.pearson(ranks=True)

    def speed(self) -> Tensor:
        return self.each(self.seconds / (self.truth.shape[-2] * self.truth.shape[-1] / 1e6))

    def memory(self) -> Tensor:
        return self.each(self.peak_bytes / 1e6)


def mean(values: Tensor) -> Tensor:
    """Of finite values, if any: one exact image would hide all others."""
    finite = values[values.isfinite()]
    return (finite if len(finite) else values).mean()


def geometric_mean(ratios: Tensor) -> Tensor:
    """Twice and half average to 1."""
    return ratios.log().mean().exp()


def swd(patches: Sequence[PatchPair], seed: int) -> float:
    """Over the levels."""
    return fmean(patch_distance(patches, seed))


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class Metric:
    """A score of images and its average, or of the set's patches."""

    name: str  # in JSON, in CSV and, with "validation/" before it, in TensorBoard
    heading: str  # of the column
    form: str  # how a value is printed
    note: str  # what the number means; {protocol} and {lpips} stand for their descriptions
    of_image: Callable[[Pair], Tensor] | None = None
    average: Callable[[Tensor], Tensor] = mean  # over the images that have a value
    of_set: Callable[[Sequence[PatchPair], int], float] | None = None  # patches and a seed -> the value
    in_training: bool = False  # whether validation measures it, too

    def describe(self, conditions: Conditions) -> str:
        """What the number means."""
        return self.note.format(protocol=conditions.protocol.describe(), lpips=conditions.lpips_note)

    def score(self, pair: Pair) -> float | None:
        """Of one image, or None."""
        return None if self.of_image is None else _defined(self.of_image(pair).item())

    def summarise(
        self, scores: Sequence[float | None], patches: Sequence[PatchPair], seed: int
    ) -> float | None:
        """Of a set, or None."""
        if self.of_set is not None:
            return _defined(self.of_set(patches, seed))
        defined = [score for score in scores if score is not None]
        return self.average(torch.tensor(defined, dtype=torch.float64)).item() if defined else None

    def print(self, value: float | None) -> str:
        """A cell; empty for None."""
        return "" if value is None else format(value, self.form)


METRICS = (
    Metric("psnr", "PSNR", ".2f", "{protocol}; mean of the images not exact", Pair.psnr, in_training=True),
    Metric(
        "ssim", "SSIM", ".4f", "of what PSNR compares; Gaussian 11x11 window", Pair.ssim, in_training=True
    ),
    Metric("exact", "exact", ".0f", "images restored exactly: their PSNR is infinite", Pair.exact, torch.sum),
    Metric("lr_psnr", "LR-PSNR", ".2f", "result shrunk again (uint8) against the input", Pair.lr_psnr),
    Metric("lpips", "LPIPS", ".4f", "{lpips}", Pair.lpips),
    Metric("hf_energy", "HF energy", ".3f", "detail's power; 1 is the truth's", Pair.energy, geometric_mean),
    Metric("swd", "SWD", ".1f", "1000 x sliced Wasserstein distance of 7x7 patches, 3 levels", of_set=swd),
    Metric("seconds_per_megapixel", "s/MP", ".3g", "seconds per megapixel of output", Pair.speed),
    Metric(
        "peak_memory_mb", "peak MB", ".0f", "most memory of CUDA tensors, 1e6 bytes", Pair.memory, torch.max
    ),
    Metric("uncertainty_pearson", "uncertainty r", ".2f", "of the deviation with the error", Pair.pearson),
    Metric("uncertainty_spearman", "uncertainty rho", ".2f", "the same of the ranks", Pair.spearman),
)
BY_NAME = {metric.name: metric for metric in METRICS}
