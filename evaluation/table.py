"""The metrics, one row each: JSON, CSV, Markdown, the plot and TensorBoard's scalars come from METRICS."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bicubic import Border
from evaluation import metrics
from evaluation.lpips import Lpips
from evaluation.wasserstein import PatchPair, patch_distance


@dataclass(frozen=True)
class Conditions:
    """What scores depend on besides the images.

    Attributes:
        protocol: what PSNR and SSIM compare.
        border: what bicubic saw beyond the edge when the low resolution was made.
        lpips: None where it is switched off or cannot be had.
        lpips_note: which network, or why there is none.
    """

    protocol: metrics.Protocol
    border: Border = "mirror"
    lpips: Lpips | None = None
    lpips_note: str = "switched off"


@dataclass(frozen=True)
class Pair:
    """Restored images and what they are compared with.

    Attributes:
        restored, truth: (B, C, H, W) in [0, 1].
        low_res: (B, C, h, w) in [0, 1].
        conditions: of the whole evaluation.
        deviation: (H, W), standard deviation over the samples of one image.
        seconds, peak_bytes: what restoring took.
    """

    restored: Tensor
    truth: Tensor
    low_res: Tensor
    conditions: Conditions
    deviation: Tensor | None = None
    seconds: float = math.nan
    peak_bytes: float = math.nan

    def each(self, value: float) -> Tensor:
        """One value for every image."""
        return torch.full((len(self.truth),), value, dtype=torch.float64)


def mean(values: Tensor) -> float:
    """Mean of the finite values, infinity where none is: an exact image would hide all others."""
    finite = values[values.isfinite()]
    return finite.mean().item() if len(finite) else math.inf


def geometric_mean(ratios: Tensor) -> float:
    """exp(mean(log(ratio))): twice and half the energy average to 1."""
    return ratios.log().mean().exp().item()


def total(values: Tensor) -> float:
    """Sum of the values."""
    return values.sum().item()


def largest(values: Tensor) -> float:
    """The largest of the values."""
    return values.max().item()


@dataclass(frozen=True)
class Metric:
    """One row of METRICS.

    Attributes:
        name: in JSON, in CSV and, with "validation/" before it, in TensorBoard.
        heading, form: in the printed table: of the column, and how a value is printed.
        note: what the number means; {protocol} and {lpips} stand for their descriptions.
        of_image: a Pair -> (B,), nan where the metric is not defined or not to be had.
        average: the defined values of all images -> the value of the set.
        of_set: instead of both: patches of all images, and a seed -> the value of the set.
        in_training: whether validation during training measures it, too.
    """

    name: str
    heading: str
    form: str
    note: str
    of_image: Callable[[Pair], Tensor] | None = None
    average: Callable[[Tensor], float] = mean
    of_set: Callable[[Sequence[PatchPair], int], float] | None = None
    in_training: bool = False

    def describe(self, conditions: Conditions) -> str:
        """What the number means."""
        return self.note.format(protocol=conditions.protocol.describe(), lpips=conditions.lpips_note)

    def summarise(self, values: Sequence[float | None]) -> float | None:
        """The value of a set; None where no image has one."""
        defined = [value for value in values if value is not None]
        return self.average(torch.tensor(defined, dtype=torch.float64)) if defined else None

    def print(self, value: float | None) -> str:
        """A cell of the table; empty for None."""
        return "" if value is None else format(value, self.form)


def _psnr(pair: Pair) -> Tensor:
    return metrics.psnr(pair.restored, pair.truth, pair.conditions.protocol)


def _ssim(pair: Pair) -> Tensor:
    return metrics.ssim(pair.restored, pair.truth, pair.conditions.protocol)


def _exact(pair: Pair) -> Tensor:
    return _psnr(pair).isinf().double()


def _lr_psnr(pair: Pair) -> Tensor:
    return metrics.low_resolution_psnr(pair.restored, pair.low_res, pair.conditions.border)


def _lpips(pair: Pair) -> Tensor:
    lpips = pair.conditions.lpips
    return pair.each(math.nan) if lpips is None else lpips(pair.restored, pair.truth)


def _energy(pair: Pair) -> Tensor:
    return metrics.high_frequency_energy(pair.restored, pair.truth)


def _swd(patches: Sequence[PatchPair], seed: int) -> float:
    distances = patch_distance(patches, seed)
    return sum(distances) / len(distances)


def _seconds(pair: Pair) -> Tensor:
    return pair.each(pair.seconds / (pair.truth.shape[-2] * pair.truth.shape[-1] / 1e6))


def _memory(pair: Pair) -> Tensor:
    return pair.each(pair.peak_bytes / 1e6)


def _pearson(pair: Pair, ranks: bool = False) -> Tensor:
    if pair.deviation is None:
        return pair.each(math.nan)
    return pair.each(metrics.uncertainty_correlation(pair.deviation, pair.restored, pair.truth, ranks=ranks))


def _spearman(pair: Pair) -> Tensor:
    return _pearson(pair, ranks=True)


METRICS = (
    Metric("psnr", "PSNR", ".2f", "{protocol}; mean of the images not exact", _psnr, in_training=True),
    Metric("ssim", "SSIM", ".4f", "of what PSNR compares; 11x11 Gaussian windows", _ssim, in_training=True),
    Metric("exact", "exact", ".0f", "images restored exactly: their PSNR is infinite", _exact, total),
    Metric("lr_psnr", "LR-PSNR", ".2f", "result shrunk again (uint8) against the input", _lr_psnr),
    Metric("lpips", "LPIPS", ".4f", "{lpips}", _lpips),
    Metric(
        "hf_energy", "HF energy", ".3f", "power at 0.35 to 0.9 Nyquist; 1 is right", _energy, geometric_mean
    ),
    Metric("swd", "SWD", ".1f", "1000 x sliced Wasserstein distance of 7x7 patches, 3 levels", of_set=_swd),
    Metric("seconds_per_megapixel", "s/MP", ".3g", "seconds per megapixel of output", _seconds),
    Metric("peak_memory_mb", "peak MB", ".0f", "most memory of CUDA tensors, 10^6 bytes", _memory, largest),
    Metric("uncertainty_pearson", "uncertainty r", ".2f", "samples' deviation with the error", _pearson),
    Metric("uncertainty_spearman", "uncertainty rho", ".2f", "the same of the ranks", _spearman),
)
BY_NAME = {metric.name: metric for metric in METRICS}
