"""The pictures of the pages, from the released weights: python -m bench.picture

The photo is NASA's portrait of Eileen Collins, in the public domain, as scikit-image ships it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from skimage.data import astronaut

from bicubic import upscale_image
from degradation import Bicubic, Photo
from imaging.files import Pixels, write_image
from imaging.pictures import labelled_row
from restoration import RestoreConfig, restore

SCALE = 4
TOP, LEFT, SIDE = 16, 144, 192
SEED = 0


def row(photo: Pixels, low_res: Pixels, restored: dict[str, Pixels]) -> Pixels:
    """The crop of the input, its bicubic, what was restored and the original, side by side."""
    images = {
        "input": np.repeat(np.repeat(low_res, SCALE, axis=0), SCALE, axis=1),
        "bicubic": np.asarray(upscale_image(low_res, SCALE)),
        **restored,
        "original": photo,
    }
    crop = np.s_[TOP : TOP + SIDE, LEFT : LEFT + SIDE]
    return labelled_row({name: image[crop].astype(np.uint8) for name, image in images.items()}, SIDE, SIDE)


def main() -> int:
    """Write docs/astronaut.png, of a bicubic input, and docs/photo.png, of a degraded one."""
    photo = astronaut()
    planes = torch.from_numpy(photo).permute(2, 0, 1)  # (3, H, W)
    fidelity, detail = RestoreConfig(mode="fidelity"), RestoreConfig(mode="detail")
    clean = Bicubic(scale=SCALE)(planes).permute(1, 2, 0).numpy()
    modes = {"fidelity": fidelity, "detail": detail}
    restored = {name: restore(clean, "clean", config).pixels for name, config in modes.items()}
    write_image(Path("docs/astronaut.png"), row(photo, clean, restored))
    random = np.random.default_rng(SEED)
    degraded = Photo(scale=SCALE, clean_share=0.0)(planes, random).permute(1, 2, 0).numpy()
    restored = {
        "clean weights": restore(degraded, "clean", fidelity).pixels,
        "photo: fidelity": restore(degraded, "photo", fidelity).pixels,
        "photo: detail": restore(degraded, "photo", detail).pixels,
    }
    write_image(Path("docs/photo.png"), row(photo, degraded, restored))
    return 0


if __name__ == "__main__":
    sys.exit(main())
