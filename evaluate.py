"""Measure bicubic and a trained model on a folder of images: one row per method and number of steps.

python evaluate.py --data Set5 --scale 4
python evaluate.py --data Set5 --scale 4 --weights_path best.pth --json set5.json --plot set5.png
python evaluate.py --data photos --scale 4 --weights_path best.pth --mode fidelity detail --tile 512
torchrun --nproc_per_node 4 evaluate.py --data photos --scale 4 --weights_path best.pth
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import methodcaller
from pathlib import Path

import torch

from engine.cli import Parser, in_processes, run_script, say, warn
from engine.device import ComputingOptions, autocast_dtype
from engine.options import add_flags, from_args, path
from engine.packages import IMPORT_ERRORS
from engine.processes import Processes
from evaluation.images import EvaluationConfig, ImageSet
from evaluation.measure import Method, describe_model, evaluate, model_method
from evaluation.report import Facts, Report
from imaging.atomic import check_outputs, write_atomically
from network import network_class
from restoration import PRESETS, RestoreConfig
from restoration.weights import add_weights_flags, load_models

ROWS = ("mode", "detail", "steps", "num_images")  # the options of RestoreConfig that make rows
OUTPUTS: dict[str, tuple[str, Callable[[Report], bytes]]] = {
    "json": ("the protocol and the rows", lambda report: report.to_json().encode()),
    "csv": ("every image in every row", lambda report: report.to_csv().encode()),
    "markdown": ("the table, which is printed anyway", lambda report: report.to_markdown().encode()),
    "plot": ("PSNR against LPIPS or, without it, HF energy, as .png", Report.to_png),
}


def build_parser() -> Parser:
    parser = Parser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    group = parser.add_argument_group("data and metrics")
    add = group.add_argument
    add("--data", type=path, required=True, help="folder of high-resolution images, subfolders left out")
    add("--scale", type=float, required=True, help="enlargement, such as 4")
    add("--no_lpips", dest="lpips", action="store_false", help="leave out LPIPS")
    add_flags(group, EvaluationConfig, skip=["scale", "lpips"])
    group = parser.add_argument_group("model")
    add_weights_flags(group, default="those of infer.py if a flag of restoring is given, else bicubic alone")
    add_flags(group, ComputingOptions)
    group = parser.add_argument_group("restoring", "as infer.py does; each mode and each number has a row")
    add = group.add_argument
    modes = "modes of infer.py (default, without --detail and --steps: all)"
    add("--mode", nargs="+", choices=list(PRESETS), default=[], help=modes)
    detail = "numbers from 0 to 1: texture to invent, each with every number of steps"
    add("--detail", type=float, nargs="+", default=[], help=detail)
    add("--steps", type=int, nargs="+", default=[], help="sampling steps, instead of the mode's")
    add("--num_images", type=int, nargs="+", default=[1], help="samples to average (default: 1)")
    add_flags(group, RestoreConfig, skip=[*ROWS, "seed", "guidance"])  # there are no tokens to guide by
    group = parser.add_argument_group("output", "written at the end, each file whole or not at all")
    for name, (text, _) in OUTPUTS.items():
        group.add_argument(f"--{name}", metavar="FILE", type=path, help=text)
    group.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def restore_configs(args: argparse.Namespace) -> list[RestoreConfig]:
    """Make a configuration for each row of the model: modes first, then detail and step counts."""
    common = from_args(RestoreConfig, args, mode=None, detail=None, steps=None, num_images=1)
    given = args.detail or args.steps
    sampled = itertools.product(args.detail or [None], args.steps or [None]) if given else ()
    rows = [replace(common, mode=mode) for mode in args.mode or ([] if given else PRESETS)]
    rows += [replace(common, detail=detail, steps=count) for detail, count in sampled]
    return [replace(row, num_images=n) for row in rows for n in args.num_images]


def planned_outputs(args: argparse.Namespace, images: ImageSet) -> dict[str, Path]:
    """List the files to write by flag; ValueError, before the work, for what cannot be written or drawn."""
    outputs = {name: Path(getattr(args, name)) for name in OUTPUTS if getattr(args, name) is not None}
    if "plot" in outputs:
        if outputs["plot"].suffix.lower() != ".png":
            raise ValueError(f"--plot is {args.plot}; give a name that ends in .png")
        os.environ["MPLBACKEND"] = "agg"  # matplotlib does not import with a backend that is not there
        try:
            import matplotlib.figure  # noqa: F401
        except IMPORT_ERRORS as error:
            raise ValueError(f"--plot needs matplotlib ({error}): mend it, or draw from --csv") from error
    named = [Path(name) for name in (args.weights_path, args.lpips_weights) if name is not None]
    inputs = [*images.paths, *(images.low_res_paths or []), *named]
    check_outputs(outputs.values(), inputs=inputs, overwrite=args.overwrite)
    return outputs


def open_model(args: argparse.Namespace, scale: float, device: torch.device) -> tuple[list[Method], Facts]:
    """Make the model's rows and its part of the protocol; none where no flag asks for a model."""
    how = restore_configs(args)
    if args.weights_path is None and how == [RestoreConfig(mode=mode, seed=args.seed) for mode in PRESETS]:
        return [], {}
    precision = autocast_dtype(device, args.precision)
    models = load_models(args.weights_path, scale, network_class(args.network))
    methods = [model_method([*models.values()], one, scale, device, precision) for one in how]
    # without sampling steps, all samples are the same
    methods = [method for method in methods if method.steps or method.samples == min(args.num_images)]
    described = [describe_model(*each, precision) for each in models.items()]
    common = {name: value for name, value in how[0].to_dict().items() if name not in ROWS}
    return methods, {"models": described, "restoring": common}


def run(args: argparse.Namespace, processes: Processes) -> int:
    """Measure with all processes, then write and print; returns the exit status."""
    torch.backends.cudnn.deterministic = True  # the same seed gives the same table
    images = ImageSet(args.data, from_args(EvaluationConfig, args))
    outputs = planned_outputs(args, images)
    methods, facts = open_model(args, images.config.scale, processes.device)
    report = evaluate(images, methods, processes, progress=processes.is_main)
    report.protocol.update(facts)
    errors = [f"left out: {failure}" for failure in report.failures]
    if report.failures:
        errors.append(f"{len(report.failures)} of {len(images)} images were left out")
    if processes.is_main:
        for name, file in outputs.items():
            try:
                content = OUTPUTS[name][1](report)
                write_atomically(file, methodcaller("write", content))
            except IMPORT_ERRORS as error:
                errors.append(f"{file} was not written: {error}")
        say(report.to_markdown().rstrip())
        for message in errors:
            warn("evaluate.py", f"error: {message}")
    return 1 if errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    work = partial(in_processes, build_parser(), argv, run)
    options = [EvaluationConfig, RestoreConfig]
    return run_script("evaluate.py", work, options, stopped="files are written only at the end")


if __name__ == "__main__":
    sys.exit(main())
