"""The scores of an evaluation as JSON, CSV, Markdown and a plot."""

import csv
import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from evaluation.table import BY_NAME, METRICS, Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json: TypeAlias = "str | int | float | Sequence[Json] | Mapping[str, Json] | None"
STYLES = (("o-", "tab:blue"), ("^--", "tab:orange"), ("v:", "tab:green"), ("d-.", "tab:red"))


@dataclass(frozen=True)
class Label:
    """What was measured."""

    method: str  # "bicubic", "model", a mode of restoring, or a name of the caller's own
    scheduler: str | None = None
    steps: int | None = None
    samples: int = 1  # restorations of each image that were averaged before anything was measured


HEADINGS = tuple(vars(Label("")))


@dataclass(frozen=True)
class Scores:
    """What one method scores."""

    label: Label
    values: dict[str, float | None]  # by metric; None where undefined
    image: str | None = None  # name of the file; None for a set

    def __getitem__(self, name: str) -> float | None:
        return self.values[name]


@dataclass(frozen=True)
class Report:
    """What was found."""

    protocol: dict[str, Json]  # all that the numbers depend on
    rows: list[Scores]  # of the set; bicubic first, then the methods in their order
    scores: list[Scores]  # of every image in every row
    failures: list[str]  # why an image was left out, one line each

    def to_json(self) -> str:
        """null is "not available", "inf" infinity."""
        rows = [
            {name: "inf" if value == math.inf else value for name, value in cells.items()}
            for cells in (vars(row.label) | row.values for row in self.rows)
        ]
        return json.dumps({"protocol": self.protocol, "rows": rows}, indent=2, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """A line per image and row; empty is "not available"."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [metric.name for metric in METRICS if metric.of_image is not None]
        writer.writerow(["image", *HEADINGS, *names])
        for score in self.scores:
            writer.writerow([score.image, *vars(score.label).values(), *(score[name] for name in names)])
        return text.getvalue()

    def to_markdown(self) -> str:
        """Without empty columns."""
        shown = [metric for metric in METRICS if any(row[metric.name] for row in self.rows)]
        headings = [*HEADINGS, *(metric.heading for metric in shown)]
        lines = [headings, ["---"] * 2 + ["---:"] * len(headings[2:])]
        for row in self.rows:
            label = ["" if value is None else str(value) for value in vars(row.label).values()]
            lines.append(label + [metric.print(row[metric.name]) for metric in shown])
        table = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([f"**{self.title}**", "", *table, "", *self._notes(shown)]) + "\n"

    @property
    def title(self) -> str:
        return f"{self.protocol['data']}, x{self.protocol['scale']}, {self.protocol['images']} images"

    def _notes(self, shown: Sequence[Metric]) -> list[str]:
        protocol = self.protocol
        notes = [f"left out: {failure}" for failure in self.failures]
        notes.append(f"low resolution: {protocol['low_resolution']}")
        for metric in METRICS:
            meaning = str(_as_dict(protocol["metrics"])[metric.name])
            if metric in shown or meaning.startswith("unavailable"):
                notes.append(f"{metric.heading}: {meaning}")
        for name in ("model", "restoring"):
            facts = ", ".join(f"{key} {value}" for key, value in _as_dict(protocol[name]).items())
            notes += [f"{name}: {facts}"] if facts else []
        return [f"- {note}" for note in (*notes, f"seed {protocol['seed']}; {protocol['device']}")]


def _as_dict(value: Json) -> Mapping[str, Json]:
    return value if isinstance(value, Mapping) else {}


def perception_distortion_figure(report: Report) -> "Figure":
    """PSNR against LPIPS, or SWD where a row lacks it (Blau & Michaeli 2018)."""
    from matplotlib.figure import Figure

    perception = BY_NAME["swd" if any(row["lpips"] is None for row in report.rows) else "lpips"]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes, styles = figure.add_subplot(), itertools.cycle(STYLES)
    for name, rows in _curves(report.rows).items():
        style, colour = ("s", "dimgrey") if rows[0].label.steps is None else next(styles)
        points = [(row["psnr"], row[perception.name]) for row in rows]
        axes.plot(*zip(*points, strict=True), style, color=colour, label=name)
        for index, (row, point) in enumerate(zip(rows, points, strict=True)):
            steps = row.label.steps
            text = "" if steps is None else f"{steps} step{'s' if steps > 1 else ''}"
            place = (0, 8 if index % 2 else -16)  # neighbours of nearly the same value stay legible
            label = axes.annotate(text, point, place, textcoords="offset points", ha="center", fontsize=9)
            label.set(color=colour, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    channel = str(_as_dict(report.protocol["metrics"])["psnr"]).split()[0].rstrip(";")
    axes.set(title=report.title, xlabel=f"PSNR on {channel} in dB (more is closer to the truth)")
    axes.set_ylabel(f"{perception.heading} (less is more like real texture)")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _curves(rows: Sequence[Scores]) -> dict[str, list[Scores]]:
    """Rows of one method and number of samples, by steps."""
    curves: dict[str, list[Scores]] = {}
    for row in sorted(rows, key=lambda row: row.label.steps or 0):
        if row["psnr"] is not None and math.isfinite(row["psnr"]):
            label = row.label
            name = label.method if label.scheduler is None else f"{label.method}, {label.scheduler}"
            name += f", mean of {label.samples}" if label.samples > 1 else ""
            curves.setdefault(name, []).append(row)
    return curves
