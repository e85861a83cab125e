"""Measure bicubic, trained models and any other restorer on a set of images."""

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from bicubic import resize
from engine.processes import Processes
from evaluation.config import EvaluationConfig
from evaluation.images import ImageSet, Picture, printable, random_of
from evaluation.lpips import Lpips, MetricUnavailableError, file_digest
from evaluation.metrics import to_uint8
from evaluation.report import Json, Label, Report, Scores
from evaluation.table import METRICS, Conditions, Pair
from evaluation.wasserstein import PatchPair, patch_count, patch_positions, pyramid_patches
from imaging.files import pixels_to_unit, unit_to_pixels
from models import load_model
from restoration import RestoreConfig
from restoration.batch import one_line
from restoration.rescaled import build_restorer

CPU = torch.device("cpu")
# What one image may fail with while the others are measured.
IMAGE_ERRORS = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)


class Estimate(NamedTuple):
    """(C, H, W) in [0, 1], and the samples' deviation (H, W)."""

    restored: Tensor
    deviation: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """One row: `restore` takes low_res (C, h, w) in [0, 1], C 1 or 3, and computes on `device`."""

    label: Label
    restore: Callable[[Tensor], Tensor | Estimate]
    device: torch.device = CPU


def bicubic_method(config: EvaluationConfig) -> Method:
    """Of 8-bit images, on the CPU."""

    def restore(low_res: Tensor) -> Tensor:
        return resize(to_uint8(low_res), scale=config.scale, border=config.border).float() / 255

    return Method(Label("bicubic"), restore)


class TrainedModel:
    """A file of a model, or CheckpointError; `precision` to autocast to, None for float32."""

    def __init__(
        self, path: str | Path, device: torch.device = CPU, precision: torch.dtype | None = None
    ) -> None:
        self.loaded = load_model(path, device=device)
        self.path, self.device, self.precision = Path(path), device, precision

    def method(self, how: RestoreConfig, scale: float) -> Method:
        """Restoring as infer.py does; ValueError for what the network cannot do."""
        restorer = build_restorer([self.loaded], how, scale, self.device, self.precision)
        samples = how.num_images

        def restore(low_res: Tensor) -> Estimate:
            found = restorer.restore(unit_to_pixels(low_res), deviation=samples > 1)
            deviation = None if found.deviation is None else torch.from_numpy(found.deviation)
            return Estimate(pixels_to_unit(found.pixels), deviation)

        method = how.mode or ("model" if how.detail is None else f"detail {how.detail:g}")
        label = Label(method, how.scheduler, restorer.step_count, samples)
        return Method(label, restore, self.device)

    def describe(self) -> dict[str, Json]:
        process = self.loaded.process
        return {
            "file": printable(self.path.name),
            "sha256": file_digest(self.path),
            "scale": self.loaded.network.scale.item(),
            "steps_trained": self.loaded.step,
            "parameters": sum(parameter.numel() for parameter in self.loaded.network.parameters()),
            "mode": process.mode,
            "schedule": process.schedule,
            "timesteps": process.timesteps,
            "precision": str(self.precision or torch.float32).removeprefix("torch."),
        }


Measured: TypeAlias = tuple[Scores, PatchPair]  # of one image by one method


def evaluate(
    images: ImageSet,
    config: EvaluationConfig,
    methods: Sequence[Method] = (),
    *,
    device: torch.device = CPU,
    facts: Mapping[str, Json] | None = None,
    progress: bool = False,
    processes: Processes | None = None,
) -> Report:
    """Measure bicubic and other methods, one image in memory at a time.

    An image that fails is left out of every row, and named; ValueError where all do, or of LPIPS's weights.

    Args:
        methods: see TrainedModel.method; for your own restorer, Method(Label("mine"), restore).
        device: where LPIPS is computed.
        facts: more for the protocol, such as which model it was.
        processes: all of them get the report.
    """
    conditions = _conditions(config, device)
    methods = (bicubic_method(config), *methods)
    processes = processes or Processes(device)
    measured, failures = _measure_all(methods, images, conditions, config.seed, progress, processes)
    if not measured:
        raise ValueError(failures[0] if len(failures) == 1 else f"no image can be measured: {failures[0]}")
    protocol = _protocol(images, config, conditions, methods[-1].device)
    columns = list(zip(*measured, strict=True))  # one per method
    rows = [_row(column, config.seed) for column in columns]
    scores = [score for column in columns for score, _ in column]
    return Report(protocol | {"images": len(measured)} | dict(facts or {}), rows, scores, failures)


