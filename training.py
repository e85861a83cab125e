"""The training loop, for any `loss(model, batch, generator) -> (B,)`.

Data and random numbers are functions of (seed, step), so a resumed run is the uninterrupted one (as in EDM2,
Karras et al. 2024).
"""

import contextlib
import copy
import dataclasses
import functools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Never, Protocol, TypedDict, Unpack, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from engine.checkpoint import Checkpoint, CheckpointError, load_weights
from engine.device import default_workers
from engine.muon import Muon
from engine.options import Options, option
from engine.processes import Processes
from engine.run import RunFiles, RunLogger, profiled
from engine.signals import StopSignals, leave_stopping_to_the_parent
from samplers import noise_seed

logger = logging.getLogger(__name__)

LossFunction = Callable[[nn.Module, Any, torch.Generator], Tensor]
OptimizerName = Literal["auto", "adamw8bit", "adamw", "muon"]
MAX_SKIPPED_IN_A_ROW = 5


class Batch(Protocol):
    """Samples as they are collated: a tensor, or what moves like one."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch": ...


class Samples(Protocol):
    """A dataset the loop can train on; keys are (epoch, index)."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: tuple[int, int]) -> object: ...  # for `collate`
    def collate(self, samples: list[Any]) -> Batch: ...
    def name(self, index: int) -> str: ...  # its file
    def failures(self) -> int: ...  # how many could not be read


