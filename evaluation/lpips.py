"""LPIPS: how different two images look to a person (Zhang et al. 2018)."""

import hashlib
import os
import pickle
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.metrics import check_pair

WEIGHTS_VARIABLE = "SR_LPIPS_WEIGHTS"
_SMALLEST = 32


class MetricUnavailableError(RuntimeError):
    """A metric that needs a package or weights which cannot be had; the message says why in one line."""


class Lpips:
    """LPIPS of Zhang et al. 2018, "The unreasonable effectiveness of deep features", AlexNet, version 0.1.

    The heads come with torchmetrics. AlexNet's features come from a file, or torchvision fetches them once
    (233 MB) into torch's hub folder. Build one Lpips and call it for all images.

    Args:
        device: where to compute.
        weights: the file of AlexNet's convolutions under torchvision's names `features.N.weight` and
            `features.N.bias`, .pth or .safetensors; None for the one that SR_LPIPS_WEIGHTS names, if any.
        timeout: seconds that the server may stay silent while the features are fetched.

    Raises:
        ValueError: the file is missing or does not hold these weights.
        MetricUnavailableError: torchmetrics or torchvision is missing, or the weights cannot be fetched.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path | None = None,
        *,
        timeout: float = 20.0,
    ) -> None:
        weights = weights or os.environ.get(WEIGHTS_VARIABLE) or None
        features = None if weights is None else read_features(Path(weights))
        self._network = _build_network(features, timeout).to(device)
        self._device = torch.device(device)
        self._source = "torchvision's features" if weights is None else _identify(Path(weights))

    def describe(self) -> str:
        """Which network measures, in one line."""
        return f"AlexNet, version 0.1, {self._source}; lower is better"

    @torch.no_grad()
    def __call__(self, restored: Tensor, truth: Tensor) -> Tensor:
        """Distance per image, 0 for identical ones: two (B, C, H, W) in [0, 1], C 3 or 1 (repeated), to (B,).

        Values are clipped to [0, 1], as a file would hold them, but not rounded.

        Raises:
            ValueError: shapes differ, values are not in [0, 1], or a side is shorter than 32.
        """
        check_pair(restored, truth)
        batch, channels, height, width = truth.shape
        if min(height, width) < _SMALLEST or channels not in (1, 3):
            raise ValueError(
                f"LPIPS got {channels} channels of {height}x{width}; "
                f"give 1 or 3, of {_SMALLEST} pixels or more"
            )
        ours, theirs = (
            image.to(self._device, torch.float32).clamp(0, 1).expand(batch, 3, height, width)
            for image in (restored, truth)
        )
        distances: Tensor = self._network(ours, theirs, normalize=True)  # (B, 1, 1, 1)
        return distances.flatten().double().cpu()


def read_features(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of AlexNet features, .pth or .safetensors, by name.

    Raises:
        ValueError: the file is missing, or is no file of tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix.lower() == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; give a file of AlexNet's features") from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a file of weights; give AlexNet's features") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no weights by name; give AlexNet's features")
    return {str(name): value for name, value in content.items()}


def _build_network(features: dict[str, Tensor] | None, timeout: float) -> nn.Module:
    """The network and its heads; features None lets torchvision fetch them."""
    try:
        # Its public class always fetches; this one, which it wraps, can leave the features to us (pnet_rand).
        from torchmetrics.functional.image.lpips import _LPIPS

        with _network_timeout(timeout):
            network: nn.Module = _LPIPS(net="alex", pnet_rand=features is not None)
    except (ImportError, OSError, RuntimeError) as error:
        # Not installed; no network, no space or no permission; a download that fails its checksum.
        reason = " ".join(str(error).split())
        raise MetricUnavailableError(f"LPIPS is unavailable: {type(error).__name__}: {reason}") from error
    if features is not None:
        _load_features(network, features)
    return network


def _load_features(network: nn.Module, features: dict[str, Tensor]) -> None:
    backbone = network.get_submodule("net")
    # slice2.3.weight is torchvision's features.3.weight
    names = {name: f"features.{name.split('.', 1)[1]}" for name in backbone.state_dict()}
    missing = sorted(set(names.values()) - set(features))
    if missing:
        raise ValueError(f"the weights for LPIPS have no {missing[0]}; give torchvision's AlexNet features")
    try:
        backbone.load_state_dict({name: features[original] for name, original in names.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights for LPIPS are not AlexNet's: {reason}") from error


def _identify(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return f"features from {path.name} (SHA-256 {digest})"


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Bound the silence of connections opened inside; what fetches the weights sets no bound of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
