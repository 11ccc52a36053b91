"""Files replaced in one step, and a lock that outlives nobody."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules import files
from datamodules.files import Lock, replacing, write_json

HOLD = (
    "import os, sys, time; from pathlib import Path; from datamodules.files import Lock\n"
    "lock = Lock(Path(sys.argv[1]), 'it')\n"
    # A worker that lives on when its parent is killed.
    "if os.fork() == 0: time.sleep(600)\n"
    "print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def held(tmp_path: Path):
    """A lock file, and another process that holds it."""
    path = tmp_path / ".lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield path, process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with process:
        process.wait()


def test_a_lock_names_its_holder_and_dies_with_it(held: tuple[Path, subprocess.Popen[str]]) -> None:
    path, process = held
    with pytest.raises(ValueError, match=f"the thing is in use by process {process.pid} on "):
        Lock(path, "the thing")
    process.kill()
    process.wait()
    # Its fork is alive.
    with Lock(path, "the thing") as lock:
        assert not lock.waited
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_waiting_takes_the_lock_when_it_is_free(held: tuple[Path, subprocess.Popen[str]]) -> None:
    path, process = held
    # The holder leaves by itself while this process waits.
    assert process.stdin is not None
    process.stdin.close()
    with Lock(path, "it", wait=True):
        assert files.read_holder(path)["pid"] == os.getpid()


def test_a_process_may_hold_a_lock_twice(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with Lock(path, "it"):
        Lock(path, "it").release()
        assert path.exists()
    assert not path.exists()


def test_a_requeued_job_takes_its_lock_from_a_machine_that_failed(
    held: tuple[Path, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = held
    # As a file server does that has not noticed the end of the other machine.
    path.write_text(json.dumps({**files.holder(), "host": "elsewhere", "job": "17"}))
    monkeypatch.setattr(files, "REQUEUE_SECONDS", 0.0)
    with pytest.raises(ValueError, match="on elsewhere"):
        Lock(path, "it")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.warns(UserWarning, match="taken over: process .* on elsewhere"), Lock(path, "it"):
        assert files.read_holder(path)["host"] != "elsewhere"


def test_what_is_interrupted_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, [1])

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert json.loads(path.read_text()) == [1]
    assert list(tmp_path.iterdir()) == [path]
