"""Register a noise schedule of one's own, train with it for some seconds, and sample.

    python -m examples.change_the_process

The scripts know it from here on, too: in a script of your own, register it and call `train_diffusion.main`.
"""

import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusion import SCHEDULES, DiffusionModel, ResidualGenerator
from engine.cli import module_parser
from examples.dead_leaves import draw_dead_leaves_folder
from training import TrainingConfig
from unet import UNet
from util import ImageDataset


def circle_scales(timesteps: int) -> tuple[Tensor, Tensor]:
    """(T,) and (T,) float64: a quarter of a circle at constant speed."""
    angle = torch.arange(1, timesteps + 1, dtype=torch.float64) / (timesteps + 1) * math.pi / 2
    return angle.cos(), angle.sin()


SCHEDULES["circle"] = circle_scales


def train_and_restore(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """(4, 3, H, W) in [-1, 1] three times: original, bicubic and restored."""
    torch.manual_seed(0)
    paths = draw_dead_leaves_folder(folder / "images", 12, 64, seed=0, min_radius=4)
    unet = UNet(base_dim=16, dim_mults=(1, 2), conditioning="concat", predictor_blocks=2, predictor_dim=32)
    config = TrainingConfig(max_steps=60, batch_size=8, learning_rate=2e-3, ema_decay=0.9)
    diffusion, dataset = DiffusionModel(schedule="circle"), ImageDataset(paths[4:], 32, 2)
    diffusion.train(unet, dataset, config, checkpoint_dir=folder / "run", log_dir=folder / "logs")
    held_out = [ImageDataset(paths[:4], 64, 2, train=False)[index] for index in range(4)]
    low_res, bicubic, original, _ = (torch.stack(column) for column in zip(*held_out, strict=True))
    restored = ResidualGenerator(process=diffusion.process).generate_images(
        unet.eval(), low_res, num_inference_steps=1, seed=0
    )
    return original, bicubic, 2 * restored - 1


def main(argv: Sequence[str] | None = None) -> int:
    module_parser("examples.change_the_process", __doc__).parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        original, *others = train_and_restore(Path(folder))
    for name, images in zip(("bicubic", "restored"), others, strict=True):
        error = ((images - original) / 2).square().mean()
        print(f"{name:9}{-10 * float(error.log10()):.2f} dB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
