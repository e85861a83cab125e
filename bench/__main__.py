"""Everything that bench/RESULTS.md holds, measured in one run of at most 15 minutes: `make bench`.

A part: python -m bench --only quality --networks "diffusers UNet2DModel" --seconds 1500 --out longer.md
Photos come from the folder that SR_DATA names; without it the rows that need photos say so.
"""

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from operator import methodcaller
from pathlib import Path

import torch
from torch import nn

from bench import networks
from bench.contenders import NAMES, OURS, RECIPE, contenders, enlargers, our_network
from bench.networks import parameter_count
from bench.timing import Timing, in_turns
from engine.cli import module_parser
from engine.device import autocast_dtype, select_device
from evaluation.images import EvaluationConfig, ImageSet
from evaluation.report import table
from imaging.atomic import check_outputs, write_text_atomically

RESULTS = Path("bench/RESULTS.md")
PACKAGES = ("torch", "diffusers", "denoising_diffusion_pytorch", "spandrel")


def machine(device: torch.device) -> list[str]:
    """Describe what the numbers depend on, a line each."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    capability, precision = torch.backends.cpu.get_cpu_capability(), autocast_dtype(device) or torch.float32
    return [
        f"- {os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads; {gpu}",
        f"- CPU capability {capability}; {precision}",
        f"- Python {platform.python_version()}, {', '.join(f'{one} {version(one)}' for one in PACKAGES)}",
        f"- commit {commit}; our network: `{RECIPE}`",
    ]


def times(
    unit: str, timings: Mapping[str, Timing], show: Callable[[Timing], str], models: Mapping[str, nn.Module]
) -> list[str]:
    """Tabulate timings, with sizes of networks, and how many times longer each takes than the first."""
    first = next(iter(timings.values())).median
    rows = [
        [name, f"{parameter_count(models[name]) / 1e6:.2f}", show(timing), f"{timing.median / first:.1f}"]
        for name, timing in timings.items()
    ]
    return [*table(["network", "M parameters", f"{unit} (range)", "time over ours"], rows), ""]


def speed_of_training(args: argparse.Namespace, device: torch.device) -> Iterator[str]:
    yield "## Training, x4: images per second\n"
    models = contenders(device)
    for size, batch in ((128, 4), (256, 1)) if device.type == "cpu" else ((128, 128), (256, 32)):
        works = {name: networks.training_step(one, batch, size, device) for name, one in models.items()}
        timings = in_turns(works, args.rounds, device)
        yield f"Crops of {size}², batch {batch}.\n"
        yield from times("images/s", timings, methodcaller("rate", batch), models)


def speed_of_restoring(args: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Time each network; on a CPU once, on a quarter of the picture: peers attend over all of its tokens."""
    cuda = device.type == "cuda"
    side = 1024 if cuda else 512
    models = {name: one.eval() for name, one in contenders(device).items()}
    works = {name: networks.denoising_step(one, side, device) for name, one in models.items()}
    timings = in_turns(works, args.rounds if cuda else 1, device, warm_up=int(cuda))
    yield f"## Restoring one {side}² image in 10 steps: seconds\n"
    yield "Ten times one denoising step; the condition is encoded before, once per image."
    if not cuda:
        yield "A quarter of a 1024² image: over all its tokens attention takes 16 times as long as here, and"
        yield "all else 4 times."
    yield ""
    yield from times("seconds", timings, methodcaller("seconds", 10), models)


def speed_of_enlarging(args: argparse.Namespace, device: torch.device) -> Iterator[str]:
    ours, low_res = our_network(device).eval(), torch.zeros(1, 3, 256, 256, device=device)
    modes = {f"{OURS}, fidelity": 0, f"{OURS}, detail": 1, f"{OURS}, detail in 6 steps": 6}
    others = enlargers(device)
    works = {name: networks.restoration(ours, 256, steps, device) for name, steps in modes.items()}
    works |= {name: networks.inference(one, low_res) for name, one in others.items()}
    timings = in_turns(works, args.rounds, device)
    yield "## Enlarging 256² to 1024²: seconds\n"
    yield "The others are untrained, of spandrel: what they restore is not compared here.\n"
    yield from times("seconds", timings, Timing.seconds, dict.fromkeys(modes, ours) | others)


