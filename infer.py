"""Restore photos with a trained model: a file or a folder in, enlarged images out.

python infer.py photo.png
python infer.py --weights_path model.pth --input photos --output out --mode fidelity
python infer.py --weights_path model.pth --export model.safetensors
torchrun --nproc_per_node 4 infer.py photos
"""

import argparse
import contextlib
import io
import itertools
import logging
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn, cast, get_args

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the imports below take seconds, Ctrl-C just ends it

from PIL import ImageColor
from torch import nn
from tqdm import tqdm

from engine.checkpoint import released_model
from engine.cli import with_flag
from engine.device import Precision, autocast_dtype, compile_network, is_out_of_memory
from engine.options import OptionError, add_flags, from_args
from engine.processes import Processes, started_processes
from engine.signals import STOPPING
from evaluation.pairs import find_original
from imaging.atomic import check_outputs, is_disk_error
from imaging.files import WRITABLE_SUFFIXES, list_images
from models import LoadedModel, export_safetensors, load_model
from restoration import RestoreConfig, Restorer, blend
from restoration.batch import FILE_ERRORS, Task, describe_failure, one_line, restore_file
from restoration.denoiser import Progress
from restoration.rescaled import AnyScale, build_restorer, find_weights

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
SECONDS_BETWEEN_LINES = 30  # of progress, where stderr is a log
# A name that ends like this means a file: .pgn is a slip of the fingers, .5 and .restored are not.
FILE_LIKE = re.compile(r"\.[a-z][a-z0-9]{2,3}", re.IGNORECASE)


class Stopped(BaseException):
    """A signal asked to stop; its number is the argument."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    _add_file_flags(parser.add_argument_group("files").add_argument)
    add_flags(parser.add_argument_group("restoring"), RestoreConfig)
    add = parser.add_argument_group("computing").add_argument
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    precision = "auto is bf16 where the device has it natively (default: auto)"
    add("--precision", choices=get_args(Precision), default="auto", help=precision)
    compiled = "torch.compile: a minute per new size of image, no gain on CPUs"
    add("--compile", action="store_true", help=compiled)
    return parser


def _add_file_flags(add: Callable[..., object]) -> None:
    add("inputs", nargs="*", metavar="INPUT", help="images, or folders of images")
    add("--input", nargs="+", default=[], metavar="INPUT", help="the same")
    weights = (
        "photo or clean, the project's own for photos and for what bicubic shrank; or FILE, a checkpoint "
        "(.pth) or model (.safetensors) (default: photo if there is one for the scale, else clean)"
    )
    add("--weights", "--weights_path", dest="weights_path", metavar="photo|clean|FILE", help=weights)
    strength = "from 0, as the clean weights restore, to 1, as those of --weights do: blends the two"
    add("--strength", type=float, help=strength)
    add("--scale", type=float, help="the enlargement, above 1 and at most 16 (default: the model's largest)")
    output = "folder, or for one image the name of the result (default: ./restored)"
    add("--output", default="./restored", help=output)
    formats = sorted(suffix[1:] for suffix in WRITABLE_SUFFIXES)
    add("--format", choices=formats, help="of the results in a folder (default: png)")
    add("--overwrite", action="store_true", help="replace results that exist")
    add("--skip_existing", action="store_true", help="leave out images whose result exists")
    strip = "leave out colour profile, EXIF, XMP, resolution and texts, which a result has from its input"
    add("--strip", action="store_true", help=strip)
    background = "put transparent images on a colour such as white or #ff8800 (default: keep transparency)"
    add("--background", metavar="COLOUR", help=background)
    compare = (
        "also write input, bicubic, restored and, if given, the original side by side; ORIGINAL is a file or "
        "a folder of images of the same names or such as 0801.png for 0801x4.png"
    )
    add("--compare", nargs="?", const=True, metavar="ORIGINAL", help=compare)
    uncertainty = (
        "also write the standard deviation over the samples, as MAP.png and MAP.npy; for several images "
        "MAP is a folder"
    )
    add("--uncertainty", metavar="MAP", help=uncertainty)
    tokens = "folder of tokens that describe the images, NAME.safetensors or NAME.npy, for models trained so"
    add("--tokens", metavar="DIR", help=tokens)
    export = "write the model as MODEL.safetensors (half precision); without inputs, nothing else"
    add("--export", metavar="MODEL", help=export)


def check_flags(args: argparse.Namespace) -> None:
    """ValueError for wrong values of the script's own flags, before anything is read."""
    if "" in (*args.inputs, *args.input):
        raise ValueError("an input is '': give a name")
    for name, value in vars(args).items():
        if value == "":
            raise ValueError(f"--{name} is '': give a name")
    if args.overwrite and args.skip_existing:
        raise ValueError("--overwrite and --skip_existing: give one of the two")
    if args.export is not None and Path(args.export).suffix != ".safetensors":
        raise ValueError(f"--export {args.export}: the name must end in .safetensors")
    if args.background is not None:
        try:
            ImageColor.getrgb(args.background)
        except ValueError as error:
            raise ValueError(f"--background is {args.background!r}: give white or #ff8800") from error
    if args.uncertainty is not None and args.num_images < 2:
        raise ValueError("--uncertainty measures how samples differ: give --num_images of at least 2")


