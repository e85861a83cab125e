"""Train a diffusion super-resolution model on a folder of images.

python train_diffusion.py --image_folder photos
python train_diffusion.py @recipes/x4.args --image_folder photos
python train_diffusion.py --weights_path checkpoints/<run>/diffusion_model_v_prediction_last.pth
"""

import argparse
import functools
import logging
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
import torch

from degradation import Bicubic, Degradation
from diffusion import DiffusionModel, LossConfig, ProcessConfig
from engine.checkpoint import Checkpoint, load_model, load_weights, read_for_resume
from engine.device import autocast_dtype, compile_network
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
from evaluation.validation import Validator
from imaging.cache import CachedReader
from imaging.files import list_images
from imaging.sizes import default_memory
from training import BatchPlan, NonFiniteError, TrainingConfig, WorkerError
from unet import Condition, UNet, UNetConfig, parameter_count
from util import Augmentation, ImageDataset

MOST_VALIDATION_IMAGES = 64


@dataclass(frozen=True)
class DataOptions(Options):
    """Which images, and how they are cut."""

    image_folder: str = option("./data", "high-resolution images, searched recursively", fixed=False)
    val_folder: str | None = option(
        None, "validation images; by default part of the image folder", fixed=False
    )
    val_fraction: float = option(0.05, "share to validate on, at most 64 images", above=0, high=0.9)
    img_size: int = option(256, "side of the high-resolution training crops", low=8)
    augment: Augmentation = option("flip", "flip: left-right; dihedral: all 8 flips and rotations")
    cache_gb: float = option(4.0, "disk for decoded images; 0 decodes each time", low=0, fixed=False)


@dataclass(frozen=True)
class RunOptions(Options):
    """Where and with what to compute, and where to write."""

    residual_std: float | None = option(None, "what residuals are divided by; by default measured", above=0)
    device: str = option("auto", "auto, cuda, mps or cpu", fixed=False)
    precision: Literal["auto", "bf16", "fp32"] = option("auto", "auto is bf16 on CUDA", fixed=False)
    compile: bool = option(False, "torch.compile the network: a slow start", fixed=False)
    profile: bool = option(False, "write a trace of 5 steps into the logs", fixed=False)
    log_dir: str = option("./logs", "TensorBoard", fixed=False)
    checkpoint_dir: str = option("./checkpoints", "receives a folder for each run", fixed=False)
    init_weights: str | None = option(None, "a model whose weights a new run starts from", fixed=False)


class Settings(NamedTuple):
    """Every option of a run, by section, as its checkpoints record them."""

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
        (DataOptions, Bicubic, UNetConfig, ProcessConfig, LossConfig, TrainingConfig, RunOptions),
        strict=True,
    )
)
# What the script does otherwise than the classes, and flags that would have no meaning.
DEFAULTS = {"training": {"accumulation_steps": 64}, "network": {"predictor_blocks": 12}}
WITHOUT_FLAG = {"network": ("in_channels", "out_channels")}


class RecipeParser(argparse.ArgumentParser):
    """An ArgumentParser whose @files hold flags as on a command line, with # comments."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split one line of a recipe."""
        return shlex.split(arg_line, comments=True)


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the script."""
    parser = RecipeParser(
        description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None, fromfile_prefix_chars="@"
    )
    parser.add_argument("--weights_path", help="a checkpoint to resume from; needs no other flag")
    for section, kind in SECTIONS.items():
        group = parser.add_argument_group(section)
        add_flags(group, kind, skip=WITHOUT_FLAG.get(section, ()), defaults=DEFAULTS.get(section, {}))
    return parser


def parse(argv: Sequence[str] | None) -> tuple[Settings, Checkpoint | None]:
    """The options of the run, and the checkpoint it resumes from, which they then come from unless given.

    Raises:
        ValueError: a flag has a wrong value or contradicts the checkpoint; the message names flag and value.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.weights_path is None:
        sections = {name: from_args(kind, args) for name, kind in SECTIONS.items()}
        return Settings(**sections), None  # type: ignore[arg-type]  # each of its own class
    checkpoint = read_for_resume(args.weights_path)
    if not set(SECTIONS) <= set(checkpoint.content):
        raise ValueError(f"{checkpoint.path} holds no settings of a training run: it cannot be resumed")
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))
    sections = {
        name: kind.from_dict(_resumed(kind, checkpoint.content.get(name, {}), given, checkpoint.path))
        for name, kind in SECTIONS.items()
    }
    training, run = cast(TrainingConfig, sections["training"]), cast(RunOptions, sections["run"])
    if "epochs" in given and "max_steps" not in given:
        sections["training"] = replace(training, max_steps=None)
    sections["run"] = replace(run, init_weights=None)
    return Settings(**sections), checkpoint  # type: ignore[arg-type]  # each of its own class


def _resumed(
    kind: type[Options], recorded: Mapping[str, Plain], given: Mapping[str, object], path: Path
) -> dict[str, object]:
    """The recorded options with the given ones; those that are fixed may only be repeated."""
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


