"""The same command on two processes: one run folder, and the losses of one process on the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from causalrn.training.loggers import read_metrics
from tests import ROOT

LINEAR = ["--config", "configs/mixer/linear_relation.yaml"]


def run_fit(run_dir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "causalrn.fit", "--config", "configs/copy/quickstart.yaml", *flags]
    settings = {"max_steps": 10, "val_check_interval": 5, "log_every_n_steps": 1, "accelerator": "cpu"}
    trainer = [part for key, value in settings.items() for part in (f"--trainer.{key}", str(value))]
    return subprocess.run(
        [*command, *trainer, "--run_dir", str(run_dir)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("overlay", "mixer"), [("ddp", []), ("context_parallel", LINEAR)])
def test_two_processes_train_as_one(overlay: str, mixer: list[str], tmp_path: Path) -> None:
    metrics = {}
    for name, flags in (
        ("one", ["--config", "configs/trainer/cpu.yaml"]),
        ("two", ["--config", f"configs/trainer/{overlay}.yaml", "--trainer.devices", "2"]),
    ):
        done = run_fit(tmp_path / name, *mixer, *flags)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("exact match") == 1
        rows = read_metrics(tmp_path / name / "metrics.csv")
        same = ("val/loss", "train/grad_norm", "norms/update/block_01")
        metrics[name] = [row[key] for row in rows for key in row if key in same]
        metrics[name] += [row["val/character_accuracy"] for row in rows if "val/character_accuracy" in row]
        assert all(0 <= row["train/data_share"] < 1 for row in rows if "train/loss" in row)
    # Sums of other order than on one process: float32 noise, grown over 10 steps.
    assert metrics["two"] == pytest.approx(metrics["one"], rel=1e-3)


@pytest.mark.slow
def test_only_the_linear_relation_can_be_split(tmp_path: Path) -> None:
    done = run_fit(
        tmp_path / "run", "--config", "configs/trainer/context_parallel.yaml", "--trainer.devices", "1"
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "LinearRelation layers only: got QuadraticRelation" in line
