"""Measure bicubic, trained models and any other restorer on a set of images."""

import itertools
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bicubic import resize
from engine.device import synchronize
from engine.processes import Processes
from evaluation.images import EvaluationConfig, ImageSet, Pair, printable
from evaluation.lpips import Lpips, MetricUnavailableError, file_digest
from evaluation.metrics import METRICS, Comparison
from evaluation.report import LABEL, Facts, Report
from imaging.pixels import from_uint8, pixels_to_unit, to_uint8, unit_to_pixels
from models import LoadedModel
from restoration import RestoreConfig
from restoration.files import FILE_ERRORS, describe_failure
from restoration.restorer import Restorer
from restoration.scales import chain_to, restore_to

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Method:
    """A row of the table: `restore` takes (C, h, w) in [0, 1], C 1 or 3, to (C, H, W) and uses `device`."""

    name: str  # "bicubic", "model", a mode of restoring, or any other
    restore: Callable[[Tensor], Tensor]
    scheduler: str | None = None
    steps: int | None = None
    samples: int = 1  # restorations of each image that are averaged before anything is measured
    device: torch.device = CPU

    def label(self) -> Facts:
        return dict(zip(LABEL, (self.name, self.scheduler, self.steps, self.samples), strict=True))


def model_method(
    models: Sequence[LoadedModel],
    how: RestoreConfig,
    scale: float,
    device: torch.device = CPU,
    precision: torch.dtype | None = None,
) -> Method:
    """Restore as infer.py does with these models; `precision` to autocast to, None for float32.

    ValueError for what the networks cannot do.
    """
    chain = chain_to(scale, [Restorer(model, how, device, precision) for model in models])
    name = how.mode or ("model" if how.detail is None else f"detail {how.detail:g}")

    def restore(low_res: Tensor) -> Tensor:
        return pixels_to_unit(restore_to(chain, unit_to_pixels(low_res)).pixels)

    return Method(name, restore, how.scheduler, chain.restorers[0].step_count, how.num_images, device)


def describe_model(path: Path, model: LoadedModel, precision: torch.dtype | None = None) -> Facts:
    """Describe a model's file and network, for the protocol."""
    return {
        "file": printable(path.name),
        "sha256": file_digest(path),
        "scale": model.network.scale.tolist(),
        "steps_trained": model.step,
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
        **model.process.to_dict(),
        "precision": str(precision or torch.float32).removeprefix("torch."),
    }


def evaluate(
    images: ImageSet,
    methods: Sequence[Method] = (),
    processes: Processes | None = None,
    *,
    progress: bool = False,
) -> Report:
    """Measure bicubic and other methods, one image in memory at a time.

    An image that fails is left out of every row, and named; ValueError where all do, or of LPIPS's weights.

    Args:
        methods: see model_method; any other restorer is Method("mine", restore).
        processes: they share the images, all get the report, and LPIPS is computed on their device.
    """
    processes = processes or Processes(CPU)
    comparison = _with_lpips(images.config, processes.device)
    bicubic = partial(resize, scale=images.config.scale, border=images.config.border)  # of 8 bits, as MATLAB
    methods = (Method("bicubic", lambda low_res: from_uint8(bicubic(to_uint8(low_res)))), *methods)
    # What the first call alone has to set up belongs to no row.
    min(methods[1:], key=lambda one: one.steps or 0, default=methods[0]).restore(torch.zeros(3, 16, 16))
    mine = images.paths[processes.rank :: processes.world_size]
    bar = tqdm(mine, unit="image", disable=None if progress else True, dynamic_ncols=True)
    parts = processes.gather([_measure_image(path, images, methods, comparison) for path in bar])
    results = [parts[number % len(parts)][number // len(parts)] for number in range(len(images))]
    measured = [result for result in results if not isinstance(result, str)]
    failures = [result for result in results if isinstance(result, str)]
    if not measured:
        raise ValueError(failures[0] if len(failures) == 1 else f"no image can be measured: {failures[0]}")
    protocol = _protocol(images, comparison, methods[-1].device) | {"images": len(measured)}
    columns = list(zip(*measured, strict=True))  # one per method
    rows = [
        method.label() | {each.name: each.average_of([row[each.name] for row in column]) for each in METRICS}
        for method, column in zip(methods, columns, strict=True)
    ]
    return Report(protocol, rows, [*itertools.chain(*columns)], failures)


def _measure_image(
    path: Path, images: ImageSet, methods: Sequence[Method], comparison: Comparison
) -> list[Facts] | str:
    """Make an image's row for each method, or say why it is left out."""
    try:
        pair = images.read(path)
        return [_measure(method, pair, comparison) for method in methods]
    except FILE_ERRORS as error:
        return printable(describe_failure(error, path, path))


def _measure(method: Method, pair: Pair, comparison: Comparison) -> Facts:
    """Score one image by one method, its result rounded as an 8-bit file holds it."""
    low_res, truth = from_uint8(pair.low_res[None]), from_uint8(pair.truth[None])
    synchronize(method.device)
    start = time.perf_counter()
    result = method.restore(low_res[0])
    synchronize(method.device)
    seconds = time.perf_counter() - start
    restored = pixels_to_unit(unit_to_pixels(result))[None]
    images = restored, truth, low_res, comparison
    row: Facts = {one.name: one.score(*images).item() for one in METRICS if one.score is not None}
    row["seconds_per_megapixel"] = seconds / (truth.shape[-2] * truth.shape[-1] / 1e6)
    scores = {name: None if math.isnan(score) else score for name, score in row.items()}
    return {"image": pair.name, **method.label(), **scores}


def _with_lpips(config: EvaluationConfig, device: torch.device) -> Comparison:
    """Compare as the options say, with LPIPS if it is wanted and can be had."""
    if not config.lpips:
        return config.comparison
    try:
        lpips = Lpips(device, config.lpips_weights)
    except MetricUnavailableError as error:
        return replace(config.comparison, lpips_note=f"unavailable: {error}")
    return replace(config.comparison, lpips=lpips, lpips_note=lpips.note)


def _protocol(images: ImageSet, comparison: Comparison, device: torch.device) -> Facts:
    config = images.config
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "data": images.folder,
        "scale": int(config.scale) if config.ratio.denominator == 1 else config.scale,
        "low_resolution": images.describe(),
        "border": config.border,
        "metrics": {metric.name: metric.note.format(comparison) for metric in METRICS},
        "seed": config.seed,
        "models": [],
        "restoring": {},
        "device": f"{name}, threads: {torch.get_num_threads()}" if device.type == "cpu" else name,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
