"""The results of the released weights, from the weights themselves: `make results` writes weights/RESULTS.md.

Photos come from the folder that SR_DATA names, with test/Set5 and test/BSD100 in it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from bench.tables import table
from engine.checkpoint import load_model, released_model
from engine.device import select_device
from evaluation import metrics
from evaluation.evaluation import ImageSet, Settings, evaluate, load_trained, read_image_set
from evaluation.report import Row
from imaging.atomic import write_text_atomically
from imaging.files import pixels_to_unit
from restoration import RestoreConfig, Restorer

RESULTS = Path("weights/RESULTS.md")
# (scale, set): the numbers of steps; ten steps of x2 on BSD100 would take a quarter of an hour on one core.
MEASURED = {(4, "Set5"): (1, 4, 10), (4, "BSD100"): (1, 10), (2, "Set5"): (1, 10), (2, "BSD100"): (1,)}
CONSISTENT = {(4, "Set5"): (1, 10), (2, "Set5"): (1, 10)}
HEADINGS = ("method", "PSNR", "SSIM", "LR-PSNR", "HF energy", "SWD")


def as_cells(row: Row, label: str) -> list[str]:
    """One line of the table."""
    measured = (f"{row.psnr:.2f}", f"{row.ssim:.4f}", f"{row.lr_psnr:.1f}", f"{row.hf_energy:.3f}")
    return [label, *measured, f"{row.swd:.1f}"]


def consistent(weights: Path, scale: int, images: ImageSet, steps: int, device: torch.device) -> list[str]:
    """PSNR, SSIM and low-resolution PSNR of restorations that were made to shrink back to their input."""
    config = RestoreConfig(steps=steps, num_images=1, consistency=True)
    restorer = Restorer(load_model(weights), config, device, None)
    protocol = metrics.Protocol(crop=scale)
    found = []
    for picture in images.pictures:
        low_res = picture.low_res.permute(1, 2, 0).numpy()
        restored = pixels_to_unit(restorer.restore(low_res).pixels)[None]
        truth, low = picture.truth[None] / 255, picture.low_res[None] / 255
        measures = (
            metrics.psnr(restored, truth, protocol),
            metrics.ssim(restored, truth, protocol),
            metrics.low_resolution_psnr(restored, low),
        )
        found.append([float(value) for value in measures])
    psnr, ssim, low_res_psnr = (fmean(values) for values in zip(*found, strict=True))
    label = f"{steps} step{'s' if steps > 1 else ''}, consistent"
    return [label, f"{psnr:.2f}", f"{ssim:.4f}", f"{low_res_psnr:.1f}", "", ""]


def measure(scale: int, name: str, weights: Path, photos: Path, device: torch.device) -> list[str]:
    """The lines of one model on one set."""
    settings = Settings(scale, steps=MEASURED[scale, name], lpips=False)
    images = read_image_set(photos / "test" / name, settings)
    report = evaluate(images, settings, load_trained(weights, device), device=device, progress=True)
    rows = [as_cells(report.rows[0], "bicubic")]
    rows += [as_cells(row, f"{row.steps} step{'s' if row.steps != 1 else ''}") for row in report.rows[1:]]
    for steps in CONSISTENT.get((scale, name), ()):
        rows.append(consistent(weights, scale, images, steps, device))
    return [f"## {name}, x{scale}", "", *table(HEADINGS, rows)]


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
