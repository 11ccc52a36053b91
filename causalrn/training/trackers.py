"""Experiment trackers, Weights & Biases and MLflow: a resumed run continues the same run there, and no step stands twice."""

import json
import uuid
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from causalrn.system import optional_module, write_json


class TrackerNotes:
    """The run folder's notes on a tracker: the run's id there, and the last step sent of each metric.

    Args:
        path: JSON file in the run folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content: dict[str, Any] = {}
        if path.exists():
            try:
                content = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path} is half-written: remove it, and the run starts anew there"
                ) from error
        self.run_id: str | None = content.get("run_id")
        self.last_steps: dict[str, int] = content.get("last_steps", {})
        # Steps of this process may come in several calls; only those of an earlier one were sent before.
        self.sent_before = dict(self.last_steps)

    def unsent(self, metrics: Mapping[str, float], step: int) -> dict[str, float]:
        """The metrics that no earlier process sent for this step or a later one."""
        fresh = {name: value for name, value in metrics.items() if step > self.sent_before.get(name, -1)}
        self.last_steps |= dict.fromkeys(fresh, step)
        return fresh

    def save(self) -> None:
        """Writes the file in one step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"run_id": self.run_id, "last_steps": self.last_steps})


class Tracked(Logger):
    """Base of the trackers, which are told their run before anything is logged, and send each step once."""

    notes: TrackerNotes | None = None
    config: dict[str, Any]

    @abstractmethod
    def use_run(self, run_dir: Path, config: dict[str, Any]) -> None:
        """Called by the CLI before anything is logged: until then nothing is opened."""

    @abstractmethod
    def send_config(self) -> None:
        """Called before the first metrics of a run: a resumed run leaves its parameters as they were."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert self.notes is not None, "the CLI names the run folder"
        assert step is not None, "Lightning passes the step"
        if fresh := self.notes.unsent(metrics, step):
            if not self.notes.path.exists():
                self.send_config()
            # Lightning's logger is the other base of each class.
            super().log_metrics(dict(fresh), step)
            self.notes.save()


class WandbRun(Tracked, WandbLogger):
    """Logs to Weights & Biases; without a network under `offline: true`, to be sent by `wandb sync --append` later.

    Args:
        project: name of the project.
        name: of the run there; that of the run folder by default.
        offline: writes into the run folder alone.
    """

    def __init__(self, project: str = "causalrn", name: str | None = None, offline: bool = False) -> None:
        self.wandb: Any = optional_module("wandb", "wandb", "the W&B logger")
        self.given = project, name, offline

    def use_run(self, run_dir: Path, config: dict[str, Any]) -> None:
        if self.wandb.run is not None:
            # An earlier training in this process has left it.
            self.wandb.finish()
        project, name, offline = self.given
        self.config = config
        self.notes = TrackerNotes(run_dir / "wandb.json")
        self.notes.run_id = self.notes.run_id or uuid.uuid4().hex[:12]
        WandbLogger.__init__(
            self,
            name=name or run_dir.absolute().name,
            project=project,
            offline=offline,
            save_dir=run_dir,
            id=self.notes.run_id,
            # The process's output belongs to the terminal and the scheduler's log.
            settings=self.wandb.Settings(console="off", silent=True),
        )

    def send_config(self) -> None:
        self.experiment.config.update(self.config)


class MLflowRun(Tracked, MLFlowLogger):
    """Logs to MLflow, by default into the sqlite file mlflow.db beside the run folders.

    Args:
        experiment_name: of the experiment there.
        run_name: that of the run folder by default.
        tracking_uri: a server, or sqlite:///FILE.
    """

    def __init__(
        self, experiment_name: str = "causalrn", run_name: str | None = None, tracking_uri: str | None = None
    ) -> None:
        optional_module("mlflow", "mlflow", "the MLflow logger")
        self.given = experiment_name, run_name, tracking_uri

    def use_run(self, run_dir: Path, config: dict[str, Any]) -> None:
        run_dir = run_dir.absolute()
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        experiment_name, run_name, tracking_uri = self.given
        self.config = config
        self.notes = TrackerNotes(run_dir / "mlflow.json")
        MLFlowLogger.__init__(
            self,
            experiment_name,
            run_name=run_name or run_dir.name,
            tracking_uri=tracking_uri or f"sqlite:///{run_dir.parent / 'mlflow.db'}",
            artifact_location=str(run_dir.parent),
            run_id=self.notes.run_id,
        )

    def send_config(self) -> None:
        assert self.notes is not None
        self.log_hyperparams(self.config)
        self.notes.run_id = self.run_id
