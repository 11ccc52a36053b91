"""Two processes that run a plan of trainings one after the other: starting Python once, not once per training."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import ROOT


def run_plan(plan: list[list[str]], folder: Path, ranks: int = 2) -> list[dict[str, Any]]:
    """Runs causalrn.fit with each of the plan's arguments on all ranks; per training its exit code and error line.

    Each training needs a --run_dir. All ranks are real processes with gloo between them.
    """
    jobs = [{"args": args, "port": free_port()} for args in plan]
    path = folder / "plan.json"
    path.write_text(json.dumps(jobs))
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(ranks),
        }
        with (folder / f"rank{rank}.log").open("w") as log:
            command = [sys.executable, "-m", "tests.ranks", str(path)]
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, (folder / "rank0.log").read_text()[-3000:]
    return json.loads((folder / "outcomes.json").read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(path: Path) -> None:
    from causalrn import fit
    from causalrn.training.errors import USER_ERRORS

    outcomes = []
    for job in json.loads(path.read_text()):
        forget_the_last_run()
        os.environ["MASTER_PORT"] = str(job["port"])
        try:
            fit.main(job["args"])
            outcomes.append({"error": None})
        except USER_ERRORS as error:
            outcomes.append({"error": str(error)})
    if os.environ["LOCAL_RANK"] == "0":
        (path.parent / "outcomes.json").write_text(json.dumps(outcomes))


def forget_the_last_run() -> None:
    """DeepSpeed keeps its groups for the life of a process, and takes them for those of the next training."""
    if "deepspeed" not in sys.modules:
        return
    import deepspeed.comm.comm
    from deepspeed.utils import groups

    deepspeed.comm.comm.cdb = None
    for name in [name for name in vars(groups) if name.startswith("_") and name.endswith("GROUP")]:
        setattr(groups, name, None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
