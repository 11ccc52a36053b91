"""Callbacks and loggers that a config brings: they work beside those that every run has, and take nothing away."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar

from causalrn import fit
from causalrn.training.checkpoint import newest_checkpoint, read_checkpoint
from causalrn.training.loggers import read_metrics
from tests.test_fit import CONFIG
from tests.training.test_preemption import assert_same

LIGHTNING = "lightning.pytorch.callbacks"
# Worse at every validation, so that the best is the first.
BEST = {"monitor": "val/worse", "mode": "min"}


class Worsening(L.Callback):
    """Logs a metric whose best value is that of the first validation."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("val/worse", float(trainer.global_step))


class FailAt7(L.Callback):
    """Ends the run after seven steps."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 7:
            raise ValueError("seven steps are enough")


def write(path: Path, *callbacks: dict[str, Any], **trainer: Any) -> Path:
    """A run of 10 steps with validations after steps 2, 4, 6, 8, 10."""
    own = [{"class_path": "tests.training.callbacks.test_checkpoints.Worsening"}, *callbacks]
    settings = {**CONFIG["trainer"], "max_steps": 10, "val_check_interval": 2, "callbacks": own, **trainer}
    path.write_text(yaml.safe_dump({**CONFIG, "trainer": settings}))
    return path


def own(**settings: Any) -> dict[str, Any]:
    return {"class_path": f"{LIGHTNING}.ModelCheckpoint", "init_args": {**BEST, **settings}}


def train(config: Path, run_dir: Path) -> Path:
    fit.main(["--config", str(config), "--run_dir", str(run_dir)])
    return run_dir / "checkpoints"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.is_symlink())


@pytest.mark.slow
@pytest.mark.parametrize("save_last", [None, True, "link"])
def test_the_best_is_kept_beside_the_newest(tmp_path: Path, save_last: Any) -> None:
    folder = train(write(tmp_path / "a.yaml", own(save_last=save_last)), tmp_path / "run")
    # CopyDataModule's epochs are long: all of this is epoch 0.
    best = "val_worse-epoch=0-step=2.ckpt"
    assert files(folder) == ["epoch=0-step=10.ckpt", "epoch=0-step=8.ckpt", best]
    assert (folder / "last.ckpt").is_symlink()
    assert (folder / "last.ckpt").resolve().name == "epoch=0-step=10.ckpt"
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 10
    assert read_checkpoint(folder / best)["global_step"] == 2


@pytest.mark.slow
def test_a_file_that_both_name_alike_is_removed_by_neither(tmp_path: Path) -> None:
    config = write(tmp_path / "a.yaml", own(filename="{epoch}-{step}"))
    folder = train(config, tmp_path / "run")
    assert files(folder) == ["epoch=0-step=10.ckpt", "epoch=0-step=2.ckpt", "epoch=0-step=8.ckpt"]
    # The other way round: what it gives up, `Checkpoints` still keeps.
    newest = own(filename="{epoch}-{step}", mode="max")
    assert files(train(write(tmp_path / "b.yaml", newest), tmp_path / "other")) == [
        "epoch=0-step=10.ckpt",
        "epoch=0-step=8.ckpt",
    ]


def steps_in(folder: Path) -> list[int]:
    return sorted(read_checkpoint(folder / name)["global_step"] for name in files(folder))


@pytest.mark.slow
def test_the_last_step_is_saved_and_counted_whatever_the_interval(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    every = ["--checkpoints.every_n_train_steps", "4"]
    fit.main(["--config", str(write(tmp_path / "a.yaml")), "--run_dir", str(run_dir), *every])
    assert steps_in(run_dir / "checkpoints") == [8, 10]
    fit.main(["--resume", str(run_dir), "--trainer.max_steps", "14"])
    # Lightning never removes the file that a run was resumed from.
    assert steps_in(run_dir / "checkpoints") == [10, 12, 14]


@pytest.mark.slow
def test_both_resume(tmp_path: Path) -> None:
    callback = own(save_top_k=2)
    whole = train(write(tmp_path / "whole.yaml", callback), tmp_path / "whole")
    fails = {"class_path": "tests.training.callbacks.test_checkpoints.FailAt7"}
    config = write(tmp_path / "fails.yaml", callback, fails)
    with pytest.raises(ValueError, match="seven steps"):
        train(config, tmp_path / "run")
    (tmp_path / "callbacks.yaml").write_text(
        yaml.safe_dump(
            {"trainer": {"callbacks": yaml.safe_load(config.read_text())["trainer"]["callbacks"][:2]}}
        )
    )
    fit.main(["--resume", str(tmp_path / "run"), "--config", str(tmp_path / "callbacks.yaml")])
    folder = tmp_path / "run" / "checkpoints"
    # Lightning never removes the file that a run was resumed from.
    assert set(files(folder)) == {*files(whole), "epoch=0-step=6.ckpt"}
    assert "val_worse-epoch=0-step=4.ckpt" in files(folder)
    states = [read_checkpoint(path / "last.ckpt")["state_dict"] for path in (whole, folder)]
    assert_same(states[0], states[1], "state_dict")


def test_a_folder_of_its_own_and_weights_alone(tmp_path: Path) -> None:
    alone = {"dirpath": str(tmp_path / "best"), "save_last": True}
    config = write(
        tmp_path / "a.yaml", own(**alone), own(mode="max", save_weights_only=True, filename="light")
    )
    folder = train(config, tmp_path / "run")
    assert files(tmp_path / "best") == ["val_worse-epoch=0-step=2.ckpt"]
    assert (tmp_path / "best" / "last.ckpt").resolve().name == "val_worse-epoch=0-step=2.ckpt"
    # No run can go on from weights alone, however new they are.
    assert (folder / "last.ckpt").resolve().name == "epoch=0-step=10.ckpt"
    light = next(path for path in folder.glob("light*.ckpt"))
    light.touch()
    with pytest.warns(UserWarning, match=f"{light.name} is passed over: .* holds weights alone"):
        newest = newest_checkpoint(folder)
    assert newest == folder / "epoch=0-step=10.ckpt"


def test_only_checkpoints_replaces_checkpoints(tmp_path: Path) -> None:
    mine = {"class_path": "causalrn.training.callbacks.Checkpoints", "init_args": {"save_top_k": 1}}
    assert files(train(write(tmp_path / "a.yaml", mine), tmp_path / "run")) == ["epoch=0-step=10.ckpt"]


@pytest.mark.slow
def test_a_progress_bar_a_monitor_and_a_logger_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(
        tmp_path / "a.yaml",
        {"class_path": f"{LIGHTNING}.TQDMProgressBar"},
        {"class_path": f"{LIGHTNING}.LearningRateMonitor", "init_args": {"logging_interval": "step"}},
        logger={
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(tmp_path / "csv")},
        },
    )
    with fit.CLI(["--config", str(config), "--run_dir", str(tmp_path / "built")]).open() as cli:
        assert type(cli.trainer.progress_bar_callback) is TQDMProgressBar
    train(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows] == [*range(10), 10]
    assert all("train/loss" in row for row in rows[:10])
    assert any(name.startswith("lr-") for name in rows[5])
    assert list((tmp_path / "csv").rglob("metrics.csv"))


def test_no_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(write(tmp_path / "a.yaml", enable_progress_bar=False), tmp_path / "run")
    assert "steps/s" not in capsys.readouterr().out
