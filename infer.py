"""Restore photos with a trained model: a file or a folder in, enlarged images out.

python infer.py photo.png
python infer.py --weights_path model.pth --input photos --output out --mode fidelity
python infer.py --weights_path model.pth --export model.safetensors
torchrun --nproc_per_node 4 infer.py photos
"""

import argparse
import itertools
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the imports below take seconds, Ctrl-C just ends it

import torch
from PIL import ImageColor

from engine.cli import Parser, expand, in_processes, run_script, say, warn
from engine.device import ComputingOptions, autocast_dtype
from engine.options import OptionError, add_flags, from_args, path
from engine.processes import Processes
from engine.progress import progress
from imaging.atomic import check_outputs, is_disk_error
from imaging.kinds import WRITABLE_SUFFIXES, list_images
from imaging.pairs import find_original
from models import LoadedModel, export_safetensors
from network import network_class
from restoration import RestoreConfig, Restorer
from restoration.files import FILE_ERRORS, Task, describe_failure, restore_file
from restoration.scales import Chain, chain_to, check
from restoration.weights import add_weights_flags, load_models


def build_parser() -> Parser:
    parser = Parser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    group = parser.add_argument_group("files")
    add, add_either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("inputs", nargs="*", metavar="INPUT", help="images, or folders of images")
    add("--input", nargs="+", default=[], metavar="INPUT", help="the same")
    add_weights_flags(group, default="by the scale")
    add("--scale", type=float, help="enlargement, above 1 and at most 16 (default: the model's)")
    output = "folder, or for one image the name of the result (default: ./restored)"
    add("--output", type=path, default="./restored", help=output)
    formats = sorted(suffix[1:] for suffix in WRITABLE_SUFFIXES)
    add("--format", choices=formats, help="format of the results in a folder (default: png)")
    add_either("--overwrite", action="store_true", help="permission to replace results that exist")
    add_either("--skip_existing", action="store_true", help="images whose result exists are left out")
    strip = "results without colour profile, EXIF, XMP, resolution and texts, which else are the input's"
    add("--strip", action="store_true", help=strip)
    background = "colour to put transparent images on, white or #ff8800 (default: keep transparency)"
    add("--background", type=colour, metavar="COLOUR", help=background)
    compare = "picture of input, bicubic, restored and the original, a file or a folder of such names"
    add("--compare", nargs="?", type=path, const=True, metavar="ORIGINAL", help=compare)
    uncertainty = "standard deviation over the samples, as MAP.png and MAP.npy; for several images a folder"
    add("--uncertainty", type=path, metavar="MAP", help=uncertainty)
    tokens = "folder of tokens that describe the images, NAME.safetensors or NAME.npy, for models trained so"
    add("--tokens", type=path, metavar="DIR", help=tokens)
    export = "name for the model as .safetensors (half precision); without inputs, nothing else is done"
    add("--export", type=path, metavar="MODEL", help=export)
    add_flags(parser.add_argument_group("restoring"), RestoreConfig)
    add_flags(parser.add_argument_group("computing"), ComputingOptions)
    return parser


def colour(text: str) -> tuple[int, ...]:
    """Red, green and blue in [0, 255]; one that is transparent itself would leave a question open."""
    with suppress(ValueError):
        red_green_blue = ImageColor.getrgb(text)
        if len(red_green_blue) == 3:
            return red_green_blue
    raise argparse.ArgumentTypeError(f"{text!r} is no colour without transparency; give white or #ff8800")


def find_inputs(names: Sequence[str], output: Path) -> list[tuple[Path, Path]]:
    """List the named images, each once, with its path below the output folder; ValueError for none."""
    if not names:
        raise ValueError("no input: name images or folders, for example: infer.py photo.png")
    inputs: dict[Path, tuple[Path, Path]] = {}  # by what it is, however it was named
    results = output.resolve()
    for named in map(Path, expand(names)):
        if not named.exists():
            raise ValueError(f"{named}: no such file or folder")
        if named.is_dir() and named.resolve() == results:
            raise ValueError(f"--output {output} is the input folder: give another one")
        top, images = (named, list_images(named)) if named.is_dir() else (named.parent, [named])
        below = named.resolve() in results.parents  # results of an earlier run are no inputs
        for one in images:
            if not (below and results in one.resolve().parents):
                inputs.setdefault(one.resolve(), (one, one.relative_to(top)))
    return list(inputs.values())


def names_a_file(output: str) -> bool:
    """Tell whether --output means a file, not a folder; ValueError: one that cannot be written."""
    name = Path(output)
    if name.is_dir() or output.endswith(("/", os.sep)) or not (name.suffix or name.exists()):
        return False
    if name.suffix.lower() not in WRITABLE_SUFFIXES:
        known = ", ".join(sorted(WRITABLE_SUFFIXES))
        raise ValueError(f"--output {output}: use one of {known}, or end the name of a folder with /")
    return True


