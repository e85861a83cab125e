"""The training loop, for any `loss(model, batch, generator) -> (B,)`.

It owns what has nothing to do with diffusion: the order of the data, gradient accumulation, clipping, the
learning-rate schedule, the moving average of the weights, precision, logging, checkpoints and signals.

The data of a step and its random numbers are pure functions of (seed, step): nothing about a generator has
to be stored, and a resumed run is the run that was never interrupted (as in EDM2, Karras et al. 2024).
"""

import contextlib
import copy
import functools
import logging
import math
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from engine.checkpoint import CheckpointError, Plain, load_checkpoint, load_weights, save_checkpoint
from engine.processes import Processes
from samplers import noise_seed

logger = logging.getLogger(__name__)

OptimizerName = Literal["adamw", "adamw8bit"]
LossFunction = Callable[[nn.Module, Tensor, torch.Generator], Tensor]
MAX_SKIPPED_IN_A_ROW = 5


class Samples(Protocol):
    """A dataset the loop can train on, and can speak of when something goes wrong."""

    def __len__(self) -> int:
        """How many samples an epoch has."""
        ...

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """The sample of (epoch, index)."""
        ...

    def name(self, index: int) -> str:
        """What a person calls the sample: its file."""
        ...

    def failures(self) -> int:
        """How many samples had to be replaced because they could not be read."""
        ...


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; a checkpoint carries it.

    Attributes:
        max_steps: optimiser steps in all.
        batch_size: samples per forward pass of one process.
        accumulation_steps: forward passes of one process per optimiser step.
        learning_rate: the peak; it is reached by a linear warm-up and left by half a cosine.
        warmup_steps: optimiser steps of the warm-up.
        final_learning_rate: the end of the cosine, as a fraction of the peak.
        weight_decay, beta2: of AdamW (Loshchilov & Hutter 2019).
        max_grad_norm: gradients are clipped to this global norm.
        ema_decay: of the averaged weights, ramped up as (1 + step) / (10 + step).
        optimizer: "adamw" or "adamw8bit" (bitsandbytes).
        seed: of data order, crops, noise and timesteps.
        validate_every, save_every, log_every: in optimiser steps; the end always validates and saves.
        keep_checkpoints: how many of the newest checkpoints stay, besides the best.
        num_workers: processes that read images; 0 reads them in this one.
    """

    max_steps: int
    batch_size: int = 32
    accumulation_steps: int = 1
    learning_rate: float = 2e-5
    warmup_steps: int = 100
    final_learning_rate: float = 0.01
    weight_decay: float = 0.01
    beta2: float = 0.99
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    optimizer: OptimizerName = "adamw"
    seed: int = 0
    validate_every: int = 500
    save_every: int = 500
    log_every: int = 10
    keep_checkpoints: int = 2
    num_workers: int = 0

    def __post_init__(self) -> None:
        counts = (
            "max_steps",
            "batch_size",
            "accumulation_steps",
            "validate_every",
            "save_every",
            "log_every",
            "keep_checkpoints",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        for name in ("warmup_steps", "num_workers", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("final_learning_rate", "ema_decay", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if self.optimizer not in ("adamw", "adamw8bit"):
            raise ValueError(f"optimizer must be adamw or adamw8bit, not {self.optimizer!r}")

    def to_dict(self) -> dict[str, Plain]:
        """Plain values, as a checkpoint holds them."""
        return asdict(self)


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite; training cannot go on."""


class WorkerError(RuntimeError):
    """A process that reads images died; the message names the files it was to read."""


