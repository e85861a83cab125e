"""Any enlargement with any model: applied as often as needed, then bicubic shrinks the result to H x W."""

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.checkpoint import KINDS, released_model, released_scales
from engine.device import autocast_dtype, select_device
from engine.options import OptionError
from imaging.files import DecodedImage
from models import LoadedModel, load_model
from restoration.denoiser import Progress, no_progress
from restoration.pictures import Restorable
from restoration.restorer import Restoration, RestoreConfig, Restorer
from restoration.tiling import Scale, row_bands

LARGEST_SCALE = 16.0
ArrayT = TypeVar("ArrayT", bound=npt.NDArray[Any])


def plan_chain(scale: float, factors: Sequence[float]) -> tuple[float, ...]:
    """The fewest factors whose product exceeds the scale least, the largest first; or OptionError."""
    if not 1 < scale <= LARGEST_SCALE:
        raise OptionError("scale", scale, f"give a number above 1 and at most {LARGEST_SCALE:g}")
    least = min(factors)
    most = next(count for count in itertools.count(1) if least**count > scale - 1e-6)
    ordered = sorted(factors, reverse=True)
    chains = [
        chain
        for count in range(1, most + 1)
        for chain in itertools.combinations_with_replacement(ordered, count)
        if math.prod(chain) > scale - 1e-6
    ]
    return min(chains, key=lambda chain: (math.prod(chain), len(chain)))


def find_weights(name: str | Path | None = None, scale: float | None = None) -> list[Path]:
    """Of "photo" or "clean", the project's own, or of a path.

    None is photo, as far as its largest enlargement reaches; beyond that clean follows.
    """
    if name is not None and name not in KINDS:
        return [Path(name)]
    wanted, photo = 4.0 if scale is None else scale, released_scales("photo")
    kind = str(name or ("photo" if wanted <= max(photo, default=0) else "clean"))
    factors = released_scales(kind) or [4.0]  # without any, released_model says so
    chain = list(dict.fromkeys(plan_chain(wanted, factors)))
    kinds = [kind] * len(chain)
    if name is None and chain[0] in photo:
        kinds[0] = "photo"
    return [released_model(*each) for each in zip(chain, kinds, strict=True)]


class AnyScale:
    """As Restorer, to any `scale` up to the product of those of restorers applied in turn, or ValueError."""

    def __init__(self, restorers: Sequence[Restorer], scale: float) -> None:
        self.restorers, self.scale = restorers, Scale(scale)
        reached = list(itertools.accumulate((float(one.scale) for one in restorers), operator.mul))
        if scale > reached[-1] + 1e-6:
            raise ValueError(f"scale is {scale:g}, but the models reach {reached[-1]:g}: give more")
        if any(one.config.consistency for one in restorers):
            raise OptionError(
                "consistency", True, f"not at scale {scale:g}, only at the model's; leave it out"
            )
        pixels = [factor**2 for factor in reached]
        self._parts = [made / sum(pixels) for made in pixels]  # of the work, and so of the progress
        self._excess = Scale(reached[-1] / scale)

    @property
    def step_count(self) -> int:
        return self.restorers[0].step_count

    def restore(
        self,
        image: Restorable,
        *,
        deviation: bool = False,
        progress: Progress = no_progress,
        tokens: Tensor | None = None,
    ) -> Restoration:
        """ValueError for the deviation of more than one model in a row."""
        if deviation and len(self.restorers) > 1:
            raise ValueError(f"an uncertainty map needs one pass: scale {float(self.scale):g} takes several")
        done, size = 0.0, (0, 0)
        for restorer, part in zip(self.restorers, self._parts, strict=True):

            def report(share: float, done: float = done, part: float = part) -> None:
                progress(done + part * share)

            found = restorer.restore(image, deviation=deviation, progress=report, tokens=tokens)
            if not done:  # a length is at most that of the result over the scale
                height, width = (int(length / restorer.scale.fraction) for length in found.pixels.shape[:2])
                size = self.scale.high_size(height, width)
            image = DecodedImage(Path(), found.pixels, found.alpha, found.metadata)
            done += part
        return replace(
            found,
            pixels=self._shrink_array(found.pixels, size),
            alpha=None if found.alpha is None else self._shrink_array(found.alpha, size),
            deviation=None if found.deviation is None else self._shrink_array(found.deviation, size).clip(0),
        )

    def __call__(self, low_res: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(..., C, h, w) in [0, 1] to (..., C, H, W), on the CPU."""
        restored = low_res
        for restorer in self.restorers:
            restored = restorer(restored, tokens)
        return self._shrink(restored, self.scale.high_size(*low_res.shape[-2:])).clamp(0, 1)

    def _shrink_array(self, image: ArrayT, size: tuple[int, int]) -> ArrayT:
        """(height, width[, C]) to H x W."""
        planes = torch.from_numpy(image if image.ndim == 2 else image.transpose(2, 0, 1))
        shrunk = self._shrink(planes, size).numpy()
        return cast(ArrayT, np.ascontiguousarray(shrunk if image.ndim == 2 else shrunk.transpose(1, 2, 0)))

    def _shrink(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """In bands: float64 of the whole would fill the memory."""
        if self._excess.fraction == 1:
            return image[..., : size[0], : size[1]]
        bands = []
        for low in row_bands(*size):
            high = self._excess.high_window(low, *image.shape[-2:])
            bands.append(self._excess.downscale(high.cut(image), high, low))
        return torch.cat(bands, dim=-2)


def build_restorer(
    models: Sequence[LoadedModel],
    config: RestoreConfig,
    scale: float | None,
    device: torch.device,
    precision: torch.dtype | None = None,
) -> Restorer | AnyScale:
    """Restore to this scale with these models, see `restorer_to`."""
    return restorer_to(scale, [Restorer(model, config, device, precision) for model in models])


def restorer_to(scale: float | None, restorers: Sequence[Restorer]) -> Restorer | AnyScale:
    """The restorer of this scale, None is the largest; or the fitting chain of the restorers."""
    by_factor = {float(one.scale): one for one in restorers}
    wanted = max(by_factor) if scale is None else scale
    for factor, restorer in by_factor.items():
        if abs(factor - wanted) < 1e-4:
            return restorer
    return AnyScale([by_factor[factor] for factor in plan_chain(wanted, list(by_factor))], wanted)


def restore(
    image: Restorable,
    model: str | Path | LoadedModel | None = None,
    config: RestoreConfig | None = None,
    *,
    scale: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress = no_progress,
    tokens: Tensor | None = None,
) -> Restoration:
    """Restore one picture, see Restorer.restore.

    Args:
        model: loaded, or as `find_weights` takes it.
        scale: the enlargement, above 1 and at most 16; None is the model's largest, or 4.
        device, precision: see engine.device.

    ValueError: the image, the file (CheckpointError), the device or the configuration is wrong.
    """
    chosen = select_device(device)
    models: list[LoadedModel] = (
        [model]
        if isinstance(model, LoadedModel)
        else [load_model(path) for path in find_weights(model, scale)]
    )
    dtype = autocast_dtype(chosen, precision)
    restorer = build_restorer(models, config or RestoreConfig(), scale, chosen, dtype)
    return restorer.restore(image, progress=progress, tokens=tokens)
