"""Train a diffusion super-resolution model on a folder of images.

python train_diffusion.py --image_folder photos
python train_diffusion.py @recipes/x4.args --image_folder photos
python train_diffusion.py --weights_path checkpoints/<run>/diffusion_model_v_prediction_last.pth
"""

import argparse
import contextlib
import hashlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, get_type_hints

import torch

from degradation import Degradation
from diffusion import DiffusionModel, LossConfig, ProcessConfig
from engine.checkpoint import Checkpoint, load_weights, read_for_resume
from engine.cli import Parser, run_script, say
from engine.cost import Cost, count_cost, training_memory
from engine.device import Precision, autocast_dtype, compile_network, tune_for_training
from engine.options import OptionError, Options, add_flags, flag_of, option, specs
from engine.processes import LostProcessError, Processes, started_processes
from engine.recipes import expand_recipes
from engine.run import RunFiles, locked, new_folder
from evaluation.validation import Validator
from imaging.cache import CachedReader
from imaging.files import list_images
from imaging.sizes import default_cache_dir
from models import LoadedModel, load_model
from training import (
    BatchPlan,
    NonFiniteError,
    ResolvedConfig,
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
    retired: ClassVar = {"profile": False, "perceptual_features": None}

    residual_std: float | None = option(None, "what residuals are divided by; by default measured", above=0)
    device: str = option("auto", "auto, cuda, mps or cpu", fixed=False)
    precision: Precision = option(
        "auto", "auto is bf16 where the device has it; fp16 scales the loss, for GPUs without", fixed=False
    )
    checkpoint_activations: bool = option(False, "less memory, a third more time", fixed=False)
    compile: bool = option(False, "torch.compile the network: a slow start", fixed=False)
    log_dir: str = option("./logs", "TensorBoard", fixed=False)
    checkpoint_dir: str = option("./checkpoints", "receives a folder for each run", fixed=False)
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


SECTIONS: dict[str, type[Options]] = get_type_hints(Settings)
# What the script does otherwise than the classes, and options that have no flag of their own.
DEFAULTS: dict[str, object] = {"accumulation_steps": 64, "predictor_blocks": 12}
WITHOUT_FLAG = ("in_channels", "out_channels")
PATHS = set("image_folder val_folder tokens log_dir checkpoint_dir init_weights".split())


def build_parser() -> argparse.ArgumentParser:
    """Recipes (@file) are expanded before: engine.recipes."""
    parser = Parser(
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
        epilog="@FILE stands for the flags in it; flags after it win.",
    )
    parser.add_argument("--weights_path", help="a checkpoint to resume from; needs no other flag")
    for section, kind in SECTIONS.items():
        group = parser.add_argument_group(section)
        add_flags(group, kind, skip=WITHOUT_FLAG, defaults=DEFAULTS)
    return parser


def parse(argv: Sequence[str] | None) -> tuple[Settings, Checkpoint | None]:
    """The options of the run, from the checkpoint it resumes where not given, and that checkpoint.

    ValueError names the flag of a wrong value, or of one that contradicts the checkpoint.
    """
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # only what is given has a value
    given = vars(parser.parse_args(expand_recipes(sys.argv[1:] if argv is None else argv)))
    for flag, value in given.items():
        if value == "":
            raise ValueError(f"--{flag} is empty: give a path or leave the flag out")
    checkpoint = read_for_resume(given["weights_path"]) if "weights_path" in given else None
    if checkpoint is not None and not set(SECTIONS) <= set(checkpoint.content):
        raise ValueError(f"{checkpoint.path} holds no settings of a training run: it cannot be resumed")
    values: dict[str, dict[str, object]] = {}
    for section, kind in SECTIONS.items():
        own = {name: given[flag_of(kind, name)] for name in specs(kind) if flag_of(kind, name) in given}
        if checkpoint is None:
            defaults = {name: DEFAULTS[name] for name in DEFAULTS.keys() & specs(kind).keys()}
            former = kind.of(**{**defaults, **own}).to_dict()
        else:
            former = checkpoint.content[section]
            _check_fixed(kind, former, own, checkpoint.path)
        values[section] = {**former, **own}
        for path in PATHS & values[section].keys():
            if (value := values[section][path]) is not None:
                values[section][path] = os.path.abspath(str(value))  # to resume from another folder
    if checkpoint is not None:
        values["run"]["init_weights"] = None
        if "epochs" in given and "max_steps" not in given:
            values["training"]["max_steps"] = None
    sections = {section: kind.from_dict(values[section]) for section, kind in SECTIONS.items()}
    return Settings(**sections), checkpoint  # type: ignore[arg-type]  # each of its own class


def _check_fixed(
    kind: type[Options], recorded: Mapping[str, object], given: Mapping[str, object], path: Path
) -> None:
    """Of a resumed run, fixed options may only be repeated."""
    former = {**kind().to_dict(), **recorded}
    for name, value in given.items():
        if specs(kind)[name].fixed and value not in (former[name], "auto"):
            raise ValueError(
                f"--{flag_of(kind, name)} is {value}, but {path} was trained with {former[name]}: "
                "leave the flag out, or start a new run with --init_weights"
            )


def make_datasets(settings: Settings, held_out: Collection[str] | None) -> tuple[ImageDataset, ImageDataset]:
    """For training and validation, without a common file.

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


def names_below(folder: str, paths: Sequence[Path]) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths if path.is_relative_to(folder)]


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
        loaded = load_model(run.init_weights)
        _check_start(loaded, settings, run.init_weights)
        load_weights(model, loaded.network.state_dict(), run.init_weights)
    if run.residual_std is not None:
        model.residual_std.fill_(run.residual_std)
    model.checkpoint_activations = run.checkpoint_activations
    return model.to(memory_format=torch.channels_last).to(device)


def _check_start(loaded: LoadedModel, settings: Settings, path: str) -> None:
    there, here = float(loaded.network.scale), settings.degradation.scale
    if abs(there - here) > 1e-4:
        raise ValueError(f"--init_weights {path} enlarges by {there:g}, but --downscale_factor is {here:g}")
    if loaded.process != settings.process:
        raise ValueError(f"--init_weights {path} is of {loaded.process}, but this run has {settings.process}")
    if loaded.degradation != settings.degradation:
        logger.warning("%s has learnt from another degradation: %s", path, loaded.degradation.describe())


def blank_crop(settings: Settings, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """What the network takes of one crop: image, timestep and condition."""
    size = settings.data.img_size
    sides = (size, round(size / settings.degradation.scale))
    image, low_res = (torch.zeros(1, 3, side, side, device=device) for side in sides)
    condition = Condition(image, low_res)
    return image, torch.zeros(1, dtype=torch.long, device=device), condition


def describe_model(model: UNet, settings: Settings, device: torch.device) -> str:
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
    if checkpoint is not None:
        folder = checkpoint.path.resolve().parent
    else:
        name = f"{settings.process.mode}_{time.strftime('%Y%m%d-%H%M%S')}"
        folder = new_folder(Path(settings.run.checkpoint_dir), name)
    return folder, Path(settings.run.log_dir) / folder.name


def describe_run(
    settings: Settings,
    plan: BatchPlan,
    config: ResolvedConfig,
    training: ImageDataset,
    images: int,
    device: torch.device,
) -> Iterator[str]:
    precision = autocast_dtype(device, settings.run.precision)
    yield f"device {device}, {precision or torch.float32}, {plan.world_size} process(es)"
    yield f"{len(training)} training and {images} validation images, {len(training.left_out)} left out"
    steps, crops = config.max_steps, min(plan.group_size, len(training))
    epochs = steps / plan.steps_per_epoch
    yield f"{steps} steps of up to {crops} crops, {plan.steps_per_epoch} steps per epoch, {epochs:.3g} epochs"
    parameters, cost = count_crop(settings)
    batch = min(config.batch_size, len(training))
    memory = training_memory(parameters, cost, batch, config.optimizer, precision is not None)
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


def describe_resume(checkpoint: Checkpoint, config: ResolvedConfig) -> Iterator[str]:
    step, former = checkpoint.content["step"], checkpoint.content["training"]["max_steps"]
    yield f"resuming {checkpoint.path} at step {step} of {config.max_steps}"
    if step >= config.max_steps:
        yield "this run is finished: raise --max_steps to go on with it"
    elif config.max_steps != former:
        before = ResolvedConfig.from_dict(checkpoint.content["training"])
        yield (
            f"the run is {config.max_steps} steps long instead of {former}, so the learning rate goes on at "
            f"{learning_rate_at(step, config):.2g}, after {learning_rate_at(max(0, step - 1), before):.2g}"
        )


def train(settings: Settings, checkpoint: Checkpoint | None, processes: Processes) -> int:
    device, options = processes.device, settings.run
    precision = autocast_dtype(device, options.precision)
    tune_for_training(device)
    held_out = None if checkpoint is None else checkpoint.content.get("held_out")
    training, validation = make_datasets(settings, held_out)
    config = settings.training.resolved(len(training), processes.world_size)
    config = replace(config, optimizer=optimizer_for(config, device))
    plan = BatchPlan.of(config, len(training), processes.world_size)
    diffusion = DiffusionModel(device=device, process=settings.process, objective=settings.objective)
    model = make_model(settings, device)
    checkpoint_dir, log_dir = Path(), Path()
    if processes.is_main:  # the others write and say nothing
        say(describe_model(model, settings, device))
        say(*describe_run(settings, plan, config, training, len(validation), device))
        say(*(() if checkpoint is None else describe_resume(checkpoint, config)))
        checkpoint_dir, log_dir = run_folders(settings, checkpoint)
    if options.compile:
        compile_network(model, device)
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
            record={
                "data": settings.data.to_dict(),
                "run": options.to_dict(),
                "held_out": names_below(settings.data.image_folder, validation.paths),
            },
        )
    if processes.is_main:
        say(*describe_end(run, received))
    return 0 if received is None else 128 + received


def describe_end(run: RunFiles, received: int | None) -> Iterator[str]:
    if run.best.exists():
        yield f"best:   {run.best}"
    yield f"newest: {run.last}"
    if received is not None:
        yield f"resume: python train_diffusion.py --weights_path {shlex.quote(str(run.last))}"
    else:
        yield f"restore: python infer.py --weights_path {shlex.quote(str(run.best))} --input photo.png"


def run(argv: Sequence[str] | None) -> int:
    settings, checkpoint = parse(argv)
    with started_processes(settings.run.device) as processes:
        return train(settings, checkpoint, processes)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        "train_diffusion.py",
        lambda: run(argv),
        options=list(SECTIONS.values()),
        failures=(NonFiniteError, WorkerError, LostProcessError),
        out_of_memory="lower --batch_size and raise --accumulation_steps as much, or add "
        "--checkpoint_activations; the checkpoints are as they were",
        stopped="the checkpoints are as they were",
    )


if __name__ == "__main__":
    sys.exit(main())