# --------------------------------------------------------------------------------------------------
# The order of the data
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchPlan:
    """Which samples each optimiser step uses: an epoch is one shuffled pass, its last group may be smaller.

    Attributes:
        length: number of samples in the dataset.
        batch_size, accumulation_steps, seed: as in TrainingConfig.
        world: processes that share a step.
    """

    length: int
    batch_size: int
    accumulation_steps: int
    seed: int
    world: int = 1

    @classmethod
    def of(cls, config: TrainingConfig, length: int, world: int = 1) -> "BatchPlan":
        """The plan of a configuration."""
        return cls(length, config.batch_size, config.accumulation_steps, config.seed, world)

    @property
    def group_size(self) -> int:
        """Samples per optimiser step, except for the last step of an epoch."""
        return self.batch_size * self.accumulation_steps * self.world

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the data."""
        return math.ceil(self.length / self.group_size)

    def micro_batches(self, step: int) -> list[list[tuple[int, int]]]:
        """The (epoch, index) pairs of each forward pass of a step, of all processes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.length, self.seed, epoch)
        group = order[position * self.group_size : (position + 1) * self.group_size]
        return [
            [(epoch, index) for index in group[start : start + self.batch_size]]
            for start in range(0, len(group), self.batch_size)
        ]

    def share(self, step: int, rank: int) -> list["MicroBatch"]:
        """The forward passes of one process in a step: every world-th, as many for each process.

        A process for which none is left repeats the first one with no weight, so that all of them meet at
        every exchange of gradients.
        """
        parts = self.micro_batches(step)
        samples = sum(len(part) for part in parts)
        rounds = math.ceil(len(parts) / self.world)
        numbers = [rank + self.world * number for number in range(rounds)]
        return [
            MicroBatch(number, parts[number], 1 / samples)
            if number < len(parts)
            else MicroBatch(number, parts[0], 0.0)
            for number in numbers
        ]


class MicroBatch(NamedTuple):
    """One forward pass: its number in the step, its (epoch, index) pairs, the weight of each loss."""

    number: int
    pairs: list[tuple[int, int]]
    weight: float


@functools.lru_cache(maxsize=2)
def _epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """The permutation of an epoch, a pure function of (seed, epoch)."""
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(length).tolist()
    return order


class PlannedBatches(Sampler[list[tuple[int, int]]]):
    """Batch sampler over one process's micro-batches of steps [first_step, last_step)."""

    def __init__(self, plan: BatchPlan, first_step: int, last_step: int, rank: int = 0) -> None:
        self.plan = plan
        self.steps = range(first_step, last_step)
        self.rank = rank

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            for micro_batch in self.plan.share(step, self.rank):
                yield micro_batch.pairs


# --------------------------------------------------------------------------------------------------
# The state of a run
# --------------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """What changes from step to step, and is saved.

    Attributes:
        model: the network being trained.
        ema: the same network with averaged weights; what is validated and used.
        optimizer: of the model's parameters.
        optimizer_name: recorded so that its state is never read into another kind.
        step: optimiser steps taken, skipped ones included.
        best_psnr: of the averaged weights on the validation images, in dB.
        skipped: steps whose loss or gradient was not finite.
    """

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    optimizer_name: OptimizerName
    step: int = 0
    best_psnr: float = -math.inf
    skipped: int = 0


def new_state(model: nn.Module, config: TrainingConfig) -> TrainState:
    """A state at step 0. The model must already be on its device."""
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    return TrainState(model, ema, make_optimizer(model, config), config.optimizer)


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, fused, or bitsandbytes' AdamW8bit (Dettmers et al. 2022), on the model's parameters."""
    parameters = list(model.parameters())
    betas = (0.9, config.beta2)
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # seconds to import, needed by this branch alone

        eight_bit: torch.optim.Optimizer = AdamW8bit(
            parameters, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay
        )
        return eight_bit
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=betas,
        weight_decay=config.weight_decay,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Linear warm-up to the peak, then half a cosine to its final fraction (Loshchilov & Hutter 2017)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def ema_decay_at(step: int, config: TrainingConfig) -> float:
    """The decay, ramped up so that the average forgets the first steps quickly."""
    return min(config.ema_decay, (1 + step) / (10 + step))


