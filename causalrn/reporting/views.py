"""Arranges the results of runs into the copying table, accuracy over steps and over length, and the ablation."""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from causalrn.reporting.runs import MODELS, NETWORK, Run

# These settings may differ between runs of one model.
NOT_OF_A_MODEL = (
    "trainer.",
    "seed_everything",
    "data.init_args.seed",
    "data.init_args.val_",
    "data.init_args.length",
    f"{NETWORK}.max_length",
)
EXACT = "val/exact_match"
LEARNED = 0.99
# A cell without a value.
ABSENT = "—"


@dataclass(frozen=True)
class Cell:
    """A value of a table: as text, and as a share of 1 where it is one."""

    text: str
    share: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Grid:
    """A table with named rows and columns."""

    title: str
    rows: list[str]
    columns: list[str]
    cells: list[list[Cell]]


Line = tuple[str, list[tuple[float, float]]]


def metric_names(runs: Iterable[Run]) -> list[str]:
    """Every logged metric: validation first, then training's."""
    names = {name for run in runs for row in run.rows for name in row} - {"step", "epoch"}
    return sorted(names, key=lambda name: (not name.startswith("val/"), name != "train/loss", name))


def check_metrics(runs: Sequence[Run], wanted: Sequence[str]) -> list[str]:
    """The metrics to draw: those wanted, or all.

    Raises:
        ValueError: one that no run has logged.
    """
    known = metric_names(runs)
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"no run has the metric {name}: want one of {', '.join(known) or 'none was logged'}"
            )
    return list(wanted) or known


def differences(runs: Sequence[Run], ignored: Sequence[str] = ()) -> list[str]:
    """Dotted keys of configs that not all runs agree on."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [
        key
        for key in keys
        if not key.startswith(("run_dir", "resume", "config", *ignored))
        and len({json.dumps(run.config.get(key), default=str) for run in runs}) > 1
    ]


def short_keys(keys: Sequence[str]) -> list[str]:
    """The last part of each dotted key, and as much more as tells it from the others."""
    short = []
    for key in keys:
        parts = [part for part in key.split(".") if part != "init_args"]
        count = 1
        while (
            count < len(parts)
            and sum(other.endswith("." + ".".join(key.split(".")[-count:])) for other in keys) > 1
        ):
            count += 1
        short.append(".".join(parts[-count:]))
    return short


def value_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.rpartition(".")[2] if re.fullmatch(r"(\w+\.)+[A-Z]\w+", text) else text


def telling(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """The keys without those that tell the runs apart exactly as an earlier one does."""
    found: dict[str, str] = {}
    for key in keys:
        values = [json.dumps(run.config.get(key), default=str) for run in runs]
        found.setdefault(json.dumps([values.index(value) for value in values]), key)
    return list(found.values())


def variants(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of one model and setting, at any length and seed, by a name that tells the settings apart."""
    # The paper's order of models.
    by_model: dict[str, list[Run]] = {model: [] for model in MODELS.values()}
    for run in runs:
        by_model.setdefault(run.model, []).append(run)
    found: dict[str, list[Run]] = {}
    for model, members in by_model.items():
        keys = telling(members, differences(members, NOT_OF_A_MODEL))
        for run in members:
            values = ", ".join(
                f"{short} {value_text(run.config.get(key))}"
                for key, short in zip(keys, short_keys(keys), strict=True)
                if key in run.config
            )
            found.setdefault(f"{model} ({values})" if values else model, []).append(run)
    return found


def mean_text(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean:.3f}{spread}"


def copying_tables(runs: Sequence[Run]) -> list[Grid]:
    """Final copy accuracy and the steps until strings are copied as a whole, by model and length."""
    runs = [run for run in runs if run.length is not None]
    if not runs:
        return []
    lengths = sorted({run.length for run in runs if run.length is not None})
    groups = variants(runs)

    def table(title: str, cell: Callable[[list[Run]], Cell]) -> Grid:
        cells = [
            [cell([run for run in members if run.length == length]) for length in lengths]
            for members in groups.values()
        ]
        return Grid(title, list(groups), [f"S = {length}" for length in lengths], cells)

    return [
        table("Copy accuracy at the end", accuracy_cell),
        table(f"Steps until {LEARNED:.0%} of the strings are copied exactly", steps_cell),
    ]


