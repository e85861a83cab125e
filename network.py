"""What a network must be to be trained and restored with.

Shapes: B batch, C channels, H x W high-resolution pixels, h x w low-resolution ones, N tokens of width E.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from engine.options import Options


class Condition(NamedTuple):
    """An image to restore, from which a network takes what its conditioning needs."""

    upscaled: Tensor  # (B, C, H, W) in [-1, 1]
    low_res: Tensor | None = None  # (B, C, h, w) in [-1, 1]
    tokens: Tensor | None = None  # (B, N, E) of another encoder; 0 where nothing is known


class Network(nn.Module, ABC):
    """A network that predicts what a diffusion mode asks for, given a noisy residual and a Condition.

    A class of one's own names its options, `Config`, and has `encode_context` and `forward`; the rest may
    stay as it is. `residual_std` (of residuals in [-2, 2]) and `scale`, the enlargement, are 0 until trained.
    """

    Config: ClassVar[type[Options]]
    residual_std: Tensor
    scale: Tensor
    predictor: nn.Module | None  # of the mean and of what the context has of it; sharpening freezes it

    def __init__(self, config: Options) -> None:
        super().__init__()
        self.config = config
        self.predictor = None
        self.register_buffer("residual_std", torch.zeros(()))
        self.register_buffer("scale", torch.zeros(()))

    @classmethod
    def from_config(cls, config: Any) -> Self:  # noqa: ANN401  # one of Config
        """Build a network, untrained, of its options."""
        return cls(config)

    @property
    def image_channels(self) -> int:
        """Channels of the images, 3 for RGB."""
        return 3

    @property
    def window_multiple(self) -> int:
        """Pixels at whose multiples the windows of a large image begin, so that they equal the whole."""
        return 1

    @property
    def mean_reach(self) -> int:
        """Pixels from a window's edge from where its mean is the whole image's; 0 without a mean."""
        return 0

    def encode_tokens(self, low_res: Tensor) -> Tensor | None:
        """(B, C, h, w) in [-1, 1] -> (B, N, E) that all windows of an image share, or None."""
        return None

    @abstractmethod
    def encode_context(self, condition: Condition) -> tuple[Any, Tensor | None]:
        """Encode what every step needs, for `forward`, and predict the mean (B, C, H, W) or None."""

    @abstractmethod
    def forward(self, noisy: Tensor, t: Tensor, context: Any) -> Tensor:  # noqa: ANN401
        """(B, C, H, W) of unit variance, (B,), an encoded condition -> (B, C, H, W)."""
