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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

import torch

from degradation import Degradation, Photo, degradation_from_dict
from diffusion import DiffusionModel, Distance, LossConfig, ProcessConfig
from engine.checkpoint import Checkpoint, LoadedModel, load_model, load_weights, read_for_resume
from engine.cost import Cost, count_cost, training_memory
from engine.device import (
    Precision,
    autocast_dtype,
    compile_network,
    is_out_of_memory,
    tune_for_training,
)
from engine.options import (
    OptionError,
    Options,
    Plain,
    add_flags,
    flag_of,
    from_args,
    option,
    specs,
    with_flag,
)
from engine.processes import Processes, started_processes
from engine.recipes import expand_recipes
from engine.run import RunFiles, locked, new_folder
from evaluation.lpips import MetricUnavailableError, perceptual_distance
from evaluation.validation import Validator
from imaging.cache import CachedReader
from imaging.files import list_images
from imaging.sizes import default_cache_dir
from training import (
    BatchPlan,
    NonFiniteError,
    TrainingConfig,
    WorkerError,
    learning_rate_at,
    optimizer_for,
)
from unet import Condition, UNet, UNetConfig, parameter_count
from util import Augmentation, ImageDataset

logger = logging.getLogger(__name__)
MOST_VALIDATION_IMAGES = 64
FEWEST_STEPS = 1000  # a run of fewer learns next to nothing of photos


@dataclass(frozen=True)
class DataOptions(Options):
    """Which images, and how they are cut."""

    image_folder: str = option("./data", "high-resolution images, searched recursively", fixed=False)
    val_folder: str | None = option(
        None, "validation images; by default part of the image folder", fixed=False
    )
    val_fraction: float = option(0.05, "share to validate on, at most 64 images", above=0, high=0.9)
    img_size: int = option(256, "side of the high-resolution training crops", low=8)
    tokens: str | None = option(
        None,
        "folder of tokens (N, E) that describe the images, NAME.safetensors or NAME.npy; needs "
        "--conditioning tokens and --context_dim E",
        fixed=False,
    )
    augment: Augmentation = option("flip", "flip: left-right; dihedral: all 8 flips and rotations")
    cache_gb: float = option(4.0, "disk for decoded images; 0 decodes each time", low=0, fixed=False)


@dataclass(frozen=True)
class RunOptions(Options):
    """Where and with what to compute, and where to write."""

    residual_std: float | None = option(None, "what residuals are divided by; by default measured", above=0)
    device: str = option("auto", "auto, cuda, mps or cpu", fixed=False)
    precision: Precision = option(
        "auto", "auto is bf16 on GPUs that have it; fp16 scales the loss, for those that do not", fixed=False
    )
    checkpoint_activations: bool = option(False, "less memory, a third more time", fixed=False)
    compile: bool = option(False, "torch.compile the network: a slow start", fixed=False)
    profile: bool = option(False, "write a trace of 5 steps into the logs", fixed=False)
    log_dir: str = option("./logs", "TensorBoard", fixed=False)
    checkpoint_dir: str = option("./checkpoints", "receives a folder for each run", fixed=False)
    perceptual_features: str | None = option(
        None, "for --perceptual_weight: VGG16's features as torchvision names them; else fetched", fixed=False
    )
    init_weights: str | None = option(None, "a model whose weights a new run starts from", fixed=False)


class Settings(NamedTuple):
    """Every option of a run, by section, as in checkpoints."""

    data: DataOptions
    degradation: Degradation
    network: UNetConfig
    process: ProcessConfig
    objective: LossConfig
    training: TrainingConfig
    run: RunOptions


