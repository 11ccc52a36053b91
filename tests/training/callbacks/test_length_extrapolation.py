"""The length-extrapolation callback in real runs: what it logs, leaves and steers, on one process and on two."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from causalrn import fit
from causalrn.evaluation.length_report import read_table
from causalrn.models import LanguageModel, LinearRelation
from causalrn.training.callbacks import LengthExtrapolation
from causalrn.training.checkpoint import read_checkpoint
from causalrn.training.loggers import read_metrics
from causalrn.training.module import LanguageModelModule
from datamodules.tasks.copying import CopyDataModule
from tests import ROOT
from tests.test_fit import CONFIG, error_of


def config_with(path: Path, *callbacks: dict[str, Any], **data: Any) -> Path:
    """The small config of tests/test_fit.py, with callbacks, and other arguments of the data."""
    config = deepcopy(CONFIG)
    config["trainer"]["callbacks"] = list(callbacks)
    config["data"]["init_args"] |= data
    path.write_text(yaml.safe_dump(config))
    return path


def extrapolation(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "causalrn.training.callbacks.LengthExtrapolation", "init_args": arguments}


def monitor(kind: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lightning.pytorch.callbacks.{kind}", "init_args": arguments}


@pytest.mark.slow
def test_a_run_shows_its_results_by_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_with(tmp_path / "a.yaml", extrapolation(factor=4, every_n_steps=3, samples=6), length=4)
    run_dir = tmp_path / "run"
    with pytest.warns(UserWarning, match="does not run at length 16") as warned:
        fit.main(["--config", str(config), "--run_dir", str(run_dir)])
    # Learned positions end after 8 letters; said once, though three evaluations found it.
    (warning,) = [str(warning.message) for warning in warned if "does not run" in str(warning.message)]
    assert "length 16: sequence of 34 positions" in warning
    assert warning.endswith("the longest length is 8")
    table = read_table(run_dir / "length_extrapolation.csv")
    assert [(row["step"], row["length"]) for row in table] == [("3", "4"), ("3", "8"), ("6", "4"), ("6", "8")]
    assert (run_dir / "length_extrapolation.png").read_bytes()[:4] == b"\x89PNG"
    results = json.loads((run_dir / "results.json").read_text())["metrics"]
    for row in table[2:]:
        for name in ("exact_match", "character_accuracy", "loss", "first_error"):
            assert results[f"val/{name}/length_{row['length']}"] == pytest.approx(float(row[name]))
    logged = read_metrics(run_dir / "metrics.csv")
    # Lightning counts the steps of a validation within training from 0.
    assert [row["step"] for row in logged if "val/loss/length_8" in row] == [2, 5, 6]
    assert "length 8" in capsys.readouterr().out
    # A run that continues keeps the rows before it.
    with pytest.warns(UserWarning, match="does not run"):
        fit.main(["--resume", str(run_dir), "--trainer.max_steps", "9"])
    steps = [row["step"] for row in read_table(run_dir / "length_extrapolation.csv")]
    assert steps == ["3", "3", "6", "6", "9", "9"]


@pytest.mark.slow
def test_a_length_stops_the_run_and_chooses_the_checkpoint(tmp_path: Path) -> None:
    name = "val/loss/length_4"
    # Nothing improves by 100 nats, so the second look ends the run.
    config = config_with(
        tmp_path / "a.yaml",
        extrapolation(lengths=[2, 4], every_n_steps=1, samples=4),
        monitor("EarlyStopping", monitor=name, patience=1, min_delta=100.0),
        monitor("ModelCheckpoint", monitor=name, mode="max", save_top_k=1, filename="best-{step}"),
    )
    fit.main(
        ["--config", str(config), "--run_dir", str(tmp_path / "run"), "--trainer.val_check_interval", "2"]
    )
    table = [row for row in read_table(tmp_path / "run" / "length_extrapolation.csv") if row["length"] == "4"]
    assert [row["step"] for row in table] == ["2", "4"]
    worst = max(table, key=lambda row: float(row["loss"]))
    (path,) = (tmp_path / "run" / "checkpoints").glob("best-*.ckpt")
    assert read_checkpoint(path)["global_step"] == int(worst["step"])


@pytest.mark.slow
def test_lengths_that_the_data_validates_on_are_logged_once(tmp_path: Path) -> None:
    config = config_with(
        tmp_path / "a.yaml", extrapolation(lengths=[2, 4, 8], every_n_steps=3, samples=3), val_lengths=[4, 8]
    )
    fit.main(["--config", str(config), "--run_dir", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    for length in (2, 4, 8):
        assert f"val/exact_match/length_{length}" in results
        assert f"val/first_error/length_{length}" in results
    table = {row["length"]: row for row in read_table(tmp_path / "run" / "length_extrapolation.csv")}
    # Ten strings validate, three are measured at each length.
    assert results["val/loss/length_8"] != pytest.approx(float(table["8"]["loss"]), rel=1e-6)
    assert results["val/loss/length_2"] == pytest.approx(float(table["2"]["loss"]))


# What causalrn.cli.quiet_libraries is silent about.
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec", "ignore:.*does not have many workers")
def test_every_run_ends_with_its_results_by_length(tmp_path: Path) -> None:
    # The Trainer alone, without the validation that closes a run of causalrn.fit.
    callback = LengthExtrapolation(factor=2, samples=4)
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=tmp_path / "run",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    module = LanguageModelModule(
        LanguageModel(LinearRelation(8, 8), vocab_size=29, n_layers=1, max_length=40)
    )
    data = CopyDataModule(length=8, batch_size=4, batches_per_epoch=2)
    trainer.fit(module, data)
    assert [row["length"] for row in read_table(tmp_path / "run" / "length_extrapolation.csv")] == ["8", "16"]
    found = callback.results
    assert callback.measure(trainer, module) is found
    with torch.no_grad():
        module.network.head.weight.zero_()
    changed = callback.measure(trainer, module)
    assert changed.metrics()["val/loss/length_8"] == pytest.approx(torch.tensor(29.0).log().item())


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"factor": 0}, "factor must be at least 1: got 0"),
        ({"lengths": []}, "lengths must be at least one length"),
        ({"lengths": [0, 4]}, r"got [0, 4]"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1: got 0"),
        ({"samples": 0}, "samples must be at least 1: got 0"),
        ({"max_seconds": 0.0}, "max_seconds must be above 0: got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_get_one_line(
    arguments: dict[str, Any], wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_with(tmp_path / "a.yaml", extrapolation(**arguments))
    assert wanted in error_of(fit.main, ["--config", str(config), "--run_dir", str(tmp_path / "run")], capsys)


def test_data_without_lengths_is_refused() -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[LengthExtrapolation()])
    with pytest.raises(ValueError, match="samples of any length: got NoneType"):
        LengthExtrapolation().setup(trainer, LanguageModelModule(torch.nn.Identity()), "fit")  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_two_processes_climb_as_one(tmp_path: Path) -> None:
    tables = {}
    # Five strings are uneven on two ranks, and batches of 40 tokens leave one rank without a string at times.
    config = config_with(
        tmp_path / "a.yaml", extrapolation(lengths=[2, 8], every_n_steps=3, samples=5, tokens_per_batch=40)
    )
    for name, overlay in (("one", "cpu"), ("two", "ddp")):
        command = [sys.executable, "-m", "causalrn.fit", "--config", str(config)]
        command += ["--config", f"configs/trainer/{overlay}.yaml", "--run_dir", str(tmp_path / name)]
        done = subprocess.run(
            [*command, *(["--trainer.devices", "2"] if name == "two" else [])],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        rows = read_table(tmp_path / name / "length_extrapolation.csv")
        tables[name] = [[float(value or -1) for value in row.values()] for row in rows]
        results = json.loads((tmp_path / name / "results.json").read_text())["metrics"]
        assert results["val/exact_match/length_8"] == tables[name][-1][list(rows[-1]).index("exact_match")]
    assert len(tables["one"]) == 4
    for one, two in zip(tables["one"], tables["two"], strict=True):
        # Sums of other order: float32 noise of a few steps.
        assert two == pytest.approx(one, rel=1e-3)
