"""The costs of runs, the differences of their configs, and the machines that they ran on."""

import json
import re
import statistics
from collections.abc import Sequence

from causalrn.reporting.runs import Run, environment_facts
from causalrn.reporting.views import ABSENT, Cell, Grid, differences, metric_names, short_keys, value_text
from causalrn.training.history import starts_of

COST = re.compile(r"train/.*(per_second|seconds|memory|bytes|share|wait|flops|utili[sz]ation)")


def cost_table(runs: Sequence[Run]) -> Grid | None:
    """Medians of what training cost: throughput, step time, memory, and whatever else of that kind was logged."""
    names = [name for name in metric_names(runs) if COST.match(name)]
    if not names:
        return None
    cells = []
    for run in runs:
        found = [[value for _, value in run.series(name)] for name in names]
        total = [Cell(f"{run.seconds:,.0f}" if run.seconds is not None else ABSENT)]
        cells.append(
            [*(Cell(number(statistics.median(values)) if values else ABSENT) for values in found), *total]
        )
    columns = [name.removeprefix("train/").replace("_", " ") for name in names]
    return Grid("", [run.name for run in runs], [*columns, "seconds in all"], cells)


def number(value: float) -> str:
    if value >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def config_table(runs: Sequence[Run]) -> Grid | None:
    keys = differences(runs)
    if not keys:
        return None
    cells = [
        [Cell(value_text(run.config.get(key)) if key in run.config else ABSENT) for key in keys]
        for run in runs
    ]
    return Grid("", [run.name for run in runs], short_keys(keys), cells)


def machines(runs: Sequence[Run]) -> list[tuple[dict[str, str], list[str]]]:
    """Each kind of machine and version that runs were made on, with the names of the runs that were started there."""
    found: dict[str, tuple[dict[str, str], list[str]]] = {}
    for run in runs:
        for known in starts_of(run.environment) or [{}]:
            plain = environment_facts(known)
            names = found.setdefault(json.dumps(plain), (plain, []))[1]
            if run.name not in names:
                names.append(run.name)
    return list(found.values())
