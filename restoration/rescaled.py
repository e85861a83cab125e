"""Any enlargement with any model: it is applied as often as needed, then bicubic shrinks the result.

Shapes: B images, C channels, H x W pixels of the result, h x w of the input.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.checkpoint import KINDS, released_model, released_scales
from engine.options import OptionError
from imaging.files import DecodedImage
from restoration.pictures import Restorable
from restoration.tiling import Scale, row_bands

if TYPE_CHECKING:
    from restoration.restorer import Progress, Restoration, Restorer

LARGEST_SCALE = 16.0
ArrayT = TypeVar("ArrayT", bound=npt.NDArray[Any])


def plan_chain(scale: float, factors: Sequence[float]) -> tuple[float, ...]:
    """The factors to apply one after the other, the largest first: 8 is 4, 2, and 3 is 4, with 2 and 4 given.

    Their product exceeds the scale least, and they are as few as that allows. OptionError for a scale that
    is not above 1 and at most 16.
    """
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
    """The files of "photo" or "clean", the project's own that this enlargement takes, or the one of a path.

    None is clean, but photo where there is such a file for the first pass, which sees the photo.
    """
    if name is not None and name not in KINDS:
        return [Path(name)]
    kind = str(name or "clean")
    wanted = 4.0 if scale is None else scale
    chain = dict.fromkeys(
        plan_chain(wanted, released_scales(kind) or [4.0])
    )  # without any, the next line says so
    paths = [released_model(factor, kind) for factor in chain]
    if name is None and next(iter(chain)) in released_scales("photo"):
        paths[0] = released_model(next(iter(chain)), "photo")
    return paths


class AnyScale:
    """Restores to `scale`, as Restorer does to that of its model.

    Args:
        restorers: applied one after the other; between them, images have the pixels that a file would have.
        scale: at most the product of theirs; ValueError otherwise.
    """

    def __init__(self, restorers: Sequence["Restorer"], scale: float) -> None:
        self.restorers, self.scale = restorers, Scale(scale)
        factors = [float(one.scale) for one in restorers]
        reached = math.prod(factors)
        if scale > reached + 1e-6:
            raise ValueError(f"scale is {scale:g}, but the models reach {reached:g}: give more")
        if any(one.config.consistency for one in restorers):
            raise OptionError(
                "consistency", True, f"not at scale {scale:g}, only at the model's; leave it out"
            )
        made = [math.prod(factors[: count + 1]) ** 2 for count in range(len(factors))]
        self._parts = [pixels / sum(made) for pixels in made]  # of the work, and so of the progress
        self._excess = Scale(reached / scale)

    def restore(
        self,
        image: Restorable,
        *,
        deviation: bool = False,
        progress: "Progress | None" = None,
        tokens: Tensor | None = None,
    ) -> "Restoration":
        """As Restorer.restore; ValueError where a deviation is asked of more than one model in a row."""
        if deviation and len(self.restorers) > 1:
            raise ValueError(f"an uncertainty map needs one pass: scale {float(self.scale):g} takes several")
        done, size = 0.0, (0, 0)
        for restorer, part in zip(self.restorers, self._parts, strict=True):
            report = _part_of(progress, done, part)
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
        """As Restorer.__call__: (..., C, h, w) in [0, 1] to (..., C, H, W), on the CPU."""
        restored = low_res
        for restorer in self.restorers:
            restored = restorer(restored, tokens)
        return self._shrink(restored, self.scale.high_size(*low_res.shape[-2:])).clamp(0, 1)

    def _shrink_array(self, image: ArrayT, size: tuple[int, int]) -> ArrayT:
        """(height, width) or (height, width, C) to H x W."""
        planes = torch.from_numpy(image if image.ndim == 2 else image.transpose(2, 0, 1))
        shrunk = self._shrink(planes, size).numpy()
        return cast(ArrayT, np.ascontiguousarray(shrunk if image.ndim == 2 else shrunk.transpose(1, 2, 0)))

    def _shrink(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(..., height, width) to (..., H, W), in bands: float64 of the whole would fill the memory."""
        if self._excess.fraction == 1:
            return image[..., : size[0], : size[1]]
        bands = []
        for low in row_bands(*size):
            high = self._excess.high_window(low, *image.shape[-2:])
            bands.append(self._excess.downscale(high.cut(image), high, low))
        return torch.cat(bands, dim=-2)


def restorer_to(scale: float | None, restorers: Sequence["Restorer"]) -> "Restorer | AnyScale":
    """The one restorer, where the scale is its own or None; or the fitting chain of the restorers."""
    factors = [float(one.scale) for one in restorers]
    if len(restorers) == 1 and (scale is None or abs(scale - factors[0]) < 1e-4):
        return restorers[0]
    assert scale is not None, "several models need a scale"
    by_factor = dict(zip(factors, restorers, strict=True))
    return AnyScale([by_factor[factor] for factor in plan_chain(scale, factors)], scale)


def _part_of(progress: "Progress | None", done: float, part: float) -> "Progress | None":
    """The progress of one of several pieces of work."""
    return None if progress is None else lambda share: progress(done + part * share)
