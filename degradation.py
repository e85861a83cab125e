"""How a low-resolution image came from a high-resolution one: what training imitates and restoring undoes.

A degradation is a frozen dataclass of options. The checkpoint records it, and the dataset, the loss,
validation, evaluation and consistency use the same object. A new one is a class here and a line in
DEGRADATIONS.

Shapes: C channels, H x W pixels of the high resolution, h x w of the low one, ... any leading dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bicubic import Border, resize
from engine.options import Options, option


@dataclass(frozen=True)
class Bicubic(Options):
    """MATLAB's antialiased bicubic, rounded to uint8 after each pass as the published test images are.

    Attributes: as the help texts say.
    """

    kind: Literal["bicubic"] = option("bicubic", "how low resolution is made", flag="degradation")
    scale: float = option(4.0, "how much smaller the input is", flag="downscale_factor", above=1)
    border: Border = option("mirror", "what bicubic sees beyond the edge of an image")

    def __call__(self, high_res: Tensor) -> Tensor:
        """(..., C, H, W) uint8 -> (..., C, h, w) uint8, h = ceil(H / scale)."""
        return resize(high_res, scale=1 / self.scale, border=self.border, rounding="uint8")

    def describe(self) -> str:
        """One line for a protocol."""
        edge = "mirrored" if self.border == "mirror" else "replicated"
        return f"made by MATLAB's bicubic (antialiased, a = -0.5), {edge} border, uint8 after each pass"


Degradation = Bicubic  # a union, as soon as there are others
DEGRADATIONS: dict[str, type[Degradation]] = {"bicubic": Bicubic}


def degradation_from_dict(values: Mapping[str, object]) -> Degradation:
    """The inverse of `to_dict` of any degradation.

    Raises:
        ValueError: an unknown kind or setting.
    """
    kind = values.get("kind", "bicubic")
    if kind not in DEGRADATIONS:
        raise ValueError(f"degradation {kind!r}: choose one of {', '.join(DEGRADATIONS)}")
    return DEGRADATIONS[str(kind)].from_dict(values)
