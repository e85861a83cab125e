"""Networks (B, 3, h, w) -> (B, 3, 4h, 4w) of one pass, from their papers: untrained, for time only."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 4


def _conv(wide: int, narrow: int, side: int = 3, stride: int = 1, padding: int | None = None) -> nn.Conv2d:
    return nn.Conv2d(wide, narrow, side, stride, side // 2 if padding is None else padding)


class SpatialAttention(nn.Module):
    """ESA, a mask from a small copy (Liu et al. 2020, section 3.3)."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.enter, self.skip, self.leave = (
            _conv(channels, width, 1),
            _conv(width, width, 1),
            _conv(width, channels, 1),
        )
        self.shrink = _conv(width, width, 3, stride=2, padding=0)
        layers = [layer for _ in range(depth) for layer in (_conv(width, width), nn.ReLU())]
        self.pooled = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        entered = self.enter(x)
        small = self.pooled(F.max_pool2d(self.shrink(entered), 7, 3))
        mask = F.interpolate(small, x.shape[-2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.leave(mask + self.skip(entered)))


class LocalFeatureBlock(nn.Module):
    """RLFB (Kong et al. 2022, section 3.2)."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        widths = [channels, middle, middle, channels]
        pairs = itertools.pairwise(widths)
        self.body = nn.Sequential(*(part for pair in pairs for part in (_conv(*pair), nn.LeakyReLU(0.05))))
        self.fuse, self.attention = _conv(channels, channels, 1), SpatialAttention(channels, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        masked: Tensor = self.attention(self.fuse(x + self.body(x)))
        return masked


class DistillationBlock(nn.Module):
    """RFDB (Liu et al. 2020, section 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.distil = nn.ModuleList(_conv(channels, half, 1) for _ in range(3))
        self.refine = nn.ModuleList(_conv(channels, channels) for _ in range(3))
        self.last, self.fuse = _conv(channels, half), _conv(4 * half, channels, 1)
        self.attention = SpatialAttention(channels, channels // 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        left = []
        for distil, refine in zip(self.distil, self.refine, strict=True):
            left.append(F.leaky_relu(distil(x), 0.05))
            x = F.leaky_relu(x + refine(x), 0.05)
        left.append(F.leaky_relu(self.last(x), 0.05))
        masked: Tensor = self.attention(self.fuse(torch.cat(left, dim=1)))
        return masked


class Rlfn(nn.Module):
    """RLFN (Kong et al. 2022), as it won the challenge of its year, 0.317 M."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = _conv(3, 46), _conv(46, 46)
        self.blocks = nn.Sequential(*(LocalFeatureBlock(46, 48) for _ in range(4)))
        self.up = _conv(46, 3 * SCALE**2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.head(x)
        return F.pixel_shuffle(self.up(features + self.tail(self.blocks(features))), SCALE)


class Rfdn(nn.Module):
    """RFDN (Liu et al. 2020), 0.433 M."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = _conv(3, 50), _conv(50, 50)
        self.blocks = nn.ModuleList(DistillationBlock(50) for _ in range(4))
        self.fuse, self.up = _conv(200, 50, 1), _conv(50, 3 * SCALE**2)

    def forward(self, x: Tensor) -> Tensor:
        features = made = self.head(x)
        outputs = []
        for block in self.blocks:
            made = block(made)
            outputs.append(made)
        fused = F.leaky_relu(self.fuse(torch.cat(outputs, dim=1)), 0.05)
        return F.pixel_shuffle(self.up(features + self.tail(fused)), SCALE)


class DenseBlock(nn.Module):
    """Wang et al. 2018, section 3.1."""

    def __init__(self, width: int = 64, growth: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_conv(width + place * growth, growth) for place in range(4))
        self.last = _conv(width + 4 * growth, width)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for layer in self.layers:
            seen = torch.cat([seen, F.leaky_relu(layer(seen), 0.2)], dim=1)
        added: Tensor = x + 0.2 * self.last(seen)
        return added


class Esrgan(nn.Module):
    """ESRGAN's generator (Wang et al. 2018), 16.7 M."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = _conv(3, 64), _conv(64, 64)
        self.blocks = nn.ModuleList(nn.Sequential(*(DenseBlock() for _ in range(3))) for _ in range(23))
        self.ups = nn.ModuleList(_conv(64, 64) for _ in range(2))
        self.high, self.last = _conv(64, 64), _conv(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = made = self.head(x)
        for block in self.blocks:
            made = made + 0.2 * block(made)
        made = features + self.tail(made)
        for up in self.ups:
            made = F.leaky_relu(up(F.interpolate(made, scale_factor=2.0)), 0.2)
        restored: Tensor = self.last(F.leaky_relu(self.high(made), 0.2))
        return restored


RESTORERS: dict[str, Callable[[], nn.Module]] = {"RLFN": Rlfn, "RFDN": Rfdn, "ESRGAN generator": Esrgan}
