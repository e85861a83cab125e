"""Draw docs/astronaut.png and docs/photo.png, the pictures of the pages, with the released weights.

NASA's portrait of Eileen Collins (public domain) and Stefan van der Walt's Chelsea (CC0), from scikit-image.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from skimage.data import astronaut, chelsea

from bicubic import upscale_image
from degradation import Degradation
from engine.cli import module_parser
from imaging.files import write_image
from imaging.panels import labelled_row
from imaging.pixels import Pixels
from restoration import RestoreConfig, restore

SCALE = 4
SIDE = 192
SEED = 0
FIDELITY, DETAIL = RestoreConfig(mode="fidelity"), RestoreConfig(mode="detail")
Modes = dict[str, tuple[str, RestoreConfig]]  # weights and options by label
MODES: Modes = {"fidelity": ("clean", FIDELITY), "detail": ("clean", DETAIL)}
PHOTO_MODES: Modes = {
    "clean weights": ("clean", FIDELITY),
    "photo: fidelity": ("photo", FIDELITY),
    "photo: detail": ("photo", DETAIL),
}


def panels(photo: Pixels, degradation: Degradation, modes: Modes, top: int, left: int) -> Pixels:
    """Degrade and restore (H, W, 3) uint8; crops of input, bicubic, results and original side by side."""
    planes = torch.from_numpy(photo.transpose(2, 0, 1).copy())
    low_res = degradation(planes, np.random.default_rng(SEED)).permute(1, 2, 0).numpy()
    images = {
        "input": np.repeat(np.repeat(low_res, SCALE, axis=0), SCALE, axis=1),
        "bicubic": upscale_image(low_res, SCALE),
    }
    images |= {label: restore(low_res, *how).pixels for label, how in modes.items()}
    images["original"] = photo
    crop = np.s_[top : top + SIDE, left : left + SIDE]
    return labelled_row({label: image[crop].astype(np.uint8) for label, image in images.items()}, SIDE, SIDE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = module_parser("bench.picture", __doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to (default: docs)")
    out = parser.parse_args(argv).out
    clean, photo = Degradation(scale=SCALE), Degradation("photo", SCALE, clean_share=0.0)
    write_image(out / "astronaut.png", panels(astronaut(), clean, MODES, top=16, left=144))
    cat = chelsea()[:300, :448]  # whole multiples of the scale
    write_image(out / "photo.png", panels(cat, photo, PHOTO_MODES, top=64, left=112))
    return 0


if __name__ == "__main__":
    sys.exit(main())