def accuracy_cell(runs: Sequence[Run], metric: str = "val/copy_accuracy") -> Cell:
    values = [
        run.final[metric]
        for run in runs
        if run.final.get(metric) == run.final.get(metric) and metric in run.final
    ]
    if not values:
        return Cell("failed" if any(failed(run) for run in runs) else ABSENT)
    unfinished = [run for run in runs if not run.finished]
    note = f"at step {max(run.last_step for run in unfinished)}, unfinished" if unfinished else ""
    return Cell(mean_text(values), statistics.fmean(values), note)


def steps_cell(runs: Sequence[Run]) -> Cell:
    steps = [run.first_step(EXACT, LEARNED) for run in runs]
    reached = [step for step in steps if step is not None]
    if reached and len(reached) == len(steps):
        return Cell(f"{statistics.fmean(reached):.0f}")
    if reached:
        return Cell(f"{statistics.fmean(reached):.0f}", note=f"{len(reached)} of {len(steps)} runs")
    return Cell(f"> {max(run.last_step for run in runs)}" if runs else ABSENT)


def failed(run: Run) -> bool:
    return any(note.startswith("failed") for note in run.notes)


def lines_over_length(runs: Sequence[Run], metric: str = "val/copy_accuracy") -> list[Line]:
    """A metric over string length: per model from runs trained at each length, and per run from later evaluations."""
    lines: list[Line] = []
    for name, members in variants([run for run in runs if run.length is not None]).items():
        lengths = sorted({run.length for run in members if run.length is not None})
        points = [
            (float(length), cell.share)
            for length in lengths
            if (cell := accuracy_cell([run for run in members if run.length == length], metric)).share
            is not None
        ]
        if len(points) > 1:
            lines.append((name, points))
    for run in runs:
        found = re.compile(re.escape(metric) + r"/length_(\d+)")
        values = {**run.final, **run.evaluation}
        points = sorted(
            (float(match[1]), value) for key, value in values.items() if (match := found.fullmatch(key))
        )
        if len(points) > 1:
            lines.append((f"{run.name} evaluated", points))
    return lines


def lines_over_steps(runs: Sequence[Run], metric: str = "val/copy_accuracy") -> dict[str, list[Line]]:
    """A metric over steps, one panel per string length."""
    panels: dict[str, list[Line]] = {}
    runs = [run for run in runs if run.length is not None]
    names = {id(run): name for name, members in variants(runs).items() for run in members}
    for length in sorted({run.length for run in runs if run.length is not None}):
        lines = [(names[id(run)], run.series(metric)) for run in runs if run.length == length]
        panels[f"strings of {length} letters"] = [line for line in lines if line[1]]
    return {title: lines for title, lines in panels.items() if lines}


def ablation_maps(runs: Sequence[Run]) -> list[Grid]:
    """Final copy accuracy by pre-normalisation and activation, one map per length and post-normalisation."""
    runs = [
        run
        for run in runs
        if run.length is not None and not run.short_convolution and run.mixer.startswith("QuadraticRelation")
    ]
    where = f"{NETWORK}.mixer.init_args"
    settings = {
        id(run): (
            str(run.config.get(f"{where}.pre_norm", "exact")),
            str(run.config.get(f"{where}.activation", "exp")),
        )
        for run in runs
    }
    if len(set(settings.values())) < 2:
        return []
    maps = []
    rows = sorted({pre for pre, _ in settings.values()}, key=["exact", "approx", "none"].index)
    columns = sorted(
        {act for _, act in settings.values()}, key=["exp", "relu", "elu", "gelu", "official_elu"].index
    )
    for length in sorted({run.length for run in runs if run.length is not None}):
        for mixer, post in (("QuadraticRelation", "with"), ("QuadraticRelationWithoutPostNorm", "without")):
            members = [run for run in runs if run.length == length and run.mixer == mixer]
            cells = [
                [
                    ablation_cell([run for run in members if settings[id(run)] == (pre, act)])
                    for act in columns
                ]
                for pre in rows
            ]
            # A length that was trained in one setting only compares nothing.
            if sum(cell.text != ABSENT for row in cells for cell in row) > 1:
                title = f"{post} post-normalisation, S = {length}"
                maps.append(
                    Grid(
                        title, [f"{'no' if pre == 'none' else pre} pre-norm" for pre in rows], columns, cells
                    )
                )
    return maps


def ablation_cell(runs: Sequence[Run]) -> Cell:
    cell = accuracy_cell(runs)
    steps = steps_cell(runs)
    note = f"{steps.text} steps" if cell.share is not None and not cell.note else cell.note
    return Cell(cell.text, cell.share, note)
