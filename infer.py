"""Restore photos with a trained model: a file or a folder in, enlarged images out.

python infer.py photo.png
python infer.py --weights_path model.pth --input photos --output out --mode fidelity
python infer.py --weights_path model.pth --export model.safetensors
"""

import argparse
import functools
import glob
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Never

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from bicubic import upscale_image
from engine.checkpoint import LoadedModel, export_safetensors, load_model, released_model
from engine.device import autocast_dtype, compile_network, select_device
from engine.options import OptionError, add_flags, from_args, with_flag
from imaging.atomic import write_atomically
from imaging.files import (
    IMAGE_SUFFIXES,
    DecodedImage,
    Pixels,
    check_format,
    decode_image,
    list_images,
    read_rgb,
    write_image,
)
from imaging.pictures import comparison_picture
from restoration import Restoration, RestoreConfig, Restorer
from restoration.restorer import Progress
from unet import UNet

# What one file of many may fail with while the others are done; anything else is a fault of the program.
FILE_ERRORS = (ValueError, OSError, MemoryError, torch.cuda.OutOfMemoryError)
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class Task(NamedTuple):
    """One image to restore, and where its results go; None for what was not asked for."""

    source: Path
    target: Path
    comparison: Path | None
    truth: Path | None
    uncertainty: Path | None


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the script."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    _add_file_flags(parser)
    restoring = parser.add_argument_group("restoring")
    add_flags(restoring, RestoreConfig, skip=["tile"])
    tile = "side of the windows a large image is restored in; 0: in one piece (default: auto, by its size)"
    restoring.add_argument("--tile", default="auto", help=tile)
    computing = parser.add_argument_group("computing")
    computing.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    precision = "precision of the network (default: auto)"
    computing.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help=precision)
    compiled = "torch.compile: a minute per new size of image, no gain on CPUs"
    computing.add_argument("--compile", action="store_true", help=compiled)
    return parser


