"""What is measured, and how: the options of an evaluation."""

import math
from dataclasses import MISSING, dataclass
from fractions import Fraction

from bicubic import Border
from degradation import KINDS
from engine.options import Options, option
from evaluation.metrics import Channel, Protocol


@dataclass(frozen=True)
class EvaluationConfig(Options):
    """The scale may be a fraction such as 1.5."""

    scale: float = option(MISSING, "the enlargement, such as 4", above=1)
    border: Border = option("mirror", "what bicubic sees beyond the edge; mirror is today's MATLAB")
    degradation: str = option(
        "bicubic", "kind of the low resolution, unless it is given; drawn by the seed", choices=KINDS
    )
    channel: Channel = option("luma", "what PSNR and SSIM compare")
    crop: int | None = option(
        None, "pixels that PSNR and SSIM leave out at each border; without it, the scale", low=0
    )
    seed: int = option(0, "of the noise, of SWD's patches and of the degradation", low=0, high=2**63 - 1)
    lpips: bool = option(True, "measure LPIPS")
    lpips_weights: str | None = option(
        None, "AlexNet's features for LPIPS, .pth or .safetensors; without it, SR_LPIPS_WEIGHTS or a download"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(self.ratio - self.scale) > 1e-6:
            raise ValueError(f"scale is {self.scale:g}; give a number such as 2, 3, 4 or 1.5")

    @property
    def ratio(self) -> Fraction:
        """A side that shrinks exactly is a multiple of its numerator."""
        return Fraction(self.scale).limit_denominator(100)

    @property
    def protocol(self) -> Protocol:
        return Protocol(math.ceil(self.ratio) if self.crop is None else self.crop, self.channel)
