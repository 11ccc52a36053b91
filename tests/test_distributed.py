"""The same command on two processes: one run folder, and the loss curve of one process on the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from causalrn.loggers import read_metrics

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    losses = {}
    for name, overlay in (
        ("one", ["--config", "configs/trainer/cpu.yaml"]),
        ("two", ["--config", "configs/trainer/ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]),
    ):
        run_dir = tmp_path / name
        command = [sys.executable, "-m", "causalrn.fit", "--config", "configs/copy/quickstart.yaml", *overlay]
        settings = {"trainer.max_steps": 10, "trainer.val_check_interval": 5, "trainer.log_every_n_steps": 1}
        flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        done = subprocess.run(
            [*command, *flags, "--run_dir", str(run_dir)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("exact match") == 1
        rows = read_metrics(run_dir / "metrics.csv")
        losses[name] = [row["val/loss"] for row in rows if "val/loss" in row]
    # Two sums of 32 strings instead of one of 64: float32 noise, grown over 10 steps.
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
