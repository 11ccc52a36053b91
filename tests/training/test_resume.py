"""Continuing a run: in its folder or another one, after it was copied, with other settings, and what is refused."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from causalrn import fit
from causalrn.training.checkpoint import load_network, newest_checkpoint, read_checkpoint, save_network
from causalrn.training.loggers import read_metrics
from causalrn.training.resume import plan_start
from tests.test_fit import CONFIG, error_of

LEARNING_RATE = "--model.init_args.learning_rate"


class Refuses(L.Callback):
    """Finds a mistake once the data are there."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        raise ValueError("a setting of the data")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture
def half(tmp_path: Path, config: Path) -> Path:
    """A run that was ended at half of its steps."""
    fit.main(["--config", str(config), "--run_dir", str(tmp_path / "half"), "--trainer.max_steps", "3"])
    return tmp_path / "half"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last(run_dir: Path) -> dict[str, Any]:
    return read_checkpoint(run_dir / "checkpoints" / "last.ckpt")


def steps(run_dir: Path) -> list[float]:
    return [row["step"] for row in read_metrics(run_dir / "metrics.csv")]


def resolved(run_dir: Path) -> dict[str, Any]:
    return yaml.safe_load((run_dir / "config.yaml").read_text())


def test_only_the_process_that_started_a_rank_names_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    # An earlier run of this process, or one from which the variable came down a longer way, has no say.
    for number, chosen in ((os.getppid(), "first"), (os.getpid(), "given"), ("", "given")):
        monkeypatch.setenv("CAUSALRN_RUN_DIR", f"{number}:runs/first")
        assert plan_start([], "runs/given").run_dir == Path("runs", chosen)


