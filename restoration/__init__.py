"""Restore images of any size and kind: `restore("photo.png").save("photo_x4.png")`."""

from models import LoadedModel, load_model
from restoration.rescaled import restore
from restoration.restorer import PRESETS, Restoration, RestoreConfig, Restorer, blend

__all__ = [
    "PRESETS",
    "LoadedModel",
    "Restoration",
    "RestoreConfig",
    "Restorer",
    "blend",
    "load_model",
    "restore",
]
