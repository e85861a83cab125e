"""Shared by all tests: one thread (bit-exact results need a fixed number), small images, tiny networks."""

import os
import tempfile
from pathlib import Path

# Some virtual machines announce AMX tiles and die of them (SIGILL). oneDNN and OpenMP read these once, at import,
# and child processes inherit them.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="test-cache-")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from examples.dead_leaves import dead_leaves  # noqa: E402
from imaging.files import write_image  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sr_data() -> Path:
    """The folder of real photos, or a skip that says why."""
    if "SR_DATA" not in os.environ:
        pytest.skip("SR_DATA is not set: it names the folder with the Set5, BSD100 and BSDS500 photos")
    return Path(os.environ["SR_DATA"])


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six dead-leaves images of 48 x 56 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(6):
        image = dead_leaves((48, 56), np.random.default_rng(index), min_radius=2, max_radius=24)
        write_image(folder / f"{index}.png", image)
    return folder
