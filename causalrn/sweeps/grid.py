"""Reads a sweep file: its axes, and the points that they span, each with the arguments of an ordinary run."""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causalrn.training.config_files import find_config, read_config

KEYS = ("configs", "set", "grid", "exclude", "goal", "output")


@dataclass(frozen=True)
class Choice:
    """One place on an axis: its label, the config overlays and the dotted keys that it brings."""

    label: str
    configs: tuple[str, ...] = ()
    values: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
        index: its number in the sweep, which a SLURM array task names.
        labels: label by axis.
        arguments: of `python -m causalrn.fit`, without the run folder.
    """

    index: int
    labels: dict[str, str]
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return ",".join(f"{axis}={label}" for axis, label in self.labels.items())


@dataclass(frozen=True)
class Goal:
    """The value of a metric that counts as learned; the first step that reaches it is a column of the table."""

    metric: str
    at_least: float


@dataclass(frozen=True)
class Sweep:
    """A sweep file as it was read.

    Args:
        path: the file.
        points: all runs, in the order of the grid.
        output: folder of the sweep.
        goal: what counts as learned, if anything.
    """

    path: Path
    points: list[Point]
    output: Path
    goal: Goal | None

    @property
    def axes(self) -> list[str]:
        return list(self.points[0].labels)


def read_sweep(path: Path, output: Path | None = None) -> Sweep:
    """Reads a sweep file.

    `configs` and the overlays of the axes are relative to the file, or name configs that ship. An axis is either a
    dotted key with its list of values, or a name with labelled choices, each a mapping of dotted keys and, under
    `configs`, of overlays:

        configs: [../copy/small.yaml]
        set: {trainer.max_steps: 300}
        grid:
          model:
            quadratic: {}
            transformer: {configs: [../mixer/transformer.yaml]}
          seed_everything: [1, 2]
        exclude: [{model: transformer, seed_everything: 2}]
        goal: {metric: val/exact_match, at_least: 1.0}

    Args:
        path: the file.
        output: folder of the sweep, in place of the file's; by default runs/sweeps/NAME.

    Raises:
        ValueError: the file is no sweep file; what is wrong where.
    """
    content = read_config(path, "sweep")
    if not isinstance(content, dict) or not isinstance(content.get("grid"), dict) or not content["grid"]:
        raise ValueError(f"sweep {path} has no grid: want a mapping with the key grid and at least one axis")
    if unknown := sorted(map(str, set(content) - set(KEYS))):
        raise ValueError(
            f"sweep {path} has unknown keys {', '.join(unknown)}: want some of {', '.join(KEYS)}"
        )
    axes = {str(axis): read_axis(path, str(axis), choices) for axis, choices in content["grid"].items()}
    names = [short_name(axis, list(axes)) for axis in axes]
    common = read_choice(path, "set", {"configs": content.get("configs") or [], **(content.get("set") or {})})
    excluded = read_exclusions(
        path, content.get("exclude") or [], dict(zip(names, axes.values(), strict=True))
    )
    points = []
    for choices in itertools.product(*axes.values()):
        labels = {name: choice.label for name, choice in zip(names, choices, strict=True)}
        if not any(exclusion.items() <= labels.items() for exclusion in excluded):
            points.append(Point(len(points), labels, tuple(arguments_of([common, *choices]))))
    if not points:
        raise ValueError(f"sweep {path}: exclude leaves no point of the grid")
    folder = output or Path(content.get("output") or Path("runs", "sweeps", path.stem))
    return Sweep(path, points, folder, read_goal(path, content.get("goal")))


def read_axis(path: Path, axis: str, choices: Any) -> list[Choice]:
    if isinstance(choices, list):
        found = [Choice(label_of(value), (), ((axis, value),)) for value in choices]
    elif isinstance(choices, dict):
        found = [read_choice(path, label_of(label), choice or {}) for label, choice in choices.items()]
    else:
        found = []
    if not found:
        raise ValueError(
            f"sweep {path}: axis {axis} is {choices!r}; want a list of values or a mapping of labelled choices"
        )
    labels = [choice.label for choice in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"sweep {path}: axis {axis} has {', '.join(twice)} more than once")
    return found


def read_choice(path: Path, label: str, choice: Any) -> Choice:
    if not isinstance(choice, dict):
        raise ValueError(f"sweep {path}: {label} is {choice!r}; want a mapping of dotted keys and configs")
    configs = choice.get("configs") or []
    configs = [configs] if isinstance(configs, str) else configs
    found = []
    for config in configs:
        # Relative to the file, so that a sweep starts from any folder.
        try:
            found.append(str(find_config(str(config), beside=path.parent)))
        except FileNotFoundError as error:
            raise ValueError(f"sweep {path}: {label} names the {error}") from None
    return Choice(label, tuple(found), tuple((str(k), v) for k, v in choice.items() if k != "configs"))


def read_exclusions(path: Path, exclusions: Any, axes: dict[str, list[Choice]]) -> list[dict[str, str]]:
    found = []
    for exclusion in exclusions:
        labels = {str(axis): label_of(label) for axis, label in dict(exclusion).items()}
        for axis, label in labels.items():
            known = [choice.label for choice in axes.get(axis, [])]
            if label not in known:
                raise ValueError(
                    f"sweep {path}: exclude names {axis}={label}; want an axis of {', '.join(axes)}"
                    + (f" and a label of {', '.join(known)}" if known else "")
                )
        found.append(labels)
    return found


def read_goal(path: Path, goal: Any) -> Goal | None:
    if goal is None:
        return None
    if not isinstance(goal, dict) or set(goal) != {"metric", "at_least"}:
        raise ValueError(f"sweep {path}: goal is {goal!r}; want {{metric: NAME, at_least: VALUE}}")
    return Goal(str(goal["metric"]), float(goal["at_least"]))


def arguments_of(choices: list[Choice]) -> list[str]:
    """Command line of a run: all configs first, since a later config would override an earlier key."""
    arguments = [part for choice in choices for config in choice.configs for part in ("--config", config)]
    return arguments + [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for choice in choices
        for key, value in choice.values
    ]


def short_name(axis: str, axes: list[str]) -> str:
    """The last part of a dotted key, where no other axis shares it."""
    last = axis.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in axes) == 1 else axis


def label_of(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "_", text).strip("_") or "_"
