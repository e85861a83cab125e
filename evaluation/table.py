"""The metrics, one row each: JSON, CSV, Markdown, the plot and TensorBoard's scalars come from METRICS."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bicubic import Border
from evaluation import metrics
from evaluation.lpips import Lpips
from evaluation.wasserstein import FlatSetError, PatchPair, patch_distance


@dataclass(frozen=True)
class Conditions:
    """What scores depend on besides the images.

    Attributes:
        protocol: what PSNR and SSIM compare.
        border: what bicubic saw beyond the edge when the low resolution was made.
        lpips: the network; None where it is switched off or cannot be had.
        lpips_note: which network, or why there is none.
        seed: of the directions that SWD projects on.
    """

    protocol: metrics.Protocol
    border: Border = "mirror"
    lpips: Lpips | None = None
    lpips_note: str = "switched off"
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """Restored images and what they are compared with.

    Attributes:
        restored, truth: (B, C, H, W) in [0, 1].
        low_res: (B, C, h, w) in [0, 1].
        conditions: of the whole evaluation.
        deviation: (H, W), standard deviation over the samples of one image, if there were several.
        seconds, peak_bytes: what restoring took, where it was measured.
    """

    restored: Tensor
    truth: Tensor
    low_res: Tensor
    conditions: Conditions
    deviation: Tensor | None = None
    seconds: float | None = None
    peak_bytes: int | None = None

    def each(self, value: float | None) -> Tensor:
        """One value for every image, nan for None."""
        return torch.full((len(self.truth),), math.nan if value is None else value, dtype=torch.float64)


def mean(values: Tensor) -> float:
    """Mean of the finite values; infinity where none is finite.

    One image that is restored exactly has an infinite PSNR, and would hide what happens to all others.
    """
    finite = values[values.isfinite()]
    return finite.mean().item() if len(finite) else math.inf


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
        note: the conditions -> what the number means.
        of_image: a Pair -> (B,), nan where the metric is not defined or not to be had.
        average: the defined values of all images -> the value of the set.
        of_set: instead of both: patches of all images, and a seed -> the value of the set.
        in_training: whether validation during training measures it, too.
    """

    name: str
    heading: str
    form: str
    note: Callable[[Conditions], str]
    of_image: Callable[[Pair], Tensor] | None = None
    average: Callable[[Tensor], float] = mean
    of_set: Callable[[Sequence[PatchPair], int], float | None] | None = None
    in_training: bool = False

    def summarise(self, values: Sequence[float]) -> float | None:
        """The value of a set; None where no image has one."""
        defined = [value for value in values if not math.isnan(value)]
        return self.average(torch.tensor(defined, dtype=torch.float64)) if defined else None

    def print(self, value: float | None) -> str:
        """A cell of the table; empty for None."""
        return "" if value is None else format(value, self.form)


def _psnr(pair: Pair) -> Tensor:
    return metrics.psnr(pair.restored, pair.truth, pair.conditions.protocol)


def _lpips(pair: Pair) -> Tensor:
    lpips = pair.conditions.lpips
    return pair.each(None) if lpips is None else lpips(pair.restored, pair.truth)


def _uncertainty(pair: Pair, ranks: bool) -> Tensor:
    if pair.deviation is None:
        return pair.each(None)
    return pair.each(metrics.uncertainty_correlation(pair.deviation, pair.restored, pair.truth, ranks=ranks))


def _swd(patches: Sequence[PatchPair], seed: int) -> float | None:
    try:
        return patch_distance(patches, seed=seed).average
    except FlatSetError:
        return None


def _seconds_per_megapixel(pair: Pair) -> Tensor:
    megapixels = pair.truth.shape[-2] * pair.truth.shape[-1] / 1e6
    return pair.each(None if pair.seconds is None else pair.seconds / megapixels)


METRICS = (
    Metric(
        "psnr",
        "PSNR",
        ".2f",
        lambda conditions: f"{conditions.protocol.describe()}; mean over the images not restored exactly",
        _psnr,
        in_training=True,
    ),
    Metric(
        "ssim",
        "SSIM",
        ".4f",
        lambda conditions: "of what PSNR compares; 11x11 Gaussian window, sigma 1.5, valid windows",
        lambda pair: metrics.ssim(pair.restored, pair.truth, pair.conditions.protocol),
        in_training=True,
    ),
    Metric(
        "exact",
        "exact",
        ".0f",
        lambda conditions: "images restored exactly: their PSNR is infinite and in no mean",
        lambda pair: _psnr(pair).isinf().double(),
        average=total,
    ),
    Metric(
        "lr_psnr",
        "LR-PSNR",
        ".2f",
        lambda conditions: "restored image shrunk again (uint8, same border) against the input, all channels",
        lambda pair: metrics.low_resolution_psnr(pair.restored, pair.low_res, pair.conditions.border),
    ),
    Metric("lpips", "LPIPS", ".4f", lambda conditions: conditions.lpips_note, _lpips),
    Metric(
        "hf_energy",
        "HF energy",
        ".3f",
        lambda conditions: "power at 0.35 to 0.9 of Nyquist over the truth's, geometric mean; 1 is right",
        lambda pair: metrics.high_frequency_energy(pair.restored, pair.truth),
        average=metrics.geometric_mean,
    ),
    Metric(
        "swd",
        "SWD",
        ".1f",
        lambda conditions: "sliced Wasserstein distance x 1000 of 7x7 patches, 3 levels; lower is better",
        of_set=_swd,
    ),
    Metric(
        "seconds_per_megapixel",
        "s/MP",
        ".3g",
        lambda conditions: "seconds per megapixel of output, from the decoded input to the result",
        _seconds_per_megapixel,
    ),
    Metric(
        "peak_memory_mb",
        "peak MB",
        ".0f",
        lambda conditions: (
            "the most that PyTorch had allocated on a CUDA device while restoring, in 10^6 bytes"
        ),
        lambda pair: pair.each(None if pair.peak_bytes is None else pair.peak_bytes / 1e6),
        average=largest,
    ),
    Metric(
        "uncertainty_pearson",
        "uncertainty r",
        ".2f",
        lambda conditions: "correlation over pixels of the samples' deviation with the error of their mean",
        lambda pair: _uncertainty(pair, ranks=False),
    ),
    Metric(
        "uncertainty_spearman",
        "uncertainty rho",
        ".2f",
        lambda conditions: "the same of the ranks",
        lambda pair: _uncertainty(pair, ranks=True),
    ),
)
BY_NAME = {metric.name: metric for metric in METRICS}
