"""The whole way in two minutes: restore a photo, train a small model, restore with it and measure it.

Prints every command that it runs; they work on photos of your own just as well. Writes to demo_output.
"""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from skimage.data import astronaut

import evaluate
import infer
import train_diffusion
from bicubic import downscale_image
from engine.cli import module_parser
from examples.dead_leaves import draw_dead_leaves_folder
from imaging.files import read_rgb, write_image

OUTPUT = Path("demo_output")
RECIPE = Path("recipes/demo.args")
TRAINING_IMAGES, HELD_OUT_IMAGES = 60, 4
IMAGE_SIZE, SCALE = 192, 4
MIN_RADIUS = 5.0  # pixels: leaves that a quarter of the size still shows


def run(script: str, main: Callable[[Sequence[str]], int], *flags: str | int | Path) -> None:
    """Print a command, run it in this process, and stop the demo if it fails."""
    arguments = [str(flag) for flag in flags]
    print(f"\n$ python {script} {shlex.join(arguments)}\n", flush=True)
    status = main(arguments)
    if status != 0:
        sys.exit(status)


def restore_photo() -> None:
    """Shrink a photo that scikit-image carries, and restore it in both modes, beside the original."""
    original, small = OUTPUT / "original.png", OUTPUT / "astronaut.png"
    write_image(original, astronaut())
    write_image(small, downscale_image(astronaut(), SCALE))
    for mode in ("fidelity", "detail"):
        results = ("--output", OUTPUT / mode, "--compare", original, "--overwrite")
        run("infer.py", infer.main, small, "--weights", "clean", "--mode", mode, *results)


def train_and_measure() -> None:
    """Train on drawn images, restore held-out ones from a quarter of their size, and print the table."""
    draw_dead_leaves_folder(OUTPUT / "train", TRAINING_IMAGES, IMAGE_SIZE, 0, min_radius=MIN_RADIUS)
    held_out, low_res = OUTPUT / "held_out", OUTPUT / "low_res"
    low_res.mkdir(exist_ok=True)
    for path in draw_dead_leaves_folder(held_out, HELD_OUT_IMAGES, IMAGE_SIZE, 1, min_radius=MIN_RADIUS):
        write_image(low_res / path.name, downscale_image(read_rgb(path), SCALE))
    places = ("--log_dir", OUTPUT / "logs", "--checkpoint_dir", OUTPUT / "checkpoints")
    run("train_diffusion.py", train_diffusion.main, f"@{RECIPE}", "--image_folder", OUTPUT / "train", *places)
    best = max((OUTPUT / "checkpoints").glob("*/*_best.pth"), key=lambda path: path.stat().st_mtime)
    results = ("--output", OUTPUT / "restored", "--compare", held_out, "--overwrite")
    run("infer.py", infer.main, low_res, "--weights", best, *results)
    data = ("--data", held_out, "--scale", SCALE, "--no_lpips")
    run("evaluate.py", evaluate.main, *data, "--weights", best, "--mode", "fidelity", "detail")


def main(argv: Sequence[str] | None = None) -> int:
    module_parser("examples.demo", __doc__).parse_args(argv)
    started = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    restore_photo()
    print("\nNow a small model is trained on drawn images, for a minute or so.", flush=True)
    train_and_measure()
    print(f"\n{time.perf_counter() - started:.0f} seconds. Look at the pictures named ..._compare.png in")
    print(f"  {OUTPUT / 'fidelity'} and {OUTPUT / 'detail'}  the released weights on a photo")
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
