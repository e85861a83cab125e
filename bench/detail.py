"""How well the spectrum of a low-resolution photo tells its fine detail, within a set of photos and across.

Windows of bicubic enlargements give the power of five bands below the Nyquist frequency of the low
resolution; a quadratic fit turns their logarithms into that of the power of the original at 0.35 to 0.9 of
Nyquist, as metrics.high_frequency_energy sees it. Fitted to one set and applied to another, it shows how
much more or less detail the other has behind the same low resolution.

    python -m bench.detail
"""

import os
import sys
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from bench.tables import table
from bicubic import upscale_image
from evaluation import metrics
from imaging.files import image_size, list_images, read_rgb, to_unit_range
from util import degrade

SCALE, WINDOW = 4, 64
BANDS = ((0.02, 0.05), (0.05, 0.09), (0.09, 0.14), (0.14, 0.19), (0.19, 0.25))
LEAST_POWER = 1e-7  # of a band, on values in [0, 1]: below it a window is flat
Spectra: TypeAlias = tuple[Tensor, Tensor]


def photos(folder: Path) -> list[Path]:
    """Those that have a window."""
    return [path for path in list_images(folder) if min(image_size(path)) >= WINDOW + SCALE]


def spectra(path: Path) -> Spectra:
    """Log power of the windows of a photo: (N, 5) enlarged, in BANDS; (N,) of the original's detail."""
    photo = torch.from_numpy(read_rgb(path)).permute(2, 0, 1)
    height, width = (side // SCALE * SCALE for side in photo.shape[-2:])
    sample = degrade(photo[None, :, :height, :width], SCALE, upscale_image)
    enlarged, original = windows(sample.upscaled), windows(sample.original)
    coarse = torch.stack([metrics.band_energy(enlarged, band) for band in BANDS], dim=1)
    return (coarse + LEAST_POWER).log(), (metrics.band_energy(original) + LEAST_POWER).log()


def windows(image: Tensor) -> Tensor:
    """(1, 3, H, W) in [-1, 1] to (N, 3, WINDOW, WINDOW) in [0, 1]."""
    cut = to_unit_range(image)[0].unfold(1, WINDOW, WINDOW // 2).unfold(2, WINDOW, WINDOW // 2)
    return cut.flatten(1, 2).transpose(0, 1)


def quadratic(features: Tensor) -> Tensor:
    """(N, F) -> 1, the features and their products (N, 1 + F + F (F + 1) / 2)."""
    pairs = torch.combinations(torch.arange(features.shape[1]), with_replacement=True)
    products = features[:, pairs[:, 0]] * features[:, pairs[:, 1]]
    return torch.cat([torch.ones_like(features[:, :1]), features, products], dim=1)


def fit(known: list[Spectra]) -> Tensor:
    """Least squares of the log power of the detail: the coefficients of `quadratic`."""
    features, detail = (torch.cat(column) for column in zip(*known, strict=True))
    return torch.linalg.lstsq(quadratic(features), detail[:, None]).solution[:, 0]


def expected_over_true(known: list[Spectra], coefficients: Tensor) -> float:
    """What a fit expects in each window over what is there: geometric mean over windows, then over photos."""
    errors = [(quadratic(features) @ coefficients - detail).mean() for features, detail in known]
    return metrics.geometric_mean(torch.stack(errors).exp())


def main() -> int:
    """Entry point; returns the exit status."""
    if "SR_DATA" not in os.environ:
        print("SR_DATA must name a folder with train/BSDS500, train/T91 and test/Set5", file=sys.stderr)
        return 2
    data = Path(os.environ["SR_DATA"])
    bsds, t91, set5 = (
        [spectra(path) for path in photos(data / name)]
        for name in ("train/BSDS500", "train/T91", "test/Set5")
    )
    sets = {"BSDS500": bsds[1::2], "T91": t91[1::2], "Set5": set5}
    rows = []
    for name, known in (("BSDS500", bsds[::2]), ("T91", t91[::2])):
        coefficients = fit(known)
        rows.append([name, *(f"{expected_over_true(one, coefficients):.2f}" for one in sets.values())])
    print("\n".join(table(["fitted to half of", *sets], rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
