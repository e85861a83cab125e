"""Measure the released weights: `make results` writes weights/RESULTS.md.

Photos come from the folder that SR_DATA names, with test/Set5 and test/BSD100 in it.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from engine.cli import module_parser
from engine.device import select_device
from engine.processes import Processes
from evaluation.images import EvaluationConfig, ImageSet
from evaluation.measure import evaluate, model_method
from evaluation.metrics import BY_NAME
from evaluation.report import table
from imaging.atomic import check_outputs, write_text_atomically
from restoration import PRESETS, RestoreConfig
from restoration.weights import load_models

RESULTS = Path("weights/RESULTS.md")
METRICS = [BY_NAME[name] for name in ("psnr", "ssim", "lr_psnr", "lpips", "hf_energy")]
MODES = {mode: RestoreConfig(mode=mode) for mode in PRESETS}
CONSISTENT = {
    "fidelity, consistent": RestoreConfig(mode="fidelity", consistency=True),
    "detail, consistent": RestoreConfig(mode="detail", consistency=True),
}


class Case(NamedTuple):
    """A table: a set of images, how they are made small, and the modes of each kind of weights."""

    images: str
    scale: int
    degradation: str
    rows: dict[str, list[str]]


PHOTOS = ("light", "photo", "heavy")
CASES = (
    Case("Set5", 4, "bicubic", {"clean": [*MODES, *CONSISTENT], "photo": ["fidelity"]}),
    Case("BSD100", 4, "bicubic", {"clean": [*MODES]}),
    *(Case("Set5", 4, kind, {"clean": ["fidelity", "detail"], "photo": [*MODES]}) for kind in PHOTOS),
    *(Case("BSD100", 4, kind, {"clean": ["fidelity"], "photo": ["fidelity", "detail"]}) for kind in PHOTOS),
    Case("Set5", 2, "bicubic", {"clean": [*MODES, *CONSISTENT]}),
    Case("BSD100", 2, "bicubic", {"clean": ["fidelity"]}),
    Case("Set5", 2, "photo", {"clean": ["fidelity"], "photo": ["fidelity", "detail"]}),
    Case("Set5", 3, "bicubic", {"clean": ["fidelity"]}),
    Case("BSD100", 3, "bicubic", {"clean": ["fidelity"]}),
)


def measure(case: Case, photos: Path, device: torch.device) -> list[str]:
    """Measure a case, and list the lines of its table."""
    config = EvaluationConfig(case.scale, degradation=case.degradation)
    images = ImageSet(photos / "test" / case.images, config)
    methods = {}
    for kind, modes in case.rows.items():
        models = [*load_models(kind, case.scale).values()]
        for mode in modes:
            methods[f"{kind}, {mode}"] = model_method(models, (MODES | CONSISTENT)[mode], case.scale, device)
    report = evaluate(images, list(methods.values()), Processes(device), progress=True)
    rows = [
        [label, *(metric.print(row[metric.name]) for metric in METRICS)]
        for label, row in zip(["bicubic", *methods], report.rows, strict=True)
    ]
    shrunk = "" if case.degradation == "bicubic" else f", degraded: {case.degradation}"
    lines = table(["method", *(metric.heading for metric in METRICS)], rows)
    return [f"## {case.images}, x{case.scale}{shrunk}", "", *lines, ""]


def main(argv: Sequence[str] | None = None) -> int:
    parser = module_parser("bench.released", __doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"file to write (default: {RESULTS})")
    args = parser.parse_args(argv)
    if "SR_DATA" not in os.environ:
        parser.error("SR_DATA must name a folder with test/Set5 and test/BSD100")
    check_outputs([args.out], overwrite=True)
    device = select_device(args.device)
    lines = ["# Results of the released weights", "", "Made by `make results`, seed 0, float32.", ""]
    for case in CASES:
        lines += measure(case, Path(os.environ["SR_DATA"]).expanduser(), device)
    text = "\n".join(lines)
    print(text)
    write_text_atomically(args.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
