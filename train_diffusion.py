"""Train a diffusion super-resolution model on a folder of images.

python train_diffusion.py --image_folder photos
python train_diffusion.py @recipes/x4.args --image_folder photos
python train_diffusion.py --weights_path checkpoints/<run>/diffusion_model_v_prediction_last.pth
"""

import argparse
import dataclasses
import functools
import logging
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch

from diffusion import DiffusionModel
from engine.checkpoint import CheckpointError, Plain, load_checkpoint, load_model, load_weights
from engine.device import autocast_dtype, compile_network
from engine.processes import Processes, started_processes
from evaluation.validation import Validator
from imaging.cache import CachedReader
from imaging.files import list_images
from imaging.sizes import default_cache_dir
from schedules import Mode, Schedule, TimestepDensity
from training import BatchPlan, NonFiniteError, TrainingConfig, WorkerError
from unet import Condition, UNet, UNetConfig, parameter_count
from util import ImageDataset

# A resumed run must go on as it began: these come from its checkpoint, and a flag may only repeat them.
FIXED = (
    "img_size downscale_factor batch_size accumulation_steps learning_rate weight_decay ema_decay "
    "max_grad_norm optimizer seed augment timesteps diffusion_mode schedule min_snr_gamma timestep_density "
    "final_learning_rate residual_std unet_base_dim "
    "unet_dim_mults context_dim patch_size blocks_per_level context_blocks conditioning norm attention_window"
).split()
NOT_GIVEN = object()


