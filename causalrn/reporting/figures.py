"""Draws the charts of a report as PNG and SVG files, for a paper."""

import re
from collections.abc import Sequence
from pathlib import Path

from causalrn.reporting import views
from causalrn.reporting.page import is_share
from causalrn.reporting.runs import Run


def draw_figures(runs: Sequence[Run], metrics: Sequence[str], folder: Path) -> list[Path]:
    """Writes each chart as NAME.png and NAME.svg and returns the paths.

    Args:
        runs: what to draw.
        metrics: those to draw over steps.
        folder: made where it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = views.variants(runs)
    names = {id(run): name for name, members in groups.items() for run in members}
    order = list(groups)
    paths = []
    for metric in metrics:
        lines = [(names[id(run)], run.series(metric)) for run in runs if run.series(metric)]
        paths += draw_panels(
            {metric: lines}, order, "step", folder / re.sub(r"\W+", "_", metric), is_share(metric)
        )
    if panels := views.lines_over_steps(runs):
        paths += draw_panels(panels, order, "step", folder / "copying_over_steps", True)
    if lines := views.lines_over_length(runs):
        paths += draw_panels(
            {"copy accuracy": lines},
            [*order, *(name for name, _ in lines if name not in order)],
            "letters per string",
            folder / "copying_over_length",
            True,
            True,
        )
    if maps := views.ablation_maps(runs):
        paths += draw_maps(maps, folder / "ablation")
    return paths


def draw_panels(
    panels: dict[str, list[views.Line]],
    order: Sequence[str],
    x_label: str,
    path: Path,
    share: bool = False,
    log_x: bool = False,
) -> list[Path]:
    """Panels side by side, with one colour for each name in `order`."""
    pyplot = headless_pyplot()
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(1.2 + 3.8 * len(panels), 3.4),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    handles = {}
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines:
            number = order.index(name)
            style = ("-", "--", ":")[number // 10 % 3]
            xs, ys = zip(*points, strict=True)
            (handles[name],) = axis.plot(xs, ys, style, color=f"C{number % 10}", linewidth=1.5)
        axis.set(title=title, xlabel=x_label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if log_x:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
        if share:
            axis.set_ylim(-0.03, 1.03)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize="small", frameon=False
    )
    return save(figure, path)


def draw_maps(maps: Sequence[views.Grid], path: Path) -> list[Path]:
    pyplot = headless_pyplot()
    figure, axes = pyplot.subplots(
        1, len(maps), figsize=(1.5 + 3.6 * len(maps), 3.2), squeeze=False, layout="constrained"
    )
    for axis, grid in zip(axes[0], maps, strict=True):
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
    figure.colorbar(axes[0][0].images[0], ax=axes, label="copy accuracy")
    return save(figure, path)


def headless_pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, path: Path) -> list[Path]:
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for target in paths:
        figure.savefig(target, dpi=200)
    headless_pyplot().close(figure)
    return paths
