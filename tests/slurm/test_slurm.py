"""launch/fit.sbatch on a real SLURM of two nodes: preempted, requeued, cancelled, and as an array."""

import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launch.__main__ import main as launch
from tests.faults import FAULT, ROOT, write_config
from tests.slurm.cluster import Cluster, install, running
from tests.training.test_crashes import same_weights
from tests.training.test_preemption import losses

pytestmark = pytest.mark.slow
JOB_SECONDS = 500


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not install():
        # Where the tests are everybody's, SLURM must be there; at home it may be missing.
        assert "CI" not in os.environ, "SLURM cannot be installed"
        pytest.skip("SLURM cannot be installed here: want Debian or Ubuntu, and root")
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Runs:
    """Submits runs of the small copy config and waits for them."""

    def __init__(self, cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster, self.folder, self.monkeypatch = cluster, folder, monkeypatch
        for name, value in {**cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}.items():
            monkeypatch.setenv(name, value)
        self.config = str(write_config(folder / "config.yaml"))

    def submit(
        self, capsys: pytest.CaptureFixture[str], options: list[str], command: list[str], fault: str = "{}"
    ) -> str:
        self.monkeypatch.setenv(FAULT, fault)
        launch([*options, "--", *command])
        (job,) = re.findall(r"submitted job (\d+)", capsys.readouterr().out)
        return job

    def two_nodes(
        self, capsys: pytest.CaptureFixture[str], run_dir: Path, fault: str = "{}", *more: str
    ) -> str:
        return self.submit(
            capsys,
            ["--nodes", "2", "--time", "10"],
            ["--config", self.config, "--run_dir", str(run_dir), *more],
            fault,
        )

    def state(self, job: str) -> str:
        return self.cluster.ask("squeue", "-h", "-j", job, "-o", "%T") or "GONE"

    def ended(self, *jobs: str) -> None:
        self.until(
            lambda: all("Invalid job id" in self.state(job) or self.state(job) == "GONE" for job in jobs),
            "end",
        )

    def until(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + JOB_SECONDS
        while not ready():
            logs = "\n".join(
                f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in self.folder.rglob("*.log")
            )
            assert time.monotonic() < deadline, f"no {what} within {JOB_SECONDS} s\n{logs}"
            time.sleep(0.5)


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(cluster, tmp_path, monkeypatch)


def test_a_signalled_job_comes_back_and_ends_as_if_nothing_had_been(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken, cancelled = (tmp_path / name for name in ("whole", "broken", "cancelled"))
    undisturbed = runs.two_nodes(capsys, whole)
    runs.ended(undisturbed)
    waits = '{"kind": "wait for a signal", "rank": 0, "step": 6}'
    signalled = runs.two_nodes(capsys, broken, waits)
    runs.until((broken / "waiting").exists, "waiting run")
    runs.cluster.ask("scancel", "--signal=USR1", signalled)
    runs.ended(signalled)
    log = (broken / "logs" / f"{signalled}.log").read_text()
    assert f"job {signalled}, start 1" in log
    assert f"job {signalled}, start 2" in log
    ranks = [(broken / "logs" / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert "SIGUSR1: saved at step 8; back in the queue" in ranks[0]
    assert "12 steps in" in ranks[0]
    # Rank 1 says nothing of its own.
    assert "12 steps in" not in ranks[1]
    same_weights(whole, broken)
    assert losses(whole) == losses(broken)
    assert (broken / "launch" / "config.yaml").exists()
    assert (broken / "launch" / "launch.json").exists()

    # A cancelled one is saved and stays away.
    job = runs.two_nodes(capsys, cancelled, waits)
    runs.until((cancelled / "waiting").exists, "waiting run")
    runs.cluster.ask("scancel", job)
    runs.ended(job)
    assert "SIGTERM: saved at step 8; exit code 75" in (cancelled / "logs" / "rank-0.log").read_text()
    assert "start 2" not in (cancelled / "logs" / f"{job}.log").read_text()


def test_zero_trains_on_two_nodes_and_comes_back(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = {1: "{}", 2: '{"kind": "wait for a signal", "rank": 0, "step": 6}'}
    folders = {stage: tmp_path / f"zero{stage}" for stage in fault}
    for stage, folder in folders.items():
        strategy = tmp_path / f"zero{stage}.yaml"
        trainer = {
            "strategy": {
                "class_path": "tests.cpu_deepspeed.CPUZeroStrategy",
                "init_args": {"stage": stage},
            }
        }
        strategy.write_text(yaml.safe_dump({"trainer": trainer}))
        job = runs.two_nodes(capsys, folder, fault[stage], "--config", str(strategy))
        if stage == 2:
            runs.until((folder / "waiting").exists, "waiting run")
            runs.cluster.ask("scancel", "--signal=USR1", job)
        runs.ended(job)
        log = (folder / "logs" / "rank-0.log").read_text()
        assert "12 steps in" in log, log[-3000:]
        assert ("SIGUSR1: saved at step 8; back in the queue" in log) == (stage == 2)
    # The same batches, gradients and random numbers, whatever is partitioned and whether it was interrupted.
    one, two = (list(itertools.chain.from_iterable(losses(folder))) for folder in folders.values())
    assert two == pytest.approx(one, rel=1e-4)


def test_an_array_of_a_small_sweep(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = (
        f"{sys.executable} -m causalrn.fit --config {runs.config} --trainer.strategy auto --trainer.devices 1 "
        f"--seed_everything $SLURM_ARRAY_TASK_ID --run_dir {tmp_path}/seed_$SLURM_ARRAY_TASK_ID"
    )
    options = ["--array", "2", "--time", "10", "--run-dir", str(tmp_path / "sweep")]
    job = runs.submit(capsys, options, ["bash", "-c", run])
    runs.ended(job)
    for seed in range(2):
        assert (tmp_path / f"seed_{seed}" / "results.json").exists(), (tmp_path / "sweep").rglob("*.log")
