"""The training loop for any step function, and the step of any `loss(model, batch, generator) -> (B,)`.

Data and random numbers are functions of (seed, step), so a resumed run is the uninterrupted one (as in EDM2,
Karras et al. 2024).

Another kind of training has a step function of its own, which takes the batches of one step, changes the
state and counts the step; a second network and its optimiser are a state among `TrainState.others`. The
TrainingLoop gives it data, validation, checkpoints, curves, signals, and other processes.
"""

import contextlib
import copy
import functools
import itertools
import logging
import math
import multiprocessing
import multiprocessing.util
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from engine.checkpoint import Checkpoint, CheckpointError, load_weights
from engine.device import default_workers
from engine.muon import Muon
from engine.options import Options, narrowed, one_line, option, rare_option
from engine.packages import IMPORT_ERRORS
from engine.processes import LostProcessError, Processes, RunError, handled_by, leave_stopping_to_the_parent
from engine.progress import progress
from engine.run import RunFiles, RunLogger, tracer
from engine.seeds import noise_seed

logger = logging.getLogger(__name__)

LossFunction = Callable[[nn.Module, Any, torch.Generator], Tensor]
OptimizerName = Literal["auto", "adamw8bit", "adamw", "muon"]
MAX_SKIPPED_IN_A_ROW = 5
SECONDS_BETWEEN_LOOKS = 5  # for a signal, while waiting for the processes that read


class Batch(Protocol):
    """Samples as they are collated: a tensor, or what moves like one."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch": ...


class Samples(Protocol):
    """A dataset the loop can train on; keys are (epoch, index)."""

    def __len__(self) -> int: ...
    def crop(self, key: tuple[int, int]) -> object: ...  # a sample, for `collate`
    def collate(self, samples: list[Any]) -> Batch: ...
    def name(self, index: int) -> str: ...  # its file
    def failures(self) -> int: ...  # how many could not be read


@dataclass(frozen=True)
class TrainingConfig(Options):
    """Says how a run trains; `resolved` decides what is None."""

    epochs: int = option(40, "passes over the images, one crop of each", low=1, fixed=False)
    max_steps: int | None = option(None, "optimiser steps, instead of epochs", low=1, fixed=False)
    batch_size: int = option(32, "crops per forward pass of one process", low=1)
    accumulation_steps: int = option(1, "forward passes of one process per optimiser step", low=1, script=64)
    learning_rate: float = option(2e-5, "peak, after a linear warm-up and before half a cosine", above=0)
    warmup_steps: int | None = option(None, "steps of it; auto: 5%, at most 500", low=0, fixed=False)
    final_learning_rate: float = rare_option(0.01, "end of the cosine, as part of the peak", low=0, high=1)
    weight_decay: float = rare_option(0.01, "weight decay (Loshchilov & Hutter 2019)", low=0)
    beta2: float = rare_option(0.99, "decay of AdamW's second moment", low=0, high=1)
    max_grad_norm: float = option(1.0, "global norm that gradients are clipped to", above=0)
    ema_decay: float = option(0.999, "decay of the averaged weights, after a ramp", low=0, high=1)
    optimizer: OptimizerName = option("auto", "optimiser; auto: 8-bit AdamW on CUDA, else AdamW")
    seed: int = option(0, "seed of data order, crops, noise and timesteps", low=0, high=2**63 - 1)
    validate_every: int | None = option(None, "steps between; auto: 20 in a run", low=1, fixed=False)
    save_every: int | None = option(None, "steps between; auto: as validations", low=1, fixed=False)
    log_every: int = option(10, "steps between points of the curves", low=1, fixed=False)
    keep_checkpoints: int = rare_option(2, "newest checkpoints to keep, besides the best", low=1, fixed=False)
    num_workers: int | None = option(None, "image readers; auto: by device and cores", low=0, fixed=False)
    profile: bool = option(False, "trace of 5 steps, written into the log folder", fixed=False)

    def resolved(self, length: int, world_size: int = 1) -> "ResolvedConfig":
        """Decide the lengths for a dataset of this length."""
        max_steps = self.max_steps or self.epochs * BatchPlan(length, self, world_size).steps_per_epoch
        validate_every = self.validate_every or max(1, max_steps // 20)
        decided = {
            "max_steps": max_steps,
            "warmup_steps": min(500, max_steps // 20) if self.warmup_steps is None else self.warmup_steps,
            "validate_every": validate_every,
            "save_every": self.save_every or validate_every,
        }
        return ResolvedConfig.from_dict({**self.to_dict(), **decided})


@dataclass(frozen=True)
class ResolvedConfig(TrainingConfig):
    """A TrainingConfig whose lengths are decided."""

    max_steps: int = narrowed(TrainingConfig, "max_steps")
    warmup_steps: int = narrowed(TrainingConfig, "warmup_steps")
    validate_every: int = narrowed(TrainingConfig, "validate_every")
    save_every: int = narrowed(TrainingConfig, "save_every")


class NonFiniteError(RunError):
    """Too many steps in a row had no finite loss or gradient."""


class WorkerError(RunError):
    """A process that reads data died, or no data can be read; names the files."""


class MicroBatch(NamedTuple):
    """One forward pass: its number in the step, (epoch, index) pairs, weight of each sample's loss."""

    number: int
    pairs: list[tuple[int, int]]
    weight: float


