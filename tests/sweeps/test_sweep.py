"""The command `causalrn.sweep`: its flags, its page, and the task of a job array."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from causalrn import sweep
from causalrn.sweeps.folder import SweepFolder
from causalrn.sweeps.grid import read_sweep
from causalrn.sweeps.points import plan_points
from tests import ROOT
from tests.sweeps.sweep_files import RATE, run
from tests.test_fit import error_of


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
