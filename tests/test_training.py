"""Tests of training.py: the loop on problems small enough to know the answer."""

import itertools
import math
import os
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from engine.checkpoint import CheckpointError, load_checkpoint, read_for_resume
from engine.processes import Processes
from engine.run import RunFiles
from tests.runs import assert_equal, logged, start
from training import (
    BatchPlan,
    NonFiniteError,
    TrainingConfig,
    TrainingLoop,
    Validation,
    WorkerError,
    ema_decay_at,
    learning_rate_at,
    new_state,
    noise_seed,
    restore_state,
    train_step,
    update_ema,
)


class Numbers:
    """Ten samples, (epoch, index) is a vector that depends on both."""

    def __len__(self):
        return 10

    def name(self, index):
        return f"number {index}"

    def failures(self):
        return 0

    def collate(self, samples):
        return torch.stack(samples)

    def crop(self, key):
        epoch, index = key
        return torch.randn(3, generator=torch.Generator().manual_seed(1000 * epoch + index))


def noisy_regression(model, batch, generator):
    """The losses of predicting the sum of a vector from a noisy copy of it."""
    noise = 0.1 * torch.randn(batch.shape, generator=generator)
    return (model(batch + noise)[:, 0] - batch.sum(1)).square()


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))


def config(**settings):
    defaults = {"max_steps": 12, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2}
    return TrainingConfig(**{**defaults, "validate_every": 4, "save_every": 4, "log_every": 1, **settings})


def run_in(folder):
    return RunFiles(folder / "checkpoints", folder / "logs", "model", {"network": {}})


def run_training(folder, settings, state=None, loss=noisy_regression, dataset=None, **options):
    """The state after a run, and the signal that ended it."""
    dataset, processes = dataset or Numbers(), Processes(torch.device("cpu"))
    state, resolved = state or new_state(small_model(), settings), settings.resolved(len(dataset))

    def step(batches):
        return train_step(state, loss, batches, resolved, processes)

    loop = TrainingLoop(state, step, dataset, resolved, run_in(folder), processes, **options)
    return state, loop.train()


# ------------------------------------------------------------------------------------------------- data order


@st.composite
def plans(draw):
    sizes = {"batch_size": st.integers(1, 9), "accumulation_steps": st.integers(1, 5)}
    settings = draw(st.builds(TrainingConfig, **sizes, seed=st.integers(0, 99)))
    return BatchPlan(draw(st.integers(1, 200)), settings, draw(st.integers(1, 7)))


@given(plans(), st.integers(0, 3))
def test_an_epoch_uses_every_sample_once(plan, epoch):
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    used = [pair for step in steps for pair in plan.group(step)]
    assert sorted(used) == [(epoch, index) for index in range(plan.length)]


@given(plans(), st.integers(0, 50))
def test_the_samples_of_a_step_weigh_the_same_however_many_processes_share_them(plan, step):
    passes = plan.config.accumulation_steps * plan.world_size
    alone = BatchPlan(plan.length, replace(plan.config, accumulation_steps=passes))
    shared = [part for rank in range(plan.world_size) for part in plan.micro_batches(step, rank)]
    assert sorted(shared) == alone.micro_batches(step)
    assert sorted(pair for part in shared for pair in part.pairs) == sorted(plan.group(step))
    assert sum(part.weight * len(part.pairs) for part in shared) == pytest.approx(1)
    assert all(1 <= len(part.pairs) <= plan.config.batch_size for part in shared)


def test_epochs_are_shuffled_differently_and_repeatably():
    first, again, other = (BatchPlan(50, config(batch_size=50, seed=seed)) for seed in (3, 3, 4))
    orders = [[index for _, index in first.group(step)] for step in range(2)]
    assert orders[0] != orders[1]
    assert orders[1] == [index for _, index in again.group(1)]
    assert orders[0] != [index for _, index in other.group(0)]


def test_noise_seeds_do_not_collide():
    seeds = {noise_seed(s, t, m) for s in range(5) for t in range(200) for m in range(8)}
    assert len(seeds) == 5 * 200 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


# ------------------------------------------------------------------------------------------------- the step


def weights_of(state):
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def test_accumulating_micro_batches_equals_one_large_batch(tmp_path):
    def without_noise(model, batch, generator):
        return (model(batch)[:, 0] - batch.sum(1)).square()

    weights = []
    for batch, accumulation in ((8, 1), (2, 4), (4, 2)):  # 10 samples: the last group has 2
        settings = config(batch_size=batch, accumulation_steps=accumulation)
        state, _ = run_training(tmp_path / str(batch), settings, loss=without_noise)
        weights.append(weights_of(state))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(weights[0], weights[2], atol=1e-5, rtol=0)


