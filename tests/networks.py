"""Small networks for tests."""

import torch

from unet import UNet


def tiny_unet(seed=0, residual_std=0.1, scale=2.0, **settings):
    """A UNet of a few thousand weights, all of them random, none zero."""
    settings = {"base_dim": 8, "dim_mults": (1, 2), "context_dim": 16, "head_dim": 8} | settings
    unet = UNet(**settings).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        spread = 0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    unet.residual_std.fill_(residual_std)
    unet.scale.fill_(scale)
    return unet