def find_inputs(names: Sequence[str], output: Path) -> list[tuple[Path, Path]]:
    """The images that were named, each once, with its path below the output folder; ValueError for none."""
    if not names:
        raise ValueError("no input: name images or folders, for example: infer.py photo.png")
    found: dict[Path, tuple[Path, Path]] = {}  # by what it is, however it was named
    results = output.resolve()
    for path in map(Path, names):
        if path.is_file():
            found.setdefault(path.resolve(), (path, Path(path.name)))
            continue
        if not path.is_dir():
            raise ValueError(f"{path}: no such file or folder")
        if path.resolve() == results:
            raise ValueError(f"--output {output} is the input folder: give another one")
        below = path.resolve() in results.parents  # results of an earlier run are no inputs
        for one in list_images(path):
            if not (below and results in one.resolve().parents):
                found.setdefault(one.resolve(), (one, one.relative_to(path)))
    return list(found.values())


def names_a_file(text: str) -> bool:
    """Whether --output means a file, not a folder; ValueError: one that cannot be written."""
    output = Path(text)
    if output.is_dir() or text.endswith(("/", os.sep)):
        return False
    if output.suffix.lower() in WRITABLE_SUFFIXES:
        return True
    if output.exists():
        raise ValueError(f"--output {text} is a file already, and no image: give another name")
    if FILE_LIKE.fullmatch(output.suffix):
        known = ", ".join(sorted(WRITABLE_SUFFIXES))
        remedy = f"use one of {known}, or end the name of a folder with /"
        raise ValueError(f"--output {text}: {output.suffix} cannot be written; {remedy}")
    return False


def plan_tasks(args: argparse.Namespace, scale: float) -> list[Task]:
    """Where everything goes: <name>_x<scale>.png, with the old suffix in it where two have one name.

    ValueError: no input, or a file is named where a folder is needed.
    """
    output, named = Path(args.output), names_a_file(args.output)
    found = find_inputs([*args.inputs, *args.input], output)
    if named and len(found) > 1:
        raise ValueError(f"--output {output} names one image, but there are {len(found)}: give a folder")
    if named and args.format is not None:
        raise ValueError(f"--format {args.format}: --output {output} says it already; leave one out")
    tokens = None if args.tokens is None else Path(args.tokens)
    together = Counter(relative.with_suffix("") for _, relative in found)
    tasks = []
    for source, relative in found:
        stem = relative.stem if together[relative.with_suffix("")] == 1 else relative.name.replace(".", "_")
        base = relative.with_name(f"{stem}_x{scale:g}")
        target = output if named else output / base.with_name(f"{base.name}.{args.format or 'png'}")
        comparison = target.with_name(f"{target.stem}_compare.png") if args.compare else None
        given = isinstance(args.compare, str)
        truth = original_of(relative, Path(args.compare), scale, len(found)) if given else None
        maps = None if args.uncertainty is None else Path(args.uncertainty)
        if maps is not None and len(found) > 1:
            maps = maps / base
        elif maps is not None and maps.suffix in (".png", ".npy"):
            maps = maps.with_suffix("")
        tasks.append(Task(source, target, comparison, truth, maps, tokens))
    return tasks


def original_of(relative: Path, named: Path, scale: float, inputs: int) -> Path:
    """The named file, or the fitting one in the named folder; ValueError where none fits."""
    if named.is_file():
        if inputs > 1:
            raise ValueError(f"--compare {named} is one image, but there are {inputs} inputs: give a folder")
        return named
    return find_original(relative, list_images(named / relative.parent, recursive=False), scale)


def check_targets(tasks: Sequence[Task], overwrite: bool) -> None:
    """Raise ValueError for what could not be written, or would replace what it should not."""
    taken: dict[Path, Path] = {}
    for task in tasks:
        if task.target in taken:
            both = f"{taken[task.target]} and {task.source} would both become {task.target}"
            raise ValueError(f"{both}: restore one at a time, each into an --output of its own")
        taken[task.target] = task.source
    targets = [target for task in tasks for target in task.targets]
    inputs = [task.source for task in tasks] + [task.truth for task in tasks if task.truth is not None]
    remedy = "use --overwrite, --skip_existing or another --output"
    check_outputs(targets, inputs=inputs, overwrite=overwrite, remedy=remedy)


