"""The networks that are compared: this project's, and those that people would use instead.

Every peer is a UNet built as its documentation shows, of six input and three output channels and as many
parameters as ours within 20 %, and trained and sampled by our code. Enlargers are networks of one pass, of
spandrel, untrained: for time alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from engine.options import Options
from network import Condition, Network
from train_diffusion import make_model, parse

RECIPE = Path("recipes/x4.args")
OURS = "this project"
NAMES = (OURS, "denoising-diffusion-pytorch Unet", "diffusers UNet2DModel")


@dataclass(frozen=True)
class NoOptions(Options):
    """The record that a checkpoint keeps of a peer."""


class Peer(Network):
    """Another library's UNet, (B, 6, H, W) and (B,) to (B, 3, H, W): it sees noisy and upscaled images."""

    Config, window_multiple = NoOptions, 8

    def __init__(self, network: nn.Module) -> None:
        super().__init__(NoOptions())
        self.network = network

    def encode_context(self, condition: Condition) -> tuple[Tensor, None]:
        return condition.upscaled, None

    def forward(self, noisy: Tensor, t: Tensor, context: Tensor) -> Tensor:
        output = self.network(torch.cat([noisy, context], dim=1), t)
        return cast(Tensor, getattr(output, "sample", output))  # diffusers wraps it


def our_network(device: torch.device) -> Network:
    settings, _ = parse([f"@{RECIPE}"])
    return make_model(settings, device)


def contenders(device: torch.device) -> dict[str, Network]:
    """Build our network and its peers, untrained."""
    from denoising_diffusion_pytorch import Unet
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = Unet(40, dim_mults=(1, 2, 4), channels=6, out_dim=3, flash_attn=True)
    diffusers_unet = UNet2DModel(
        in_channels=6,
        out_channels=3,
        norm_num_groups=8,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    networks = (our_network(device), *(Peer(one).to(device) for one in (unet, diffusers_unet)))
    return dict(zip(NAMES, networks, strict=True))


def enlargers(device: torch.device) -> dict[str, nn.Module]:
    """Build networks (B, 3, h, w) -> (B, 3, 4h, 4w), untrained."""
    from spandrel.architectures.Compact import Compact
    from spandrel.architectures.ESRGAN import ESRGAN
    from spandrel.architectures.SAFMN import SAFMN

    built = {
        "SAFMN": SAFMN(dim=36, n_blocks=8, ffn_scale=2.0, upscaling_factor=4),
        "Compact of Real-ESRGAN": Compact(num_feat=64, num_conv=32, upscale=4),
        "ESRGAN": ESRGAN(scale=4),
    }
    layout = torch.channels_last
    return {name: one.eval().to(device).to(memory_format=layout) for name, one in built.items()}
