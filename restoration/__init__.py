"""Restore images of any size and kind: `restore("photo.png").save("photo_x4.png")`."""

from pathlib import Path

from torch import Tensor

from engine.device import autocast_dtype, select_device
from models import LoadedModel
from restoration.pictures import Restorable
from restoration.restorer import PRESETS, Progress, Restoration, RestoreConfig, Restorer, no_progress
from restoration.scales import chain_to, restore_to
from restoration.weights import load_model, load_models

__all__ = ["PRESETS", "Restoration", "RestoreConfig", "Restorer", "load_model", "restore"]


def restore(
    image: Restorable,
    model: str | Path | LoadedModel | None = None,
    config: RestoreConfig | None = None,
    *,
    scale: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress = no_progress,
    tokens: Tensor | None = None,
) -> Restoration:
    """Restore one picture, see Restorer.restore.

    Args:
        model: what load_model gives, or "photo", "clean" or the path of a file; None chooses by the scale.
        scale: the enlargement, above 1 and at most 16; None is that of the model, or 4.
        device, precision: see engine.device.

    ValueError: the image, the file (CheckpointError), the device or the configuration is wrong.
    """
    chosen = select_device(device)
    models = [model] if isinstance(model, LoadedModel) else load_models(model, scale).values()
    dtype, how = autocast_dtype(chosen, precision), config or RestoreConfig()
    chain = chain_to(scale, [Restorer(one, how, chosen, dtype) for one in models])
    return restore_to(chain, image, progress=progress, tokens=tokens)