def test_gradients_are_clipped(tmp_path):
    settings = config(max_steps=1, warmup_steps=0, max_grad_norm=1e-3)
    state = new_state(small_model(), settings)
    seen = []
    state.optimizer.register_step_pre_hook(
        lambda *_: seen.append(sum(float(p.grad.square().sum()) for p in state.model.parameters()) ** 0.5)
    )
    run_training(tmp_path, settings, state)
    assert seen == [pytest.approx(1e-3, rel=1e-2)]
    assert logged(tmp_path / "logs", "train/gradient_norm")[0][1] > 1e-2


def test_the_learning_rate_warms_up_and_ends_at_its_fraction():
    settings = config(max_steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1).resolved(10)
    rates = [learning_rate_at(step, settings) for step in range(101)]
    assert [rates[step] for step in (0, 9, 10, 55, 100)] == pytest.approx([0.1, 1, 1, 0.55, 0.1])
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_the_average_is_exponential_with_a_ramp():
    settings = config(ema_decay=0.9)
    assert [ema_decay_at(step, settings) for step in (0, 10, 10_000)] == [0.1, 0.55, 0.9]
    model, ema = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(ema.weight, 0.0)
    for _ in range(3):
        update_ema(ema, model, 0.9)
    assert ema.weight.item() == pytest.approx(1 - 0.9**3)


def test_a_step_that_is_not_finite_changes_nothing_and_too_many_end_the_run(tmp_path):
    def nan_from_the_second_on(model, batch, generator):
        return noisy_regression(model, batch, generator) * (math.nan if state.step else 1.0)

    settings = config(max_steps=50, save_every=1, keep_checkpoints=9)
    state = new_state(small_model(), settings)
    with pytest.raises(NonFiniteError, match=r"number \d, number \d"):
        run_training(tmp_path, settings, state, nan_from_the_second_on)
    first, *_, last = map(load_checkpoint, run_in(tmp_path).numbered())
    assert (first["step"], first["skipped"], last["step"], last["skipped"]) == (1, 0, 6, 5)
    for part in ("model", "ema", "optimizer"):
        assert_equal(first[part], last[part])


# ------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ("adamw", None),
        ("adamw", torch.float16),
        ("muon", None),
        pytest.param("adamw8bit", None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, optimizer, precision):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    settings = config(batch_size=3, accumulation_steps=2, optimizer=optimizer)

    def fresh_state():
        torch.manual_seed(0)
        # 8192 values in the middle: smaller tensors keep a 32-bit state of 8-bit AdamW.
        model = nn.Sequential(nn.Linear(3, 128), nn.Linear(128, 64), nn.Linear(64, 1))
        state = new_state(model, settings, precision)
        if precision is not None:  # a scale that the first gradients overflow at
            state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**18})
        return state

    whole, _ = run_training(tmp_path / "whole", settings, fresh_state())
    part, folder = fresh_state(), tmp_path / "part"

    def pull_the_plug(ema):
        if part.step == 8:
            raise MemoryError
        return Validation(0.0, {}, {})

    often = replace(settings, validate_every=2, save_every=5)
    with pytest.raises(MemoryError):
        run_training(folder, often, part, validate=pull_the_plug)
    resumed = fresh_state()
    restore_state(resumed, read_for_resume(run_in(folder).last))
    assert resumed.step == 5  # in the middle of the third epoch
    time.sleep(1)  # TensorBoard orders logs by the second in their names
    run_training(folder, settings, resumed)
    assert (whole.skipped == 0) == (precision is None)
    ours, theirs = whole.content(), resumed.content()
    assert_equal({**ours, "best_score": 0}, {**theirs, "best_score": 0})
    assert logged(tmp_path / "whole" / "logs") == logged(folder / "logs")
    values = whole.optimizer.state[whole.model[1].weight].values()
    assert (torch.uint8 in [getattr(value, "dtype", None) for value in values]) == (optimizer == "adamw8bit")


def test_the_state_of_another_optimiser_is_refused(tmp_path):
    run_training(tmp_path, config(optimizer="muon"))
    with pytest.raises(CheckpointError, match="muon"):
        restore_state(new_state(small_model(), config()), read_for_resume(run_in(tmp_path).last))


# ------------------------------------------------------------------------------------------------- keeping


def test_the_best_checkpoint_is_the_one_with_the_highest_psnr(tmp_path):
    scores = iter([20.0, 25.0, 22.0])

    def validate(ema):
        score = next(scores)
        return Validation(score, {"psnr": score}, {"grid": torch.zeros(3, 4, 4)})

    run_training(tmp_path, config(), validate=validate)
    best, last = load_checkpoint(run_in(tmp_path).best), load_checkpoint(run_in(tmp_path).last)
    assert (best["step"], best["best_score"]) == (8, 25.0)
    assert (last["step"], last["best_score"]) == (12, 25.0)
    assert logged(tmp_path / "logs", "validation/psnr") == [(4, 20.0), (8, 25.0), (12, 22.0)]