SECTIONS: dict[str, type[Options]] = dict(
    zip(
        Settings._fields,
        (DataOptions, Photo, UNetConfig, ProcessConfig, LossConfig, TrainingConfig, RunOptions),
        strict=True,
    )
)
# What the script does otherwise than the classes, and flags that would have no meaning.
DEFAULTS: dict[str, dict[str, object]] = {
    "degradation": {"kind": "bicubic"},
    "training": {"accumulation_steps": 64},
    "network": {"predictor_blocks": 12, "scales": (4.0,)},
}
WITHOUT_FLAG = {"network": ("in_channels", "out_channels"), "degradation": ("scale",)}


def build_parser() -> argparse.ArgumentParser:
    """Recipes (@file) are expanded before: engine.recipes."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None,
        epilog="@FILE stands for the flags in it; flags after it win.",
    )
    parser.add_argument("--weights_path", help="a checkpoint to resume from; needs no other flag")
    for section, kind in SECTIONS.items():
        group = parser.add_argument_group(section)
        add_flags(group, kind, skip=WITHOUT_FLAG.get(section, ()), defaults=DEFAULTS.get(section, {}))
    return parser


def parse(argv: Sequence[str] | None) -> tuple[Settings, Checkpoint | None]:
    """The options of the run, from the checkpoint it resumes where not given, and that checkpoint.

    ValueError names the flag of a wrong value, or of one that contradicts the checkpoint.
    """
    arguments = expand_recipes(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.weights_path is None:
        _make_absolute(args)
        sections = {name: from_args(kind, _own_scales(args, name)) for name, kind in SECTIONS.items()}
        sections["degradation"] = degradation_from_dict(sections["degradation"].to_dict())
        return Settings(**sections), None  # type: ignore[arg-type]  # each of its own class
    checkpoint = read_for_resume(_named("weights_path", args.weights_path))
    if not set(SECTIONS) <= set(checkpoint.content):
        raise ValueError(f"{checkpoint.path} holds no settings of a training run: it cannot be resumed")
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    args = parser.parse_args(arguments)
    _make_absolute(args)
    given = vars(args)
    values = {
        name: _resumed(kind, checkpoint.content[name], vars(_own_scales(args, name)), checkpoint.path)
        for name, kind in SECTIONS.items()
    }
    resumed = {name: kind.from_dict(values[name]) for name, kind in SECTIONS.items()}
    resumed["degradation"] = degradation_from_dict(values["degradation"])
    if "epochs" in given and "max_steps" not in given:
        resumed["training"] = replace(cast(TrainingConfig, resumed["training"]), max_steps=None)
    resumed["run"] = replace(cast(RunOptions, resumed["run"]), init_weights=None)
    return Settings(**resumed), checkpoint  # type: ignore[arg-type]


def _own_scales(args: argparse.Namespace, section: str) -> argparse.Namespace:
    """Flags whose downscale_factor is the section's: those of a network of several, else the largest."""
    if "downscale_factor" not in args:
        return args
    scales = args.downscale_factor
    several = scales if len(scales) > 1 else []
    return argparse.Namespace(
        **{**vars(args), "downscale_factor": several if section == "network" else max(scales)}
    )


def _make_absolute(args: argparse.Namespace) -> None:
    """For a run resumed from another folder."""
    for name in (
        "image_folder",
        "val_folder",
        "tokens",
        "log_dir",
        "checkpoint_dir",
        "init_weights",
        "perceptual_features",
    ):
        value = getattr(args, name, None)
        if value is not None:
            setattr(args, name, os.path.abspath(_named(name, value)))


def _named(flag: str, value: str) -> str:
    if not value:
        raise ValueError(f"--{flag} is empty: give a path or leave the flag out")
    return value