def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, in place; buffers are copied."""
    with torch.no_grad():
        averaged: list[Tensor] = list(ema.parameters())
        current: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for own, theirs in zip(ema.buffers(), model.buffers(), strict=True):
            own.copy_(theirs)


def state_content(state: TrainState) -> dict[str, object]:
    """The entries of a checkpoint that belong to the loop."""
    return {
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": {"name": state.optimizer_name, "state": state.optimizer.state_dict()},
        "step": state.step,
        "best_psnr": state.best_psnr,
        "skipped": state.skipped,
    }


def restore_state(state: TrainState, path: str | Path) -> None:
    """Continue where a checkpoint stopped: weights, average, optimiser, step.

    Raises:
        CheckpointError: it is damaged, does not fit the model, or was written by another optimiser.
    """
    content = load_checkpoint(path, next(state.model.parameters()).device)
    optimizer = content.get("optimizer")
    if not isinstance(optimizer, dict):
        raise CheckpointError(f"{path} holds no optimiser state: it cannot be resumed, only used")
    if optimizer["name"] != state.optimizer_name:
        raise CheckpointError(
            f"{path} was trained with --optimizer {optimizer['name']}, whose state does not fit "
            f"{state.optimizer_name}: resume with --optimizer {optimizer['name']}"
        )
    load_weights(state.model, content["model"], path)  # type: ignore[arg-type]  # verified key by key
    load_weights(state.ema, content["ema"], path)  # type: ignore[arg-type]
    try:
        state.optimizer.load_state_dict(optimizer["state"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the optimiser state of {path} does not fit: {error}") from error
    state.step = int(content["step"])  # type: ignore[call-overload]
    state.best_psnr = float(content["best_psnr"])  # type: ignore[arg-type]
    state.skipped = int(content["skipped"])  # type: ignore[call-overload]


# --------------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------------


class Validation(NamedTuple):
    """What a validation found, all on the averaged weights.

    Attributes:
        psnr: mean over the validation images, in dB; the best checkpoint is chosen by it.
        scalars: name -> value, for TensorBoard.
        images: name -> (3, H, W) in [0, 1], for TensorBoard.
        curves: name -> (right edges, heights) of the bars of a histogram, for TensorBoard.
    """

    psnr: float
    scalars: dict[str, float]
    images: dict[str, Tensor]
    curves: dict[str, tuple[list[float], list[float]]] = {}  # noqa: RUF012  # never changed


class StepReport(NamedTuple):
    """One optimiser step.

    Attributes:
        loss: the mean over its samples.
        grad_norm: of the gradient, before clipping.
        signal: the number of the signal that came, or None.
    """

    loss: float
    grad_norm: float
    signal: int | None


@dataclass(frozen=True)
class Run:
    """Where a run writes, and what it writes besides the loop's own state.

    Attributes:
        checkpoint_dir, log_dir: of this run alone.
        name: checkpoints are `{name}_best.pth` and `{name}_last.pth`.
        metadata: further checkpoint entries, for instance how to rebuild the network.
        settings: hyper-parameters, for TensorBoard's text page and its table of runs.
    """

    checkpoint_dir: Path
    log_dir: Path
    name: str
    metadata: dict[str, object]
    settings: dict[str, Plain] = field(default_factory=dict)

    @property
    def best(self) -> Path:
        """Path of the checkpoint with the highest validation PSNR."""
        return self.checkpoint_dir / f"{self.name}_best.pth"

    @property
    def last(self) -> Path:
        """Path of the newest checkpoint."""
        return self.checkpoint_dir / f"{self.name}_last.pth"

    def numbered(self) -> list[Path]:
        """The checkpoints that are kept by step, the oldest first; `last` is the newest of them."""
        return sorted(self.checkpoint_dir.glob(f"{self.name}_step*.pth"))

    def save_last(self, state: TrainState, keep: int) -> None:
        """Write a numbered checkpoint, make `last` stand for it, and remove all but the newest `keep`."""
        path = self.checkpoint_dir / f"{self.name}_step{state.step:09d}.pth"
        self.save(path, state)
        _point_to(self.last, path)
        for old in self.numbered()[:-keep]:
            old.unlink()

    def save(self, path: Path, state: TrainState) -> None:
        """Write a checkpoint of the state, atomically."""
        save_checkpoint(path, {**self.metadata, **state_content(state)})


def _point_to(link: Path, target: Path) -> None:
    """Make link a second name of target in one step: a hard link, or a copy where there are none."""
    with tempfile.TemporaryDirectory(dir=link.parent, prefix=".link-") as folder:
        name = Path(folder) / link.name
        try:
            name.hardlink_to(target)
        except OSError:
            shutil.copyfile(target, name)
        name.replace(link)


class SignalCatcher:
    """Turns SIGINT or SIGTERM into a request to stop after the step; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "SignalCatcher":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        logger.warning("%s: finishing the step, then saving", signal.Signals(number).name)