def make_datasets(settings: Settings) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation images; the split depends on the seed and the files alone."""
    data, seed = settings.data, settings.training.seed
    reader = CachedReader(round(data.cache_gb * 2**30))

    def dataset(paths: Sequence[Path], train: bool) -> ImageDataset:
        return ImageDataset(
            paths,
            data.img_size,
            train=train,
            augment=data.augment,
            seed=seed,
            reader=reader,
            memory=default_memory(),
            degradation=settings.degradation,
        )

    everything = dataset(list_images(data.image_folder), True)
    if data.val_folder is not None:
        return everything, dataset(list_images(data.val_folder)[:MOST_VALIDATION_IMAGES], False)
    paths = everything.paths
    if len(paths) == 1:
        logging.warning("only one image: it is validated on, too; give more images or --val_folder")
        return everything, dataset(paths, False)
    count = min(MOST_VALIDATION_IMAGES, max(1, round(data.val_fraction * len(paths))))
    chosen = set(np.random.default_rng(seed).permutation(len(paths))[:count].tolist())
    held_out = [path for index, path in enumerate(paths) if index in chosen]
    return dataset([path for path in paths if path not in set(held_out)], True), dataset(held_out, False)


def make_model(settings: Settings, device: torch.device) -> UNet:
    """The network on its device, with the weights it starts from if there are any."""
    torch.manual_seed(settings.training.seed)
    model, run = UNet.from_config(settings.network), settings.run
    if run.init_weights is not None:
        load_weights(model, load_model(run.init_weights, UNet).network.state_dict(), run.init_weights)
    if run.residual_std is not None:
        model.residual_std.fill_(run.residual_std)
    return model.to(memory_format=torch.channels_last).to(device)


def describe_model(model: UNet, settings: Settings, device: torch.device) -> str:
    """torchinfo's table of the network for one training crop."""
    from torchinfo import summary

    size = settings.data.img_size
    low_size = round(size / settings.degradation.scale)
    image = torch.zeros(1, 3, size, size, device=device)
    return str(
        summary(
            model,
            input_data=(image, torch.zeros(1, dtype=torch.long, device=device)),
            context=Condition(image, torch.zeros(1, 3, low_size, low_size, device=device)),
            depth=2,
            row_settings=("var_names",),
            col_names=("output_size", "num_params", "mult_adds"),
            col_width=17,
            verbose=0,
        )
    )


def run_folders(settings: Settings, checkpoint: Checkpoint | None) -> tuple[Path, Path]:
    """Checkpoint and log folder: those of the resumed run, or new ones named after mode and time."""
    run = settings.run
    if checkpoint is not None:
        folder = checkpoint.path.resolve().parent
        return folder, Path(run.log_dir) / folder.name
    name = f"{settings.process.mode}_{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(run.checkpoint_dir) / name, Path(run.log_dir) / name


def train(settings: Settings, checkpoint: Checkpoint | None, processes: Processes) -> int:
    """Set everything up, train, and say what came of it; returns the exit status."""
    device, run_options = processes.device, settings.run
    say = functools.partial(print, flush=True) if processes.is_main else _say_nothing
    precision = autocast_dtype(device, run_options.precision)
    training, validation = make_datasets(settings)
    plan = BatchPlan.of(settings.training, len(training), processes.world_size)
    config = settings.training.resolved(plan.steps_per_epoch)
    process, objective = settings.process, settings.objective
    diffusion = DiffusionModel(
        process.timesteps,
        device,
        process.mode,
        process.schedule,
        objective.min_snr_gamma,
        objective.timestep_density,
    )
    model = make_model(settings, device)
    checkpoint_dir, log_dir = run_folders(settings, checkpoint)
    say(describe_model(model, settings, device))
    if run_options.compile:
        compile_network(model, device)
    say(f"device {device}, {'bf16 autocast' if precision else 'fp32'}, {processes.world_size} process(es)")
    say(
        f"{len(training)} training and {len(validation)} validation images, {len(training.left_out)} left out"
    )
    say(f"{parameter_count(model) / 1e6:.2f} M parameters, {config.max_steps} steps")
    say(f"watch it: tensorboard --logdir {shlex.quote(run_options.log_dir)}")
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
        settings={"data": settings.data.to_dict(), "run": run_options.to_dict()},
        profile=run_options.profile,
    )
    if run.best.exists():
        say(f"best:   {run.best}")
    say(f"newest: {run.last}")
    if received is not None:
        say(f"resume: python train_diffusion.py --weights_path {shlex.quote(str(run.last))}")
        return 128 + received
    say(f"restore: python infer.py --weights_path {shlex.quote(str(run.best))} --input photo.png")
    return 0


def _say_nothing(message: str) -> None:
    """What the processes that are not the main one print."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        settings, checkpoint = parse(argv)
        with started_processes(settings.run.device) as processes:
            return train(settings, checkpoint, processes)
    except OptionError as error:
        print(f"train_diffusion.py: error: {with_flag(error, tuple(SECTIONS.values()))}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"train_diffusion.py: error: {error}", file=sys.stderr)
        return 2
    except (NonFiniteError, WorkerError) as error:
        print(f"train_diffusion.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
