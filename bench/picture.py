"""The pictures of the pages, from the released weights: python -m bench.picture

NASA's portrait of Eileen Collins (public domain) and Stefan van der Walt's Chelsea (CC0), from scikit-image.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from skimage.data import astronaut, chelsea

from bicubic import upscale_image
from degradation import Degradation
from imaging.files import write_image
from imaging.panels import labelled_row
from imaging.pixels import Pixels
from restoration import RestoreConfig, restore

SCALE = 4
SIDE = 192
FACES = {"astronaut": (16, 144), "photo": (64, 112)}  # top and left of what is shown
SEED = 0


def write_row(name: str, photo: Pixels, low_res: Pixels, restored: dict[str, Pixels]) -> None:
    """docs/<name>.png: crops of input, bicubic, restored and original, side by side."""
    top, left = FACES[name]
    images = {
        "input": np.repeat(np.repeat(low_res, SCALE, axis=0), SCALE, axis=1),
        "bicubic": np.asarray(upscale_image(low_res, SCALE)),
        **restored,
        "original": photo,
    }
    crop = np.s_[top : top + SIDE, left : left + SIDE]
    panels: dict[str, Pixels] = {label: image[crop].astype(np.uint8) for label, image in images.items()}
    write_image(Path(f"docs/{name}.png"), labelled_row(panels, SIDE, SIDE))


def shrink(photo: Pixels, degradation: Degradation) -> Pixels:
    """(H, W, 3) to (h, w, 3), uint8."""
    planes = torch.from_numpy(photo.transpose(2, 0, 1).copy())
    return degradation(planes, np.random.default_rng(SEED)).permute(1, 2, 0).numpy()


def main() -> int:
    """docs/astronaut.png, of a bicubic input, and docs/photo.png, of a degraded one."""
    fidelity, detail = RestoreConfig(mode="fidelity"), RestoreConfig(mode="detail")
    photo = astronaut()
    low_res = shrink(photo, Degradation(scale=SCALE))
    modes = {"fidelity": fidelity, "detail": detail}
    restored = {name: restore(low_res, "clean", config).pixels for name, config in modes.items()}
    write_row("astronaut", photo, low_res, restored)
    photo = chelsea()[:300, :448]  # whole multiples of the scale
    low_res = shrink(photo, Degradation("photo", SCALE, clean_share=0.0))
    restored = {
        "clean weights": restore(low_res, "clean", fidelity).pixels,
        "photo: fidelity": restore(low_res, "photo", fidelity).pixels,
        "photo: detail": restore(low_res, "photo", detail).pixels,
    }
    write_row("photo", photo, low_res, restored)
    return 0


if __name__ == "__main__":
    sys.exit(main())
