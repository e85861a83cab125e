"""CUDA without CUDA: every tensor is on the right device, and nobody waits for it but once per step."""

import pytest
import torch

import bicubic
from degradation import Degradation
from diffusion import DiffusionModel, ResidualGenerator
from engine.processes import Processes
from evaluation.validation import Validator
from models import LoadedModel
from restoration import RestoreConfig, Restorer
from samplers import SCHEDULERS
from tests.networks import BICUBIC, PROCESS, tiny_unet
from tests.pretended import pretended_device
from training import MicroBatch, TrainingConfig, new_state, train_step
from util import Crops, ImageDataset

pytestmark = pytest.mark.slow
SCALE, SIZE = 2.0, 32


@pytest.fixture
def pretended(monkeypatch):
    with pretended_device("cuda", monkeypatch) as device:
        yield device
    for one in vars(bicubic).values():  # what is cached on the pretended device is worth nothing later
        if hasattr(one, "cache_clear"):
            one.cache_clear()


def small_unet(predictor_blocks=2, **settings):
    """Of few layers: on the pretended device every operation costs the same, however small it is."""
    return tiny_unet(predictor_blocks=predictor_blocks, blocks_per_level=1, **settings)


def crops(device, count=2):
    return Crops(torch.zeros(count, 3, SIZE, SIZE, dtype=torch.uint8, device=device))


def reads_between_evaluations(network, pretended):
    """A list that grows by the number of reads so far at each evaluation of the network."""
    counts = []
    network.register_forward_hook(lambda *_: counts.append(len(pretended.reads)))
    return counts


@pytest.mark.parametrize("conditioning", ["none", "concat", "cross_attention", "both", "tokens"])
def test_the_loss_reads_nothing(pretended, conditioning):
    network = small_unet(conditioning=conditioning).to(pretended.device)
    loss = DiffusionModel(100, pretended.device).restoration_loss(Degradation(scale=SCALE))
    losses = loss(network, crops(pretended.device), torch.Generator(pretended.device))
    losses.sum().backward()
    assert losses.device.type == "cuda"
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert not pretended.reads


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_optimiser_step_reads_once(pretended, optimizer):
    network = small_unet().to(pretended.device)
    config = TrainingConfig(max_steps=4, optimizer=optimizer, warmup_steps=1).resolved(4)
    state = new_state(network, config)
    loss = DiffusionModel(100, pretended.device).restoration_loss(Degradation(scale=SCALE))
    for _ in range(2):
        parts = [MicroBatch(number, [(0, 0), (0, 1)], 0.25) for number in range(2)]
        batches = iter([(part, crops("cpu")) for part in parts])  # as a DataLoader gives them
        report = train_step(state, loss, batches, config, Processes(pretended.device))
        assert report.finite
    assert state.step == 2
    assert len(pretended.reads) == 2 * 2  # two numbers, together, a step


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sampling_reads_nothing_between_evaluations(pretended, scheduler):
    network = small_unet().to(pretended.device).eval()
    counts = reads_between_evaluations(network, pretended)
    generator = ResidualGenerator(device=pretended.device, scheduler=scheduler)
    images = generator.generate_images(network, torch.zeros(2, 3, 12, 16), 2, 3, seed=0)
    assert images.device.type == "cuda"
    assert len(counts) == 2 * len(generator.plan(3))
    assert len(set(counts)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3, "tile": 0},
        {"steps": 2, "self_ensemble": True},
        {"steps": 2, "scheduler": "ddim", "eta": 1.0, "num_images": 2},
        {"steps": 2, "consistency": True},
        {"mode": "fidelity"},
    ],
    ids=str,
)
def test_restoring_reads_nothing_between_evaluations(pretended, options):
    """In two windows, one above the other."""
    config = RestoreConfig(**{"tile": 32, "overlap": 8} | options)
    model = LoadedModel(small_unet(attention_window=2), PROCESS, BICUBIC, 1)
    restorer = Restorer(model, config, pretended.device)
    counts = reads_between_evaluations(restorer.network, pretended)
    assert restorer(torch.full((1, 3, 20, 12), 0.5)).shape == (1, 3, 40, 24)
    assert len(set(counts)) == (0 if config.mode else 1)


def test_a_device_without_float64_is_given_none(pretended, monkeypatch, photo_folder):
    """MPS has none: what is made in float64 is made on the CPU."""
    monkeypatch.setattr(bicubic, "WITHOUT_FLOAT64", {pretended.device.type})
    network = small_unet().to(pretended.device)
    diffusion = DiffusionModel(5, pretended.device)
    loss = diffusion.restoration_loss(Degradation(scale=SCALE))
    loss(network, crops(pretended.device), torch.Generator(pretended.device)).sum().backward()
    Validator(diffusion, ImageDataset([photo_folder / "0.png"], SIZE, SCALE, train=False))(network)
    assert torch.float32 in pretended.dtypes
    assert torch.float64 not in pretended.dtypes


def test_the_pretence_finds_what_it_should(pretended):
    there = torch.zeros(3, device=pretended.device)
    with pytest.raises(RuntimeError, match="cpu"):
        there + torch.zeros(3)
    assert not pretended.reads
    float(there.sum())
    there.cpu()
    assert len(pretended.reads) == 2
