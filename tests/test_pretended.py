"""CUDA without CUDA: every tensor is on the right device, and nobody waits for it but once per step."""

import itertools

import pytest
import torch

import bicubic
from degradation import Degradation
from diffusion import MODES, DiffusionModel, ResidualGenerator
from engine.processes import Processes
from evaluation.validation import Validator
from models import LoadedModel
from restoration import RestoreConfig, Restorer
from samplers import DEFAULT_SCHEDULER, SCHEDULERS
from tests.networks import BICUBIC, PROCESS, tiny_unet
from tests.pretended import pretended_device
from training import MicroBatch, TrainingConfig, new_state, train_step
from util import Crops, ImageDataset

pytestmark = pytest.mark.slow
CONDITIONINGS = ("none", "concat", "cross_attention", "both", "tokens")
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


@pytest.mark.parametrize(
    ("conditioning", "mode", "predictor_blocks"),
    [*zip(CONDITIONINGS, itertools.cycle(MODES), itertools.cycle((0, 2)), strict=False)],
)
def test_the_loss_reads_nothing(pretended, conditioning, mode, predictor_blocks):
    network = small_unet(predictor_blocks, conditioning=conditioning).to(pretended.device)
    loss = DiffusionModel(100, pretended.device, mode).restoration_loss(Degradation(scale=SCALE))
    losses = loss(network, crops(pretended.device), torch.Generator(pretended.device))
    losses.sum().backward()
    assert losses.shape == (2,)
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


@pytest.mark.parametrize(
    ("scheduler", "predictor_blocks"), [*((name, 2) for name in SCHEDULERS), (DEFAULT_SCHEDULER, 0)]
)
def test_sampling_reads_nothing_between_evaluations(pretended, scheduler, predictor_blocks):
    network = small_unet(predictor_blocks).to(pretended.device).eval()
    counts = reads_between_evaluations(network, pretended)
    generator = ResidualGenerator(device=pretended.device, scheduler=scheduler)
    images = generator.generate_images(network, torch.zeros(2, 3, 12, 16), 2, 3, seed=0)
    assert images.shape == (4, 3, 24, 32)
    assert images.device.type == "cuda"
    assert len(counts) == 2 * len(generator.plan(3))
    assert len(set(counts)) == 1


@pytest.mark.parametrize(
    ("options", "predictor_blocks"),
    [
        ({"steps": 3}, 0),
        ({"steps": 3}, 2),
        ({"steps": 3, "tile": 0}, 2),
        ({"self_ensemble": True}, 2),
        ({"scheduler": "ddim", "eta": 1.0, "num_images": 2}, 2),
        ({"consistency": True}, 2),
    ],
    ids=str,
)
def test_restoring_reads_nothing_between_evaluations(pretended, options, predictor_blocks):
    """In two windows, one above the other."""
    network = small_unet(predictor_blocks, attention_window=2)
    config = RestoreConfig(**{"steps": 2, "tile": 32, "overlap": 8} | options)
    restorer = Restorer(LoadedModel(network, PROCESS, BICUBIC, 1), config, pretended.device)
    counts = reads_between_evaluations(restorer.network, pretended)
    restored = restorer(torch.full((1, 3, 20, 12), 0.5))
    assert restored.shape == (1, 3, 40, 24)
    assert counts
    assert len(set(counts)) == 1


def test_the_mean_is_predicted_on_the_device(pretended):
    model = LoadedModel(small_unet(), PROCESS, BICUBIC, 1)
    restorer = Restorer(model, RestoreConfig(mode="fidelity", tile=32), pretended.device)
    assert restorer(torch.full((1, 3, 40, 24), 0.5)).shape == (1, 3, 80, 48)


def test_validation_stays_on_the_device(pretended, photo_folder):
    diffusion = DiffusionModel(5, pretended.device)
    dataset = ImageDataset([photo_folder / "0.png"], SIZE, SCALE, train=False)
    found = Validator(diffusion, dataset)(small_unet(0).to(pretended.device))
    assert set(found.images) == {"low_bicubic_mean_original", "low_bicubic_sample_original"}


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
