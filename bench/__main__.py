"""Everything that bench/RESULTS.md holds, measured in one run of at most 15 minutes: `make bench`.

A part: python -m bench --only quality --networks "diffusers UNet2DModel" --seconds 1500 --out longer.md
Photos come from the folder that SR_DATA names; without it the rows that need photos say so.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import methodcaller
from pathlib import Path

import torch
from torch import nn

from bench import data, networks
from bench.contenders import NAMES, OURS, RECIPE, contenders, enlargers, our_network
from bench.networks import parameter_count
from bench.tables import table
from bench.timing import Timing, in_turns
from engine.device import autocast_dtype, select_device
from evaluation.images import EvaluationConfig, ImageSet
from imaging.atomic import check_outputs, write_text_atomically

RESULTS = Path("bench/RESULTS.md")
NEEDED = ("diffusers", "denoising_diffusion_pytorch", "spandrel")
PACKAGES = "torch diffusers denoising-diffusion-pytorch spandrel pillow opencv-python-headless numpy".split()
CONVOLUTION = "import torch; torch.conv2d(torch.ones(4, 16, 64, 64), torch.ones(16, 16, 3, 3))"


def onednn_isa() -> str:
    """Read from oneDNN's log which instruction set it really uses, or return "unknown"."""
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    log = subprocess.run(
        [sys.executable, "-c", CONVOLUTION], env=environment, capture_output=True, text=True, check=False
    )
    found = re.search(r"cpu,isa:(.*)", log.stdout)
    return found[1].strip() if found else "unknown"


def machine(device: torch.device) -> list[str]:
    """Describe what the numbers depend on, a line each."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    capability = torch.backends.cpu.get_cpu_capability()
    installed = {one.name.lower(): one.version for one in importlib.metadata.distributions()}
    versions = (f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    return [
        f"- {os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads; {gpu}",
        f"- CPU capability {capability}; oneDNN: {onednn_isa()}; {autocast_dtype(device) or torch.float32}",
        f"- Python {platform.python_version()}, {', '.join(versions)}",
        f"- commit {commit.stdout.strip()}; our network: `{RECIPE}`",
    ]


def times(
    subject: str,
    unit: str,
    timings: Mapping[str, Timing],
    show: Callable[[Timing], str],
    networks: Mapping[str, nn.Module] | None = None,
) -> list[str]:
    """A table of timings, with sizes of networks, and how many times longer each takes than the first."""
    first = next(iter(timings.values()))
    sizes = {name: [f"{parameter_count(one) / 1e6:.2f}"] for name, one in (networks or {}).items()}
    rows = [
        [name, *sizes.get(name, []), show(timing), f"{timing.median / first.median:.1f}"]
        for name, timing in timings.items()
    ]
    return table([subject, *(["M parameters"] if sizes else []), f"{unit} (range)", "time over ours"], rows)


def speed_of_training(device: torch.device, rounds: int) -> Iterator[str]:
    yield "## Training, x4: images per second\n"
    models = contenders(device)
    for size, batch in ((128, 4), (256, 1)) if device.type == "cpu" else ((128, 128), (256, 32)):
        works = {name: networks.training_step(one, batch, size, device) for name, one in models.items()}
        timings = in_turns(works, rounds, device)
        yield f"Crops of {size}², batch {batch}.\n"
        yield from times("network", "images/s", timings, methodcaller("rate", batch), models)


def speed_of_restoring(device: torch.device, rounds: int) -> Iterator[str]:
    """Time each network; on a CPU once, on a quarter of the picture: peers attend over all of its tokens."""
    cuda = device.type == "cuda"
    side = 1024 if cuda else 512
    models = {name: one.eval() for name, one in contenders(device).items()}
    works = {name: networks.denoising_step(one, side, device) for name, one in models.items()}
    timings = in_turns(works, rounds if cuda else 1, device, warm_up=int(cuda))
    yield f"## Restoring one {side}² image in 10 steps: seconds\n"
    yield "Ten times one denoising step; the condition is encoded before, once per image."
    if not cuda:
        yield (
            "A quarter of a 1024² image: over all its tokens attention takes 16 times as long as here, and "
            "all else 4 times."
        )
    yield ""
    yield from times("network", "seconds", timings, methodcaller("seconds", 10))


def speed_of_enlarging(device: torch.device, rounds: int) -> Iterator[str]:
    ours = our_network(device).eval()
    modes = {f"{OURS}, fidelity": 0, f"{OURS}, detail in 6 steps": 6}
    works = {name: networks.restoration(ours, 256, steps, device) for name, steps in modes.items()}
    models = dict.fromkeys(modes, ours) | enlargers(device)
    low_res = torch.zeros(1, 3, 256, 256, device=device)
    works |= {name: networks.inference(one, low_res) for name, one in models.items() if name not in modes}
    yield "## Enlarging 256² to 1024²: seconds\n"
    yield "The others are untrained, of spandrel: what they restore is not compared here.\n"
    yield from times("network", "seconds", in_turns(works, rounds, device), Timing.seconds, models)


def floor(device: torch.device) -> Iterator[str]:
    """Measure how far an optimiser step is from the machine's matrix products."""
    batch, size = (16, 64) if device.type == "cpu" else (128, 128)
    ceiling = networks.matrix_product_rate(device, 2048 if device.type == "cpu" else 8192)
    works = {
        name: networks.training_step(one, batch, size, device) for name, one in contenders(device).items()
    }
    operations = {name: networks.floating_point_operations(step) for name, step in works.items()}
    yield "## The floor by arithmetic\n"
    yield (
        f"One optimiser step on {batch} crops of {size}²; "
        f"a matrix product reaches {ceiling / 1e9:.0f} GFLOP/s here.\n"
    )
    rows = []
    for name, timing in in_turns(works, 3, device).items():
        achieved = operations[name] / timing.median
        per_crop = f"{operations[name] / batch / 1e9:.2f}"
        rows.append([name, per_crop, f"{achieved / 1e9:.0f}", f"{100 * achieved / ceiling:.0f} %"])
    yield from table(["network", "GFLOP per crop", "GFLOP/s", "of the matrix product"], rows)


