"""The first 20 losses of a small float32 run, kept: a refactor must not move one bit of them.

Other instruction sets round otherwise: from SSE4.1 to AVX-512 the losses agree to a relative 1.5e-7. There,
and with other versions of torch, they are compared to 1e-5, which a coefficient that is wrong by 1 % exceeds
tenfold.
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion import MODES, SCHEDULES, DiffusionModel
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


def trace(folder, learning_rate=1e-3):
    """The losses of the first steps, as TensorBoard has them: float32."""
    dataset = ImageDataset(IMAGES, 32, 4)
    torch.manual_seed(0)
    steps = {"max_steps": STEPS, "warmup_steps": 5, "log_every": 1, "save_every": STEPS}
    config = TrainingConfig(batch_size=2, learning_rate=learning_rate, **steps)
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
    assert losses == pytest.approx(kept["losses"], rel=TOLERANCE)


def larger(table, name, place):
    """An entry of a table of coefficients whose `place` is 1 % too large."""
    return {
        name: lambda *inputs: [c * (1.01 if i == place else 1) for i, c in enumerate(table[name](*inputs))]
    }


WRONG = {
    "signal_scale": (SCHEDULES, larger(SCHEDULES.copy(), "cosine", 0)),
    "noise_scale": (SCHEDULES, larger(SCHEDULES.copy(), "cosine", 1)),
    "c_skip": (MODES, larger(MODES.copy(), "v_prediction", 0)),
    "c_out": (MODES, larger(MODES.copy(), "v_prediction", 1)),
    "learning_rate": ({}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("coefficient", WRONG)
def test_a_coefficient_that_is_wrong_by_one_percent_is_caught(tmp_path, monkeypatch, coefficient):
    table, wrong = WRONG[coefficient]
    for name, entry in wrong.items():
        monkeypatch.setitem(table, name, entry)
    losses = trace(tmp_path, 1.01e-3 if coefficient == "learning_rate" else 1e-3)
    assert losses != pytest.approx(json.loads(KEPT.read_text())["losses"], rel=10 * TOLERANCE)


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        KEPT.write_text(json.dumps({"machine": machine(), "losses": trace(Path(folder))}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