@dataclass(frozen=True)
class TrainingConfig(Options):
    """`resolved` fills in None from the length of the run."""

    epochs: int = option(40, "passes over the images, one crop of each", low=1, fixed=False)
    max_steps: int | None = option(None, "optimiser steps, instead of epochs", low=1, fixed=False)
    batch_size: int = option(32, "samples per forward pass of one process", low=1)
    accumulation_steps: int = option(1, "forward passes of one process per optimiser step", low=1)
    learning_rate: float = option(2e-5, "the peak of a linear warm-up and half a cosine", above=0)
    warmup_steps: int | None = option(
        None, "optimiser steps of the warm-up; by default 5% of the run, at most 500", low=0, fixed=False
    )
    final_learning_rate: float = option(
        0.01, "the end of the cosine as a share of the peak; 1: constant", low=0, high=1
    )
    weight_decay: float = option(0.01, "of AdamW and Muon (Loshchilov & Hutter 2019)", low=0)
    beta2: float = option(0.99, "of AdamW", low=0, high=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this global norm", above=0)
    ema_decay: float = option(
        0.999, "of the averaged weights, ramped up as (1 + step) / (10 + step)", low=0, high=1
    )
    optimizer: OptimizerName = option("auto", "auto is 8-bit AdamW on CUDA, else AdamW")
    seed: int = option(0, "of data order, crops, noise and timesteps", low=0, high=2**63 - 1)
    validate_every: int | None = option(
        None, "optimiser steps; by default 20 times in the run", low=1, fixed=False
    )
    save_every: int | None = option(
        None, "optimiser steps; by default with every validation", low=1, fixed=False
    )
    log_every: int = option(10, "optimiser steps", low=1, fixed=False)
    keep_checkpoints: int = option(
        2, "how many of the newest checkpoints stay, besides the best", low=1, fixed=False
    )
    num_workers: int | None = option(
        None,
        "processes that read images; auto: 0, this one, on a CPU, else by the cores",
        low=0,
        fixed=False,
    )

    def resolved(self, steps_per_epoch: int) -> "TrainingConfig":
        max_steps = self.max_steps or self.epochs * steps_per_epoch
        validate_every = self.validate_every or max(1, max_steps // 20)
        return dataclasses.replace(
            self,
            max_steps=max_steps,
            warmup_steps=min(500, max_steps // 20) if self.warmup_steps is None else self.warmup_steps,
            validate_every=validate_every,
            save_every=self.save_every or validate_every,
        )


class NonFiniteError(RuntimeError):
    """Too many steps in a row had no finite loss or gradient."""


class WorkerError(RuntimeError):
    """A process that reads data died, or no data can be read; names the files."""


@dataclass(frozen=True)
class BatchPlan:
    """Which of `length` samples a step uses: an epoch is one shuffled pass, its last group may be smaller."""

    length: int
    batch_size: int
    accumulation_steps: int
    seed: int
    world_size: int = 1

    @classmethod
    def of(cls, config: TrainingConfig, length: int, world_size: int = 1) -> "BatchPlan":
        return cls(length, config.batch_size, config.accumulation_steps, config.seed, world_size)

    @property
    def group_size(self) -> int:
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.length / self.group_size)

    def micro_batches(self, step: int) -> list[list[tuple[int, int]]]:
        """(epoch, index) pairs of each forward pass of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.length, self.seed, epoch)
        group = order[position * self.group_size : (position + 1) * self.group_size]
        return [
            [(epoch, index) for index in group[start : start + self.batch_size]]
            for start in range(0, len(group), self.batch_size)
        ]

    def of_rank(self, step: int, rank: int) -> list["MicroBatch"]:
        """A process's forward passes in a step, as many as each other one's.

        Where none is left, the first is repeated with no weight: all meet at every exchange of gradients.
        """
        parts = self.micro_batches(step)
        samples = sum(len(part) for part in parts)
        rounds = math.ceil(len(parts) / self.world_size)
        numbers = [rank + self.world_size * number for number in range(rounds)]
        return [
            MicroBatch(
                number,
                pairs=parts[number] if number < len(parts) else parts[0],
                weight=1 / samples if number < len(parts) else 0.0,
                is_last=number == numbers[-1],
            )
            for number in numbers
        ]


class MicroBatch(NamedTuple):
    """One forward pass: number in the step, (epoch, index) pairs, weight of each loss."""

    number: int
    pairs: list[tuple[int, int]]
    weight: float
    is_last: bool


@functools.lru_cache(maxsize=2)
def _epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(length).tolist()
    return order


@dataclass
class TrainState:
    model: nn.Module
    ema: nn.Module  # with averaged weights, validated and used
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    scaler: torch.amp.GradScaler  # of the loss, for float16 (Micikevicius et al. 2018)
    step: int = 0  # with skipped ones
    best_psnr: float = -math.inf  # of `ema`, in dB
    skipped: int = 0  # steps without finite loss or gradient
    wrapped: DistributedDataParallel | None = None  # for several processes

    def content(self) -> dict[str, object]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": {"name": self.optimizer_name, "state": self.optimizer.state_dict()},
            "step": self.step,
            "best_psnr": self.best_psnr,
            "skipped": self.skipped,
            "scaler": self.scaler.state_dict(),
        }


def new_state(model: nn.Module, config: TrainingConfig, precision: torch.dtype | None = None) -> TrainState:
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = list(model.parameters())
    device = parameters[0].device
    name = optimizer_for(config, device)
    # From a scale at which no first step overflows; it doubles where it can.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=precision == torch.float16)
    return TrainState(model, ema, _optimizer(name, parameters, config), name, scaler)


def optimizer_for(config: TrainingConfig, device: torch.device) -> OptimizerName:
    if config.optimizer != "auto":
        return config.optimizer
    if device.type != "cuda":
        return "adamw"
    try:
        _eight_bit_adamw()
    except ValueError as error:
        logger.warning("training with AdamW in full precision: %s", error)
        return "adamw"
    return "adamw8bit"


def _eight_bit_adamw() -> Callable[..., torch.optim.Optimizer]:
    """Of bitsandbytes (Dettmers et al. 2022); ValueError where that cannot be imported."""
    try:
        from bitsandbytes.optim import AdamW8bit  # seconds to import, needed by this optimiser alone
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"optimizer is 'adamw8bit', but bitsandbytes fails ({reason}): use adamw") from error
    return cast(Callable[..., torch.optim.Optimizer], AdamW8bit)


def _optimizer(name: str, parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    betas, decay = (0.9, config.beta2), config.weight_decay
    if name == "muon":
        return Muon(parameters, config.learning_rate, betas, decay)
    if name == "adamw8bit":
        return _eight_bit_adamw()(parameters, lr=config.learning_rate, betas=betas, weight_decay=decay)
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, config.learning_rate, betas, weight_decay=decay, fused=fused)


def restore_state(state: TrainState, checkpoint: Checkpoint) -> None:
    """CheckpointError: unfit, or of another optimiser."""
    path, content = checkpoint
    try:
        name, values = content["optimizer"]["name"], content["optimizer"]["state"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} holds no optimiser state: it cannot be resumed, only used") from error
    if name != state.optimizer_name:
        raise CheckpointError(
            f"{path} was trained with the optimizer {name}, whose state does not fit {state.optimizer_name}: "
            f"resume with {name}"
        )
    load_weights(state.model, content["model"], path)
    load_weights(state.ema, content["ema"], path)
    try:
        state.optimizer.load_state_dict(values)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the optimiser state of {path} does not fit: {error}") from error
    if state.scaler.is_enabled() and content.get("scaler"):
        state.scaler.load_state_dict(content["scaler"])
    state.step, state.skipped = int(content["step"]), int(content["skipped"])
    state.best_psnr = float(content["best_psnr"])


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine (Loshchilov & Hutter 2017)."""
    assert config.max_steps is not None
    warmup_steps = config.warmup_steps or 0
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, config.max_steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def ema_decay_at(step: int, config: TrainingConfig) -> float:
    return min(config.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, in place; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for own, theirs in zip(ema.buffers(), model.buffers(), strict=True):
        own.copy_(theirs)


class StepReport(NamedTuple):
    loss: float  # mean
    grad_norm: float  # before clipping
    finite: bool  # both
    stop: bool  # a process asked to


def train_step(
    state: TrainState,
    loss: LossFunction,
    micro_batches: Iterator[tuple[MicroBatch, Batch]],
    config: TrainingConfig,
    processes: Processes,
    precision: torch.dtype | None = None,
    signals: StopSignals | None = None,
) -> StepReport:
    """One optimiser step; a step whose loss or gradient is not finite changes nothing.

    Every sample weighs the same; gradients are exchanged once, and the device is waited for once.
    """
    device, model = processes.device, state.model.train()
    generator, total = torch.Generator(device), torch.zeros((), device=device)
    for micro, samples in micro_batches:
        generator.manual_seed(noise_seed(config.seed, state.step, micro.number))
        with state.wrapped.no_sync() if state.wrapped and not micro.is_last else contextlib.nullcontext():
            inputs = samples.to(device, non_blocking=True)
            with torch.autocast(device.type, precision, enabled=precision is not None):
                losses = loss(state.wrapped or model, inputs, generator)  # (B,)
            part = losses.float().sum() * micro.weight
            state.scaler.scale(part * processes.world_size).backward()  # averaged, where the sum is wanted
        total += part.detach()
    state.scaler.unscale_(state.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    state.scaler.update()
    stopping = torch.full_like(total, signals is not None and signals.received is not None)
    shared = torch.stack([total, grad_norm / processes.world_size, stopping])
    mean_loss, norm, stops = processes.sum(shared).tolist()
    finite = math.isfinite(mean_loss) and math.isfinite(norm)
    if finite:
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate_at(state.step, config)
        state.optimizer.step()
        update_ema(state.ema, model, ema_decay_at(state.step, config))
    state.optimizer.zero_grad(set_to_none=True)
    state.skipped += not finite
    state.step += 1
    return StepReport(mean_loss, norm, finite, stops > 0)


class Validation(NamedTuple):
    """Of the averaged weights; scalars, images and curves are for TensorBoard."""

    psnr: float  # in dB, chooses the best checkpoint
    scalars: dict[str, float]
    images: dict[str, Tensor]  # (3, H, W) in [0, 1]
    curves: dict[str, tuple[list[float], list[float]]] = {}  # noqa: RUF012  # right edges, heights


Validate = Callable[[nn.Module], Validation]


class LoopOptions(TypedDict, total=False):
    processes: Processes | None
    precision: torch.dtype | None  # to autocast the loss to, None for float32
    validate: Validate | None  # called with the averaged network, in every process
    progress: bool
    profile: bool  # trace five steps into the log folder


def train(
    state: TrainState,
    loss: LossFunction,
    dataset: Samples,
    config: TrainingConfig,
    run: RunFiles,
    **options: Unpack[LoopOptions],
) -> int | None:
    """Train from state.step to config.max_steps; returns None, or the signal that ended it early.

    The last checkpoint holds the final state. NonFiniteError, WorkerError, CheckpointError.
    """
    processes = options.get("processes") or Processes(next(state.model.parameters()).device)
    plan = BatchPlan.of(config, len(dataset), processes.world_size)
    config = config.resolved(plan.steps_per_epoch)
    run = dataclasses.replace(run, sections={**run.sections, "training": config.to_dict()})
    batches = _Batches(dataset, plan, config, state.step, processes)
    if processes.world_size > 1:
        state.wrapped = DistributedDataParallel(state.model, broadcast_buffers=False)
    is_main, precision = processes.is_main, options.get("precision")
    hidden = not (options.get("progress", True) and is_main)
    with (
        StopSignals() as signals,
        RunLogger(run.log_dir, is_main, state.step, run.sections) as log,
        profiled(options.get("profile", False) and is_main, run.log_dir, processes.device) as trace_step,
        tqdm(None, "train", config.max_steps, initial=state.step, unit="step", disable=hidden) as bar,
    ):
        validate = options.get("validate")
        recorder = _Recorder(state, run, config, plan, batches, log, trace_step, bar, is_main, validate)
        while state.step < cast(int, config.max_steps):
            parts = plan.of_rank(state.step, processes.rank)
            try:
                report = train_step(state, loss, batches.of(parts), config, processes, precision, signals)
            except WorkerError:
                recorder.save()  # the last whole step
                raise
            recorder.after_step(report, parts)
            if report.stop:
                return signals.received or int(signal.SIGTERM)
    return None


class _Watched(Dataset[object]):
    """A dataset that notes, where all processes see it, which sample each worker is reading."""

    def __init__(self, dataset: Samples, workers: int) -> None:
        self.dataset = dataset
        self.reading = torch.full((max(1, workers),), -1).share_memory_()

    def __getitem__(self, key: tuple[int, int]) -> object:
        worker = get_worker_info()
        slot = 0 if worker is None else worker.id
        self.reading[slot] = key[1]
        sample = self.dataset[key]
        self.reading[slot] = -1
        return sample

    def names(self) -> str:
        return ", ".join(self.dataset.name(index) for index in self.reading.tolist() if index >= 0)


class _Batches:
    """One process's batches; `seconds_waited` since it was last set to 0."""

    def __init__(
        self, dataset: Samples, plan: BatchPlan, config: TrainingConfig, first_step: int, processes: Processes
    ) -> None:
        self.dataset = dataset
        workers = config.num_workers
        if workers is None:
            workers = default_workers(processes.device, processes.world_size)
        self.watched = _Watched(dataset, workers)
        steps = range(first_step, cast(int, config.max_steps))
        loader = DataLoader(
            self.watched,
            batch_sampler=(part.pairs for step in steps for part in plan.of_rank(step, processes.rank)),
            num_workers=workers,
            collate_fn=dataset.collate,
            pin_memory=processes.device.type == "cuda",
            worker_init_fn=leave_stopping_to_the_parent,
        )
        self.iterator = iter(loader)
        self.seconds_waited = 0.0

    def of(self, parts: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, Batch]]:
        for part in parts:
            started = time.perf_counter()
            try:
                samples: Batch = next(self.iterator)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise WorkerError(str(error)) from error
                reading = self.watched.names() or "no image"
                message = f"a process that reads images died while reading {reading} ({error})"
                raise WorkerError(message) from error
            self.seconds_waited += time.perf_counter() - started
            yield part, samples

    def names(self, parts: Sequence[MicroBatch]) -> str:
        return ", ".join(self.dataset.name(index) for part in parts for _, index in part.pairs)


def _due(step: int, every: int | None, last: int | None) -> bool:
    return step == last or (every is not None and step % every == 0)


@dataclass
class _Recorder:
    """Curves, validation and checkpoints as they fall due. Only the main process writes."""

    state: TrainState
    run: RunFiles
    config: TrainingConfig
    plan: BatchPlan
    batches: _Batches
    log: RunLogger
    trace_step: Callable[[], None]
    bar: "tqdm[Never]"
    is_main: bool
    validate: Validate | None

    def __post_init__(self) -> None:
        self._losses: list[float] = []
        self._samples = 0
        self._since = time.perf_counter()
        self._skipped_in_a_row = 0
        self._warm = (self.state.step + 1, self._since)  # a first step, and when it ended

    def after_step(self, report: StepReport, parts: Sequence[MicroBatch]) -> None:
        """NonFiniteError: too many steps in a row were skipped."""
        state, config = self.state, self.config
        self.trace_step()
        self.bar.update()
        self.bar.set_postfix(loss=f"{report.loss:.4f}", best=f"{state.best_psnr:.2f} dB", refresh=False)
        self._tell_duration()
        self._raise_if_diverged(report, parts)
        self._losses.append(report.loss)
        self._samples += sum(len(part) for part in self.plan.micro_batches(state.step - 1))
        if _due(state.step, config.log_every, config.max_steps):
            self._log_curves(report)
        if self.validate is not None and _due(state.step, config.validate_every, config.max_steps):
            self._validate(self.validate)
        if report.stop or _due(state.step, config.save_every, config.max_steps):
            self.save()
        if state.step == config.max_steps:
            self.log.finish(state.step, {"final/best_psnr": state.best_psnr, "final/loss": report.loss})

    def _tell_duration(self) -> None:
        """Say after ten steps when the run ends."""
        first, ended = self._warm
        if self.state.step == first:
            self._warm = (first, time.perf_counter())
        if self.is_main and self.state.step == first + 9:
            seconds = (time.perf_counter() - ended) / 9
            left = seconds * (cast(int, self.config.max_steps) - self.state.step)
            end = time.strftime("%a %H:%M", time.localtime(time.time() + left))
            logger.info("%.3g s per step: the run ends in %.2g hours, %s", seconds, left / 3600, end)

    def _raise_if_diverged(self, report: StepReport, parts: Sequence[MicroBatch]) -> None:
        self._skipped_in_a_row = 0 if report.finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{self._skipped_in_a_row} steps in a row up to step {self.state.step} had a loss or "
                "gradient that is not finite: lower the learning rate or train in fp32. The last checkpoint "
                f"is from before. The last batch was {self.batches.names(parts)}"
            )

    def _log_curves(self, report: StepReport) -> None:
        now = time.perf_counter()
        values = {
            "loss": float(np.mean(self._losses)),
            "learning_rate": learning_rate_at(self.state.step - 1, self.config),
            "gradient_norm": report.grad_norm,
            "images_per_second": self._samples / (now - self._since),
            "share_waiting_for_data": self.batches.seconds_waited / (now - self._since),
            "skipped_steps": float(self.state.skipped),
            "unreadable_files": float(self.batches.dataset.failures()),
        }
        self.log.scalars(self.state.step, {f"train/{name}": value for name, value in values.items()})
        self._losses.clear()
        self._samples, self._since, self.batches.seconds_waited = 0, now, 0.0

    def _validate(self, validate: Validate) -> None:
        started, step = time.perf_counter(), self.state.step
        found = validate(self.state.ema)
        self.log.scalars(step, {f"validation/{name}": value for name, value in found.scalars.items()})
        self.log.images(step, {f"validation/{name}": image for name, image in found.images.items()})
        self.log.bars(step, {f"validation/{name}": bars for name, bars in found.curves.items()})
        self.log.flush()
        if found.psnr > self.state.best_psnr:
            self.state.best_psnr = found.psnr
            if self.is_main:
                self.run.save_best(self.state.content())
        self._since += time.perf_counter() - started  # no training: not part of images per second

    def save(self) -> None:
        if self.is_main:
            self.run.save_last(self.state.content(), self.state.step, self.config.keep_checkpoints)
