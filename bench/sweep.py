"""Many short trainings of one recipe, each with a change, measured on held-out photos.

python -m bench.sweep ablation --image_folder photos --val_folder others --out runs
python -m bench.sweep scaling --image_folder photos --val_folder others --out runs

`ablation` is 300 steps per row; `scaling` trains three sizes of the network with three budgets of operations
each and plots docs/scaling.png. What is finished in the output folder is not trained again.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import train_diffusion
from bench.tables import table
from evaluation.images import EvaluationConfig, ImageSet
from evaluation.measure import evaluate, model_method
from imaging.atomic import write_text_atomically
from models import load_model
from restoration import RestoreConfig
from unet import UNet, parameter_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPE = "recipes/x4.args"
IMAGES = 12  # of the held-out photos
SIZES = {f"width {width}": (width, blocks) for width, blocks in ((32, 6), (48, 9), (64, 12))}
BUDGETS = (3, 9, 27)  # TFLOP
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


@lru_cache
def counted(*flags: str) -> tuple[int, float]:
    """Parameters, and TFLOP per step, of the recipe with these flags."""
    settings, _ = train_diffusion.parse([f"@{RECIPE}", *flags])
    with torch.device("meta"):
        model = UNet.from_config(settings.network)
    image, t, condition = train_diffusion.blank_crop(settings, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        context, mean = model.encode_context(condition)
        (model(image, t, context) + (0 if mean is None else mean)).sum().backward()
    return parameter_count(model), settings.training.batch_size * counter.get_total_flops() / 1e12


class Trial(NamedTuple):
    """A row: its name, what it changes, how long it trains."""

    name: str
    flags: list[str]
    steps: int

    @property
    def tflop(self) -> float:
        """Operations of the training."""
        return self.steps * counted(*self.flags)[1]


class Result(NamedTuple):
    """Of the averaged weights on held-out photos: x4, luma, LPIPS of AlexNet."""

    parameters: int
    tflop: float
    seconds: float  # of the training
    psnr: float  # of the mean
    lpips: float
    detail_psnr: float
    detail_lpips: float


def scaling_trials() -> list[Trial]:
    """Each size with each budget."""
    trials = []
    for name, (width, blocks) in SIZES.items():
        flags = ["--unet_base_dim", str(width), "--predictor_blocks", str(blocks)]
        trials += [Trial(name, flags, round(budget / counted(*flags)[1])) for budget in BUDGETS]
    return trials


def run(trial: Trial, photos: str, others: str, out: Path) -> Result:
    """Train, unless the result is there, and measure; RuntimeError where the training failed."""
    folder = out / "_".join([*(flag.lstrip("-") for flag in trial.flags), str(trial.steps)])
    kept = folder / "result.json"
    if kept.exists():
        return Result(**json.loads(kept.read_text()))
    steps, warmup = str(trial.steps), str(max(1, trial.steps // 10))
    started = time.perf_counter()
    status = train_diffusion.main(
        [
            *(f"@{RECIPE}", "--image_folder", photos, "--val_folder", others),
            *("--max_steps", steps, "--warmup_steps", warmup, "--validate_every", steps),
            *("--checkpoint_dir", str(folder), "--log_dir", str(folder), *trial.flags),
        ]
    )
    seconds = time.perf_counter() - started
    if status:
        raise RuntimeError(f"{trial} ended with {status}")
    model = load_model(max(folder.glob("*/*_last.pth"), key=lambda path: path.stat().st_mtime))
    config = EvaluationConfig(4)
    methods = [model_method([model], RestoreConfig(mode=mode), 4) for mode in ("fidelity", "detail")]
    report = evaluate(ImageSet(others, config, limit=IMAGES), config, methods)
    mean, detail = ([row["psnr"], row["lpips"]] for row in report.rows[1:])
    parameters, _ = counted(*trial.flags)
    result = Result(parameters, trial.tflop, seconds, *mean, *detail)
    write_text_atomically(kept, json.dumps(result._asdict()))
    return result


def plot(results: dict[str, list[Result]]) -> "Figure":
    """PSNR of the mean and LPIPS of detail over operations, a line per size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, label, name in zip(
        figure.subplots(1, 2),
        ("PSNR of fidelity in dB", "LPIPS of detail"),
        ("psnr", "detail_lpips"),
        strict=True,
    ):
        for size, line in results.items():
            millions = line[0].parameters / 1e6
            points = [(one.tflop, getattr(one, name)) for one in line]
            axes.plot(*zip(*points, strict=True), "o-", label=f"{size}, {millions:.1f} M parameters")
        axes.set(xscale="log", xlabel="TFLOP of training", ylabel=label)
        axes.set_xticks(BUDGETS, labels=[str(budget) for budget in BUDGETS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", choices=("ablation", "scaling"))
    for name in ("image_folder", "val_folder"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", type=int, nargs="+", help="rows of this sweep, from 0; by default all")
    args = parser.parse_args(argv)
    trials = scaling_trials()
    if args.sweep == "ablation":
        trials = [
            Trial(f"`{change}`" if change else "(the recipe)", change.split(), STEPS) for change in CHANGES
        ]
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    lines: dict[str, list[Result]] = {}
    for number, trial in enumerate(trials):
        if args.only is not None and number not in args.only:
            continue
        one = run(trial, args.image_folder, args.val_folder, args.out)
        lines.setdefault(trial.name, []).append(one)
        numbers = f"{one.parameters / 1e6:.2f}", f"{trial.steps}", f"{one.tflop:.1f}", f"{one.seconds:.0f}"
        quality = f"{one.psnr:.2f} / {one.lpips:.4f}", f"{one.detail_psnr:.2f} / {one.detail_lpips:.4f}"
        rows.append([trial.name, *numbers, *quality])
    headings = ["change", "M parameters", "steps", "TFLOP", "seconds", "fidelity", "detail"]
    print("\n".join(table(headings, rows)), end="")
    if args.sweep == "scaling":
        plot(lines).savefig("docs/scaling.png", dpi=100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
