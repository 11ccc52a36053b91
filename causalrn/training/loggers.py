"""A CSV file of metrics and TensorBoard events that a resumed run continues, with no step twice."""

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from causalrn.system import replacing


class MetricsCSV(Logger):
    """Writes `metrics.csv`: one row per step, one column per metric.

    The first row that is logged drops what an earlier process left at `first_step` and after it, so that no step stands
    twice. A torn last line, left by a killed process, is dropped.

    Args:
        save_dir: folder of the file; the run folder.
        first_step: the step that the run goes on from.
    """

    def __init__(self, save_dir: str, first_step: int = 0) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self.first_step = first_step
        self.columns: list[str] = []
        # The row that is not written yet: it may still grow, since training and validation log apart.
        self.pending: dict[str, Any] | None = None
        # The step of the last row in the file.
        self.written_step: float | None = None

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsCSV":
        return self

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None, "Lightning passes the step"
        if not self.columns:
            self._keep_earlier_rows()
        if self.pending is None and step == self.written_step:
            # A run that was preempted in a validation has logged the training of that step, and logs the rest now.
            *rows, last = read_metrics(self.path)
            self._replace([*rows, {**last, **metrics}])
            return
        if self.pending is not None and self.pending["step"] != step:
            self._write(self.pending)
            self.pending = None
        self.pending = {**(self.pending or {"step": step}), **metrics}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.pending is not None:
            self._write(self.pending)
            self.pending = None

    def _keep_earlier_rows(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(self.path) if self.path.exists() else []
        self.columns = ["step"]
        self._replace([row for row in rows if row["step"] < self.first_step])

    def _write(self, row: dict[str, Any]) -> None:
        if row.keys() - set(self.columns):
            self._replace([*read_metrics(self.path), row])
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        self.written_step = row["step"]

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        """Rewrites the file in one step, so that a kill leaves the old one or the new one."""
        self.columns += sorted({key for row in rows for key in row} - set(self.columns))
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        self.written_step = rows[-1]["step"] if rows else None


class TensorBoardEvents(TensorBoardLogger):
    """TensorBoard events in the run folder; what an ended process logged beyond its last checkpoint is hidden.

    Args:
        save_dir: the run folder.
        first_step: the step that the run goes on from: TensorBoard drops earlier files' events from it on.
    """

    def __init__(self, save_dir: str, first_step: int = 0) -> None:
        super().__init__(save_dir, name="", version="", purge_step=first_step)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, each with its step and the metrics logged there; a torn last line is left out."""
    text = Path(path).read_text()
    lines = text.splitlines()
    if not text.endswith("\n"):
        lines = lines[:-1]
    rows = []
    for row in csv.DictReader(lines):
        values = {key: float(value) for key, value in row.items() if value}
        rows.append({**values, "step": int(values["step"])})
    return rows


def steps_until(
    rows: Iterable[Mapping[str, float]], metric: str, at_least: float, last_step: int | None
) -> int | None:
    """The optimizer steps taken when a metric first reached a value, or None.

    Args:
        rows: as `read_metrics` gives them.
        last_step: that of a run that is finished, else None.
    """
    steps = (int(row["step"]) for row in rows if row.get(metric, -math.inf) >= at_least)
    # A row carries the index of the step after which it was logged; the closing one the number of steps.
    return next((step if step == last_step else step + 1 for step in steps), None)
