"""The whole way in two minutes: restore a photo, train a small model, restore with it and measure it.

Prints every command that it runs; they work on photos of your own just as well. Writes to demo_output.
"""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from skimage.data import astronaut

import evaluate
import infer
import train_diffusion
from bicubic import downscale_image, upscale_image
from engine.cli import module_parser
from examples.dead_leaves import draw_dead_leaves_folder
from imaging.files import read_rgb, write_image
from imaging.panels import labelled_row
from imaging.pixels import Pixels

OUTPUT = Path("demo_output")
RECIPE = Path("recipes/demo.args")
TRAINING_IMAGES, HELD_OUT_IMAGES = 60, 4
IMAGE_SIZE, SCALE = 192, 4
MIN_RADIUS = 5.0  # pixels: leaves that a quarter of the size still shows
MODES = ("fidelity", "detail")
FACE, SIDE = np.s_[16:208, 144:336], 192  # the part of the photo that is compared


def run(script: str, main: Callable[[Sequence[str]], int], *flags: str | int | Path) -> None:
    """Print a command, run it in this process, and stop the demo if it fails."""
    arguments = [str(flag) for flag in flags]
    print(f"\n$ python {script} {shlex.join(arguments)}\n", flush=True)
    status = main(arguments)
    if status != 0:
        sys.exit(status)


def restore_photo() -> Path:
    """Shrink a photo that scikit-image carries, restore it in both modes, and compare them in one picture."""
    photo, small = astronaut(), OUTPUT / "astronaut.png"
    low_res = downscale_image(photo, SCALE)
    write_image(small, low_res)
    images: dict[str, Pixels] = {
        "input": low_res.repeat(SCALE, axis=0).repeat(SCALE, axis=1),
        "bicubic": np.asarray(upscale_image(low_res, SCALE)),
    }
    for mode in MODES:
        folder = OUTPUT / mode
        flags = ("--weights", "clean", "--mode", mode, "--output", folder, "--overwrite")
        run("infer.py", infer.main, small, *flags)
        images[mode] = read_rgb(folder / f"astronaut_x{SCALE}.png")
    images["original"] = photo
    compared = OUTPUT / "astronaut_compared.png"
    write_image(compared, labelled_row({name: image[FACE] for name, image in images.items()}, SIDE, SIDE))
    return compared


def draw_images() -> None:
    """Draw images for training, held-out ones, and the held-out ones at a quarter of the size."""
    draw_dead_leaves_folder(OUTPUT / "train", TRAINING_IMAGES, IMAGE_SIZE, 0, min_radius=MIN_RADIUS)
    held_out = OUTPUT / "held_out"
    (OUTPUT / "low_res").mkdir(exist_ok=True)
    for path in draw_dead_leaves_folder(held_out, HELD_OUT_IMAGES, IMAGE_SIZE, 1, min_radius=MIN_RADIUS):
        write_image(OUTPUT / "low_res" / path.name, downscale_image(read_rgb(path), SCALE))


def train_and_measure() -> None:
    """Train on drawn images, then restore the held-out ones and print the table."""
    draw_images()
    places = ("--log_dir", OUTPUT / "logs", "--checkpoint_dir", OUTPUT / "checkpoints")
    run("train_diffusion.py", train_diffusion.main, f"@{RECIPE}", "--image_folder", OUTPUT / "train", *places)
    best = max((OUTPUT / "checkpoints").glob("*/*_best.pth"), key=lambda path: path.stat().st_mtime)
    results = ("--output", OUTPUT / "restored", "--compare", OUTPUT / "held_out", "--overwrite")
    run("infer.py", infer.main, OUTPUT / "low_res", "--weights", best, *results)
    data = ("--data", OUTPUT / "held_out", "--scale", SCALE, "--no_lpips")
    run("evaluate.py", evaluate.main, *data, "--weights", best, "--mode", *MODES)


def main(argv: Sequence[str] | None = None) -> int:
    module_parser("examples.demo", __doc__).parse_args(argv)
    started = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    compared = restore_photo()
    print(
        f"\nLook at {compared}. Now a small model is trained on drawn images, for a minute or so.", flush=True
    )
    train_and_measure()
    print(f"\n{time.perf_counter() - started:.0f} seconds. The results are side by side in")
    print(f"  {compared}  the released weights on a photo")
    print(f"  {OUTPUT / 'restored'}  the model that was just trained on drawn images")
    print("Go on with a photo and a folder of your own, and watch what was learnt:")
    if sys.prefix != sys.base_prefix:
        print(f"  . {Path(sys.prefix).name}/bin/activate")
    print("  python infer.py photo.png --mode detail")
    print("  python train_diffusion.py @recipes/x4.args --image_folder photos")
    print(f"  tensorboard --logdir {OUTPUT / 'logs'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
