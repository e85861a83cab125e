"""Restore images of any size and kind: what the scripts, the validation and Python users call.

from restoration import restore
restore("photo.png").save("photo_x4.png")
"""

from restoration.restorer import PRESETS, Restoration, RestoreConfig, Restorer, blend, restore

__all__ = ["PRESETS", "Restoration", "RestoreConfig", "Restorer", "blend", "restore"]