def train(
    state: TrainState,
    loss: LossFunction,
    dataset: Samples,
    config: TrainingConfig,
    run: Run,
    *,
    processes: Processes | None = None,
    precision: torch.dtype | None = None,
    validate: Callable[[nn.Module], Validation] | None = None,
    progress: bool = True,
    profile: bool = False,
) -> int | None:
    """Train from state.step to config.max_steps.

    Args:
        state: changed in place.
        loss: (model, batch on the device, generator on the device) -> (B,) losses.
        dataset: what to train on.
        config: how to train.
        run: where to write.
        processes: this process among those of the run; None is a run of one process.
        precision: dtype to autocast the loss to, None for float32.
        validate: called with the averaged network, in every process.
        progress: show a progress bar.
        profile: write a trace of five steps into the log folder, for TensorBoard's profiler or Perfetto.

    Returns:
        None when training is complete, or the number of the signal that ended it early. Either way the last
        checkpoint holds the final state.

    Raises:
        NonFiniteError: too many non-finite steps in a row.
        WorkerError: a worker process died.
        CheckpointError: a checkpoint could not be written.
    """
    processes = processes or Processes(next(state.model.parameters()).device)
    plan = BatchPlan.of(config, len(dataset), processes.world)
    batches = _Batches(dataset, plan, config, state.step, processes)
    signals = SignalCatcher()
    stepper = _Stepper(state, loss, config, processes, precision, signals)
    keeper = _Keeper(state, dataset, run, config, processes, batches)
    hidden = not (progress and processes.writes)
    with (
        signals,
        keeper,
        _profiled(profile and processes.writes, run.log_dir, processes.device) as count_for_profile,
        tqdm(None, "train", config.max_steps, initial=state.step, unit="step", disable=hidden) as bar,
    ):
        received = None
        while state.step < config.max_steps and received is None:
            report = stepper.step(plan.share(state.step, processes.rank), batches)
            received = report.signal
            count_for_profile()
            bar.update()
            bar.set_postfix(loss=f"{report.loss:.4f}", best=f"{state.best_psnr:.2f} dB", refresh=False)
            keeper.after_step(report, plan, validate)
    return received


