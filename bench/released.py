"""The results of the released weights, from the weights themselves: `make results` writes weights/RESULTS.md.

Photos come from the folder that SR_DATA names, with test/Set5 and test/BSD100 in it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.tables import table
from engine.checkpoint import released_model
from engine.device import select_device
from evaluation.config import EvaluationConfig
from evaluation.evaluation import TrainedModel, evaluate
from evaluation.images import ImageSet
from evaluation.report import Scores
from evaluation.table import BY_NAME
from imaging.atomic import write_text_atomically
from restoration import RestoreConfig

RESULTS = Path("weights/RESULTS.md")
# (scale, set): the numbers of steps; ten steps of x2 on BSD100 would take a quarter of an hour on one core.
MEASURED = {(4, "Set5"): (1, 4, 10), (4, "BSD100"): (1, 10), (2, "Set5"): (1, 10), (2, "BSD100"): (1,)}
CONSISTENT = {(4, "Set5"): (1, 10), (2, "Set5"): (1, 10)}
METRICS = [BY_NAME[name] for name in ("psnr", "ssim", "lr_psnr", "hf_energy", "swd")]


def as_cells(row: Scores, label: str) -> list[str]:
    """One line of the table."""
    return [label, *(metric.print(row[metric.name]) for metric in METRICS)]


def measure(scale: int, name: str, weights: Path, photos: Path, device: torch.device) -> list[str]:
    """The lines of one model on one set."""
    config = EvaluationConfig(scale, lpips=False)
    images = ImageSet(photos / "test" / name, config)
    steps, consistent = MEASURED[scale, name], CONSISTENT.get((scale, name), ())
    plural = {count: f"{count} step{'s' if count > 1 else ''}" for count in (*steps, *consistent)}
    model = TrainedModel(weights, device)
    methods = {plural[count]: model.method(RestoreConfig(steps=count), scale) for count in steps}
    for count in consistent:
        how = RestoreConfig(steps=count, consistency=True)
        methods[f"{plural[count]}, consistent"] = model.method(how, scale)
    report = evaluate(images, config, list(methods.values()), progress=True)
    headings = ["method", *(metric.heading for metric in METRICS)]
    rows = [as_cells(*pair) for pair in zip(report.rows, ["bicubic", *methods], strict=True)]
    return [f"## {name}, x{scale}", "", *table(headings, rows)]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if "SR_DATA" not in os.environ:
        parser.error("SR_DATA must name a folder with test/Set5 and test/BSD100")
    device = select_device(args.device)
    lines = ["# Results of the released weights", "", "Made by `make results`, seed 0, float32.", ""]
    for scale, name in MEASURED:
        weights = released_model(scale)
        lines += measure(scale, name, weights, Path(os.environ["SR_DATA"]), device)
    text = "\n".join(lines)
    print(text)
    write_text_atomically(args.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