def floor(_: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Measure how far an optimiser step is from the machine's matrix products."""
    batch, size, side = (16, 64, 2048) if device.type == "cpu" else (128, 128, 8192)
    ceiling = networks.matrix_product_rate(device, side)
    models = contenders(device)
    works = {name: networks.training_step(one, batch, size, device) for name, one in models.items()}
    operations = {name: networks.floating_point_operations(step) for name, step in works.items()}
    yield "## The floor by arithmetic\n"
    yield f"One optimiser step on {batch} crops of {size}²; a matrix product reaches"
    yield f"{ceiling / 1e9:.0f} GFLOP/s here.\n"
    rows = []
    for name, timing in in_turns(works, 3, device).items():
        achieved = operations[name] / timing.median
        per_crop = f"{operations[name] / batch / 1e9:.2f}"
        rows.append([name, per_crop, f"{achieved / 1e9:.0f}", f"{100 * achieved / ceiling:.0f} %"])
    yield from table(["network", "GFLOP per crop", "GFLOP/s", "of the matrix product"], rows)
    yield ""


def quality(args: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Compare the PSNR after equal training time."""
    if "SR_DATA" not in os.environ:
        yield "Quality was not measured: SR_DATA does not name a folder with test/Set5 and train.\n"
        return
    photos = Path(os.environ["SR_DATA"]).expanduser()
    images = ImageSet(photos / "test" / "Set5", EvaluationConfig(networks.SCALE, lpips=False))
    models = {name: one for name, one in contenders(device).items() if name in args.networks}
    yield f"## Set5 x4 after {args.seconds:.0f} seconds of training: dB on luma\n"
    yield "The mean of ours, one step of the others. The same loop, data and settings for all (AdamW,"
    yield f"batches of {networks.QUALITY_BATCH} crops of {networks.QUALITY_CROP}², learning rate"
    yield f"{networks.LEARNING_RATE:g}); bicubic reads 28.43.\n"
    qualities = networks.qualities(models, args.seconds, photos / "train", images, device)
    rows = [[name, str(steps), f"{psnr:.2f}"] for name, (steps, psnr) in qualities.items()]
    yield from table(["network", "steps", "PSNR"], rows)
    yield ""


SECTIONS: dict[str, Callable[[argparse.Namespace, torch.device], Iterator[str]]] = {
    "training": speed_of_training,
    "restoring": speed_of_restoring,
    "enlarging": speed_of_enlarging,
    "floor": floor,
    "quality": quality,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = module_parser("bench", __doc__)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    add("--rounds", type=int, default=2, help="rounds of training and restoring (default: 2)")
    add("--seconds", type=float, default=60, help="training time of each network (default: 60)")
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="parts (default: all)")
    add("--networks", nargs="+", choices=NAMES, default=NAMES, help="networks of quality")
    add("--out", type=Path, default=RESULTS, help=f"file to write (default: {RESULTS})")
    args = parser.parse_args(argv)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not installed: pip install -e '.[bench]'")
    check_outputs([args.out], overwrite=True)
    started, device = time.perf_counter(), select_device(args.device)
    lines = ["# Measured side by side", "", *machine(device), ""]
    print("\n".join(lines), flush=True)
    for name in args.only:
        for line in SECTIONS[name](args, device):
            print(line, flush=True)
            lines.append(line)
        took = f"This took {(time.perf_counter() - started) / 60:.1f} minutes.\n"
        write_text_atomically(args.out, "\n".join([*lines, took]))  # so far: nothing is lost
    return 0


if __name__ == "__main__":
    sys.exit(main())
