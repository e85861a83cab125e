"""Measure bicubic and a trained model on a folder of images: one row per method and number of steps.

python evaluate.py --data Set5 --scale 4
python evaluate.py --data Set5 --scale 4 --weights_path best.pth --json set5.json --plot set5.png
python evaluate.py --data photos --scale 4 --weights_path best.pth --mode fidelity detail --tile 512
torchrun --nproc_per_node 4 evaluate.py --data photos --scale 4 --weights_path best.pth
"""

import argparse
import io
import itertools
import os
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
from evaluation.images import EvaluationConfig, ImageSet
from evaluation.measure import Method, describe_model, evaluate, model_method
from evaluation.report import Json, Report
from imaging.atomic import check_outputs, write_atomically, write_text_atomically
from models import load_model
from restoration import PRESETS, RestoreConfig
from restoration.rescaled import find_weights

ROWS = ("mode", "detail", "steps", "num_images")  # the options of RestoreConfig that make rows
OUTPUTS = {
    "json": "the protocol and the rows",
    "csv": "every image in every row",
    "markdown": "the table, which is printed anyway",
    "plot": "a .png: PSNR against LPIPS or, without it, HF energy",
}


BROKEN_PACKAGE = (ImportError, AttributeError, RuntimeError)  # what a package may raise that does not fit


def write_output(name: str, report: Report, path: Path) -> None:
    if name == "plot":
        png = report.to_png()
        write_atomically(path, lambda stream: stream.write(png))
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
    weights = (
        "photo or clean, the project's own, or a .pth or .safetensors file (default: those of infer.py if a "
        "flag of restoring is given, else bicubic alone)"
    )
    model.add_argument("--weights", "--weights_path", dest="weights_path", help=weights)
    model.add_argument("--device", default="auto", help=f"auto, cuda, mps or cpu {shown}")
    precision = f"auto is bf16 where the device has it natively {shown}"
    model.add_argument("--precision", choices=get_args(Precision), default="auto", help=precision)
    _add_restoring_flags(parser)
    output = parser.add_argument_group("output", "written at the end, each file whole or not at all")
    for name, text in OUTPUTS.items():
        output.add_argument(f"--{name}", metavar="FILE", help=text)
    output.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def _add_restoring_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("restoring", "as infer.py does; each mode and each number has a row")
    modes = "modes of infer.py (default, without --detail and --steps: all)"
    group.add_argument("--mode", nargs="+", choices=list(PRESETS), default=[], help=modes)
    detail = "numbers from 0 to 1: texture to invent, each with every number of steps"
    group.add_argument("--detail", type=float, nargs="+", default=[], help=detail)
    group.add_argument(
        "--steps", type=int, nargs="+", default=[], help="sampling steps, instead of the mode's"
    )
    samples = "samples to average (default: 1)"
    group.add_argument("--num_images", type=int, nargs="+", default=[1], help=samples)
    add_flags(group, RestoreConfig, skip=[*ROWS, "seed", "guidance"])  # there are no tokens to guide by


def restore_configs(args: argparse.Namespace) -> list[RestoreConfig]:
    """One configuration for each row of the model: modes first, then detail and step counts."""
    for flag in ROWS:
        values = getattr(args, flag)
        if len(set(values)) < len(values):
            raise ValueError(f"--{flag} is {' '.join(map(str, values))}: give each once")
    sampled = bool(args.detail or args.steps)
    common = from_args(RestoreConfig, args, mode=None, detail=None, steps=None, num_images=1)
    rows = [replace(common, mode=mode) for mode in args.mode or ([] if sampled else PRESETS)]
    if sampled:
        pairs = itertools.product(args.detail or [None], args.steps or [None])
        rows += [replace(common, detail=detail, steps=count) for detail, count in pairs]
    return [replace(row, num_images=n) for row in rows for n in args.num_images]


def check_plot(path: Path) -> None:
    """Raise ValueError where no plot can be drawn."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot is {path}; give a name that ends in .png")
    os.environ["MPLBACKEND"] = "agg"  # matplotlib does not import with a backend that is not there
    try:
        import matplotlib.figure  # noqa: F401
    except BROKEN_PACKAGE as error:
        raise ValueError(f"--plot needs matplotlib ({error}): mend it, or draw from --csv") from error


def planned_outputs(args: argparse.Namespace, images: ImageSet) -> dict[str, Path]:
    """ValueError for what cannot be written, before the long computation."""
    outputs = {name: Path(getattr(args, name)) for name in OUTPUTS if getattr(args, name) is not None}
    if "plot" in outputs:
        check_plot(outputs["plot"])
    named = [Path(name) for name in (args.weights_path, args.lpips_weights) if name is not None]
    inputs = [*images.paths, *(images.low_res_paths or []), *named]
    check_outputs(outputs.values(), inputs=inputs, overwrite=args.overwrite)
    return outputs


def open_model(
    args: argparse.Namespace, scale: float, device: torch.device
) -> tuple[list[Method], dict[str, Json]]:
    """The model's rows and its part of the protocol; none where no flag asks for a model."""
    how = restore_configs(args)
    plain = build_parser().parse_args(["--data", args.data, "--scale", "2", "--seed", str(args.seed)])
    if args.weights_path is None and how == restore_configs(plain):
        return [], {}
    precision = autocast_dtype(device, args.precision)
    paths = find_weights(args.weights_path, scale)
    models = [load_model(path, device=device) for path in paths]
    methods = [model_method(models, one, scale, device, precision) for one in how]
    # without sampling steps, all samples are the same
    methods = [method for method in methods if method.steps or method.samples == min(args.num_images)]
    described = [describe_model(*each, precision) for each in zip(paths, models, strict=True)]
    common = {name: value for name, value in how[0].to_dict().items() if name not in ROWS}
    return methods, {"models": described, "restoring": common}


def run(args: argparse.Namespace, processes: Processes) -> int:
    """Measure with all processes, then write and print; returns the exit status."""
    for name, value in vars(args).items():
        if value == "":
            raise ValueError(f"--{name} is empty; give a path")
    config = from_args(EvaluationConfig, args, lpips=not args.no_lpips)
    torch.backends.cudnn.deterministic = True  # the same seed gives the same table
    device = processes.device
    images = ImageSet(args.data, config, args.low_res, args.limit)
    outputs = planned_outputs(args, images)
    methods, facts = open_model(args, config.scale, device)
    report = evaluate(
        images, config, methods, device=device, facts=facts, progress=processes.is_main, processes=processes
    )
    if not processes.is_main:
        return 1 if report.failures else 0
    errors = []
    for name, path in outputs.items():  # before printing, which fails if nobody reads
        try:
            write_output(name, report, path)
        except (OSError, ValueError, *BROKEN_PACKAGE) as error:
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