def restore_all(
    tasks: Sequence[Task], restorer: Restorer | AnyScale, args: argparse.Namespace, processes: Processes
) -> int:
    """Restore this process's part; returns the status of all: 0, 1 where some failed, 2 where all did."""
    background = None if args.background is None else ImageColor.getrgb(args.background)[:3]
    failures: list[str] = []
    done = 0
    for number in range(processes.rank, len(tasks), processes.world_size):
        task = tasks[number]
        try:
            with shown(f"[{number + 1}/{len(tasks)}] {task.source.name}", processes.is_main) as progress:
                remark = restore_file(task, restorer, progress, strip=args.strip, background=background)
        except FILE_ERRORS as error:
            failures.append(describe_failure(error, task.source, task.target))
            if is_disk_error(error):
                failures.append("no further image can be written: mend that, then go on with --skip_existing")
                break
            continue
        done += 1
        say(f"{task.target}" + (f" ({remark})" if remark else ""))
    parts = processes.gather((done, failures))
    done = sum(part for part, _ in parts)
    if processes.is_main:
        for failure in itertools.chain.from_iterable(one for _, one in parts):
            warn(f"error: {failure}")
        if done < len(tasks):
            warn(f"{len(tasks) - done} of {len(tasks)} images not restored")
    return 0 if done == len(tasks) else 1 if done else 2


@contextlib.contextmanager
def shown(name: str, is_main: bool) -> Iterator[Progress]:
    """Progress of one image: a bar on a terminal, and in a log a line now and then."""
    last = time.monotonic()

    def log(part: float) -> None:
        nonlocal last
        if is_main and time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            warn(f"{name}: {100 * part:.0f} %")

    if is_main and sys.stderr.isatty():
        with tqdm(total=100, desc=name, bar_format=BAR) as bar:
            yield lambda part: bar.update(round(100 * part) - bar.n)
    else:
        yield log


def open_models(args: argparse.Namespace, is_main: bool) -> list[LoadedModel]:
    """The models that the flags name, which the main process says unless a flag names its file."""
    paths = find_weights(args.weights_path, args.scale)
    models = [load_model(path) for path in paths]
    said = None if paths == [Path(args.weights_path or "")] else ", ".join(map(str, paths))
    if args.strength is not None:
        clean = released_model(float(models[0].network.scale))
        if paths[0] == clean:
            raise ValueError(f"--strength blends {clean} with other weights: give --weights photo or a file")
        models[0] = blend(load_model(clean), models[0], args.strength)
        said = f"{args.strength:g} of the way from {clean} to {', '.join(map(str, paths))}"
    if is_main and said:
        warn(f"weights: {said}")
    return models


def run(args: argparse.Namespace, processes: Processes) -> int:
    check_flags(args)
    config = from_args(RestoreConfig, args)
    models = open_models(args, processes.is_main)
    if args.export is not None:
        if len(models) > 1:
            raise ValueError(f"--export: --scale {args.scale:g} takes several models; give one of theirs")
        target = Path(args.export)
        check_outputs([target], inputs=[Path(args.weights_path or "")], overwrite=args.overwrite)
        export_safetensors(models[0], target)
        say(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
        if not args.inputs and not args.input:
            return 0
    device = processes.device
    restorer = build_restorer(models, config, args.scale, device, autocast_dtype(device, args.precision))
    tasks = plan_tasks(args, float(restorer.scale))
    if args.skip_existing:
        missing = [task for task in tasks if not task.target.exists()]
        missing = processes.gather(missing)[0]  # of the one moment that all share
        if processes.is_main:
            warn(f"{len(tasks) - len(missing)} of {len(tasks)} images have a result already")
        tasks = missing
    check_targets(tasks, args.overwrite or args.skip_existing)
    processes.gather(None)  # none begins to write before all have checked
    if args.compile:
        for one in models:
            compile_network(cast(nn.Module, one.network), device)
    return restore_all(tasks, restorer, args, processes)


def say(text: str) -> None:
    """Print a line, or go on without stdout where it takes no more."""
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            warn(f"stdout cannot be written ({error.strerror}); going on without it")
        # What is still buffered must not fail again when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for the rest of the process


def warn(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"infer.py: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stopping_at_signals() -> Iterator[None]:
    """Signals raise Stopped; a second one ends the process at once."""
    # What the parent ignores, as nohup does SIGHUP, stays ignored.
    heeded = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, _stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for one in STOPPING:
        if signal.getsignal(one) == _stop:
            signal.signal(one, signal.SIG_DFL)
    raise Stopped(number)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal has no letters for
    args = build_parser().parse_args(argv)
    try:
        with stopping_at_signals(), started_processes(args.device, timedelta(days=7)) as processes:
            return run(args, processes)
    except OptionError as error:
        warn(f"error: {with_flag(error, [RestoreConfig])}")
    except (ValueError, OSError) as error:
        warn(f"error: {one_line(error)}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        warn(f"error: out of memory: {one_line(error)}")
    except (KeyboardInterrupt, Stopped) as error:
        number = signal.Signals(error.args[0] if isinstance(error, Stopped) else signal.SIGINT)
        warn(f"stopped by {number.name}; finished images are whole, --skip_existing does the others")
        return 128 + number
    return 2


if __name__ == "__main__":
    sys.exit(main())
