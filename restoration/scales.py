"""Any enlargement with any models: applied one after another, then bicubic shrinks the result to H x W."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.options import OptionError
from restoration.fields import row_bands
from restoration.pictures import Restorable
from restoration.restorer import Progress, Restoration, Restorer, no_progress
from restoration.tiling import Scale

LARGEST_SCALE = 16.0


def plan_chain(scale: float, factors: Sequence[float]) -> tuple[float, ...]:
    """Choose the fewest factors whose product exceeds the scale least, the largest first.

    OptionError: a scale that is not above 1 and at most 16.
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


class Chain(NamedTuple):
    """An enlargement, and the restorers that make it when they are applied in turn."""

    scale: Scale
    restorers: tuple[Restorer, ...]


def chain_to(scale: float | None, restorers: Sequence[Restorer]) -> Chain:
    """Choose restorers, each as often as needed, that reach the scale; None is the largest scale of one.

    OptionError: a scale out of range, or consistency where the result is shrunk.
    """
    by_factor = {float(one.scale): one for one in restorers}
    wanted = Scale(max(by_factor) if scale is None else scale)
    if float(wanted) in by_factor:
        return Chain(wanted, (by_factor[float(wanted)],))
    chain = [by_factor[factor] for factor in plan_chain(float(wanted), list(by_factor))]
    if any(one.config.consistency for one in chain):
        rule = f"not at scale {float(wanted):g}, only at the model's; leave it out"
        raise OptionError("consistency", True, rule)
    return Chain(wanted, tuple(chain))


def check(chain: Chain, *, deviation: bool = False, tokens: bool = False) -> None:
    """Raise OptionError for what the chain cannot do to any picture."""
    if deviation and len(chain.restorers) > 1:
        models = " and ".join(f"x{float(one.scale):g}" for one in chain.restorers)
        raise OptionError("scale", float(chain.scale), f"an uncertainty map needs one pass, not {models}")
    for restorer in chain.restorers:
        restorer.check(deviation=deviation, tokens=tokens)


def restore_to(
    chain: Chain,
    image: Restorable,
    *,
    deviation: bool = False,
    progress: Progress = no_progress,
    tokens: Tensor | None = None,
) -> Restoration:
    """Restore a picture at the scale of the chain; arguments and errors as Restorer.restore and `check`."""
    check(chain, deviation=deviation, tokens=tokens is not None)
    size, count = (0, 0), len(chain.restorers)
    for number, restorer in enumerate(chain.restorers):

        def report(part: float, done: int = number) -> None:
            progress((done + part) / count)

        made = restorer.restore(image, deviation=deviation, progress=report, tokens=tokens)
        if number == 0:  # a length is at most that of the result over the scale
            height, width = (int(length / restorer.scale) for length in made.pixels.shape[:2])
            size = chain.scale.high_size(height, width)
        image = made
    excess = Scale(math.prod(float(one.scale) for one in chain.restorers) / float(chain.scale))
    if excess == 1:
        return made
    large = {"pixels": made.pixels, "alpha": made.alpha, "deviation": made.deviation}
    small = {name: shrunk(one, excess, size) for name, one in large.items() if one is not None}
    return replace(made, **cast(dict[str, Any], small))


def shrunk(image: npt.NDArray[Any], excess: Scale, size: tuple[int, int]) -> npt.NDArray[Any]:
    """(H, W[, C]) of (height, width[, C]), in bands: float64 of the whole would fill the memory."""
    planes = torch.from_numpy(image if image.ndim == 2 else image.transpose(2, 0, 1))
    bands = [excess.downscale(planes, band, planes.device) for band in row_bands(*size)]
    made = torch.cat(bands, dim=-2).numpy().clip(0)  # a deviation may undershoot
    return np.ascontiguousarray(made if image.ndim == 2 else made.transpose(1, 2, 0))