def _add_file_flags(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument("inputs", nargs="*", metavar="INPUT", help="images, or folders of images")
    files.add_argument("--input", nargs="+", default=[], metavar="INPUT", help="the same")
    files.add_argument(
        "--weights_path", help="checkpoint (.pth) or model (.safetensors); without it, the project's own"
    )
    files.add_argument("--scale", type=float, help="which of the project's own models: 4 or 2; without it, 4")
    files.add_argument(
        "--output", default="./restored", help="folder, or for one image the name of the result"
    )
    files.add_argument("--overwrite", action="store_true", help="replace results that exist")
    files.add_argument(
        "--compare",
        nargs="?",
        const="",
        metavar="ORIGINAL",
        help="also write input, bicubic, restored and, if given, the original side by side; ORIGINAL is an "
        "image or a folder of images of the same names",
    )
    files.add_argument(
        "--uncertainty",
        metavar="MAP",
        help="also write the standard deviation over the samples, as MAP.png and MAP.npy; for several "
        "images MAP is a folder",
    )
    files.add_argument(
        "--export", metavar="MODEL", help="write the model as MODEL.safetensors (half precision) and stop"
    )


def make_config(args: argparse.Namespace) -> RestoreConfig:
    """The flags as a RestoreConfig; ValueError for a wrong one."""
    if args.tile != "auto" and not args.tile.isdecimal():
        raise ValueError(f"--tile is {args.tile!r}: give auto, 0 or a number of pixels")
    config = from_args(RestoreConfig, args, tile=None if args.tile == "auto" else int(args.tile))
    if args.uncertainty is not None and config.budget.num_images < 2:
        raise ValueError("--uncertainty measures how samples differ: give --num_images of at least 2")
    return config


# ------------------------------------------------------------------------------------------- names of files


def find_inputs(names: Sequence[str], output: Path) -> list[tuple[Path, Path]]:
    """The images that were named, each with its path below the output folder.

    Raises:
        ValueError: a file or folder that does not exist, a folder without images, or nothing was named.
    """
    if not names:
        raise ValueError("no input: name images or folders, for example: infer.py photo.png")
    found: list[tuple[Path, Path]] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            if path.resolve() == output.resolve():
                raise ValueError(f"--output {output} is the input folder: give another one")
            inside = [one for one in list_images(path) if output.resolve() not in one.resolve().parents]
            found += [(one, one.relative_to(path)) for one in inside]
        elif path.is_file():
            found.append((path, Path(path.name)))
        else:
            raise ValueError(f"{path}: no such file or folder")
    return found


def plan_tasks(args: argparse.Namespace, scale: float) -> list[Task]:
    """Where everything goes: <name>_x<scale>.png, with the old suffix in it where two have one name.

    Raises:
        ValueError: as find_inputs, or a name is given where a folder is needed.
    """
    output = Path(args.output)
    found = find_inputs([*args.inputs, *args.input], output)
    named = output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir()
    if named and len(found) > 1:
        raise ValueError(
            f"--output {output} names one image, but there are {len(found)} inputs: give a folder"
        )
    together = Counter(relative.with_suffix("") for _, relative in found)
    tasks = []
    for source, relative in found:
        stem = relative.stem if together[relative.with_suffix("")] == 1 else relative.name.replace(".", "_")
        base = relative.with_name(f"{stem}_x{scale:g}")
        target = output if named else output / base.with_name(base.name + ".png")
        uncertainty = None
        if args.uncertainty is not None:
            single = Path(args.uncertainty).with_suffix("")
            uncertainty = single if len(found) == 1 else Path(args.uncertainty) / base
        comparison, truth = None, None
        if args.compare is not None:
            comparison = target.with_name(f"{target.stem}_compare.png")
            truth = find_original(Path(args.compare), relative) if args.compare else None
        tasks.append(Task(source, target, comparison, truth, uncertainty))
    return tasks


def find_original(named: Path, relative: Path) -> Path:
    """The original of an image: the file that was named, or the one of the same name in that folder.

    Raises:
        ValueError: there is none.
    """
    if named.is_file():
        return named
    matching = sorted((named / relative.parent).glob(f"{glob.escape(relative.stem)}.*"))
    originals = [path for path in matching if path.suffix.lower() in IMAGE_SUFFIXES]
    if not originals:
        raise ValueError(f"--compare {named}: no original of {relative} there; name an image or its folder")
    return originals[0]


# ---------------------------------------------------------------------------------------------- the pictures


def write_uncertainty(path: Path, deviation: npt.NDArray[np.float32]) -> None:
    """Write path.npy, and path.png in which white is the largest deviation."""
    largest = max(float(deviation.max()), 1e-9)
    path.parent.mkdir(parents=True, exist_ok=True)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            np.save(stream, deviation)

    write_atomically(path.with_name(path.name + ".npy"), save)
    write_image(path.with_name(path.name + ".png"), np.round(deviation / largest * 255).astype(np.uint8))


# --------------------------------------------------------------------------------------------------- the work


def restore_file(task: Task, restorer: Restorer, overwrite: bool, progress: Progress) -> str:
    """Restore one file and write what belongs to it; returns what is to be said about it, if anything.

    Raises: one of FILE_ERRORS; nothing is half-written then.
    """
    check_targets(task, overwrite)
    source = decode_image(task.source)
    truth = None if task.truth is None else read_rgb(task.truth)
    task.target.parent.mkdir(parents=True, exist_ok=True)
    height, width = restorer.scale.high_size(*source.pixels.shape[:2])
    check_format(
        task.target,
        height,
        width,
        source.pixels.dtype,
        has_alpha=source.alpha is not None,
        metadata=source.metadata,
    )
    restoration = restorer.restore(source, deviation=task.uncertainty is not None, progress=progress)
    write_results(task, source, restoration, float(restorer.scale), truth)
    return f"first of {source.frames} frames" if source.frames > 1 else ""


def write_results(
    task: Task, source: DecodedImage, restoration: Restoration, scale: float, truth: Pixels | None
) -> None:
    """Write the side results, then the restored image: where that exists, all of them do."""
    if task.comparison is not None:
        bicubic = upscale_image(source.pixels, scale)
        picture = comparison_picture(source.pixels, bicubic, restoration.pixels, truth)
        write_image(task.comparison, picture)
    if task.uncertainty is not None and restoration.deviation is not None:
        write_uncertainty(task.uncertainty, restoration.deviation)
    restoration.save(task.target)


def check_targets(task: Task, overwrite: bool) -> None:
    """Refuse to replace a file unless told to, and the source itself in any case."""
    targets = [task.target] if task.comparison is None else [task.target, task.comparison]
    if task.uncertainty is not None:
        name = task.uncertainty.name
        targets += [task.uncertainty.with_name(name + suffix) for suffix in (".png", ".npy")]
    for target in targets:
        if target.exists() and target.samefile(task.source):
            raise ValueError(f"{target}: is the input itself; give another --output")
        if target.exists() and not overwrite:
            raise ValueError(f"{target}: exists already; use --overwrite or another --output")


def restore_all(tasks: Sequence[Task], restorer: Restorer, overwrite: bool) -> int:
    """Restore every image; returns the exit status: 0, 1 where some failed, 2 where all did."""
    failures: list[str] = []
    for number, task in enumerate(tasks, start=1):
        name = f"[{number}/{len(tasks)}] {task.source.name}"
        try:
            with tqdm(total=100, desc=name, bar_format=BAR) as bar:
                remark = restore_file(task, restorer, overwrite, functools.partial(_show, bar))
        except FILE_ERRORS as error:
            failures.append(_one_line(error))
            continue
        print(f"{task.target}" + (f" ({remark})" if remark else ""), flush=True)
    for failure in failures:
        print(f"infer.py: error: {failure}", file=sys.stderr)
    if not failures:
        return 0
    print(f"infer.py: {len(failures)} of {len(tasks)} images not restored", file=sys.stderr)
    return 2 if len(failures) == len(tasks) else 1


def _show(bar: "tqdm[Never]", share: float) -> None:
    bar.update(round(100 * share) - bar.n)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def export(model: LoadedModel[UNet], target: Path, overwrite: bool) -> None:
    """Write the model as .safetensors.

    Raises:
        ValueError: another suffix, or the file exists and may not be replaced.
    """
    if target.suffix != ".safetensors":
        raise ValueError(f"--export {target}: the name must end in .safetensors")
    if target.exists() and not overwrite:
        raise ValueError(f"--export {target}: exists already; use --overwrite or another name")
    export_safetensors(model, target)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


def run(args: argparse.Namespace) -> int:
    """Load, restore, report; returns the exit status."""
    config = make_config(args)
    model = load_model(args.weights_path or released_model(args.scale or 4), UNet)
    if args.export is not None:
        export(model, Path(args.export), args.overwrite)
        if not args.inputs and not args.input:
            return 0
    device = select_device(args.device)
    precision = autocast_dtype(device, args.dtype)
    restorer = Restorer(model, config, device, precision)
    scale = float(restorer.scale)
    if args.scale not in (None, scale):
        raise ValueError(f"--scale {args.scale:g}, but {args.weights_path} enlarges by {scale:g}")
    tasks = plan_tasks(args, scale)
    if args.compile:
        compile_network(model.network, device)
    return restore_all(tasks, restorer, args.overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except OptionError as error:
        print(f"infer.py: error: {with_flag(error, [RestoreConfig])}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"infer.py: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("infer.py: stopped; finished images are whole, run again to do the others", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
