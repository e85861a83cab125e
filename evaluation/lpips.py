"""LPIPS: how different two images look to a person (Zhang et al. 2018)."""

import hashlib
import os
import pickle
import socket
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.options import one_line
from engine.packages import IMPORT_ERRORS
from evaluation.metrics import check_pair

WEIGHTS_VARIABLE = "SR_LPIPS_WEIGHTS"
PATIENCE = 20.0  # seconds that a server may stay silent
BAD_FILE = (OSError, EOFError, pickle.UnpicklingError, SafetensorError, RuntimeError, KeyError, TypeError)


class MetricUnavailableError(ValueError):
    """A metric's package or weights cannot be had; the message says why in one line, and the remedy."""


class Lpips:
    """LPIPS of AlexNet, version 0.1.

    Args:
        weights: file of features under torchvision's names, .pth or .safetensors; without it that of
            SR_LPIPS_WEIGHTS, or they are fetched.

    ValueError: other weights. MetricUnavailableError: a package is missing, or the download failed.
    """

    def __init__(self, device: torch.device | str = "cpu", weights: str | Path | None = None) -> None:
        weights = weights or os.environ.get(WEIGHTS_VARIABLE)
        path = Path(weights).expanduser() if weights else None
        self._network = _load_network("alex", path).to(device)
        self._device = torch.device(device)
        source = f"{path.name} (SHA-256 {file_digest(path)})" if path else "torchvision's"
        self.note = f"AlexNet 0.1, features: {source}; lower is better"

    @torch.no_grad()
    def __call__(self, restored: Tensor, truth: Tensor) -> Tensor:
        """(B,) distances of two (B, C, H, W), C 1 or 3, sides from 32, clipped to [0, 1]."""
        check_pair(restored, truth)
        batch, channels, height, width = truth.shape
        if min(height, width) < 32 or channels not in (1, 3):
            raise ValueError(f"LPIPS got {channels} channels of {height}x{width}; give 1 or 3, sides from 32")
        ours, theirs = (
            image.to(self._device, torch.float32).clamp(0, 1).expand(batch, 3, height, width)
            for image in (restored, truth)
        )
        distances: Tensor = self._network(ours, theirs, normalize=True)  # (B, 1, 1, 1)
        return distances.flatten().double().cpu()


class WithoutAutocast(nn.Module):
    """Runs a part in float32. In bfloat16 one step is an 8-bit level or two: the texture of skin is lost."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = self.part(x.float())
        return result


class PerceptualFeatures(nn.Module):
    """VGG16 and the heads of LPIPS on it, to train with; what is measured is LPIPS of AlexNet.

    Args:
        weights: file of VGG16's features under torchvision's names, .pth or .safetensors; None fetches them.

    ValueError: other weights. MetricUnavailableError: a package is missing, or the download failed.
    """

    dims = (64, 128, 256, 512, 512)  # of the stages

    def __init__(self, device: torch.device | str = "cpu", weights: str | Path | None = None) -> None:
        super().__init__()
        network = _load_network("vgg", Path(weights) if weights else None).requires_grad_(False)
        first = network.get_submodule("net.slice1")
        first.register_module("0", WithoutAutocast(first.get_submodule("0")))
        self.network = network.eval().to(memory_format=torch.channels_last).to(device)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the five stages, (B, D_i, H_i, W_i), of length 1 at each place."""
        scaled = self.network.get_submodule("scaling_layer")(image)
        stages = self.network.get_submodule("net")(scaled.contiguous(memory_format=torch.channels_last))
        return [F.normalize(stage.float(), dim=1, eps=1e-6) for stage in stages]

    def distance(self, features: list[Tensor], others: list[Tensor]) -> Tensor:
        """(B,): LPIPS of two images (Zhang et al. 2018, Eq. 1)."""
        heads = self.network.get_submodule("lins").children()
        distances = [
            head(one.sub(other).square()).mean((1, 2, 3))
            for head, one, other in zip(heads, features, others, strict=True)
        ]
        return torch.stack(distances).sum(0)


def _load_network(kind: Literal["alex", "vgg"], path: Path | None) -> nn.Module:
    """Build LPIPS with the features of a file; without one they are fetched."""
    if path is None:
        return _build_network(kind, fetch=True)
    try:
        is_safetensors = path.suffix.lower() == ".safetensors"
        features = load_file(path) if is_safetensors else torch.load(path, "cpu", weights_only=True)
        network = _build_network(kind, fetch=False)
        backbone = network.get_submodule("net")
        # slice2.3.weight is torchvision's features.3.weight
        names = {name: f"features.{name.split('.', 1)[1]}" for name in backbone.state_dict()}
        backbone.load_state_dict({name: features[original] for name, original in names.items()})
    except BAD_FILE as error:
        what = {"alex": "AlexNet", "vgg": "VGG16"}[kind]
        raise ValueError(f"{path} does not hold torchvision's {what} features: {one_line(error)}") from error
    return network


def _build_network(kind: str, fetch: bool) -> nn.Module:
    """Build LPIPS with features that are fetched or random."""
    silence = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # what fetches the weights sets no bound of its own
    try:
        # Its public class always fetches; this one, which it wraps, can leave the features to us (pnet_rand).
        from torchmetrics.functional.image.lpips import _LPIPS

        network: nn.Module = _LPIPS(net=kind, pnet_rand=not fetch)
    except IMPORT_ERRORS as error:
        # Not installed; no network, no space or no permission; a download that fails its checksum.
        remedy = f"give the features as a file, by {WEIGHTS_VARIABLE}" if kind == "alex" else "give a file"
        raise MetricUnavailableError(f"{type(error).__name__}: {one_line(error)}; {remedy}") from error
    finally:
        socket.setdefaulttimeout(silence)
    return network


def file_digest(path: Path) -> str:
    """Return the first 12 hexadecimal digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