def _resumed(
    kind: type[Options], recorded: Mapping[str, Plain], given: Mapping[str, object], path: Path
) -> dict[str, object]:
    """The recorded options with the given ones; fixed ones may only be repeated."""
    values: dict[str, object] = dict(recorded)
    defaults = kind().to_dict()
    for name, spec in specs(kind).items():
        flag = flag_of(kind, name)
        if flag not in given:
            continue
        former = recorded.get(name, defaults[name])
        if spec.fixed and _plain(given[flag]) not in (former, "auto"):
            raise ValueError(
                f"--{flag} is {given[flag]}, but {path} was trained with {former}: "
                "leave the flag out, or start a new run with --init_weights"
            )
        values[name] = given[flag]
    return values


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def make_datasets(settings: Settings, held_out: Collection[str] | None) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation images, which have no file in common.

    `held_out` names, below the image folder, what a resumed run validates on; None chooses.
    """
    data, seed = settings.data, settings.training.seed
    if data.tokens is not None and (kind := settings.network.conditioning) != "tokens":
        raise OptionError("conditioning", kind, "choose tokens where there are --tokens")
    reader = CachedReader(round(data.cache_gb * 2**30))

    def dataset(paths: Sequence[Path], train: bool) -> ImageDataset:
        return ImageDataset(
            paths,
            data.img_size,
            train=train,
            augment=data.augment,
            seed=seed,
            reader=reader,
            cache_dir=default_cache_dir(),
            degradation=settings.degradation,
            tokens=data.tokens,
            scales=settings.network.scales,
        )

    root = Path(data.image_folder)
    if data.val_folder is not None:
        validation = dataset(list_images(data.val_folder)[:MOST_VALIDATION_IMAGES], False)
        return dataset(_without(list_images(root), validation.paths), True), validation
    everything = dataset(list_images(root), True)
    if len(everything) == 1:
        logger.warning("only one image: it is validated on, too; give more images or --val_folder")
        return everything, dataset(everything.paths, False)
    names = {path: path.relative_to(root).as_posix() for path in everything.paths}
    if held_out is None:
        held_out = choose_held_out(list(names.values()), data.val_fraction, seed)
    training = dataset([path for path in everything.paths if names[path] not in held_out], True)
    training.left_out = everything.left_out
    return training, dataset([path for path in everything.paths if names[path] in held_out], False)


def _without(paths: Sequence[Path], others: Sequence[Path]) -> list[Path]:
    apart = {path.resolve() for path in others}
    kept = [path for path in paths if path.resolve() not in apart]
    if len(kept) < len(paths):
        logger.warning("%d images of --val_folder are not trained on", len(paths) - len(kept))
    return kept


def choose_held_out(names: Sequence[str], fraction: float, seed: int) -> list[str]:
    """At least one, those whose names have the lowest hashes."""
    count = min(MOST_VALIDATION_IMAGES, max(1, round(fraction * len(names))))
    return sorted(
        names, key=lambda name: hashlib.blake2b(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()
    )[:count]


def make_model(settings: Settings, device: torch.device) -> UNet:
    """The network on its device; ValueError for initial weights of another scale, process or network."""
    torch.manual_seed(settings.training.seed)
    model, run = UNet.from_config(settings.network), settings.run
    if run.init_weights is not None:
        loaded = load_model(run.init_weights, UNet)
        _check_start(loaded, settings, run.init_weights)
        load_weights(model, loaded.network.state_dict(), run.init_weights)
    if run.residual_std is not None:
        model.residual_std.fill_(run.residual_std)
    model.checkpoint_activations = run.checkpoint_activations
    return model.to(memory_format=torch.channels_last).to(device)


def _check_start(loaded: LoadedModel[UNet], settings: Settings, path: str) -> None:
    """Refuse weights that mean something else here."""
    scales = loaded.network.scale.flatten()
    own = torch.tensor(settings.network.scales or [settings.degradation.scale])
    if not torch.equal(scales, own):
        raise ValueError(
            f"--init_weights {path} enlarges by {scales.tolist()}, but --downscale_factor is {own.tolist()}"
        )
    recorded = ProcessConfig.from_dict(loaded.process)
    if recorded != settings.process:
        raise ValueError(f"--init_weights {path} is of {recorded}, but this run has {settings.process}")
    if loaded.degradation and loaded.degradation != settings.degradation.to_dict():
        logger.warning("%s has learnt from another degradation: %s", path, loaded.degradation)


def blank_crop(settings: Settings, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """What the network takes of one crop: image, timestep and condition."""
    size = settings.data.img_size
    sides = (size, round(size / settings.degradation.scale))
    image, low_res = (torch.zeros(1, 3, side, side, device=device) for side in sides)
    condition = Condition(image, low_res, scale=settings.degradation.scale)
    return image, torch.zeros(1, dtype=torch.long, device=device), condition


def describe_model(model: UNet, settings: Settings, device: torch.device) -> str:
    """torchinfo's table, for one crop."""
    from torchinfo import summary

    image, t, condition = blank_crop(settings, device)
    return str(
        summary(
            model,
            input_data=(image, t),
            context=condition,
            depth=2,
            row_settings=("var_names",),
            col_names=("output_size", "num_params", "mult_adds"),
            col_width=17,
            verbose=0,
        )
    )


