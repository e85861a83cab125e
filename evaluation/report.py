"""The scores of an evaluation, and how they are shown: JSON, CSV, Markdown and a plot."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json: TypeAlias = "str | int | float | list[Json] | dict[str, Json] | None"

LPIPS_OFF = "switched off"

CSV_COLUMNS = (
    "image",
    "method",
    "scheduler",
    "steps",
    "samples",
    "psnr",
    "ssim",
    "lr_psnr",
    "lpips",
    "hf_energy",
    "seconds",
)


@dataclass(frozen=True)
class Scores:
    """What an image and a set have in common. None: the metric is not defined here, or not to be had.

    Attributes:
        method: "bicubic" or "model".
        scheduler, steps: of the model.
        samples: how many restorations of each image were averaged before anything was measured.
        psnr, ssim, lr_psnr, lpips, hf_energy: see metrics.py.
    """

    method: str
    scheduler: str | None
    steps: int | None
    samples: int
    psnr: float
    ssim: float
    lr_psnr: float
    lpips: float | None
    hf_energy: float | None


@dataclass(frozen=True)
class ImageScores(Scores):
    """One image, restored by one method.

    Attributes:
        image: name of the file.
        seconds, peak_bytes: what it took; the seconds of all samples.
        megapixels: of the result.
        pearson, spearman: metrics.uncertainty_correlation, where samples > 1.
    """

    image: str
    seconds: float
    peak_bytes: int | None
    megapixels: float
    pearson: float | None
    spearman: float | None


@dataclass(frozen=True)
class Row(Scores):
    """One method on the whole set: means over the images, of hf_energy the geometric one.

    Attributes:
        swd: sliced Wasserstein distance of the set.
        seconds_per_megapixel: of output, from the decoded input to the result.
        peak_memory_mb: the largest of any image, in 10^6 bytes.
        uncertainty_pearson, uncertainty_spearman: means over the images, where samples > 1.
    """

    swd: float
    seconds_per_megapixel: float
    peak_memory_mb: float | None
    uncertainty_pearson: float | None
    uncertainty_spearman: float | None


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        protocol: all that the numbers depend on.
        rows: bicubic first, then the model in the order of the steps.
        scores: of every image in every row, in the same order.
    """

    protocol: dict[str, Json]
    rows: list[Row]
    scores: list[ImageScores]

    def to_json(self) -> str:
        """{"protocol": ..., "rows": [...]}: null is "not available", and infinity the string "inf"."""
        rows = [{name: _json_value(value) for name, value in asdict(row).items()} for row in self.rows]
        return json.dumps({"protocol": self.protocol, "rows": rows}, indent=2, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """One line per image and row, under CSV_COLUMNS; an empty field is "not available"."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for score in self.scores:
            values = asdict(score)
            writer.writerow([values[name] for name in CSV_COLUMNS])
        return text.getvalue()

    def to_markdown(self) -> str:
        """A table to paste, and under it what the numbers mean."""
        headings = list(_MARKDOWN_COLUMNS)
        if self.protocol["lpips"] == LPIPS_OFF:
            headings.remove("LPIPS")
        if all(row.samples == 1 for row in self.rows):
            headings = [heading for heading in headings if not heading.startswith("uncertainty")]
        cells = [[_markdown_cell(heading, row) for heading in headings] for row in self.rows]
        right_aligned = ["---" if heading in {"method", "scheduler"} else "---:" for heading in headings]
        lines = [f"| {' | '.join(line)} |" for line in (headings, right_aligned, *cells)]
        return "\n".join([f"**{self.title}**", "", *lines, "", *self._notes()]) + "\n"

    @property
    def title(self) -> str:
        """Which images, at which scale."""
        return f"{self.protocol['data']}, x{self.protocol['scale']}, {self.protocol['images']} images"

    def _notes(self) -> list[str]:
        protocol, model = self.protocol, self.protocol["model"]
        notes = [
            f"- PSNR, SSIM: {protocol['metrics']}",
            f"- low resolution: {protocol['low_resolution']}",
            f"- HF energy: {protocol['hf_energy']}; SWD: {protocol['swd']}",
        ]
        if protocol["lpips"] != LPIPS_OFF:
            notes.append(f"- LPIPS: {protocol['lpips']}")
        if isinstance(model, dict):
            notes.append(
                f"- model: {model['file']} (SHA-256 {model['sha256']}), {model['parameters']} parameters, "
                f"{model['steps_trained']} steps of training, {model['mode']}, {model['schedule']} schedule, "
                f"{model['precision']}"
            )
        notes.append(f"- seed {protocol['seed']}; {protocol['device']}; peak MB {protocol['peak_memory_mb']}")
        return notes


# Heading -> attribute of a Row, and how it is printed.
_MARKDOWN_COLUMNS = {
    "method": ("method", "s"),
    "scheduler": ("scheduler", "s"),
    "steps": ("steps", "d"),
    "samples": ("samples", "d"),
    "PSNR": ("psnr", ".2f"),
    "SSIM": ("ssim", ".4f"),
    "LR-PSNR": ("lr_psnr", ".2f"),
    "LPIPS": ("lpips", ".4f"),
    "HF energy": ("hf_energy", ".3f"),
    "SWD": ("swd", ".1f"),
    "s/MP": ("seconds_per_megapixel", ".3g"),
    "peak MB": ("peak_memory_mb", ".0f"),
    "uncertainty r": ("uncertainty_pearson", ".2f"),
    "uncertainty rho": ("uncertainty_spearman", ".2f"),
}


def _markdown_cell(heading: str, row: Row) -> str:
    attribute, form = _MARKDOWN_COLUMNS[heading]
    value = getattr(row, attribute)
    if value is None:
        return "unavailable" if heading == "LPIPS" else ""
    return format(value, form)


def _json_value(value: str | float | None) -> str | float | None:
    """JSON has no infinity."""
    return "inf" if value == math.inf else value


def perception_distortion_figure(report: Report) -> "Figure":
    """Draw the rows in the plane of Blau & Michaeli 2018: how true against how real, over step counts.

    Distortion is PSNR; perception is LPIPS where every row has it, else SWD. Rows of infinite PSNR have no
    place in the plane and are left out.
    """
    from matplotlib.figure import Figure

    name = "swd" if any(row.lpips is None for row in report.rows) else "lpips"
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for curve in _curves(report.rows):
        points = [(row.psnr, getattr(row, name)) for row in curve.rows]
        axes.plot(*zip(*points, strict=True), curve.style, color=curve.colour, label=curve.label)
        for index, (row, point) in enumerate(zip(curve.rows, points, strict=True)):
            text = "" if row.steps is None else f"{row.steps} step{'s' if row.steps > 1 else ''}"
            place = (0, 8 if index % 2 else -16)  # neighbours of nearly the same value stay legible
            label = axes.annotate(text, point, place, textcoords="offset points", ha="center", fontsize=9)
            label.set(color=curve.colour, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    channel = "luma" if str(report.protocol["metrics"]).startswith("luma") else "RGB"
    axes.set(title=report.title, xlabel=f"PSNR on {channel} in dB (more is closer to the truth)")
    axes.set_ylabel(f"{name.upper()} (less is more like real texture)")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


class _Curve(NamedTuple):
    """Points to join in the figure."""

    label: str
    style: str
    colour: str
    rows: list[Row]


def _curves(rows: Sequence[Row]) -> list[_Curve]:
    """Bicubic, the samples of the model, and their means, by step count; none without a point."""
    finite = sorted((row for row in rows if math.isfinite(row.psnr)), key=lambda row: row.steps or 0)
    model = [row for row in finite if row.method == "model"]
    single = [row for row in model if row.samples == 1]
    mean = [row for row in model if row.samples > 1]
    scheduler = model[0].scheduler if model else ""
    curves = [
        _Curve("bicubic", "s", "dimgrey", [row for row in finite if row.method == "bicubic"]),
        _Curve(f"model, {scheduler}", "o-", "tab:blue", single),
        _Curve(f"mean of {mean[0].samples if mean else 0} samples", "^--", "tab:orange", mean),
    ]
    return [curve for curve in curves if curve.rows]
