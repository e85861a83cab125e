"""Measure bicubic and a trained model on a folder of images: one row per method and number of steps.

python evaluate.py --data Set5 --scale 4
python evaluate.py --data Set5 --scale 4 --weights_path best.pth --steps 1 4 10 --json set5.json --plot x.png
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from bicubic import Border
from engine.device import Precision, autocast_dtype, select_device
from evaluation.evaluation import Settings, evaluate, load_trained, read_image_set
from evaluation.report import Report, perception_distortion_figure
from imaging.atomic import write_atomically, write_text_atomically
from samplers import DEFAULT_SCHEDULER, SchedulerName


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the script."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    shown = "(default: %(default)s)"
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, help="folder of high-resolution images, subfolders left out")
    data.add_argument("--scale", type=float, required=True, help="the enlargement, such as 4")
    data.add_argument("--low_res", help="folder of low-resolution images of these names; else they are made")
    data.add_argument("--limit", type=int, help="measure only the first so many images")
    edge = f"what bicubic sees beyond the edge of an image; mirror is today's MATLAB {shown}"
    data.add_argument("--border", choices=get_args(Border), default="mirror", help=edge)
    model = parser.add_argument_group("model")
    model.add_argument("--weights_path", help="a .pth or .safetensors file; without it, bicubic alone")
    steps = "sampling steps, a row each (default: 1 4 10 50)"
    model.add_argument("--steps", type=int, nargs="+", default=[1, 4, 10, 50], help=steps)
    model.add_argument(
        "--scheduler", choices=get_args(SchedulerName), default=DEFAULT_SCHEDULER, help=f"sampler {shown}"
    )
    samples = f"above 1, the mean of so many samples has a row, too {shown}"
    model.add_argument("--num_samples", type=int, default=1, help=samples)
    model.add_argument("--seed", type=int, default=0, help=f"of the noise, and of SWD's patches {shown}")
    model.add_argument("--device", default="auto", help=f"auto, cuda, mps or cpu {shown}")
    precision = f"auto is bf16 where the hardware has it {shown}"
    model.add_argument("--precision", choices=get_args(Precision), default="fp32", help=precision)
    _add_result_flags(parser)
    return parser


def _add_result_flags(parser: argparse.ArgumentParser) -> None:
    measured = parser.add_argument_group("metrics")
    channel = "what PSNR and SSIM compare (default: %(default)s)"
    measured.add_argument("--channel", choices=["luma", "rgb"], default="luma", help=channel)
    crop = "pixels that PSNR and SSIM leave out at each border (default: the scale)"
    measured.add_argument("--crop", type=int, help=crop)
    measured.add_argument(
        "--no_lpips", action="store_true", help="leave out LPIPS, which fetches 233 MB once"
    )
    output = parser.add_argument_group("output", "written at the end, each file whole or not at all")
    output.add_argument("--json", type=Path, metavar="FILE", help="the protocol and the rows")
    output.add_argument("--csv", type=Path, metavar="FILE", help="every image in every row")
    output.add_argument("--markdown", type=Path, metavar="FILE", help="the table, which is printed anyway")
    plot = "a .png: PSNR against LPIPS or, without it, SWD"
    output.add_argument("--plot", type=Path, metavar="FILE", help=plot)


def check_targets(targets: Sequence[Path]) -> None:
    """Refuse files that could not be written, before a long computation is spent on them.

    Raises:
        ValueError: a target is a folder, is named twice, or cannot be created where it is.
    """
    if len({target.resolve() for target in targets}) < len(targets):
        raise ValueError(f"{', '.join(map(str, targets))}: give every output a file of its own")
    for target in targets:
        if target.is_dir():
            raise ValueError(f"{target} is a folder; give the name of a file")
        existing = next(folder for folder in target.resolve().parents if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"{target} cannot be written, because of {existing}; give another place")


def run(args: argparse.Namespace) -> None:
    """Measure, print the table, and write the files."""
    texts = {"json": Report.to_json, "csv": Report.to_csv, "markdown": Report.to_markdown}
    wanted = [(getattr(args, name), make) for name, make in texts.items() if getattr(args, name) is not None]
    check_targets([path for path, _ in wanted] + ([] if args.plot is None else [args.plot]))
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise ValueError(f"--plot is {args.plot}; give a name that ends in .png")
    settings = Settings(
        scale=args.scale,
        steps=tuple(args.steps),
        num_samples=args.num_samples,
        seed=args.seed,
        border=args.border,
        channel=args.channel,
        crop=args.crop,
        lpips=not args.no_lpips,
    )
    torch.backends.cudnn.deterministic = True  # the same seed gives the same table
    device = select_device(args.device)
    precision = autocast_dtype(device, args.precision)
    images = read_image_set(args.data, settings, args.low_res, args.limit)
    model = None
    if args.weights_path is not None:
        model = load_trained(args.weights_path, device, precision, args.scheduler)
    report = evaluate(images, settings, model, device=device, progress=True)
    print(report.to_markdown(), end="", flush=True)
    for path, make in wanted:
        write_text_atomically(path, make(report))
    if args.plot is not None:
        figure = perception_distortion_figure(report)
        write_atomically(args.plot, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; files are written only at the end", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