def count_crop(settings: Settings) -> tuple[int, Cost]:
    """The parameters of the network, and what one training crop costs."""
    with torch.device("meta"):
        model = UNet.from_config(settings.network)
    model.checkpoint_activations = settings.run.checkpoint_activations
    image, t, condition = blank_crop(settings, torch.device("meta"))

    def forward() -> torch.Tensor:
        context, mean = model.encode_context(condition)
        output: torch.Tensor = model(image, t, context)
        return output.sum() if mean is None else output.sum() + mean.sum()

    return parameter_count(model), count_cost(model, forward)


def run_folders(settings: Settings, checkpoint: Checkpoint | None) -> tuple[Path, Path]:
    """For checkpoints and log: the resumed run's, or new ones named after mode and time."""
    run = settings.run
    if checkpoint is not None:
        folder = checkpoint.path.resolve().parent
    else:
        name = f"{settings.process.mode}_{time.strftime('%Y%m%d-%H%M%S')}"
        folder = new_folder(Path(run.checkpoint_dir), name)
    return folder, Path(run.log_dir) / folder.name


def describe_run(
    settings: Settings,
    plan: BatchPlan,
    config: TrainingConfig,
    training: ImageDataset,
    images: int,
    device: torch.device,
) -> Iterator[str]:
    """What a person should know before the first step."""
    precision = autocast_dtype(device, settings.run.precision)
    yield f"device {device}, {precision or torch.float32}, {plan.world_size} process(es)"
    yield f"{len(training)} training and {images} validation images, {len(training.left_out)} left out"
    steps, crops = cast(int, config.max_steps), min(plan.group_size, len(training))
    epochs = steps / plan.steps_per_epoch
    yield f"{steps} steps of up to {crops} crops, {plan.steps_per_epoch} steps per epoch, {epochs:.3g} epochs"
    parameters, cost = count_crop(settings)
    batch, optimizer = min(config.batch_size, len(training)), optimizer_for(config, device)
    memory = training_memory(parameters, cost, batch, optimizer, precision is not None)
    yield (
        f"{parameters / 1e6:.2f} M parameters, {crops * cost.flops / 1e12:.3g} TFLOP per step, "
        f"about {memory / 1e9:.2g} GB for each process"
    )
    if steps < FEWEST_STEPS:
        yield (
            f"warning: {steps} steps teach a network little. For so few images take a recipe, "
            "such as @recipes/x4.args, or --accumulation_steps 1 and --max_steps 4000 or more"
        )
    yield f"watch it: tensorboard --logdir {shlex.quote(settings.run.log_dir)}"


