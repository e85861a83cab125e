"""Tests of bench/: that what is timed is what is said, without the packages it compares with."""

import pytest
import torch
from torch import nn

from bench.contenders import Peer, enlargers
from bench.networks import (
    denoising_step,
    floating_point_operations,
    parameter_count,
    qualities,
    training_step,
)
from bench.sweep import CHANGES, RECIPE, run
from bench.timing import Timing, in_turns
from evaluation.images import EvaluationConfig, ImageSet
from examples.dead_leaves import draw_dead_leaves_folder
from train_diffusion import parse

CPU = torch.device("cpu")


def test_contenders_take_turns_and_the_warm_up_does_not_count():
    done = []
    works = {name: lambda name=name: done.append(name) for name in "ab"}
    timings = in_turns(works, rounds=2, device=CPU, warm_up=1)
    assert "".join(done) == "ababab"
    assert timings["a"].low <= timings["a"].median <= timings["a"].high


def test_rates_are_of_the_median_and_from_slow_to_fast():
    timing = Timing(2.0, 1.0, 4.0)
    assert timing.rate(8) == "4 (2 to 8)"
    assert timing.seconds(10) == "20 (10 to 40)"


def test_operations_are_counted_as_arithmetic_says():
    convolution, image = nn.Conv2d(3, 8, 3, padding=1), torch.ones(1, 3, 16, 16)
    with torch.no_grad():
        assert floating_point_operations(lambda: convolution(image)) == 2 * 8 * 3 * 9 * 16 * 16


@pytest.mark.parametrize(
    ("name", "published"), [("SAFMN", 0.24e6), ("Compact of Real-ESRGAN", 1.21e6), ("ESRGAN", 16.7e6)]
)
def test_an_enlarger_has_the_published_size_and_enlarges_by_4(name, published):
    pytest.importorskip("spandrel")
    network = enlargers(CPU)[name]
    assert parameter_count(network) == pytest.approx(published, rel=1e-2)
    assert network(torch.ones(1, 3, 24, 32)).shape == (1, 3, 96, 128)


def test_a_peer_sees_the_upscaled_image_and_can_be_trained_and_measured(tmp_path):
    seen = []

    class Convolution(nn.Conv2d):
        def forward(self, x, t):
            seen.append(tuple(x.shape))
            return super().forward(x)

    peer = Peer(Convolution(6, 3, 3, padding=1))
    before = peer.network.weight.detach().clone()
    training_step(peer, 2, 16, CPU)()
    assert not torch.equal(peer.network.weight, before)
    denoising_step(peer, 16, CPU)()
    assert seen == [(2, 6, 16, 16), (1, 6, 16, 16)]
    draw_dead_leaves_folder(tmp_path, 2, 64, seed=0)
    images = ImageSet(tmp_path, EvaluationConfig(4, lpips=False))
    steps, psnr = qualities({"mine": peer}, 1e-9, tmp_path, images, CPU)["mine"]
    assert steps == 2
    assert 10 < psnr < 40


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_one_that_the_script_takes(change):
    plain, changed = (parse([f"@{RECIPE}", *flags])[0] for flags in ([], change.split()))
    assert (changed != plain) == bool(change)


@pytest.mark.slow
def test_a_trial_is_trained_once_and_measured(tmp_path, photo_folder):
    small = "--unet_base_dim 8 --predictor_blocks 1 --batch_size 2 --img_size 32"
    draw_dead_leaves_folder(tmp_path / "others", 1, 64, seed=9, min_radius=2)
    change, *numbers = run(small, 2, str(photo_folder), str(tmp_path / "others"), tmp_path)
    assert change == f"`{small}`"
    assert float(numbers[0]) > 0
    assert float(numbers[3].split(" / ")[0]) > 10
    assert run(small, 2, "nowhere", "nowhere", tmp_path) == [change, *numbers]
