"""Measure bicubic and a trained model on a folder of images: one row per method and number of steps.

python evaluate.py --data Set5 --scale 4
python evaluate.py --data Set5 --scale 4 --weights_path best.pth --steps 1 4 10 --json set5.json --plot x.png
python evaluate.py --data photos --scale 4 --weights_path best.pth --mode fidelity detail --tile 512
torchrun --nproc_per_node 4 evaluate.py --data photos --scale 4 --weights_path best.pth
"""

import argparse
import io
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import get_args

import torch

from engine.cli import with_flag
from engine.device import Precision, autocast_dtype
from engine.options import OptionError, add_flags, from_args
from engine.processes import Processes, started_processes
from evaluation.config import EvaluationConfig
from evaluation.evaluation import Method, TrainedModel, evaluate
from evaluation.images import ImageSet
from evaluation.report import Json, Report, perception_distortion_figure
from imaging.atomic import check_outputs, write_atomically, write_text_atomically
from restoration import PRESETS, RestoreConfig
from restoration.rescaled import find_weights

DEFAULT_STEPS = (1, 4, 10, 50)
ROWS = ("mode", "detail", "steps", "num_images")  # the options of RestoreConfig that make rows
OUTPUTS = {
    "json": "the protocol and the rows",
    "csv": "every image in every row",
    "markdown": "the table, which is printed anyway",
    "plot": "a .png: PSNR against LPIPS or, without it, SWD",
}


def write_output(name: str, report: Report, path: Path) -> None:
    if name == "plot":
        figure = perception_distortion_figure(report)
        write_atomically(path, lambda stream: figure.savefig(stream, format="png", dpi=150))
    else:
        make = {"json": report.to_json, "csv": report.to_csv, "markdown": report.to_markdown}[name]
        write_text_atomically(path, make())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    shown = "(default: %(default)s)"
    data = parser.add_argument_group("data and metrics")
    data.add_argument("--data", required=True, help="folder of high-resolution images, subfolders left out")
    data.add_argument("--scale", type=float, required=True, help="the enlargement, such as 4")
    data.add_argument("--low_res", help="folder of low-resolution images of these names; else they are made")
    data.add_argument("--limit", type=int, help="measure only the first so many images")
    add_flags(data, EvaluationConfig, skip=["scale", "lpips"])
    data.add_argument("--no_lpips", action="store_true", help="leave out LPIPS")
    model = parser.add_argument_group("model")
    weights = "photo or clean, the project's own, or a .pth or .safetensors file; without it, bicubic alone"
    model.add_argument("--weights", "--weights_path", dest="weights_path", help=weights)
    model.add_argument("--device", default="auto", help=f"auto, cuda, mps or cpu {shown}")
    precision = f"auto is bf16 where the device has it natively {shown}"
    model.add_argument("--precision", choices=get_args(Precision), default="fp32", help=precision)
    _add_restoring_flags(parser)
    output = parser.add_argument_group("output", "written at the end, each file whole or not at all")
    for name, text in OUTPUTS.items():
        output.add_argument(f"--{name}", metavar="FILE", help=text)
    output.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def _add_restoring_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("restoring", "as infer.py does; each mode and each number has a row")
    group.add_argument("--mode", nargs="+", choices=list(PRESETS), default=[], help="modes of infer.py")
    detail = "numbers from 0 to 1: texture to invent, each with every number of steps"
    group.add_argument("--detail", type=float, nargs="+", default=[], help=detail)
    steps = f"sampling steps (default, without --mode and --detail: {' '.join(map(str, DEFAULT_STEPS))})"
    group.add_argument("--steps", type=int, nargs="+", default=[], help=steps)
    samples = "samples to average; one has no uncertainty (default: 1)"
    group.add_argument("--num_images", type=int, nargs="+", default=[1], help=samples)
    add_flags(group, RestoreConfig, skip=[*ROWS, "seed"])


def restore_configs(args: argparse.Namespace) -> list[RestoreConfig]:
    """One configuration for each row of the model: modes first, then detail and step counts."""
    for flag in ROWS:
        values = getattr(args, flag)
        if len(set(values)) < len(values):
            raise ValueError(f"--{flag} is {' '.join(map(str, values))}: give each once")
    steps = args.steps or ([] if args.mode or args.detail else DEFAULT_STEPS)
    common = from_args(RestoreConfig, args, mode=None, detail=None, steps=None, num_images=1)
    rows = [replace(common, mode=mode) for mode in args.mode]
    if args.detail or steps:
        pairs = itertools.product(args.detail or [None], steps or [None])
        rows += [replace(common, detail=detail, steps=count) for detail, count in pairs]
    return [replace(row, num_images=n) for row in rows for n in args.num_images]


def planned_outputs(args: argparse.Namespace, images: ImageSet) -> dict[str, Path]:
    """ValueError for what cannot be written, before the long computation."""
    outputs = {name: Path(getattr(args, name)) for name in OUTPUTS if getattr(args, name) is not None}
    if "plot" in outputs and outputs["plot"].suffix.lower() != ".png":
        raise ValueError(f"--plot is {args.plot}; give a name that ends in .png")
    inputs = [*images.paths, *(images.low_res_paths or []), Path(args.weights_path or "")]
    check_outputs(outputs.values(), inputs=inputs, overwrite=args.overwrite)
    return outputs


def run(args: argparse.Namespace, processes: Processes) -> int:
    """Measure with all processes, then write and print; returns the exit status."""
    for name, value in vars(args).items():
        if value == "":
            raise ValueError(f"--{name} is empty; give a path")
    how = restore_configs(args)
    config = from_args(EvaluationConfig, args, lpips=not args.no_lpips)
    torch.backends.cudnn.deterministic = True  # the same seed gives the same table
    device = processes.device
    images = ImageSet(args.data, config, args.low_res, args.limit)
    outputs = planned_outputs(args, images)
    methods: list[Method] = []
    facts: dict[str, Json] = {}
    if args.weights_path is not None:
        path = find_weights(args.weights_path, config.scale)[0]
        model = TrainedModel(path, device, autocast_dtype(device, args.precision))
        methods = [model.method(one, config.scale) for one in how]
        common = {name: value for name, value in how[0].to_dict().items() if name not in ROWS}
        facts = {"model": model.describe(), "restoring": common}
    report = evaluate(
        images, config, methods, device=device, facts=facts, progress=processes.is_main, processes=processes
    )
    if not processes.is_main:
        return 1 if report.failures else 0
    errors = []
    for name, path in outputs.items():  # before printing, which fails if nobody reads
        try:
            write_output(name, report, path)
        except (OSError, ValueError) as error:
            errors.append(f"{path} was not written: {error}")
    print(report.to_markdown(), end="", flush=True)
    errors += [f"left out: {failure}" for failure in report.failures]
    if report.failures:
        errors.append(f"{len(report.failures)} of {len(images)} images were left out")
    for message in errors:
        print(f"evaluate.py: error: {message}", file=sys.stderr)
    return 1 if errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot print a file's name
    try:
        with started_processes(args.device, timedelta(days=7)) as processes:
            return run(args, processes)
    except (ValueError, OSError) as error:
        flags = [EvaluationConfig, RestoreConfig]
        message = with_flag(error, flags) if isinstance(error, OptionError) else str(error)
        print(f"evaluate.py: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; files are written only at the end", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