def reading() -> Iterator[str]:
    yield "## Resizing uint8 RGB, bicubic: milliseconds\n"
    for name, timings in data.resizing().items():
        yield from times(name, "ms", timings, methodcaller("seconds", 1000))
    yield "## Reading 256² crops from 2040x1356 PNGs: crops per second\n"
    yield from times("reader", "crops/s", data.crops_per_second(), methodcaller("rate", data.PHOTOS))


def quality(
    device: torch.device, seconds: float, photos: Path | None, names: Sequence[str] = NAMES
) -> Iterator[str]:
    """Compare the PSNR after equal training time."""
    if photos is None:
        yield "Quality was not measured: SR_DATA does not name a folder with test/Set5 and train.\n"
        return
    images = ImageSet(photos / "test" / "Set5", EvaluationConfig(networks.SCALE))
    models = {name: one for name, one in contenders(device).items() if name in names}
    found = networks.qualities(models, seconds, photos / "train", images, device)
    yield f"## Set5 x4 after {seconds:.0f} seconds of training: dB on luma\n"
    yield (
        "The mean of ours, one step of the others. The same loop, data and settings for all (AdamW, "
        f"batch {networks.QUALITY_BATCH} of {networks.QUALITY_CROP}² crops, learning rate "
        f"{networks.LEARNING_RATE:g}); bicubic reads 28.43.\n"
    )
    rows = [[name, str(steps), f"{psnr:.2f}"] for name, (steps, psnr) in found.items()]
    yield from table(["network", "steps", "PSNR"], rows)


SECTIONS: dict[str, Callable[[argparse.Namespace, torch.device, Path | None], Iterator[str]]] = {
    "training": lambda args, device, photos: speed_of_training(device, args.rounds),
    "restoring": lambda args, device, photos: speed_of_restoring(device, args.rounds),
    "enlarging": lambda args, device, photos: speed_of_enlarging(device, args.rounds),
    "floor": lambda args, device, photos: floor(device),
    "reading": lambda args, device, photos: reading(),
    "quality": lambda args, device, photos: quality(device, args.seconds, photos, args.networks),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of training and restoring (default: 2)")
    parser.add_argument(
        "--seconds", type=float, default=60, help="training time of each network (default: 60)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="parts (default: all)"
    )
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=NAMES, help="networks of quality")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"file to write (default: {RESULTS})")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing and args.only != ["reading"]:
        parser.error(f"{', '.join(missing)} not installed: pip install -e '.[bench]'")
    check_outputs([args.out], overwrite=True)
    started = time.perf_counter()
    device = select_device(args.device)
    photos = Path(os.environ["SR_DATA"]).expanduser() if "SR_DATA" in os.environ else None
    lines = ["# Measured side by side", "", *machine(device), ""]
    print("\n".join(lines), flush=True)
    for name in args.only:
        for line in SECTIONS[name](args, device, photos):
            print(line, flush=True)
            lines.append(line)
        took = f"This took {(time.perf_counter() - started) / 60:.1f} minutes.\n"
        write_text_atomically(args.out, "\n".join([*lines, took]))  # so far: nothing is lost
    return 0


if __name__ == "__main__":
    sys.exit(main())
