"""Defines what a network must be to be trained and restored with, and how one is found by its name.

Shapes: B batch, C channels, H x W high-resolution pixels, h x w low-resolution ones, N tokens of width E.
"""

import os
import pkgutil
import sys
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from engine.options import Options

# How every script shows --network.
NETWORK_FLAG: dict[str, Any] = {
    "metavar": "MODULE:CLASS",
    "help": "class of a network of your own, whose options are flags of the training (default: unet:UNet)",
}


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
    image_channels = 3
    window_multiple = 1  # pixels at whose multiples the windows of a large image begin, to equal the whole
    cell = 1  # pixels of the grid that sub-pixel convolutions can draw where nothing changes; 1: none
    takes_tokens = False  # whether tokens of another encoder steer it
    mean_reach = 0  # pixels from a window's edge from where its mean is the whole image's; 0: no mean
    checkpoint_activations: bool | None = None  # whether it saves memory in training; None: it cannot
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

    def encode_tokens(self, low_res: Tensor) -> Tensor | None:
        """(B, C, h, w) in [-1, 1] -> (B, N, E) that all windows of an image share, or None."""
        return None

    @abstractmethod
    def encode_context(self, condition: Condition) -> tuple[Any, Tensor | None]:
        """Encode what every step needs, for `forward`, and predict the mean (B, C, H, W) or None."""

    @abstractmethod
    def forward(self, noisy: Tensor, t: Tensor, context: Any) -> Tensor:  # noqa: ANN401
        """(B, C, H, W) of unit variance, (B,), an encoded condition -> (B, C, H, W)."""


def network_class(name: str) -> type[Network]:
    """Import "module:Class", also from the working folder; ValueError where there is no such network."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"network {name!r}: {error}; give module:Class, as unet:UNet") from error
    if not (isinstance(found, type) and issubclass(found, Network)):
        raise ValueError(f"network {name!r} is no network: derive the class from network.Network")
    return found


def name_of(network: type[Network]) -> str:
    """Return the name by which network_class finds a class."""
    return f"{network.__module__}:{network.__qualname__}"
