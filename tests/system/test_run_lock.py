"""One job at a time in a run folder, and no lock that outlives its holder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from causalrn import fit
from causalrn.system.run_lock import NAME, RunLock, holder
from tests.test_fit import config, error_of  # noqa: F401 - a fixture

HOLD = (
    "import sys; from pathlib import Path; from causalrn.system.run_lock import RunLock\n"
    "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the folder until its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_two_jobs_do_not_share_a_folder(
    tmp_path: Path,
    config: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    process = hold(run_dir)
    try:
        arguments = ["--config", str(config), "--run_dir", str(run_dir)]
        line = error_of(fit.main, arguments, capsys)
        assert f"run folder {run_dir} is in use by process {process.pid} on " in line
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    # Killed, it could not remove its lock.
    assert (run_dir / NAME).exists()
    with pytest.warns(UserWarning, match=f"is taken over: process {process.pid} on .* is gone"):
        fit.main(arguments)
    assert not (run_dir / NAME).exists()


def test_a_lock_of_another_machine_counts_while_it_is_touched(tmp_path: Path) -> None:
    lock = tmp_path / NAME
    lock.write_text(json.dumps({**holder(), "host": "elsewhere"}))
    with pytest.raises(ValueError, match="is in use by process .* on elsewhere"):
        RunLock(tmp_path)
    long_ago = time.time() - 1000
    os.utime(lock, (long_ago, long_ago))
    with pytest.warns(UserWarning, match="on elsewhere is gone"):
        RunLock(tmp_path).release()


def test_a_requeued_job_takes_its_own_lock_from_a_node_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    (tmp_path / NAME).write_text(json.dumps({**holder(), "host": "elsewhere"}))
    with pytest.warns(UserWarning, match="taken over"):
        RunLock(tmp_path).release()


def test_a_process_number_that_is_used_again_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps({**holder(), "started": "1"}))
    with pytest.warns(UserWarning, match="taken over"):
        lock = RunLock(tmp_path)
    # One process may hold it again, as a notebook does.
    RunLock(tmp_path).release()
    lock.release()
    assert not tmp_path.exists()


@pytest.mark.parametrize("folder", ["/sys/causalrn-run", "{file}/run"])
def test_a_folder_that_cannot_be_written_is_one_line(
    folder: str,
    tmp_path: Path,
    config: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    run_dir = folder.format(file=tmp_path / "file")
    line = error_of(fit.main, ["--config", str(config), "--run_dir", run_dir], capsys)
    assert f"run folder {run_dir} cannot be written" in line
