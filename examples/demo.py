"""The whole way in a few minutes: draw images, train on them, restore held-out ones, look at the result.

Prints every command it runs; they work on your own folder of photos just as well. Writes to demo_output.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import evaluate
import infer
import train_diffusion
from bicubic import downscale_image
from examples.dead_leaves import draw_dead_leaves_folder
from imaging.files import read_rgb, write_image

OUTPUT = Path("demo_output")
RECIPE = Path("recipes/demo.args")
TRAINING_IMAGES, HELD_OUT_IMAGES = 60, 4
IMAGE_SIZE, SCALE = 192, 4
MIN_RADIUS = 5.0  # leaves that a quarter of the size still shows


def draw_images() -> None:
    """For training, held out, and the held-out ones at a quarter of the size."""
    draw_dead_leaves_folder(OUTPUT / "train", TRAINING_IMAGES, IMAGE_SIZE, 0, min_radius=MIN_RADIUS)
    held_out = OUTPUT / "held_out"
    (OUTPUT / "low_res").mkdir(exist_ok=True)
    for path in draw_dead_leaves_folder(held_out, HELD_OUT_IMAGES, IMAGE_SIZE, 1, min_radius=MIN_RADIUS):
        write_image(OUTPUT / "low_res" / path.name, downscale_image(read_rgb(path), SCALE))


def run(script: str, main: Callable[[Sequence[str]], int], *flags: str | int | Path) -> None:
    """Print a command, run it in this process, and stop the demo if it fails."""
    arguments = [str(flag) for flag in flags]
    print(f"\n$ python {script} {shlex.join(arguments)}\n", flush=True)
    status = main(arguments)
    if status != 0:
        sys.exit(status)


def best_checkpoint() -> Path:
    """Of the newest run."""
    return max((OUTPUT / "checkpoints").glob("*/*_best.pth"), key=lambda path: path.stat().st_mtime)


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__).parse_args(argv)
    started = time.perf_counter()
    print(f"drawing {TRAINING_IMAGES + HELD_OUT_IMAGES} dead-leaves images of {IMAGE_SIZE}x{IMAGE_SIZE}")
    draw_images()
    places = ("--log_dir", OUTPUT / "logs", "--checkpoint_dir", OUTPUT / "checkpoints")
    training = ("--image_folder", OUTPUT / "train", *places)
    run("train_diffusion.py", train_diffusion.main, f"@{RECIPE}", *training)
    model = ("--weights_path", best_checkpoint())
    results = (OUTPUT / "restored", "--mode", "fidelity", "--compare", OUTPUT / "held_out", "--overwrite")
    run("infer.py", infer.main, *model, "--input", OUTPUT / "low_res", "--output", *results)
    data = ("--data", OUTPUT / "held_out", "--scale", SCALE, "--steps", 1, 10, "--no_lpips")
    run("evaluate.py", evaluate.main, *model, *data)
    print("\nThe same with the weights that come with the project, which have learnt from photos:")
    released = (OUTPUT / "restored_released", "--mode", "fidelity", "--overwrite")
    run("infer.py", infer.main, "--weights", "clean", "--input", OUTPUT / "low_res", "--output", *released)
    run("evaluate.py", evaluate.main, "--weights", "clean", *data)
    print(f"\nside by side: {OUTPUT / 'restored'}")
    print(f"{time.perf_counter() - started:.0f} seconds. Watch the training:")
    print(f"  .venv/bin/tensorboard --logdir {OUTPUT / 'logs'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
