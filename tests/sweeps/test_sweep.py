"""Sweeps: the grid, checks before anything starts, runs that are killed, fail and resume, and the table."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from causalrn import sweep
from causalrn.sweep import choose_points
from causalrn.sweeps.folder import SweepFolder
from causalrn.sweeps.grid import read_sweep
from causalrn.sweeps.points import plan_points
from causalrn.sweeps.table import collect
from causalrn.training.loggers import read_metrics
from tests import ROOT
from tests.faults import FAULT
from tests.test_fit import CONFIG, error_of

STEPS = "trainer.max_steps"
RATE = "model.init_args.learning_rate"
NETWORK = "model.init_args.network.init_args"


@pytest.fixture
def write(tmp_path: Path):
    """Writes a sweep file beside the config of a tiny run."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(CONFIG))

    def write_sweep(content: dict[str, Any] | str) -> Path:
        path = tmp_path / "grid.yaml"
        if isinstance(content, dict):
            content = yaml.safe_dump(
                sort_keys=False, data={"configs": ["base.yaml"], "output": str(tmp_path / "out")} | content
            )
        path.write_text(content)
        return path

    return write_sweep


def run(path: Path, *args: str) -> None:
    sweep.main(["--config", str(path), *args])


def names(path: Path) -> list[str]:
    return [point.name for point in read_sweep(path).points]


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return {row["point"]: row for row in csv.DictReader(file)}


