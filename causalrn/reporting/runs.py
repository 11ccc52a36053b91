"""Reads run folders, and folders of them, as far as they are whole."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from causalrn.models import upgrade
from causalrn.system import flatten
from causalrn.training.history import starts_of
from causalrn.training.loggers import read_metrics, steps_until

# Class of the mixer, to the model's name in the paper.
MODELS = {
    "QuadraticRelation": "Quadratic CausalRN",
    "QuadraticRelationScaledHeads": "Quadratic CausalRN",
    "QuadraticRelationWithoutPostNorm": "Quadratic CausalRN",
    "SoftmaxAttention": "Transformer",
    "LinearRelation": "Linear CausalRN",
    "LinearAttention": "Linear Transformer",
}
NETWORK = "model.init_args.network.init_args"


@dataclass
class Run:
    """The content of a run folder.

    Args:
        path: the folder.
        name: as it is shown; unique among the runs of a report.
        config: every value of the resolved config, by dotted key.
        rows: of metrics.csv, one per step.
        final: metrics of the closing validation, or where there was none, those last logged.
        environment: of environment.json, which tells of all starts.
        evaluation: metrics of later evaluations, as at other lengths.
        notes: what is missing or torn, and what changed between starts.
        seconds: of all starts together, as far as they are known.
    """

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    finished: bool = False
    seconds: float | None = None

    @property
    def mixer(self) -> str:
        """Class of the mixer; where mixers alternate, those of the pattern."""
        return self.class_of("mixer")

    @property
    def short_convolution(self) -> str:
        """Class of what stands before the mixer; empty where nothing does."""
        return self.class_of("short_convolution")

    def class_of(self, part: str) -> str:
        keys = [key for key in self.config if re.fullmatch(rf"{NETWORK}\.{part}(\.\d+)?\.class_path", key)]
        return " + ".join(str(self.config[key]).rpartition(".")[2] for key in keys)

    @property
    def model(self) -> str:
        behind = f" behind {self.short_convolution}" if self.short_convolution else ""
        return MODELS.get(self.mixer, self.mixer or "model") + behind

    @property
    def length(self) -> int | None:
        """Letters per string, where the run copies strings of one length."""
        length = self.config.get("data.init_args.length")
        return length if isinstance(length, int) and self.copies else None

    @property
    def copies(self) -> bool:
        return str(self.config.get("data.class_path", "")).endswith("CopyDataModule")

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    def series(self, metric: str) -> list[tuple[float, float]]:
        return [(row["step"], row[metric]) for row in self.rows if metric in row]

    def first_step(self, metric: str, at_least: float) -> int | None:
        """The optimizer steps taken when a metric first reached a value, or None."""
        return steps_until(self.rows, metric, at_least, self.last_step if self.finished else None)


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """All runs in the named folders: run folders, or folders that hold some, as a sweep's.

    Raises:
        ValueError: a folder that is not there, or none that holds a run.
    """
    folders: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"no run folder {path}: want one made by causalrn.fit, or a folder of them")
        inner = [path] if is_run(path) else sorted(filter(is_run, path.iterdir()), key=natural)
        if not inner:
            raise ValueError(
                f"{path} holds no runs: want a run folder made by causalrn.fit, or a folder of them"
            )
        folders += [folder for folder in inner if folder not in folders]
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.yaml", "metrics.csv", "results.json"))


def natural(path: Path) -> list[tuple[int, str]]:
    """A key by which length=16 comes before length=128."""
    parts = []
    for part in path.name.replace("=", ",").split(","):
        parts.append((int(part), "") if part.isdigit() else (-1, part))
    return parts


def read_run(path: Path, name: str) -> Run:
    """A run as far as its folder is whole; what is not is said in its notes."""
    run = Run(path, name)
    run.config = flatten(upgrade(read(run, "config.yaml", yaml.safe_load)))
    run.environment = read(run, "environment.json", json.loads)
    results = read(run, "results.json", json.loads)
    try:
        text = (path / "metrics.csv").read_text()
        run.rows = sorted(read_metrics(path / "metrics.csv"), key=lambda row: row["step"])
        if text and not text.endswith("\n"):
            run.notes.append("metrics.csv has a torn last line, which is left out")
    except FileNotFoundError:
        run.notes.append("metrics.csv is missing")
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        run.notes.append(f"metrics.csv cannot be read: {error}")
    for row in run.rows:
        run.final |= {key: value for key, value in row.items() if key.startswith("val/")}
    run.finished = isinstance(results.get("metrics"), dict)
    if run.finished:
        run.final = results["metrics"]
        run.seconds = results.get("seconds")
    else:
        known = [start["seconds"] for start in starts_of(run.environment) if start.get("seconds")]
        run.seconds = sum(known) if known else None
        run.notes.append(f"unfinished: last logged at step {run.last_step}")
    run.notes += start_notes(run)
    failure = path.parent / ".sweep" / "failed" / f"{path.name}.txt"
    if not run.finished and failure.is_file():
        run.notes.append("failed: " + (failure.read_text().splitlines() or [""])[-1])
    for file in sorted(path.glob("evaluation-*.json")):
        run.evaluation |= read(run, file.name, json.loads).get("metrics", {})
    return run


def environment_facts(known: dict[str, Any]) -> dict[str, str]:
    """Machine and versions of a start, as they are shown."""
    facts = {
        "git revision": known.get("git_revision") or "unknown",
        "accelerators": ", ".join(known.get("accelerators") or []) or "none",
        "processor": known.get("cpu"),
        "threads": known.get("cpu_threads"),
        "ranks": known.get("world_size"),
        "system": known.get("platform"),
        "python": known.get("python"),
        **(known.get("packages") or {}),
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def start_notes(run: Run) -> list[str]:
    """How a run of several starts was put together, and what changed from one to the next."""
    starts = starts_of(run.environment)
    if len(starts) < 2:
        return []
    spent = ", ".join(
        "unknown" if start.get("seconds") is None else f"{start['seconds']:,.0f}" for start in starts
    )
    notes = [f"{len(starts)} starts, of {spent} s"]
    for number, (before, after) in enumerate(itertools.pairwise(starts), 2):
        old, new = environment_facts(before), environment_facts(after)
        changed = [
            f"{name} {old[name]} -> {new[name]}" for name in new if name in old and old[name] != new[name]
        ]
        if changed:
            notes.append(f"from start {number} on (step {after.get('from_step')}): {', '.join(changed)}")
    return notes


def read(run: Run, name: str, parse: Any) -> dict[str, Any]:
    """The mapping in a file of a run; empty, with a note, where it is missing or torn."""
    try:
        content = parse((run.path / name).read_text())
    except FileNotFoundError:
        if name != "results.json":
            run.notes.append(f"{name} is missing")
        return {}
    except (ValueError, yaml.YAMLError):
        run.notes.append(f"{name} is half-written")
        return {}
    return content if isinstance(content, dict) else {}
