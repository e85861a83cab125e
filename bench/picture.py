"""The README's picture, from the released weights: python -m bench.picture

The photo is NASA's portrait of Eileen Collins, in the public domain, as scikit-image ships it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from skimage.data import astronaut

from bicubic import downscale_image, upscale_image
from imaging.files import write_image
from imaging.pictures import labelled_row
from restoration import RestoreConfig, restore

SCALE = 4
TOP, LEFT, SIDE = 16, 144, 192


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/astronaut.png"))
    args = parser.parse_args(argv)
    photo = astronaut()
    low_res = downscale_image(photo, SCALE)
    images = {
        "input": np.repeat(np.repeat(low_res, SCALE, axis=0), SCALE, axis=1),
        "bicubic": upscale_image(low_res, SCALE),
        "1 step": restore(low_res, config=RestoreConfig(mode="fidelity")).pixels,
        "10 steps": restore(low_res, config=RestoreConfig(mode="detail")).pixels,
        "original": photo,
    }
    panels = {
        name: image[TOP : TOP + SIDE, LEFT : LEFT + SIDE].astype(np.uint8) for name, image in images.items()
    }
    write_image(args.out, labelled_row(panels, SIDE, SIDE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
