"""The first 20 losses of a small float32 run, kept: a refactor must not move one bit of them.

After a change that is meant to move them, `python -m tests.test_loss_trace` keeps the new ones.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion import DiffusionModel
from training import TrainingConfig
from unet import UNet
from util import ImageDataset

KEPT = Path(__file__).with_name("loss_trace.json")
# Four drawn by dead_leaves((48, 48), np.random.default_rng(index)) of commit 7981c09; today it draws others.
IMAGES = Path(__file__).with_name("loss_trace")
STEPS = 20


def machine():
    """What the last bits depend on."""
    cpu = torch.cpu.get_capabilities().get("cpu_name")
    return {"torch": torch.__version__.split("+")[0], "cpu": cpu}


def trace(folder):
    """The losses of the first steps, as TensorBoard has them: float32."""
    dataset = ImageDataset(IMAGES, 32, 4)
    torch.manual_seed(0)
    config = TrainingConfig(max_steps=STEPS, batch_size=2, learning_rate=1e-3, warmup_steps=5, log_every=1)
    unet = UNet(base_dim=16, dim_mults=(1, 2), context_dim=16)
    DiffusionModel().train(
        unet,
        dataset,
        config,
        checkpoint_dir=folder / "checkpoints",
        log_dir=folder / "logs",
    )
    events = EventAccumulator(str(folder / "logs")).Reload().Scalars("train/loss")
    return [event.value for event in events]


@pytest.mark.slow
def test_the_first_losses_are_the_kept_ones(tmp_path):
    kept = json.loads(KEPT.read_text())
    losses = trace(tmp_path)
    assert len(losses) == STEPS
    if machine() == kept["machine"]:
        assert losses == kept["losses"]
    else:  # another version or instruction set rounds otherwise
        assert losses == pytest.approx(kept["losses"], rel=1e-3)


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        KEPT.write_text(json.dumps({"machine": machine(), "losses": trace(Path(folder))}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
