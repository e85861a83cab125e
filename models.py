"""A finished model: its network, and the process and degradation that it was trained with, in one file."""

from pathlib import Path
from typing import NamedTuple

import torch

from degradation import Degradation
from diffusion import ProcessConfig
from engine.checkpoint import CheckpointError, export_model, load_checkpoint, load_weights
from network import Network, name_of
from unet import UNet


class LoadedModel(NamedTuple):
    """A network in evaluation mode with its averaged weights, and how it was trained."""

    network: Network
    process: ProcessConfig
    degradation: Degradation
    step: int  # optimiser steps of the training


def load_model(path: str | Path, network: type[Network] = UNet) -> LoadedModel:
    """Load a checkpoint or an exported model of this class of network; CheckpointError."""
    content = load_checkpoint(path)
    name = content.get("network_class", name_of(UNet))
    if name.partition(":")[2] != network.__qualname__:  # the module may have moved, or be a script
        raise CheckpointError(f"{path} is of the network {name}, not {name_of(network)}: give the former")
    try:
        rebuilt = network.from_config(network.Config.from_dict(content["network"]))
        process = ProcessConfig.from_dict(content["process"])
        weights, step = content["ema"], int(content["step"])
        bicubic = {"scale": float(weights["scale"])}  # all that format 1 knew
        degradation = Degradation.from_dict(content.get("degradation", bicubic))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe a model of this project: {error!r}") from error
    load_weights(rebuilt, weights, path)
    rebuilt.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return LoadedModel(rebuilt, process, degradation, step)


def export_safetensors(model: LoadedModel, path: str | Path) -> None:
    """Write a model to a .safetensors file in half precision; CheckpointError."""
    parts = {"network": model.network.config, "process": model.process, "degradation": model.degradation}
    sections: dict[str, object] = {name: part.to_dict() for name, part in parts.items()}
    sections |= {"network_class": name_of(type(model.network)), "step": model.step}
    export_model(path, sections, model.network.state_dict())
