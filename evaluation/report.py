"""The scores of an evaluation as JSON, CSV, Markdown and a plot."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from evaluation.metrics import BY_NAME, METRICS

# By name, such as JSON can hold. Those of a row of the table are the columns of LABEL and, by metric, a float
# or, where it is undefined, None; those of an image have "image", too.
Facts: TypeAlias = dict[str, Any]
LABEL = ("method", "scheduler", "steps", "samples")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """List the lines of a Markdown table, whose first columns, `texts` of them, are aligned as text."""
    rule = ["---"] * texts + ["---:"] * (len(headings) - texts)
    return [f"| {' | '.join(line)} |" for line in (headings, rule, *rows)]


@dataclass(frozen=True)
class Report:
    """The scores of an evaluation, and all that they depend on."""

    protocol: Facts
    rows: list[Facts]  # of the set; bicubic first, then the methods in their order
    scores: list[Facts]  # of every image in every row
    failures: list[str]  # why an image was left out, one line each

    def to_json(self) -> str:
        """Write the protocol and the rows; null is "not available", "inf" infinity."""
        rows = [
            {name: "inf" if value == math.inf else value for name, value in row.items()} for row in self.rows
        ]
        return json.dumps({"protocol": self.protocol, "rows": rows}, indent=2, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Write a line per image and row; an empty cell is "not available"."""
        text = io.StringIO()
        writer = csv.DictWriter(text, ["image", *LABEL, *BY_NAME], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.scores)
        return text.getvalue()

    def to_markdown(self) -> str:
        """Write the table without empty columns, and the protocol below it."""
        shown = [metric for metric in METRICS if any(row[metric.name] is not None for row in self.rows)]
        cells = [
            ["" if row[name] is None else str(row[name]) for name in LABEL]
            + [metric.print(row[metric.name]) for metric in shown]
            for row in self.rows
        ]
        protocol = self.protocol
        notes = [f"left out: {failure}" for failure in self.failures]
        notes.append(f"low resolution: {protocol['low_resolution']}")
        for metric in METRICS:
            meaning = protocol["metrics"][metric.name]
            if metric in shown or meaning.startswith("unavailable"):
                notes.append(f"{metric.heading}: {meaning}")
        described = [*(("model", each) for each in protocol["models"]), ("restoring", protocol["restoring"])]
        for name, facts in described:
            if facts:
                notes.append(f"{name}: {', '.join(f'{key} {value}' for key, value in facts.items())}")
        notes.append(f"seed {protocol['seed']}; {protocol['device']}")
        lines = table([*LABEL, *(metric.heading for metric in shown)], cells, texts=2)
        return "\n".join([f"**{self.title}**", "", *lines, "", *(f"- {note}" for note in notes)]) + "\n"

    @property
    def title(self) -> str:
        return f"{self.protocol['data']}, x{self.protocol['scale']}, {self.protocol['images']} images"

    def to_png(self) -> bytes:
        """Plot PSNR against LPIPS, or HF energy where a row lacks it (Blau & Michaeli 2018), as PNG."""
        from matplotlib.figure import Figure

        other = BY_NAME["hf_energy" if any(row["lpips"] is None for row in self.rows) else "lpips"]
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.add_subplot()
        curves: dict[tuple[str, int], list[Facts]] = {}
        for row in self.rows:
            if row["psnr"] is not None and math.isfinite(row["psnr"]):
                curves.setdefault((row["method"], row["samples"]), []).append(row)
        for (method, samples), rows in curves.items():
            x, y = ([row[name] for row in rows] for name in ("psnr", other.name))
            axes.plot(x, y, "o-", label=method if samples == 1 else f"{method}, mean of {samples}")
            for row in rows:
                axes.annotate(f" {row['steps'] or ''}", (row["psnr"], row[other.name]))
        axes.set(title=f"{self.title}, with sampling steps", xlabel="PSNR in dB", ylabel=other.heading)
        axes.legend()
        png = io.BytesIO()
        figure.savefig(png, format="png")
        return png.getvalue()
