"""Labelled pictures to look at, and the hidden colours of transparent ones."""

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from imaging.files import Pixels, as_rgb8

_GAP, _LABEL = 8, 24  # pixels between panels, and above them


def comparison_picture(
    source: Pixels, bicubic: Pixels, restored: Pixels, truth: Pixels | None = None
) -> npt.NDArray[np.uint8]:
    """Input (h, w[, 3]) and the others (H, W[, 3]), side by side."""
    height, width = restored.shape[:2]
    rows = np.arange(height) * len(source) // height
    columns = np.arange(width) * source.shape[1] // width
    panels = {"input": source[rows][:, columns], "bicubic": bicubic, "restored": restored}
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


def spread_colours(pixels: Pixels, alpha: Pixels) -> Pixels:
    """Give every pixel (H, W[, C]) with alpha 0 the colour of the nearest other one."""
    # What lies hidden there would bleed into the edges of what is seen when the picture is resized.
    hidden = alpha == 0
    if hidden.all() or not hidden.any():
        return pixels
    _, labels = cv2.distanceTransformWithLabels(
        hidden.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    positions = np.zeros(labels.max() + 1, np.int64)  # of the visible pixel with each label
    positions[labels[~hidden]] = np.flatnonzero(~hidden)
    flat = pixels.reshape(alpha.size, -1)
    return flat[positions[labels]].reshape(pixels.shape)