@pytest.mark.slow
def test_a_kept_config_sends_no_later_start_into_the_old_folder(tmp_path: Path, half: Path) -> None:
    fit.main(["--resume", str(half), "--trainer.max_steps", "4"])
    assert resolved(half)["resume"] is None
    # As earlier versions left it.
    (half / "config.yaml").write_text(
        (half / "config.yaml").read_text().replace("resume: null", f"resume: {half}")
    )
    before = contents(half)
    with pytest.warns(UserWarning, match="resume: .*half in a config file is left aside"):
        fit.main(["--config", str(half / "config.yaml"), "--run_dir", str(tmp_path / "two")])
    assert contents(half) == before
    assert steps(tmp_path / "two") == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_resuming_into_another_folder_leaves_the_first_alone(
    tmp_path: Path, config: Path, half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(half)
    whole, new = tmp_path / "whole", tmp_path / "new"
    fit.main(["--config", str(config), "--run_dir", str(whole)])
    command = ["--resume", str(half), "--run_dir", str(new), "--trainer.max_steps"]
    capsys.readouterr()
    fit.main([*command, "6"])
    assert "trainer.max_steps: 3 -> 6" in capsys.readouterr().out
    assert contents(half) == before
    assert steps(new) == [3, 4, 5, 6]
    for name, tensor in last(whole)["state_dict"].items():
        assert torch.equal(tensor, last(new)["state_dict"][name]), name
    # The same command again goes on in its own folder, also where the first one is gone.
    shutil.rmtree(half)
    fit.main([*command, "8"])
    assert steps(new) == [3, 4, 5, 6, 7, 8]
    fit.main(["--resume", str(new), "--trainer.max_steps", "9"])
    assert last(new)["global_step"] == 9


@pytest.mark.slow
def test_a_folder_of_another_run_is_not_continued_into(
    tmp_path: Path, config: Path, half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit.main(["--config", str(config), "--run_dir", str(tmp_path / "other")])
    before = contents(tmp_path / "other")
    capsys.readouterr()
    for flag in ("--resume", "--init_from"):
        args = ["--config", str(config), flag, str(half), "--run_dir", str(tmp_path / "other")]
        assert "holds a run already" in error_of(fit.main, args, capsys)
    assert contents(tmp_path / "other") == before


@pytest.mark.slow
def test_going_back_needs_a_folder_of_its_own(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    fit.main(["--config", str(config), "--run_dir", str(run_dir)])
    first = next(path for path in (run_dir / "checkpoints").glob("*step=3*"))
    command = ["--resume", str(first), "--trainer.max_steps", "7"]
    capsys.readouterr()
    assert "its run has gone on to step 6; want --resume" in error_of(fit.main, command, capsys)
    fit.main([*command, "--run_dir", str(tmp_path / "branch")])
    assert steps(tmp_path / "branch")[0] == 3
    # A scheduler that starts the command again means the run as it is by now.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    fit.main(command)
    assert steps(run_dir) == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.slow
def test_a_checkpoint_resumes_from_anywhere(
    tmp_path: Path,
    config: Path,
    half: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = tmp_path / "elsewhere" / "copy.ckpt"
    copy.parent.mkdir()
    shutil.copy(half / "checkpoints" / "last.ckpt", copy)
    monkeypatch.chdir(tmp_path)
    for number, more in enumerate(([], ["--config", str(config)])):
        fit.main(["--resume", str(copy), "--run_dir", f"run{number}", *more, "--trainer.max_steps", "5"])
        assert steps(tmp_path / f"run{number}") == [3, 4, 5]
    fit.main(["--resume", str(copy), "--config", str(config), "--trainer.max_steps", "4"])
    (named,) = (tmp_path / "runs").glob("*small/*")
    assert steps(named) == [3, 4]
    assert os.listdir(copy.parent) == ["copy.ckpt"]
    weights = tmp_path / "weights.ckpt"
    save_network(load_network(half / "checkpoints" / "last.ckpt"), weights)
    capsys.readouterr()
    for more in ([], ["--config", str(config)]):
        assert "holds weights alone" in error_of(fit.main, ["--resume", str(weights), *more], capsys)


@pytest.mark.slow
def test_the_newest_checkpoint_is_the_one_furthest_on(tmp_path: Path, half: Path) -> None:
    fit.main(["--resume", str(half), "--trainer.max_steps", "6"])
    folder = half / "checkpoints"
    newest = newest_checkpoint(folder)
    assert newest is not None
    # As a copy may leave them.
    for path in folder.glob("*.ckpt"):
        os.utime(path, (1, 1) if path == newest else None)
    assert newest_checkpoint(folder) == newest
    # Of two at one step, that whose validation is done.
    content = read_checkpoint(newest)
    due = folder / "preempted-step=6.ckpt"
    content["preemption"]["validation_is_due"] = True
    torch.save(content, due)
    assert newest_checkpoint(folder) == newest
    content["global_step"] = 7
    torch.save(content, due)
    assert newest_checkpoint(folder) == due
    due.unlink()
    shutil.copytree(half, tmp_path / "copy", symlinks=True)
    before = contents(half)
    fit.main(["--resume", str(tmp_path / "copy"), "--trainer.max_steps", "8"])
    assert steps(tmp_path / "copy") == [*range(9)]
    assert contents(half) == before


def test_new_settings_of_the_optimizer_take_effect(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    settings = {"weight_decay": "0.25", "betas": "[0.5, 0.75]", "warmup_steps": "0", "learning_rate": "0.125"}
    flags = [part for name, value in settings.items() for part in (f"--model.init_args.{name}", value)]
    fit.main(["--resume", str(half), *flags, "--trainer.max_steps", "4"])
    printed = capsys.readouterr().out.splitlines()
    for line in (
        "changed trainer.max_steps: 3 -> 4",
        "changed model.init_args.learning_rate: 0.0005 -> 0.125",
        "changed model.init_args.warmup_steps: 50 -> 0",
        "changed model.init_args.weight_decay: 0.0 -> 0.25",
        "changed model.init_args.betas: [0.9, 0.999] -> [0.5, 0.75]",
    ):
        assert line in printed
    assert len([line for line in printed if line.startswith("changed")]) == 5
    (group,) = last(half)["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["initial_lr"]) == (0.125, 0.125)
    assert (group["weight_decay"], tuple(group["betas"])) == (0.25, (0.5, 0.75))
    assert last(half)["lr_schedulers"][0]["base_lrs"] == [0.125]


@pytest.mark.slow
def test_a_new_learning_rate_holds_from_the_first_step(tmp_path: Path, half: Path) -> None:
    before = last(half)["state_dict"]
    flags = ["--trainer.max_steps", "4", "--run_dir"]
    fit.main(["--resume", str(half), *flags, str(tmp_path / "still"), LEARNING_RATE, "0"])
    for name, tensor in last(tmp_path / "still")["state_dict"].items():
        assert torch.equal(tensor, before[name]), name
    fit.main(["--resume", str(half), *flags, str(tmp_path / "moves")])
    moved = last(tmp_path / "moves")["state_dict"]
    assert any(not torch.equal(moved[name], before[name]) for name in moved)


@pytest.mark.slow
def test_a_new_patience_holds(half: Path) -> None:
    def stopping(patience: int) -> list[str]:
        stop = {"monitor": "val/loss", "patience": patience, "min_delta": 100.0}
        callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stop}
        return ["--resume", str(half), "--trainer.callbacks", json.dumps([callback])]

    for patience, steps_taken in ((5, 6), (1, 9)):
        fit.main([*stopping(patience), "--trainer.max_steps", str(steps_taken + 3 * (patience == 1))])
        (state,) = (
            state for key, state in last(half)["callbacks"].items() if key.startswith("EarlyStopping")
        )
        assert state["patience"] == patience
        assert last(half)["global_step"] == steps_taken


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--seed_everything", "7"], "seed_everything was 1 and is 7.* want --init_from"),
        (["--data.init_args.seed", "7"], "other data .* seed was 0 and is 7; want --init_from"),
        (["--data.init_args.length", "7"], "lengths was .* want --init_from"),
        (["--model.init_args.network.init_args.n_layers", "2"], "n_layers was 1 and is 2"),
        (
            [
                "--data",
                "datamodules.tasks.recall.RecallDataModule",
                "--data.init_args.task",
                "datamodules.tasks.recall.AssociativeRecall",
            ],
            "trained on CopyDataModule, and cannot continue on RecallDataModule; want --init_from",
        ),
        (["--init_from", "x.ckpt"], "--resume and --init_from exclude each other"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_take_effect_is_refused(
    arguments: list[str], wanted: str, half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(half)
    capsys.readouterr()
    args = ["--resume", str(half), *arguments, "--trainer.max_steps", "4"]
    assert re.search(wanted, error_of(fit.main, args, capsys))
    # Its config too: a refused setting must not meet the next start.
    assert contents(half) == before


def test_a_start_that_fails_leaves_the_config_of_the_run(
    half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resolved(half)
    args = ["--resume", str(half), "--trainer.callbacks", "tests.training.test_resume.Refuses"]
    assert "a setting of the data" in error_of(fit.main, [*args, "--trainer.max_steps", "4"], capsys)
    assert resolved(half) == before


@pytest.mark.slow
def test_another_batch_size_and_strategy_take_effect(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    flags = ["--data.init_args.batch_size", "6", "--trainer.max_steps", "5"]
    fit.main(["--resume", str(half), *flags])
    assert "changed data.init_args.batch_size: 4 -> 6" in capsys.readouterr().out
    assert last(half)["CopyDataModule"]["next_index"] == 3 * 4 + 2 * 6
