"""Measure the released weights: `make results` writes weights/RESULTS.md.

Photos come from the folder that SR_DATA names, with test/Set5 and test/BSD100 in it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from bench.tables import table
from engine.device import select_device
from engine.processes import Processes
from evaluation.images import EvaluationConfig, ImageSet
from evaluation.measure import evaluate, model_method
from evaluation.metrics import BY_NAME
from imaging.atomic import check_outputs, write_text_atomically
from models import load_model
from restoration import PRESETS, RestoreConfig
from restoration.weights import find_weights

RESULTS = Path("weights/RESULTS.md")
ABOUT = (
    "Made by `make results`, seed 0, float32. A sliced Wasserstein distance of patches is no column:",
    "on degraded input it took noise for texture ([ABLATIONS](../recipes/ABLATIONS.md)).",
)
METRICS = [BY_NAME[name] for name in ("psnr", "ssim", "lr_psnr", "lpips", "hf_energy")]
MODES: dict[str, RestoreConfig] = {mode: RestoreConfig(mode=mode) for mode in PRESETS}
CONSISTENT: dict[str, RestoreConfig] = {
    f"{mode}, consistent": replace(MODES[mode], consistency=True) for mode in ("fidelity", "detail")
}


class Case(NamedTuple):
    """A table: a set of images, how they are made small, and the modes of each kind of weights."""

    images: str
    scale: int
    degradation: str
    rows: dict[str, list[str]]


CASES = (
    Case("Set5", 4, "bicubic", {"clean": [*MODES, *CONSISTENT], "photo": ["fidelity"]}),
    Case("BSD100", 4, "bicubic", {"clean": list(MODES)}),
    *(
        Case("Set5", 4, degradation, {"clean": ["fidelity", "detail"], "photo": list(MODES)})
        for degradation in ("light", "photo", "heavy")
    ),
    *(
        Case("BSD100", 4, degradation, {"clean": ["fidelity"], "photo": ["fidelity", "detail"]})
        for degradation in ("light", "photo", "heavy")
    ),
    Case("Set5", 2, "bicubic", {"clean": [*MODES, *CONSISTENT]}),
    Case("BSD100", 2, "bicubic", {"clean": ["fidelity"]}),
    Case("Set5", 2, "photo", {"clean": ["fidelity"], "photo": ["fidelity", "detail"]}),
    *(Case(name, 3, "bicubic", {"clean": ["fidelity"]}) for name in ("Set5", "BSD100")),
)


def measure(case: Case, photos: Path, device: torch.device) -> list[str]:
    """Measure a case: the lines of its table."""
    config = EvaluationConfig(case.scale, degradation=case.degradation)
    images = ImageSet(photos / "test" / case.images, config)
    methods = {}
    for kind, modes in case.rows.items():
        models = [load_model(path, device=device) for path in find_weights(kind, case.scale)]
        for mode in modes:
            methods[f"{kind}, {mode}"] = model_method(models, (MODES | CONSISTENT)[mode], case.scale, device)
    report = evaluate(images, config, list(methods.values()), Processes(device), progress=True)
    headings = ["method", *(metric.heading for metric in METRICS)]
    rows = [
        [label, *(metric.print(row[metric.name]) for metric in METRICS)]
        for label, row in zip(["bicubic", *methods], report.rows, strict=True)
    ]
    shrunk = "" if case.degradation == "bicubic" else f", degraded: {case.degradation}"
    return [f"## {case.images}, x{case.scale}{shrunk}", "", *table(headings, rows)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.released",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"file to write (default: {RESULTS})")
    args = parser.parse_args(argv)
    if "SR_DATA" not in os.environ:
        parser.error("SR_DATA must name a folder with test/Set5 and test/BSD100")
    check_outputs([args.out], overwrite=True)
    device = select_device(args.device)
    lines = ["# Results of the released weights", "", *ABOUT, ""]
    for case in CASES:
        lines += measure(case, Path(os.environ["SR_DATA"]).expanduser(), device)
    text = "\n".join(lines)
    print(text)
    write_text_atomically(args.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