def plan_tasks(args: argparse.Namespace, scale: float) -> list[Task]:
    """Plan where everything goes: <name>_x<scale>.png, with the old suffix in it where two have one name.

    ValueError: no input, a file where a folder is needed, or two results of one name.
    """
    output, named = Path(args.output), names_a_file(args.output)
    inputs = find_inputs([*args.inputs, *args.input], output)
    if named and len(inputs) > 1:
        raise ValueError(f"--output {output} names one image, but there are {len(inputs)}: give a folder")
    if named and args.format is not None:
        raise ValueError(f"--format {args.format}: --output {output} says it already; leave one out")
    together = Counter(relative.with_suffix("") for _, relative in inputs)
    tasks: dict[Path, Task] = {}
    for source, relative in inputs:
        stem = relative.stem if together[relative.with_suffix("")] == 1 else relative.name.replace(".", "_")
        base = relative.with_name(f"{stem}_x{scale:.7g}")
        target = output if named else output / base.with_name(f"{base.name}.{args.format or 'png'}")
        if target in tasks:
            both = f"{tasks[target].source} and {source} would both become {target}"
            raise ValueError(f"{both}: restore one at a time, each into an --output of its own")
        given = isinstance(args.compare, str)
        tasks[target] = Task(
            source,
            target,
            target.with_name(f"{target.stem}_compare.png") if args.compare else None,
            original_of(relative, Path(args.compare), scale, len(inputs)) if given else None,
            [] if args.uncertainty is None else maps_of(base, Path(args.uncertainty), len(inputs)),
            None if args.tokens is None else Path(args.tokens),
            args.strip,
            args.background,
        )
    return list(tasks.values())


def original_of(relative: Path, named: Path, scale: float, inputs: int) -> Path:
    """Return the named file, or the fitting one in the named folder; ValueError where none fits."""
    if named.is_file():
        if inputs > 1:
            raise ValueError(f"--compare {named} is one image, but there are {inputs} inputs: give a folder")
        return named
    return find_original(relative, list_images(named / relative.parent, recursive=False), scale)


def maps_of(base: Path, named: Path, inputs: int) -> list[Path]:
    """List the files of an uncertainty map, NAME.png and NAME.npy."""
    if inputs > 1:
        named = named / base
    name = named.stem if named.suffix in (".png", ".npy") else named.name
    return [named.with_name(name + ending) for ending in (".png", ".npy")]


def run(args: argparse.Namespace, processes: Processes) -> int:
    """Restore this process's part; returns the status of all: 0, 1 where some failed, 2 where all did."""
    chain, tasks = prepare(args, processes)
    failures: list[str] = []
    done = 0
    for number in range(processes.rank, len(tasks), processes.world_size):
        task, name = tasks[number], f"[{number + 1}/{len(tasks)}] {tasks[number].source.name}"
        try:
            with progress(name, 100, hidden=not processes.is_main) as show:
                remark = restore_file(task, chain, lambda part: show(round(100 * part), ""))
        except OptionError:
            raise  # it would be the same for every image
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
            warn("infer.py", f"error: {failure}")
        if done < len(tasks):
            warn("infer.py", f"{len(tasks) - done} of {len(tasks)} images not restored")
    return 0 if done == len(tasks) else 1 if done else 2


def open_models(args: argparse.Namespace) -> tuple[list[LoadedModel], str]:
    """Load the models for the scale, export one if asked to, and name them."""
    loaded = load_models(args.weights_path, args.scale, network_class(args.network))
    models, names = [*loaded.values()], ", ".join(map(str, loaded))
    if args.export is not None:
        target = Path(args.export)
        if len(models) > 1:
            raise ValueError(f"--export: --scale {args.scale:g} takes several models; give one of theirs")
        if target.suffix != ".safetensors":
            raise ValueError(f"--export {target}: the name must end in .safetensors")
        check_outputs([target], inputs=loaded, overwrite=args.overwrite)
        export_safetensors(models[0], target)
        say(f"{target}: {target.stat().st_size / 1e6:.1f} MB, from {names}")
    return models, names


def prepare(args: argparse.Namespace, processes: Processes) -> tuple[Chain, list[Task]]:
    """Load, plan and check everything; no task where a model is to be exported and nothing else."""
    config, device = from_args(RestoreConfig, args), processes.device
    models, names = open_models(args)
    precision = autocast_dtype(device, args.precision)
    chain = chain_to(args.scale, [Restorer(one, config, device, precision) for one in models])
    if args.export is not None and not (args.inputs or args.input):
        return chain, []
    check(chain, deviation=args.uncertainty is not None, tokens=args.tokens is not None)
    tasks = plan_tasks(args, float(chain.scale))
    if args.skip_existing:
        missing = processes.gather([task for task in tasks if not task.target.exists()])[0]
        if processes.is_main:
            warn("infer.py", f"{len(tasks) - len(missing)} of {len(tasks)} images have a result already")
        tasks = missing  # of the one moment that all share
    check_outputs(
        [path for task in tasks for path in (task.comparison, *task.maps, task.target) if path is not None],
        inputs=[path for task in tasks for path in (task.source, task.truth) if path is not None],
        overwrite=args.overwrite or args.skip_existing,
        remedy="use --overwrite, --skip_existing or another --output",
    )
    processes.gather(None)  # none begins to write before all have checked
    if processes.is_main:
        warn("infer.py", f"{names}, on {device} in {str(precision or torch.float32).removeprefix('torch.')}")
    return chain, tasks


def main(argv: Sequence[str] | None = None) -> int:
    stopped = "finished images are whole, --skip_existing does the others"
    work = partial(in_processes, build_parser(), argv, run)
    return run_script("infer.py", work, [RestoreConfig], stopped=stopped)


if __name__ == "__main__":
    sys.exit(main())
