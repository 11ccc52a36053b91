"""Every flag of the Trainer, at an ordinary value and an odd one: it works, or it is refused in one line that names it."""

import inspect
import json
import re
from pathlib import Path

import lightning as L
import pytest
import yaml

from causalrn import fit
from causalrn.training.loggers import read_metrics
from causalrn.training.trainer_settings import RANGES
from launch.__main__ import main as launch
from tests.test_fit import CONFIG, error_of

EARLY_STOPPING = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping --trainer.callbacks.monitor="
WORKS = [
    "--trainer.accelerator cpu",
    "--trainer.strategy single_device",
    "--trainer.strategy ddp --trainer.devices 1",
    "--trainer.devices 1",
    "--trainer.num_nodes 1",
    "--trainer.precision bf16-mixed",
    "--trainer.precision bf16-true",
    "--trainer.precision 64-true",
    "--trainer.logger true",
    "--trainer.logger lightning.pytorch.loggers.CSVLogger --trainer.logger.save_dir extra",
    f"{EARLY_STOPPING}val/loss",
    f"{EARLY_STOPPING}val/loss/length_4 --data.init_args.val_lengths [4,8]",
    f"{EARLY_STOPPING}train/loss --trainer.callbacks.check_on_train_epoch_end=false",
    "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor",
    "--trainer.max_steps -1 --trainer.max_epochs 1 --data.init_args.batches_per_epoch 4",
    "--trainer.min_epochs 1",
    "--trainer.min_steps 2",
    "--trainer.max_time 00:01:00:00",
    "--trainer.limit_train_batches 2",
    "--trainer.limit_val_batches 1",
    "--trainer.limit_test_batches 1",
    "--trainer.limit_predict_batches 1",
    "--trainer.val_check_interval 2",
    "--trainer.val_check_interval 0.5 --trainer.check_val_every_n_epoch 1 --data.init_args.batches_per_epoch 4",
    "--trainer.val_check_interval 00:00:10:00",
    "--trainer.check_val_every_n_epoch 2 --trainer.val_check_interval 1.0 --data.init_args.batches_per_epoch 2",
    "--trainer.num_sanity_val_steps 1",
    "--trainer.num_sanity_val_steps -1",
    "--trainer.log_every_n_steps 2",
    "--trainer.enable_model_summary true",
    "--trainer.accumulate_grad_batches 2",
    "--trainer.gradient_clip_val null",
    "--trainer.gradient_clip_val 0",
    "--trainer.gradient_clip_val .inf",
    "--trainer.gradient_clip_algorithm norm",
    "--trainer.deterministic warn",
    "--trainer.benchmark true",
    "--trainer.inference_mode false",
    "--trainer.use_distributed_sampler false",
    "--trainer.detect_anomaly true",
    "--trainer.plugins lightning.pytorch.plugins.environments.LightningEnvironment",
    "--trainer.sync_batchnorm true",
    "--trainer.reload_dataloaders_every_n_epochs 1 --data.init_args.batches_per_epoch 2",
    "--trainer.enable_autolog_hparams false",
    "--trainer.model_registry someone/something",
]
REFUSED = {
    "--trainer.accelerator nonsense": "accelerator='nonsense'",
    "--trainer.strategy nonsense": "strategy='nonsense'",
    "--trainer.strategy ddp_spawn": "by spawn .* want trainer.strategy ddp",
    "--trainer.strategy ddp_notebook": "by fork .* want trainer.strategy ddp",
    "--trainer.strategy lightning.pytorch.strategies.DDPStrategy --trainer.strategy.start_method forkserver": "by forkserver",
    "--trainer.devices 0": "devices",
    "--trainer.devices two": "devices",
    "--trainer.num_nodes 0": "trainer.num_nodes must be at least 1: got 0",
    "--trainer.precision 16-mixed": "precision 16-mixed is too narrow",
    "--trainer.precision 16": "precision 16 is too narrow",
    "--trainer.precision transformer-engine": "precision transformer-engine is not offered",
    "--trainer.precision 8": "trainer.precision: got 8",
    "--trainer.logger nonsense": "trainer.logger: got nonsense",
    "--trainer.callbacks nonsense": "trainer.callbacks: got nonsense",
    "--trainer.callbacks+=lightning.pytorch.callbacks.BatchSizeFinder": "BatchSizeFinder .* data.init_args.batch_size",
    f"{EARLY_STOPPING}val/nonsense": "EarlyStopping: nothing logs its monitor val/nonsense: want one of val/loss",
    f"{EARLY_STOPPING}val_loss": "nothing logs its monitor val_loss",
    f"{EARLY_STOPPING}val/loss --data.init_args.val_lengths [4,8]": "monitor val/loss: want one of val/loss/length_4, ",
    "--trainer.plugins lightning.pytorch.plugins.HalfPrecision --trainer.plugins.precision 16-true": "16-true is too narrow",
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint --trainer.callbacks.monitor=loss": "ModelCheckpoint: .*loss",
    "--trainer.fast_dev_run -1": "fast_dev_run=-1",
    "--trainer.max_epochs -2": "trainer.max_epochs must be at least -1: got -2",
    "--trainer.min_epochs -1": "trainer.min_epochs must be at least 0: got -1",
    "--trainer.max_steps -2": "trainer.max_steps must be at least -1: got -2",
    "--trainer.min_steps -1": "trainer.min_steps must be at least 0: got -1",
    "--trainer.max_time soon": "duration='soon'",
    "--trainer.limit_train_batches -1": "trainer.limit_train_batches must be at least 0: got -1",
    "--trainer.limit_train_batches 1.5": "1.5 for limit_train_batches",
    "--trainer.limit_val_batches -1": "trainer.limit_val_batches must be at least 0: got -1",
    "--trainer.limit_test_batches -1": "-1 for limit_test_batches",
    "--trainer.limit_predict_batches -1": "-1 for limit_predict_batches",
    "--trainer.overfit_batches 1": "overfit_batches is 1: training reads an endless stream",
    "--trainer.val_check_interval 0": "trainer.val_check_interval must be above 0: got 0",
    "--trainer.val_check_interval -1": "trainer.val_check_interval must be above 0: got -1",
    "--trainer.val_check_interval 0.5": "val_check_interval.*should be an integer",
    "--trainer.val_check_interval soon": "val_check_interval.*'soon'",
    "--trainer.check_val_every_n_epoch 0": "trainer.check_val_every_n_epoch must be at least 1: got 0",
    "--trainer.num_sanity_val_steps -2": "trainer.num_sanity_val_steps must be at least -1: got -2",
    "--trainer.log_every_n_steps -1": "trainer.log_every_n_steps must be at least 0: got -1",
    "--trainer.accumulate_grad_batches 0": "trainer.accumulate_grad_batches must be at least 1: got 0",
    "--trainer.gradient_clip_val -1": "trainer.gradient_clip_val must be at least 0: got -1",
    "--trainer.gradient_clip_val .nan": "trainer.gradient_clip_val must be at least 0: got nan",
    "--trainer.gradient_clip_algorithm value": "every strategy clips by norm",
    "--trainer.gradient_clip_algorithm nonsense": "gradient_clip_algorithm.*nonsense",
    "--trainer.deterministic nonsense": "trainer.deterministic: got nonsense",
    "--trainer.benchmark nonsense": "trainer.benchmark: got nonsense",
    "--trainer.profiler nonsense": "profiler",
    "--trainer.barebones true": "trainer.barebones true is not offered",
    "--trainer.plugins lightning.pytorch.plugins.io.AsyncCheckpointIO": "trainer.plugins AsyncCheckpointIO is not offered",
    "--trainer.reload_dataloaders_every_n_epochs -1": "reload_dataloaders_every_n_epochs must be at least 0: got -1",
    "--trainer.enable_checkpointing maybe": "trainer.enable_checkpointing: got maybe",
    "--trainer.nonsense 1": "--trainer.nonsense",
}
# Tested one by one below.
APART = {
    "default_root_dir",
    "enable_checkpointing",
    "enable_progress_bar",
    "fast_dev_run",
    "profiler",
    "barebones",
}
pytestmark = [
    pytest.mark.slow,
    # Lightning's: of its own anomaly detection, of values that the flags above ask for, and of a dataloader that ends early.
    pytest.mark.filterwarnings(
        "ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
    ),
]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a small run in its folder `run`."""
    monkeypatch.chdir(tmp_path)
    content = {**CONFIG, "trainer": {**CONFIG["trainer"], "max_steps": 4, "val_check_interval": 2}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    return ["--config", "small.yaml", "--run_dir", "run"]


def test_every_flag_is_here() -> None:
    flags = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    tried = {
        word.removeprefix("--trainer.").partition("+")[0]
        for flags in (*WORKS, *REFUSED)
        for word in flags.split()
    }
    assert flags <= tried | APART
    assert set(RANGES) <= flags


@pytest.mark.parametrize("flags", WORKS)
def test_what_works(flags: str, arguments: list[str]) -> None:
    fit.main([*arguments, *flags.split()])
    assert json.loads(Path("run/results.json").read_text())["step"] == 4
    assert Path("run/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("flags", REFUSED)
def test_what_is_refused(flags: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(fit.main, [*arguments, *flags.split()], capsys)
    assert re.search(REFUSED[flags], line), line
    assert not list(Path("run").glob("checkpoints/*"))


@pytest.mark.parametrize("batches", ["true", "2"])
def test_fast_dev_run_trains_and_leaves_no_run_behind(batches: str, arguments: list[str]) -> None:
    fit.main([*arguments, "--trainer.fast_dev_run", batches, "--trainer.accumulate_grad_batches", "2"])
    results = json.loads(Path("run/results.json").read_text())
    assert results["step"] == 1
    assert "val/loss" in results["metrics"]
    assert not Path("run/checkpoints").exists()


def test_what_is_turned_off_is_off(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fit.main(
        [*arguments, "--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false"]
    )
    assert not Path("run/checkpoints").exists()
    assert "step 4/4" not in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(Path("run/metrics.csv"))] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["simple", "advanced"])
def test_a_profile_is_in_the_run_folder(name: str, arguments: list[str]) -> None:
    fit.main([*arguments, "--trainer.profiler", name])
    assert "optimizer_step" in Path("run/fit-profile.txt").read_text()


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [("default_root_dir elsewhere", "want --run_dir"), ("logger false", "always has its metrics")],
)
def test_what_has_no_effect_is_said(
    flag: str, wanted: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fit.main([*arguments, *f"--trainer.{flag}".split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: trainer.")
    assert wanted in line
    assert read_metrics(Path("run/metrics.csv"))
    assert not Path("elsewhere").exists()


def test_a_job_is_not_queued_with_a_wrong_value(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, wanted in (
        (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val must be at least 0: got -1"),
        (
            ["--model.init_args.network.init_args.n_layers", "0"],
            "LanguageModel: n_layers must be at least 1: got 0",
        ),
        (["--data.init_args.val_samples", "0"], "CopyDataModule: val_samples must be at least 1: got 0"),
    ):
        line = error_of(launch, ["--dry-run", "--", *arguments, *flags], capsys)
        assert line == f"error: {wanted}"