Batches = Iterator[tuple[MicroBatch, Batch]]


@dataclass(frozen=True)
class BatchPlan:
    """Plans which of `length` samples a step uses.

    An epoch is one shuffled pass, whose last group may be smaller.
    """

    length: int
    config: TrainingConfig
    world_size: int = 1

    @property
    def group_size(self) -> int:
        return self.config.batch_size * self.config.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.length / self.group_size)

    def group(self, step: int) -> list[tuple[int, int]]:
        """(epoch, index) of the samples of a step, of all processes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.length, self.config.seed, epoch)
        start = position * self.group_size
        return [(epoch, index) for index in order[start : start + self.group_size]]

    def micro_batches(self, step: int, rank: int = 0) -> list[MicroBatch]:
        """Plan the forward passes of a process in a step; the last group of an epoch may leave it none."""
        group, size = self.group(step), self.config.batch_size
        starts = range(0, len(group), size)
        parts = [MicroBatch(i, group[at : at + size], 1 / len(group)) for i, at in enumerate(starts)]
        return parts[rank :: self.world_size]


@functools.lru_cache(maxsize=2)
def _epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(length).tolist()
    return order


@dataclass
class TrainState:
    """A network, its averaged weights, and what `train_step` changes them with."""

    model: nn.Module
    ema: nn.Module  # with averaged weights, validated and used
    optimizer: torch.optim.Optimizer
    optimizer_name: OptimizerName
    precision: torch.dtype | None  # that the loss is autocast to; None: float32
    scaler: torch.amp.GradScaler  # of the loss, for float16 (Micikevicius et al. 2018)
    step: int = 0
    skipped: int = 0
    best_score: float = -math.inf
    others: dict[str, "TrainState"] = field(default_factory=dict)  # trained beside it, by name

    def content(self) -> dict[str, object]:
        """Return what a checkpoint holds of the state."""
        return {
            **{name: other.content() for name, other in self.others.items()},
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": {"name": self.optimizer_name, "state": self.optimizer.state_dict()},
            "step": self.step,
            "best_score": self.best_score,
            "skipped": self.skipped,
            "scaler": self.scaler.state_dict(),
        }


def new_state(model: nn.Module, config: TrainingConfig, precision: torch.dtype | None = None) -> TrainState:
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    device = next(model.parameters()).device
    name, optimizer = make_optimizer(model, config, device)
    # From a scale at which no first step overflows; it doubles where it can.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=precision == torch.float16)
    return TrainState(model, ema, optimizer, name, precision, scaler)


def make_optimizer(
    model: nn.Module, config: TrainingConfig, device: torch.device
) -> tuple[OptimizerName, torch.optim.Optimizer]:
    """Make an optimiser, and say what "auto" is; ValueError where bitsandbytes is wanted and fails."""
    name, parameters, rate = config.optimizer, list(model.parameters()), config.learning_rate
    betas, decay = (0.9, config.beta2), config.weight_decay
    if name == "muon":
        return name, Muon(parameters, rate, betas, decay)
    if name == "adamw8bit" or (name == "auto" and device.type == "cuda"):
        try:  # Dettmers et al. 2022
            from bitsandbytes.optim import AdamW8bit  # seconds to import, needed by this optimiser alone
        except IMPORT_ERRORS as error:
            message = f"bitsandbytes fails ({one_line(error)}), so adamw8bit cannot be: use adamw"
            if name == "adamw8bit":
                raise ValueError(message) from error
            logger.warning(message)
        else:
            return "adamw8bit", AdamW8bit(parameters, lr=rate, betas=betas, weight_decay=decay)
    return "adamw", torch.optim.AdamW(parameters, rate, betas, weight_decay=decay, fused=True)


def restore_state(state: TrainState, checkpoint: Checkpoint) -> None:
    """Continue from a checkpoint; CheckpointError: it does not fit, or is of another optimiser."""
    path, content = checkpoint
    name = content["optimizer"]["name"]
    if name != state.optimizer_name:
        raise CheckpointError(
            f"{path} was trained with the optimizer {name}, whose state does not fit {state.optimizer_name}: "
            f"resume with {name}"
        )
    load_weights(state.model, content["model"], path)
    load_weights(state.ema, content["ema"], path)
    state.optimizer.load_state_dict(content["optimizer"]["state"])
    if content.get("scaler"):
        state.scaler.load_state_dict(content["scaler"])
    state.step, state.skipped = int(content["step"]), int(content["skipped"])
    state.best_score = float(content["best_score"])
    for other, one in state.others.items():
        restore_state(one, Checkpoint(path, content[other]))


def learning_rate_at(step: int, config: ResolvedConfig) -> float:
    """Linear warm-up, then half a cosine (Loshchilov & Hutter 2017)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def ema_decay_at(step: int, config: TrainingConfig) -> float:
    return min(config.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, in place; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for averaged, newest in zip(ema.buffers(), model.buffers(), strict=True):
        averaged.copy_(newest)


class StepReport(NamedTuple):
    """Says how a step went, the same in every process."""

    loss: float  # mean over the samples
    finite: bool  # loss and gradient; else the step has changed nothing
    scalars: Mapping[str, float] = {}  # for the curves


StepFunction = Callable[[Batches], StepReport]


def train_step(
    state: TrainState, loss: LossFunction, batches: Batches, config: ResolvedConfig, processes: Processes
) -> StepReport:
    """One optimiser step; a step whose loss or gradient is not finite changes nothing.

    Every sample weighs the same, in whichever process it is. The device is waited for once.
    """
    device, model = processes.device, state.model.train()
    generator, total = torch.Generator(device), torch.zeros((), device=device)
    for micro, samples in batches:
        generator.manual_seed(noise_seed(config.seed, state.step, micro.number))
        inputs = samples.to(device, non_blocking=True)
        with torch.autocast(device.type, state.precision, enabled=state.precision is not None):
            losses = loss(model, inputs, generator)  # (B,)
        part = losses.float().sum() * micro.weight
        state.scaler.scale(part).backward()
        total += part.detach()
    processes.sum_gradients(model)
    state.scaler.unscale_(state.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    state.scaler.update()
    mean_loss, norm = torch.stack([processes.sum(total), grad_norm]).tolist()
    finite = math.isfinite(mean_loss) and math.isfinite(norm)
    if finite:
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate_at(state.step, config)
        state.optimizer.step()
        update_ema(state.ema, model, ema_decay_at(state.step, config))
    state.optimizer.zero_grad(set_to_none=True)
    state.skipped += not finite
    state.step += 1
    return StepReport(mean_loss, finite, {"gradient_norm": norm})


class Validation(NamedTuple):
    """Holds what a validation says of the averaged weights: a score, and what TensorBoard shows."""

    score: float  # higher is better; chooses the best checkpoint
    scalars: dict[str, float]
    images: dict[str, Tensor]  # (3, H, W) in [0, 1]


Validate = Callable[[nn.Module], Validation]


@dataclass
class TrainingLoop:
    """Takes the steps of a run, and gives them data, validation, checkpoints, curves and signals.

    `validate` is called with `state.ema`, in every process.
    """

    state: TrainState
    step: StepFunction
    dataset: Samples
    config: ResolvedConfig
    run: RunFiles
    processes: Processes
    validate: Validate | None = None

    def __post_init__(self) -> None:
        self.plan = BatchPlan(len(self.dataset), self.config, self.processes.world_size)
        self.received: int | None = None  # the first signal that asked to stop
        self._begin_point()

    def train(self) -> int | None:
        """Take steps from state.step to config.max_steps; returns None, or the signal that ended it early.

        The last checkpoint holds the final state. NonFiniteError, WorkerError, LostProcessError,
        CheckpointError.
        """
        state, config, is_main = self.state, self.config, self.processes.is_main
        with (
            handled_by(self._note_signal),
            contextlib.closing(RunLogger(self.run.log_dir, is_main, state.step, self.run.record)) as log,
            tracer(self.run.log_dir) if config.profile and is_main else contextlib.nullcontext() as trace,
            progress("train", config.max_steps, state.step, hidden=not is_main) as show,
        ):
            try:
                for report in self._steps():
                    if trace is not None:
                        trace.step()
                    show(state.step, f"loss {report.loss:.4f}, best {state.best_score:.2f}")
                    if self._due(config.log_every):
                        log.add("scalar", "train", state.step, self._point(report))
                    if self.validate is not None and self._due(config.validate_every):
                        self._validate(self.validate, log)
                    stop = self.processes.any(self.received is not None)
                    if stop or self._due(config.save_every):
                        self._save()
                    if stop:
                        return self.received or int(signal.SIGTERM)
            except (WorkerError, LostProcessError):
                self._save()  # the last whole step
                if self.received is None:
                    raise
        return self.received

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            logger.warning("%s: finishing the step, then saving", signal.Signals(number).name)
        elif number == signal.SIGINT:  # a second one stops at once
            raise KeyboardInterrupt

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.config.max_steps

    def _save(self) -> None:
        if self.processes.is_main:
            self.run.save_last(self.state.content(), self.state.step, self.config.keep_checkpoints)

    def _steps(self) -> Iterator[StepReport]:
        """Take one step after another; yields after each.

        NonFiniteError: too many in a row were skipped. WorkerError: there is no more data, or a signal has
        come while waiting for it.
        """
        batches, skipped_in_a_row = self._batches(), 0
        while self.state.step < self.config.max_steps:
            parts = self.plan.micro_batches(self.state.step, self.processes.rank)
            self.samples += len(self.plan.group(self.state.step))
            report = self.step(itertools.islice(batches, len(parts)))
            self.losses.append(report.loss)
            skipped_in_a_row = 0 if report.finite else skipped_in_a_row + 1
            if skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
                names = ", ".join(self.dataset.name(index) for part in parts for _, index in part.pairs)
                raise NonFiniteError(
                    f"{skipped_in_a_row} steps in a row up to step {self.state.step} had a loss or gradient "
                    "that is not finite: lower the learning rate or train in fp32. The last checkpoint is "
                    f"from before. The last batch was {names}"
                )
            yield report

    def _batches(self) -> Batches:
        """Read the forward passes of this process, to the end of the run, ahead of time by workers."""
        config, processes, workers = self.config, self.processes, self.config.num_workers
        if workers is None:
            workers = default_workers(processes.device, processes.world_size)
        reader = _Reader(self.dataset, workers)
        steps = range(self.state.step, config.max_steps)
        loader = DataLoader(
            reader,
            batch_size=None,  # the reader makes batches
            sampler=(part for step in steps for part in self.plan.micro_batches(step, processes.rank)),
            num_workers=workers,
            worker_init_fn=leave_stopping_to_the_parent,
            timeout=SECONDS_BETWEEN_LOOKS if workers else 0,
        )
        others = set(multiprocessing.active_children())
        try:
            loaded = iter(loader)
        except OSError as error:
            raise WorkerError(f"no process to read images can start ({error}): use num_workers 0") from error
        # They ignore requests to stop, and one that is stuck would keep this process from ending.
        for worker in set(multiprocessing.active_children()) - others:
            multiprocessing.util.Finalize(None, worker.kill, exitpriority=0)
        if workers:
            # DataLoader's handler would raise in the middle of a step; a timeout finds a dead one, too.
            with contextlib.suppress(AttributeError, ValueError):  # on Windows, and outside the main thread
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            since = time.perf_counter()
            read = self._next(loaded, reader)
            self.waited += time.perf_counter() - since
            yield pickle.loads(read)

    def _next(self, loaded: Iterator[bytes], reader: "_Reader") -> bytes:
        started, patience = time.monotonic(), 60
        while True:
            try:
                return next(loaded)
            except RuntimeError as error:
                reading, message = reader.names() or "no image", one_line(error)
                if "DataLoader worker (pid" in message:
                    raise WorkerError(f"a process died while reading {reading} ({message})") from error
                if "DataLoader timed out" not in message or self.received is not None:
                    # Without the traceback that comes with it from another process.
                    raise WorkerError(message[max(0, message.rfind("RuntimeError: ")) :]) from error
                if time.monotonic() - started > patience:
                    logger.warning("no image for %d seconds; being read: %s", patience, reading)
                    patience *= 2

    def _begin_point(self) -> None:
        self.losses: list[float] = []
        self.samples, self.waited, self.since = 0, 0.0, time.perf_counter()

    def _point(self, report: StepReport) -> dict[str, float]:
        """Return a point of the curves, of the steps since the last, and begin the next."""
        seconds = time.perf_counter() - self.since
        point = {
            "loss": float(np.mean(self.losses)),
            "learning_rate": learning_rate_at(self.state.step - 1, self.config),
            **report.scalars,
            "images_per_second": self.samples / seconds,
            "share_waiting_for_data": self.waited / seconds,
            "skipped_steps": float(self.state.skipped),
            "unreadable_files": float(self.dataset.failures()),
        }
        self._begin_point()
        return point

    def _validate(self, validate: Validate, log: RunLogger) -> None:
        """Log a validation, and save the best."""
        started, state = time.perf_counter(), self.state
        result = validate(state.ema)
        log.add("scalar", "validation", state.step, result.scalars)
        log.add("image", "validation", state.step, result.images)
        log.flush()
        if result.score > state.best_score:
            state.best_score = result.score
            if self.processes.is_main:
                self.run.save_best(state.content())
        self.since += time.perf_counter() - started  # no time of training


class _Reader(Dataset[bytes]):
    """Reads micro-batches, also in processes of its own; notes which sample each of these is reading."""

    def __init__(self, samples: Samples, workers: int) -> None:
        self.samples = samples
        self.reading = multiprocessing.RawArray("q", [-1] * max(1, workers))

    def __getitem__(self, part: MicroBatch) -> bytes:
        """Pickle a micro-batch and its samples.

        A tensor would take shared memory, of which a container has 64 MB, and a worker that finds no room
        there says so and lets the run wait for ever.
        """
        worker, samples = get_worker_info(), []
        slot = 0 if worker is None else worker.id
        for pair in part.pairs:
            self.reading[slot] = pair[1]
            samples.append(self.samples.crop(pair))
        self.reading[slot] = -1
        return pickle.dumps((part, self.samples.collate(samples)))

    def names(self) -> str:
        return ", ".join(self.samples.name(index) for index in self.reading if index >= 0)
