"""Everything that bench/RESULTS.md holds, measured in one run: `make bench`.

A part: python -m bench --only quality --networks "diffusers UNet2DModel" --seconds 1500 --out longer.md
Photos come from the folder that SR_DATA names; without it the rows that need photos say so.
"""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from bench import data, networks
from bench.contenders import NAMES, OURS, RECIPE, contenders, our_network
from bench.restorers import RESTORERS
from bench.tables import table
from bench.timing import Timing, in_turns
from engine.device import autocast_dtype, select_device
from evaluation.images import EvaluationConfig, ImageSet
from imaging.atomic import write_text_atomically
from unet import parameter_count

RESULTS = Path("bench/RESULTS.md")
SECTIONS = ("training", "restoring", "enlarging", "floor", "reading", "quality")
PACKAGES = ("torch", "diffusers", "denoising-diffusion-pytorch", "Pillow", "opencv-python-headless", "numpy")


def machine(device: torch.device) -> list[str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    cpu = f"{torch.get_num_threads()} CPU cores ({kind})"
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ", no GPU"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return [
        f"- {cpu}{gpu}; Python {platform.python_version()}",
        f"- {versions}",
        f"- commit {commit.stdout.strip()}; {autocast_dtype(device) or torch.float32}",
    ]


def ratios(timings: Mapping[str, Timing], ours: str = OURS) -> dict[str, str]:
    """How many times longer each takes than ours, by the medians."""
    return {name: f"{timing.median / timings[ours].median:.1f}" for name, timing in timings.items()}


def speed_of_training(device: torch.device, rounds: int) -> list[str]:
    lines = ["## Training, x4: images per second", ""]
    for size, batch in ((128, 4), (256, 1)) if device.type == "cpu" else ((128, 128), (256, 32)):
        models = contenders(device)
        works = {name: networks.training_step(one, batch, size, device) for name, one in models.items()}
        timings = in_turns(works, rounds, device)
        rows = [
            [name, f"{parameter_count(models[name]) / 1e6:.2f}", timing.rate(batch), ratios(timings)[name]]
            for name, timing in timings.items()
        ]
        lines += [f"Crops of {size}², batch {batch}, {rounds} rounds.", ""]
        lines += table(["network", "M parameters", "images/s (range)", "time over ours"], rows)
    return lines


def speed_of_restoring(device: torch.device, rounds: int) -> list[str]:
    """On a CPU each is timed once: the peers attend over 65536 tokens, for a minute or more."""
    models = {name: one.eval() for name, one in contenders(device).items()}
    works = {name: networks.denoising_step(one, 1024, device) for name, one in models.items()}
    cuda = device.type == "cuda"
    timings = in_turns(works, rounds if cuda else 1, device, warm_up=int(cuda))
    rows = [[name, timing.seconds(10), ratios(timings)[name]] for name, timing in timings.items()]
    return [
        "## Restoring one 1024² image in 10 steps: seconds",
        "",
        "Ten times one denoising step; the condition is encoded before, once per image.",
        "",
        *table(["network", "seconds (range)", "time over ours"], rows),
    ]


def speed_of_enlarging(device: torch.device) -> list[str]:
    """Beside networks that do it in one pass."""
    ours = our_network(device).eval()
    works = {
        f"{OURS}, {name}": networks.restoration(ours, 256, steps, device)
        for name, steps in (("fidelity", 0), ("detail, 6 steps", 6))
    }
    sizes = {name: parameter_count(ours) for name in works}
    for name, build in RESTORERS.items():
        network = build().eval().to(device).to(memory_format=torch.channels_last)
        works[name], sizes[name] = networks.one_pass(network, 256, device), parameter_count(network)
    timings = in_turns(works, 3, device)
    first = next(iter(works))
    rows = [
        [name, f"{sizes[name] / 1e6:.2f}", timing.seconds(), ratios(timings, first)[name]]
        for name, timing in timings.items()
    ]
    return [
        "## Enlarging 256² to 1024²: seconds",
        "",
        "The others are untrained, built from their papers: what they restore is not compared here.",
        "",
        *table(["network", "M parameters", "seconds (range)", "time over ours"], rows),
    ]


def quality(
    device: torch.device, seconds: float, photos: Path | None, names: Sequence[str] | None = None
) -> list[str]:
    """PSNR after equal training time."""
    if photos is None:
        return ["Quality was not measured: SR_DATA does not name a folder with test/Set5 and train.", ""]
    images = ImageSet(photos / "test" / "Set5", EvaluationConfig(networks.SCALE))
    models = {name: one for name, one in contenders(device).items() if names is None or name in names}
    found = networks.qualities(models, seconds, photos / "train", images, device)
    rows = [[name, str(each.steps), f"{each.psnr:.2f}"] for name, each in found.items()]
    return [
        f"## Set5 x4 after {seconds:.0f} seconds of training: dB on luma",
        "",
        "The mean of ours, one step of the others. "
        f"The same loop, data and settings for every network (AdamW, batch {networks.QUALITY_BATCH} of "
        f"{networks.QUALITY_CROP}² crops, learning rate {networks.LEARNING_RATE:g}); bicubic reads 28.43.",
        "",
        *table(["network", "steps", "PSNR"], rows),
    ]


def floor(device: torch.device) -> list[str]:
    """How far an optimiser step is from the machine's matrix products."""
    batch, size = (16, 64) if device.type == "cpu" else (128, 128)
    ceiling = networks.matrix_product_rate(device, 2048 if device.type == "cpu" else 8192)
    rows = []
    for name, network in contenders(device).items():
        step = networks.training_step(network, batch, size, device)
        operations = networks.floating_point_operations(step)
        timing = in_turns({name: step}, 5, device)[name]
        achieved = operations / timing.median
        share = f"{100 * achieved / ceiling:.0f} %"
        rows.append([name, f"{operations / batch / 1e9:.2f}", f"{achieved / 1e9:.0f}", share])
    return [
        "## The floor by arithmetic",
        "",
        f"One optimiser step on {batch} crops of {size}²; "
        f"a matrix product reaches {ceiling / 1e9:.0f} GFLOP/s here.",
        "",
        *table(["network", "GFLOP per crop", "GFLOP/s", "of the matrix product"], rows),
    ]


def reading(photos: Path | None, device: torch.device) -> list[str]:
    lines = ["## Resizing uint8 RGB, bicubic: milliseconds", ""]
    for name, timings in data.resizing().items():
        ours = next(iter(timings))
        rows = [[one, timing.seconds(1000), ratios(timings, ours)[one]] for one, timing in timings.items()]
        lines += table([name, "ms (range)", "time over ours"], rows)
    crops = data.crops_per_second()
    times = crops["decoded each time"].median / crops["cached"].median
    lines += ["## Reading 256² crops from 2040x1356 PNGs: crops per second", ""]
    lines += table(
        ["reader", "crops/s (range)"], [[name, one.rate(data.PHOTOS)] for name, one in crops.items()]
    )
    lines += [f"The cache of decoded images (`--cache_gb` bounds it) reads {times:.0f} times as fast.", ""]
    if photos is not None:
        network = contenders(device)[OURS]
        share = data.share_waiting_for_data(network, photos / "train", device)
        lines += [f"Two workers keep training waiting for data {100 * share:.2f} % of the time.", ""]
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60, help="training time of each network")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--networks", nargs="+", choices=NAMES, help="train only these for `quality`")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    started = time.perf_counter()
    device = select_device(args.device)
    photos = Path(os.environ["SR_DATA"]) if "SR_DATA" in os.environ else None
    sections: dict[str, Callable[[], list[str]]] = {
        "training": lambda: speed_of_training(device, args.rounds),
        "restoring": lambda: speed_of_restoring(device, args.rounds),
        "enlarging": lambda: speed_of_enlarging(device),
        "floor": lambda: floor(device),
        "reading": lambda: reading(photos, device),
        "quality": lambda: quality(device, args.seconds, photos, args.networks),
    }
    text = "\n".join(["# Measured side by side", "", *machine(device), f"- our network: `{RECIPE}`", "", ""])
    for name in args.only:
        found = "\n".join(sections[name]()) + "\n"
        print(found, flush=True)
        text += found
    text += f"This took {(time.perf_counter() - started) / 60:.1f} minutes.\n"
    write_text_atomically(args.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
