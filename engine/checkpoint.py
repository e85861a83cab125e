"""Files that hold a model: written whole or not at all, verified when read, enough to rebuild the network.

A checkpoint (.pth) is a dict of plain values and tensors, loadable with `weights_only=True`:

    format      this layout's version                     process    timesteps, mode, schedule (diffusion.py)
    unet        UNetConfig as a dict                       step       optimiser steps taken
    model, ema  state dicts: trained and averaged weights  training   the settings of the run (training.py)
    optimizer   {"name", "state"}                          best_psnr  best validation PSNR so far, in dB
    settings    the flags of the script that trained it

An exported model (.safetensors) has the averaged weights in half precision and the first three dicts as JSON
in its header.
"""

import json
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from imaging.atomic import write_atomically
from unet import UNet, UNetConfig

FORMAT = 1
Plain = int | float | str | bool | None | list[int] | list[float] | list[str]
StateDict = dict[str, Tensor]
NOT_A_CHECKPOINT = "is not a checkpoint of this project"
RELEASED = Path(__file__).parent.parent / "weights"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or does not fit; the message names the file and the remedy."""


class LoadedModel(NamedTuple):
    """A network rebuilt from its file.

    Attributes:
        unet: in evaluation mode, with the averaged weights.
        process: keyword arguments of diffusion.ProcessConfig.
        step: how many optimiser steps it was trained for.
    """

    unet: UNet
    process: dict[str, Plain]
    step: int


def save_checkpoint(path: Path, content: dict[str, object]) -> None:
    """Write a checkpoint atomically.

    Raises:
        CheckpointError: it could not be written, for instance because the disk is full. The old file, if
            there was one, is intact.
    """

    def write(temporary: Path) -> None:
        torch.save({"format": FORMAT, **content}, temporary)

    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(
            f"could not write {path}: {str(error).splitlines()[0]}. Is the disk full? "
            "Earlier checkpoints are intact"
        ) from error


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, object]:
    """Read a checkpoint after checking every byte of it against the checksums it was stored with.

    Raises:
        CheckpointError: no such file, truncated or altered, not one of ours, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give the path of a .pth file that training wrote")
    damage = _damage(path)
    if damage is not None:
        raise CheckpointError(f"{path} {damage}; {_offer_instead(path)}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} {NOT_A_CHECKPOINT}: {reason}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} {NOT_A_CHECKPOINT}: it holds no format entry")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, this version reads {FORMAT}: update the project"
        )
    return content


def _damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, or None: torch.load does not compare the checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        return f"{NOT_A_CHECKPOINT}, or is truncated ({error})"
    return None if damaged is None else f"is damaged (the checksum of {damaged} is wrong)"


def _offer_instead(path: Path) -> str:
    """The newest intact checkpoint beside a damaged one, in words."""
    others = sorted(path.parent.glob("*_step*.pth"), reverse=True)
    intact = next((other for other in others if not other.samefile(path) and _damage(other) is None), None)
    return f"{intact} is intact" if intact is not None else "there is no intact one by step beside it"


def load_weights(model: torch.nn.Module, weights: StateDict, source: str | Path) -> None:
    """Copy weights into the model, all of them or none.

    Raises:
        CheckpointError: listing the first keys that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in weights]
    problems += [f"unknown {key}" for key in weights if key not in own]
    problems += [
        f"{key} is {tuple(weights[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{source} does not fit this model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(weights)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> LoadedModel:
    """Rebuild the network of a checkpoint (.pth) or of an exported model (.safetensors), averaged weights.

    Raises:
        CheckpointError: the file is missing, damaged, or lacks what a model needs.
    """
    path = Path(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else load_checkpoint(path)
    try:
        config = UNetConfig.from_dict(content["unet"])  # type: ignore[arg-type]  # checked by from_dict
        weights, process, step = content["ema"], content["process"], content["step"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a model of this project: {error}") from error
    assert isinstance(weights, dict)
    assert isinstance(process, dict)
    assert isinstance(step, int)
    unet = UNet.from_config(config)
    load_weights(unet, weights, path)
    unet.to(memory_format=torch.channels_last).to(torch.device(device)).eval().requires_grad_(False)
    return LoadedModel(unet, process, step)


def released_model(scale: float = 4) -> Path:
    """The path of the weights that come with the project, for one enlargement.

    Raises:
        CheckpointError: there are none for this enlargement; the message names those there are.
    """
    path = RELEASED / f"x{scale:g}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in RELEASED.glob("x*.safetensors"))) or "none"
        raise CheckpointError(
            f"no weights for x{scale:g} come with the project (there are: {there}); train your own "
            "with train_diffusion.py and give their --weights_path"
        )
    return path


def export_safetensors(model: LoadedModel, path: str | Path) -> None:
    """Write the averaged weights in half precision, configuration as JSON in the header, atomically."""
    from safetensors.torch import save_file

    keep = {"residual_std", "scale"}  # two numbers that every pixel depends on stay in single precision
    weights = {
        name: (value if name in keep else value.half()).cpu().contiguous()
        for name, value in model.unet.state_dict().items()
    }
    header = {
        "format": str(FORMAT),
        "unet": json.dumps(model.unet.config.to_dict()),
        "process": json.dumps(model.process),
        "step": str(model.step),
    }
    try:
        write_atomically(Path(path), lambda temporary: save_file(weights, str(temporary), metadata=header))
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}") from error


def _read_safetensors(path: Path) -> dict[str, object]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"no model at {path}: give the path of a .safetensors file made by --export")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        if header.get("format") != str(FORMAT):
            raise CheckpointError(f"{path} {NOT_A_CHECKPOINT}: its header has no format {FORMAT}")
        return {
            "unet": json.loads(header["unet"]),
            "process": json.loads(header["process"]),
            "step": int(header["step"]),
            "ema": weights,
        }
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} {NOT_A_CHECKPOINT}, or is damaged: {error}") from error
