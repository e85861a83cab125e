"""The networks that are compared: this project's, and those that people would use instead.

Every peer is built as its documentation shows, of six input and three output channels and as many parameters
as ours within 20 %, and trained and sampled by our code.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from train_diffusion import make_model, parse
from unet import Condition, UNetConfig

RECIPE = Path("recipes/x4.args")
OURS = "this project"
TOKENS, TOKEN_WIDTH = 16, 64


class Peer(nn.Module):
    """Another library's UNet, (B, 6, H, W), (B,) -> (B, 3, H, W), as a diffusion.Network."""

    residual_std: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.call = call
        self.config = UNetConfig()  # of no meaning here: a checkpoint wants one
        self.register_buffer("residual_std", torch.zeros(()))
        self.register_buffer("scale", torch.zeros(()))

    def encode_context(self, condition: Condition) -> tuple[Tensor, None]:
        assert condition.upscaled is not None
        return condition.upscaled, None

    def forward(self, noisy: Tensor, t: Tensor, upscaled: Tensor) -> Tensor:
        return self.call(self.network, torch.cat([noisy, upscaled], dim=1), t)


def _denoising_diffusion_pytorch() -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    network = Unet(40, dim_mults=(1, 2, 4), channels=6, out_dim=3, flash_attn=True)
    return Peer(network, lambda net, x, t: net(x, t))


def _unet_2d_model() -> nn.Module:
    from diffusers import UNet2DModel

    network = UNet2DModel(
        in_channels=6,
        out_channels=3,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return Peer(network, lambda net, x, t: net(x, t).sample)


def _unet_2d_condition_model() -> nn.Module:
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(
        in_channels=6,
        out_channels=3,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=TOKEN_WIDTH,
        norm_num_groups=8,
    )

    def call(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        tokens = x.new_zeros(len(x), TOKENS, TOKEN_WIDTH)
        output: Tensor = net(x, t, encoder_hidden_states=tokens).sample
        return output

    return Peer(network, call)


PEERS: dict[str, Callable[[], nn.Module]] = {
    "denoising-diffusion-pytorch Unet": _denoising_diffusion_pytorch,
    "diffusers UNet2DModel": _unet_2d_model,
    "diffusers UNet2DConditionModel": _unet_2d_condition_model,
}
NAMES = (OURS, *PEERS)


def our_network(device: torch.device) -> nn.Module:
    settings, _ = parse([f"@{RECIPE}"])
    return make_model(settings, device)


def contenders(device: torch.device) -> dict[str, nn.Module]:
    """Untrained."""
    torch.manual_seed(0)
    return {OURS: our_network(device)} | {name: build().to(device) for name, build in PEERS.items()}