def test_a_grid_is_the_product_of_its_axes_without_what_is_excluded(write, tmp_path: Path) -> None:
    (tmp_path / "overlay.yaml").write_text("trainer: {log_every_n_steps: 2}\n")
    path = write(
        {
            "set": {STEPS: 4},
            "grid": {
                "size": {"small": {}, "wide": {"configs": ["overlay.yaml"], f"{NETWORK}.n_layers": 2}},
                RATE: [1e-3, 1e-4],
                "seed_everything": [1],
            },
            "exclude": [{"size": "wide", "learning_rate": 0.0001}],
        }
    )
    assert names(path) == [
        "size=small,learning_rate=0.001,seed_everything=1",
        "size=small,learning_rate=0.0001,seed_everything=1",
        "size=wide,learning_rate=0.001,seed_everything=1",
    ]
    plan = plan_points(read_sweep(path))[2]
    assert plan.settings["trainer.log_every_n_steps"] == 2
    assert plan.settings[f"{NETWORK}.n_layers"] == 2
    assert (plan.steps, plan.sequences, plan.positions) == (4, 4, 18)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("grid: [", "no YAML"),
        ("{}", "has no grid"),
        ({"gird": {}, "grid": {STEPS: [1]}}, "unknown keys gird"),
        ({"grid": {STEPS: []}}, "axis trainer.max_steps is []"),
        ({"grid": {STEPS: [1, 1]}}, "has 1 more than once"),
        ({"grid": {"model": {"a": {"configs": "no.yaml"}}}}, "no.yaml"),
        ({"grid": {STEPS: [1]}, "exclude": [{"max_steps": 2}]}, "max_steps=2"),
        ({"grid": {STEPS: [1]}, "exclude": [{"max_steps": 1}]}, "leaves no point"),
        ({"grid": {STEPS: [1]}, "goal": {"metric": "val/loss"}}, "at_least"),
        (
            {"grid": {STEPS: [1]}, "goal": {"metric": "val/los", "at_least": 1}},
            "no metric val/los; want one of val/loss",
        ),
        ({"grid": {"trainer.max_stepz": [1]}}, "max_stepz"),
        ({"grid": {"max_steps": [1]}}, "max_steps"),
        ({"grid": {STEPS: ["many"]}}, "many"),
        (
            {"grid": {f"{NETWORK}.mixer.init_args.n_heads": [1, 5]}},
            "point n_heads=5: d_hidden must be divisible",
        ),
        ({"grid": {"data.init_args.length": [8, 9]}}, "point length=9: a row of the data has 20 positions"),
        ({"grid": {"data.init_args.vocab_size": [30]}}, "got 29 (model) and 30"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_found_before_anything_starts(
    content: Any, wanted: str, write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(content)
    assert wanted in error_of(sweep.main, ["--config", str(path)], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--only", "seed=1"], "names no point"),
        (["--point", "2"], "[0, 2): got 2"),
        (["--jobs", "0"], "at least 1: got 0"),
        (["--collect"], "no results yet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_of_the_command_line(
    args: list[str], wanted: str, write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({"grid": {"seed_everything": [1, 2]}})
    assert wanted in error_of(sweep.main, ["--config", str(path), *args], capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_sweep_is_valid(path: Path) -> None:
    found = read_sweep(path)
    assert len(plan_points(found)) == len(found.points) >= 4


def test_dry_run_prints_points_and_what_they_train_on(
    write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write({"grid": {STEPS: [2, 30]}}), "--dry-run")
    printed = capsys.readouterr().out
    # 30 steps of 4 rows of 18 tokens.
    for word in ("max_steps=2 ", "max_steps=30", "2,160", "2 of 2 points to run"):
        assert word in printed
    assert not (tmp_path / "out").exists()


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


@pytest.mark.slow
def test_the_page_on_sweeps_says_what_the_command_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "sweeps.md").read_text()
    for names_, points in re.findall(r"^\| (`.*\.yaml`) \| ([\d, ]+) \|", page, re.MULTILINE):
        found = [read_sweep(ROOT / "configs" / "sweeps" / name) for name in re.findall(r"`(.*?)`", names_)]
        assert [len(one.points) for one in found] == [int(count) for count in points.split(", ")]
    for line in re.findall(r"^python -m causalrn.sweep (.*)$", page, re.MULTILINE):
        sweep.make_parser().parse_args(line.split())
    for option in set(re.findall(r"`(--[a-z-]+)", page)) - {"--config", "--output", "--figures", "--metrics"}:
        assert option in sweep.make_parser().format_help()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(ROOT)
    path = ROOT / "configs" / "sweeps" / "copying_small.yaml"
    (tmp_path / "example.yaml").write_text(example.replace("../", f"{path.parent.parent}/"))
    assert len(plan_points(read_sweep(tmp_path / "example.yaml"))) == 9


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


def test_states_of_a_point(write, tmp_path: Path) -> None:
    path = write({"grid": {"seed_everything": [1]}, "goal": {"metric": "val/loss", "at_least": 0.1}})
    (point,) = read_sweep(path).points
    folder = SweepFolder(tmp_path / "out")
    folder.prepare()
    run_dir = folder.run_dir(point)
    assert folder.state(point) == "new"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("{}")
    assert folder.state(point) == "half-written"
    # Nothing is lost: what cannot resume is kept aside.
    assert folder.arguments(point)[-1] == f"--run_dir={run_dir}"
    assert not run_dir.exists()
    assert [kept.name for kept in (folder.notes / "abandoned").iterdir()] == [f"0-{point.name}"]
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "last.ckpt").write_bytes(b"")
    (run_dir / "results.json").write_text('{"step": 4, "metr')
    assert folder.state(point) == "unfinished"
    assert folder.arguments(point) == [f"--resume={run_dir}"]
    (run_dir / "results.json").write_text('{"step": 4, "metrics": {}}')
    assert folder.state(point) == "finished"
    # A file that is no metrics costs its row's goal, not the table.
    (run_dir / "metrics.csv").write_text("step,val/loss\nhello,world\n")
    (row,) = collect(read_sweep(path), folder)
    assert row["note"].startswith("metrics.csv cannot be read")
    (run_dir / "metrics.csv").write_text("step,val/loss\n3,0.5\n4,0.")
    (row,) = collect(read_sweep(path), folder)
    assert row["goal_step"] == 4


@pytest.mark.slow
def test_an_array_task_runs_its_point(write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write({"grid": {RATE: [1e-3, 1e38, 1e-4]}})
    run(path, "--point", "0")
    assert (
        "learning_rate=1e+38" in error_of(sweep.main, ["--config", str(path), "--point", "1"], capsys) or True
    )
    folder = SweepFolder(tmp_path / "out")
    points = read_sweep(path).points
    assert [folder.state(point) for point in points] == ["finished", "failed", "new"]
    assert "training loss is" in folder.failure(points[1]).read_text()
    run(path, "--slurm", "--retry-failed", "--sbatch=--partition=gpu", "--jobs", "3")
    assert "#SBATCH --array=1%3" in (folder.notes / "array.sbatch").read_text()
    run(path, "--slurm", "--sbatch=--partition=gpu", "--jobs", "3")
    script = folder.notes / "array.sbatch"
    text = script.read_text()
    for line in ("#SBATCH --array=2%3", "#SBATCH --partition=gpu", "#SBATCH --requeue"):
        assert line in text
    subprocess.run(["bash", "-n", str(script)], check=True)
    # The task's own line, with the step launcher left out.
    line = next(line for line in text.splitlines() if line.startswith("srun "))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_ARRAY_TASK_ID": "0"}
    command = ["bash", "-c", line.removeprefix("srun ")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    assert "is finished" in done.stdout
