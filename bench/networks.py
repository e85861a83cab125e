"""Training steps, denoising steps and quality after equal training time."""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.timing import Timing, in_turns
from degradation import Degradation
from diffusion import DiffusionModel, Network, ResidualGenerator
from engine.checkpoint import load_checkpoint, load_weights
from engine.device import autocast_dtype
from evaluation import metrics
from evaluation.images import Pair
from imaging.pixels import to_model_range
from training import TrainingConfig
from unet import Condition, UNet
from util import Crops, ImageDataset

SCALE = 4
TIMESTEP = 500
QUALITY_BATCH, QUALITY_CROP = 16, 64
LEARNING_RATE = 1e-3


class Quality(NamedTuple):
    """After a given time of training."""

    steps: int  # of the optimiser, that fitted into the time
    psnr: float  # mean over the images, in dB on luma


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """What `--precision auto` chooses."""
    dtype = autocast_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def training_step(network: nn.Module, batch: int, size: int, device: torch.device) -> Callable[[], None]:
    """One optimiser step on (B, 3, size, size)."""
    cast(Network, network).residual_std.fill_(0.1)
    loss = DiffusionModel(device=device).restoration_loss(Degradation(scale=SCALE))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
    crops = Crops(torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device))
    generator = torch.Generator(device)

    def step() -> None:
        with autocast(device):
            losses = loss(network, crops, generator)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def denoising_step(network: nn.Module, size: int, device: torch.device) -> Callable[[], None]:
    """One evaluation on (1, 3, size, size) whose condition is encoded already."""
    noisy = torch.randn(1, 3, size, size, device=device)
    t = torch.full((1,), TIMESTEP, device=device)
    denoiser = cast(Network, network)
    with torch.inference_mode(), autocast(device):
        low_res = torch.zeros(1, 3, size // SCALE, size // SCALE, device=device)
        context, _ = denoiser.encode_context(Condition(noisy, low_res))

    def step() -> None:
        with torch.inference_mode(), autocast(device):
            denoiser(noisy, t, context)

    return step


def restoration(network: nn.Module, size: int, steps: int, device: torch.device) -> Callable[[], None]:
    """Of (1, 3, size, size), from its file's pixels on."""
    cast(Network, network).residual_std.fill_(0.1)
    cast(Network, network).scale.fill_(SCALE)
    low_res = torch.zeros(1, 3, size, size)
    generator = ResidualGenerator(device=device, precision=autocast_dtype(device))

    def restore() -> None:
        generator.generate_images(cast(Network, network), low_res, 1, steps, seed=0)

    return restore


def one_pass(network: nn.Module, size: int, device: torch.device) -> Callable[[], None]:
    """Of (1, 3, size, size)."""
    low_res = torch.zeros(1, 3, size, size, device=device)

    def restore() -> None:
        with torch.inference_mode(), autocast(device):
            network(low_res)

    return restore


def floating_point_operations(work: Callable[[], None]) -> int:
    """Of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def matrix_product_rate(device: torch.device, side: int) -> float:
    """Floating-point operations per second of a large square one."""
    dtype = autocast_dtype(device) or torch.float32
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    timing = in_turns({"product": lambda: matrix @ matrix}, rounds=7, device=device)["product"]
    return 2 * side**3 / timing.low


def train_for(
    seconds: float, network: nn.Module, step: Timing, photos: Path, device: torch.device
) -> tuple[nn.Module, int]:
    """The averaged network after as many steps as fit into the time, and their number."""
    steps = max(2, round(seconds / step.median))
    config = TrainingConfig(
        max_steps=steps,
        batch_size=QUALITY_BATCH,
        learning_rate=LEARNING_RATE,
        warmup_steps=steps // 10,
        ema_decay=0.99,
        validate_every=steps,
        save_every=steps,
    )
    cast(Network, network).residual_std.zero_()
    training = ImageDataset(photos, QUALITY_CROP, SCALE, augment="dihedral")
    diffusion = DiffusionModel(device=device)
    with tempfile.TemporaryDirectory() as folder:
        run, _ = diffusion.train(
            network,
            training,
            config,
            precision=autocast_dtype(device),
            checkpoint_dir=Path(folder),
            log_dir=Path(folder) / "logs",
        )
        averaged = load_checkpoint(run.last, device)["ema"]
    load_weights(network, cast(dict[str, torch.Tensor], averaged), "the run that just ended")
    return network.eval(), steps


def fidelity_psnr(network: nn.Module, images: Iterable[Pair], device: torch.device) -> float:
    """Mean luma PSNR in dB of the predicted mean, or else of one step."""
    steps = 0 if isinstance(network, UNet) and network.predictor is not None else 1
    generator = ResidualGenerator(device=device)
    protocol = metrics.Comparison(crop=SCALE)
    values = []
    for picture in images:
        low_res = to_model_range(picture.low_res[None].float() / 255)
        restored = generator.generate_images(cast(Network, network), low_res, 1, steps, seed=0).cpu()
        values.append(float(metrics.psnr(restored, picture.truth[None].float() / 255, protocol)))
    return sum(values) / len(values)


def qualities(
    networks: Mapping[str, nn.Module],
    seconds: float,
    photos: Path,
    images: Iterable[Pair],
    device: torch.device,
) -> dict[str, Quality]:
    works = {
        name: training_step(copy.deepcopy(network), QUALITY_BATCH, QUALITY_CROP, device)
        for name, network in networks.items()
    }
    timings = in_turns(works, rounds=3, device=device)
    found = {}
    for name, network in networks.items():
        trained, steps = train_for(seconds, network, timings[name], photos, device)
        found[name] = Quality(steps, fidelity_psnr(trained, images, device))
    return found
