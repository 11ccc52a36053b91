"""The folder of a run: one process holds it, and it keeps where the run came from, its config, and its curves."""

import datetime
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist

from causalrn.system import Lock, environment, new_figure, write_json
from causalrn.training.data_folders import STARTED_IN
from causalrn.training.history import NAME, PROGRESS, earlier_starts
from causalrn.training.loggers import read_metrics

# A start that is killed may lose the count of this many seconds, unless it has written a checkpoint meanwhile.
EVERY_SECONDS = 30.0


class RunFolder(L.Callback):
    """Keeps the resolved config in every checkpoint, and environment.json.

    That file holds the environment of the newest start, and under `starts` that of each, with when it began, from which
    step to which it came, and for how long. It is written at checkpoints too, so that the seconds of a start that is
    killed are known up to there.

    Args:
        run_dir: the run's folder.
        config: the resolved config as plain data.
        begins_with: what this rank starts from, the same on every rank.
        began_seconds: when this start began, by time.monotonic().
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], begins_with: str, began_seconds: float) -> None:
        self.run_dir = run_dir
        self.config = config
        self.begins_with = begins_with
        self.began_seconds = began_seconds
        self.written_seconds = 0.0
        self.started_in = str(Path.cwd())
        # Only the first rank begins a start and writes.
        self.starts: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_agreement(self.run_dir, self.begins_with)
        if trainer.is_global_zero:
            self.begin({**environment(), "world_size": trainer.world_size})
            parameters = sum(parameter.numel() for parameter in pl_module.parameters())
            print(f"{parameters:,} parameters; run folder {self.run_dir}", flush=True)

    def begin(self, environment: dict[str, Any]) -> None:
        """Adds this start after those that the folder knows."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        progress = {"when": now, "from_step": 0, "step": 0, "seconds": 0.0}
        self.starts = [*earlier_starts(self.run_dir), {**progress, **environment}]
        self.update(0)

    def update(self, step: int) -> None:
        """Notes where this start is, and writes the file in one step."""
        if not self.starts:
            return
        self.written_seconds = time.monotonic()
        seconds = round(self.written_seconds - self.began_seconds, 1)
        self.starts[-1] |= {"step": step, "seconds": seconds}
        newest = {name: value for name, value in self.starts[-1].items() if name not in PROGRESS}
        write_json(self.run_dir / NAME, {**newest, "starts": self.starts})

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.starts:
            step = checkpoint["global_step"]
            self.starts[-1] |= {"from_step": step, "step": step}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.written_seconds >= EVERY_SECONDS:
            self.update(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.update(trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The closing validation is a part of the run.
        if trainer.state.fn == "validate":
            self.update(trainer.global_step)

    def on_exception(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.update(trainer.global_step)

    def on_save_checkpoint(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.update(trainer.global_step)

    def checkpoint_content(self, weights_only: bool) -> dict[str, Any]:
        return {"config": self.config, STARTED_IN: self.started_in}


def check_agreement(run_dir: Path, begins_with: str) -> None:
    """Every rank looks for the checkpoint itself: those that find another one would wait for each other for ever.

    Raises:
        ValueError: on every rank, naming one that does not begin as the first.
    """
    if not dist.is_initialized():
        return
    starts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(starts, (begins_with, platform.node()))
    first, node = starts[0]
    for rank, (start, other_node) in enumerate(starts):
        if start != first:
            raise ValueError(
                f"rank {rank} (on {other_node}) begins with {start} and rank 0 (on {node}) with {first}: want "
                f"--run_dir to name one folder that all of them share, which {run_dir} is not"
            )


def draw_curves(run_dir: Path) -> Path:
    """Draws every logged loss and accuracy over steps into curves.png."""
    rows = read_metrics(run_dir / "metrics.csv")
    names = sorted({name for row in rows for name in row if name.startswith(("train/", "val/"))})
    panels = {
        "loss (nats per token)": [name for name in names if name.split("/")[1] == "loss"],
        "validation": [name for name in names if name.startswith("val/") and name.split("/")[1] != "loss"],
    }
    figure = new_figure(11, 4)
    axes = figure.subplots(1, len(panels))
    for axis, (label, panel) in zip(axes, panels.items(), strict=True):
        for name in panel:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), label=name, marker="." if name.startswith("val/") else "")
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        if panel:
            axis.legend(fontsize="small")
    figure.suptitle(run_dir.name)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=150)
    return path


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Keeps other processes out of a run folder, which is made where it is missing.

    Raises:
        ValueError: another process holds it, or the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = Lock(run_lock(run_dir), f"run folder {run_dir}")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"run folder {run_dir} cannot be written ({reason}); want another --run_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()
        # A run that failed before it left anything leaves no folder either.
        with suppress(OSError):
            run_dir.rmdir()


def run_lock(run_dir: Path) -> Path:
    """The lock file of a run folder."""
    return run_dir / ".lock"