@contextlib.contextmanager
def _profiled(wanted: bool, log_dir: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Records steps 6 to 10, when memory is allocated already; gives what is to be called after each step."""
    if not wanted:
        yield lambda: None
        return
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[kinds.CPU, kinds.CUDA] if device.type == "cuda" else [kinds.CPU],
        schedule=torch.profiler.schedule(wait=3, warmup=2, active=5, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(log_dir)),
        record_shapes=True,
    ) as profile:
        yield profile.step


def _as_table(values: dict[str, Plain]) -> str:
    """A Markdown table of names and values."""
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


class _Watched(Dataset[Tensor]):
    """A dataset that notes, where all processes see it, which sample each worker is reading."""

    def __init__(self, dataset: Samples, workers: int) -> None:
        self.dataset = dataset
        self.reading = torch.full((max(1, workers),), -1).share_memory_()

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        worker = get_worker_info()
        slot = 0 if worker is None else worker.id
        self.reading[slot] = key[1]
        sample = self.dataset[key]
        self.reading[slot] = -1
        return sample

    def names(self) -> str:
        """The samples that are being read."""
        return ", ".join(self.dataset.name(index) for index in self.reading.tolist() if index >= 0)


class _Batches:
    """The batches of one process, in order, from a single pass of workers over the whole run."""

    def __init__(
        self, dataset: Samples, plan: BatchPlan, config: TrainingConfig, first_step: int, processes: Processes
    ) -> None:
        self.dataset = dataset
        self.watched = _Watched(dataset, config.num_workers)
        loader = DataLoader(
            self.watched,
            batch_sampler=PlannedBatches(plan, first_step, config.max_steps, processes.rank),
            num_workers=config.num_workers,
            pin_memory=processes.device.type == "cuda",
            worker_init_fn=_ignore_interrupts,
        )
        self.iterator = iter(loader)
        self.seconds_waited = 0.0

    def next(self) -> Tensor:
        """The samples of the next micro-batch."""
        started = time.perf_counter()
        try:
            batch: Tensor = next(self.iterator)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reading = self.watched.names() or "no image"
            raise WorkerError(
                f"a process that reads images died while reading {reading} ({error})"
            ) from error
        self.seconds_waited += time.perf_counter() - started
        return batch

    def names(self, micro_batch: MicroBatch) -> str:
        """The names of a micro-batch's samples, separated by commas."""
        return ", ".join(self.dataset.name(index) for _, index in micro_batch.pairs)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the main process decides when its workers stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


class _Stepper:
    """Takes optimiser steps; remembers how many in a row were not finite."""

    def __init__(
        self,
        state: TrainState,
        loss: LossFunction,
        config: TrainingConfig,
        processes: Processes,
        precision: torch.dtype | None,
        signals: SignalCatcher,
    ) -> None:
        self.signals = signals
        self.state = state
        self.loss = loss
        self.config = config
        self.processes = processes
        self.precision = precision
        self.generator = torch.Generator(processes.device)
        self.skipped_in_a_row = 0
        self.wrapped = (
            DistributedDataParallel(state.model, broadcast_buffers=False) if processes.world > 1 else None
        )

    def step(self, micro_batches: list[MicroBatch], batches: _Batches) -> StepReport:
        """Accumulate the gradient of one group, clip it, and update the weights and their average.

        Every sample of the group weighs the same, however the group splits into micro-batches and processes.
        Gradients are exchanged once, with the last micro-batch.
        """
        self.state.model.train()
        total = torch.zeros((), device=self.processes.device)
        for micro_batch in micro_batches:
            last = micro_batch is micro_batches[-1]
            wait = contextlib.nullcontext() if last or self.wrapped is None else self.wrapped.no_sync()
            with wait:
                total += self._accumulate(batches.next(), micro_batch)
        report = self._report(total)
        if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
            self._update()
        else:
            self._skip(", ".join(batches.names(micro_batch) for micro_batch in micro_batches))
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        return report

    def _accumulate(self, batch: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Add the gradient of this micro-batch's share of the mean loss; returns the share."""
        device = self.processes.device
        seed = noise_seed(self.config.seed, self.state.step, micro_batch.number)
        self.generator.manual_seed(seed)
        with torch.autocast(device.type, self.precision, enabled=self.precision is not None):
            model = self.wrapped or self.state.model
            losses = self.loss(model, batch.to(device, non_blocking=True), self.generator)  # (B,)
        share = losses.float().sum() * micro_batch.weight
        (share * self.processes.world).backward()  # DistributedDataParallel averages; the sum is wanted
        return share.detach()

    def _report(self, total: Tensor) -> StepReport:
        """Clip, and agree with the other processes on the loss and on whether a signal came."""
        grad_norm = nn.utils.clip_grad_norm_(self.state.model.parameters(), self.config.max_grad_norm)
        received = self.signals.received
        shared = torch.stack([total, torch.full_like(total, received or 0)])
        loss, anywhere = self.processes.sum(shared).tolist()
        return StepReport(loss, float(grad_norm), received or (signal.SIGTERM if anywhere else None))

    def _update(self) -> None:
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.state.step, self.config)
        self.state.optimizer.step()
        update_ema(self.state.ema, self.state.model, ema_decay_at(self.state.step, self.config))
        self.skipped_in_a_row = 0

    def _skip(self, names: str) -> None:
        self.state.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{self.skipped_in_a_row} steps in a row up to step {self.state.step} had a loss or gradient "
                "that is not finite: lower --learning_rate or use --precision fp32. The last checkpoint is "
                f"from before. The last batch was {names}"
            )