def test_the_newest_checkpoints_are_kept_and_going_back_gives_up_the_later_ones(tmp_path):
    run, settings = run_in(tmp_path), config(max_steps=60, save_every=5, keep_checkpoints=2)
    state, _ = run_training(tmp_path, settings)
    for newest in (["000055", "000060"], ["000025", "000030"]):
        names = [f"model_step000{step}.pth" for step in newest]
        assert sorted(path.name for path in run.checkpoint_dir.iterdir()) == ["model_last.pth", *names]
        assert run.last.samefile(run.numbered()[-1])
        state.step = 20
        run_training(tmp_path, replace(settings, max_steps=30), state)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(tmp_path):
    run_training(tmp_path, config(save_every=3))
    run = run_in(tmp_path)
    data = run.last.read_bytes()
    run.last.write_bytes(data[: len(data) // 2])  # last and step 12 are one file
    with pytest.raises(CheckpointError, match=r"model_last\.pth.*step000000009\.pth"):
        read_for_resume(run.last)


@pytest.mark.parametrize("fault", ["in the way", "No space left", "cannot be imported"])
def test_a_log_that_cannot_be_written_is_a_warning_and_the_run_goes_on(fault, tmp_path, caplog, monkeypatch):
    def full(self, name, value, step):
        raise OSError(28, "No space left on device")

    if fault == "in the way":
        (tmp_path / "logs").write_text(fault)
    elif fault == "No space left":
        monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    else:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    state, received = run_training(tmp_path, config(max_steps=4))
    assert (state.step, received) == (4, None)
    assert len([record for record in caplog.records if "log" in record.message]) == 1


def test_a_profile_is_written_beside_the_curves(tmp_path):
    run_training(tmp_path, config(max_steps=11, profile=True))
    trace = next((tmp_path / "logs").glob("*.pt.trace.json")).read_text()
    assert trace.count('"ProfilerStep#') == 5
    assert "aten::linear" in trace


class Failing(Numbers):
    """Loses what is read from it, or kills the process that reads it, in the second epoch."""

    kills = False

    def crop(self, key):
        if key == (1, 5):
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("none of the 10 images can be read any more")
        return super().crop(key)


@pytest.mark.parametrize(
    ("workers", "named"),
    [
        (0, "^none of the 10 images"),
        pytest.param(1, "^RuntimeError: none of the 10 images", marks=pytest.mark.slow),
        pytest.param(1, "died while reading number 5 ", marks=pytest.mark.slow),
    ],
)
def test_images_or_workers_that_are_lost_end_the_run_with_what_was_learnt(tmp_path, workers, named):
    def while_reading_ahead(model, batch, generator):
        time.sleep(0.5 * workers)  # the worker is lost in the middle of a step
        return noisy_regression(model, batch, generator)

    settings = config(save_every=100, num_workers=workers)
    state = new_state(small_model(), settings)
    dataset = Failing()
    dataset.kills = "died" in named
    with pytest.raises(WorkerError, match=named):
        run_training(tmp_path, settings, state, while_reading_ahead, dataset=dataset)
    assert load_checkpoint(run_in(tmp_path).last)["step"] == state.step > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_is_reported(tmp_path, number):
    handler = signal.getsignal(number)

    def interrupted(model, batch, generator):
        if state.step == 6:
            os.kill(os.getpid(), number)
        return noisy_regression(model, batch, generator)

    settings = config(save_every=100, max_steps=1000)
    state = new_state(small_model(), settings)
    _, received = run_training(tmp_path, settings, state, interrupted)
    assert received == number
    assert load_checkpoint(run_in(tmp_path).last)["step"] == state.step == 7
    assert signal.getsignal(number) is handler


def test_a_second_interrupt_stops_at_once(tmp_path):
    def interrupted(model, batch, generator):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return noisy_regression(model, batch, generator)

    settings = config()
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path, settings, loss=interrupted)


@pytest.mark.slow
def test_workers_give_the_same_run_without_shared_memory(tmp_path, monkeypatch):
    """Containers have 64 MB of it, and a worker that finds none left its process waiting for ever."""

    def no_room(*_, **__):
        raise RuntimeError("unable to allocate shared memory(shm)")

    here, _ = run_training(tmp_path / "here", config())
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", no_room)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", no_room)
    there, _ = run_training(tmp_path / "there", config(num_workers=2))
    assert torch.equal(weights_of(here), weights_of(there))


@pytest.mark.slow
def test_a_signal_is_heeded_while_waiting_for_a_worker_that_is_stuck(tmp_path):
    class Stuck(Numbers):
        def crop(self, key):
            if key[0] == 1:
                time.sleep(3)  # until the steps of the first epoch are done
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(300)
            return super().crop(key)

    def work(settings):
        return run_training(tmp_path, settings, dataset=Stuck())[1]

    process = start(work, config(num_workers=1, save_every=100), tmp_path / "printed")
    process.join(200)  # less than the worker sleeps
    assert process.exitcode == signal.SIGTERM
    assert load_checkpoint(run_in(tmp_path).last)["step"] == 3


def test_adamw_is_torch_s_fused_one():
    group = new_state(small_model(), config(weight_decay=0.3, beta2=0.95)).optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["fused"]) == ((0.9, 0.95), 0.3, True)
