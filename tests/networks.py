"""Small networks for tests."""

import math

import torch

from degradation import Degradation
from diffusion import ProcessConfig
from models import LoadedModel
from unet import UNet

PROCESS = ProcessConfig()
BICUBIC = Degradation(scale=2.0)


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


def randomised(module):
    """Every weight drawn anew, so that zero-initialised layers do something."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def random_model(scale=4.0, gain=1.0, process=PROCESS, **settings):
    """A small model whose zero-initialised layers are random too, so that every part of it counts."""
    torch.manual_seed(0)
    unet = UNet(base_dim=8, context_dim=16, head_dim=8, **settings)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=gain / math.sqrt(parameter[0].numel()))
        unet.residual_std.fill_(0.12)
        unet.scale.fill_(scale)
    return LoadedModel(unet.eval().requires_grad_(False), process, Degradation(scale=scale), 1)
