"""The report of runs: one page with curves, tables, costs and differences, and its charts as files."""

import argparse
from pathlib import Path

from causalrn.reporting.figures import draw_figures
from causalrn.reporting.page import render
from causalrn.reporting.runs import find_runs
from causalrn.reporting.views import check_metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of them, as a sweep's")
    parser.add_argument("--output", type=Path, help="HTML file to write (default: report.html)")
    parser.add_argument("--title", help="of the page (default: names of the folders)")
    parser.add_argument(
        "--metrics", default="", help="names, comma-separated, of the metrics to draw (default: all)"
    )
    parser.add_argument("--figures", type=Path, help="folder for the charts as PNG and SVG files")


def run(options: argparse.Namespace) -> None:
    """Writes the page and, where they are asked for, the figures.

    Raises:
        ValueError: a folder without runs, or a metric that none has.
    """
    runs = find_runs(options.runs)
    metrics = check_metrics(runs, [name for name in options.metrics.split(",") if name])
    title = options.title or ", ".join(path.resolve().name for path in options.runs)
    output = options.output or Path("report.html")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(runs, metrics, title))
    for shown in runs:
        for note in shown.notes:
            print(f"note: {shown.name}: {note}")
    print(f"{len(runs)} runs in {output} ({output.stat().st_size / 1000:.0f} kB)")
    if options.figures is not None:
        paths = draw_figures(runs, metrics, options.figures)
        print(f"{len(paths)} figures in {options.figures}")
