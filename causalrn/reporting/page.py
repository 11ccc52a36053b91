"""Renders runs as one HTML page that needs nothing else: no network, no other file."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from causalrn.reporting import facts, views
from causalrn.reporting.runs import Run
from causalrn.reporting.svg import line_chart

# More runs than this share the colours of their models.
MAX_COLOURED_RUNS = 8


@dataclass(frozen=True)
class Chart:
    """A chart with its title and the names that its legend shows."""

    title: str
    svg: str
    names: list[str]


def render(runs: Sequence[Run], metrics: Sequence[str], title: str) -> str:
    """The page.

    Args:
        runs: what to show.
        metrics: those to draw over steps.
        title: of the page.
    """
    variants = views.variants(runs)
    groups = {id(run): name for name, members in variants.items() for run in members}
    by_run = len(runs) <= MAX_COLOURED_RUNS
    labels = {id(run): run.name if by_run else groups[id(run)] for run in runs}
    colours = number_names(list(variants))
    if by_run:
        colours |= number_names([run.name for run in runs])

    curves = []
    for metric in metrics:
        lines = [(labels[id(run)], run.series(metric)) for run in runs if run.series(metric)]
        svg = line_chart(lines, colours, x_label="step", share=is_share(metric))
        curves.append(Chart(metric, svg, names_of(lines, colours)))
    over_steps = [
        Chart(name, line_chart(lines, colours, x_label="step", share=True), names_of(lines, colours))
        for name, lines in views.lines_over_steps(runs).items()
    ]
    lengths = views.lines_over_length(runs)
    colours |= number_names([name for name, _ in lengths if name not in colours], len(colours))
    over_length = Chart(
        "copy accuracy over string length",
        line_chart(lengths, colours, x_label="letters per string", log_x=True, share=True),
        names_of(lengths, colours),
    )
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
        colours=colours,
        labels=labels,
        curves=curves,
        copying=views.copying_tables(runs),
        over_steps=over_steps,
        over_length=over_length if lengths else None,
        ablation=views.ablation_maps(runs),
        cost=facts.cost_table(runs),
        configs=facts.config_table(runs),
        machines=facts.machines(runs),
        number=facts.number,
    )


def is_share(metric: str) -> bool:
    return any(word in metric for word in ("accuracy", "exact_match", "share", "utilization", "utilisation"))


def names_of(lines: Sequence[views.Line], colours: dict[str, int]) -> list[str]:
    """The names of lines, once each, in the order of their colours."""
    return sorted({name for name, _ in lines}, key=colours.__getitem__)


def number_names(names: Sequence[str], start: int = 0) -> dict[str, int]:
    """The number of a colour for each name, in the order of their first appearance."""
    return {name: start + index for index, name in enumerate(dict.fromkeys(names))}