class RecipeParser(argparse.ArgumentParser):
    """An ArgumentParser whose @files hold flags as on a command line, with # comments."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split one line of a recipe."""
        return shlex.split(arg_line, comments=True)


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the script."""
    parser = RecipeParser(
        description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None,
        fromfile_prefix_chars="@",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--image_folder", default="./data", help="high-resolution images, searched recursively")
    data.add_argument("--val_folder", help="validation images; without it, part of image_folder")
    data.add_argument(
        "--val_fraction", type=float, default=0.05, help="share to validate on, at most 64 images"
    )
    data.add_argument("--img_size", type=int, default=256, help="side of the high-resolution training crops")
    data.add_argument("--downscale_factor", type=float, default=4, help="how much smaller the input is")
    data.add_argument("--augment", choices=["none", "flip", "dihedral"], default="flip")
    data.add_argument("--num_workers", type=int, default=0, help="processes that read images")
    data.add_argument(
        "--cache_gb", type=float, default=4.0, help="disk for decoded images; 0 decodes each time"
    )
    _add_model_flags(parser)
    _add_training_flags(parser)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--timesteps", type=int, default=1000, help="noise levels of the diffusion process")
    model.add_argument(
        "--diffusion_mode",
        choices=get_args(Mode),
        default="v_prediction",
        help="what is predicted; regression is the baseline without diffusion",
    )
    model.add_argument("--schedule", choices=get_args(Schedule), default="cosine", help="how noise grows")
    model.add_argument(
        "--residual_std", type=float, help="what residuals are divided by; without it, measured"
    )
    model.add_argument("--unet_base_dim", type=int, default=32, help="width of the first level")
    model.add_argument(
        "--unet_dim_mults", type=int, nargs="+", default=[1, 2, 4], help="widths of the levels"
    )
    defaults = UNetConfig()
    model.add_argument(
        "--context_dim", type=int, default=defaults.context_dim, help="width of context tokens"
    )
    model.add_argument("--patch_size", type=int, choices=[1, 2, 4], default=defaults.patch_size)
    model.add_argument("--blocks_per_level", type=int, default=defaults.blocks_per_level)
    model.add_argument("--context_blocks", type=int, default=defaults.context_blocks)
    model.add_argument(
        "--conditioning", choices=["concat", "cross_attention", "both"], default=defaults.conditioning
    )
    model.add_argument("--norm", choices=["group", "pixel"], default=defaults.norm)
    model.add_argument("--attention_window", type=int, default=defaults.attention_window, help="0 is global")


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=40, help="passes over the images, one crop of each")
    training.add_argument("--max_steps", type=int, help="optimiser steps, instead of --epochs")
    training.add_argument("--batch_size", type=int, default=32)
    training.add_argument("--accumulation_steps", type=int, default=64, help="batches per optimiser step")
    training.add_argument("--learning_rate", type=float, default=2e-5)
    training.add_argument(
        "--final_learning_rate", type=float, default=0.01, help="end of the cosine as a share; 1: constant"
    )
    training.add_argument("--warmup_steps", type=int, help="without it, 5%% of the run, at most 500")
    training.add_argument("--weight_decay", type=float, default=0.01)
    training.add_argument("--ema_decay", type=float, default=0.999)
    training.add_argument("--max_grad_norm", type=float, default=1.0)
    training.add_argument(
        "--optimizer", choices=["auto", "adamw8bit", "adamw"], default="auto", help="auto: 8-bit on CUDA"
    )
    training.add_argument("--min_snr_gamma", type=float, help="weigh the loss (Hang et al. 2023); 5 is usual")
    training.add_argument(
        "--timestep_density",
        choices=get_args(TimestepDensity),
        default="uniform",
        help="noise levels trained most",
    )
    training.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    training.add_argument("--compile", action="store_true", help="torch.compile the network: a slow start")
    training.add_argument("--profile", action="store_true", help="write a trace of 5 steps into the logs")
    training.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--validate_every", type=int, help="steps; without it, 20 times in the run")
    training.add_argument("--save_every", type=int, help="steps; without it, with every validation")
    training.add_argument("--keep_checkpoints", type=int, default=2, help="the newest ones, besides the best")
    training.add_argument("--log_every", type=int, default=10, help="steps")
    training.add_argument("--log_dir", default="./logs", help="TensorBoard")
    training.add_argument("--checkpoint_dir", default="./checkpoints")
    training.add_argument("--weights_path", help="a checkpoint to resume from")
    training.add_argument("--init_weights", help="a model whose weights a new run starts from")


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The flags; those not given come from the checkpoint of a resumed run, else from the defaults.

    Raises:
        ValueError: a flag contradicts the checkpoint; the message names both values.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.weights_path is None:
        return parser, args
    unset = argparse.Namespace(**dict.fromkeys(vars(args), NOT_GIVEN))
    given = {k: v for k, v in vars(parser.parse_args(argv, unset)).items() if v is not NOT_GIVEN}
    stored = load_checkpoint(args.weights_path).get("settings")
    if not isinstance(stored, dict):
        raise CheckpointError(f"{args.weights_path} holds no training settings: it cannot be resumed")
    for name in FIXED:
        former = stored.get(name, parser.get_default(name))
        if name in given and given[name] not in (former, "auto"):
            raise ValueError(
                f"--{name} is {given[name]}, but {args.weights_path} was trained with {former}: "
                f"leave the flag out, or start a new run with --init_weights"
            )
    kept = {name: value for name, value in stored.items() if name in vars(args)}
    kept["init_weights"] = None
    if "epochs" in given:
        kept["max_steps"] = None
    return parser, argparse.Namespace(**{**vars(args), **kept, **given})


def make_datasets(args: argparse.Namespace) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation images; the split depends on the seed and the files alone."""
    reader = CachedReader(round(args.cache_gb * 2**30))

    def dataset(paths: Sequence[Path], train: bool) -> ImageDataset:
        return ImageDataset(
            paths,
            args.img_size,
            args.downscale_factor,
            train=train,
            augment=args.augment,
            seed=args.seed,
            reader=reader,
            cache_dir=default_cache_dir(),
        )

    everything = dataset(list_images(args.image_folder), True)
    if args.val_folder is not None:
        return everything, dataset(list_images(args.val_folder)[:64], False)
    if not 0 < args.val_fraction < 1:
        raise ValueError(f"--val_fraction must be between 0 and 1, not {args.val_fraction}")
    paths = everything.paths
    if len(paths) == 1:
        logging.warning("only one image: it is validated on, too; give more images or --val_folder")
        return everything, dataset(paths, False)
    count = min(64, max(1, round(args.val_fraction * len(paths))))
    chosen = set(np.random.default_rng(args.seed).permutation(len(paths))[:count].tolist())
    held_out = [path for index, path in enumerate(paths) if index in chosen]
    return dataset([path for path in paths if path not in set(held_out)], True), dataset(held_out, False)