def _row(column: Sequence[Measured], seed: int) -> Scores:
    """Of the set."""
    scores, patches = zip(*column, strict=True)
    values = {
        each.name: each.summarise([one[each.name] for one in scores], patches, seed) for each in METRICS
    }
    return Scores(scores[0].label, values)


def _measure_all(
    methods: Sequence[Method],
    images: ImageSet,
    conditions: Conditions,
    seed: int,
    progress: bool,
    processes: Processes,
) -> tuple[list[list[Measured]], list[str]]:
    """Every image by every method, and why images were left out."""
    own: dict[int, list[Measured] | str] = {}
    numbers = range(processes.rank, len(images), processes.world_size)
    for number in tqdm(numbers, unit="image", disable=None if progress else True, dynamic_ncols=True):
        path = images.paths[number]
        try:
            picture = images.read(path)
            if not own:  # what the first call alone has to set up belongs to no row
                quickest = min(methods[1:], key=lambda one: one.label.steps or 0, default=methods[0])
                quickest.restore(_unit(picture.low_res)[0, :, :16, :16])
            found = [_measure(method, picture, conditions) for method in methods]
            height, width = picture.truth.shape[-2:]
            positions = patch_positions(height, width, patch_count(len(images)), random_of(path, seed))
            truth = pyramid_patches(_unit(picture.truth)[0], positions)
            own[number] = [
                (scores, PatchPair(pyramid_patches(restored, positions), truth)) for scores, restored in found
            ]
        except IMAGE_ERRORS as error:
            message = one_line(error)
            own[number] = printable(message if path.name in message else f"{path}: {message}")
    everything = {number: one for part in processes.gather(own) for number, one in part.items()}
    ordered = [everything[number] for number in sorted(everything)]
    failures = [one for one in ordered if isinstance(one, str)]
    return [one for one in ordered if not isinstance(one, str)], failures


def _measure(method: Method, picture: Picture, conditions: Conditions) -> tuple[Scores, Tensor]:
    """Scores, and the result (C, H, W) as an 8-bit file holds it."""
    low_res = _unit(picture.low_res)
    found, seconds, peak_bytes = _timed(method, low_res[0])
    estimate = found if isinstance(found, Estimate) else Estimate(found)
    restored = pixels_to_unit(unit_to_pixels(estimate.restored))
    pair = Pair(
        restored[None], _unit(picture.truth), low_res, conditions, estimate.deviation, seconds, peak_bytes
    )
    values = {metric.name: metric.score(pair) for metric in METRICS}
    return Scores(method.label, values, picture.name), restored


def _timed(method: Method, low_res: Tensor) -> tuple[Tensor | Estimate, float, float]:
    """The result, seconds, and on CUDA the most bytes that PyTorch had allocated, nan elsewhere."""
    cuda = method.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(method.device)
    synchronize(method.device)
    start = time.perf_counter()
    found = method.restore(low_res)
    synchronize(method.device)
    seconds = time.perf_counter() - start
    return found, seconds, torch.cuda.max_memory_allocated(method.device) if cuda else math.nan


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _unit(pixels: Tensor) -> Tensor:
    """(C, H, W) uint8 to (1, C, H, W) float32 in [0, 1]."""
    return pixels[None].float() / 255


def _conditions(config: EvaluationConfig, device: torch.device) -> Conditions:
    """LPIPS if it is wanted and can be had."""
    if not config.lpips:
        return Conditions(config.protocol, config.border)
    try:
        lpips = Lpips(device, config.lpips_weights)
    except MetricUnavailableError as error:
        return Conditions(config.protocol, config.border, lpips_note=f"unavailable: {error}")
    return Conditions(config.protocol, config.border, lpips, lpips.describe())


def _protocol(
    images: ImageSet, config: EvaluationConfig, conditions: Conditions, device: torch.device
) -> dict[str, Json]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "data": images.folder,
        "scale": int(config.scale) if config.ratio.denominator == 1 else config.scale,
        "low_resolution": images.describe(),
        "border": config.border,
        "metrics": {metric.name: metric.describe(conditions) for metric in METRICS},
        "seed": config.seed,
        "model": None,
        "restoring": None,
        "device": f"{name}, threads: {torch.get_num_threads()}" if device.type == "cpu" else name,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
