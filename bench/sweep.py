"""Train a recipe for few steps, many times, each with a change, and measure it on held-out photos.

python -m bench.sweep --image_folder photos --val_folder others --out runs

What is finished in the output folder is not trained again.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import train_diffusion
from bench.networks import floating_point_operations, parameter_count, training_step
from bench.tables import table
from evaluation.images import EvaluationConfig, ImageSet
from evaluation.measure import evaluate, model_method
from imaging.atomic import write_text_atomically
from models import load_model
from restoration import RestoreConfig

RECIPE = "recipes/x4.args"
IMAGES = 12  # of the held-out photos
STEPS = 300
CHANGES = (
    "",
    "--predictor_blocks 6",
    "--predictor_blocks 20",
    "--predictor_dim 96",
    "--blocks_per_level 2",
    "--patch_size 2 --unet_base_dim 32 --unet_dim_mults 1 2 4 --predictor_dim 64",
    "--diffusion_mode v_prediction",
    "--optimizer adamw",
    "--optimizer adamw --learning_rate 3e-3",
    "--img_size 64 --batch_size 18",
    "--img_size 192 --batch_size 2",
)
HEADINGS = ("change", "M parameters", "TFLOP", "seconds", "fidelity", "detail")


class Result(NamedTuple):
    """The averaged weights on held-out photos: x4, luma, LPIPS of AlexNet."""

    parameters: int
    tflop: float  # of the training
    seconds: float  # of the training
    psnr: float  # of the mean
    lpips: float
    detail_psnr: float
    detail_lpips: float


def cost(flags: Sequence[str]) -> tuple[int, float]:
    """Parameters, and TFLOP of an optimiser step, of the recipe with these flags."""
    settings, _ = train_diffusion.parse([f"@{RECIPE}", *flags])
    network, crops = train_diffusion.make_model(settings, torch.device("cpu")), settings.training.batch_size
    step = training_step(network, crops, settings.data.img_size, torch.device("cpu"))
    return parameter_count(network), floating_point_operations(step) / 1e12


def run(flags: Sequence[str], steps: int, photos: str, others: str, out: Path) -> Result:
    """Train, unless the result is there, and measure; RuntimeError where the training failed."""
    folder = out / "_".join([*(flag.lstrip("-") for flag in flags), str(steps)])
    kept = folder / "result.json"
    if kept.exists():
        return Result(**json.loads(kept.read_text()))
    started = time.perf_counter()
    status = train_diffusion.main(
        [
            *(f"@{RECIPE}", "--image_folder", photos, "--val_folder", others),
            *("--max_steps", str(steps), "--warmup_steps", str(max(1, steps // 10))),
            *(
                "--validate_every",
                str(steps),
                "--checkpoint_dir",
                str(folder),
                "--log_dir",
                str(folder),
                *flags,
            ),
        ]
    )
    seconds = time.perf_counter() - started
    if status:
        raise RuntimeError(f"{' '.join(flags)} ended with {status}")
    model = load_model(max(folder.glob("*/*_last.pth"), key=lambda path: path.stat().st_mtime))
    config = EvaluationConfig(4)
    methods = [model_method([model], RestoreConfig(mode=mode), 4) for mode in ("fidelity", "detail")]
    report = evaluate(ImageSet(others, config, limit=IMAGES), config, methods)
    mean, detail = ([row["psnr"], row["lpips"]] for row in report.rows[1:])
    parameters, tflop = cost(flags)
    result = Result(parameters, steps * tflop, seconds, *mean, *detail)
    write_text_atomically(kept, json.dumps(result._asdict()))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image_folder", required=True, help="photos to train on")
    parser.add_argument("--val_folder", required=True, help="photos to measure on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and their results")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the rows, from 0 (default: all)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    for number in args.only or range(len(CHANGES)):
        change = CHANGES[number]
        one = run(change.split(), STEPS, args.image_folder, args.val_folder, args.out)
        numbers = f"{one.parameters / 1e6:.2f}", f"{one.tflop:.1f}", f"{one.seconds:.0f}"
        quality = f"{one.psnr:.2f} / {one.lpips:.4f}", f"{one.detail_psnr:.2f} / {one.detail_lpips:.4f}"
        rows.append([f"`{change}`" if change else "(the recipe)", *numbers, *quality])
    print("\n".join(table(HEADINGS, rows)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