class _Keeper:
    """Writes what outlives the run: TensorBoard events and checkpoints. Only rank 0 writes."""

    def __init__(
        self,
        state: TrainState,
        dataset: Samples,
        run: Run,
        config: TrainingConfig,
        processes: Processes,
        batches: _Batches,
    ) -> None:
        self.state = state
        self.batches = batches
        self.dataset = dataset
        self.run = run
        self.config = config
        self.processes = processes
        self.writer: SummaryWriter | None = None
        if processes.writes:
            purge = state.step + 1 if state.step else None  # what a killed run logged beyond its checkpoint
            self.writer = SummaryWriter(str(run.log_dir), purge_step=purge)
            self.writer.add_text("configuration", _as_table(run.settings))
        self._losses: list[float] = []
        self._samples = 0
        self._since = time.perf_counter()

    def __enter__(self) -> "_Keeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.close()

    def after_step(
        self, report: StepReport, plan: BatchPlan, validate: Callable[[nn.Module], Validation] | None
    ) -> None:
        """Log, validate and save what is due after a step."""
        step, config = self.state.step, self.config
        self._log(report, plan)
        if validate is not None and _due(step, config.validate_every, config.max_steps):
            self._validate(validate)
        if report.signal is not None or _due(step, config.save_every, config.max_steps):
            self._save_last()
        if step == config.max_steps:
            self._finish(report)

    def _log(self, report: StepReport, plan: BatchPlan) -> None:
        """Collect a step; write the means every log_every steps."""
        self._losses.append(report.loss)
        self._samples += sum(len(part) for part in plan.micro_batches(self.state.step - 1))
        if not _due(self.state.step, self.config.log_every, self.config.max_steps):
            return
        now = time.perf_counter()
        scalars = {
            "train/loss": float(np.mean(self._losses)),
            "train/learning_rate": learning_rate_at(self.state.step - 1, self.config),
            "train/gradient_norm": report.grad_norm,
            "train/images_per_second": self._samples / (now - self._since),
            "train/share_waiting_for_data": self.batches.seconds_waited / (now - self._since),
            "train/skipped_steps": float(self.state.skipped),
            "train/unreadable_files": float(self.dataset.failures()),
        }
        self._write_scalars(scalars)
        self._losses.clear()
        self._samples, self._since = 0, now
        self.batches.seconds_waited = 0.0

    def _validate(self, validate: Callable[[nn.Module], Validation]) -> None:
        """Measure the averaged network; keep it if it is the best so far."""
        started = time.perf_counter()
        result = validate(self.state.ema)
        self._write_scalars({f"validation/{name}": value for name, value in result.scalars.items()})
        if self.writer is not None:
            for name, image in result.images.items():
                self.writer.add_image(f"validation/{name}", image, self.state.step)
            for name, (edges, heights) in result.curves.items():
                self._write_bars(f"validation/{name}", edges, heights)
            self.writer.flush()
        if result.psnr > self.state.best_psnr:
            self.state.best_psnr = result.psnr
            if self.processes.writes:
                self.run.save(self.run.best, self.state)
        self._since += time.perf_counter() - started  # no training: not part of images per second

    def _finish(self, report: StepReport) -> None:
        """Enter the run, its settings and what came of it into TensorBoard's table of hyper-parameters."""
        if self.writer is None:
            return
        settings = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in self.run.settings.items()
        }
        found = {"final/best_psnr": self.state.best_psnr, "final/loss": report.loss}
        self.writer.add_hparams(settings, found, run_name=".", global_step=self.state.step)

    def _save_last(self) -> None:
        """Write the newest checkpoint."""
        if self.processes.writes:
            self.run.save_last(self.state, self.config.keep_checkpoints)

    def _write_bars(self, name: str, edges: list[float], heights: list[float]) -> None:
        """A histogram whose bars have these right edges and heights."""
        assert self.writer is not None
        total = sum(heights)
        self.writer.add_histogram_raw(
            name, 0.0, edges[-1], total, total, total, edges, heights, global_step=self.state.step
        )

    def _write_scalars(self, scalars: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, self.state.step)
