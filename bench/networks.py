"""Training steps, denoising steps and quality after equal training time."""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.timing import in_turns
from degradation import Degradation
from diffusion import DiffusionModel, ResidualGenerator
from engine.checkpoint import load_checkpoint, load_weights
from engine.device import autocast_dtype
from engine.processes import Processes
from evaluation.images import ImageSet
from evaluation.measure import evaluate, model_method
from models import LoadedModel
from network import Condition, Network
from restoration import RestoreConfig
from training import MicroBatch, TrainingConfig, new_state, train_step
from util import Crops, ImageDataset

SCALE = 4
TIMESTEP = 500
QUALITY_BATCH, QUALITY_CROP = 16, 64
LEARNING_RATE = 1e-3
Work = Callable[[], object]


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast to the precision that `--precision auto` chooses."""
    dtype = autocast_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def training_step(network: Network, batch: int, size: int, device: torch.device) -> Work:
    """Make one optimiser step on crops (B, 3, size, size)."""
    network.residual_std.fill_(0.1)
    loss = DiffusionModel(device=device).restoration_loss(Degradation(scale=SCALE))
    config = TrainingConfig(optimizer="adamw", learning_rate=1e-4).resolved(batch)
    state = new_state(network, config, autocast_dtype(device))
    crops = Crops(torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device))
    part = MicroBatch(0, [], 1 / batch)
    return lambda: train_step(state, loss, iter([(part, crops)]), config, Processes(device))


def denoising_step(network: Network, size: int, device: torch.device) -> Work:
    """Make one evaluation on (1, 3, size, size) whose condition is encoded already."""
    noisy = torch.randn(1, 3, size, size, device=device)
    t = torch.full((1,), TIMESTEP, device=device)
    with torch.inference_mode(), autocast(device):
        low_res = torch.zeros(1, 3, size // SCALE, size // SCALE, device=device)
        context, _ = network.encode_context(Condition(noisy, low_res))
    return inference(network, noisy, t, context)


def inference(network: nn.Module, first: Tensor, *others: object) -> Work:
    """Make one call of a network, on the device of its first input."""

    def call() -> None:
        with torch.inference_mode(), autocast(first.device):
            network(first, *others)

    return call


def restoration(network: Network, size: int, steps: int, device: torch.device) -> Work:
    """Make the restoration of a low resolution (1, 3, size, size), from its pixels on."""
    network.residual_std.fill_(0.1)
    network.scale.fill_(SCALE)
    generator = ResidualGenerator(device=device, precision=autocast_dtype(device))
    return lambda: generator.generate_images(network, torch.zeros(1, 3, size, size), 1, steps, seed=0)


def parameter_count(network: nn.Module) -> int:
    """Count the trainable values of a network."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def floating_point_operations(work: Work) -> int:
    """Count the operations of the convolutions and matrix products of a work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def matrix_product_rate(device: torch.device, side: int) -> float:
    """Measure the floating-point operations per second of a large square matrix product."""
    dtype = autocast_dtype(device) or torch.float32
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    timing = in_turns({"product": lambda: matrix @ matrix}, rounds=7, device=device)["product"]
    return 2 * side**3 / timing.low


def train_for(steps: int, network: Network, photos: Path, device: torch.device) -> LoadedModel:
    """Train for some steps, and return the model with the averaged weights, in evaluation mode."""
    config = TrainingConfig(
        max_steps=steps,
        batch_size=QUALITY_BATCH,
        learning_rate=LEARNING_RATE,
        warmup_steps=steps // 10,
        ema_decay=0.99,
        save_every=steps,
    )
    network.residual_std.zero_()
    training = ImageDataset(photos, QUALITY_CROP, SCALE, augment="dihedral")
    diffusion = DiffusionModel(device=device)
    with tempfile.TemporaryDirectory() as name:
        checkpoints, logs, precision = Path(name), Path(name, "logs"), autocast_dtype(device)
        run, _ = diffusion.train(
            network, training, config, checkpoint_dir=checkpoints, log_dir=logs, precision=precision
        )
        load_weights(network, load_checkpoint(run.last)["ema"], run.last)
    return LoadedModel(network.eval(), diffusion.process, training.degradation, steps)


def qualities(
    networks: Mapping[str, Network], seconds: float, photos: Path, images: ImageSet, device: torch.device
) -> dict[str, tuple[int, float]]:
    """Train each network for so many seconds, and count its optimiser steps and measure its PSNR in dB."""
    works = {
        name: training_step(copy.deepcopy(network), QUALITY_BATCH, QUALITY_CROP, device)
        for name, network in networks.items()
    }
    results = {}
    for name, timing in in_turns(works, rounds=3, device=device).items():
        steps = max(2, round(seconds / timing.median))
        model = train_for(steps, networks[name], photos, device)
        # The predicted mean, or else one step.
        _, row = evaluate(images, [model_method([model], RestoreConfig(mode="fidelity"), SCALE, device)]).rows
        results[name] = steps, row["psnr"]
    return results
