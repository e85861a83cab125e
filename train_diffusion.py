"""Train a diffusion super-resolution model on a folder of images.

python train_diffusion.py --image_folder photos
python train_diffusion.py @recipes/x4.args --image_folder photos
python train_diffusion.py --weights_path checkpoints/<run>/diffusion_model_v_prediction_last.pth
"""

import argparse
import contextlib
import functools
import hashlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
import torchinfo

from degradation import Degradation
from diffusion import DiffusionModel, ObjectiveConfig, ProcessConfig, ResidualGenerator
from engine.checkpoint import Checkpoint, load_weights, read_for_resume
from engine.cli import Parser, expand_recipes, run_script, say
from engine.device import ComputingOptions, autocast_dtype, tune_for_training
from engine.options import OptionError, Options, add_flags, option, path, specs
from engine.processes import Processes, started_processes
from engine.run import RunFiles, locked, new_folder
from evaluation.lpips import Lpips, MetricUnavailableError, PerceptualFeatures
from evaluation.validation import Validator
from imaging.cache import CachedReader, default_cache_dir
from imaging.kinds import list_images
from models import LoadedModel
from network import NETWORK_FLAG, Network, name_of, network_class
from restoration.weights import load_model
from sharpening import Sharpening, SharpeningConfig
from training import BatchPlan, ResolvedConfig, TrainingConfig, learning_rate_at
from unet import UNet
from util import Augmentation, ImageDataset

logger = logging.getLogger(__name__)
MOST_HELD_OUT = 64  # images of the folder, where there is no --val_folder
FEW_STEPS = 4000  # a run of fewer learns little of photos
RECIPE = Path(__file__).parent / "recipes" / "x4.args"  # for folders that the defaults make so short
CPU_STEPS = 6000  # of it on a CPU; as many as it says elsewhere
Datasets = tuple[ImageDataset, ImageDataset]  # of training and of validation


@dataclass(frozen=True)
class DataOptions(Options):
    image_folder: str = option("./data", "folder of photos, with its subfolders", path=True)
    val_folder: str | None = option(None, "folder to validate on alone; else a part is held out", path=True)
    val_fraction: float = option(0.05, "part of the folder to hold out, at most 64 images", above=0, high=0.9)
    img_size: int = option(256, "side of the crops, in pixels of the high resolution", low=8)
    tokens: str | None = option(None, "folder of tokens (N, E), NAME.safetensors or NAME.npy", path=True)
    augment: Augmentation = option("flip", "flip: left-right; dihedral: all 8 flips and rotations")
    cache_dir: str | None = option(None, "folder of decoded images; else in the user's cache", path=True)
    cache_gb: float = option(4.0, "gigabytes of decoded images in it; 0: none", low=0, fixed=False)


@dataclass(frozen=True)
class RunOptions(ComputingOptions):
    residual_std: float | None = option(None, "divisor of the residuals; by default measured", above=0)
    checkpoint_activations: bool = option(False, "less memory, a third more time", fixed=False)
    compile: bool = option(False, "torch.compile of the network: a slow start", fixed=False)
    log_dir: str = option("./logs", "folder of TensorBoard's logs", path=True)
    checkpoint_dir: str = option("./checkpoints", "folder for a folder of each run", path=True)
    perceptual_features: str | None = option(None, "weights of torchvision's VGG16; else fetched", path=True)
    init_weights: str | None = option(None, "model to start from: clean, photo or a file", fixed=False)


class Settings(NamedTuple):
    """Every option of a run, by section, as in checkpoints."""

    data: DataOptions
    degradation: Degradation
    network: Options
    process: ProcessConfig
    objective: ObjectiveConfig
    sharpening: SharpeningConfig
    training: TrainingConfig
    run: RunOptions
    network_class: type[Network] = UNet

    @staticmethod
    def sections(network: type[Network] = UNet) -> dict[str, type[Options]]:
        """Return the class of each section's options, which make its flags."""
        kinds = {**get_type_hints(Settings), "network": network.Config}
        return {name: kinds[name] for name in Settings._fields if name != "network_class"}


