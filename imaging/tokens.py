"""Tokens of any encoder, in files named after the images they describe."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".safetensors", ".npy")


def read_tokens(folder: str | Path, image: Path) -> Tensor:
    """(N, E) float32 of an image; ValueError where there are none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    paths = [Path(folder, image.stem + suffix) for suffix in SUFFIXES]
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
