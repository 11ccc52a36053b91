"""Collects the results of all points into one table, results.csv."""

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from causalrn.sweeps.folder import SweepFolder, read_results
from causalrn.sweeps.grid import Goal, Sweep
from causalrn.system import replacing
from causalrn.training.loggers import read_metrics, steps_until

Row = dict[str, Any]


def collect(sweep: Sweep, folder: SweepFolder) -> list[Row]:
    """One row per point, finished or not: its labels, state, steps, seconds, final metrics, and when it met the goal."""
    rows = []
    for point in sweep.points:
        run_dir = folder.run_dir(point)
        row: Row = {"point": point.name, **point.labels, "state": folder.state(point)}
        if (results := read_results(run_dir)) is not None:
            row |= {"step": results.get("step"), "seconds": results.get("seconds")}
            if results.get("starts", 1) > 1:
                # The seconds are those of all of them.
                row["starts"] = results["starts"]
            row |= results["metrics"]
        if sweep.goal is not None:
            try:
                row["goal_step"] = goal_step(run_dir, sweep.goal, row.get("step"))
            except (ValueError, KeyError, TypeError) as error:
                row["note"] = f"metrics.csv cannot be read: {error}"
        rows.append(row)
    return rows


def goal_step(run_dir: Path, goal: Goal, last_step: int | None) -> int | None:
    """The optimizer steps taken when the metric first reached the goal, or None."""
    path = run_dir / "metrics.csv"
    rows = read_metrics(path) if path.exists() else []
    return steps_until(rows, goal.metric, goal.at_least, last_step)


def write_table(rows: list[Row], folder: Path) -> Path:
    """Writes results.csv in one step, and returns its path."""
    path = folder / "results.csv"
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns(rows))
        writer.writeheader()
        writer.writerows(rows)
    return path


def columns(rows: Iterable[Row]) -> list[str]:
    """All columns in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def print_table(rows: list[Row], axes: list[str]) -> None:
    names = [name for name in columns(rows) if name != "point" and name not in axes]
    table = Table(box=box.SIMPLE_HEAD)
    for name in (*axes, *names):
        table.add_column(
            name.removeprefix("val/").replace("_", " "), justify="left" if name in axes else "right"
        )
    for row in rows:
        table.add_row(*(cell(row.get(name)) for name in (*axes, *names)))
    wide_console().print(table)


def wide_console() -> Console:
    """Standard output; as wide as a table wants where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=240)


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