def build_parser(show_rare: bool = False, network: type[Network] = UNet) -> Parser:
    """Make a parser that leaves out what is not given; recipes (@file) are expanded before."""
    parser = Parser(
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
        epilog="@FILE stands for the flags in it; flags after it win.",
        usage="%(prog)s [@FILE ...] [--FLAG VALUE ...]",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--help-all", action="help", help="all flags, those that are rarely set, too")
    parser.add_argument("--weights_path", type=path, help="checkpoint to resume from; needs no other flag")
    parser.add_argument("--network", **NETWORK_FLAG)
    for section, kind in Settings.sections(network).items():
        add_flags(parser.add_argument_group(section), kind, given_only=True, show_rare=show_rare)
    return parser


def parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Return the values of the flags that are given, also in recipes."""
    words = expand_recipes(argv)
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--network", default=name_of(UNet))
    network = network_class(first.parse_known_args(words)[0].network)
    return vars(build_parser(show_rare="--help-all" in words, network=network).parse_args(words))


def parse(argv: Sequence[str]) -> tuple[Settings, Checkpoint | None]:
    """Read the options of the run, from the checkpoint it resumes where not given, and that checkpoint.

    ValueError names the flag of a wrong value, or of one that contradicts the checkpoint.
    """
    given = parse_flags(argv)
    checkpoint = read_for_resume(given["weights_path"]) if "weights_path" in given else None
    content = {} if checkpoint is None else checkpoint.content
    network = network_class(given.get("network", content.get("network_class", name_of(UNet))))
    kinds, sections = Settings.sections(network), dict[str, Options]()
    if checkpoint is not None and "data" not in content:
        raise ValueError(f"{checkpoint.path} holds no settings of a training run: it cannot be resumed")
    for section, kind in kinds.items():
        own = {name: given[spec.flag] for name, spec in specs(kind).items() if spec.flag in given}
        if checkpoint is None:
            sections[section] = kind.of(**own)
        else:
            former = dict(content.get(section, {}))
            check_fixed(kind, former, own, checkpoint.path)
            former |= {"max_steps": None} if "epochs" in own else {}
            former |= {"init_weights": None} if section == "run" else {}
            sections[section] = kind.from_dict({**former, **own})
    settings = Settings(**sections, network_class=network)  # type: ignore[arg-type]  # each of its class
    if settings.process.levels and checkpoint is None and settings.run.init_weights is None:
        raise ValueError("--levels sharpen a diffusion model: give its file as --init_weights")
    return settings, checkpoint


def check_fixed(
    kind: type[Options], recorded: Mapping[str, object], given: Mapping[str, object], path: Path
) -> None:
    """Raise OptionError for an option that a resumed run must keep and that is given otherwise."""
    former = {**kind().to_dict(), **recorded}
    for name, value in given.items():
        spec = specs(kind)[name]
        if spec.fixed and not spec.path and value not in (former[name], "auto"):
            remedy = "leave the flag out, or start a new run with --init_weights"
            raise OptionError(name, value, f"{path} was trained with {former[name]}; {remedy}")


def flags_for_few_images(given: Collection[str], settings: Settings, processes: Processes) -> list[str]:
    """Return flags of the recipe where the defaults are too few steps to learn and nobody chose a length."""
    if {"epochs", "max_steps", "accumulation_steps"} & set(given):
        return []
    images = len(list_images(settings.data.image_folder))
    steps = settings.training.resolved(images, processes.world_size).max_steps
    if steps >= FEW_STEPS:
        return []
    flags = expand_recipes([f"@{RECIPE}"])
    flags += ["--max_steps", str(CPU_STEPS)] if processes.device.type == "cpu" else []
    if processes.is_main:
        say(
            f"{images} images would be {steps} steps, too few to learn from; so, unless you say otherwise: "
            f"{' '.join(flags)} (--epochs, --max_steps or --accumulation_steps leave all to you)"
        )
    return flags


def keep_global_batch(settings: Settings, checkpoint: Checkpoint, processes: Processes) -> Settings:
    """Accumulate more or less where a run goes on in another number of processes; ValueError: it cannot."""
    former, now = checkpoint.content.get("world_size", processes.world_size), processes.world_size
    training = settings.training
    passes = former * training.accumulation_steps
    if passes % now:
        raise ValueError(
            f"{checkpoint.path} was trained by {former} processes of {training.accumulation_steps} forward "
            f"passes a step: {now} processes cannot share {passes}; start a number that divides it"
        )
    if processes.is_main and former != now:
        say(f"{now} processes instead of {former}: {passes // now} forward passes each, the same step")
    return settings._replace(training=replace(training, accumulation_steps=passes // now))


def make_datasets(settings: Settings, held_out: Collection[str] | None) -> Datasets:
    """Make the datasets of training and validation, without a common file.

    `held_out` names, below the image folder, what a resumed run validates on; None chooses.
    """
    data = settings.data
    kind = getattr(settings.network, "conditioning", "tokens")
    if data.tokens is not None and kind != "tokens":
        raise OptionError("conditioning", kind, "choose tokens where there are --tokens")
    cache_dir = default_cache_dir() if data.cache_dir is None else Path(data.cache_dir)
    dataset = functools.partial(
        ImageDataset,
        img_size=data.img_size,
        augment=data.augment,
        seed=settings.training.seed,
        reader=CachedReader(cache_dir, round(data.cache_gb * 2**30)),
        degradation=settings.degradation,
        tokens=data.tokens,
    )
    training = dataset(list_images(data.image_folder))
    if data.val_folder is None:
        chosen = choose_held_out(training.paths, settings, held_out)
    else:
        chosen = list_images(data.val_folder)
    apart = {path.resolve() for path in chosen}
    rest = [path for path in training.paths if path.resolve() not in apart]
    if rest:
        training.paths = rest
    elif data.val_folder is None and len(training) == 1:
        logger.warning("only one image: it is validated on, too; give more images or --val_folder")
    else:
        raise ValueError(
            f"all of --image_folder {data.image_folder} is validated on: nothing is left to train on; give "
            "more images, or another --val_folder"
        )
    return training, dataset(chosen, train=False)


def choose_held_out(paths: Sequence[Path], settings: Settings, former: Collection[str] | None) -> list[Path]:
    """List those of `former` that are there or, if None, those whose names have the lowest hashes."""
    root, seed = Path(settings.data.image_folder), settings.training.seed
    names = {path.relative_to(root).as_posix(): path for path in paths}
    if former is None:
        count = min(MOST_HELD_OUT, max(1, round(settings.data.val_fraction * len(names))))
        hashed = {name: f"{seed}/{name}".encode("utf-8", "surrogateescape") for name in names}
        former = sorted(names, key=lambda name: hashlib.blake2b(hashed[name]).digest())[:count]
    gone = sorted(set(former) - names.keys())
    if len(gone) == len(former):
        raise ValueError(
            f"none of the {len(gone)} images that this run validates on, such as {gone[0]}, is in {root}: "
            "give the folder that has them as --image_folder, or others as --val_folder"
        )
    if gone:
        logger.warning(
            f"{len(gone)} of {len(former)} validation images are gone, such as {gone[0]}: from now on scores "
            "are of the others, and what has another name is trained on"
        )
    return [path for name, path in names.items() if name in former]


def make_model(settings: Settings, device: torch.device) -> Network:
    """Build the network on its device; ValueError for initial weights of another kind of model."""
    torch.manual_seed(settings.training.seed)
    kind, run = settings.network_class, settings.run
    model = kind.from_config(settings.network)
    if run.init_weights is not None:
        loaded = load_model(path(run.init_weights), settings.degradation.scale, kind)
        _check_start(loaded, settings, run.init_weights)
        load_weights(model, loaded.network.state_dict(), run.init_weights)
    if run.residual_std is not None:
        model.residual_std.fill_(run.residual_std)
    if run.checkpoint_activations and model.checkpoint_activations is None:
        raise OptionError("checkpoint_activations", True, f"{name_of(kind)} cannot; leave it out")
    model.checkpoint_activations = run.checkpoint_activations
    return model.to(memory_format=torch.channels_last).to(device)


def _check_start(loaded: LoadedModel, settings: Settings, path: str) -> None:
    there, here = float(loaded.network.scale), settings.degradation.scale
    if abs(there - here) > 1e-4:
        raise ValueError(f"--init_weights {path} enlarges by {there:g}, but --downscale_factor is {here:g}")
    former, wanted = loaded.process, settings.process
    start = replace(former, levels=wanted.levels, temperature=wanted.temperature)
    if start != wanted or (former.levels and not wanted.levels):
        raise ValueError(f"--init_weights {path} is of {former}, but this run has {wanted}")
    if loaded.degradation != settings.degradation:
        logger.warning("%s has learnt from another degradation: %s", path, loaded.degradation.describe())


def run_folders(settings: Settings, checkpoint: Checkpoint | None) -> tuple[Path, Path]:
    """Choose the folders of checkpoints and log: the resumed run's, or new ones named after mode and time."""
    if checkpoint is not None:
        folder = checkpoint.path.resolve().parent
    else:
        parent = settings.run.checkpoint_dir
        name = f"{settings.process.mode}_{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            folder = new_folder(Path(parent), name)
        except OSError as error:
            raise OptionError("checkpoint_dir", parent, f"{error.strerror}; give another place") from error
    return folder, Path(settings.run.log_dir) / folder.name


def describe_run(
    settings: Settings, config: ResolvedConfig, model: Network, data: Datasets, processes: Processes
) -> Iterator[str]:
    training, validation = data
    table = torchinfo.summary(model, depth=3, row_settings=("var_names",), col_width=17, verbose=0)
    yield str(table).translate(str.maketrans("\u251c\u2514\u2502\u2500", "||| "))  # some logs are ASCII
    plan = BatchPlan(len(training), config, processes.world_size)
    precision = autocast_dtype(processes.device, settings.run.precision)
    yield f"device {processes.device}, {precision or torch.float32}, {plan.world_size} process(es)"
    images, left_out = len(training), len(training.left_out)
    yield f"{images} training and {len(validation)} validation images, {left_out} left out"
    steps, crops = config.max_steps, min(plan.group_size, images)
    epochs = steps / plan.steps_per_epoch
    yield f"{steps} steps of up to {crops} crops, {plan.steps_per_epoch} steps per epoch, {epochs:.3g} epochs"
    if steps < FEW_STEPS:
        yield f"warning: {steps} steps teach a network little; @recipes/x4.args has what works for few images"
    yield f"watch it: tensorboard --logdir {shlex.quote(settings.run.log_dir)}"


def describe_resume(
    checkpoint: Checkpoint, settings: Settings, config: ResolvedConfig, images: int
) -> Iterator[str]:
    content, before = checkpoint.content, ResolvedConfig.from_dict(checkpoint.content["training"])
    step, steps = content["step"], config.max_steps
    yield f"resuming {checkpoint.path} at step {step} of {steps}"
    if content.get("images", images) != images:
        yield f"{images} training images instead of {content['images']}: the order of the data is another"
    if content["data"]["val_folder"] != settings.data.val_folder:
        yield "validated on other images than before: the best score so far is not of these"
    if step >= steps:
        yield "this run is finished: raise --max_steps to go on with it"
    elif steps != before.max_steps:
        rates = [learning_rate_at(step, config), learning_rate_at(max(0, step - 1), before)]
        yield (
            f"the run is {steps} steps long instead of {before.max_steps}, so the learning rate goes on at "
            f"{rates[0]:.2g}, after {rates[1]:.2g}"
        )


def record_of(settings: Settings, data: Datasets, processes: Processes) -> dict[str, object]:
    """Return what every checkpoint records of the data, the flags and the processes of a run."""
    (training, validation), folder = data, Path(settings.data.image_folder)
    below = [path.relative_to(folder).as_posix() for path in validation.paths if path.is_relative_to(folder)]
    sections = {name: getattr(settings, name).to_dict() for name in ("data", "run", "sharpening")}
    return {**sections, "images": len(training), "world_size": processes.world_size, "held_out": below}


def make_sharpening(
    settings: Settings, device: torch.device, precision: torch.dtype | None
) -> tuple[Sharpening | None, Lpips | None]:
    """Make the step of a sharpening and the metric that validates it, None for a diffusion's.

    ValueError without the features that both need.
    """
    if not settings.process.levels:
        return None, None
    try:
        features, lpips = PerceptualFeatures(device, settings.run.perceptual_features), Lpips(device)
    except MetricUnavailableError as error:
        remedy = "give --perceptual_features FILE and set SR_LPIPS_WEIGHTS to AlexNet's"
        raise ValueError(f"sharpening needs the features of VGG16 and AlexNet ({error}): {remedy}") from error
    generator = ResidualGenerator(device=device, process=settings.process, precision=precision)
    return Sharpening(generator, settings.degradation, features, settings.sharpening), lpips


def describe_end(run: RunFiles, received: int | None, world_size: int) -> Iterator[str]:
    if run.best.exists():
        yield f"best:   {run.best}"
    yield f"newest: {run.last}"
    if received is None:
        yield f"restore: python infer.py --weights_path {shlex.quote(str(run.best))} --input photo.png"
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    nodes = f"--nnodes {world_size // here} ... " if world_size > here else ""
    start = "python" if world_size == 1 else f"torchrun {nodes}--nproc_per_node {here}"
    yield f"resume: {start} train_diffusion.py --weights_path {shlex.quote(str(run.last))}"


def train(argv: Sequence[str]) -> int:
    """Train as the flags say; return 0, or 128 + n after signal n."""
    settings, checkpoint = parse(argv)
    with started_processes(settings.run.device) as processes:
        if checkpoint is not None:
            settings = keep_global_batch(settings, checkpoint, processes)
        elif flags := flags_for_few_images(parse_flags(argv), settings, processes):
            settings, _ = parse([*flags, *argv])
        received = run(settings, checkpoint, processes)
    return 0 if received is None else 128 + received


def run(settings: Settings, checkpoint: Checkpoint | None, processes: Processes) -> int | None:
    """Train in one of the processes; return None, or the signal that ended it early."""
    device, is_main = processes.device, processes.is_main
    precision = autocast_dtype(device, settings.run.precision)
    tune_for_training(device)
    make_step, lpips = make_sharpening(settings, device, precision)  # before the images are measured
    logging.disable(logging.NOTSET if is_main else logging.WARNING)  # of the images: all find the same
    data = make_datasets(settings, checkpoint and checkpoint.content.get("held_out"))
    logging.disable(logging.NOTSET)
    training, validation = data
    config = settings.training.resolved(len(training), processes.world_size)
    diffusion = DiffusionModel(device=device, process=settings.process, objective=settings.objective)
    model = make_model(settings, device)
    most_lost = settings.sharpening.most_psnr_lost
    validate = Validator(diffusion, validation, precision, processes, lpips, most_lost)
    checkpoint_dir, log_dir = run_folders(settings, checkpoint) if is_main else (Path(), Path())
    if is_main:  # the others write and say nothing
        say(*describe_run(settings, config, model, data, processes))
        say(*(describe_resume(checkpoint, settings, config, len(training)) if checkpoint else ()))
    if settings.run.compile:
        model.compile(dynamic=False)
    with locked(checkpoint_dir) if is_main else contextlib.nullcontext():
        files, received = diffusion.train(
            model,
            training,
            config,
            checkpoint_dir=checkpoint_dir,
            log_dir=log_dir,
            validate=validate,
            make_step=make_step,
            resume=checkpoint,
            processes=processes,
            precision=precision,
            record=record_of(settings, data, processes),
        )
    if is_main:
        say(*describe_end(files, received, processes.world_size))
    return received


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        "train_diffusion.py",
        lambda: train(sys.argv[1:] if argv is None else argv),
        options=list(Settings.sections().values()),
        out_of_memory="lower --batch_size and raise --accumulation_steps as much, or add "
        "--checkpoint_activations; the checkpoints are as they were",
        stopped="the checkpoints are as they were",
    )


if __name__ == "__main__":
    sys.exit(main())
