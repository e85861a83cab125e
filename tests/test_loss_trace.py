"""The first 20 losses of a small float32 run, kept: a refactor must not move one bit of them.

Other instruction sets round otherwise: from SSE4.1 to AVX-512 the losses agree to a relative 1.5e-7. There,
and with other versions of torch, they are compared to 1e-5: a schedule, mode or learning rate whose
coefficient is wrong by 1 % exceeds that tenfold.
After a change that is meant to move them, `python -m tests.test_loss_trace` keeps the new ones.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from diffusion import DiffusionModel
from tests.runs import logged
from training import TrainingConfig
from unet import UNet
from util import ImageDataset

KEPT = Path(__file__).with_name("loss_trace.json")
# Four drawn by dead_leaves((48, 48), np.random.default_rng(index)) of commit 7981c09; today it draws others.
IMAGES = Path(__file__).with_name("loss_trace")
STEPS = 20
TOLERANCE = 1e-5


def machine():
    """Return what the last bits depend on; a CPU's name is no part of it, as it stands for several kinds."""
    cpuinfo = Path("/proc/cpuinfo")
    fields = dict(
        re.findall(r"^([\w ]+?)\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    )
    return {
        "torch": torch.__version__.split("+")[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": os.environ["ONEDNN_MAX_CPU_ISA"],
        "cpu": [fields.get(name) for name in ("vendor_id", "cpu family", "model")],
    }


def trace(folder):
    """The losses of the first steps, as TensorBoard has them: float32."""
    dataset = ImageDataset(IMAGES, 32, 4)
    torch.manual_seed(0)
    steps = {"max_steps": STEPS, "warmup_steps": 5, "log_every": 1, "save_every": STEPS}
    config = TrainingConfig(batch_size=2, learning_rate=1e-3, **steps)
    unet = UNet(base_dim=16, dim_mults=(1, 2), context_dim=16)
    places = {"checkpoint_dir": folder / "checkpoints", "log_dir": folder / "logs"}
    DiffusionModel().train(unet, dataset, config, **places)
    return [loss for _, loss in logged(folder / "logs")]


@pytest.mark.slow
def test_the_first_losses_are_the_kept_ones(tmp_path):
    kept = json.loads(KEPT.read_text())
    losses = trace(tmp_path)
    if machine() == kept["machine"]:
        assert losses == kept["losses"]
    assert losses == pytest.approx(kept["losses"], rel=TOLERANCE)


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        KEPT.write_text(json.dumps({"machine": machine(), "losses": trace(Path(folder))}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
