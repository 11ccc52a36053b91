"""A run resumed at, before and after the end of an epoch counts epochs, steps and batches as the undisturbed one."""

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import yaml

from causalrn import fit
from causalrn.training.loggers import read_metrics
from tests.test_fit import CONFIG

Event = tuple[str, int, int]
# Epochs of 4 batches. Validation: at each epoch's end by its batches; within epochs; by epochs; never.
VALIDATION: dict[str, dict[str, Any]] = {
    "at the end": {"check_val_every_n_epoch": None, "val_check_interval": 4},
    "within": {"check_val_every_n_epoch": None, "val_check_interval": 3},
    "by epoch": {"check_val_every_n_epoch": 1, "val_check_interval": 1.0},
    "never": {"check_val_every_n_epoch": 1, "val_check_interval": 1.0, "limit_val_batches": 0},
}
EVERY = {"class_path": "causalrn.training.callbacks.Checkpoints", "init_args": {"save_top_k": -1}}
EVERY_STEP = {**EVERY, "init_args": {"save_top_k": -1, "every_n_train_steps": 1}}


class Watch(L.Callback):
    """Remembers the epoch and the step of every hook of training."""

    events: ClassVar[list[Event]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.events.append(("start", trainer.current_epoch, trainer.global_step))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.events.append((f"batch {batch_idx}", trainer.current_epoch, trainer.global_step))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.events.append(("end", trainer.current_epoch, trainer.global_step))


def write(path: Path, callback: dict[str, Any], **trainer: Any) -> Path:
    settings = {
        **CONFIG["trainer"],
        "limit_train_batches": 4,
        "limit_val_batches": 1,
        "callbacks": [{"class_path": "tests.training.callbacks.test_resumed_loops.Watch"}, callback],
        **trainer,
    }
    path.write_text(yaml.safe_dump({**CONFIG, "trainer": settings}))
    return path


def train(*arguments: str) -> list[Event]:
    Watch.events.clear()
    fit.main(list(arguments))
    return list(Watch.events)


def rows(run_dir: Path) -> list[tuple[float | None, ...]]:
    names = ("step", "epoch", "train/loss", "val/loss")
    return [tuple(row.get(name) for name in names) for row in read_metrics(run_dir / "metrics.csv")]


def batches(events: list[Event], since: int = 0) -> list[Event]:
    return [event for event in events if event[0].startswith("batch") and event[2] >= since]


@pytest.mark.slow
@pytest.mark.parametrize("validation", VALIDATION)
@pytest.mark.parametrize("stop", [4, 5])
def test_a_longer_max_steps_goes_on(tmp_path: Path, validation: str, stop: int) -> None:
    config = str(write(tmp_path / "a.yaml", EVERY, max_steps=9, **VALIDATION[validation]))
    events = train("--config", config, "--run_dir", str(tmp_path / "whole"))
    run_dir = tmp_path / "run"
    train("--config", config, "--run_dir", str(run_dir), "--trainer.max_steps", str(stop))
    resumed = train("--resume", str(run_dir), "--trainer.max_steps", "9")
    assert rows(run_dir) == rows(tmp_path / "whole")
    assert batches(resumed) == batches(events, since=stop)
    # An epoch that only max_steps had cut short is not begun again.
    assert [event for event in resumed if event[0] == "start"] == [
        event for event in events if event[0] == "start" and event[2] >= stop
    ]


# The copy of a run folder is another folder.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.slow
@pytest.mark.parametrize("callback", [EVERY, EVERY_STEP], ids=["every validation", "every step"])
@pytest.mark.parametrize("validation", ["at the end", "by epoch", "never"])
@pytest.mark.parametrize(
    "length", [{"max_steps": 9}, {"max_steps": -1, "max_epochs": 2}], ids=["steps", "epochs"]
)
def test_any_checkpoint_of_an_epochs_end_goes_on(
    tmp_path: Path, validation: str, length: dict[str, int], callback: dict[str, Any]
) -> None:
    config = str(write(tmp_path / "a.yaml", callback, **{**VALIDATION[validation], **length}))
    whole = tmp_path / "whole"
    events = train("--config", config, "--run_dir", str(whole))
    for step in (4, 8):
        run_dir = tmp_path / f"from {step}"
        shutil.copytree(whole, run_dir, symlinks=True)
        # As after a kill: what came later is lost.
        for path in (run_dir / "checkpoints").glob("*.ckpt"):
            if not path.name.endswith(f"step={step}.ckpt"):
                path.unlink()
        resumed = train("--resume", str(run_dir))
        assert rows(run_dir) == rows(whole), step
        assert batches(resumed) == batches(events, since=step), step
        ends = [event for event in events if event[0] == "end"]
        assert [event for event in resumed if event[0] == "end"][-1:] in ([ends[-1]], []), step


@pytest.mark.slow
def test_resuming_a_finished_run_leaves_its_rows(tmp_path: Path) -> None:
    config = str(
        write(tmp_path / "a.yaml", EVERY, max_steps=5, check_val_every_n_epoch=None, val_check_interval=5)
    )
    train("--config", config, "--run_dir", str(tmp_path / "run"))
    before = rows(tmp_path / "run")
    assert train("--resume", str(tmp_path / "run")) == []
    assert rows(tmp_path / "run") == before
    assert json.loads((tmp_path / "run" / "results.json").read_text())["step"] == 5
