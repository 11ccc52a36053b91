"""Runs as one HTML page that needs nothing else: no network, no other file, no script."""

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

import jinja2

from causalrn.reporting import facts, views
from causalrn.reporting.figures import Chart, draw_charts
from causalrn.reporting.runs import Run, find_runs


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
    metrics = views.check_metrics(runs, [name for name in options.metrics.split(",") if name])
    title = options.title or ", ".join(path.resolve().name for path in options.runs)
    output = options.output or Path("report.html")
    charts = draw_charts(runs, metrics)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(runs, charts, title))
    for shown in runs:
        for note in shown.notes:
            print(f"note: {shown.name}: {note}")
    print(f"{len(runs)} runs in {output} ({output.stat().st_size / 1000:.0f} kB)")
    if options.figures is not None:
        options.figures.mkdir(parents=True, exist_ok=True)
        paths = [path for chart in charts for path in chart.save(options.figures)]
        print(f"{len(paths)} figures in {options.figures}")


def render(runs: Sequence[Run], charts: Sequence[Chart], title: str) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        charts=charts,
        copying=views.copying_tables(runs),
        ablation=views.ablation_maps(runs),
        cost=facts.cost_table(runs),
        configs=facts.config_table(runs),
        machines=facts.machines(runs),
    )
