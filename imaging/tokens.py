"""Tokens of any encoder, in files named after the images they describe."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def check_tokens(folder: str | Path, images: Sequence[Path]) -> None:
    """Read the tokens of all images; ValueError unless each image has its own, all of one shape."""
    if len({image.stem for image in images}) < len(images):
        raise ValueError(f"{folder}: tokens belong to images by name, and two images have the same name")
    shapes = {tuple(read_tokens(folder, image).shape): image.name for image in images}
    if len(shapes) > 1:
        named = ", ".join(f"{shape} for {name}" for shape, name in shapes.items())
        raise ValueError(f"{folder} holds {named}: give all images tokens of one shape")


def read_tokens(folder: str | Path, image: Path) -> Tensor:
    """Read the tokens (N, E) of an image, float32; ValueError where there are none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    paths = [Path(folder, image.stem + suffix) for suffix in (".safetensors", ".npy")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no tokens of {image}: neither {paths[0].name} nor {paths[1].name}")
    try:
        if path.suffix == ".npy":
            tokens = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        else:
            (tokens,) = load_file(path).values()
    except (SafetensorError, ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path} does not hold one array of numbers: {error}") from error
    if tokens.ndim != 2 or not tokens.numel() or not torch.isfinite(tokens).all():
        raise ValueError(f"{path} holds {tuple(tokens.shape)}: expected finite tokens (N, E)")
    return tokens.float()
