"""A bad loss stops the run with a dump of the step, or the step is left out and counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from causalrn import fit
from causalrn.training.checkpoint import load_network, read_checkpoint
from causalrn.training.loggers import read_metrics
from tests.faults import FAULT, write_config
from tests.test_fit import error_of


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.yaml", strategy="auto", devices=1)


def fit_in(run_dir: Path, config: Path, *arguments: str) -> None:
    fit.main(["--config", str(config), "--run_dir", str(run_dir), *arguments])


@pytest.fixture
def nan_at_step_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULT, '{"kind": "nan", "rank": 0, "step": 5}')


def with_policy(config: Path, **settings: Any) -> Path:
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks"].append(
        {"class_path": "causalrn.training.callbacks.FiniteLoss", "init_args": settings}
    )
    config.write_text(yaml.safe_dump(content))
    return config


@pytest.mark.usefixtures("nan_at_step_5")
def test_a_bad_loss_stops_with_a_dump(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(config), "--run_dir", str(tmp_path / "run")]
    line = error_of(fit.main, arguments, capsys)
    dump = tmp_path / "run" / "bad_step-5-rank-0.pt"
    assert "training loss is nan at step 5; want a finite one" in line
    assert str(dump) in line
    content = torch.load(dump, weights_only=True)
    assert len(content["batches"]) == 2
    assert torch.tensor(list(content["gradient_norms"].values())).isnan().any()
    network = load_network(dump)
    assert network(content["batches"][0]["tokens"]).isnan().any()


@pytest.mark.slow
def test_a_bad_step_is_left_out_and_counted(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"policy": "skip", "max_skipped": 2, "max_loss": 100.0}
    with_policy(config, **settings)
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks"][-1]["class_path"] = "tests.faults.Spiky"
    config.write_text(yaml.safe_dump(content))
    fit_in(tmp_path / "run", config)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    skipped = [row["train/skipped_steps"] for row in rows if "train/skipped_steps" in row]
    assert skipped == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    optimizer = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["optimizer_states"][0]
    assert {float(state["step"]) for state in optimizer["state"].values()} == {10.0}
    capsys.readouterr()
    content["trainer"]["callbacks"][-1]["init_args"]["max_skipped"] = 1
    config.write_text(yaml.safe_dump(content))
    line = error_of(fit.main, ["--config", str(config), "--run_dir", str(tmp_path / "stops")], capsys)
    assert "loss is 1000.0 at step 6 after 1 steps were left out; want one of at most 100" in line