def describe_resume(checkpoint: Checkpoint, config: TrainingConfig) -> Iterator[str]:
    step, former = checkpoint.content["step"], checkpoint.content["training"]["max_steps"]
    yield f"resuming {checkpoint.path} at step {step} of {config.max_steps}"
    if step >= cast(int, config.max_steps):
        yield "this run is finished: raise --max_steps to go on with it"
    elif config.max_steps != former:
        before = TrainingConfig.from_dict(checkpoint.content["training"])
        yield (
            f"the run is {config.max_steps} steps long instead of {former}, so the learning rate goes on at "
            f"{learning_rate_at(step, config):.2g}, after {learning_rate_at(max(0, step - 1), before):.2g}"
        )


def train(settings: Settings, checkpoint: Checkpoint | None, processes: Processes) -> int:
    """Set up, train, say what came of it; returns the exit status."""
    device, options = processes.device, settings.run
    say = functools.partial(print, flush=True) if processes.is_main else _say_nothing
    precision = autocast_dtype(device, options.precision)
    tune_for_training(device)
    held_out = None if checkpoint is None else checkpoint.content.get("held_out")
    training, validation = make_datasets(settings, held_out)
    plan = BatchPlan.of(settings.training, len(training), processes.world_size)
    config = settings.training.resolved(plan.steps_per_epoch)
    diffusion = DiffusionModel.of(settings.process, device, settings.objective)
    model = make_model(settings, device)
    if processes.is_main:  # the others need not count
        say(describe_model(model, settings, device))
    if options.compile:
        compile_network(model, device)
    if processes.is_main:
        for line in describe_run(settings, plan, config, training, len(validation), device):
            say(line)
        for line in () if checkpoint is None else describe_resume(checkpoint, config):
            say(line)
    checkpoint_dir, log_dir = run_folders(settings, checkpoint) if processes.is_main else (Path(), Path())
    with locked(checkpoint_dir) if processes.is_main else contextlib.nullcontext():
        run, received = diffusion.train(
            model,
            training,
            config,
            checkpoint_dir=checkpoint_dir,
            log_dir=log_dir,
            validate=Validator(diffusion, validation, precision, processes),
            resume=checkpoint,
            processes=processes,
            precision=precision,
            sections={"data": settings.data.to_dict(), "run": options.to_dict()},
            held_out=names_below(Path(settings.data.image_folder), validation.paths),
            perceptual=make_perceptual(settings, device),
            profile=options.profile,
        )
    return report_end(run, received, say)


def names_below(root: Path, paths: Sequence[Path]) -> list[str]:
    """Of those below the folder."""
    return [path.relative_to(root).as_posix() for path in paths if path.is_relative_to(root)]


def make_perceptual(settings: Settings, device: torch.device) -> Distance | None:
    """If it has any weight."""
    if settings.objective.perceptual_weight == 0:
        return None
    return perceptual_distance(device, settings.run.perceptual_features)


def report_end(run: RunFiles, received: int | None, say: Callable[[str], None]) -> int:
    """Name the files and what to do next; returns the exit status."""
    if run.best.exists():
        say(f"best:   {run.best}")
    say(f"newest: {run.last}")
    if received is not None:
        say(f"resume: python train_diffusion.py --weights_path {shlex.quote(str(run.last))}")
        return 128 + received
    say(f"restore: python infer.py --weights_path {shlex.quote(str(run.best))} --input photo.png")
    return 0


def _say_nothing(message: str) -> None:
    """For processes that are not the main one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        settings, checkpoint = parse(argv)
        with started_processes(settings.run.device) as processes:
            return train(settings, checkpoint, processes)
    except (ValueError, OSError) as error:
        kinds = tuple(SECTIONS.values())
        message = with_flag(error, kinds) if isinstance(error, OptionError) else str(error)
        print(f"train_diffusion.py: error: {message}", file=sys.stderr)
        return 2
    except (NonFiniteError, WorkerError, MetricUnavailableError) as error:
        print(f"train_diffusion.py: error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "train_diffusion.py: error: out of memory: lower --batch_size and raise --accumulation_steps as "
            "much, or add --checkpoint_activations; the checkpoints are as they were",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("train_diffusion.py: stopped; the checkpoints are as they were", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
