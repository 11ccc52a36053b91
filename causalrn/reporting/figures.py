"""The charts of a report, for its page and as files for a paper."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from causalrn.reporting import views
from causalrn.reporting.runs import Run

# More runs than this are drawn and named by their models.
MAX_NAMED_RUNS = 8
# Text stays text, so that a page can be searched and its charts stay small.
SVG_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "font.size": 9}


@dataclass(frozen=True)
class Chart:
    """One figure of a report.

    Args:
        name: of its files.
        section: of the page that shows it.
        figure: the drawing.
    """

    name: str
    section: str
    figure: Figure

    def svg(self) -> str:
        """An SVG element for a page; its identifiers belong to this chart alone."""
        text = io.StringIO()
        with mpl.rc_context({**SVG_STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        return text.getvalue().partition("<svg")[2].join(("<svg", ""))

    def save(self, folder: Path) -> list[Path]:
        """Writes NAME.png and NAME.svg."""
        paths = [folder / f"{self.name}.{kind}" for kind in ("png", "svg")]
        for path in paths:
            self.figure.savefig(path, dpi=200)
        return paths


def draw_charts(runs: Sequence[Run], metrics: Sequence[str]) -> list[Chart]:
    """Every chart that the runs have values for.

    Args:
        runs: what to draw.
        metrics: those to draw over steps.
    """
    variants = views.variants(runs)
    groups = {id(run): name for name, members in variants.items() for run in members}
    names = {id(run): run.name if len(runs) <= MAX_NAMED_RUNS else groups[id(run)] for run in runs}
    order = list(dict.fromkeys([*(names[id(run)] for run in runs), *variants]))
    charts = []
    for metric in metrics:
        lines = [(names[id(run)], run.series(metric)) for run in runs if run.series(metric)]
        figure = draw_panels({metric: lines}, order, "step", is_share(metric))
        charts.append(Chart(re.sub(r"\W+", "_", metric), "curves", figure))
    if panels := views.lines_over_steps(runs):
        charts.append(Chart("copying_over_steps", "copying", draw_panels(panels, order, "step", share=True)))
    if lines := views.lines_over_length(runs):
        order += [name for name, _ in lines if name not in order]
        figure = draw_panels({"copy accuracy": lines}, order, "letters per string", share=True, log_x=True)
        charts.append(Chart("copying_over_length", "copying", figure))
    if maps := views.ablation_maps(runs):
        charts.append(Chart("ablation", "ablation", draw_maps(maps)))
    return charts


def draw_panels(
    panels: dict[str, list[views.Line]],
    order: Sequence[str],
    x_label: str,
    share: bool = False,
    log_x: bool = False,
) -> Figure:
    """Panels side by side, with one colour for each name in `order`; points that are not finite leave a gap."""
    figure = Figure(figsize=(1.2 + 3.8 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    handles = {}
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines:
            number = order.index(name)
            style = ("-", "--", ":")[number // 10 % 3]
            marker = "." if len(points) <= 24 else ""
            (handles[name],) = axis.plot(
                *zip(*points, strict=True), style, marker=marker, color=f"C{number % 10}"
            )
        axis.set(title=title, xlabel=x_label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if log_x:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
        if share:
            axis.set_ylim(-0.03, 1.03)
        elif spans_decades(lines):
            axis.set_yscale("log")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize="small", frameon=False
    )
    return figure


def draw_maps(maps: Sequence[views.Grid]) -> Figure:
    """Grids of shares as heat maps side by side."""
    figure = Figure(figsize=(1.5 + 3.6 * len(maps), 3.2), layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)
    for axis, grid in zip(axes[0], maps, strict=True):
        draw_map(axis, grid)
    figure.colorbar(axes[0][0].images[0], ax=axes, label="copy accuracy")
    return figure


def draw_map(axis: Axes, grid: views.Grid) -> None:
    values = [[float("nan") if cell.share is None else cell.share for cell in row] for row in grid.cells]
    axis.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axis.set_xticks(range(len(grid.columns)), grid.columns)
    axis.set_yticks(range(len(grid.rows)), grid.rows)
    axis.set_title(grid.title, fontsize="medium")
    for i, row in enumerate(grid.cells):
        for j, cell in enumerate(row):
            colour = "white" if (cell.share or 0) > 0.6 else "black"
            text = f"{cell.text}\n{cell.note}".strip()
            axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)


def spans_decades(lines: Sequence[views.Line]) -> bool:
    """Whether values are positive and so far apart that a logarithmic axis shows more of them."""
    values = [y for _, points in lines for _, y in points if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 30


def is_share(metric: str) -> bool:
    return any(word in metric for word in ("accuracy", "exact_match", "share", "utilization", "utilisation"))
