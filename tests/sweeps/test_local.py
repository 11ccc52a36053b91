"""Points run on this machine: skipped, retried, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from causalrn import sweep
from causalrn.sweep import choose_points
from causalrn.sweeps.folder import SweepFolder
from causalrn.sweeps.grid import read_sweep
from causalrn.training.loggers import read_metrics
from tests import ROOT
from tests.faults import FAULT
from tests.sweeps.sweep_files import RATE, STEPS, run, table
from tests.test_fit import error_of


@pytest.mark.slow
def test_finished_points_are_skipped_and_failed_ones_retried_alone(
    write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goal = {"metric": "val/loss", "at_least": 0.0}
    path = write({"grid": {RATE: [1e-3, 1e38]}, "goal": goal})
    out = tmp_path / "out"
    printed = ""
    for _ in range(2):
        with pytest.raises(SystemExit) as exit_info:
            run(path, "--jobs", "2")
        assert exit_info.value.code == 1
        printed = capsys.readouterr().out
        assert "failed: learning_rate=1e+38 (exit code 1)" in printed
        assert "error: training loss is" in printed
        assert "--retry-failed" in printed
    assert "0 points to run, 1 of 2 finished" in printed
    folder = SweepFolder(out)
    good, bad = read_sweep(path).points
    assert folder.log(good).read_text().count("run folder") == 1
    assert folder.log(bad).read_text().count("run folder") == 1
    rows = table(out)
    assert rows[good.name]["state"] == "finished"
    assert rows[good.name]["goal_step"] == "3"
    assert rows[bad.name]["state"] == "failed"
    results = json.loads((out / good.name / "results.json").read_text())
    assert float(rows[good.name]["val/loss"]) == results["metrics"]["val/loss"]
    assert choose_points(read_sweep(path), folder, None, retry_failed=True) == [bad]
    assert choose_points(read_sweep(path), folder, ["*=1e+38"], retry_failed=False) == [bad]
    with pytest.raises(SystemExit):
        run(path, "--retry-failed")
    shown = capsys.readouterr().out
    for word in ("[0/1] started  learning_rate=1e+38", "[1/1] failed   learning_rate=1e+38: exit code 1"):
        assert word in shown
    assert folder.log(good).read_text().count("run folder") == 1
    assert folder.log(bad).read_text().count("run folder") == 2
    # The folder remembers with which settings its points were run.
    other = write({"set": {STEPS: 9}, "grid": {RATE: [1e-3, 1e38]}})
    assert "trainer.max_steps was 6 and is 9" in error_of(sweep.main, ["--config", str(other)], capsys)


def start(path: Path) -> subprocess.Popen[str]:
    """A sweep whose runs wait at step 40 for a signal, or for the file `go`."""
    command = [sys.executable, "-m", "causalrn.sweep", "--config", str(path)]
    fault = json.dumps({"kind": "wait for a signal", "rank": 0, "step": 40})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", FAULT: fault}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    """Returns once the condition holds, which the process brings about."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "terminate"])
def test_a_sweep_survives_a_kill(
    number: int, write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        STEPS: 60,
        "trainer.val_check_interval": 20,
        "trainer.callbacks": [{"class_path": "tests.faults.Fault"}],
    }
    path = write({"grid": {"seed_everything": [1]}, "set": settings})
    (point,) = read_sweep(path).points
    folder = SweepFolder(tmp_path / "out")
    process = start(path)
    wait_for((folder.run_dir(point) / "waiting").exists, process)
    assert "is in use by process" in error_of(sweep.main, ["--config", str(path)], capsys)
    process.send_signal(number)
    process.communicate(timeout=300)
    assert process.returncode == (130 if number == signal.SIGTERM else -number)
    # Killed, a sweep leaves its run alone, which goes on; a new sweep waits for it. Told to end, it ends the run.
    if number == signal.SIGTERM:
        assert not folder.is_running(point)
    (folder.run_dir(point) / "go").touch()
    run(path)
    printed = capsys.readouterr().out
    assert folder.state(point) == "finished"
    assert table(folder.path)[point.name]["step"] == "60"
    assert "earlier sweep" in printed or "resumed" in printed or number == signal.SIGKILL
    steps = [row["step"] for row in read_metrics(folder.run_dir(point) / "metrics.csv")]
    assert steps == list(range(61))
