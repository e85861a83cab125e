"""Draws labelled panels side by side, to look at."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from imaging.pixels import Pixels, as_rgb8

_GAP, _LABEL = 8, 24  # pixels between panels, and above them


def comparison_picture(
    source: Pixels, bicubic: Pixels, restored: Pixels, truth: Pixels | None = None
) -> npt.NDArray[np.uint8]:
    """Draw the input (h, w[, 3]) and the others (H, W[, 3]) side by side."""
    height, width = restored.shape[:2]
    enlarged = Image.fromarray(as_rgb8(source)).resize((width, height), Image.Resampling.NEAREST)
    panels: dict[str, Pixels] = {"input": np.asarray(enlarged), "bicubic": bicubic, "restored": restored}
    if truth is not None:
        panels["original"] = truth
    return labelled_row(panels, height, width)


def labelled_row(panels: dict[str, Pixels], height: int, width: int) -> npt.NDArray[np.uint8]:
    """(height + 24, W', 3); each panel is cropped or padded with black."""
    picture = Image.new("RGB", (len(panels) * (width + _GAP) - _GAP, height + _LABEL), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=16)
    for index, (name, pixels) in enumerate(panels.items()):
        left = index * (width + _GAP)
        draw.text((left + 4, 2), name, fill="black", font=font)
        panel = Image.fromarray(as_rgb8(pixels)).crop((0, 0, width, height))
        picture.paste(panel, (left, _LABEL))
    return np.asarray(picture)
