"""Shared by all tests: one thread (bit-exact results need a fixed number), small images, tiny networks."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

# Read once, when torch is imported, and inherited by child processes. Some virtual machines announce AMX but
# die of it (SIGILL).
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="test-cache-")
# Compiled code of a CPU with other instructions gives NaN.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["XDG_CACHE_HOME"]

import numpy as np
import pytest
import torch
from hypothesis import settings

from examples.dead_leaves import dead_leaves
from imaging.files import write_image

torch.set_num_threads(1)
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MPLBACKEND"):
    os.environ.pop(name, None)  # of a job or a notebook in which the tests are started
signal.signal(signal.SIGINT, signal.default_int_handler)  # is ignored where the tests run in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and under nohup
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def sr_data() -> Path:
    """The folder of real photos, or a skip that says why."""
    if "SR_DATA" not in os.environ:
        pytest.skip("SR_DATA is not set: it names the folder with the Set5, BSD100 and BSDS500 photos")
    return Path(os.environ["SR_DATA"])


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six dead-leaves images of 48 x 56 pixels, which no test may change."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(6):
        image = dead_leaves((48, 56), np.random.default_rng(index), min_radius=2, max_radius=24)
        write_image(folder / f"{index}.png", image)
    return folder
