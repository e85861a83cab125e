"""Train a recipe for few steps, many times, each with a change, and measure it on held-out photos.

python -m bench.sweep --image_folder photos --val_folder others --out runs

What is finished in the output folder is not trained again.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import train_diffusion
from bench.networks import floating_point_operations, parameter_count, training_step
from engine.cli import module_parser
from evaluation.images import EvaluationConfig, ImageSet
from evaluation.measure import evaluate, model_method
from evaluation.report import table
from imaging.atomic import write_text_atomically
from models import load_model
from restoration import RestoreConfig

RECIPE = "recipes/x4.args"
IMAGES = 12  # of the held-out photos
STEPS = 300
CHANGES = (
    "",
    "--predictor_blocks 12",
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


def cost(flags: Sequence[str]) -> tuple[float, float]:
    """Count millions of parameters, and TFLOP of an optimiser step, of the recipe with these flags."""
    settings, _ = train_diffusion.parse([f"@{RECIPE}", *flags])
    network, crops = train_diffusion.make_model(settings, torch.device("cpu")), settings.training.batch_size
    step = training_step(network, crops, settings.data.img_size, torch.device("cpu"))
    return parameter_count(network) / 1e6, floating_point_operations(step) / 1e12


def measure(path: Path, photos: str) -> list[str]:
    """Measure "fidelity" and "detail" of a model on held-out photos: PSNR / LPIPS, x4, luma."""
    images, model = ImageSet(photos, EvaluationConfig(4, limit=IMAGES)), load_model(path)
    methods = [model_method([model], RestoreConfig(mode=mode), 4) for mode in ("fidelity", "detail")]
    return [f"{row['psnr']:.2f} / {row['lpips']:.4f}" for row in evaluate(images, methods).rows[1:]]


def run(change: str, steps: int, photos: str, others: str, out: Path) -> list[str]:
    """Train, unless the row of the table is there, and measure; RuntimeError where the training failed."""
    flags = change.split()
    folder = out / "_".join([*(flag.lstrip("-") for flag in flags), str(steps)])
    kept = folder / "row.json"
    if kept.exists():
        return list(json.loads(kept.read_text()))
    started = time.perf_counter()
    lengths = f"--max_steps {steps} --warmup_steps {max(1, steps // 10)} --validate_every {steps}".split()
    places = ["--checkpoint_dir", str(folder), "--log_dir", str(folder)]
    data = ["--image_folder", photos, "--val_folder", others]
    if status := train_diffusion.main([f"@{RECIPE}", *data, *lengths, *places, *flags]):
        raise RuntimeError(f"{change} ended with {status}")
    seconds = time.perf_counter() - started
    last = max(folder.glob("*/*_last.pth"), key=lambda path: path.stat().st_mtime)
    parameters, tflop = cost(flags)
    name = f"`{change}`" if change else "(the recipe)"
    row = [name, f"{parameters:.2f}", f"{steps * tflop:.1f}", f"{seconds:.0f}", *measure(last, others)]
    write_text_atomically(kept, json.dumps(row))
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = module_parser("bench.sweep", __doc__)
    parser.add_argument("--image_folder", required=True, help="photos to train on")
    parser.add_argument("--val_folder", required=True, help="photos to measure on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and their results")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the rows, from 0 (default: all)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    changes = [CHANGES[number] for number in args.only or range(len(CHANGES))]
    rows = [run(change, STEPS, args.image_folder, args.val_folder, args.out) for change in changes]
    print("\n".join(table(HEADINGS, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