def make_config(args: argparse.Namespace, images: int, processes: Processes) -> TrainingConfig:
    """The settings of the loop, with what depends on the length of the run filled in."""
    plan = BatchPlan(images, args.batch_size, args.accumulation_steps, args.seed, processes.world)
    max_steps = args.max_steps if args.max_steps is not None else args.epochs * plan.steps_per_epoch
    every = args.validate_every or max(1, max_steps // 20)
    warmup = args.warmup_steps if args.warmup_steps is not None else min(500, max_steps // 20)
    if args.optimizer == "auto":
        args.optimizer = "adamw8bit" if processes.device.type == "cuda" else "adamw"
    shared = {field.name for field in dataclasses.fields(TrainingConfig)} & set(vars(args))
    values = {name: getattr(args, name) for name in shared}
    values.update(
        max_steps=max_steps, warmup_steps=warmup, validate_every=every, save_every=args.save_every or every
    )
    return TrainingConfig(**values)


def make_model(args: argparse.Namespace, device: torch.device) -> UNet:
    """The network on its device, with the weights of --init_weights if given."""
    torch.manual_seed(args.seed)
    config = UNetConfig(
        base_dim=args.unet_base_dim,
        dim_mults=tuple(args.unet_dim_mults),
        context_dim=args.context_dim,
        patch_size=args.patch_size,
        blocks_per_level=args.blocks_per_level,
        context_blocks=args.context_blocks,
        conditioning=args.conditioning,
        norm=args.norm,
        attention_window=args.attention_window,
    )
    model = UNet.from_config(config)
    if args.init_weights is not None:
        load_weights(model, load_model(args.init_weights).unet.state_dict(), args.init_weights)
    if args.residual_std is not None:
        if not 0 < args.residual_std < math.inf:
            raise ValueError(f"--residual_std must be a positive number, not {args.residual_std}")
        model.residual_std.fill_(args.residual_std)
    return model.to(memory_format=torch.channels_last).to(device)


def describe_model(model: UNet, args: argparse.Namespace, device: torch.device) -> str:
    """torchinfo's table of the network for one training crop."""
    from torchinfo import summary

    size = args.img_size
    image = torch.zeros(1, 3, size, size, device=device)
    low_res = torch.zeros(1, 3, round(size / args.downscale_factor), round(size / args.downscale_factor))
    inputs = (image, torch.zeros(1, dtype=torch.long, device=device))
    context = Condition(image, low_res.to(device))
    return str(
        summary(
            model,
            input_data=inputs,
            context=context,
            depth=2,
            row_settings=("var_names",),
            col_names=("output_size", "num_params", "mult_adds"),
            col_width=17,
            verbose=0,
        )
    )


def run_files(args: argparse.Namespace) -> tuple[Path, Path]:
    """Checkpoint and log folder: those of the resumed run, or new ones named after mode and time."""
    if args.weights_path is not None:
        folder = Path(args.weights_path).resolve().parent
        return folder, Path(args.log_dir) / folder.name
    name = f"{args.diffusion_mode}_{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(args.checkpoint_dir) / name, Path(args.log_dir) / name


def train(args: argparse.Namespace, processes: Processes) -> int:
    """Set everything up, train, and say what came of it; returns the exit status."""
    device = processes.device
    say = functools.partial(print, flush=True) if processes.writes else _keep_quiet
    precision = autocast_dtype(device, args.precision)
    training, validation = make_datasets(args)
    config = make_config(args, len(training), processes)
    diffusion = DiffusionModel(
        args.timesteps, device, args.diffusion_mode, args.schedule, args.min_snr_gamma, args.timestep_density
    )
    model = make_model(args, device)
    checkpoint_dir, log_dir = run_files(args)
    say(describe_model(model, args, device))
    if args.compile:
        compile_network(model, device)
    say(f"device {device}, {'bf16 autocast' if precision else 'fp32'}, {processes.world} process(es)")
    if config.optimizer == "adamw":
        say("optimizer: torch's fused AdamW (8-bit AdamW, the default on CUDA, is --optimizer adamw8bit)")
    else:
        say("optimizer: bitsandbytes' 8-bit AdamW")
    say(
        f"{len(training)} training and {len(validation)} validation images, {len(training.left_out)} left out"
    )
    say(f"{parameter_count(model) / 1e6:.2f} M parameters, {config.max_steps} steps")
    say(f"watch it: tensorboard --logdir {shlex.quote(args.log_dir)}")
    run, received = diffusion.train(
        model,
        training,
        config,
        validate=Validator(diffusion, validation, precision, processes),
        checkpoint_dir=checkpoint_dir,
        log_dir=log_dir,
        resume=Path(args.weights_path) if args.weights_path else None,
        processes=processes,
        precision=precision,
        settings=cast(dict[str, Plain], vars(args)),
        profile=args.profile,
    )
    if run.best.exists():
        say(f"best:   {run.best}")
    say(f"newest: {run.last}")
    if received is not None:
        say(f"resume: python train_diffusion.py --weights_path {shlex.quote(str(run.last))}")
        return 128 + received
    say(f"restore: python infer.py --weights_path {shlex.quote(str(run.best))} --input photo.png")
    return 0


def _keep_quiet(message: str) -> None:
    """What the processes that do not write say."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        _, args = parse(argv)
        with started_processes(args.device) as processes:
            return train(args, processes)
    except (ValueError, OSError) as error:
        print(f"train_diffusion.py: error: {error}", file=sys.stderr)
        return 2
    except (NonFiniteError, WorkerError) as error:
        print(f"train_diffusion.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
