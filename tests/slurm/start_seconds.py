"""How long a job of two local nodes takes to its first step, and a requeued one to its first resumed step.

Run on an idle machine as `python -m tests.slurm.start_seconds`; ends in one JSON line.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import FAULT, ROOT, write_config
from tests.slurm.cluster import install, running

LIMIT_SECONDS = 300


def wait_for(path: Path) -> float:
    """When the file appeared."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"no {path} within {LIMIT_SECONDS} s")
        time.sleep(0.02)
    return time.monotonic()


def main() -> None:
    if not install():
        raise SystemExit("SLURM cannot be installed here")
    with tempfile.TemporaryDirectory() as folder, running(Path(folder, "slurm")) as cluster:
        config = write_config(Path(folder, "config.yaml"))
        run_dir = Path(folder, "run")
        # Each start marks its first step in the folder, and waits there for a signal.
        fault = json.dumps({"kind": "wait for a signal", "rank": 0, "step": "first"})
        environment = {**cluster.environment, FAULT: fault, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "launch", "--nodes", "2", "--time", "10", "--"]
        submitted = time.monotonic()
        done = subprocess.run(
            [*command, "--config", str(config), "--run_dir", str(run_dir)],
            env={**os.environ, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        (job,) = re.findall(r"submitted job (\d+)", done.stdout)
        first = wait_for(run_dir / "waiting") - submitted
        (run_dir / "waiting").unlink()
        signalled = time.monotonic()
        cluster.ask("scancel", "--signal=USR1", job)
        resumed = wait_for(run_dir / "waiting") - signalled
        cluster.ask("scancel", job)
        record = {"submit_to_first_step_seconds": first, "signal_to_first_resumed_step_seconds": resumed}
    print(json.dumps({"benchmark": "slurm_start", "nodes": 2, **record}))


if __name__ == "__main__":
    main()
